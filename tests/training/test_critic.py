"""A critic: the policy's model with one number per token, which learns what is to be expected."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from arealite.algo.values import value_loss
from arealite.checkpoint import Engines, load_checkpoint, save_checkpoint
from arealite.errors import ConfigError
from arealite.testing import make_tiny_model
from arealite.training.fsdp import FSDPEngine
from arealite.training.packing import attach
from arealite.types import Cursor, LossOutput, MicroBatch
from tests.training.helpers import CFG, minibatch_of, ppo_loss, train_step

CRITIC = replace(CFG, lr=1e-2)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def critic(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FSDPEngine]:
    model = make_tiny_model(tmp_path / "model", is_tied=request.param, dtype=torch.float32)
    with FSDPEngine(model, CRITIC, is_critic=True) as engine:
        yield engine


def squared_error(values: torch.Tensor, mb: MicroBatch) -> LossOutput:
    loss, _ = value_loss(values, mb.old_values, mb.returns, mb.loss_mask, clip=None)
    return LossOutput(total=(mb.loss_weight * loss).sum())


def with_returns(minibatch: list[MicroBatch], critic: FSDPEngine) -> list[MicroBatch]:
    """That of a sequence is 1 or -1, as its tokens begin."""
    returns = []
    for mb in minibatch:
        starts = mb.cu_seqlens[:-1].long().repeat_interleave(mb.cu_seqlens.diff().long())
        returns.append(2.0 * (mb.token_ids[starts] % 2) - 1)
    return attach(minibatch, old_values=critic.values(minibatch), returns=returns)


def test_it_expects_nothing_at_first_and_learns_what_comes(critic: FSDPEngine):
    minibatch = with_returns(minibatch_of(), critic)
    assert not any(values.any() for values in critic.values(minibatch))
    losses = [critic.step(minibatch, squared_error, head="values").loss for _ in range(60)]
    assert losses[0] == pytest.approx(0.5)
    assert losses[-1] < 0.05


def test_a_value_depends_only_on_what_was_before_the_token(critic: FSDPEngine):
    minibatch = with_returns(minibatch_of(), critic)
    for _ in range(3):
        critic.step(minibatch, squared_error, head="values")
    [mb] = minibatch
    start, end = mb.cu_seqlens[1:3].tolist()
    place = start + 3
    changed = mb.token_ids.clone()
    changed[place] = (changed[place] + 1) % 300
    [before], [after] = critic.values([mb]), critic.values([replace(mb, token_ids=changed)])
    differs = (before - after).abs() > 1e-6
    assert differs[place + 1 : end].any()
    assert not differs[: place + 1].any() and not differs[end:].any()
    assert before[start] == 0


def test_its_values_are_those_of_its_hidden_states_and_head(tmp_path: Path):
    model = make_tiny_model(tmp_path / "model", dtype=torch.float32)
    with FSDPEngine(model, CRITIC, is_critic=True) as critic:
        weight = torch.randn(critic._policy.model.get_output_embeddings().weight.shape)
        critic._policy.model.get_output_embeddings().weight.to_local().data.copy_(weight)
        [mb] = minibatch_of()
        [values] = critic.values([mb])
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    start, end = mb.cu_seqlens[:2].tolist()
    with torch.no_grad():
        hidden = plain.model(mb.token_ids[None, start:end]).last_hidden_state[0]
    torch.testing.assert_close(values[start + 1 : end], (hidden @ weight.T)[:-1, 0])


def test_policy_and_critic_do_not_take_each_others_work(critic: FSDPEngine, model_path: str):
    minibatch = with_returns(minibatch_of(), critic)
    with pytest.raises(ConfigError, match=r"is a critic, so it has no logprobs\. It has values"):
        critic.logprobs(minibatch)
    with pytest.raises(ConfigError, match="is a critic, so it has no logprobs"):
        critic.step(minibatch, ppo_loss)
    with FSDPEngine(model_path, CFG) as policy:
        with pytest.raises(ConfigError, match=r"no critic, so it has no values\. Make another"):
            policy.values(minibatch)
        with pytest.raises(ConfigError, match="no critic, so it has no values"):
            policy.step(minibatch, squared_error, head="values")


def test_both_continue_from_one_checkpoint(critic: FSDPEngine, model_path: str, tmp_path: Path):
    minibatch = with_returns(minibatch_of(), critic)
    with FSDPEngine(model_path, CFG) as policy:
        both = Engines(policy=policy, critic=critic)
        train_step(policy, minibatch)
        critic.step(minibatch, squared_error, head="values")
        save_checkpoint(tmp_path / "run", both, Cursor(version=1))
        expected = (policy.logprobs(minibatch), critic.values(minibatch))
        train_step(policy, minibatch)
        critic.step(minibatch, squared_error, head="values")
        assert load_checkpoint(tmp_path / "run", both).version == 1
        found = (policy.logprobs(minibatch), critic.values(minibatch))
    for before, after in zip(expected, found, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
