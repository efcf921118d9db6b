"""The examples of README and of the docstrings run as they are printed."""

import asyncio
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from arealite.api import InferenceEngine
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.workflows import ChatWorkflow
from arealite.types import Row, SamplingParams, Trajectory
from tests.rollout.agents import CalculatorAgent, calculate

README = (Path(__file__).parents[1] / "README.md").read_text()
CALCULATOR, SCRIPTED = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOCSTRING = re.search(
    r"class CalculatorAgent.*?\n(?=\nArgs)", inspect.getdoc(ChatWorkflow) or "", re.S
)
assert DOCSTRING is not None


@pytest.mark.parametrize("shown", [CALCULATOR, DOCSTRING[0]], ids=["README", "docstring"])
def test_the_calculator_agent_runs_on_the_scripted_engine_as_shown(shown: str):
    names: dict[str, Any] = {
        "ChatWorkflow": ChatWorkflow,
        "InferenceEngine": InferenceEngine,
        "Row": Row,
        "SamplingParams": SamplingParams,
        "Trajectory": Trajectory,
        "calculate": calculate,
        "gsm8k_reward": gsm8k_reward,
        "re": re,
    }
    script = f"async def try_it():\n{textwrap.indent(SCRIPTED, '    ')}    return group\n"
    exec(textwrap.dedent(shown) + "\n" + script, names)
    group = asyncio.run(names["try_it"]())
    for trajectory in group:
        assert sum(trajectory.loss_mask) == len("<calc>48 / 2</calc>" + "#### 24") + 2


def test_the_agent_of_the_other_tests_is_the_one_shown():
    assert inspect.getsource(CalculatorAgent) == CALCULATOR
