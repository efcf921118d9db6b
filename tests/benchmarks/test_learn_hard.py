import json
import math
from pathlib import Path

import pytest

from benchmarks.learn_hard import (
    RUNS,
    check_names,
    paired_gain,
    share_of_right_steps,
    share_of_right_sums,
    verdict,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "learn_hard.json"
GOLD = "<<3*2=6>>6\n<<6+4=10>>10\n#### 10"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (GOLD, 1.0),
        ("<<3*2=6>>6\n<<6+4=11>>11\n#### 11", 0.5),
        ("<<3+2=5>>5\n<<6+4=10>>10\n#### 10", 0.5),
        ("<<6+4=10>>10\n#### 10", 0.0),  # right, but at the place of another
        ("#### 10", 0.0),
        ("", 0.0),
        (f"<<3*2=6>>6\n<<6+4=10>>10\n{GOLD}", 1.0),
    ],
)
def test_a_step_is_right_where_the_solution_has_it(text: str, share: float):
    assert share_of_right_steps([text], [GOLD]) == share


def test_steps_count_alike_however_many_a_problem_has():
    texts, golds = [GOLD, "#### 1"], [GOLD, "<<1+1=2>>2\n#### 2"]
    assert share_of_right_steps(texts, golds) == pytest.approx(2 / 3)


def test_a_sum_is_right_whatever_it_is_about():
    texts = ["<<7+5=12>>12\n<<12-3=8>>8\n#### 8", "<<4*2=8>>9\n#### 9", "#### 3", "<<1+=1>>1"]
    assert share_of_right_sums(texts) == pytest.approx(2 / 3)
    assert math.isnan(share_of_right_sums(["#### 3"]))


def test_the_interval_of_a_gain_is_that_of_its_paired_differences():
    # 100 problems: 30 only right after, 10 only before; the differences are 1, -1 and 0.
    before = [False] * 30 + [True] * 10 + [True] * 40 + [False] * 20
    after = [True] * 30 + [False] * 10 + [True] * 40 + [False] * 20
    gain, low, high = paired_gain(before, after)
    error = math.sqrt((0.40 - 0.20**2) / 99)
    assert gain == pytest.approx(0.20)
    assert (low, high) == pytest.approx((0.20 - 1.959964 * error, 0.20 + 1.959964 * error))


def test_models_that_answer_alike_have_no_gain_and_no_doubt_about_it():
    assert paired_gain([True, False, True], [True, False, True]) == (0.0, 0.0, 0.0)


def one_run(gain: float, low: float) -> dict[str, float]:
    return {
        "gain": gain,
        "low": low,
        "high": 2 * gain - low,
        "accuracy_before": 0.5,
        "accuracy_after": 0.5 + gain,
    }


@pytest.mark.parametrize(
    ("gain", "low", "control", "passed"),
    [
        (0.15, 0.12, -0.02, True),
        (0.09, 0.05, -0.02, False),
        (0.15, -0.01, -0.02, False),
        (0.15, 0.12, 0.04, False),
        (0.15, 0.12, 0.08, False),
        (0.15, 0.12, -0.08, False),
    ],
)
def test_it_passes_only_if_the_worst_run_learns_and_every_control_is_flat(
    gain: float, low: float, control: float, passed: bool
):
    runs = {
        "grpo:1": one_run(0.30, 0.27),
        "grpo:2": one_run(gain, low),
        "random_reward:1": one_run(-0.01, -0.04),
        "random_reward:2": one_run(control, control - 0.03),
    }
    found = verdict(runs)
    assert found["passed"] is passed
    assert (found["gain"], found["control_gain"]) == (gain, control)
    assert found["after"] == pytest.approx(0.5 + gain)


@pytest.mark.parametrize(
    "names", [[], ["grpo:1"], ["random_reward:1"], ["grpo:1", "coin:1"], ["grpo", "random_reward"]]
)
def test_names_that_make_no_comparison_are_refused_before_anything_runs(names: list[str]):
    with pytest.raises(SystemExit, match="at least one of each kind"):
        check_names(names)
    check_names(RUNS)


def test_the_stored_runs_pass():
    stored = json.loads(RESULTS.read_text())
    assert {**stored["verdict"], **verdict(stored["runs"])} == stored["verdict"]
    assert stored["verdict"]["passed"]
