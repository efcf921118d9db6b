"""A real vLLM server for tests to share: it takes a minute to start."""

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arealite.inference.server import ServerConfig, serve


@dataclass(frozen=True)
class RealServer:
    """A server that asks for a token, and what its clients need."""

    address: str
    model: str
    run_dir: Path  # with its log
    token: str
    cfg: ServerConfig


@contextlib.contextmanager
def run_server(model: str, folder: Path) -> Iterator[RealServer]:
    """Serve the model with a new token; what the run writes is in a folder of its own."""
    token = f"sentinel-{secrets.token_hex(8)}"
    token_file, run_dir = folder / "token", folder / "run"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    cfg = ServerConfig(token_file=str(token_file), sleep=True)  # which a CPU server only pretends
    with serve(model, cfg, log_dir=run_dir) as servers:
        yield RealServer(servers.addresses[0], model, run_dir, token, cfg)
