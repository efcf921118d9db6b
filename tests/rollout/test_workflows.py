"""The ten-line agent, on the scripted engine."""

import asyncio
import re
from dataclasses import dataclass
from typing import Any

import pytest

from arealite.algo.advantages import group_advantages, step_advantages
from arealite.api import InferenceEngine
from arealite.errors import ConfigError, DataError, PromptTooLongError, RewardError
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.chat_template import Message
from arealite.rollout.workflows import (
    ChatWorkflow,
    MultiTurnWorkflow,
    SingleTurnWorkflow,
    ToolWorkflow,
)
from arealite.testing import ScriptedEngine, byte_tokenizer
from arealite.types import Row, SamplingParams, Trajectory
from tests.rollout.agents import CalculatorAgent

ROW = {"question": "What is half of 48?", "answer": "#### 24"}


def test_the_calculator_agent_calls_its_tool_and_answers():
    tokenizer = byte_tokenizer()
    agent = CalculatorAgent(tokenizer, gsm8k_reward, SamplingParams(), group_size=4)
    engine = ScriptedEngine(replies=["<calc>48 / 2</calc>", "#### 24"])

    group = asyncio.run(agent.arun_episode(engine, ROW))

    assert [trajectory.reward for trajectory in group] == [1.0] * 4
    assert "<result>24.0</result>" in tokenizer.decode(group[0].token_ids)
    sampled = [t for t, m in zip(group[0].token_ids, group[0].loss_mask, strict=True) if m]
    assert tokenizer.decode(sampled) == "<calc>48 / 2</calc><|im_end|>#### 24<|im_end|>"


def test_trajectories_hold_exactly_the_tokens_the_engine_saw():
    agent = CalculatorAgent(byte_tokenizer(), gsm8k_reward, SamplingParams(), group_size=1)
    engine = ScriptedEngine(replies=["<calc>48 / 2</calc>", "#### 24"])
    [trajectory] = asyncio.run(agent.arun_episode(engine, ROW))
    last_request = engine.requests[-1].token_ids
    assert trajectory.token_ids[: len(last_request)] == last_request
    assert all(trajectory.loss_mask[len(last_request) :])


def test_a_single_turn_is_graded():
    workflow = SingleTurnWorkflow(byte_tokenizer(), gsm8k_reward, SamplingParams(), group_size=2)
    engine = ScriptedEngine(replies=["<<48/2=24>> #### 24"])
    group = asyncio.run(workflow.arun_episode(engine, ROW))
    assert [trajectory.reward for trajectory in group] == [1.0, 1.0]


def test_a_system_prompt_begins_every_conversation():
    workflow = SingleTurnWorkflow(
        byte_tokenizer(), gsm8k_reward, SamplingParams(), system_prompt="Be brief."
    )
    engine = ScriptedEngine(replies=["#### 24"])
    asyncio.run(workflow.arun_episode(engine, ROW))
    prompt = byte_tokenizer().decode(engine.requests[0].token_ids)
    assert re.match(r"<\|im_start\|>system\nBe brief\.<\|im_end\|>\n<\|im_start\|>user", prompt)


def test_a_workflow_without_arun_sample_says_what_is_missing():
    workflow = ChatWorkflow(byte_tokenizer(), gsm8k_reward, SamplingParams())
    with pytest.raises(NotImplementedError, match="must define arun_sample"):
        asyncio.run(workflow.arun_episode(ScriptedEngine(replies=[]), ROW))


def test_a_failed_episode_keeps_the_cause_of_its_error():
    async def fail(text: str, row: Row) -> float:
        raise OSError("the judge is gone")

    workflow = SingleTurnWorkflow(byte_tokenizer(), fail, SamplingParams(), group_size=2)
    with pytest.raises(RewardError) as raised:
        asyncio.run(workflow.arun_episode(ScriptedEngine(replies=["#### 24"]), ROW))
    assert isinstance(raised.value.__cause__, OSError)


def test_a_reward_has_as_long_as_the_workflow_says():
    async def think(text: str, row: Row) -> float:
        await asyncio.sleep(100)
        return 1.0

    workflow = SingleTurnWorkflow(
        byte_tokenizer(), think, SamplingParams(), group_size=2, reward_timeout_s=0.05
    )
    with pytest.raises(RewardError, match=r"longer than 0.05 s \(reward_timeout_s\)"):
        asyncio.run(workflow.arun_episode(ScriptedEngine(replies=["#### 24"]), ROW))


async def first_line(text: str, row: Row) -> float:
    """The answer is its own grade."""
    return float(text)


def episode(workflow: ChatWorkflow, engine: ScriptedEngine) -> list[Trajectory]:
    group = asyncio.run(workflow.arun_episode(engine, ROW))
    assert group is not None
    return group


def said(engine: ScriptedEngine) -> str:
    """All that the engine was asked in the end."""
    return byte_tokenizer().decode(engine.requests[-1].token_ids)


def test_a_second_try_is_discounted_once_and_its_raw_reward_kept():
    workflow = MultiTurnWorkflow(
        byte_tokenizer(), first_line, SamplingParams(), max_turns=3, turn_discount=0.5
    )
    [trajectory] = episode(workflow, ScriptedEngine(replies=["0", "0.25", "1"]))
    assert trajectory.reward == 1.0 * 0.5**2
    assert trajectory.raw_reward == 1.0
    assert trajectory.metrics == {
        "turns": 3.0,
        "reward_turn_1": 0.0,
        "reward_turn_2": 0.25,
        "reward_turn_3": 1.0,
    }


def test_a_right_answer_gets_no_second_try_and_no_discount():
    workflow = MultiTurnWorkflow(byte_tokenizer(), first_line, SamplingParams())
    engine = ScriptedEngine(replies=["1"])
    [trajectory] = episode(workflow, engine)
    assert (trajectory.reward, trajectory.metrics) == (1.0, {"turns": 1.0, "reward_turn_1": 1.0})


def test_feedback_may_depend_on_the_answer_and_the_row():
    workflow = MultiTurnWorkflow(
        byte_tokenizer(),
        first_line,
        SamplingParams(),
        feedback=lambda text, row: f"{text} is not half of {row['question'][-3:-1]}.",
    )
    engine = ScriptedEngine(replies=["0.5", "1"])
    episode(workflow, engine)
    assert "<|im_start|>user\n0.5 is not half of 48.<|im_end|>" in said(engine)


def test_turns_may_be_rewarded_each():
    workflow = MultiTurnWorkflow(
        byte_tokenizer(), first_line, SamplingParams(), rewards_turns=True, turn_discount=1.0
    )
    [trajectory] = episode(workflow, ScriptedEngine(replies=["0.25", "1"]))
    assert [reward for _, reward in trajectory.step_rewards] == [0.25, 1.0]
    # Less their mean, .625: -.375 for the first turn and .375 for the second.
    [[advantages]] = step_advantages([[trajectory]])
    first, last = trajectory.loss_mask.index(True), trajectory.step_rewards[-1][0]
    assert (advantages[first], advantages[last]) == (0.0, 0.375)


@pytest.mark.parametrize("workflow", [MultiTurnWorkflow, ToolWorkflow])
def test_a_conversation_has_at_least_one_turn(workflow: type):
    tools = {"tools": []} if workflow is ToolWorkflow else {}
    with pytest.raises(ConfigError, match="max_turns=0 must be at least 1"):
        workflow(byte_tokenizer(), first_line, SamplingParams(), max_turns=0, **tools)


def half(number: int) -> float:
    """Divide by two.

    Args:
        number: What to divide.
    """
    return number / 2


CALL = '<tool_call>{"name": "half", "arguments": {"number": 48}}</tool_call>'


def with_tool(**changes: Any) -> ToolWorkflow:
    settings: dict[str, Any] = {"tools": [half], "call_format": "hermes"} | changes
    return ToolWorkflow(byte_tokenizer(), gsm8k_reward, SamplingParams(), **settings)


def test_a_tool_is_called_until_an_answer_calls_nothing():
    engine = ScriptedEngine(replies=[CALL, CALL + CALL, "#### 24"])
    [trajectory] = episode(with_tool(), engine)
    assert said(engine).count("<|im_start|>tool\n24.0<|im_end|>") == 3
    assert trajectory.reward == 1.0
    assert trajectory.metrics == {"turns": 3.0, "tool_calls": 3.0}


def test_calls_without_an_answer_end_with_the_last_turn():
    engine = ScriptedEngine(replies=[CALL] * 2)
    [trajectory] = episode(with_tool(max_turns=2), engine)
    assert trajectory.reward == 0.0
    assert trajectory.metrics == {"turns": 2.0, "tool_calls": 1.0}


def test_a_conversation_that_fills_the_context_ends_where_it_is():
    engine = ScriptedEngine(replies=[CALL] * 9, max_model_len=400)
    [trajectory] = episode(with_tool(max_turns=9), engine)
    assert trajectory.finish_reason == "context"
    assert trajectory.metrics["turns"] < 9


def test_a_second_try_that_does_not_fit_into_the_context_leaves_the_first():
    workflow = MultiTurnWorkflow(
        byte_tokenizer(), gsm8k_reward, SamplingParams(), feedback="No. " * 60, max_turns=9
    )
    engine = ScriptedEngine(replies=["#### 25"] * 9, max_model_len=200)
    [trajectory] = episode(workflow, engine)
    assert trajectory.finish_reason == "context"
    assert trajectory.metrics == {"turns": 1.0, "reward_turn_1": 0.0}


def test_a_question_that_does_not_fit_is_an_error():
    engine = ScriptedEngine(replies=["#### 24"], max_model_len=20)
    with pytest.raises(PromptTooLongError):
        episode(MultiTurnWorkflow(byte_tokenizer(), gsm8k_reward, SamplingParams()), engine)


MESSAGES = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Half of 48?"},
]


@pytest.mark.parametrize(
    ("system_prompt", "messages", "roles"),
    [
        ("", MESSAGES, ["user", "assistant", "user"]),
        ("Be brief.", MESSAGES, ["system", "user", "assistant", "user"]),
        ("Be brief.", [{"role": "system", "content": "Sing."}, *MESSAGES[:1]], ["system", "user"]),
    ],
)
def test_a_question_may_be_a_list_of_messages(
    system_prompt: str, messages: list[Message], roles: list[str]
):
    workflow = SingleTurnWorkflow(
        byte_tokenizer(), gsm8k_reward, SamplingParams(), system_prompt=system_prompt
    )
    engine = ScriptedEngine(replies=["#### 24"])
    asyncio.run(workflow.arun_episode(engine, ROW | {"question": messages}))
    prompt = byte_tokenizer().decode(engine.requests[0].token_ids)
    assert re.findall(r"<\|im_start\|>(\w+)", prompt) == [*roles, "assistant"]
    assert messages[0]["content"] in prompt


class Shelf:
    """What one conversation has put away."""

    def __init__(self, row: Row) -> None:
        self.things: list[str] = [row["given"]]

    def put(self, thing: str) -> str:
        """Put a thing on the shelf.

        Args:
            thing: The thing.
        """
        self.things.append(thing)
        return " and ".join(self.things)


def test_tools_may_be_made_for_each_conversation():
    workflow = ToolWorkflow(
        byte_tokenizer(),
        gsm8k_reward,
        SamplingParams(),
        tools=lambda row: [Shelf(row).put],
        call_format="json",
        group_size=2,
    )
    call = '{"name": "put", "arguments": {"thing": "a cup"}}'
    engine = ScriptedEngine(replies=[call, "#### 24"])
    group = asyncio.run(workflow.arun_episode(engine, ROW | {"given": "a jug"}))
    for trajectory in group:
        text = byte_tokenizer().decode(trajectory.token_ids)
        assert "a jug and a cup<|im_end|>" in text
        assert trajectory.metrics["tool_calls"] == 1.0


def wants_two(a: int, b: int) -> int:
    """Add.

    Args:
        a: One.
        b: Another.
    """
    return a + b


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        (wants_two, r"a function that does not take a row \(missing a required argument: 'b'\)"),
        (lambda row: None, r"tools of ToolWorkflow are None\. Give a list"),
        ("wants_two", r"tools of ToolWorkflow are 'wants_two'\. Give a list"),
        ([3], r"are \[3\]\. Give a list of functions, or a function of the row that returns one"),
    ],
)
def test_what_are_no_tools_is_named(tools: Any, problem: str):
    with pytest.raises(ConfigError, match=problem):
        episode(
            ToolWorkflow(byte_tokenizer(), gsm8k_reward, SamplingParams(), tools=tools),
            ScriptedEngine(replies=["#### 24"]),
        )


def test_a_format_of_calls_that_nobody_reads_is_refused():
    with pytest.raises(ConfigError, match="call_format='openai' must be one of auto, hermes, json"):
        with_tool(call_format="openai")


def test_a_child_begins_conversations_with_the_tools_in_the_template():
    class Child(ToolWorkflow):
        async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
            chat = self.start(row["question"])
            chat.add_response(await engine.agenerate(chat.request(self.sampling)))
            return await chat.finish(self.reward, row)

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + str(tokenizer.chat_template)
    agent = Child(tokenizer, gsm8k_reward, SamplingParams(), tools=[wants_two])
    [trajectory] = episode(agent, ScriptedEngine(replies=["#### 24"]))
    assert "wants_two" in tokenizer.decode(trajectory.token_ids)


@pytest.mark.parametrize("question", [None, 5, [], ["Hi"], [{"content": "Hi"}], {"role": "user"}])
def test_a_question_that_begins_no_conversation_is_named(question: Any):
    workflow = SingleTurnWorkflow(byte_tokenizer(), gsm8k_reward, SamplingParams())
    with pytest.raises(DataError, match=r"It takes a text, or a list of messages with `role`"):
        workflow.start(question)


def test_a_setting_that_the_constructor_would_overwrite_is_refused():
    with pytest.raises(ConfigError, match=r"Stubborn defines max_turns, which the constructor"):
        type("Stubborn", (MultiTurnWorkflow,), {"max_turns": 5})

    @dataclass(eq=False)
    class Patient(MultiTurnWorkflow):
        max_turns: int = 5

    assert Patient(byte_tokenizer(), gsm8k_reward, SamplingParams()).max_turns == 5


REWRITES = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}"
)


def test_parts_of_a_conversation_whose_template_forgets_are_all_in_the_group():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = REWRITES
    workflow = MultiTurnWorkflow(tokenizer, first_line, SamplingParams(), group_size=2)
    engine = ScriptedEngine(replies=lambda text: "1" if "again" in text else "0")
    group = episode(workflow, engine)
    samples = [trajectory.sample for trajectory in group]
    assert samples == [samples[0]] * 2 + [samples[2]] * 2
    assert samples[0] != samples[2]
    assert [tokenizer.decode(trajectory.token_ids)[-11:] for trajectory in group] == [
        "0<|im_end|>",
        "1<|im_end|>",
    ] * 2
    assert group_advantages([group]) == [[0.0] * 4]
    assert group[0].metrics == {}
