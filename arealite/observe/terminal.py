"""What a run prints: one aligned row per training step, evaluations, warnings.

     step reward length    stale      gap     loss   grad   tok/s  s/step   left
    12/80  0.547   21.4  0.81/2  0.00062  -0.0031   0.42    2210    1.52   1m43s

Colors and styles only where stdout is a terminal; a file, a pipe or a notebook gets plain lines.
"""

import io
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console

Values = dict[str, float]

ROWS_PER_HEADER = 20

LEGEND = (
    "stale: age of the tokens in weight versions, mean/max.  "
    "gap: |server - trainer| log-prob of tokens of age 0, - if there are none"
)


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    width: int
    text: Callable[[Values], str]


def _number(title: str, width: int, name: str, digits: int) -> _Column:
    def text(values: Values) -> str:
        value = values.get(name, math.nan)
        if math.isnan(value):
            return "-"
        for num_digits in range(digits, -1, -1):
            if len(fixed := f"{value:.{num_digits}f}") < width:
                return fixed
        return f"{value:.0e}"

    return _Column(title, width, text)


def _staleness(values: Values) -> str:
    mean = values.get("rollout/staleness_mean", math.nan)
    worst = values.get("rollout/staleness_max", math.nan)
    if math.isnan(mean) or math.isnan(worst):
        return "-"
    return f"{mean:.{2 if mean < 10 else 1}f}/{worst:.0f}"


_SUPERVISED = (
    _number("loss", 9, "train/loss", 4),
    _number("grad", 8, "train/grad_norm", 2),
    _number("tok/s", 8, "time/tokens_per_s", 0),
    _number("s/step", 7, "time/step_s", 2),
)
_REINFORCED = (
    _number("reward", 7, "rollout/reward", 3),
    _number("length", 7, "rollout/response_length", 1),
    _Column("stale", 8, _staleness),
    _number("gap", 9, "gate/logprob_gap_mean", 5),
    *_SUPERVISED,
)


def format_header(values: Values) -> str:
    """The titles of the table of which this is a row, aligned with `format_row`."""
    titles = "".join(f"{column.title:>{column.width}}" for column in _columns(values))
    return f"{'step':>9}{titles}{'left':>7}"


def format_row(step: str, values: Values, seconds_left: float | None) -> str:
    """One training step as one row; what was not measured is a dash."""
    cells = "".join(f"{column.text(values):>{column.width}}" for column in _columns(values))
    left = "-" if seconds_left is None else format_duration(seconds_left)
    skipped = "" if values.get("train/skipped", 0) == 0 else "  SKIPPED: gradient not finite"
    return f"{step:>9}{cells}{left:>7}{skipped}"


def _columns(values: Values) -> tuple[_Column, ...]:
    return _REINFORCED if "rollout/reward" in values else _SUPERVISED


def format_evaluation(step: str, values: Values) -> str:
    """The `eval/...` values in one line that stands out also without colors."""
    parts = [f"{name.removeprefix('eval/')} {value:.4g}" for name, value in values.items()]
    return f"{step:>9}  >> evaluation: {', '.join(parts)}"


def format_duration(seconds: float) -> str:
    """`7.5s`, `1m43s`, `2h05m`, `3d04h`: two units, at most six characters below 100 days."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest_s:02d}s"
    hours, rest_min = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{rest_min:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"


class StepTable:
    """Prints the rows and remembers when the header is due again."""

    def __init__(self, num_steps: int | None = None) -> None:
        self._num_steps = num_steps
        self._num_rows = 0

    def show_step(self, version: int, values: Values, seconds_left: float | None) -> None:
        """Print the row of one training step, and the header before every twentieth."""
        if self._num_rows == 0 and _columns(values) is _REINFORCED:
            show(LEGEND, style="dim")
        if self._num_rows % ROWS_PER_HEADER == 0:
            show(format_header(values), style="bold")
        self._num_rows += 1
        is_skipped = values.get("train/skipped", 0) > 0
        row = format_row(self._step(version), values, seconds_left)
        show(row, style="bold red" if is_skipped else "")

    def show_evaluation(self, version: int, values: Values) -> None:
        """Print the `eval/...` values of one version."""
        show(format_evaluation(self._step(version), values), style="bold green")

    def _step(self, version: int) -> str:
        return str(version) if self._num_steps is None else f"{version}/{self._num_steps}"


def show(text: str, *, style: str = "") -> None:
    """Print one line to stdout; a closed terminal or pipe is not worth a training run."""
    # Rendered first and written by hand: rich ends the process when a pipe is broken.
    rendered = io.StringIO()
    console = Console(file=rendered, force_terminal=sys.stdout.isatty(), force_jupyter=False)
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False, emoji=False)
    with suppress(OSError, ValueError):
        sys.stdout.write(rendered.getvalue())
        sys.stdout.flush()


def warn(text: str) -> None:
    """Print one warning to stderr, which unlike `warnings.warn` can never become an error."""
    with suppress(OSError, ValueError):
        print(f"arealite warning: {text}", file=sys.stderr, flush=True)
