"""A process ends with the one it depends on, whenever that one ends and whatever stderr is."""

import socket
import subprocess
import sys

import pytest

WATCHER = """
import sys, time
from arealite.lifeline import end_with
if sys.argv[2] == "broken":
    import os
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
end_with(int(sys.argv[1]), "so I end too")
print("watching", flush=True)
time.sleep(60)
"""

RANK_WITHOUT_AGENT = """
from arealite import dist
from arealite.config import install_excepthook
install_excepthook()
dist.init()
"""


def watch(pid: int, stderr: str = "whole") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(pid), stderr],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stderr", ["whole", "broken"])
def test_a_process_ends_with_the_one_it_watches(stderr: str):
    with subprocess.Popen(["sleep", "60"]) as watched, watch(watched.pid, stderr) as watcher:
        assert watcher.stdout is not None and watcher.stdout.readline() == "watching\n"
        assert watcher.poll() is None
        watched.kill()
        _, said = watcher.communicate(timeout=10)
    assert watcher.returncode == 1
    assert said == ("so I end too\n" if stderr == "whole" else "")


def test_a_process_that_has_ended_already_counts_as_ended():
    with subprocess.Popen(["true"]) as watched:
        pass
    with watch(watched.pid) as watcher:
        _, said = watcher.communicate(timeout=10)
    assert (watcher.returncode, said) == (1, "so I end too\n")


def test_a_rank_whose_torchrun_was_gone_before_it_looked_ends_with_a_message():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torchrun = {
        "TORCHELASTIC_RUN_ID": "none",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RANK_WITHOUT_AGENT],
        env=torchrun,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "torchrun is gone" in done.stderr
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
