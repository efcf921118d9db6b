import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from arealite.errors import DataError
from arealite.observe.plots import plot_curve


def write_metrics(out_dir: Path, lines: list[dict]) -> None:
    (out_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def x_of(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


def y_of(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved during the test."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: (saved.append(self), save(self, *args, **kw))
    )
    return saved


def test_the_curve_shows_reward_length_staleness_and_gap(tmp_path: Path, figures: list[Figure]):
    write_metrics(
        tmp_path,
        [
            {
                "version": version,
                "rollout/reward": version / 10,
                "rollout/response_length": 20.0 + version,
                "rollout/staleness_mean": 0.5,
                "rollout/staleness_max": 2.0,
                "gate/logprob_gap_mean": 0.001,
            }
            for version in (1, 2, 3)
        ]
        + [{"version": 3, "eval/reward": 0.4}, {"version": 4, "rollout/reward": None}],
    )
    path = plot_curve(tmp_path)
    assert path == tmp_path / "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]

    reward, length, staleness, gap = figures[0].axes
    training, evaluation = reward.lines
    assert x_of(training) == [1, 2, 3]
    assert y_of(training) == [0.1, 0.2, 0.3]
    assert (x_of(evaluation), y_of(evaluation)) == ([3], [0.4])
    assert y_of(length.lines[1]) == [21.0, 22.0, 23.0]
    assert [axes.get_ylabel() for axes in (reward, length, staleness, gap)] == [
        "mean reward",
        "sampled tokens",
        "age in weight versions",
        "mean |difference| in nats",
    ]
    assert gap.get_yscale() == "log"


def test_a_run_of_one_step_without_evaluation_or_gate_can_be_drawn(
    tmp_path: Path, figures: list[Figure]
):
    write_metrics(tmp_path, [{"version": 1, "rollout/reward": 0.5}])
    plot_curve(tmp_path)
    legend = figures[0].axes[0].get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["training batch", "evaluation (not logged)"]


def test_a_run_without_rollouts_shows_its_loss(tmp_path: Path, figures: list[Figure]):
    lines = [
        {"version": 0, "eval/loss": 2.5},
        {"version": 1, "train/loss": 2.0, "train/grad_norm": 1.5},
        {"version": 2, "train/loss": 1.0, "train/grad_norm": 0.5},
    ]
    write_metrics(tmp_path, lines)
    plot_curve(tmp_path)
    loss, gradient = figures[0].axes
    train, evaluation = loss.get_lines()
    assert (x_of(train), y_of(train)) == ([1, 2], [2.0, 1.0])
    assert (x_of(evaluation), y_of(evaluation)) == ([0], [2.5])
    assert y_of(gradient.get_lines()[0]) == [1.5, 0.5]


def test_a_folder_without_steps_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"metrics.jsonl has no step to draw"):
        plot_curve(tmp_path)


def test_drawing_leaves_the_backend_of_a_notebook_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    write_metrics(tmp_path, [{"version": 1, "rollout/reward": 0.5}])
    plot_curve(tmp_path)
    assert "matplotlib.pyplot" not in sys.modules
