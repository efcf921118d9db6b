"""The recipe's loss, and what it says to input that cannot work."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arealite.algo.advantages import group_advantages
from arealite.config import parse
from arealite.errors import ArealiteError, ConfigError, RolloutError
from arealite.inference.vllm import VLLMEngine
from arealite.rollout.executor import run_episodes
from arealite.testing import ScriptedServer
from arealite.training.packing import attach, pack
from arealite.types import Trajectory
from recipes import gsm8k_grpo
from recipes.gsm8k_grpo import Config, grpo_loss, main
from tests.oracle import NO_WEIGHTS
from tests.recipes.malformed import BEFORE_ANY_SERVER, WITH_TWO_RANKS

REPOSITORY = Path(__file__).parents[2]


def trajectory(reward: float, *, num_tokens: int) -> Trajectory:
    return Trajectory(
        token_ids=[1, *range(2, 2 + num_tokens)],
        loss_mask=[False] + [True] * num_tokens,
        behavior_logprobs=[0.0] + [-1.0] * num_tokens,
        versions=[-1] + [0] * num_tokens,
        reward=reward,
        temperature=1.0,
        finish_reason="stop",
    )


def test_on_policy_the_loss_is_minus_the_token_mean_of_the_advantages():
    groups = [[trajectory(1.0, num_tokens=3), trajectory(0.0, num_tokens=1)]]
    [minibatch] = pack(
        groups, group_advantages(groups), num_minibatches=1, max_tokens=64, aggregation="token"
    )
    minibatch = attach(minibatch, proximal_logprobs=[mb.behavior_logprobs for mb in minibatch])
    [mb] = minibatch
    logprobs = mb.behavior_logprobs.clone().requires_grad_()
    output = grpo_loss(logprobs, mb, Config())
    output.total.backward()
    # Advantages are +.5 for three tokens and -.5 for one: -(3 * .5 - .5) / 4.
    assert output.total.item() == pytest.approx(-0.25)
    assert logprobs.grad is not None
    gradient = torch.where(mb.loss_mask, -mb.advantages / 4, 0.0)
    torch.testing.assert_close(logprobs.grad, gradient)


@pytest.mark.parametrize("name", BEFORE_ANY_SERVER)
def test_input_that_cannot_work_is_refused_with_one_message(name: str, tmp_path: Path):
    arguments, message = BEFORE_ANY_SERVER[name]
    with pytest.raises(ArealiteError, match=f"(?s){message}"):
        main(parse(Config, [f"out_dir={tmp_path}/run", *arguments(tmp_path)]))


def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("arealite.dist.world_size", lambda: 2)
    arguments, message = WITH_TWO_RANKS["batch not divisible"]
    with pytest.raises(ConfigError, match=message):
        parse(Config, arguments(tmp_path))


def test_the_command_prints_one_message_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "recipes/gsm8k_grpo.py", "group_size=-8", "stepps=3"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"stepps=3 is not a key. The nearest is steps", done.stderr)
    assert "group_size=-8 must be at least 2" in done.stderr


def test_an_evaluation_that_fails_costs_no_step(
    tmp_path: Path,
    scripted_server: Callable[..., ScriptedServer],
    monkeypatch: pytest.MonkeyPatch,
):
    def fail_at_version_3(engine: VLLMEngine, *args: Any, **options: Any) -> list[Any]:
        if engine.version == 3:
            raise RolloutError("a judge is gone")
        return run_episodes(engine, *args, **options)

    monkeypatch.setattr(gsm8k_grpo, "run_episodes", fail_at_version_3)
    server = scripted_server(vocab_size=55, max_model_len=256)
    settings = [f"out_dir={tmp_path}/run", f"server.addresses=[{server.address}]", *NO_WEIGHTS]
    settings += ["steps=5", "eval_every_steps=3", "save_every_steps=100", "group_size=2"]
    settings += ["rollout.prompts_per_step=2", "sampling.max_new_tokens=16"]
    with pytest.raises(RolloutError, match="a judge is gone"):
        main(parse(Config, settings))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("version-*")] == [
        "version-00000003"
    ]
