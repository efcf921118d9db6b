"""Our half of the comparison with TRL, against what TRL gave when the benchmark last ran."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from arealite import dist
from arealite.testing import make_tiny_model
from benchmarks.trl_parity import AGREEING, Setting, run_ours

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "trl_parity.json"
STORED = {result["setting"]: result for result in json.loads(RESULTS.read_text())["results"]}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Qwen2 of the benchmark; leaves the process group and the threads as they were."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_tiny_model(tmp_path_factory.mktemp("qwen2"), dtype=torch.float32)
    torch.set_num_threads(num_threads)
    dist.close()


@pytest.mark.parametrize(
    "setting",
    [setting for setting in AGREEING if setting.family == "qwen2"],
    ids=lambda setting: setting.name,
)
def test_loss_and_gradient_norm_are_those_of_trl(setting: Setting, model_path: str):
    ours, _ = run_ours(setting, model_path)
    stored = STORED[setting.name]
    assert ours.stats.loss == pytest.approx(stored["loss_trl"], abs=1e-6)
    assert ours.stats.grad_norm == pytest.approx(stored["gradient_norm_trl"], rel=1e-5)


def test_no_stored_difference_exceeds_the_bound():
    assert {setting.name for setting in AGREEING} <= STORED.keys()
    differences = [row["gradient_difference"] for row in STORED.values() if row["must_agree"]]
    assert max(differences) <= 1e-5
