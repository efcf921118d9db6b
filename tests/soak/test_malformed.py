"""Each malformed input as a user meets it: one message, a code that is not 0, no traceback."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.malformed import BEFORE_ANY_SERVER, WITH_A_SERVER, WITH_TWO_RANKS

pytestmark = pytest.mark.soak

REPOSITORY = Path(__file__).parents[2]
CASES = BEFORE_ANY_SERVER | WITH_A_SERVER | WITH_TWO_RANKS
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
}

OUR_ERROR = re.compile(r"^(\[rank ?\d+\]:? )*error: ", re.MULTILINE)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", CASES)
def test_one_clear_message_and_no_traceback(name: str, launcher: str, tmp_path: Path):
    if name in WITH_TWO_RANKS and launcher == "python":
        pytest.skip("needs two ranks")
    arguments, message = CASES[name]
    settings = [f"out_dir={tmp_path}/run", *arguments(tmp_path)]
    done = subprocess.run(
        [*LAUNCHERS[launcher], "recipes/gsm8k_grpo.py", *settings],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert re.search(f"(?s){message}", done.stderr), done.stderr[-3000:]
    assert len(OUR_ERROR.findall(done.stderr)) == 1
    # For any exit code but 0 the torchrun agent shows a traceback of its own, and only that.
    assert done.stderr.count("Traceback") == done.stderr.count("ChildFailedError: \n")
    assert done.stderr.count("Traceback") == (launcher == "torchrun")
