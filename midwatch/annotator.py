"""Who annotates preferences, where nobody else was named."""

from __future__ import annotations

import getpass
import re
import uuid

from midwatch import protocol as p


def begin_of_user() -> p.PreferenceBegin:
    """Of a screen that was not opened for it: this user, the newest checkpoint, the newest stage's prompts."""
    return p.PreferenceBegin(id=0, annotator=own_name(), session=uuid.uuid4().hex)


def own_name() -> str:
    """The system's name of this user, as far as it can name a file."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = ""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:64] or "annotator"
