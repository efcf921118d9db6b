"""Trajectories to packed micro-batches: balanced over ranks, weighted by the global count.

    groups of every rank --gather, order by row--> trajectories
        --split in order--> minibatches --LPT--> ranks --best fit--> micro-batches

T packed tokens in a micro-batch, N sequences. Every rank computes the same plan from the same
gathered list, so no rank has to be told its part.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch

from arealite import dist
from arealite.errors import ConfigError, TrajectoryError
from arealite.types import MicroBatch, Trajectory

Aggregation = Literal["token", "sequence", "constant"]

# Work of a sequence of L tokens is L + QUADRATIC * L^2: a layer costs about 12 h^2 per token and
# L h per token for causal attention; h = 2048 is in the middle of the models trained here.
QUADRATIC = 1 / (12 * 2048)


def pack(
    groups: list[list[Trajectory]],
    advantages: Sequence[Sequence[float | Sequence[float]]],
    *,
    num_minibatches: int,
    max_tokens: int,
    aggregation: Aggregation,
    max_length: int | None = None,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of every minibatch. A collective: trajectories change ranks.

    All ranks get equally many micro-batches, if need be empty ones (T = 0, N = 0). The result,
    taken over all ranks, does not depend on how groups were spread over ranks if their
    trajectories carry `row_index`.

    Args:
        groups: this rank's groups; only their order matters here.
        advantages: like groups: per trajectory one float, or one float per token.
        num_minibatches: optimizer steps; trajectories are split in order, counts differ by 1.
        max_tokens: no micro-batch is longer.
        aggregation: what `loss_weight` makes of the sum of a loss over a minibatch of all ranks.
            token: mean over trainable tokens. sequence: mean over sequences of their means.
            constant: sum divided by (sequences * max_length).
        max_length: the constant of `aggregation="constant"`, in tokens.
    """
    if aggregation not in get_args(Aggregation):
        raise ConfigError(f"aggregation={aggregation!r} is none of {get_args(Aggregation)}.")
    if aggregation == "constant" and not max_length:
        raise ConfigError(
            'aggregation="constant" divides by max_length, which is not set. '
            "Pass the budget of one response, e.g. max_length=cfg.sampling.max_new_tokens."
        )
    sequences = _gather(groups, advantages)
    _check_fits(sequences, num_minibatches, max_tokens)
    bounds = [i * len(sequences) // num_minibatches for i in range(num_minibatches + 1)]
    minibatches = [sequences[start:end] for start, end in pairwise(bounds)]
    return [_cut(part, max_tokens, aggregation, max_length or 1) for part in minibatches]


def attach(
    minibatch: list[MicroBatch],
    *,
    proximal_logprobs: list[torch.Tensor] | None = None,
    ref_logprobs: list[torch.Tensor] | None = None,
) -> list[MicroBatch]:
    """The same micro-batches with these fields filled, one tensor [T] per micro-batch."""
    fields = {"proximal_logprobs": proximal_logprobs, "ref_logprobs": ref_logprobs}
    for name, values in fields.items():
        if values is None:
            continue
        lengths = [list(value.shape) for value in values]
        expected = [[len(mb.token_ids)] for mb in minibatch]
        if lengths != expected:
            raise ConfigError(
                f"{name} has shapes {lengths[:4]} for micro-batches of {expected[:4]} tokens "
                f"({len(lengths)} for {len(expected)}). Pass what the engine returned for this "
                "same minibatch, in the same order."
            )
        minibatch = [
            replace(mb, **{name: value.detach()})
            for mb, value in zip(minibatch, values, strict=True)
        ]
    return minibatch


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sequence:
    """A trajectory as arrays [L]: travels between ranks at a tenth of the size of lists."""

    row_index: int
    token_ids: np.ndarray
    loss_mask: np.ndarray
    behavior_logprobs: np.ndarray
    versions: np.ndarray
    advantages: np.ndarray
    temperature: float

    def __len__(self) -> int:
        return len(self.token_ids)


def _gather(
    groups: list[list[Trajectory]], advantages: Sequence[Sequence[float | Sequence[float]]]
) -> list[_Sequence]:
    """The sequences of all ranks in one order; raises on all ranks what is wrong on any."""
    problem, local = None, []
    try:
        local = [
            _to_sequence(trajectory, advantage)
            for group, values in zip(groups, advantages, strict=True)
            for trajectory, advantage in zip(group, values, strict=True)
        ]
    except TrajectoryError as error:
        problem = str(error)
    except ValueError:
        problem = (
            f"advantages {[len(values) for values in advantages]} do not match groups "
            f"{[len(group) for group in groups]}. Pass one per trajectory of each group."
        )
    parts = dist.gather((problem, local))
    for rank, (found, _) in enumerate(parts):
        if found is not None:
            raise TrajectoryError(f"{found} (rank {rank})")
    # By row, so that minibatches do not depend on which rank owned a row; sorted() is stable.
    return sorted((s for _, part in parts for s in part), key=lambda s: s.row_index)


def _check_fits(sequences: list[_Sequence], num_minibatches: int, max_tokens: int) -> None:
    if not 1 <= num_minibatches <= len(sequences):
        raise ConfigError(
            f"{len(sequences)} trajectories cannot make num_minibatches={num_minibatches}. "
            "Set it between 1 and the number of trajectories of a step."
        )
    longest = max(len(sequence) for sequence in sequences)
    if longest > max_tokens:
        raise ConfigError(
            f"A trajectory has {longest} tokens, but a micro-batch holds at most "
            f"{max_tokens}. Set train.micro_batch_tokens to {longest} or more, or lower "
            "sampling.max_new_tokens."
        )


def _to_sequence(trajectory: Trajectory, advantage: float | Sequence[float]) -> _Sequence:
    length = len(trajectory.token_ids)
    lengths = {
        "loss_mask": len(trajectory.loss_mask),
        "behavior_logprobs": len(trajectory.behavior_logprobs),
        "versions": len(trajectory.versions),
        "advantages": len(advantage) if isinstance(advantage, Sequence) else length,
    }
    for name, found in lengths.items():
        if found != length:
            raise TrajectoryError(
                f"A trajectory has {found} {name} for {length} token_ids. "
                "Build trajectories with Transcript, which keeps them aligned."
            )
    if length == 0 or trajectory.loss_mask[0]:
        raise TrajectoryError(
            "A trajectory's first token is trainable, but nothing precedes it, so it has no "
            "log-prob. Begin with a prompt token whose loss_mask is False."
            if length
            else "A trajectory has no tokens. Return None from the workflow to reject a row."
        )
    mask = np.array(trajectory.loss_mask, dtype=np.bool_)
    return _Sequence(
        row_index=trajectory.row_index,
        token_ids=np.array(trajectory.token_ids, dtype=np.int32),
        loss_mask=mask,
        behavior_logprobs=np.array(trajectory.behavior_logprobs, dtype=np.float32),
        versions=np.array(trajectory.versions, dtype=np.int32),
        advantages=np.where(mask, np.array(advantage, dtype=np.float32), np.float32(0)),
        temperature=trajectory.temperature,
    )


def _cut(
    sequences: list[_Sequence], max_tokens: int, aggregation: Aggregation, max_length: int
) -> list[MicroBatch]:
    """This rank's micro-batches of one minibatch."""
    weights = _token_weights(sequences, aggregation, max_length)
    bins = deal([len(s) for s in sequences], max_tokens, dist.world_size())[dist.rank()]
    return [_micro_batch([(sequences[i], weights[i]) for i in chosen]) for chosen in bins]


def _token_weights(
    sequences: list[_Sequence], aggregation: Aggregation, max_length: int
) -> list[float]:
    """Per sequence, the `loss_weight` of each of its trainable tokens."""
    counts = [int(sequence.loss_mask.sum()) for sequence in sequences]
    # A sequence without a trainable token has no mean, so it does not count as one.
    num_sequences = max(1, sum(count > 0 for count in counts))
    if aggregation == "token":
        return [1.0 / max(1, sum(counts))] * len(counts)
    if aggregation == "sequence":
        return [1.0 / (num_sequences * max(1, count)) for count in counts]
    return [1.0 / (num_sequences * max_length)] * len(counts)


def deal(lengths: Sequence[int], max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """Per rank, its micro-batches, each the indices of its sequences; equally many on all ranks."""
    ranks = balance([length + QUADRATIC * length**2 for length in lengths], num_ranks)
    plans = []
    for mine in ranks:
        bins = best_fit([lengths[i] for i in mine], max_tokens)
        # In the order of arrival within a micro-batch: equal input gives equal tensors.
        plans.append([sorted(mine[i] for i in chosen) for chosen in bins])
    most = max(len(plan) for plan in plans)
    return [plan + [[] for _ in range(most - len(plan))] for plan in plans]


def balance(work: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Per rank, the indices of its items: longest first, each to the rank with the least work.

    Ties go to the lower index and the lower rank.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [(0.0, rank) for rank in range(num_ranks)]
    heapify(load)
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        total, rank = load[0]
        ranks[rank].append(index)
        heapreplace(load, (total + work[index], rank))
    return ranks


def best_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices, none above max_tokens: longest first, each into the fullest bin it fits.

    Every length must be at most max_tokens.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            bins.append([index])
            insort(room, (max_tokens - lengths[index], len(bins) - 1))
        else:
            left, chosen = room.pop(place)
            bins[chosen].append(index)
            insort(room, (left - lengths[index], chosen))
    return bins


def _micro_batch(weighted: list[tuple[_Sequence, float]]) -> MicroBatch:
    """The sequences laid end to end; each trainable token carries its sequence's weight."""

    def joined(arrays: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(dtype) if arrays else empty.to(dtype)

    empty = torch.empty(0)
    sequences = [sequence for sequence, _ in weighted]
    masks = [s.loss_mask for s in sequences]
    ends = np.cumsum([0, *(len(s) for s in sequences)])
    return MicroBatch(
        token_ids=joined([s.token_ids for s in sequences], torch.int64),
        cu_seqlens=torch.from_numpy(ends).to(torch.int32),
        loss_mask=joined(masks, torch.bool),
        behavior_logprobs=joined([s.behavior_logprobs for s in sequences], torch.float32),
        versions=joined([s.versions for s in sequences], torch.int64),
        temperature=joined(
            [np.where(s.loss_mask, s.temperature, 1.0) for s in sequences], torch.float32
        ),
        advantages=joined([s.advantages for s in sequences], torch.float32),
        loss_weight=joined(
            [mask * weight for mask, (_, weight) in zip(masks, weighted, strict=True)],
            torch.float32,
        ),
    )
