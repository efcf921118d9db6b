"""docs/algorithms.md is that of the code; its lines run, and every function has what it names."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from arealite.algo import advantages, corrections, kl, losses, preferences, shaping
from arealite.training.packing import attach, pack
from arealite.types import MicroBatch, SamplingParams, Trajectory
from tests.algo import test_traces
from tests.algo.catalogue import ADDITIONS, ALGORITHMS, Whole
from tests.algo.document import PAGE, REPOSITORY, entries, modules, page

REFRESH = "run python -m tests.algo.document"
WITHOUT_SOURCE = {"sum_of_sequence", "mean_of_sequence", "mean_and_std", "explained_variance"}


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), REFRESH


@pytest.mark.parametrize("module", modules(), ids=lambda path: path.stem)
def test_every_function_has_an_equation_a_source_and_a_test(module):
    for entry in entries(module):
        assert entry.says and entry.tests and entry.equation, entry.name
        assert entry.source or entry.name in WITHOUT_SOURCE, entry.name


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: each.name)
def test_every_algorithm_has_a_trace_and_a_recipe_or_lines(algorithm: Whole):
    assert algorithm.trace in {*test_traces.ALGORITHMS, "dpo"}  # which has pairs of its own
    if algorithm.recipe:
        assert (REPOSITORY / "recipes" / algorithm.recipe).exists()
    else:
        assert algorithm.advantages and algorithm.loss


def trajectory(length: int, reward: float) -> Trajectory:
    return Trajectory(
        token_ids=list(range(length + 1)),
        loss_mask=[False] + [True] * length,
        behavior_logprobs=[0.0] + [-1.0] * length,
        versions=[-1] + [1] * length,
        reward=reward,
        temperature=1.0,
        finish_reason="stop",
    )


GROUPS = [[trajectory(3, 1.0), trajectory(2, 0.0), trajectory(4, 0.0)]]
NAMES: dict[str, Any] = {
    name: each
    for module in (advantages, corrections, kl, losses, preferences, shaping)
    for name, each in vars(module).items()
    if not name.startswith("_")
}


class dist:
    """A run of one rank."""

    sum = staticmethod(list)

    @staticmethod
    def gather(item: Any) -> list[Any]:
        return [item]


def only_micro_batch(algorithm: Whole) -> MicroBatch:
    given = eval(algorithm.advantages, NAMES | {"groups": GROUPS, "dist": dist})
    length = 8 if algorithm.aggregation == "constant" else None
    [minibatch] = pack(
        GROUPS,
        given,
        num_minibatches=1,
        max_tokens=64,
        aggregation=algorithm.aggregation,  # type: ignore[arg-type]
        max_length=length,
    )
    noise = torch.linspace(-0.001, 0.001, len(minibatch[0].token_ids))
    proximal = [mb.behavior_logprobs + noise for mb in minibatch]
    reference = [mb.behavior_logprobs - 0.3 for mb in minibatch]
    mbs = attach(minibatch, proximal_logprobs=proximal, ref_logprobs=reference)
    found = NAMES | {"mbs": mbs, "attach": attach, "dist": dist}
    exec(algorithm.step, found)
    [mb] = found["mbs"]
    return mb


@pytest.mark.parametrize(
    "algorithm", [each for each in ALGORITHMS if not each.recipe], ids=lambda each: each.name
)
def test_the_lines_of_an_algorithm_teach_the_better_response_and_unteach_the_others(
    algorithm: Whole,
):
    mb = only_micro_batch(algorithm)
    logprobs = mb.proximal_logprobs.clone().requires_grad_()
    found = NAMES | {"logprobs": logprobs, "mb": mb, "math": math, "version": 3}
    exec(algorithm.loss, found)
    total = -(mb.loss_weight * found["surrogate"]).sum()
    [gradient] = torch.autograd.grad(total, logprobs)
    sampled = mb.loss_mask & (mb.advantages != 0)
    assert total.isfinite()
    assert (gradient[sampled].sign() == -mb.advantages[sampled].sign()).all()
    assert not gradient[~mb.loss_mask].any()


LINES = {each.name: each.lines for each in ADDITIONS}
GRPO = next(each for each in ALGORITHMS if each.name == "GRPO")


def after(name: str, **given: Any) -> dict[str, Any]:
    """All names after the lines of an addition; those of `grpo_loss` between its `...`."""
    found = NAMES | given
    exec(LINES[name].replace("...", GRPO.loss), found)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # of 3, 2 and 4 tokens, the first is right; the penalty begins at 4 - 2 = 2
        ("soft overlong penalty", [1 - 1 / 2, 0.0, -2 / 2]),
        ("adaptive length reward", [1 + 0.1 * 0, 0.0, -0.1 / 2]),
        ("rewards of 5 and -5", [5.0, -5.0, -5.0]),
    ],
)
def test_the_lines_of_other_rewards_give_them(name: str, expected: list[float]):
    class cfg:
        sampling = SamplingParams(max_new_tokens=4)

    lines = LINES[name].replace("tolerance=16", "tolerance=2")
    found = NAMES | {"groups": GROUPS, "cfg": cfg}
    exec(lines, found)
    assert [each.reward for each in found["groups"][0]] == pytest.approx(expected)


def test_the_lines_of_a_kl_pull_towards_the_reference():
    mb = only_micro_batch(GRPO)
    logprobs = mb.proximal_logprobs.clone().requires_grad_()
    found = after("KL in the loss", logprobs=logprobs, mb=mb, surrogate=torch.zeros(()))
    [gradient] = torch.autograd.grad(-found["surrogate"].sum(), logprobs)
    # k3 = exp(reference - current) - 1 - (reference - current), whose derivative is 1 - exp(...)
    expected = 0.001 * (1 - (mb.ref_logprobs - logprobs.detach()).exp()) * mb.loss_mask
    torch.testing.assert_close(gradient, expected)


def test_the_lines_of_an_entropy_bonus_add_it_to_the_loss_of_the_log_probs():
    mb = only_micro_batch(GRPO)
    logits = torch.randn(len(mb.token_ids), 9, generator=torch.Generator().manual_seed(0))
    distribution = torch.distributions.Categorical(logits=logits)
    found = after("entropy bonus", logits=logits, mb=mb)
    torch.testing.assert_close(found["logprobs"], distribution.log_prob(mb.token_ids))
    alone = NAMES | {"logprobs": found["logprobs"], "mb": mb}
    exec(GRPO.loss, alone)
    torch.testing.assert_close(
        found["surrogate"] - alone["surrogate"], 0.001 * distribution.entropy() * mb.loss_mask
    )


def test_the_lines_of_a_reward_model_score_an_answer_at_its_last_token():
    mb = only_micro_batch(GRPO)  # its first two answers as a pair
    mb = replace(mb, cu_seqlens=mb.cu_seqlens[:3])
    ends = mb.cu_seqlens[1:].tolist()
    values = torch.zeros(len(mb.token_ids))
    values[[end - 1 for end in ends]] = torch.tensor([2.0, 0.5])
    found = after("reward model", values=values, mb=mb)
    assert found["losses"].tolist() == pytest.approx([math.log1p(math.exp(-1.5))])
