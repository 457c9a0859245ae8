"""What an sshd of a test, and the ssh that visits it, are told."""

from __future__ import annotations

import subprocess
from pathlib import Path

SSHD = """
ListenAddress {address}
HostKey {host_key}
AuthorizedKeysFile {user_key}.pub
PidFile none
UsePAM no
UseDNS no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxStartups 200
MaxSessions 200
SetEnv {environment}
"""

CLIENT = """
Host {name}
    HostName {address}
    User root
    IdentityFile {user_key}
    IdentitiesOnly yes
    UserKnownHostsFile {known_hosts}
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking accept-new
"""


def configure(directory: Path, name: str, address: str, **environment: Path) -> str:
    """Writes a host's key and DIRECTORY/NAME/sshd_config; returns the part of a client's configuration that knows the host."""
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it
    mine, user_key = directory / name, directory / "user_key"
    mine.mkdir(exist_ok=True)
    keygen(user_key)
    keygen(mine / "host_key")
    told = " ".join(f"{key}={value}" for key, value in environment.items())
    server = SSHD.format(address=address, host_key=mine / "host_key", user_key=user_key, environment=told)
    (mine / "sshd_config").write_text(server)
    return CLIENT.format(name=name, address=address, user_key=user_key, known_hosts=directory / "known_hosts")


def keygen(file: Path) -> None:
    """Makes an ssh key without a passphrase."""
    if not file.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "midwatch-test", "-f", str(file)], check=True)
