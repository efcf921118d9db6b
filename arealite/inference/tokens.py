"""The secret that servers ask for, and where it comes from: never a command line or a config."""

import os
import stat
from pathlib import Path

from arealite.errors import ConfigError

TOKEN = "AREALITE_TOKEN"
"""Environment variable with the token, of clients and servers alike."""
CLIENT_HEADER = "X-Arealite-Client"
"""Names the process that asks, so that a server knows when the one that paused it is gone."""


def find_token(token_file: str = "") -> str:
    """The token in the file, else in the environment; empty if there is none.

    Raises:
        ConfigError: others may read the file, or it cannot be read, or holds no usable token.
    """
    if not token_file:
        token = os.environ.get(TOKEN, "").strip()
        return _checked(token, TOKEN) if token else ""
    path = Path(token_file).expanduser()
    try:
        mode = path.stat().st_mode
        token = path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"server.token_file={token_file}: {error.strerror}.") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"server.token_file={token_file} can be read by others: chmod 600 it.")
    return _checked(token, f"server.token_file={token_file}")


def _checked(token: str, where: str) -> str:
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{where} holds no token: one line of ASCII.")
    return token
