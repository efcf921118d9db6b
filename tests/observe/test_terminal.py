import io
import math
import sys

import pytest

from arealite.observe.terminal import StepTable, format_duration, format_row, show

VALUES = {
    "rollout/reward": 0.546875,
    "rollout/response_length": 21.44,
    "rollout/staleness_mean": 0.8125,
    "rollout/staleness_max": 2.0,
    "gate/logprob_gap_mean": 0.000618,
    "train/loss": -0.00312,
    "train/grad_norm": 0.4166,
    "time/tokens_per_s": 2210.4,
    "time/step_s": 1.524,
}


class Terminal(io.StringIO):
    """Stands for a stdout that is a terminal."""

    def isatty(self) -> bool:
        return True


class ClosedPipe(io.StringIO):
    """Stands for a stdout whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_row_shows_the_telling_numbers_of_a_step():
    assert format_row("12/80", VALUES, 103.2).split() == [
        "12/80",
        "0.547",
        "21.4",
        "0.81/2",
        "0.00062",
        "-0.0031",
        "0.42",
        "2210",
        "1.52",
        "1m43s",
    ]


def test_what_was_not_measured_is_a_dash():
    row = format_row("1", {"rollout/reward": 0.5, "train/loss": math.nan}, None)
    assert row.split() == ["1", "0.500", *["-"] * 8]


def test_rows_fit_in_80_columns_and_under_their_titles_for_any_size_of_number(
    capsys: pytest.CaptureFixture[str],
):
    table = StepTable(100_000)
    for exponent in (-9, -3, 0, 2, 5, 9):
        size = 10.0**exponent
        staleness = {name: min(size, 64.0) for name in VALUES if "staleness" in name}
        table.show_step(1, {**dict.fromkeys(VALUES, size), **staleness}, min(size, 1e6))
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert {len(line) for line in [header, *rows]} == {79}
    assert all(len(row.split()) == len(header.split()) == 10 for row in rows)


def test_a_pipe_gets_plain_lines_and_the_header_every_20_rows(capsys: pytest.CaptureFixture[str]):
    table = StepTable(80)
    for version in range(1, 42):
        table.show_step(version, VALUES, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stale: ")
    assert [index for index, line in enumerate(lines[1:]) if "reward" in line] == [0, 21, 42]
    assert all(character.isprintable() for line in lines for character in line)


def test_an_evaluation_stands_out(capsys: pytest.CaptureFixture[str]):
    StepTable(80).show_evaluation(10, {"eval/reward": 0.585, "eval/pass@8": 0.9})
    assert capsys.readouterr().out == "    10/80  >> evaluation: reward 0.585, pass@8 0.9\n"


def test_a_skipped_step_is_an_alarm(capsys: pytest.CaptureFixture[str]):
    StepTable().show_step(3, {**VALUES, "train/skipped": 1.0}, None)
    assert capsys.readouterr().out.endswith("SKIPPED: gradient not finite\n")


def test_a_terminal_gets_styles_and_a_pipe_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    show("evaluation", style="bold green")
    monkeypatch.setattr(sys, "stdout", pipe)
    show("evaluation", style="bold green")
    assert terminal.getvalue() == "\x1b[1;32mevaluation\x1b[0m\n"
    assert pipe.getvalue() == "evaluation\n"


def test_a_closed_pipe_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    show("anything")


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0s"),
        (59.9, "59.9s"),
        (59.97, "1m00s"),
        (60, "1m00s"),
        (103.2, "1m43s"),
        (3_599.6, "1h00m"),
        (7_500, "2h05m"),
        (90_000, "1d01h"),
    ],
)
def test_durations_are_in_two_units(seconds: float, text: str):
    assert format_duration(seconds) == text
