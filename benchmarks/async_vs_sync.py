"""What asynchrony buys: the same rollouts and the same training, in turn and side by side.

    python benchmarks/async_vs_sync.py              # all cells, half an hour on two cores
    python benchmarks/async_vs_sync.py --short      # one cell, a few minutes

A seeded trace says how many tokens each response has (log-normal, `ignore_eos`); real vLLM, pinned
to one core, generates them, and a real trainer, pinned to the other, computes on them. Every mode
gets the same trace, the same number of passes over each batch and the same pushes; the modes take
turns, some steps each. The ratio train/generate is set once per trace, as passes over the batch
against the time that vLLM alone needs for one batch.

`limit` is min(vLLM alone, trainer alone) in tokens/s, `of limit` the share that a mode consumes of
it. `sync, both cores` is the other fair baseline: each phase may use the whole machine (a server
with two threads, a trainer with two threads). The last line is JSON: `best_fifo_ratio` (fifo at 4
or window at 2, over the pinned sync, sigma 1, ratio .5), `ready_share_of_limit` (same cell) and
`worst_ratio` (lowest of any mode and cell over its sync).
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from arealite import background
from arealite.algo.losses import clipped_surrogate
from arealite.api import InferenceEngine
from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.rollout.admission import Order
from arealite.rollout.executor import RolloutConfig, RolloutExecutor
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

PROMPTS, GROUP_SIZE, PROMPT_TOKENS, MEAN_TOKENS, MAX_TOKENS = 8, 8, 24, 32, 480
ROUNDS, STEPS, WARM_UP = 4, 6, 4  # of each chunk, the first steps fill the pipeline
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


class TraceWorkflow:
    """Responses of the lengths that a row asks for."""

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
    """Rows with a prompt and the lengths of its responses; their mean is the same for any sigma."""
    dice = random.Random(1)

    def length() -> int:
        drawn = MEAN_TOKENS * dice.lognormvariate(-(sigma**2) / 2, sigma)
        return max(1, min(MAX_TOKENS, round(drawn)))

    return [
        {
            "token_ids": [dice.randrange(3, 259) for _ in range(PROMPT_TOKENS)],
            "lengths": [length() for _ in range(GROUP_SIZE)],
        }
        for _ in range(num_rows)
    ]


class Trainer:
    """One optimizer step on a batch, and as many forward passes more as the ratio asks for."""

    def __init__(self, model: str, threads: int) -> None:
        self.engine = FSDPEngine(model, FSDPConfig(lr=1e-5, cpu_threads=threads))
        self.forward_passes = 0.0
        self._owed = 0.0

    def train(self, groups: list[list[Trajectory]]) -> None:
        advantages = [[1.0 if sample.reward else -1.0 for sample in group] for group in groups]
        [minibatch] = pack(
            groups, advantages, num_minibatches=1, max_tokens=8192, aggregation="token"
        )
        self._owed += self.forward_passes
        while self._owed >= 1:
            self.engine.logprobs(minibatch)
            self._owed -= 1
        self.engine.step(attach(minibatch, proximal_logprobs=behavior(minibatch)), loss)

    def calibrate(self, groups: list[list[Trajectory]], wanted_s: float) -> float:
        """Choose the passes, so that one batch takes `wanted_s`; what it takes then, in seconds."""
        self.forward_passes = 0.0
        step_s = statistics.median(timed(partial(self.train, groups)) for _ in range(7))
        self.forward_passes = 4.0
        more_s = statistics.median(timed(partial(self.train, groups)) for _ in range(7)) - step_s
        self.forward_passes = max(0.0, (wanted_s - step_s) / (more_s / 4))
        return step_s + self.forward_passes * more_s / 4


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
        for step in range(WARM_UP + STEPS):
            began_s = time.perf_counter()
            groups = rollouts.next_batch()
            version = engine.version
            trainer.train(groups)
            push_weights(trainer.engine, engine, version=version + 1)
            lost = rollouts.take_lost()
            if step < WARM_UP:
                continue
            into.seconds.append(time.perf_counter() - began_s)
            ages = [version - v for g in groups for t in g for v in t.versions if v >= 0]
            into.tokens.append(len(ages))
            into.ages.append(statistics.fmean(ages))
            into.worst_age = max(into.worst_age, *ages)
            into.consumed += len(groups)
            into.dropped += len(lost)


def vllm_alone(engine: VLLMEngine, rows: list[Row]) -> tuple[float, list[list[Trajectory]]]:
    """Tokens/s with as much in flight as fifo at 4 has, and one batch to train on."""
    workflow = TraceWorkflow()
    finished: list[tuple[float, list[Trajectory]]] = []
    places = iter(range(len(rows)))
    wanted = 14 * PROMPTS

    async def keep_busy() -> None:
        while len(finished) < wanted:
            group = await workflow.arun_episode(engine, rows[next(places)])
            finished.append((time.perf_counter(), group))

    async def all_of_them() -> None:
        await asyncio.gather(*(keep_busy() for _ in range(5 * PROMPTS)))

    background.run(all_of_them(), timeout_s=600, what="vLLM alone")
    measured = finished[4 * PROMPTS : wanted]
    tokens = sum(sample.response_length for _, group in measured[1:] for sample in group)
    rate = tokens / (measured[-1][0] - measured[0][0])
    return rate, [group for _, group in finished[:PROMPTS]]


def measure_cell(
    engine: VLLMEngine, trainer: Trainer, sigma: float, ratio: float, modes: tuple[Mode, ...]
) -> dict[str, object]:
    """All modes of one trace and ratio, in turn."""
    rows = trace(sigma)
    tokens_per_batch = PROMPTS * sum(sum(row["lengths"]) for row in rows) / len(rows)
    vllm_tokens_per_s, groups = vllm_alone(engine, rows)
    generate_s = tokens_per_batch / vllm_tokens_per_s
    train_s = trainer.calibrate(groups, ratio * generate_s)
    limit = min(vllm_tokens_per_s, tokens_per_batch / train_s)
    measured = {mode.name: Measured() for mode in modes}
    for number in range(ROUNDS):
        for mode in modes if number % 2 == 0 else reversed(modes):
            run_chunk(engine, trainer, mode, rows, measured[mode.name], number * 1000)
    return {
        "sigma": sigma,
        "ratio": ratio,
        "vllm_alone_tokens_per_s": vllm_tokens_per_s,
        "trainer_alone_tokens_per_s": tokens_per_batch / train_s,
        "forward_passes": trainer.forward_passes,
        "limit": limit,
        "modes": {name: asdict(values) for name, values in measured.items()},
    }


def sync_on_both_cores(cells: list[tuple[float, float, float]], folder: str) -> list[Measured]:
    """The synchronous mode in a process of its own, with no core set aside for either phase."""
    command = [sys.executable, __file__, "--both", json.dumps(cells), folder]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Measured(**values) for values in json.loads(printed.splitlines()[-1])]


def measure_both(cells: list[tuple[float, float, float]], folder: str) -> None:
    """The other end of `sync_on_both_cores`."""
    trainer = Trainer(folder, threads=2)
    results: list[Measured] = []
    cfg = ServerConfig(cpu_cores="0-1")
    with (
        serve(folder, cfg, log_dir=Path(folder) / "both") as servers,
        VLLMEngine(servers) as engine,
    ):
        push_weights(trainer.engine, engine, version=0)
        for sigma, _, forward_passes in cells:
            trainer.forward_passes = forward_passes
            results.append(Measured())
            for number in range(ROUNDS):
                run_chunk(engine, trainer, MODES[0], trace(sigma), results[-1], number * 1000)
    print(json.dumps([asdict(result) for result in results]))


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(1000))
    return medians[25], medians[974]


def print_cell(cell: dict, both: Measured) -> dict[str, float]:
    """The table of one cell; tokens/s of each mode over those of the pinned sync."""
    modes = {name: Measured(**values) for name, values in cell["modes"].items()}
    modes["sync, both cores"] = both
    sync = modes["sync"].tokens_per_s
    print(
        f"\nsigma {cell['sigma']}, train/generate {cell['ratio']}: vLLM alone "
        f"{cell['vllm_alone_tokens_per_s']:.0f} tokens/s, trainer alone "
        f"{cell['trainer_alone_tokens_per_s']:.0f}\n"
        f"{'mode':18}{'s/step':>8}{'median':>8}{'95 % of median':>16}{'tokens/s':>10}"
        f"{'over sync':>10}{'of limit':>9}{'mean age':>9}{'worst':>6}{'dropped':>8}"
    )
    for name, values in modes.items():
        low, high = interval(values.seconds)
        print(
            f"{name:18}{statistics.fmean(values.seconds):8.2f}"
            f"{statistics.median(values.seconds):8.2f}{f'{low:.2f} - {high:.2f}':>16}"
            f"{values.tokens_per_s:10.0f}{values.tokens_per_s / sync:10.2f}"
            f"{values.tokens_per_s / cell['limit']:9.2f}{statistics.fmean(values.ages):9.2f}"
            f"{values.worst_age:6}{values.dropped / (values.dropped + values.consumed):8.1%}"
        )
    return {name: values.tokens_per_s / sync for name, values in modes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="only sigma 1, ratio .5")
    parser.add_argument("--out", default="", help="file for all figures as JSON")
    parser.add_argument("--both", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.both:
        return measure_both(json.loads(arguments.both[0]), arguments.both[1])

    wanted = [(s, r) for s in SIGMAS for r in RATIOS if not arguments.short or (s, r) == (1.0, 0.5)]
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(folder, max_model_len=512)
        # A thread passes its core on to what it starts: first the servers, then our own threads.
        os.sched_setaffinity(0, {SERVER_CORE})
        servers = serve(folder, ServerConfig(), log_dir=Path(folder) / "pinned")
        os.sched_setaffinity(0, {TRAINER_CORE})
        with servers, VLLMEngine(servers) as engine:
            trainer = Trainer(folder, threads=1)
            push_weights(trainer.engine, engine, version=0)
            cells = [measure_cell(engine, trainer, s, r, MODES) for s, r in wanted]
        os.sched_setaffinity(0, {SERVER_CORE, TRAINER_CORE})
        passes = [
            (s, r, float(c["forward_passes"])) for (s, r), c in zip(wanted, cells, strict=True)
        ]  # type: ignore[arg-type]
        both = sync_on_both_cores(passes, folder)

    ratios = [print_cell(cell, other) for cell, other in zip(cells, both, strict=True)]
    chosen = wanted.index((1.0, 0.5))
    modes = cells[chosen]["modes"]
    ready = Measured(**modes["ready 2"])  # type: ignore[index]
    if arguments.out:
        text = json.dumps({"cells": cells, "both": [asdict(other) for other in both]})
        Path(arguments.out).write_text(text)
    worst = min(v for cell in ratios for name, v in cell.items() if name != "sync, both cores")
    print(
        json.dumps(
            {
                "best_fifo_ratio": round(
                    max(ratios[chosen]["fifo 4"], ratios[chosen]["window 2"]), 3
                ),
                "ready_share_of_limit": round(
                    ready.tokens_per_s / float(cells[chosen]["limit"]),  # type: ignore[arg-type]
                    3,
                ),
                "worst_ratio": round(worst, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
