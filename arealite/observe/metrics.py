"""Metrics of a run: computed on every rank, written and printed by rank 0.

    with MetricLogger(cfg.out_dir, cfg) as metrics:                    # rank 0 writes
        ...
        metrics.log(version + 1, rollout_metrics(groups, version), train_metrics(stats))

A version is the number of completed training steps; the values of step `version` describe the
batch that made it. Names, in the order in which a step meets them:

| name | definition |
|---|---|
| rollout/reward | mean reward of the batch's trajectories |
| rollout/raw_reward | the same before any shaping, such as a discount for a second try |
| rollout/NAME | mean of Trajectory.metrics NAME, such as turns or tool_calls of an episode |
| rollout/response_length | mean number of sampled tokens per trajectory |
| rollout/response_length_max | largest number of sampled tokens of a trajectory |
| rollout/truncated_share | share of trajectories that ran out of their token budget (`length`) |
| rollout/context_share | share of trajectories that reached the end of the model's context |
| rollout/staleness_mean | mean over sampled tokens of: versions between sampling and training |
| rollout/staleness_max | the same, largest |
| rollout/staleness_share_K | share of sampled tokens that are K versions old; K is one of `AGES` |
| rollout/oldest_token_share_K | share of trajectories whose oldest sampled token is so old |
| rollout/tokens | sampled tokens in the batch |
| groups/constant_share | share of groups in which every reward is equal: they teach nothing |
| groups/sampled | groups sampled since the step before; only with dynamic sampling |
| groups/sampled_constant_share | groups/constant_share of them, before any is left out |
| groups/extra_samples | trajectories of groups that were left out for their equal rewards |
| groups/rejected | rows that their workflow refused since the step before; see lost.jsonl |
| groups/failed | rows whose episode raised or took too long, likewise |
| groups/too_old | rows given up as too old to train on, likewise; only with `rollout.order=ready` |
| lost/response_length | mean over those that had finished, beside `rollout/response_length` |
| lost/reward | the same, beside `rollout/reward` |
| gate/logprob_gap_mean | mean abs(server - trainer log-prob) of tokens of the current weights |
| gate/logprob_gap_p99 | the same, exceeded by one token in a hundred |
| gate/logprob_gap_max | the same, largest |
| gate/logprob_k3 | mean r - 1 - log r of them, r = trainer / server probability: a divergence |
| gate/effective_sample_size | (sum r)^2 / (n sum r^2) over all n sampled tokens of the batch |
| gate/time_s | seconds that the checks have taken since the process began |
| train/loss | mean over the step's optimizer steps, without skipped ones |
| train/grad_norm | the same, of the gradient norm before clipping |
| train/lr | learning rate of the last optimizer step |
| train/skipped | optimizer steps left out because their gradient was not finite |
| train/NAME | LossOutput.metrics NAME: mean over trainable tokens, without skipped steps |
| server/prefix_hit_rate | share of prompt tokens that servers found in their caches |
| server/retries | requests of rank 0 that were asked again since the step before |
| server/lost | times that rank 0 gave a server up since then: it died, or hung |
| time/step_s | seconds since the previous call of `log`, so without evaluation and start-up |
| train/tokens | trainable tokens in the batch, where there are no rollouts |
| time/tokens_per_s | rollout/tokens or train/tokens per time/step_s |
| eval/reward | mean reward of greedy samples on test rows, from the recipe's `evaluate` |
| eval/response_length | mean number of sampled tokens in them |
| eval/loss | loss on test rows, in supervised training and on preferences |
| time_s | seconds since the run began, waiting included, but not the start of a resumed one |

`rollout/...`, `groups/...` and `lost/...` are over all ranks. A value that does not exist, as a
mean of nothing, is nan; in metrics.jsonl it is null.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from time import monotonic

from arealite import dist
from arealite.errors import ConfigError
from arealite.observe.json_lines import JsonLines, read_json_lines
from arealite.observe.settings import save_settings
from arealite.observe.sinks import Sinks
from arealite.observe.summary import (
    Steps,
    final_figures,
    format_summary,
    median_step_s,
    summarize,
)
from arealite.observe.terminal import StepTable, show, warn
from arealite.types import LostRow, StepStats, Trajectory

AGES = ("0", "1", "2", "3", "4_or_more")
"""Of tokens, in weight versions. Each has a metric in every step, so that they stack in a plot."""


def rollout_metrics(
    groups: list[list[Trajectory]], version: int, lost: Sequence[LostRow] = ()
) -> dict[str, float]:
    """Means over the trajectories of all ranks; collective, so call it on every rank.

    Args:
        groups: this rank's share of the batch; may be empty.
        version: of the policy that is about to train on them, for the staleness.
        lost: this rank's rows that were given up since the step before.
    """
    samples = [sample for group in groups for sample in group]
    ages = [_token_ages(sample, version) for sample in samples]
    oldest = Counter(max(sample_ages) for sample_ages in ages if sample_ages)
    total = _sum_over_ranks(
        _batch_sums(groups)
        | {"age": sum(age * count for counts in ages for age, count in counts.items())}
        | _histogram("staleness_share", sum(ages, Counter()))
        | _histogram("oldest_token_share", oldest)
        | _lost_sums(lost)
    )
    longest = max((sample.response_length for sample in samples), default=0)
    extremes = dist.gather((longest, max(oldest, default=0)))
    num_samples, num_tokens = total["samples"], total["tokens"]
    return {
        **_means_of_episodes(samples),
        "rollout/reward": _ratio(total["reward"], num_samples),
        "rollout/raw_reward": _ratio(total["raw_reward"], num_samples),
        "rollout/response_length": _ratio(num_tokens, num_samples),
        "rollout/response_length_max": float(max(length for length, _ in extremes)),
        "rollout/truncated_share": _ratio(total["truncated"], num_samples),
        "rollout/context_share": _ratio(total["out_of_context"], num_samples),
        "rollout/staleness_mean": _ratio(total["age"], num_tokens),
        "rollout/staleness_max": float(max(age for _, age in extremes)),
        **_shares("staleness_share", total),
        **_shares("oldest_token_share", total),
        "rollout/tokens": num_tokens,
        "groups/constant_share": _ratio(total["constant"], total["groups"]),
        "groups/rejected": total["rejected"],
        "groups/failed": total["failed"],
        "groups/too_old": total["too_old"],
        "lost/response_length": _ratio(total["lost_length"], total["lost_groups"]),
        "lost/reward": _ratio(total["lost_reward"], total["lost_groups"]),
    }


def train_metrics(stats: list[StepStats]) -> dict[str, float]:
    """One value per name over the optimizer steps of a training step; nothing for no steps.

    Needs no communication: `StepStats` already is the same on every rank.
    """
    if not stats:
        return {}
    taken = [step for step in stats if not step.skipped]
    names = sorted({name for step in stats for name in step.metrics})
    return {
        "train/loss": _ratio(sum(step.loss for step in taken), len(taken)),
        "train/grad_norm": _ratio(sum(step.grad_norm for step in taken), len(taken)),
        "train/lr": stats[-1].lr,
        "train/skipped": float(len(stats) - len(taken)),
        **{f"train/{name}": _token_mean(taken, name) for name in names},
    }


def read_metrics(out_dir: str | Path) -> dict[int, dict[str, float]]:
    """Per version in ascending order, the values of all its lines; later lines win.

    Only `time_s` is the one of a version's first line: when its training step was done.
    For pandas: `DataFrame.from_dict(read_metrics(out_dir), orient="index")`.
    """
    path = Path(out_dir) / "metrics.jsonl"
    steps: Steps = {}
    for line in read_json_lines(path) if path.is_file() else ():
        values = {name: float(value) for name, value in line.items() if _is_number(value)}
        _merge(steps, int(values.pop("version")), values)
    return dict(sorted(steps.items()))


class MetricLogger:
    """Writes metrics.jsonl, prints the table and feeds the sinks. Only rank 0 does anything.

    The constructor is collective: it makes `out_dir`, saves the resolved configuration there as
    config.yaml, shows what changed if one was there, and refuses a changed model, data set or
    seed if there also is a checkpoint. Take the `RunLock` of the folder first.

    Args:
        out_dir: folder of the run.
        cfg: the recipe's configuration. Its fields `steps` (for the time left) and `sinks` are
            used if there are such.
        sinks: "wandb", "tensorboard", both or none; by default those of `cfg.sinks`.

    Raises:
        ConfigError: the folder cannot be written, a sink is not installed, or what is said above.
    """

    def __init__(
        self, out_dir: str | Path, cfg: object, *, sinks: Sequence[str] | None = None
    ) -> None:
        self.out_dir = Path(out_dir)
        self._cfg = cfg
        self._num_steps: int | None = getattr(cfg, "steps", None)
        self._lines = JsonLines(self.out_dir / "metrics.jsonl")
        self._table = StepTable(self._num_steps)
        self._steps: Steps = {}
        self._is_writer = dist.rank() == 0
        self._is_resumed = False
        self._began_s = monotonic()
        self._past_s = 0.0
        self._last_log_s: float | None = None
        names = getattr(cfg, "sinks", ()) if sinks is None else sinks
        self._sinks = Sinks(names, self.out_dir, cfg)
        # Every rank raises: one that went on would wait for the others until its timeout.
        problem = dist.broadcast(self._prepare() if self._is_writer else None)
        if problem is not None:
            raise ConfigError(problem)

    def resume(self, version: int) -> None:
        """Continue after `version` training steps: remove the lines of later ones.

        They are from a run that was killed after its last checkpoint; those steps are done again.
        Without this call the first `log(version, ...)` does it as `resume(version - 1)`.
        """
        if not self._is_writer:
            return
        if version:
            show(f"{self.out_dir} continues after step {version}.")
        num_removed = self._lines.drop_from(version + 1)
        if num_removed:
            show(f"{self._lines.path}: removed {num_removed} lines of steps after step {version}.")
        self._steps = read_metrics(self.out_dir)
        self._past_s = max((values["time_s"] for values in self._steps.values()), default=0.0)
        self._sinks.open(first_version=version + 1)
        self._is_resumed = True

    def log(self, version: int, *metrics: dict[str, float]) -> None:
        """Record the values of one version; may be called several times for the same one."""
        if not self._is_writer:
            return
        if not self._is_resumed:
            self.resume(version - 1)
        values = {name: float(value) for part in metrics for name, value in part.items()}
        is_training = any(name.startswith(("rollout/", "train/")) for name in values)
        now_s = monotonic()
        if is_training and version not in self._steps and self._last_log_s is not None:
            values |= _speed(now_s - self._last_log_s, values)
        if self._last_log_s is None and self._past_s:
            self._began_s = now_s - self._past_s  # starting the servers again is not counted
        self._last_log_s = now_s

        line = {"time_s": now_s - self._began_s, **values}
        self._lines.append([{"version": version, **line}])
        _merge(self._steps, version, line)
        self._sinks.log(version, values)
        if is_training:
            self._table.show_step(version, self._steps[version], self._seconds_left(version))
        evaluation = {name: value for name, value in values.items() if name.startswith("eval/")}
        if evaluation:
            gap = values.get("gate/logprob_gap_mean")
            evaluation |= {} if gap is None else {"gap": gap}
            self._table.show_evaluation(version, evaluation)

    def summary(self) -> dict[str, float]:
        """The run in a dozen numbers, resumed parts included; empty on ranks other than 0."""
        return summarize(self._steps)

    def report(self, checkpoint: str | Path) -> None:
        """End a run that is complete: the summary, and last one line of JSON with its figures.

        Args:
            checkpoint: folder of the trained model, named in the last line.
        """
        figures = final_figures(self.summary())
        self.close()
        if self._is_writer:
            show(json.dumps(figures | {"checkpoint": str(checkpoint)}))

    def close(self) -> None:
        """Print the summary, draw curve.png and close the sinks; once."""
        if len(self._steps) > 1:
            self._draw_curve()
        if self._steps:
            for line in format_summary(self.summary(), self.out_dir):
                show(line)
        self._sinks.close()
        self._steps = {}

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        last_step = max(self._steps, default=0)
        self.close()
        if kind is not None and last_step:
            has_checkpoint = (self.out_dir / "checkpoints" / "latest").exists()
            show(
                f"Stopped after step {last_step}. The same command continues from the last "
                f"checkpoint in {self.out_dir}."
                if has_checkpoint
                else f"Stopped after step {last_step}, before the first checkpoint in "
                f"{self.out_dir}. The same command begins anew."
            )

    def _prepare(self) -> str | None:
        """Make the folder and config.yaml; returns what is wrong."""
        try:
            self._sinks.check()
            self.out_dir.mkdir(parents=True, exist_ok=True)
            save_settings(self._cfg, self.out_dir)
        except ConfigError as error:
            return str(error)
        except OSError as error:
            return (
                f"out_dir={self.out_dir} cannot be written ({error.strerror}). "
                "Set out_dir to a folder that you may write to, on a disk with free space."
            )
        return None

    def _seconds_left(self, version: int) -> float | None:
        step_s = median_step_s(self._steps)
        if self._num_steps is None or step_s is None:
            return None
        return step_s * (self._num_steps - version)

    def _draw_curve(self) -> None:
        # Here and not at the top: matplotlib takes half a second to import.
        from arealite.observe.plots import plot_curve

        try:
            plot_curve(self.out_dir)
        except Exception as error:  # a picture is no reason to fail a run that is done
            warn(f"curve.png could not be drawn ({type(error).__name__}: {error}).")


def _token_ages(sample: Trajectory, version: int) -> Counter[int]:
    """How many sampled tokens are so many versions old."""
    sampled_by = zip(sample.versions, sample.loss_mask, strict=True)
    return Counter(version - sampler for sampler, is_sampled in sampled_by if is_sampled)


def _batch_sums(groups: list[list[Trajectory]]) -> dict[str, float]:
    samples = [sample for group in groups for sample in group]
    return {
        "groups": len(groups),
        "samples": len(samples),
        "tokens": sum(sample.response_length for sample in samples),
        "reward": sum(sample.reward for sample in samples),
        "raw_reward": sum(
            sample.reward if sample.raw_reward is None else sample.raw_reward for sample in samples
        ),
        "truncated": sum(sample.finish_reason == "length" for sample in samples),
        "out_of_context": sum(sample.finish_reason == "context" for sample in samples),
        "constant": sum(len({sample.reward for sample in group}) == 1 for group in groups),
    }


def _means_of_episodes(samples: list[Trajectory]) -> dict[str, float]:
    """Mean of each name in the trajectories' own metrics, over those of all ranks that have it."""
    pairs = [pair for sample in samples for pair in sample.metrics.items()]
    values: dict[str, list[float]] = {}
    for name, value in chain.from_iterable(dist.gather(pairs)):
        values.setdefault(name, []).append(value)
    return {f"rollout/{name}": fmean(values[name]) for name in sorted(values)}


def _lost_sums(lost: Sequence[LostRow]) -> dict[str, float]:
    rejected = sum(row.reason == "rejected" for row in lost)
    too_old = sum(row.reason == "too old" for row in lost)
    rewards = [row.reward for row in lost if row.reward is not None]
    lengths = [row.response_length for row in lost if row.response_length is not None]
    return {
        "rejected": rejected,
        "failed": len(lost) - rejected - too_old,
        "too_old": too_old,
        "lost_groups": len(rewards),
        "lost_reward": sum(rewards),
        "lost_length": sum(lengths),
    }


def _histogram(name: str, counts: Counter[int]) -> dict[str, float]:
    """How many there are of each of `AGES`; the last one takes all that are older."""
    counted = [counts[age] for age in range(len(AGES) - 1)]
    numbers = [*counted, counts.total() - sum(counted)]
    return {f"{name}_{age}": float(number) for age, number in zip(AGES, numbers, strict=True)}


def _shares(name: str, total: dict[str, float]) -> dict[str, float]:
    """The histogram of this name, divided by its sum."""
    counts = {key: total[key] for key in (f"{name}_{age}" for age in AGES)}
    return {f"rollout/{key}": _ratio(count, sum(counts.values())) for key, count in counts.items()}


def _sum_over_ranks(sums: dict[str, float]) -> dict[str, float]:
    return dict(zip(sums, dist.sum(list(sums.values())), strict=True))


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _token_mean(steps: list[StepStats], name: str) -> float:
    """Mean of one metric over the tokens of all optimizer steps that have it."""
    counted = [step for step in steps if name in step.metrics]
    total = sum(step.metrics[name] * step.num_tokens for step in counted)
    return _ratio(total, sum(step.num_tokens for step in counted))


def _speed(step_s: float, values: dict[str, float]) -> dict[str, float]:
    """Duration of a step and sampled tokens per second; empty if the clock did not move."""
    if step_s <= 0:
        return {}
    tokens = values.get("rollout/tokens", values.get("train/tokens", math.nan))
    tokens_per_s = tokens / step_s
    return {"time/step_s": step_s, "time/tokens_per_s": tokens_per_s}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _merge(steps: Steps, version: int, values: dict[str, float]) -> None:
    known = steps.setdefault(version, {})
    time_s = known.get("time_s", values.get("time_s", 0.0))
    known.update(values)
    known["time_s"] = time_s
