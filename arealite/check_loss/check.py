"""check_loss: a loss function against every way to cut a batch, and what is said when one differs.

random batch --cut--> micro-batches --loss_fn, backward--> sums == those of the whole
"""

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import get_args

import torch

from arealite.check_loss.batches import Batch, make_batch, rank_plan
from arealite.check_loss.mistakes import mistakes_that_fit
from arealite.check_loss.outcomes import (
    Change,
    Kind,
    Outcome,
    add,
    measure,
    measure_on_ranks,
    measure_one,
)
from arealite.check_loss.ranks import run_on_ranks
from arealite.errors import LossError, RankError
from arealite.training.packing import Aggregation
from arealite.types import LossFn

SEEDS = (0, 1, 2)
NUM_MICRO_BATCHES = (2, 4, 7)
WAITS_FOR_RANKS = (
    "\nA loss must not meet other ranks: the engine calls none for an empty micro-batch, so they "
    "may not come. Return local sums as metrics; the engine adds them up."
)


@dataclass(frozen=True, kw_only=True)
class LossCheck:
    """What a good loss gets: how often it was compared, and the greatest change that was seen."""

    num_comparisons: int
    max_loss_change: float  # difference over the loss
    max_gradient_change: float  # norm of the difference over the norm


def check_loss(loss_fn: LossFn) -> LossCheck:
    """The greatest changes that rounding made; raises if anything else changes the loss.

    Takes the function that `TrainEngine.step` takes for log-probs (not for logits), and two
    seconds; needs no model, server or process group. The sums of losses and gradients of random
    batches, of each aggregation of `pack`, must stay the same

    - for any split into micro-batches, and any order of the sequences,
    - packed, or with one sequence per micro-batch, as padding would have it,
    - on any number of ranks,
    - with fully masked and empty micro-batches among the others,
    - with any log-probs at masked tokens,

    to 1e-9 in float64 and 1e-6 in float32, as the norm of the difference over the norm.

    Ranks are threads that call `loss_fn` at the same time: it should not keep state.

    Raises:
        LossError: what changed the loss, by how much, and the mistake, if the evidence shows one.

    Example: check_loss(partial(grpo_loss, cfg=Config()))
    """
    with warnings.catch_warnings():
        # Of a deviation of one value, say: the nan that it leaves says more.
        warnings.simplefilter("ignore")
        changes = [
            change
            for dtype in _dtypes(loss_fn)
            for aggregation, seed in product(get_args(Aggregation), SEEDS)
            for change in _check_batch(loss_fn, aggregation, seed, dtype)
        ]
    return LossCheck(
        num_comparisons=len(changes),
        max_loss_change=max(change.loss for change in changes),
        max_gradient_change=max(change.gradient for change in changes),
    )


def _dtypes(loss_fn: LossFn) -> list[torch.dtype]:
    """float64 only if the loss can: the engine passes float32, and a loss may insist on it."""
    [batch] = run_on_ranks(1, partial(make_batch, 0, "token", torch.float64))
    try:
        run_on_ranks(1, lambda: measure_one(loss_fn, batch, batch.trainable()))
    except RuntimeError:  # two dtypes met; any other reason shows in float32, too
        return [torch.float32]
    return [torch.float64, torch.float32]


def _check_batch(
    loss_fn: LossFn, aggregation: Aggregation, seed: int, dtype: torch.dtype
) -> list[Change]:
    [batch] = run_on_ranks(1, partial(make_batch, seed, aggregation, dtype))
    [changes] = run_on_ranks(1, partial(_on_one_rank, loss_fn, batch))
    try:
        for change in _on_several_ranks(loss_fn, batch, changes[0].expected):
            changes.append(change)
    except LossError:
        if all(change.is_rounding for change in changes):  # otherwise they say more
            raise
    broken = [change for change in changes if not change.is_rounding]
    if broken:
        raise LossError(_message(loss_fn, batch, broken))
    return changes


def _on_one_rank(loss_fn: LossFn, batch: Batch) -> list[Change]:
    """Every comparison that needs no second rank; all expect the outcome of the whole batch."""
    sequences, masked = batch.trainable(), batch.fully_masked()
    whole = _whole(loss_fn, batch)
    shuffled = random.Random(batch.seed).sample(sequences, len(sequences))
    other_masked, huge_masked = batch.with_noise(~batch.mb.loss_mask), batch.with_huge_masked()
    cuts: list[tuple[Kind, str, Batch, list[list[int]]]] = [
        ("repeat", "when called again", batch, [sequences]),
        *(
            ("split", f"with {k} micro-batches instead of 1", batch, _split(shuffled, k))
            for k in NUM_MICRO_BATCHES
        ),
        ("split", "with one sequence per micro-batch", batch, [[i] for i in sequences]),
        ("order", "with the sequences in another order", batch, [shuffled]),
        ("masked", "with fully masked sequences among them", batch, [[*masked, *sequences]]),
        ("masked", "with a fully masked micro-batch", batch, [sequences, masked]),
        ("read", "with other log-probs at masked tokens", other_masked, [sequences]),
        ("huge", "with log-probs far apart at masked tokens", huge_masked, [sequences]),
    ]
    changes = []
    for kind, what, of, cut in cuts:
        found = _try(what, partial(measure, loss_fn, of, cut))
        changes.append(Change(kind=kind, what=what, expected=whole, found=found))
    inside = replace(whole, gradient=whole.gradient * batch.mb.loss_mask)
    without = "without the gradient at masked tokens"
    changes.append(Change(kind="touch", what=without, expected=whole, found=inside))
    return changes + _with_empty(loss_fn, batch, whole)


def _whole(loss_fn: LossFn, batch: Batch) -> Outcome:
    """Of all trainable sequences in one micro-batch."""
    whole = measure(loss_fn, batch, [batch.trainable()])
    if not whole.is_finite:
        raise LossError(
            f"An ordinary micro-batch has loss {whole.loss:.4g} and a gradient of norm "
            f"{float(whole.gradient.norm()):.4g}: every step would be skipped. Log-probs are "
            f"between {batch.logprobs.min():.3g} and {batch.logprobs.max():.3g} in it."
        )
    return whole


def _with_empty(loss_fn: LossFn, batch: Batch, whole: Outcome) -> list[Change]:
    try:
        empty = measure_one(loss_fn, batch, [])
    except Exception:
        # May be: the engine calls no loss for it. A nan would go unnoticed where one does.
        return []
    found = add(batch, [whole, empty])
    return [Change(kind="empty", what="with an empty micro-batch", expected=whole, found=found)]


def _on_several_ranks(loss_fn: LossFn, batch: Batch, whole: Outcome) -> Iterator[Change]:
    first, second, third = _split(batch.trainable(), 3)
    plans = {
        "with 2 ranks instead of 1": rank_plan(batch, num_ranks=2, is_fine=False),
        "with 3 ranks instead of 1": rank_plan(batch, num_ranks=3, is_fine=True),
        "with an empty micro-batch on the second of 2 ranks": [[first, second], [third, []]],
    }
    for what, plan in plans.items():
        found = _try(what, partial(measure_on_ranks, loss_fn, batch, plan), WAITS_FOR_RANKS)
        yield Change(kind="ranks", what=what, expected=whole, found=found)


def _split(sequences: list[int], num_micro_batches: int) -> list[list[int]]:
    return [sorted(sequences[i::num_micro_batches]) for i in range(num_micro_batches)]


def _try(what: str, function: Callable[[], Outcome], advice: str = "") -> Outcome:
    try:
        return function()
    except RankError:  # is no fault of the loss
        raise
    except Exception as error:
        raise LossError(
            f"The loss works on an ordinary micro-batch, but {what} it raised "
            f"{type(error).__name__}: {error}{advice}"
        ) from error


def _message(loss_fn: LossFn, batch: Batch, broken: list[Change]) -> str:
    first = {change.kind: change for change in reversed(broken)}  # one line of each kind
    lines = [f"  - {change}" for change in broken if change is first[change.kind]]
    if "repeat" in first:
        lines, reasons = lines[:1], ["It keeps a state or draws random numbers; it must not."]
    else:
        reasons = mistakes_that_fit(loss_fn, batch, broken)
    origin = f"aggregation={batch.aggregation!r}, seed {batch.seed}, {batch.logprobs.dtype}"
    return "\n".join(
        [f"The same batch gets another loss or gradient ({origin}):", *lines, *reasons]
    )
