"""What asynchrony buys: the same rollouts and the same training, in turn and side by side.

    python benchmarks/async_vs_sync.py              # all cells, an hour or more on two cores
    python benchmarks/async_vs_sync.py --short      # one cell, 12 minutes
    python benchmarks/async_vs_sync.py --out FILE   # figures as JSON; started again, it continues

A seeded trace says how many tokens each response has (log-normal, `ignore_eos`); real vLLM, pinned
to one core, generates them, and a real trainer, pinned to the other, trains on them. Every mode
gets the same trace, the same amount of training for each batch and the same pushes; the modes take
turns, some steps each. The ratio train/generate is that of synchronous training: the time for
training on one batch against the time in which the server, with nothing else to do, generates one.
It is reached by training on a part of the batch only, or on parts of it again.

`limit` is min(vLLM alone, trainer alone) in tokens/s, where vLLM always has as many requests as it
takes at once; `of limit` is the share of it that a mode consumes. `sync, both cores` is the other
fair baseline: each phase may use the whole machine (a server with two threads, a trainer with two
threads). The last line is JSON: `best_fifo_ratio` (fifo at 4 or window at 2, over the pinned sync,
sigma 1, ratio .5), `ready_share_of_limit` (same cell) and `worst_ratio` (lowest of any mode and
cell over its sync).
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from arealite import background
from arealite.algo.losses import clipped_surrogate
from arealite.api import InferenceEngine
from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.rollout.admission import Order
from arealite.rollout.executor import RolloutConfig, RolloutExecutor, run_episodes
from arealite.testing import make_tiny_model
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.types import (
    Cursor,
    LossOutput,
    MicroBatch,
    ModelRequest,
    Row,
    SamplingParams,
    Trajectory,
)
from arealite.weights import push_weights

PROMPTS, GROUP_SIZE, PROMPT_TOKENS, MEAN_TOKENS, MAX_TOKENS = 8, 8, 16, 128, 2000
MAX_NUM_SEQS = 64  # one batch, which is also where one core of a server is at its best
ROUNDS, STEPS = 2, 10
SIGMAS, RATIOS = (0.0, 0.5, 1.0), (0.5, 1.0)
SERVER_CORE, TRAINER_CORE = 0, 1


@dataclass(frozen=True)
class Mode:
    """One way to schedule the same work."""

    name: str
    order: Order
    max_staleness: int


MODES = (
    Mode("sync", "fifo", 0),
    Mode("fifo 1", "fifo", 1),
    Mode("fifo 2", "fifo", 2),
    Mode("fifo 4", "fifo", 4),
    Mode("window 2", "window", 2),
    Mode("ready 2", "ready", 2),
)


@dataclass
class Measured:
    """Steps of one mode in one cell, from all its chunks."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)  # mean over the tokens of a step
    worst_age: int = 0
    consumed: int = 0  # groups
    dropped: int = 0

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens) / sum(self.seconds)


@dataclass
class Cell:
    """All modes on one trace at one ratio; what each engine does when it is alone."""

    sigma: float
    ratio: float
    generate_s: float  # of one batch
    train_s: float
    vllm_tokens_per_s: float
    trainer_tokens_per_s: float
    passes: float
    modes: dict[str, Measured]

    def over_sync(self, mode: str) -> float:
        """Speed of the mode; that of the pinned synchronous one is 1."""
        return self.modes[mode].tokens_per_s / self.modes["sync"].tokens_per_s

    def of_limit(self, mode: str) -> float:
        """Tokens that the mode consumes, as a share of what the slower engine does alone."""
        limit = min(self.vllm_tokens_per_s, self.trainer_tokens_per_s)
        return self.modes[mode].tokens_per_s / limit


class TraceWorkflow:
    """Responses of the lengths that a row asks for."""

    group_size = GROUP_SIZE

    async def arun_episode(self, engine: InferenceEngine, row: Row) -> list[Trajectory]:
        return list(await asyncio.gather(*(self.sample(engine, row, n) for n in row["lengths"])))

    async def sample(self, engine: InferenceEngine, row: Row, length: int) -> Trajectory:
        sampling = SamplingParams(max_new_tokens=length, ignore_eos=True)
        prompt = row["token_ids"]
        response = await engine.agenerate(ModelRequest(token_ids=prompt, sampling=sampling))
        assert len(response.token_ids) == length
        return Trajectory(
            token_ids=prompt + response.token_ids,
            loss_mask=[False] * len(prompt) + [True] * length,
            behavior_logprobs=[0.0] * len(prompt) + response.behavior_logprobs,
            versions=[-1] * len(prompt) + response.versions,
            reward=float(length % 2),
            temperature=1.0,
            finish_reason=response.finish_reason,
        )


def trace(sigma: float, num_rows: int = 4096) -> list[Row]:
    """Rows with a prompt and the lengths of its responses; their mean is the same for any sigma.

    Half of the variance of the logarithm belongs to the prompt, half to the sample, as in order.py.
    """
    dice = random.Random(1)
    spread = sigma * math.sqrt(0.5)

    def row() -> Row:
        token_ids = [dice.randrange(3, 259) for _ in range(PROMPT_TOKENS)]
        prompt = MEAN_TOKENS * math.exp(dice.gauss(-(sigma**2) / 2, spread))
        lengths = [round(prompt * math.exp(dice.gauss(0, spread))) for _ in range(GROUP_SIZE)]
        return {"token_ids": token_ids, "lengths": [min(max(1, n), MAX_TOKENS) for n in lengths]}

    return [row() for _ in range(num_rows)]


class Trainer:
    """One optimizer step for a batch, of as much work as the ratio asks for."""

    def __init__(self, model: str, threads: int) -> None:
        self.engine = FSDPEngine(model, FSDPConfig(lr=1e-5, cpu_threads=threads))
        self.passes = 1.0
        self._owed = 0.0  # groups, because only whole ones can be trained on

    def train(self, groups: list[list[Trajectory]]) -> None:
        """Train on the first groups only, or on all and the first again, as `passes` says."""
        self._owed += self.passes * len(groups)
        chosen = list(itertools.islice(itertools.cycle(groups), int(self._owed)))
        self._owed -= len(chosen)
        advantages = [[1.0 if sample.reward else -1.0 for sample in group] for group in chosen]
        [minibatch] = pack(
            chosen, advantages, num_minibatches=1, max_tokens=8192, aggregation="token"
        )
        self.engine.step(attach(minibatch, proximal_logprobs=behavior(minibatch)), loss)

    def calibrate(self, batches: list[list[list[Trajectory]]], wanted_s: float) -> float:
        """Choose `passes` so that a batch takes `wanted_s`; what it takes then, in seconds."""
        self.passes, batch_s = 1.0, 0.0
        for _ in range(3):  # the first also warms up; time is not quite linear in work
            batch_s = timed(lambda: [self.train(batch) for batch in batches]) / len(batches)
            latest, self.passes = self.passes, self.passes * wanted_s / batch_s
        self.passes = latest
        return batch_s


def behavior(minibatch: list[MicroBatch]) -> list[torch.Tensor]:
    return [mb.behavior_logprobs for mb in minibatch]


def loss(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
    surrogate, _ = clipped_surrogate(
        logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask, 0.2, 0.28
    )
    return LossOutput(total=-(mb.loss_weight * surrogate).sum())


def timed(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def run_chunk(
    engine: VLLMEngine, trainer: Trainer, mode: Mode, rows: list[Row], into: Measured, place: int
) -> None:
    """Some steps of one mode, from an empty pipeline; the first ones are not counted."""
    cfg = RolloutConfig(
        prompts_per_step=PROMPTS, max_staleness=mode.max_staleness, order=mode.order
    )
    start = Cursor(version=engine.version, next_row=place)
    with RolloutExecutor(engine, TraceWorkflow(), rows, cfg, start=start) as rollouts:
        num_filling = mode.max_staleness + 1  # steps until the pipeline is full
        for step in range(num_filling + STEPS):
            began_s = time.perf_counter()
            groups = rollouts.next_batch()
            version = engine.version
            trainer.train(groups)
            push_weights(trainer.engine, engine, version=version + 1)
            lost = rollouts.take_lost()
            if step < num_filling:
                continue
            into.seconds.append(time.perf_counter() - began_s)
            ages = [version - v for g in groups for t in g for v in t.versions if v >= 0]
            into.tokens.append(len(ages))
            into.ages.append(statistics.fmean(ages))
            into.worst_age = max(into.worst_age, *ages)
            into.consumed += len(groups)
            into.dropped += len(lost)


def vllm_alone(engine: VLLMEngine, rows: list[Row]) -> float:
    """Tokens/s with as much in flight as fifo at 4 has."""
    workflow = TraceWorkflow()
    finished: list[tuple[float, list[Trajectory]]] = []
    places = iter(range(len(rows)))
    wanted = 20 * PROMPTS

    async def keep_busy() -> None:
        while len(finished) < wanted:
            group = await workflow.arun_episode(engine, rows[next(places)])
            finished.append((time.perf_counter(), group))

    async def all_of_them() -> None:
        await asyncio.gather(*(keep_busy() for _ in range(5 * PROMPTS)))

    background.run(all_of_them(), timeout_s=600, what="vLLM alone")
    measured = finished[5 * PROMPTS : wanted]
    tokens = sum(sample.response_length for _, group in measured[1:] for sample in group)
    return tokens / (measured[-1][0] - measured[0][0])


def one_by_one(
    engine: VLLMEngine, rows: list[Row], num_batches: int = 6
) -> tuple[float, list[list[list[Trajectory]]]]:
    """Seconds from the first request of a batch to its last token; and the batches."""
    batches: list[list[list[Trajectory]]] = []
    began_s = time.perf_counter()
    for start in range(0, num_batches * PROMPTS, PROMPTS):
        batches.append(run_episodes(engine, TraceWorkflow(), rows[start : start + PROMPTS]))
    return (time.perf_counter() - began_s) / num_batches, batches


def measure_cells(
    engine: VLLMEngine, trainer: Trainer, sigma: float, ratios: list[float]
) -> Iterator[Cell]:
    """All modes of one trace, in turn, at each ratio."""
    if not ratios:
        return
    rows = trace(sigma)
    vllm_tokens_per_s = vllm_alone(engine, rows)
    generate_s, batches = one_by_one(engine, rows)
    num_tokens = sum(t.response_length for batch in batches for group in batch for t in group)
    for ratio in ratios:
        train_s = trainer.calibrate(batches, ratio * generate_s)
        measured = {mode.name: Measured() for mode in MODES}
        for number in range(ROUNDS):
            for mode in MODES if number % 2 == 0 else reversed(MODES):
                run_chunk(engine, trainer, mode, rows, measured[mode.name], number * 1000)
                print(
                    f"sigma {sigma:g}, ratio {ratio:g}, round {number}, {mode.name}: "
                    f"{statistics.median(measured[mode.name].seconds[-STEPS:]):.2f} s per step",
                    flush=True,
                )
        yield Cell(
            sigma=sigma,
            ratio=ratio,
            generate_s=generate_s,
            train_s=train_s,
            vllm_tokens_per_s=vllm_tokens_per_s,
            trainer_tokens_per_s=num_tokens / len(batches) / train_s,
            passes=trainer.passes,
            modes=measured,
        )


def sync_on_both_cores(cells: list[Cell], folder: str) -> list[Measured]:
    """The synchronous mode in a process of its own, with no core set aside for either phase."""
    work = json.dumps([(cell.sigma, cell.passes) for cell in cells])
    command = [sys.executable, __file__, "--both", work, folder]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [Measured(**values) for values in json.loads(printed.splitlines()[-1])]


def measure_both(work: list[tuple[float, float]], folder: str) -> None:
    """The other end of `sync_on_both_cores`."""
    trainer = Trainer(folder, threads=2)
    results: list[Measured] = []
    cfg = ServerConfig(cpu_cores="0-1", max_num_seqs=MAX_NUM_SEQS)
    with (
        serve(folder, cfg, log_dir=Path(folder) / "both") as servers,
        VLLMEngine(servers) as engine,
    ):
        push_weights(trainer.engine, engine, version=0)
        for sigma, passes in work:
            trainer.passes = passes
            results.append(Measured())
            for number in range(ROUNDS):
                run_chunk(engine, trainer, MODES[0], trace(sigma), results[-1], number * 1000)
            median_s = statistics.median(results[-1].seconds)
            print(f"sigma {sigma:g}, both cores: {median_s:.2f} s per step", file=sys.stderr)
    print(json.dumps([asdict(result) for result in results]))


def write_cells(cells: list[Cell], file: Path) -> None:
    file.write_text(json.dumps([asdict(cell) for cell in cells]))


def read_cells(file: Path) -> list[Cell]:
    """What an earlier start has measured."""
    return [
        Cell(**{**cell, "modes": {name: Measured(**m) for name, m in cell["modes"].items()}})
        for cell in (json.loads(file.read_text()) if file.exists() else [])
    ]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[974]


def print_cell(cell: Cell) -> None:
    """The table of one cell, as it stands in docs/staleness.md."""
    print(
        f"\nsigma {cell.sigma:g}, train/generate {cell.ratio:g}: one batch takes "
        f"{cell.generate_s:.2f} s to generate and {cell.train_s:.2f} s to train on; vLLM alone "
        f"{cell.vllm_tokens_per_s:.0f} tokens/s, trainer alone {cell.trainer_tokens_per_s:.0f}\n\n"
        "| mode | s per step, median (95 %) | tokens/s | over sync | of limit | age mean / worst "
        "| dropped |\n|---|---|---|---|---|---|---|"
    )
    for name, values in cell.modes.items():
        low, high = interval(values.seconds)
        print(
            f"| {name} | {statistics.median(values.seconds):.2f} ({low:.2f}-{high:.2f}) "
            f"| {values.tokens_per_s:.0f} | {cell.over_sync(name):.2f} | {cell.of_limit(name):.2f} "
            f"| {statistics.fmean(values.ages):.2f} / {values.worst_age} "
            f"| {values.dropped / (values.dropped + values.consumed):.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="only sigma 1, ratio .5")
    parser.add_argument("--out", type=Path, help="JSON of all figures, also to continue from")
    parser.add_argument("--both", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.both:
        return measure_both(json.loads(arguments.both[0]), arguments.both[1])

    sigmas, ratios = ([1.0], [0.5]) if arguments.short else (SIGMAS, RATIOS)
    with tempfile.TemporaryDirectory() as folder:
        out: Path = arguments.out or Path(folder) / "cells.json"
        cells = read_cells(out)
        make_tiny_model(folder, max_model_len=2 * 1024)
        # A thread passes its core on to what it starts: first the servers, then our own threads.
        os.sched_setaffinity(0, {SERVER_CORE})
        cfg = ServerConfig(max_num_seqs=MAX_NUM_SEQS)
        servers = serve(folder, cfg, log_dir=Path(folder) / "pinned")
        os.sched_setaffinity(0, {TRAINER_CORE})
        with servers, VLLMEngine(servers) as engine:
            trainer = Trainer(folder, threads=1)
            push_weights(trainer.engine, engine, version=0)
            for sigma in sigmas:
                measured = {cell.ratio for cell in cells if cell.sigma == sigma}
                for cell in measure_cells(engine, trainer, sigma, sorted({*ratios} - measured)):
                    cells.append(cell)
                    write_cells(cells, out)
        os.sched_setaffinity(0, {SERVER_CORE, TRAINER_CORE})
        for cell, both in zip(cells, sync_on_both_cores(cells, folder), strict=True):
            cell.modes["sync, both cores"] = both
        write_cells(cells, out)

    for cell in cells:
        print_cell(cell)
    [chosen] = [cell for cell in cells if (cell.sigma, cell.ratio) == (1.0, 0.5)]
    figures = {
        "best_fifo_ratio": max(chosen.over_sync("fifo 4"), chosen.over_sync("window 2")),
        "ready_share_of_limit": chosen.of_limit("ready 2"),
        "worst_ratio": min(cell.over_sync(mode.name) for cell in cells for mode in MODES),
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
