"""A run in a process of its own, for tests that kill it: prints who is who, then waits."""

import json
import os
import sys
import time
from pathlib import Path

import psutil

from arealite.inference.server import _Supervisor
from arealite.inference.transport import region_prefix


def spec(log_dir: str, mode: str, *, startup_timeout_s: float = 20) -> dict:
    fake_server = str(Path(__file__).parent / "fake_server.py")
    return {
        "commands": [[sys.executable, fake_server, "{port}", mode]],
        "environments": [{"SEGMENT": f"{region_prefix(os.getpid())}test"}],
        "log_dir": log_dir,
        "startup_timeout_s": startup_timeout_s,
        "region_prefix": region_prefix(os.getpid()),
    }


def main(log_dir: str) -> None:
    supervisor = _Supervisor(spec(log_dir, "works"), startup_timeout_s=20)
    family = {child.pid: child.cmdline() for child in psutil.Process().children(recursive=True)}
    [owner] = [pid for pid, command in family.items() if "arealite.inference.supervisor" in command]
    print(json.dumps({"addresses": supervisor.addresses, "owner": owner, "family": [*family]}))
    sys.stdout.flush()
    time.sleep(100)


if __name__ == "__main__":
    main(sys.argv[1])
