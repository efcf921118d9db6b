"""Which GPUs servers get, on hosts that are only pretended."""

import pytest
import torch

from arealite.gpu_plan import GpuPlan, plan_gpus


@pytest.mark.parametrize(
    ("present", "ranks", "named", "expected"),
    [
        (1, 1, "", GpuPlan(["0"], True, 0.4)),
        (2, 1, "", GpuPlan(["1"], False, 0.9)),
        (8, 4, "", GpuPlan(["4", "5", "6", "7"], False, 0.9)),
        (2, 2, "", GpuPlan(["0", "1"], True, 0.4)),
        (8, 4, "6,7", GpuPlan(["6", "7"], False, 0.9)),
        (8, 4, "3,4", GpuPlan(["3", "4"], True, 0.4)),
    ],
)
def test_servers_take_the_gpus_that_no_rank_trains_on(
    present: int, ranks: int, named: str, expected: GpuPlan, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert plan_gpus(named, 0.0) == expected


def test_a_share_that_is_given_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert plan_gpus("", 0.7).memory_share == 0.7
