"""The `arealite` command: `arealite serve --model MODEL [key=value ...]`."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from arealite.config import install_excepthook, parse
from arealite.errors import ConfigError, ServerError
from arealite.inference.server import ServerConfig, serve


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Servers that trainers attach to with `server.addresses`."""

    model: str = "arealite/tiny-math"
    """Hugging Face id or folder; `arealite/tiny-math` is the embedded model that runs anywhere."""
    server: ServerConfig = ServerConfig()


def main(argv: Sequence[str] | None = None) -> None:
    """Start servers, print their addresses, and run until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="arealite", usage="arealite serve [--model MODEL] [server.KEY=VALUE ...]"
    )
    commands = parser.add_subparsers(required=True, prog="arealite")
    command = commands.add_parser(
        "serve",
        add_help=False,  # `arealite serve --help` lists the settings
        help="start vLLM servers that trainers attach to; `arealite serve --help` lists settings",
    )
    command.add_argument("--model", default=ServeConfig.model)
    arguments, settings = parser.parse_known_args(argv)
    install_excepthook()
    cfg = parse(ServeConfig, [f"model={arguments.model}", *settings])
    if cfg.server.addresses:
        raise ConfigError(
            "server.addresses names servers that run already, and `arealite serve` starts new "
            "ones. Give the addresses to the recipe instead."
        )
    with serve(cfg.model, cfg.server) as servers:
        print(f"server.addresses=[{','.join(servers.addresses)}]", flush=True)
        try:
            while not (failure := servers.failure()):
                time.sleep(0.5)
        except KeyboardInterrupt:
            print("stopping the servers", file=sys.stderr)
        else:
            raise ServerError(failure)
