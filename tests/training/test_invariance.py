"""The real engine: one batch has one loss and one gradient, however it is cut and spread."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from arealite.check_loss.batches import Batch
from arealite.training.fsdp import FSDPEngine
from arealite.types import MicroBatch, StepStats
from tests.training.helpers import CFG, minibatch_of, relative_difference, step_gradient

Step = tuple[dict[str, torch.Tensor], StepStats]

TOLERANCE = {"float64": 1e-9, "float32": 1e-6}
N = 12  # sequences of minibatch_of()

CUTS: dict[str, list[list[int]]] = {
    **{f"{k} micro-batches": [list(range(N))[i::k] for i in range(k)] for k in (2, 4, 7)},
    "another order": [list(range(N))[::-1]],
    "one sequence per micro-batch": [[i] for i in range(N)],
    "empty micro-batches between": [[], [0, 1, 2, 3], [], list(range(4, N)), []],
}


@pytest.fixture(scope="module", params=TOLERANCE)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(dtype: Any, model_path: str) -> Step:
    """The step on all sequences in one micro-batch, on one rank."""
    return step_gradient(FSDPEngine(model_path, replace(CFG, dtype=dtype)), minibatch_of())


def cut(mb: MicroBatch, parts: list[list[int]]) -> list[MicroBatch]:
    batch = Batch(mb=mb, logprobs=torch.zeros(len(mb.token_ids)), seed=0, aggregation="token")
    return [batch.micro_batch(sequences) for sequences in parts]


def assert_same(found: Step, expected: Step, dtype: str) -> None:
    assert relative_difference(found[0], expected[0]) <= TOLERANCE[dtype]
    assert found[1].loss == pytest.approx(expected[1].loss, rel=TOLERANCE[dtype])
    assert found[1].grad_norm == pytest.approx(expected[1].grad_norm, rel=TOLERANCE[dtype])
    counts = (expected[1].num_tokens, expected[1].num_sequences)
    assert (found[1].num_tokens, found[1].num_sequences) == counts


@pytest.mark.parametrize("name", CUTS)
def test_one_rank_gives_the_same_step_for_any_cut(
    name: str, dtype: Any, whole: Step, model_path: str
):
    [mb] = minibatch_of()
    engine = FSDPEngine(model_path, replace(CFG, dtype=dtype))
    assert_same(step_gradient(engine, cut(mb, CUTS[name])), whole, dtype)


@pytest.mark.parametrize("max_tokens", [10_000, 64, 40])
def test_two_ranks_give_the_step_of_one(max_tokens: int, dtype: str, whole: Step, two_ranks: Any):
    assert_same(two_ranks("cuts")[dtype, max_tokens], whole, dtype)


def test_float64_is_used_all_the_way(dtype: str, whole: Step):
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert {gradient.dtype for gradient in whole[0].values()} == {expected}
