"""Who may do what in a run: its owner and root everything, the group of its operators watch and command."""

from __future__ import annotations

import contextlib
import getpass
import grp
import os
import pwd
import re
import stat
from pathlib import Path

from midwatch.recipe import RecipeError


def group_id(name: str, where: str) -> int:
    """The group named by `[cluster] operators`. Raises RecipeError, with `where` the recipe is, if there is none."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        way = "name one that `getent group` lists, or leave the key out"
        raise RecipeError(f'{where}: [cluster] operators: there is no group "{name}" on this machine; {way}') from None


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def own_name() -> str:
    """This user's name; `uid N` where the system knows none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def is_member(uid: int, gid: int) -> bool:
    """Whether the system's database puts the user into the group, first or further."""
    try:
        user = pwd.getpwuid(uid)
        return gid in os.getgrouplist(user.pw_name, user.pw_gid)
    except (KeyError, OSError):
        return False


def socket_directory(group: str, gid: int) -> Path:
    """A directory that the owner and the group can enter and only the owner can change. Raises PermissionError."""
    word = group if re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", group) else str(gid)
    directory = Path("/tmp") / f"midwatch-{os.getuid()}-{word}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{directory}: must be a directory of yours, and is not; have it removed")
    try:
        if status.st_gid != gid:
            os.chown(directory, -1, gid, follow_symlinks=False)
        directory.chmod(0o750)
    except OSError:
        raise PermissionError(
            f'{directory}: cannot be opened to the group "{group}" of [cluster] operators: you are no member of it'
        ) from None
    return directory
