"""Which GPUs servers get, on hosts that are only pretended."""

import pytest
import torch

from arealite.errors import ConfigError
from arealite.gpu_plan import GpuPlan, plan_gpus
from arealite.inference.server import ServerConfig, serve


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


def test_servers_with_gpus_of_their_own_are_not_put_to_sleep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"server.sleep=true is for .* have GPU 1 for themselves"):
        serve("arealite/tiny-math", ServerConfig(sleep=True))


@pytest.mark.parametrize(
    ("present", "cfg", "message"),
    [
        (2, ServerConfig(transport="ipc"), r"transport=ipc is for one server on the GPU of the on"),
        (2, ServerConfig(transport="ipc", gpus="0,1"), r"these have GPU 0,1. Set server.gpus=0"),
        (1, ServerConfig(transport="nccl"), "a rank trains on GPU 0 of the servers too"),
        (4, ServerConfig(transport="nccl", gpus="0,3"), r"GPU 0,3 of the servers too. Give them"),
    ],
)
def test_a_way_of_weights_that_these_gpus_do_not_allow_is_refused_at_the_start(
    present: int, cfg: ServerConfig, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    with pytest.raises(ConfigError, match=message):
        serve("arealite/tiny-math", cfg)
