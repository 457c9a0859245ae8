"""The environment of ranks: what Midwatch adds to it, and what of it may be written down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|PRIVATE|SESSION|DSN", re.IGNORECASE)
"""Names of variables whose values are nobody's business."""
_URL_PASSWORD = re.compile(r"(://[^/:@\s]*:)[^@/\s]+@")
_OF_THE_MOMENT = frozenset({"OLDPWD", "SHLVL", "_", "SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY"})
_OF_THE_PROCESS = ("MIDWATCH_", "SLURM", "SRUN_")
"""How the names of those begin that tell a process where it is: each start has others."""
MASK = "***"


def rank_environment(threads: int, interface: str | None) -> dict[str, str]:
    """Variables that ranks get whatever else is set; collectives keep to the interface, where one is named."""
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    environment["TORCH_FR_BUFFER_SIZE"] = "2000"  # collectives that the flight recorder remembers, for when ranks hang
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if interface is not None:
        environment |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), interface)
    return environment


def presentable(environment: Mapping[str, str]) -> dict[str, str]:
    """What the journal may hold: secrets masked, and left out what differs from one start to the next."""
    shown = {}
    for name, value in sorted(environment.items()):
        if name not in _OF_THE_MOMENT and not name.startswith(_OF_THE_PROCESS):
            shown[name] = MASK if SECRET.search(name) else mask_url(value)[:2000]
    return shown


def mask_url(text: str) -> str:
    """With the passwords of URLs masked."""
    return _URL_PASSWORD.sub(rf"\1{MASK}@", text)
