"""Does decoupling help when samples are old? Forced lag, naive PPO beside the decoupled objective.

    python benchmarks/forced_lag.py                     # everything: a minute or two for each run
    python benchmarks/forced_lag.py decoupled:0:0:2e-4  # objective, lag, seed and learning rate

Trainer and sampler are in one process, in turns. In training step v the sampler has exactly the
weights of version v - lag, and those of version 0 as long as there are none so old; every token's
version is compared with that. All else is `recipes/gsm8k_grpo.py`, with fewer prompts and several
minibatches a step, and both objectives are its loss. They differ in the policy that the clip is
centered on:

    decoupled   the weights at the start of the step; the weight proximal / behavior accounts for
                the age of the samples
    naive       the weights that sampled; there is nothing left for a weight

A run that is in the results already is not repeated; the table has those with the recipe's learning
rate. Evaluation is greedy, on all test rows, with the trainer's own weights; `reward` and `length`,
in tokens, are of the samples in the last ten steps, so of older weights. `clipped` and `dropped`
are shares of sampled tokens, `gradient` is a norm before clipping; see `distance` for the others.
Draws docs/images/forced_lag.png and ends with one line of JSON.
"""

import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal, Self

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from arealite.algo.advantages import group_advantages
from arealite.algo.losses import importance_weight
from arealite.api import InferenceEngine, TrainEngine
from arealite.data import GSM8K_MINI, TINY_MATH, load_rows, load_tokenizer
from arealite.data.order import RowOrder
from arealite.inference.hf import HFEngine
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.executor import run_episodes
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.training.fsdp import FSDPEngine
from arealite.training.packing import attach, pack
from arealite.types import MicroBatch, Row, StepStats, Trajectory
from arealite.weights import push_tensors
from recipes.gsm8k_grpo import Config, grpo_loss

Objective = Literal["naive", "decoupled"]
OBJECTIVES: dict[str, Objective] = {"naive": "naive", "decoupled": "decoupled"}
Figures = dict[str, Any]
"""Of a run: `accuracy` by version, and lists with a number for each training step."""
Groups = list[list[Trajectory]]
Snapshots = deque[tuple[int, dict[str, torch.Tensor]]]
"""The latest versions with their weights, the oldest first."""

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "forced_lag.json"
IMAGE = ROOT / "docs" / "images" / "forced_lag.png"
LAGS, SEEDS, LR = (0, 4, 16), (0, 1, 2), 5e-5
STEPS, EVAL_EVERY_STEPS, PROMPTS_PER_STEP, MINIBATCHES = 40, 5, 8, 4
GOAL = 0.9  # accuracy
REPORTED, LAST = (10, 20, 40), slice(-10, None)  # training steps
STYLES = {"naive": ("#d62728", "s"), "decoupled": ("#1f77b4", "o")}
"""Color and marker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training."""

    objective: Objective
    lag: int
    seed: int
    lr: float

    @classmethod
    def from_name(cls, name: str) -> Self:
        words = name.split(":")
        objective = OBJECTIVES.get(words[0])
        if objective is None or len(words) != 4:
            sys.exit(f"{name} is not OBJECTIVE:LAG:SEED:LR with one of {', '.join(OBJECTIVES)}.")
        return cls(objective=objective, lag=int(words[1]), seed=int(words[2]), lr=float(words[3]))

    @property
    def name(self) -> str:
        return f"{self.objective}:{self.lag}:{self.seed}:{self.lr:g}"


# --- The lag --------------------------------------------------------------------------------------


def push_lagged(
    trainer: TrainEngine, sampler: InferenceEngine, snapshots: Snapshots, *, version: int
) -> None:
    """Keep the trainer's weights as `version`, and give the sampler the oldest that are kept.

    `snapshots` has room for lag + 1 versions; what no longer fits is gone.
    """
    snapshots.append((version, dict(trainer.named_weights())))
    oldest, weights = snapshots[0]
    push_tensors(iter(weights.items()), sampler, version=oldest)


def check_versions(groups: Groups, expected: int) -> None:
    """Raise unless every sampled token is of this version."""
    versions = {
        version
        for trajectory in flat(groups)
        for version, is_sampled in zip(trajectory.versions, trajectory.loss_mask, strict=True)
        if is_sampled
    }
    if versions != {expected}:
        raise RuntimeError(f"Tokens are of versions {sorted(versions)}, not all of {expected}.")


# --- One run --------------------------------------------------------------------------------------


def centered(
    minibatch: list[MicroBatch], proximal: list[torch.Tensor], objective: Objective
) -> list[MicroBatch]:
    """The minibatch with the log-probs that the clip is centered on, as `proximal_logprobs`.

    With those of behavior the recipe's weight is 1 and its ratio current / behavior: plain PPO.
    """
    behavior = [mb.behavior_logprobs for mb in minibatch]
    return attach(minibatch, proximal_logprobs=proximal if objective == "decoupled" else behavior)


def distance(
    minibatches: list[list[MicroBatch]], proximal: list[list[torch.Tensor]], cap: float
) -> Figures:
    """How far the policy at the start of the step is from the one that sampled.

    `gap`: mean |proximal - behavior| in nats. `effective`: (sum of w)^2 / (N sum of w^2) over the N
    sampled tokens, w being the weight of the decoupled objective, 0 above the cap.
    """
    gaps, weights = [], []
    for mb, logprobs in zip(chain(*minibatches), chain(*proximal), strict=True):
        weight, _ = importance_weight(logprobs, mb.behavior_logprobs, mb.loss_mask, cap=cap)
        weights.append(weight[mb.loss_mask])
        gaps.append((logprobs - mb.behavior_logprobs)[mb.loss_mask].abs())
    weight = torch.cat(weights).double()
    return {
        "gap": torch.cat(gaps).mean().item(),
        "effective": (weight.sum() ** 2 / (weight.numel() * weight.square().sum())).item(),
    }


async def reward(text: str, row: Row) -> float:
    """The recipe's, without a process for it: all answers here are numbers."""
    return gsm8k_reward(text, row)


def mean_reward(groups: Groups) -> float:
    return statistics.fmean(trajectory.reward for trajectory in flat(groups))


def flat(groups: Groups) -> Iterator[Trajectory]:
    return (trajectory for group in groups for trajectory in group)


def train_step(trainer: FSDPEngine, groups: Groups, objective: Objective, cfg: Config) -> Figures:
    """One training step on these groups, and its figures."""
    minibatches = pack(
        groups,
        group_advantages(groups),
        num_minibatches=cfg.minibatches,
        max_tokens=cfg.train.micro_batch_tokens,
        aggregation="token",
    )
    # All of them before any update: proximal is the policy at the start of the step.
    proximal = [trainer.logprobs(minibatch) for minibatch in minibatches]
    figures = distance(minibatches, proximal, cfg.behavior_weight_cap)
    loss_fn = partial(grpo_loss, cfg=cfg)
    stats = [
        trainer.step(centered(minibatch, logprobs, objective), loss_fn)
        for minibatch, logprobs in zip(minibatches, proximal, strict=True)
    ]
    return figures | {
        "clipped": mean_metric(stats, "clipped"),
        "dropped": mean_metric(stats, "dropped"),
        "grad_norm": statistics.fmean(each.grad_norm for each in stats),
        "reward": mean_reward(groups),
        "length": statistics.fmean(sample.response_length for sample in flat(groups)),
    }


def mean_metric(stats: list[StepStats], name: str) -> float:
    """Over all tokens of the step."""
    total = sum(each.metrics[name] * each.num_tokens for each in stats)
    return total / sum(each.num_tokens for each in stats)


def train(run: Run, steps: int) -> Figures:
    """Figures of a run."""
    started = time.monotonic()
    base = Config()
    cfg = replace(base, minibatches=MINIBATCHES, train=replace(base.train, lr=run.lr))
    tokenizer = load_tokenizer(TINY_MATH)
    rows, test_rows = (load_rows(GSM8K_MINI, split=split) for split in ("train", "test"))
    order = RowOrder(len(rows), seed=run.seed)
    explore = SingleTurnWorkflow(tokenizer, reward, cfg.sampling, group_size=cfg.group_size)
    greedy = SingleTurnWorkflow(tokenizer, reward, cfg.sampling.greedy())
    snapshots: Snapshots = deque(maxlen=run.lag + 1)
    accuracy: dict[str, float] = {}
    history: list[Figures] = []
    with (
        FSDPEngine(TINY_MATH, cfg.train) as trainer,
        HFEngine(TINY_MATH, seed=run.seed, max_running=256) as sampler,
    ):
        for version in range(steps + 1):
            if version % EVAL_EVERY_STEPS == 0:
                push_tensors(trainer.named_weights(), sampler, version=version)
                accuracy[str(version)] = mean_reward(run_episodes(sampler, greedy, test_rows))
            if version == steps:
                break
            push_lagged(trainer, sampler, snapshots, version=version)
            places = range(version * PROMPTS_PER_STEP, (version + 1) * PROMPTS_PER_STEP)
            groups = run_episodes(sampler, explore, [rows[order[place]] for place in places])
            check_versions(groups, expected=max(0, version - run.lag))
            history.append(train_step(trainer, groups, run.objective, cfg))
    series = {name: [float(f"{each[name]:.4g}") for each in history] for name in history[0]}
    return {"accuracy": accuracy, "run_s": round(time.monotonic() - started, 1)} | series


# --- All runs -------------------------------------------------------------------------------------


def read_results() -> dict[str, Figures]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write_results(results: dict[str, Figures]) -> None:
    """One line for each run."""
    lines = [f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in results.items()]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def cell(results: dict[str, Figures], objective: Objective, lag: int) -> list[Figures]:
    """The runs of the table that differ in nothing but their seed, in its order."""
    runs = [Run(objective=objective, lag=lag, seed=seed, lr=LR) for seed in SEEDS]
    return [results[run.name] for run in runs if run.name in results]


def table(results: dict[str, Figures]) -> str:
    """The runs in Markdown."""
    lines = [
        f"| lag | objective | steps to {GOAL:g} |"
        + "".join(f" accuracy after {steps} |" for steps in REPORTED)
        + " reward | length | clipped | dropped | effective | gap, nats | gradient |",
        "|---|---|---|" + "---|" * (len(REPORTED) + 7),
    ]
    for lag, objective in product(LAGS, OBJECTIVES.values()):
        if runs := cell(results, objective, lag):
            accuracy = [spread([run["accuracy"][str(steps)] for run in runs]) for steps in REPORTED]
            goal = ", ".join(steps_to_goal(run) for run in runs)
            columns = [str(lag), objective, goal, *accuracy, *diagnostics(runs)]
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def steps_to_goal(figures: Figures) -> str:
    """At the first evaluation that reached it."""
    return next((step for step, value in figures["accuracy"].items() if value >= GOAL), "never")


def spread(values: list[float]) -> str:
    """Mean, least and largest."""
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def diagnostics(runs: list[Figures]) -> list[str]:
    """Means over seeds and steps; of what was sampled, over the last ten steps."""

    def mean(name: str, steps: slice = slice(None)) -> float:
        return statistics.fmean(value for run in runs for value in run[name][steps])

    return [
        f"{mean('reward', LAST):.3f}",
        f"{mean('length', LAST):.1f}",
        f"{mean('clipped'):.2%}",
        f"{mean('dropped'):.2%}",
        f"{mean('effective'):.3f}",
        f"{mean('gap'):.3f}",
        f"{mean('grad_norm'):.2f}",
    ]


def draw(results: dict[str, Figures]) -> None:
    """Accuracy over steps, a panel for each lag."""
    figure = Figure(figsize=(10.5, 3.4), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(LAGS), sharex=True, sharey=True)
    for axes, lag in zip(panels, LAGS, strict=True):
        for objective in OBJECTIVES.values():
            draw_runs(axes, cell(results, objective, lag), objective)
        age = f"samples {lag} versions old"
        axes.set_title(age, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("training steps done")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("greedy accuracy, share of 200 rows")
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, format="png")


def draw_runs(axes: Axes, runs: list[Figures], objective: Objective) -> None:
    """A thin line for each seed and a thick one for their mean."""
    if not runs:
        return
    color, marker = STYLES[objective]
    steps = [int(version) for version in runs[0]["accuracy"]]
    curves = [list(run["accuracy"].values()) for run in runs]
    for curve in curves:
        axes.plot(steps, curve, color=color, linewidth=0.8, alpha=0.6)
    means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    axes.plot(steps, means, color=color, linewidth=2, marker=marker, markersize=4, label=objective)


def summary(results: dict[str, Figures]) -> dict[str, float]:
    """Mean accuracy after the last step."""
    return {
        f"{objective}:{lag}": round(
            statistics.fmean(run["accuracy"][str(STEPS)] for run in runs), 4
        )
        for lag, objective in product(LAGS, OBJECTIVES.values())
        if (runs := cell(results, objective, lag))
    }


def main(names: list[str]) -> None:
    every = [
        Run(objective=objective, lag=lag, seed=seed, lr=LR)
        for seed, lag, objective in product(SEEDS, LAGS, OBJECTIVES.values())
    ]
    for run in map(Run.from_name, names) if names else every:
        if run.name not in read_results():
            print(run.name, file=sys.stderr, flush=True)
            figures = train(run, STEPS)
            write_results(read_results() | {run.name: figures})
    results = read_results()
    draw(results)
    print(table(results))
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
