import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arealite import dist
from arealite.errors import ConfigError
from arealite.observe import metrics as metrics_module
from arealite.observe import sinks
from arealite.observe.metrics import (
    AGES,
    MetricLogger,
    read_metrics,
    rollout_metrics,
    train_metrics,
)
from arealite.training.fsdp import FSDPConfig
from arealite.types import FinishReason, LostRow, StepStats, Trajectory
from tests.observe.ranks import run_on_two_ranks


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the logger looks at, and a bit more."""

    model: str = "tiny"
    dataset: str = "mini"
    seed: int = 1
    steps: int = 80
    lr: float = 1e-4
    sinks: tuple[str, ...] = ()


class Clock:
    """Stands for time.monotonic; only the test moves it."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module, "monotonic", clock)
    return clock


def trajectory(
    reward: float, versions: list[int], finish_reason: FinishReason = "stop"
) -> Trajectory:
    """A one-token prompt, then one token sampled by each of the versions."""
    length = len(versions)
    return Trajectory(
        token_ids=[1] * (length + 1),
        loss_mask=[False] + [True] * length,
        behavior_logprobs=[0.0] * (length + 1),
        versions=[-1, *versions],
        reward=reward,
        temperature=1.0,
        finish_reason=finish_reason,
    )


GROUPS = [
    [trajectory(1.0, [5, 5]), trajectory(0.0, [3, 4, 5, 5], "length")],
    [trajectory(1.0, [5]), trajectory(1.0, [4])],
    [trajectory(0.0, [5, 5], "context")],
]

STATS = StepStats(
    loss=-0.5,
    grad_norm=2.0,
    lr=1e-4,
    num_tokens=100,
    num_sequences=8,
    skipped=False,
    metrics={"clipped": 0.1},
)


LOST = [
    LostRow(place=3, reason="rejected"),
    LostRow(place=4, reason="failed: OSError"),
    LostRow(place=5, reason="failed: KeyError: 'answer'"),
    LostRow(place=6, reason="too old"),
    LostRow(place=7, reason="too old", response_length=9.0, reward=0.25),
    LostRow(place=8, reason="too old", response_length=5.0, reward=0.0),
]


def test_metrics_of_episodes_are_means_over_those_that_have_them():
    alone, shaped = GROUPS[0][0], GROUPS[0][1]
    group = [
        replace(alone, metrics={"turns": 1.0}),
        replace(shaped, metrics={"turns": 4.0, "tool_calls": 3.0}, reward=0.5, raw_reward=1.0),
    ]
    metrics = rollout_metrics([group], version=5)
    assert metrics["rollout/turns"] == 2.5
    assert metrics["rollout/tool_calls"] == 3.0
    assert metrics["rollout/raw_reward"] == (alone.reward + 1.0) / 2


def test_rollout_metrics_of_a_batch_computed_by_hand():
    assert rollout_metrics(GROUPS, version=5, lost=LOST) == {
        "rollout/reward": 3 / 5,
        "rollout/raw_reward": 3 / 5,
        "rollout/response_length": 10 / 5,
        "rollout/response_length_max": 4.0,
        "rollout/truncated_share": 1 / 5,
        "rollout/context_share": 1 / 5,
        "rollout/staleness_mean": (2 + 1 + 1) / 10,
        "rollout/staleness_max": 2.0,
        "rollout/staleness_share_0": 7 / 10,
        "rollout/staleness_share_1": 2 / 10,
        "rollout/staleness_share_2": 1 / 10,
        "rollout/staleness_share_3": 0.0,
        "rollout/staleness_share_4_or_more": 0.0,
        "rollout/oldest_token_share_0": 3 / 5,
        "rollout/oldest_token_share_1": 1 / 5,
        "rollout/oldest_token_share_2": 1 / 5,
        "rollout/oldest_token_share_3": 0.0,
        "rollout/oldest_token_share_4_or_more": 0.0,
        "rollout/tokens": 10.0,
        "groups/constant_share": 2 / 3,
        "groups/rejected": 1.0,
        "groups/failed": 2.0,
        "groups/too_old": 3.0,
        "lost/response_length": (9 + 5) / 2,
        "lost/reward": (0.25 + 0) / 2,
    }


def test_the_last_share_of_staleness_holds_all_that_is_older():
    values = rollout_metrics([[trajectory(1.0, [9, 7, 6, 5, 0])]], version=9)
    shares = [values[f"rollout/staleness_share_{age}"] for age in AGES]
    assert shares == [1 / 5, 0.0, 1 / 5, 1 / 5, 2 / 5]
    assert values["rollout/oldest_token_share_4_or_more"] == 1.0


def test_a_batch_of_nothing_has_no_means():
    values = rollout_metrics([], version=5)
    assert math.isnan(values["rollout/reward"])
    assert math.isnan(values["groups/constant_share"])
    assert math.isnan(values["rollout/staleness_share_0"])
    assert math.isnan(values["lost/reward"])
    assert values["rollout/tokens"] == 0.0


def test_a_response_without_a_token_counts_with_length_zero():
    values = rollout_metrics([[trajectory(1.0, []), trajectory(0.0, [5, 5])]], version=5)
    assert values["rollout/response_length"] == 1.0
    assert values["rollout/staleness_mean"] == 0.0
    assert values["rollout/oldest_token_share_0"] == 1.0


def metrics_of_a_share(folder: Path) -> dict[str, Any]:
    share = GROUPS[:1] if dist.rank() == 0 else GROUPS[1:]
    lost = LOST[: 3 * dist.rank() + 3]
    values: dict[str, Any] = rollout_metrics(share, version=5, lost=lost)
    with MetricLogger(folder / "run", Config()) as logger:
        logger.log(1, values)
        values["summary"] = logger.summary()
    try:
        MetricLogger(folder / "run" / "config.yaml", Config())
    except ConfigError as error:
        values["error"] = str(error)
    return values


def test_two_ranks_get_the_values_of_the_whole_batch_and_rank_0_writes_them(tmp_path: Path):
    ranks = run_on_two_ranks(metrics_of_a_share, tmp_path)
    for values in ranks:
        assert values.items() >= rollout_metrics(GROUPS, version=5, lost=LOST[:3] + LOST).items()
        assert "Set out_dir to a folder" in values["error"]
    assert ranks[0]["summary"]["reward_first"] == 3 / 5
    assert ranks[1]["summary"] == {}
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_train_metrics_weigh_custom_metrics_by_tokens():
    more = replace(STATS, loss=-0.1, grad_norm=1.0, lr=2e-4, num_tokens=300)
    assert train_metrics([STATS, replace(more, metrics={"clipped": 0.5, "kl": 3.0})]) == {
        "train/loss": -0.3,
        "train/grad_norm": 1.5,
        "train/lr": 2e-4,
        "train/skipped": 0.0,
        "train/clipped": pytest.approx((0.1 * 100 + 0.5 * 300) / 400),
        "train/kl": 3.0,
    }
    assert train_metrics([]) == {}


def test_a_skipped_step_is_counted_but_does_not_spoil_the_means():
    poisoned = replace(STATS, loss=math.nan, grad_norm=math.inf, skipped=True)
    poisoned = replace(poisoned, metrics={"clipped": math.nan})
    values = train_metrics([STATS, poisoned])
    assert (values["train/loss"], values["train/grad_norm"]) == (-0.5, 2.0)
    assert (values["train/skipped"], values["train/clipped"]) == (1.0, 0.1)
    only = train_metrics([poisoned])
    assert math.isnan(only["train/loss"]) and only["train/skipped"] == 1.0


def test_each_call_is_one_line_and_readers_merge_them(tmp_path: Path, clock: Clock):
    logger = MetricLogger(tmp_path, Config())
    clock.wait(20)
    logger.log(1, {"rollout/reward": 0.5}, {"train/loss": math.nan})
    clock.wait(4)
    logger.log(1, {"eval/reward": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"version": 1, "time_s": 20.0, "rollout/reward": 0.5, "train/loss": None},
        {"version": 1, "time_s": 24.0, "eval/reward": 0.25},
    ]
    assert read_metrics(tmp_path) == {
        1: {"time_s": 20.0, "rollout/reward": 0.5, "eval/reward": 0.25}
    }


def test_a_folder_without_metrics_has_no_steps(tmp_path: Path):
    assert read_metrics(tmp_path) == {}


def test_speed_is_without_start_up_and_evaluation(tmp_path: Path, clock: Clock):
    logger = MetricLogger(tmp_path, Config())
    clock.wait(30)
    logger.log(1, {"rollout/tokens": 100.0})
    clock.wait(50)
    logger.log(1, {"eval/reward": 0.5})
    clock.wait(2)
    logger.log(2, {"rollout/tokens": 100.0})
    steps = read_metrics(tmp_path)
    assert "time/step_s" not in steps[1]
    assert (steps[2]["time/step_s"], steps[2]["time/tokens_per_s"]) == (2.0, 50.0)


def test_a_step_and_its_evaluation_are_printed_with_the_time_left(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
):
    logger = MetricLogger(tmp_path, Config(steps=12))
    for version in (1, 2):
        clock.wait(3)
        logger.log(version, {"rollout/reward": 0.5, "rollout/tokens": 30.0})
    logger.log(2, {"eval/reward": 0.75})
    _, _, first, second, evaluation = capsys.readouterr().out.splitlines()
    assert first.split() == ["1/12", "0.500", *["-"] * 8]
    assert second.split() == ["2/12", "0.500", *["-"] * 5, "10", "3.00", "30.0s"]
    assert evaluation.split() == ["2/12", ">>", "evaluation:", "reward", "0.75"]


def test_the_resolved_configuration_is_saved(tmp_path: Path):
    MetricLogger(tmp_path / "a" / "run", Config(lr=3e-4))
    assert "lr: 0.0003" in (tmp_path / "a" / "run" / "config.yaml").read_text()


def run(out_dir: Path, versions: range, clock: Clock, reward: float = 0.5) -> MetricLogger:
    """Log these steps, two seconds each."""
    logger = MetricLogger(out_dir, Config())
    for version in versions:
        clock.wait(2)
        logger.log(version, {"rollout/reward": reward, "train/loss": 0.0})
    return logger


@pytest.mark.parametrize("is_told", [True, False])
def test_each_step_of_a_resumed_run_appears_once_and_its_time_goes_on(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], is_told: bool
):
    run(tmp_path, range(1, 6), clock)  # killed after step 5, saved at step 3
    clock.wait(100)
    logger = MetricLogger(tmp_path, Config())
    if is_told:
        logger.resume(3)
    clock.wait(7)
    logger.log(4, {"rollout/reward": 0.9})
    clock.wait(3)
    logger.log(5, {"rollout/reward": 0.9})
    assert "removed 2 lines of steps after step 3" in capsys.readouterr().out
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["version"] for line in lines] == [1, 2, 3, 4, 5]
    # What passed until the first line was the start of the servers.
    assert read_metrics(tmp_path)[4] == {"time_s": 6.0, "rollout/reward": 0.9}
    assert read_metrics(tmp_path)[5]["time_s"] == 6.0 + 3.0


def test_a_run_that_is_stopped_says_where_and_how_it_goes_on(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
):
    says = {
        False: "Stopped after step 1, before the first checkpoint",
        True: "Stopped after step 1. The same command continues from the last checkpoint",
    }
    for has_checkpoint, expected in says.items():
        with pytest.raises(KeyboardInterrupt), MetricLogger(tmp_path, Config()) as logger:
            logger.log(1, {"rollout/reward": 0.5, "train/loss": 0.0})
            if has_checkpoint:
                (tmp_path / "checkpoints").mkdir()
                (tmp_path / "checkpoints" / "latest").touch()
            raise KeyboardInterrupt
        assert expected in capsys.readouterr().out


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricLogger(tmp_path, Config()) as logger:
        for version in (1, 2, 3):
            logger.log(version, {"rollout/reward": 0.5})
        assert logger.summary()["reward_last"] == 0.5
    assert capsys.readouterr().err.count("Training continues") == 1


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out_dir=.*file/run cannot be written"):
        MetricLogger(tmp_path / "file" / "run", Config())


def test_changed_settings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    MetricLogger(tmp_path, Config())
    assert capsys.readouterr().out == ""
    MetricLogger(tmp_path, Config(lr=3e-4, seed=2))
    shown = capsys.readouterr().out
    assert "  lr: 0.0001 -> 0.0003\n  seed: 1 -> 2\n" in shown
    assert "steps" not in shown


def test_another_model_data_set_or_seed_is_refused_if_there_is_a_checkpoint(tmp_path: Path):
    MetricLogger(tmp_path, Config())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("version-00000001")
    MetricLogger(tmp_path, Config(lr=3e-4))
    for changed in (Config(seed=2), Config(model="other"), Config(dataset="other")):
        for _ in range(2):  # the refused settings must not have been saved
            with pytest.raises(ConfigError, match="holds a checkpoint that was made with other"):
                MetricLogger(tmp_path, changed)


def test_other_adapters_than_those_of_the_checkpoint_are_refused(tmp_path: Path):
    @dataclass(frozen=True, kw_only=True)
    class WithAdapters:
        train: FSDPConfig

    def start(**train: Any) -> None:
        MetricLogger(tmp_path, WithAdapters(train=FSDPConfig(**train))).close()

    start(lora_rank=8)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("version-00000001")
    start(lora_rank=8, lr=1.0)
    for changed in ({"lora_rank": 4}, {"lora_alpha": 8}, {"lora_layers": ("q_proj",)}):
        with pytest.raises(ConfigError, match=rf"other settings: train\.{next(iter(changed))}: "):
            start(**({"lora_rank": 8} | changed))


def test_a_config_file_that_cannot_be_read_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.yaml").write_text("lr: [1, 2")
    MetricLogger(tmp_path, Config())
    assert "cannot be compared" in capsys.readouterr().err
    assert "lr: 0.0001" in (tmp_path / "config.yaml").read_text()


def test_a_run_without_rollouts_is_told_by_its_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with MetricLogger(tmp_path, Config()) as logger:
        logger.log(0, {"eval/loss": 2.5})
        logger.log(1, {"train/loss": 2.0, "train/grad_norm": 1.5, "train/tokens": 640})
        logger.log(1, {"eval/loss": 1.25})
        logger.report(checkpoint="there")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {
        "loss_before": 2.5,
        "loss_after": 1.25,
        "time_to_first_step_s": json.loads(lines[-1])["time_to_first_step_s"],
        "train_s": json.loads(lines[-1])["train_s"],
        "checkpoint": "there",
    }
    assert not any("reward" in line or "stale" in line for line in lines)
    [header] = [line for line in lines if line.split()[:1] == ["step"]]
    assert header.split() == ["step", "loss", "grad", "tok/s", "s/step", "left"]
    assert any("loss in evaluation  2.500 -> 1.250" in line for line in lines)


def test_the_summary_tells_the_run_in_numbers(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
):
    with MetricLogger(tmp_path, Config()) as logger:
        for version, wait_s in ((1, 30), (2, 2), (3, 3), (4, 400)):
            clock.wait(wait_s)
            logger.log(
                version,
                {
                    "rollout/reward": version / 10,
                    "rollout/response_length": 10.0 * version,
                    "rollout/staleness_max": 2.0 if version == 3 else 1.0,
                    "gate/logprob_gap_mean": version / 1000,
                    "train/loss": 0.0,
                    "train/skipped": float(version == 2),
                },
            )
        logger.log(2, {"eval/reward": 0.5})
        logger.log(4, {"eval/reward": 0.75})
        assert logger.summary() == {
            "steps": 4.0,
            "time_to_first_step_s": 30.0,
            "total_s": 435.0,
            "train_s": 405.0,
            "step_s": 3.0,
            "eval_reward_first": 0.5,
            "eval_reward_last": 0.75,
            "reward_first": 0.1,
            "reward_last": 0.4,
            "response_length_first": 10.0,
            "response_length_last": 40.0,
            "staleness_max": 2.0,
            "logprob_gap_mean": pytest.approx(0.0025),
            "skipped": 1.0,
        }
    shown = capsys.readouterr().out
    assert "reward in evaluation  0.500 -> 0.750\n" in shown
    assert "time per step (median)  3.0s\n" in shown
    assert "config.yaml, curve.png, metrics.jsonl\n" in shown
    assert f"in  {tmp_path}\n" in shown


def test_a_run_without_a_step_ends_without_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with MetricLogger(tmp_path, Config()):
        pass
    assert capsys.readouterr().out == ""


def test_closing_twice_prints_one_summary(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
):
    logger = run(tmp_path, range(1, 3), clock)
    logger.close()
    logger.close()
    assert capsys.readouterr().out.count("total time") == 1


class FakeSink:
    """Keeps what it gets; breaks at one version."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.got: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False
        self._breaks_at = breaks_at

    def log(self, version: int, values: dict[str, float]) -> None:
        if version == self._breaks_at:
            raise ConnectionError("unreachable")
        self.got.append((version, values))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def install_sink(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeSink], None]:
    def install(sink: FakeSink) -> None:
        monkeypatch.setattr(sinks, "find_spec", lambda name: "found")
        monkeypatch.setattr(sinks, "WandbSink", lambda out_dir, cfg: sink)

    return install


def test_a_sink_gets_what_the_file_gets(tmp_path: Path, install_sink: Callable[[FakeSink], None]):
    sink = FakeSink()
    install_sink(sink)
    with MetricLogger(tmp_path, Config(sinks=("wandb",))) as logger:
        logger.log(1, {"rollout/reward": 0.5}, {"train/loss": 0.1})
    assert sink.got == [(1, {"rollout/reward": 0.5, "train/loss": 0.1})]
    assert sink.is_closed


def test_a_sink_that_is_down_is_reported_once_and_left_out(
    tmp_path: Path,
    install_sink: Callable[[FakeSink], None],
    capsys: pytest.CaptureFixture[str],
):
    sink = FakeSink(breaks_at=2)
    install_sink(sink)
    with MetricLogger(tmp_path, Config(), sinks=["wandb"]) as logger:
        for version in (1, 2, 3):
            logger.log(version, {"rollout/reward": 0.5})
    assert [version for version, _ in sink.got] == [1]
    assert capsys.readouterr().err.count("wandb failed (ConnectionError: unreachable)") == 1
    assert sorted(read_metrics(tmp_path)) == [1, 2, 3]


def test_a_sink_that_is_not_installed_is_refused_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "arealite\[tensorboard\]"'):
        MetricLogger(tmp_path, Config(), sinks=["tensorboard"])


def test_a_sink_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="sinks has 'mlflow'"):
        MetricLogger(tmp_path, Config(), sinks=["mlflow"])


def test_wandb_is_called_with_the_settings_and_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[Any] = []
    wandb_run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = SimpleNamespace(init=lambda **settings: (calls.append(settings), wandb_run)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    sink = sinks.WandbSink(tmp_path / "run7", Config())
    sink.log(3, {"rollout/reward": 0.5})
    sink.close()
    assert calls[0]["project"] == "mine"
    assert calls[0]["name"] == "run7"
    assert calls[0]["config"]["lr"] == 1e-4
    assert calls[1:] == [(3, {"rollout/reward": 0.5}), "end"]


def test_a_finished_run_ends_with_one_line_of_json(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
):
    with MetricLogger(tmp_path, Config()) as logger:
        logger.resume(0)
        clock.wait(40)
        logger.log(0, {"eval/reward": 0.5, "eval/response_length": 17.5})
        clock.wait(90)
        logger.log(1, {"train/loss": 0.0}, {"eval/reward": 0.75, "eval/response_length": 30.0})
        logger.report("runs/model")
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last_line) == {
        "accuracy_before": 0.5,
        "accuracy_after": 0.75,
        "length_before": 17.5,
        "length_after": 30.0,
        "time_to_first_step_s": 130.0,
        "train_s": 90.0,
        "checkpoint": "runs/model",
    }
