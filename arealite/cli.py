"""The `arealite` command: `arealite serve --model MODEL [key=value ...]`."""

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from arealite.config import install_excepthook, parse
from arealite.inference.server import ServerConfig, serve


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Servers that trainers attach to with `server.addresses`."""

    model: str = "arealite/tiny-math"
    """Hugging Face id or folder; `arealite/tiny-math` is the embedded model that runs anywhere."""
    server: ServerConfig = ServerConfig()


def main(argv: Sequence[str] | None = None) -> None:
    """Start servers, print their addresses, and run until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="arealite", description=__doc__)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("--model", default=ServeConfig.model, help="Hugging Face id or folder")
    parser.add_argument("settings", nargs="*", help="such as server.gpus=0,1; see ServerConfig")
    arguments = parser.parse_args(argv)
    install_excepthook()
    cfg = parse(ServeConfig, [f"model={arguments.model}", *arguments.settings])
    with serve(cfg.model, cfg.server) as servers:
        print(f"server.addresses=[{','.join(servers.addresses)}]", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping the servers", file=sys.stderr)
