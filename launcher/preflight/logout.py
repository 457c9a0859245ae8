"""Whether this system ends a user's processes when the user logs out."""

from __future__ import annotations

import configparser
import getpass
import os
from pathlib import Path


def kills_at_logout(root: Path = Path("/")) -> bool:
    """True under systemd-logind with KillUserProcesses, unless the user lingers or is exempt."""
    if not (root / "run/systemd/system").is_dir() or os.environ.get("INVOCATION_ID"):
        return False
    setting, exempt = "no", "root"
    files = [root / "etc/systemd/logind.conf", *sorted((root / "etc/systemd/logind.conf.d").glob("*.conf"))]
    for file in files:
        parser = configparser.ConfigParser(strict=False)
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
        setting = parser.get("Login", "KillUserProcesses", fallback=setting)
        exempt = parser.get("Login", "KillExcludeUsers", fallback=exempt)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        return False
    lingers = (root / "var/lib/systemd/linger" / user).exists()
    return setting.lower() in ("yes", "true", "1", "on") and not lingers and user not in exempt.split()
