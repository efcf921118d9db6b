"""How full, how even, how fast: packing and balancing of training beside bounds and baselines.

    python benchmarks/packing.py      # half a minute on one core

`best_fit` puts sequences into micro-batches of at most 8,192 tokens; `balance` gives them to ranks.
Both are what `pack` calls for each minibatch. Lengths are drawn with a seed and cut at the cap:

- log-normal, described by mean and sigma of the logarithm's normal distribution; with sigma 1 a few
  sequences are as long as the cap, and many short ones fill the gaps; with sigma 0.5 few do.
- bimodal: half of the sequences around 2,700 tokens, half around 600.

`bound` is ceil(tokens / cap): no packing has fewer micro-batches. `first fit` is plain first-fit
decreasing, written here; `over` is the number of micro-batches above the bound. `padded` is how
many times the tokens a batch takes if sequences are padded on the right instead, in order of
arrival, as many in a batch as fit under the cap; `sorted` is the same with sequences sorted by
length. `ms` is the fastest of several calls, since other work on the machine only adds to it, and
`median` their median, with some garbage collections in it.

Work of L tokens is L + L^2 / 24,576, of which `off` is the largest of a rank over the mean of all,
less 1. A rank that has one sequence of more than the mean work cannot be helped: `floor` is what
the longest sequence alone enforces. `passes` is how many micro-batches each rank runs, and the
lower bound of it, ceil(tokens / cap / ranks).

The last line is JSON, the worst over the log-normal lengths: `ms_8192`, `median_ms_8192` and
`fill_8192` (tokens over the room in all micro-batches) at 8,192 sequences; `excess_bins_1e5`, the
micro-batches above the bound at 100,000, and `excess_share_1e5` relative to it; `imbalance`, the
largest `off` of 2 and 64 ranks where `floor` is 0.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from arealite.training.packing import balance, best_fit, deal, training_work

CAP = 8_192
COUNTS, RANKS = (512, 8_192, 100_000), (2, 64)
CALLS = {512: 51, 8_192: 21, 100_000: 5}


def log_normal(mean: float, sigma: float) -> Callable[[int], list[int]]:
    def draw(count: int) -> list[int]:
        dice = np.random.default_rng(count)
        return cut(dice.lognormal(math.log(mean) - sigma**2 / 2, sigma, count))

    return draw


def bimodal(count: int) -> list[int]:
    dice = np.random.default_rng(count)
    is_long = dice.random(count) < 0.5
    return cut(np.where(is_long, dice.normal(2_700, 250, count), dice.normal(600, 200, count)))


def cut(lengths: np.ndarray) -> list[int]:
    return np.clip(np.rint(lengths), 1, CAP).astype(int).tolist()


LOG_NORMAL = {
    "log-normal 900, 1": log_normal(900, 1.0),
    "log-normal 2,000, 0.5": log_normal(2_000, 0.5),
    "log-normal 500, 0.3": log_normal(500, 0.3),
}
LENGTHS = {**LOG_NORMAL, "bimodal 2,700 / 600": bimodal}


# --- The baselines --------------------------------------------------------------------------------


def first_fit_decreasing(lengths: Sequence[int]) -> int:
    """The number of bins: longest first, each into the first bin in which it fits.

    The most room in any bin of a subtree is known, so the first is found by going down a tree.
    """
    size = 1 << (len(lengths) - 1).bit_length()
    room = [CAP] * (2 * size)
    for length in sorted(lengths, reverse=True):
        node = 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sum(left < CAP for left in room[size:])


def padded_tokens(lengths: Sequence[int]) -> int:
    """Tokens of batches padded to their longest, each of as many in a row as fit under the cap."""
    total, longest, count = 0, 0, 0
    for length in lengths:
        if max(longest, length) * (count + 1) > CAP:
            total += longest * count
            longest, count = 0, 0
        longest, count = max(longest, length), count + 1
    return total + longest * count


# --- What is measured -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Micro-batches of one list of lengths."""

    bound: int
    bins: int
    fill: float
    ms: float
    median_ms: float
    first_fit: int
    padded: float
    padded_sorted: float

    @property
    def over(self) -> int:
        return self.bins - self.bound


@dataclass(frozen=True, kw_only=True, slots=True)
class Balanced:
    """Work and passes of so many ranks."""

    off: float
    floor: float
    passes: int
    bound: int


def measure(lengths: list[int]) -> Packed:
    times_s = []
    for _ in range(CALLS[len(lengths)]):
        began_s = time.perf_counter()
        bins = best_fit(lengths, CAP)
        times_s.append(time.perf_counter() - began_s)
    check(bins, lengths)
    tokens = sum(lengths)
    return Packed(
        bound=math.ceil(tokens / CAP),
        bins=len(bins),
        fill=tokens / CAP / len(bins),
        ms=1e3 * min(times_s),
        median_ms=1e3 * statistics.median(times_s),
        first_fit=first_fit_decreasing(lengths),
        padded=padded_tokens(lengths) / tokens,
        padded_sorted=padded_tokens(sorted(lengths)) / tokens,
    )


def measure_ranks(lengths: list[int], num_ranks: int) -> Balanced:
    work = [training_work(length) for length in lengths]
    loads = [sum(work[i] for i in rank) for rank in balance(work, num_ranks)]
    mean = math.fsum(work) / num_ranks
    plans = deal(lengths, CAP, num_ranks)
    check([chosen for rank in plans for chosen in rank], lengths)
    return Balanced(
        off=max(loads) / mean - 1,
        floor=max(0.0, max(work) / mean - 1),
        passes=len(plans[0]),
        bound=math.ceil(sum(lengths) / CAP / num_ranks),
    )


def check(bins: list[list[int]], lengths: list[int]) -> None:
    """Stops the benchmark if a sequence is missing or twice there, or a bin is too full."""
    if sorted(index for chosen in bins for index in chosen) != list(range(len(lengths))):
        raise RuntimeError(f"The bins do not hold each of {len(lengths)} sequences once.")
    fullest = max(sum(lengths[index] for index in chosen) for chosen in bins)
    if fullest > CAP:
        raise RuntimeError(f"A bin holds {fullest} tokens, but the cap is {CAP}.")


# --- The tables -----------------------------------------------------------------------------------


def print_packed(packed: dict[tuple[str, int], Packed]) -> None:
    print("| lengths | sequences | bound | over | first fit over | fill | ms | median ", end="")
    print("| padded | sorted |\n|---|---|---|---|---|---|---|---|---|---|")
    for (name, count), one in packed.items():
        print(
            f"| {name} | {count:,} | {one.bound:,} | {one.over} | {one.first_fit - one.bound} "
            f"| {one.fill:.4f} | {one.ms:.1f} | {one.median_ms:.1f} "
            f"| {one.padded:.2f} | {one.padded_sorted:.2f} |"
        )


def print_balanced(balanced: dict[tuple[str, int, int], Balanced]) -> None:
    print("\n| lengths | sequences | ranks | off | floor | passes | bound |")
    print("|---|---|---|---|---|---|---|")
    for (name, count, num_ranks), one in balanced.items():
        print(
            f"| {name} | {count:,} | {num_ranks} | {one.off:.1e} | {one.floor:.2g} "
            f"| {one.passes:,} | {one.bound:,} |"
        )


def summary(
    packed: dict[tuple[str, int], Packed], balanced: dict[tuple[str, int, int], Balanced]
) -> dict[str, float]:
    at_8192, at_1e5 = ([packed[name, count] for name in LOG_NORMAL] for count in COUNTS[1:])
    even = [one for (name, *_), one in balanced.items() if name in LOG_NORMAL and not one.floor]
    return {
        "ms_8192": round(max(one.ms for one in at_8192), 2),
        "median_ms_8192": round(max(one.median_ms for one in at_8192), 2),
        "fill_8192": round(min(one.fill for one in at_8192), 4),
        "excess_bins_1e5": max(one.over for one in at_1e5),
        "excess_share_1e5": round(max(one.over / one.bound for one in at_1e5), 6),
        "imbalance": float(f"{max(one.off for one in even):.1e}"),
    }


def main() -> None:
    drawn = {(name, n): draw(n) for name, draw in LENGTHS.items() for n in COUNTS}
    packed = {case: measure(lengths) for case, lengths in drawn.items()}
    print_packed(packed)
    balanced = {
        (*case, num_ranks): measure_ranks(lengths, num_ranks)
        for case, lengths in drawn.items()
        for num_ranks in RANKS
    }
    print_balanced(balanced)
    print(json.dumps(summary(packed, balanced)))


if __name__ == "__main__":
    main()
