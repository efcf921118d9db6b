"""The examples of README and of the docstrings run as they are printed."""

import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from arealite import dist
from arealite.rollout.workflows import ChatWorkflow
from tests.rollout.agents import CalculatorAgent

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CALCULATOR, SCRIPT, BAD_NETWORK, CHECK_LOSS, STEP, EVALUATION = EXAMPLES
DOCSTRING = re.search(r"class CalculatorAgent.*", f"{inspect.getdoc(ChatWorkflow)}\n", re.DOTALL)
assert DOCSTRING is not None


@pytest.mark.parametrize("shown", [CALCULATOR, DOCSTRING[0]], ids=["README", "docstring"])
def test_the_calculator_agent_runs_on_the_scripted_engine_as_shown(shown: str):
    script = SCRIPT.replace("# class CalculatorAgent, as above", textwrap.dedent(shown))
    names: dict[str, Any] = {}
    exec(script, names)
    for trajectory in names["group"]:
        assert sum(trajectory.loss_mask) == len("<calc>48 / 2</calc>" + "#### 24") + 2


def test_the_agent_of_the_other_tests_is_the_one_shown():
    assert inspect.getsource(CalculatorAgent) == CALCULATOR


def test_a_workflow_survives_a_bad_network_as_shown():
    exec(BAD_NETWORK, {})


def test_a_model_is_evaluated_without_a_server_as_shown(capsys: pytest.CaptureFixture[str]):
    exec(EVALUATION, {})
    assert 0.2 < float(capsys.readouterr().out) < 0.8  # before any training


def test_the_loss_check_passes_as_shown(capsys: pytest.CaptureFixture[str]):
    exec(CHECK_LOSS, {})
    assert capsys.readouterr().out.startswith("LossCheck(num_comparisons=")


def test_a_step_is_taken_with_a_loss_of_ones_own_as_shown(capsys: pytest.CaptureFixture[str]):
    exec(STEP, {})
    assert "num_tokens=5, num_sequences=2, skipped=False" in capsys.readouterr().out
    dist.close()


def test_the_last_check_of_a_gpu_is_shown_as_it_ended():
    result = json.loads((ROOT / "benchmarks" / "results" / "gpu_check.json").read_text())
    counts = f"{result['pass']} passed, {result['fail']} failed, {result['not run']} not run"
    shown = f"not run yet: {counts}" if result["device"] == "none" else counts
    assert shown in README
