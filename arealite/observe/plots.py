"""Pictures of a run, from its metrics.jsonl alone."""

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from arealite.errors import DataError
from arealite.observe.metrics import read_metrics
from arealite.observe.summary import Steps

LOGPROB_GAP_LIMIT = 0.005
"""Mean log-prob gap in nats below which server and trainer count as the same policy."""

_MEAN: dict[str, Any] = {"color": "#1f77b4", "linewidth": 1.6}
_POINTS = _MEAN | {"marker": "o", "markersize": 3.5}
_MAX: dict[str, Any] = {"color": "#9ab8d6", "linewidth": 1.0}
_EVAL: dict[str, Any] = {
    "color": "#d62728",
    "marker": "o",
    "markersize": 5,
    "linewidth": 1.2,
    "zorder": 3,
}
_LIMIT: dict[str, Any] = {"color": "#7f7f7f", "linewidth": 1.0, "linestyle": "--"}


def plot_curve(out_dir: str | Path) -> Path:
    """Draw reward, response length, staleness and log-prob gap over steps; returns curve.png.

    Of a run without rollouts, loss and gradient norm.

    Raises:
        DataError: there is no metrics.jsonl with at least one step in `out_dir`.
    """
    out_dir = Path(out_dir)
    steps = read_metrics(out_dir)
    if not steps:
        raise DataError(
            f"{out_dir}/metrics.jsonl has no step to draw. Give the out_dir of a run that has "
            "finished at least one training step."
        )
    has_rollouts = any("rollout/reward" in values for values in steps.values())
    panels = (
        (_draw_reward, _draw_length, _draw_staleness, _draw_gap)
        if has_rollouts
        else (_draw_loss, _draw_grad_norm)
    )
    num_rows = len(panels) // 2
    # Figure itself, not pyplot: the backend that a notebook has chosen stays as it is.
    figure = Figure(figsize=(10, 0.4 + 3 * num_rows), dpi=130, layout="constrained")
    figure.suptitle(out_dir.resolve().name, fontsize=12)
    grid = figure.subplots(num_rows, 2, sharex=True, squeeze=False)
    for draw, axes in zip(panels, grid.flat, strict=True):
        draw(axes, steps)
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    path = out_dir / "curve.png"
    partial = out_dir / ".curve.png.partial"
    figure.savefig(partial, format="png")
    os.replace(partial, path)
    return path


def _draw_reward(axes: Axes, steps: Steps) -> None:
    _line(axes, steps, "rollout/reward", "training batch", _MEAN)
    _line(axes, steps, "eval/reward", "evaluation", _EVAL)
    _finish(axes, "Reward", "mean reward")


def _draw_loss(axes: Axes, steps: Steps) -> None:
    _line(axes, steps, "train/loss", "training batch", _MEAN)
    _line(axes, steps, "eval/loss", "evaluation", _EVAL)
    _finish(axes, "Loss", "mean loss")


def _draw_grad_norm(axes: Axes, steps: Steps) -> None:
    _line(axes, steps, "train/grad_norm", "before clipping", _MEAN)
    axes.set_ylim(bottom=0)
    _finish(axes, "Gradient", "norm over all weights")


def _draw_length(axes: Axes, steps: Steps) -> None:
    _line(axes, steps, "rollout/response_length_max", "longest", _MAX)
    _line(axes, steps, "rollout/response_length", "mean", _MEAN)
    axes.set_ylim(bottom=0)
    _finish(axes, "Response length", "sampled tokens")


def _draw_staleness(axes: Axes, steps: Steps) -> None:
    _line(axes, steps, "rollout/staleness_max", "oldest token", _MAX)
    _line(axes, steps, "rollout/staleness_mean", "mean", _MEAN)
    axes.set_ylim(bottom=0, top=max(1.05, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _finish(axes, "Staleness", "age in weight versions")


def _draw_gap(axes: Axes, steps: Steps) -> None:
    axes.axhline(LOGPROB_GAP_LIMIT, label=f"limit {LOGPROB_GAP_LIMIT}", **_LIMIT)
    _line(axes, steps, "gate/logprob_gap_mean", "mean over fresh tokens", _POINTS)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 1e-4), max(high, 1e-2))  # whole decades: only those get a label
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(axes, "Log-prob of server against trainer", "mean |difference| in nats")


def _line(axes: Axes, steps: Steps, name: str, label: str, style: dict[str, Any]) -> None:
    """The values of one metric, at the steps that have it; its name in grey if none has."""
    points = [(version, values[name]) for version, values in steps.items() if name in values]
    if not points:
        label, style = f"{label} (not logged)", {"color": "#bbbbbb"}
    elif len(points) == 1:  # a line needs two
        style = {"marker": "o", **style}
    axes.plot(
        [version for version, _ in points], [value for _, value in points], label=label, **style
    )


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
