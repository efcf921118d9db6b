import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from arealite import dist
from arealite.testing import make_tiny_model
from arealite.training.fsdp import FSDPEngine
from tests.training.helpers import CFG, minibatch_of, train_step


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen2-shaped float32 model with a tied head."""
    return make_tiny_model(tmp_path_factory.mktemp("qwen2"), dtype=torch.float32)


@pytest.fixture(scope="session")
def two_ranks(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Results of two_ranks.py by name."""
    out = tmp_path_factory.mktemp("two_ranks")
    engine = FSDPEngine(model_path, CFG)
    train_step(engine, minibatch_of())
    engine.save(out / "one_rank_checkpoint")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tests.training.two_ranks"),
        *(model_path, str(out / "one_rank_checkpoint"), str(out)),
    ]
    run = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = torch.load(out / "results.pt", weights_only=False)
    results["out"] = out
    return results.__getitem__


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Leaves the process group; one thread, as more only wait for each other on tiny models."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    dist.close()
