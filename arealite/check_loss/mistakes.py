"""Which known mistake explains how a loss changed, by experiments that tell them apart.

Twice the same sequences, two halves together, other values in one half: a mean, a statistic and
a look across the border of sequences answer differently.
"""

import torch

from arealite.check_loss.batches import Batch, rank_plan
from arealite.check_loss.outcomes import (
    Change,
    gradient_change,
    measure,
    measure_on_ranks,
    measure_one,
)
from arealite.check_loss.ranks import run_on_ranks
from arealite.types import LossFn

NEAR = 1e-4  # a mean over count + 1e-8 is a mean

MEAN_PER_MICRO_BATCH = (
    "This is a mean per micro-batch: the same sequences twice in it give the same gradient, not "
    "twice the gradient. The engine adds up micro-batches and ranks, and loss_weight is already "
    "divided by the count of all of them: return (mb.loss_weight * per_token).sum()."
)
MEAN_PER_SEQUENCE = (
    "This is a mean per sequence after the cut: each of the N sequences of a micro-batch counts "
    "1 / N. How many there are in the whole batch is known before it is cut: pack with "
    'aggregation="sequence" and return (mb.loss_weight * per_token).sum().'
)
STATISTIC = (
    "This is a statistic over a micro-batch: other values in some sequences change the gradient "
    "of the others, in any order. Compute a mean, deviation or maximum over the whole batch "
    "before it is cut, such as the normalization of advantages before pack."
)
ACROSS_BORDERS = (
    "The gradient of a sequence depends on the tokens of its neighbors: sequences are packed end "
    "to end. Shift, sum and scan within the borders of mb.cu_seqlens."
)
MEAN_PER_RANK = (
    "This is a mean per rank: with {num_ranks} ranks the gradient is 1/{num_ranks}. The engine "
    "adds up the ranks, and loss_weight is already divided by the count of all of them: leave the "
    "number of ranks out of the loss."
)
TIMES_RANKS = (
    "This undoes a mean over ranks: with {num_ranks} ranks the gradient is {num_ranks} times as "
    "large. But the engine adds up the ranks: leave the number of ranks out of the loss."
)
MASK_AFTER_EXP = (
    "This is a mask applied after exp, which overflows where the mask is False: inf * 0 is nan, "
    "and torch.where hides it in the value but not in the gradient. Mask the difference of "
    "log-probs before: torch.where(mb.loss_mask, logprobs - mb.proximal_logprobs, 0.0).exp()."
)

NO_MASK = (
    "The loss counts masked tokens. Multiply by mb.loss_weight, which is 0 there, or leave them "
    "out by mb.loss_mask."
)


def mistakes_that_fit(loss_fn: LossFn, batch: Batch, broken: list[Change]) -> list[str]:
    """A paragraph for each known mistake that the evidence shows."""
    found: list[str] = []
    kinds = {change.kind for change in broken}
    if "split" in kinds:
        is_order_broken = "order" in kinds
        [found] = run_on_ranks(1, lambda: _of_a_cut(loss_fn, batch, is_order_broken))
    if "ranks" in kinds:
        found += _of_ranks(loss_fn, batch)
    if any(change.kind == "huge" and not change.found.is_finite for change in broken):
        found.append(MASK_AFTER_EXP)
    if kinds & {"read", "touch"}:
        found.append(NO_MASK)
    return found


def _of_a_cut(loss_fn: LossFn, batch: Batch, is_order_broken: bool) -> list[str]:
    by_length = sorted(batch.trainable(), key=batch.num_trainable)
    middle = len(by_length) // 2
    # Short ones and long ones: as many sequences, but not as many tokens.
    half, other = by_length[:middle], by_length[middle:]
    alone = measure_one(loss_fn, batch, half)
    twice = measure_one(loss_fn, batch, half + half)
    together = measure_one(loss_fn, batch, half + other)
    places = batch.tokens(half)
    elsewhere = torch.ones_like(batch.mb.loss_mask).index_fill(0, places, False)
    disturbed = measure_one(loss_fn, batch.with_noise(elsewhere), half + other)

    if not alone.gradient.any():
        return []
    is_mean = gradient_change(twice.gradient, alone.gradient) < NEAR
    before, after = together.gradient[places], disturbed.gradient[places]
    if not gradient_change(after, before) < NEAR:  # nan is a change
        found = [ACROSS_BORDERS if is_order_broken else STATISTIC]
        return [*found, MEAN_PER_MICRO_BATCH] if is_mean else found
    if not is_mean:
        return []
    count = len(half) / len(by_length)
    is_per_sequence = gradient_change(before, count * alone.gradient[places]) < NEAR
    return [MEAN_PER_SEQUENCE if is_per_sequence else MEAN_PER_MICRO_BATCH]


def _of_ranks(loss_fn: LossFn, batch: Batch) -> list[str]:
    """Compares ranks with the same micro-batches on one rank, so that no cut plays a part."""
    plan = rank_plan(batch, num_ranks=3, is_fine=False)
    [alone] = run_on_ranks(1, lambda: measure(loss_fn, batch, [mb for mbs in plan for mb in mbs]))
    spread = measure_on_ranks(loss_fn, batch, plan)
    for mistake, factor in ((MEAN_PER_RANK, 1 / len(plan)), (TIMES_RANKS, len(plan))):
        if gradient_change(spread.gradient, factor * alone.gradient) < NEAR:
            return [mistake.format(num_ranks=len(plan))]
    return []
