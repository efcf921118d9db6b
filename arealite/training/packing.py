"""Trajectories to packed micro-batches: balanced over ranks, weighted by the global count.

    groups of every rank --gather, order by row--> trajectories
        --split in order--> minibatches --LPT--> ranks --best fit--> micro-batches

T packed tokens in a micro-batch, N sequences. Every rank computes the same plan from the same
gathered list, so no rank has to be told its part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapify, heapreplace
from itertools import accumulate, chain, groupby, pairwise
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

# Most work of a rank over the mean, less 1, at which no better balance is looked for; and for how
# long it is.
EVEN_ENOUGH, MAX_TRIES_PER_RANK = 1e-4, 20

# A pair of items is taken into a bin if it leaves fewer tokens free than this.
PAIR_GAPS = 4


def pack(
    groups: list[list[Trajectory]],
    advantages: Sequence[Sequence[float | Sequence[float]]],
    *,
    num_minibatches: int,
    max_tokens: int,
    aggregation: Aggregation,
    max_length: int | None = None,
    keep_groups: bool = False,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of every minibatch. A collective: trajectories change ranks.

    All ranks get equally many micro-batches, if need be empty ones (T = 0, N = 0). The result,
    taken over all ranks, does not depend on how groups were spread over ranks if their
    trajectories carry `row_index`.

    Args:
        groups: this rank's groups; only their order matters here, unless they are kept.
        advantages: like groups: per trajectory one float, or one float per token.
        num_minibatches: optimizer steps; trajectories are split in order, counts differ by 1.
        max_tokens: no micro-batch is longer.
        aggregation: what `loss_weight` makes of the sum of a loss over a minibatch of all ranks.
            token: mean over trainable tokens. sequence: mean over sequences of their means.
            constant: sum divided by (sequences * max_length).
        max_length: the constant of `aggregation="constant"`, in tokens.
        keep_groups: lay the trajectories of a group side by side in one micro-batch, in their
            order, for a loss that compares them. Then groups are split over the optimizer steps;
            each must fit into max_tokens, and have a `row_index` of its own.
    """
    if aggregation not in get_args(Aggregation):
        raise ConfigError(f"aggregation={aggregation!r} is none of {get_args(Aggregation)}.")
    if aggregation == "constant" and not max_length:
        raise ConfigError(
            'aggregation="constant" divides by max_length, which is not set. '
            "Pass the budget of one response, e.g. max_length=cfg.sampling.max_new_tokens."
        )
    sequences = _gather(groups, advantages)
    units = _by_row(sequences) if keep_groups else [[sequence] for sequence in sequences]
    if not 1 <= num_minibatches <= len(units):
        raise ConfigError(
            f"{len(units)} {'groups' if keep_groups else 'trajectories'} cannot make "
            f"num_minibatches={num_minibatches}. Set it between 1 and their number in a step."
        )
    what = "group, which is kept together," if keep_groups else "trajectory"
    _check_fits([sum(map(len, unit)) for unit in units], max_tokens, what)
    bounds = [i * len(units) // num_minibatches for i in range(num_minibatches + 1)]
    minibatches = [units[start:end] for start, end in pairwise(bounds)]
    return [_cut(part, max_tokens, aggregation, max_length or 1) for part in minibatches]


def attach(
    minibatch: list[MicroBatch],
    *,
    proximal_logprobs: list[torch.Tensor] | None = None,
    ref_logprobs: list[torch.Tensor] | None = None,
    advantages: list[torch.Tensor] | None = None,
    old_values: list[torch.Tensor] | None = None,
    returns: list[torch.Tensor] | None = None,
) -> list[MicroBatch]:
    """The same micro-batches with these fields filled, one tensor [T] per micro-batch."""
    given = {
        "proximal_logprobs": proximal_logprobs,
        "ref_logprobs": ref_logprobs,
        "advantages": advantages,
        "old_values": old_values,
        "returns": returns,
    }
    for name, values in given.items():
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


def select(mb: MicroBatch, sequences: Sequence[int]) -> MicroBatch:
    """A new micro-batch of these sequences of it, in this order; one may come twice."""
    places = tokens_of(mb, sequences)
    lengths = mb.cu_seqlens.diff()[list(sequences)]
    per_token = {
        field.name: value[places]
        for field in fields(mb)
        if len(value := getattr(mb, field.name)) == len(mb.token_ids)  # an optional one is empty
    }
    per_token["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return replace(mb, **per_token)


def tokens_of(mb: MicroBatch, sequences: Sequence[int]) -> torch.Tensor:
    """Places in [T] of the tokens of these sequences, one sequence after the other."""
    bounds = list(pairwise(mb.cu_seqlens.tolist()))
    places = [torch.arange(*bounds[index]) for index in sequences]
    return torch.cat([torch.empty(0, dtype=torch.int64), *places])


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


def _check_fits(lengths: Sequence[int], max_tokens: int, what: str = "trajectory") -> None:
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise ConfigError(
            f"A {what} has {longest} tokens, but a micro-batch holds at most "
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


def _by_row(sequences: list[_Sequence]) -> list[list[_Sequence]]:
    """The sequences of each row, which stand one after the other."""
    if any(sequence.row_index < 0 for sequence in sequences):
        raise TrajectoryError(
            "A trajectory has no row_index, which says what group it is kept with. "
            "Set it to the place of its row in the run's order."
        )
    return [list(group) for _, group in groupby(sequences, key=lambda s: s.row_index)]


def _cut(
    units: list[list[_Sequence]], max_tokens: int, aggregation: Aggregation, max_length: int
) -> list[MicroBatch]:
    """This rank's micro-batches of one minibatch; what is in a unit stays together."""
    weights = iter(_token_weights(list(chain.from_iterable(units)), aggregation, max_length))
    weighted = [[(sequence, next(weights)) for sequence in unit] for unit in units]
    lengths = [sum(map(len, unit)) for unit in units]
    mine = deal(lengths, max_tokens, dist.world_size())[dist.rank()]
    return [_micro_batch(list(chain.from_iterable(weighted[i] for i in chosen))) for chosen in mine]


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
    """Per rank its micro-batches, each the indices of its sequences, in order.

    Ranks get nearly equal work, and equal numbers of micro-batches: the last ones may be empty.
    """
    ranks = balance([training_work(length) for length in lengths], num_ranks)
    plans = [
        [
            sorted(rank[i] for i in chosen)
            for chosen in best_fit([lengths[i] for i in rank], max_tokens)
        ]
        for rank in ranks
    ]
    longest = max(len(bins) for bins in plans)
    return [bins + [[] for _ in range(longest - len(bins))] for bins in plans]


def training_work(length: int) -> float:
    """What a sequence of this length costs to train on, one token being about 1."""
    return length + QUADRATIC * length**2


def balance(work: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Per rank, the indices of its items: longest first, each to the rank with the least work.

    Ties go to the lower index and the lower rank. Then the rank with the most work swaps items with
    others, those with the least first, as long as it helps, until it is within EVEN_ENOUGH of the
    mean.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    heapify(heap)
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        total, rank = heap[0]
        ranks[rank].append(index)
        heapreplace(heap, (total + work[index], rank))
    loads = [total for total, _ in sorted(heap, key=lambda item: item[1])]
    limit = (1 + EVEN_ENOUGH) * sum(loads) / num_ranks
    tries = iter(range(MAX_TRIES_PER_RANK * num_ranks))
    while max(loads) > limit and _swap_once(ranks, loads, work, tries):
        pass
    return ranks


def _swap_once(
    ranks: list[list[int]], loads: list[float], work: Sequence[float], tries: Iterator[int]
) -> bool:
    """Whether the rank with the most work had items to swap; not if there are no tries left."""
    most = loads.index(max(loads))
    for other in sorted(range(len(loads)), key=loads.__getitem__):
        wanted = (loads[most] - loads[other]) / 2
        if wanted <= 0 or next(tries, None) is None:
            return False
        if swap := _best_swap(ranks[most], ranks[other], work, wanted):
            i, j = swap
            ranks[most][i], ranks[other][j] = ranks[other][j], ranks[most][i]
            moved = work[ranks[other][j]] - work[ranks[most][i]]
            loads[most], loads[other] = loads[most] - moved, loads[other] + moved
            return True
    return False


def _best_swap(
    most: list[int], least: list[int], work: Sequence[float], wanted: float
) -> tuple[int, int] | None:
    """Places of the two items whose swap moves nearly the wanted work; None if none helps."""
    if not least:
        return None
    ours = np.array([work[index] for index in most])
    theirs = np.array([work[index] for index in least])
    order = np.argsort(theirs, kind="stable")
    above = np.searchsorted(theirs[order], ours - wanted).clip(max=len(least) - 1)
    partners = order[np.stack([above, (above - 1).clip(0)])]  # [2, items]: the nearest two of each
    distance = np.abs(ours - theirs[partners] - wanted)
    side, place = np.unravel_index(distance.argmin(), distance.shape)
    helps = distance[side, place] < wanted * (1 - 1e-9)
    return (int(place), int(partners[side, place])) if helps else None


def best_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Bins of indices, none above max_tokens, in nearly as few bins as there can be.

    Lengths are positive; raises ConfigError if one is above max_tokens.
    """
    _check_fits(lengths, max_tokens)
    array = np.array(lengths, dtype=np.int64)
    by_length = np.argsort(array, kind="stable")
    bins = _bins_of_lengths(array[by_length], max_tokens)
    # The n-th item of a length goes where this length is needed for the n-th time.
    needed = np.argsort(np.array(list(chain.from_iterable(bins)), dtype=np.int64), kind="stable")
    indices = np.empty_like(by_length)
    indices[needed] = by_length
    flat: list[int] = indices.tolist()
    return [flat[start:end] for start, end in pairwise(accumulate(map(len, bins), initial=0))]


def _bins_of_lengths(ascending: np.ndarray, max_tokens: int) -> list[list[int]]:
    """The lengths in each bin: a long one, samples of all of them, and the pair that fits best.

    Best-fit decreasing spends the short ones on the long ones: what is left in the end is of one
    length, and leaves the same gap in bin after bin. Samples keep what is left as mixed as it was.
    """
    lengths = _Lengths(ascending)
    samples = iter(_evenly_mixed(ascending))
    num_left, tokens_left = len(ascending), int(ascending.sum())
    bins: list[list[int]] = []
    while num_left:
        mean = tokens_left / num_left
        chosen: list[int] = []
        room = max_tokens
        # The factors are tried ones: two or three items at the end are enough to choose from.
        if lengths.longest > 1.5 * mean or room <= 3 * mean:
            chosen.append(lengths.take(lengths.longest))
            room -= chosen[0]
        while room > 3 * mean and (length := next(samples, 0)):
            if length <= room and lengths.count[length]:
                chosen.append(lengths.take(length))
                room -= length
        while room and num_left > len(chosen):
            # Beside one long item, a pair would be of short ones, which other bins need more.
            is_tight = len(chosen) == 1 and room < 2 * mean
            fitting = lengths.longest_in(room) if is_tight else lengths.best_in(room)
            if not fitting:
                break
            chosen += map(lengths.take, fitting)
            room -= sum(fitting)
        bins.append(chosen)
        num_left -= len(chosen)
        tokens_left -= max_tokens - room
    return bins


def _evenly_mixed(ascending: np.ndarray) -> list[int]:
    """The same lengths in an order of which every stretch is a fair sample of all of them."""
    golden = (5**0.5 - 1) / 2
    return ascending[np.argsort(np.arange(len(ascending)) * golden % 1, kind="stable")].tolist()


class _Lengths:
    """The lengths in no bin yet. A set of lengths is one integer: bit L stands for length L."""

    def __init__(self, ascending: np.ndarray) -> None:
        values, counts = np.unique(ascending, return_counts=True)
        self.count: dict[int, int] = dict(zip(values.tolist(), counts.tolist(), strict=True))
        self._top = int(values.max(initial=0))
        is_there = np.zeros(self._top + 1, dtype=np.bool_)
        is_there[values] = True
        self._bits = _as_integer(is_there)
        self._mirrored = _as_integer(is_there[::-1])  # bit top - L stands for length L

    @property
    def longest(self) -> int:
        """The greatest length."""
        return self._bits.bit_length() - 1

    def take(self, length: int) -> int:
        """The same length, of which there then is one less."""
        left = self.count[length] = self.count[length] - 1
        if not left:
            self._bits ^= 1 << length
            self._mirrored ^= 1 << (self._top - length)
        return length

    def longest_in(self, room: int) -> tuple[int, ...]:
        """The greatest length that fits, if any does."""
        fitting = self._bits & ((2 << room) - 1) if room < self._top else self._bits
        return (fitting.bit_length() - 1,) if fitting else ()

    def best_in(self, room: int) -> tuple[int, ...]:
        """The length or two that fill the room, of pairs the least equal one; else the longest."""
        if self.count.get(room):
            return (room,)
        for total in range(room, room - PAIR_GAPS, -1):
            # Bit L of the shifted one stands for length total - L.
            shift = self._top - total
            partners = self._mirrored >> shift if shift >= 0 else self._mirrored << -shift
            pairs = self._bits & partners
            longer = pairs.bit_length() - 1
            if pairs and (2 * longer != total or self.count[longer] > 1):
                return longer, total - longer
        return self.longest_in(room)


def _as_integer(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


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
