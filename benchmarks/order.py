"""What each order of admission costs and gives, on a virtual clock: the table of docs/staleness.md.

    python benchmarks/order.py        # half a minute on one core

The real `Admission` decides; what it decides about is a model, in which one unit of time is what a
sequence of mean length needs on an empty server:

- Lengths are log-normal with mean 1. Half of the variance of the logarithm belongs to the prompt,
  half to the sample. Stragglers are prompts, 3 % of them, whose sequences are 10 times as long.
- A group is 8 sequences that start together; it has finished when its longest member has.
- Each of n sequences advances at the rate 1 / (1 + n / 64): linear slowdown, no queue and no limit.
  The server's throughput grows with n towards that of 64 sequences that have it to themselves; the
  128 of one batch of 16 groups reach two thirds of that.
- Training takes a fixed time, given as its ratio to the mean time that the server needs for one
  batch alone. A new version reaches the server at once, and sequences go on under it.
- A reward is 1 with probability 1 / (1 + length), else 0: long answers are hard ones.

A row's lengths and rewards depend on the seed and its place only, so all orders meet the same rows.
Each figure is a mean over seeds; +- is the half width of its 95 % interval. The first steps of a
run do not count. Ends with one line of JSON.
"""

import heapq
import json
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from arealite.rollout.admission import Admission, Order, Ticket
from arealite.types import Cursor

BATCH, GROUP_SIZE, HALF_SPEED_AT = 16, 8, 64
STEPS, WARM_UP_STEPS = 80, 10
SEEDS = range(5)
STUDENT_95 = 2.776  # of the t distribution with 4 degrees of freedom
STRAGGLER_SHARE, STRAGGLER_FACTOR = 0.03, 10


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long sequences are."""

    name: str
    sigma: float
    straggler_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What a user chooses."""

    order: Order
    max_staleness: int


LENGTHS = (
    Lengths("all equal", 0.0),
    Lengths("sigma 0.5", 0.5),
    Lengths("sigma 1", 1.0),
    Lengths("sigma 0.5, 3 % stragglers", 0.5, STRAGGLER_SHARE),
)
TRAIN_RATIOS = (0.5, 1.0)
SYNC = Setting("fifo", 0)
SETTINGS = (
    SYNC,
    Setting("fifo", 1),
    Setting("fifo", 2),
    Setting("fifo", 4),
    Setting("window", 2),
    Setting("window", 4),
    Setting("ready", 2),
)


@dataclass(frozen=True, slots=True)
class Group:
    """What one row gives."""

    ticket: Ticket
    lengths: list[float]
    reward: float

    @property
    def length(self) -> float:
        return statistics.fmean(self.lengths)


def sample_group(lengths: Lengths, seed: int, ticket: Ticket) -> Group:
    """The group of the row at the ticket's place."""
    dice = random.Random(f"{seed} {ticket.place}")
    spread = lengths.sigma * math.sqrt(0.5)
    prompt = dice.gauss(-(lengths.sigma**2) / 2, spread)
    factor = STRAGGLER_FACTOR if dice.random() < lengths.straggler_share else 1
    samples = [factor * math.exp(prompt + dice.gauss(0, spread)) for _ in range(GROUP_SIZE)]
    rewards = [dice.random() < 1 / (1 + length) for length in samples]
    return Group(ticket, samples, statistics.fmean(rewards))


class Server:
    """Sequences that all advance at one rate, which falls with their number."""

    def __init__(self) -> None:
        self._progress = 0.0  # of a sequence that has been there from the beginning
        self._ends: list[tuple[float, Ticket]] = []  # heap of (progress at the end, group)
        self._groups: dict[Ticket, Group] = {}
        self._num_left: dict[Ticket, int] = {}  # sequences of the group that still run

    def start(self, group: Group) -> None:
        """All sequences of the group at once."""
        for length in group.lengths:
            heapq.heappush(self._ends, (self._progress + length, group.ticket))
        self._groups[group.ticket] = group
        self._num_left[group.ticket] = len(group.lengths)

    def stop(self, ticket: Ticket) -> Group:
        """Give up the group's sequences."""
        self._ends = [end for end in self._ends if end[1] != ticket]
        heapq.heapify(self._ends)
        del self._num_left[ticket]
        return self._groups.pop(ticket)

    def time_to_next_end(self) -> float:
        """Until a sequence ends, if none is started or stopped before."""
        return (self._ends[0][0] - self._progress) * self._slowdown() if self._ends else math.inf

    def advance(self, duration: float) -> Iterator[Group]:
        """Let time pass, up to the next end at most; yields a group whose last sequence ended."""
        self._progress += duration / self._slowdown()
        while self._ends and self._ends[0][0] <= self._progress + 1e-9:
            ticket = heapq.heappop(self._ends)[1]
            self._num_left[ticket] -= 1
            if not self._num_left[ticket]:
                del self._num_left[ticket]
                yield self._groups.pop(ticket)

    def _slowdown(self) -> float:
        return 1 + len(self._ends) / HALF_SPEED_AT


@dataclass(slots=True)
class Run:
    """What happened in one simulation after its warm-up."""

    time_per_step: float = 0.0
    ages: list[int] = field(default_factory=list)  # of consumed groups
    consumed: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)


def simulate(setting: Setting, lengths: Lengths, *, train_time: float, seed: int) -> Run:
    """One run of `STEPS` training steps."""
    machine = Admission[Group](
        batch=BATCH,
        max_staleness=setting.max_staleness,
        max_running=BATCH * (setting.max_staleness + 1),
        start=Cursor(),
        order=setting.order,
    )
    server, run = Server(), Run()
    now, version, began, train_end = 0.0, 0, 0.0, math.inf
    while version < STEPS:
        while ticket := machine.start(version):
            server.start(sample_group(lengths, seed, ticket))
        if train_end == math.inf and (batch := machine.take()) is not None:
            train_end = now + train_time
            given_up = [group or server.stop(t) for t, group in machine.give_up_too_old()]
            if version >= WARM_UP_STEPS:
                run.consumed += batch
                run.ages += [version - group.ticket.version for group in batch]
                run.dropped += given_up
            continue  # the places of what was given up may start
        duration = min(server.time_to_next_end(), train_end - now)
        now += duration
        for group in server.advance(duration):
            machine.accept(group.ticket, group)
        if now >= train_end:
            version, train_end = version + 1, math.inf
            began = now if version == WARM_UP_STEPS else began
    run.time_per_step = (now - began) / (STEPS - WARM_UP_STEPS)
    return run


def measure(run: Run, sync_time: float) -> dict[str, float]:
    """The figures of one run; `time` is that of a step, synchronous training being 1."""
    generated = [*run.consumed, *run.dropped]
    return {
        "time": run.time_per_step / sync_time,
        "age_mean": statistics.fmean(run.ages),
        "age_max": max(run.ages),
        "dropped": len(run.dropped) / len(generated),
        "length": statistics.fmean(group.length for group in run.consumed),
        "length_generated": statistics.fmean(group.length for group in generated),
        "reward": statistics.fmean(group.reward for group in run.consumed),
        "reward_generated": statistics.fmean(group.reward for group in generated),
    }


def over_seeds(measured: list[dict[str, float]]) -> dict[str, float]:
    """Means, the worst age, and of the time, the share dropped and the length the half width."""
    values = {name: [one[name] for one in measured] for name in measured[0]}
    means = {name: statistics.fmean(column) for name, column in values.items()}
    half_widths = {
        f"{name}_half_width": STUDENT_95 * statistics.stdev(values[name]) / math.sqrt(len(measured))
        for name in ("time", "dropped", "length")
    }
    figures = means | half_widths | {"age_max": max(values["age_max"])}
    return {name: round(value, 4) for name, value in figures.items()}


def run_case(lengths: Lengths, train_ratio: float) -> Iterator[dict[str, float | str]]:
    """The figures of each setting for one kind of work."""
    alone = [simulate(SYNC, lengths, train_time=0.0, seed=seed).time_per_step for seed in SEEDS]
    train_time = train_ratio * statistics.fmean(alone)
    sync_times: list[float] = []
    for setting in SETTINGS:
        runs = [simulate(setting, lengths, train_time=train_time, seed=seed) for seed in SEEDS]
        sync_times = sync_times or [run.time_per_step for run in runs]
        measured = [measure(*pair) for pair in zip(runs, sync_times, strict=True)]
        names = {"lengths": lengths.name, "train_ratio": train_ratio, "order": setting.order}
        yield names | {"max_staleness": setting.max_staleness} | over_seeds(measured)


HEADER = """\
| lengths | train : generate | order | bound | time per step | age mean / worst | dropped \
| length used / generated | reward used / generated |
|---|---|---|---|---|---|---|---|---|"""


def table_row(row: dict) -> str:
    """One line of the long table."""
    return (
        f"| {row['lengths']} | {row['train_ratio']} | {row['order']} | {row['max_staleness']} "
        f"| {row['time']:.2f} ± {row['time_half_width']:.2f} "
        f"| {row['age_mean']:.2f} / {row['age_max']} "
        f"| {row['dropped']:.1%} ± {row['dropped_half_width']:.1%} "
        f"| {row['length']:.2f} ± {row['length_half_width']:.2f} / {row['length_generated']:.2f} "
        f"| {row['reward']:.3f} / {row['reward_generated']:.3f} |"
    )


def short_table(rows: list[dict], train_ratio: float) -> str:
    """One line per setting: time per step for each kind of lengths, and the worst of the rest."""
    names = [lengths.name for lengths in LENGTHS]
    lines = [
        f"| order | bound | mean age | {' | '.join(names)} | dropped | length used |",
        "|---|---|---|" + "---|" * len(names) + "---|---|",
    ]
    for setting in SETTINGS:
        cases = [
            row
            for row in rows
            if (row["order"], row["max_staleness"]) == (setting.order, setting.max_staleness)
            and row["train_ratio"] == train_ratio
        ]
        times = " | ".join(f"{case['time']:.2f} ± {case['time_half_width']:.2f}" for case in cases)
        lines.append(
            f"| {setting.order} | {setting.max_staleness} "
            f"| {max(case['age_mean'] for case in cases):.1f} | {times} "
            f"| {max(case['dropped'] for case in cases):.0%} "
            f"| {min(case['length'] / case['length_generated'] for case in cases):.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    print(HEADER)
    rows: list[dict] = []
    for lengths in LENGTHS:
        for train_ratio in TRAIN_RATIOS:
            for row in run_case(lengths, train_ratio):
                rows.append(row)
                print(table_row(row), flush=True)
    for train_ratio in TRAIN_RATIOS:
        print(f"\nTime per step, training takes {train_ratio:g} of generating one batch alone:\n")
        print(short_table(rows, train_ratio))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
