"""A whole run in a dozen numbers."""

import math
import statistics
from pathlib import Path

from arealite.observe.terminal import format_duration

Steps = dict[int, dict[str, float]]
"""Values per version in ascending order, as `read_metrics` returns them."""


def column(steps: Steps, name: str) -> list[float]:
    """The values of one metric over all versions that have it."""
    values = [step.get(name, math.nan) for step in steps.values()]
    return [value for value in values if not math.isnan(value)]


def summarize(steps: Steps) -> dict[str, float]:
    """What a run did and how long it took; empty for no steps.

    `time_to_first_step_s` and `total_s` count from the start of the run to the end of its first
    and last training step, over all resumed parts; `train_s` leaves out what came before the
    first step began; `step_s` is the median, so that a pause does not count. What was never
    measured is absent.
    """
    times_s = [step["time_s"] for step in steps.values() if "train/loss" in step]
    gaps = column(steps, "gate/logprob_gap_mean")
    summary: dict[str, float] = {}
    if times_s:
        summary |= {"steps": float(len(times_s)), "time_to_first_step_s": times_s[0]}
        began_s = next(step["time_s"] for step in steps.values())
        summary |= {"total_s": times_s[-1], "train_s": times_s[-1] - began_s}
    if step_s := median_step_s(steps):
        summary["step_s"] = step_s
    for label, name in (
        ("eval_reward", "eval/reward"),
        ("eval_response_length", "eval/response_length"),
        ("reward", "rollout/reward"),
        ("response_length", "rollout/response_length"),
        ("eval_loss", "eval/loss"),
    ):
        if values := column(steps, name):
            summary |= {f"{label}_first": values[0], f"{label}_last": values[-1]}
    if sampled := column(steps, "groups/sampled_constant_share"):
        summary["unequal_share_sampled"] = 1 - statistics.fmean(sampled)
        summary["unequal_share"] = 1 - statistics.fmean(column(steps, "groups/constant_share"))
    if worst := column(steps, "rollout/staleness_max"):
        summary["staleness_max"] = max(worst)
    if gaps:
        summary["logprob_gap_mean"] = statistics.fmean(gaps)
    if "total_s" in summary and (spent_s := column(steps, "gate/time_s")):
        summary["gate_share"] = max(spent_s) / summary["total_s"]
    if skipped := column(steps, "train/skipped"):
        summary["skipped"] = sum(skipped)
    return summary


def final_figures(summary: dict[str, float]) -> dict[str, float | None]:
    """What a finished run is judged by, under the names its last line uses; None if unknown."""
    reinforced = {
        "accuracy_before": "eval_reward_first",
        "accuracy_after": "eval_reward_last",
        "length_before": "eval_response_length_first",
        "length_after": "eval_response_length_last",
    }
    supervised = {"loss_before": "eval_loss_first", "loss_after": "eval_loss_last"}
    sources = supervised if "eval_loss_first" in summary else reinforced
    sources |= {name: name for name in ("time_to_first_step_s", "train_s")}
    known = {name: summary.get(source) for name, source in sources.items()}
    return {name: None if value is None else round(value, 4) for name, value in known.items()}


def median_step_s(steps: Steps) -> float | None:
    """The usual duration of a training step; None before two of them are done."""
    durations_s = column(steps, "time/step_s")
    return statistics.median(durations_s) if durations_s else None


def format_summary(summary: dict[str, float], out_dir: Path) -> list[str]:
    """The summary as aligned lines for the terminal, then where the files are."""
    rows = {
        "steps": _text(summary, "steps", "{:.0f}"),
        "time to first step": _duration(summary, "time_to_first_step_s"),
        "training time": _duration(summary, "train_s"),
        "total time": _duration(summary, "total_s"),
        "time per step (median)": _duration(summary, "step_s"),
        "reward in evaluation": _change(summary, "eval_reward", 3),
        "response length": _change(summary, "eval_response_length", 1),
        "reward in training": _change(summary, "reward", 3),
        "response length in training": _change(summary, "response_length", 1),
        "loss in evaluation": _change(summary, "eval_loss", 3),
        "groups with unequal rewards": _unequal(summary),
        "worst staleness in versions": _text(summary, "staleness_max", "{:.0f}"),
        "|server - trainer| log-prob": _text(summary, "logprob_gap_mean", "{:.5f}"),
        "time in checks of it": _text(summary, "gate_share", "{:.1%} of the total"),
        "skipped optimizer steps": _text(summary, "skipped", "{:.0f}"),
        "files": ", ".join(sorted(path.name for path in out_dir.glob("[!.]*"))),
        "in": str(out_dir.resolve()),
    }
    return ["", *(f"{label:>28}  {text}" for label, text in rows.items() if text)]


def _unequal(summary: dict[str, float]) -> str:
    if "unequal_share_sampled" not in summary:
        return ""
    return (
        f"{summary['unequal_share_sampled']:.1%} sampled, {summary['unequal_share']:.1%} trained on"
    )


def _text(summary: dict[str, float], name: str, pattern: str) -> str:
    return pattern.format(summary[name]) if name in summary else ""


def _duration(summary: dict[str, float], name: str) -> str:
    return format_duration(summary[name]) if name in summary else ""


def _change(summary: dict[str, float], label: str, digits: int) -> str:
    if f"{label}_first" not in summary:
        return ""
    return f"{summary[f'{label}_first']:.{digits}f} -> {summary[f'{label}_last']:.{digits}f}"
