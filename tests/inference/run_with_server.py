"""A run in a process of its own, for tests that kill it: prints who is who, then waits."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from arealite.inference.server import _Supervisor


def segment_name(pid: int) -> str:
    """Of the shared memory that the server of process `pid` maps."""
    return f"arealite-test-{pid}"


def spec(log_dir: str, mode: str, **settings: Any) -> dict[str, Any]:
    fake_server = str(Path(__file__).parent / "fake_server.py")
    environment = {"SEGMENT": segment_name(os.getpid()), "MARKER": f"{log_dir}/marker"}
    return {
        "commands": [[sys.executable, fake_server, "{port}", mode]],
        "environments": [environment],
        "log_dir": log_dir,
        "startup_timeout_s": 20,
        "hang_timeout_s": 4,
    } | settings


def main(log_dir: str, mode: str) -> None:
    supervisor = _Supervisor(spec(log_dir, mode, max_restarts=2), startup_timeout_s=20)
    family = {child.pid: child.cmdline() for child in psutil.Process().children(recursive=True)}
    [owner] = [pid for pid, command in family.items() if "arealite.inference.supervisor" in command]
    print(json.dumps({"addresses": supervisor.addresses, "owner": owner, "family": [*family]}))
    sys.stdout.flush()
    while not supervisor.failure:
        time.sleep(0.1)
    supervisor.close()
    sys.exit(f"error: {supervisor.failure}")


if __name__ == "__main__":
    main(*sys.argv[1:])
