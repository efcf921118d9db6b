"""docs/algorithms.md is that of the code; its lines run, and every function has what it names."""

import math
from typing import Any

import pytest
import torch

from arealite.algo import advantages, corrections, kl, losses
from arealite.training.packing import attach, pack
from arealite.types import MicroBatch, Trajectory
from tests.algo import test_traces
from tests.algo.catalogue import ALGORITHMS, Whole
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
    for module in (advantages, corrections, kl, losses)
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
