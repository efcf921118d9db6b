import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from arealite import dist
from arealite.observe.rollout_log import RolloutLog, read_lost, read_rollouts
from arealite.types import LostRow, Trajectory

TRAJECTORY = Trajectory(
    token_ids=[4, 9, 3, 5, 2],
    loss_mask=[False, False, False, True, True],
    behavior_logprobs=[0.0, 0.0, 0.0, -0.105360516, -1.203972804],
    versions=[-1, -1, -1, 6, 6],
    reward=1.0,
    temperature=0.7,
    finish_reason="stop",
    row_index=96,
)


class WordTokenizer:
    """Decodes token ids to words."""

    def decode(self, token_ids: list[int], /) -> str:
        return " ".join({5: "34", 2: "<end>"}[token_id] for token_id in token_ids)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(dist, "rank", lambda: rank)
    monkeypatch.setattr(dist, "world_size", lambda: world_size)


def test_a_line_holds_everything_that_was_sampled(tmp_path: Path):
    log = RolloutLog(tmp_path, WordTokenizer())
    log.write(7, [[TRAJECTORY]])
    assert json.loads((tmp_path / "rollouts.jsonl").read_text()) == {
        "version": 7,
        "row_index": 96,
        "token_ids": [4, 9, 3, 5, 2],
        "loss_mask": [0, 0, 0, 1, 1],
        "behavior_logprobs": [0.0, 0.0, 0.0, -0.10536, -1.20397],
        "versions": [-1, -1, -1, 6, 6],
        "reward": 1.0,
        "finish_reason": "stop",
        "temperature": 0.7,
        "text": "34 <end>",
    }


def test_the_trajectories_of_all_ranks_and_groups_are_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for rank in (0, 1, 10):
        as_rank(monkeypatch, rank, 11)
        log = RolloutLog(tmp_path)
        for version in (1, 2):
            group = [replace(TRAJECTORY, row_index=10 * rank + place) for place in (0, 1)]
            log.write(version, [group[:1], group[1:]])
    assert [(line["version"], line["row_index"]) for line in read_rollouts(tmp_path)] == [
        (version, row)
        for rows in ((0, 1), (10, 11), (100, 101))
        for version in (1, 2)
        for row in rows
    ]
    assert all(line["text"] is None for line in read_rollouts(tmp_path))


def test_a_run_without_a_log_has_no_rollouts(tmp_path: Path):
    assert list(read_rollouts(tmp_path)) == []


def test_steps_that_a_resumed_run_does_again_appear_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for rank in (0, 1):  # a run of two ranks, killed after step 4, saved at step 2
        as_rank(monkeypatch, rank, 2)
        log = RolloutLog(tmp_path)
        for version in (1, 2, 3, 4):
            log.write(version, [[TRAJECTORY]])
    as_rank(monkeypatch, 0, 1)  # continued by one rank
    log = RolloutLog(tmp_path)
    log.write(3, [[TRAJECTORY, TRAJECTORY]])
    assert [line["version"] for line in read_rollouts(tmp_path)] == [1, 2, 3, 3, 1, 2]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "rollouts.jsonl").symlink_to("/dev/full")
    log = RolloutLog(tmp_path)
    log.write(1, [[TRAJECTORY]])
    log.write(2, [[TRAJECTORY]])
    assert capsys.readouterr().err.count("Training continues") == 1


def test_a_step_of_128_trajectories_takes_milliseconds(tmp_path: Path):
    long = replace(
        TRAJECTORY,
        token_ids=list(range(80)),
        loss_mask=[True] * 80,
        behavior_logprobs=[-0.123456789] * 80,
        versions=[3] * 80,
    )
    durations_s = []
    log = RolloutLog(tmp_path)
    for version in range(1, 11):
        began_s = time.perf_counter()
        log.write(version, [[long] * 8] * 16)
        durations_s.append(time.perf_counter() - began_s)
    assert min(durations_s) < 0.01
    assert (tmp_path / "rollouts.jsonl").stat().st_size < 10 * 250_000


def test_a_row_that_was_given_up_is_written_with_its_reason(tmp_path: Path):
    log = RolloutLog(tmp_path)
    log.write(1, [[TRAJECTORY]], [LostRow(place=17, reason="failed: OSError: no luck")])
    log.write(2, [[TRAJECTORY]])
    RolloutLog(tmp_path).resume(1)
    assert list(read_lost(tmp_path)) == [
        {"version": 1, "row_index": 17, "reason": "failed: OSError: no luck"}
    ]
    assert len(list(read_rollouts(tmp_path))) == 1


def test_a_finished_group_that_got_too_old_is_written_with_its_length_and_reward(tmp_path: Path):
    lost = LostRow(place=17, reason="too old", response_length=812.5, reward=0.25)
    RolloutLog(tmp_path).write(1, [], [lost])
    assert list(read_lost(tmp_path)) == [
        {
            "version": 1,
            "row_index": 17,
            "reason": "too old",
            "response_length": 812.5,
            "reward": 0.25,
        }
    ]
