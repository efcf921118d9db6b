"""What a name on the command line means: something on this machine, or an id on the Hub."""

import os
import re
from pathlib import Path

_HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


def local_path(name: str) -> Path | None:
    """The file or folder that `name` means, or None if there is none."""
    # os.path, because Path raises for names that are too long or have no user behind their ~.
    path = os.path.expanduser(name)
    return Path(path) if os.path.isfile(path) or os.path.isdir(path) else None


def is_hub_id(name: str) -> bool:
    """Whether `name` could be an id on the Hugging Face Hub, such as `openai/gsm8k`."""
    return len(name) <= 96 and re.fullmatch(_HUB_ID, name, re.ASCII) is not None
