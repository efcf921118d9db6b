"""The calls of an episode as ledgers: what is continued, what begins anew, what is trained on."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import openai
import pytest

from arealite import background
from arealite.agents import Episode
from arealite.algo.advantages import step_advantages
from arealite.rollout.groups import flattened
from arealite.testing import ScriptedEngine
from tests.agents.conftest import (
    SAMPLING,
    TOKENIZER,
    Serve,
    Served,
    WatchedEngine,
    sampled_text,
)
from tests.rollout.chat_templates import template_tokenizer

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
END = "<|im_end|>"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def talk(each: Served, *turns: str, **settings: Any) -> list[Any]:
    """Say these, one after the other; the whole conversation."""
    messages: list[Any] = []
    for text in turns:
        messages += [user(text)]
        messages += [each.ask(messages, **settings).choices[0].message]
    return messages


def prompts(engine: ScriptedEngine) -> list[list[int]]:
    return [request.token_ids for request in engine.requests]


def test_a_conversation_is_one_ledger_to_which_each_turn_adds(serve: Serve):
    engine = ScriptedEngine(["a", "b", "c"])
    each = serve(engine)
    talk(each, "1", "2", "3")
    [trajectory] = each.trajectories(reward=0.25)
    assert TOKENIZER.decode(trajectory.token_ids) == (
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\nc<|im_end|>"
    )
    assert sampled_text(trajectory) == f"a{END}b{END}c{END}"
    assert trajectory.reward == 0.25
    assert trajectory.metrics == {"turns": 3.0, "tool_calls": 0.0, "forks": 0.0}
    first, second, third = prompts(engine)
    assert second[: len(first)] == first and third[: len(second)] == second


def with_arguments(call: dict[str, Any], arguments: str) -> dict[str, Any]:
    return call | {"function": call["function"] | {"arguments": arguments}}


AS_CLIENT = ("object", "dump", "dump without none", "by hand", "written anew")


@pytest.mark.parametrize("as_client", AS_CLIENT)
def test_an_answer_is_recognized_however_the_client_sends_it_back(serve: Serve, as_client: str):
    tokenizer = template_tokenizer("qwen2_5")
    each = serve(ScriptedEngine([CALL, "2"], tokenizer), tokenizer=tokenizer)
    told = each.ask("1+1?", tools=[TOOL]).choices[0].message
    calls = [call.model_dump() for call in told.tool_calls]
    back = {
        "object": told,
        "dump": told.model_dump(),
        "dump without none": told.model_dump(exclude_none=True),
        "by hand": {"role": "assistant", "tool_calls": calls},
        "written anew": {
            "role": "assistant",
            "tool_calls": [with_arguments(calls[0], '{"a":1.0}')],
        },
    }[as_client]
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "2"}
    each.ask([user("1+1?"), back, result], tools=[TOOL])
    [trajectory] = each.trajectories()
    assert trajectory.response_length == 2 * 1 + len(tokenizer.encode(CALL)) + 1
    assert trajectory.metrics == {"turns": 2.0, "tool_calls": 1.0, "forks": 0.0}


@pytest.mark.parametrize("arguments", ['{"a": 2}', "{", ""])
def test_other_arguments_are_an_edit(serve: Serve, arguments: str):
    tokenizer = template_tokenizer("qwen2_5")
    each = serve(ScriptedEngine(lambda _: CALL, tokenizer), tokenizer=tokenizer)
    told = each.ask("1+1?", tools=[TOOL]).choices[0].message
    call = with_arguments(told.tool_calls[0].model_dump(), arguments)
    edited = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "2"}
    each.ask([user("1+1?"), edited, result], tools=[TOOL])
    assert len(each.trajectories()) == 2


def test_results_of_parallel_calls_go_into_the_same_ledger(serve: Serve):
    tokenizer = template_tokenizer("qwen2_5")
    each = serve(ScriptedEngine([CALL + CALL, "2"], tokenizer), tokenizer=tokenizer)
    told = each.ask("1+1?", tools=[TOOL]).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"r{index}"}
        for index, call in enumerate(told.tool_calls)
    ]
    each.ask([user("1+1?"), told, *results], tools=[TOOL])
    [trajectory] = each.trajectories()
    text = tokenizer.decode(trajectory.token_ids)
    assert "r0\n</tool_response>\n<tool_response>\nr1" in text
    assert trajectory.metrics["forks"] == 0.0


def test_thoughts_that_the_client_does_not_send_back_are_kept(serve: Serve):
    each = serve(["<think>hm</think>a", "b"])
    each.ask([user("1"), {"role": "assistant", "content": "a"}, user("2")])  # nobody's answer
    reply = each.ask("1").choices[0].message
    each.ask([user("1"), {"role": "assistant", "content": reply.content}, user("2")])
    texts = each.sampled()
    assert f"<think>hm</think>a{END}b{END}" in texts


@pytest.mark.parametrize(
    "edited",
    [
        [user("1"), {"role": "assistant", "content": "A"}, user("2")],
        [user("one"), {"role": "assistant", "content": "a"}, user("2")],
        [{"role": "system", "content": "s"}, user("1"), {"role": "assistant", "content": "a"}],
        [user("2")],
    ],
)
def test_an_edited_history_begins_a_ledger_of_its_own(serve: Serve, edited: list[Any]):
    each = serve(lambda conversation: "a" if conversation.count("user") == 1 else "b")
    each.ask("1")
    each.ask(edited)
    first, second = each.trajectories()
    assert sampled_text(first) == f"a{END}"
    assert sum(second.loss_mask) == 2 and second.loss_mask[-2:] == [True, True]
    assert second.metrics["forks"] == 1.0


def test_other_tools_and_other_variables_of_the_template_begin_anew(serve: Serve):
    for change in ({"tools": [TOOL]}, {"extra_body": {"chat_template_kwargs": {"x": 1}}}):
        each = serve(["a", "b"])
        messages = talk(each, "1")
        each.ask([*messages, user("2")], **change)
        assert [len(sampled) for sampled in each.sampled()] == [11, 11]


def test_variables_of_the_template_reach_it(serve: Serve):
    tokenizer = template_tokenizer("qwen3")
    engine = ScriptedEngine(["a"], tokenizer)
    each = serve(engine, tokenizer=tokenizer)
    each.ask("1", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    each.ask("1", reasoning_effort="none")
    each.ask("1")
    texts = [tokenizer.decode(prompt) for prompt in prompts(engine)]
    assert [text.endswith("<think>\n\n</think>\n\n") for text in texts] == [True, True, False]


def test_calls_that_go_on_from_one_answer_train_it_once(serve: Serve):
    engine = WatchedEngine(["a", "b"])
    each = serve(engine)
    messages = talk(each, "1")
    engine.pause()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(each.ask, [*messages, user(f"2{i}")]) for i in range(3)]
        for _ in range(4):
            engine.began.get(timeout=10)
        engine.resume()
        assert [each.result().choices[0].message.content for each in asked] == ["b"] * 3
    assert sorted(each.sampled()) == [f"a{END}b{END}", f"b{END}", f"b{END}"]


def test_several_answers_to_one_call_are_ledgers_of_their_own(serve: Serve):
    engine = ScriptedEngine(["a", "b"])
    each = serve(engine)
    messages = talk(each, "1")
    reply = each.ask([*messages, user("2")], n=3)
    assert [choice.message.content for choice in reply.choices] == ["b"] * 3
    assert reply.usage.completion_tokens == 6
    assert sorted(each.sampled()) == [f"a{END}b{END}", f"b{END}", f"b{END}"]
    # All ask with the same tokens, and one conversation's requests go to one server.
    assert prompts(engine)[1] == prompts(engine)[2] == prompts(engine)[3]
    assert len({request.conversation for request in engine.requests[1:]}) == 1


def test_what_a_stop_text_ended_goes_on_with_the_stop_text_in_it(serve: Serve):
    engine = ScriptedEngine(["a STOP b", "c"])
    each = serve(engine)
    messages = talk(each, "1", "2", stop="STOP")
    assert messages[1].content == "a "
    assert each.sampled() == [f"a STOPc{END}"]
    assert "a STOP<|im_end|>" in TOKENIZER.decode(prompts(engine)[1])


def test_an_answer_that_was_cut_goes_on(serve: Serve):
    each = serve(["abcdef", "g"])
    messages = talk(each, "1", max_tokens=3)
    each.ask([*messages, user("2")])
    assert each.sampled() == [f"abcg{END}"]


def test_a_template_that_forgets_loses_no_token(serve: Serve):
    tokenizer = template_tokenizer("qwen3")
    engine = ScriptedEngine(lambda _: "<think>hm</think>\n\na", tokenizer)
    each = serve(engine, tokenizer=tokenizer)
    talk(each, "1", "2", "3")
    trajectories = each.trajectories()
    length = len(tokenizer.encode("<think>hm</think>\n\na")) + 1
    assert [trajectory.response_length for trajectory in trajectories] == [length] * 3
    assert [trajectory.metrics.get("forks") for trajectory in trajectories] == [None, None, 2.0]


# --- What goes wrong ------------------------------------------------------------------------------


def test_a_conversation_that_is_too_long_is_told_so_and_costs_nothing(serve: Serve):
    each = serve(ScriptedEngine(["a", "b"], max_model_len=60))
    messages = talk(each, "1")
    with pytest.raises(openai.BadRequestError) as refused:
        each.ask([*messages, user("x" * 60)])
    assert refused.value.code == "context_length_exceeded"
    assert each.episode.failure is None
    each.ask([*messages, user("2")])
    assert each.sampled() == [f"a{END}b{END}"]


def test_a_conversation_that_the_template_refuses_is_told_so(serve: Serve):
    tokenizer = template_tokenizer("gemma2")
    each = serve(ScriptedEngine(["a"], tokenizer), tokenizer=tokenizer)
    with pytest.raises(openai.BadRequestError, match="assistant in turn"):
        each.ask([user("1"), user("2")])


class HalfBroken(WatchedEngine):
    """Fails at the third request."""

    async def agenerate(self, request: Any) -> Any:
        if len(self.requests) == 2:
            self.requests.append(request)
            raise RuntimeError("out of luck")
        return await super().agenerate(request)


def test_an_answer_whose_continuation_failed_is_still_trained_on(serve: Serve):
    each = serve(HalfBroken(["a", "b"]))
    messages = talk(each, "1")
    with pytest.raises(openai.InternalServerError, match="RuntimeError: out of luck"):
        each.ask([*messages, user("2")], n=2)
    assert isinstance(each.episode.failure, RuntimeError)
    assert each.sampled() == [f"a{END}"]


@pytest.mark.fault(70, "a call that outlives its episode")
def test_a_call_that_outlives_the_episode_is_ended_and_not_trained_on(serve: Serve):
    engine = WatchedEngine(["a", "b"])
    each = serve(engine)
    messages = talk(each, "1")
    engine.began.get(timeout=10)
    engine.pause()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(each.ask, [*messages, user("2")], n=2)
        for _ in range(2):
            engine.began.get(timeout=10)
        background.loop().call_soon_threadsafe(each.episode.end)
        with pytest.raises(openai.AuthenticationError, match="is over"):
            asked.result(timeout=10)
    assert engine.cancelled.qsize() == 2
    assert each.sampled() == [f"a{END}"]


# --- Rewards --------------------------------------------------------------------------------------


def test_a_completion_can_be_rewarded_over_http_while_the_conversation_goes_on(serve: Serve):
    each = serve(["ab", "c", "d"])
    first = each.ask("1")
    messages = [user("1"), first.choices[0].message, user("2")]
    second = each.ask(messages)
    for completion, reward in ((first, 9.0), (first, 0.5), (second, -1.0)):
        body = {"reward": reward, "completion_id": completion.id}
        each.client.post("/reward", cast_to=object, body=body)
    each.ask([*messages, second.choices[0].message, user("3")])
    [trajectory] = each.trajectories()
    ends = [i for i, token_id in enumerate(trajectory.token_ids) if token_id == 2]  # <|im_end|>
    sampled_ends = [place for place in ends if trajectory.loss_mask[place]]
    assert trajectory.step_rewards == ((sampled_ends[0], 0.5), (sampled_ends[1], -1.0))
    assert each.episode.reward is None


def test_answers_beside_each_other_are_rewarded_apart(serve: Serve):
    each = serve(["a", "b", "c"])
    first, second = each.ask("1"), each.ask("2")
    last = each.ask([user("1"), first.choices[0].message, user("3")])
    for completion, reward in ((first, -1.0), (second, 1.0), (last, 0.0)):
        each.episode.set_reward(reward, completion_id=completion.id)
    *beside, latest = each.trajectories()
    group = flattened([replace(latest, earlier=tuple(beside))])
    [advantages] = step_advantages([group])
    gained = [
        [value for value, is_sampled in zip(values, t.loss_mask, strict=True) if is_sampled]
        for t, values in zip(group, advantages, strict=True)
    ]
    # An answer and its end token each; the third call goes on from the first.
    assert sorted(gained, key=len) == [[1.0, 1.0], [-1.0, -1.0, 0.0, 0.0]]


def test_the_latest_reward_of_the_episode_counts(serve: Serve):
    each = serve(["a"])
    each.client.post("/reward", cast_to=object, body={"reward": 1})
    each.client.post("/reward", cast_to=object, body={"reward": 0.5})
    assert each.episode.reward == 0.5


@pytest.mark.parametrize(
    "body",
    [{}, {"reward": "good"}, {"reward": 1, "why": "x"}, {"reward": 1, "completion_id": "no"}, []],
)
def test_what_is_no_reward_is_refused(serve: Serve, body: Any):
    with pytest.raises(openai.BadRequestError):
        serve(["a"]).client.post("/reward", cast_to=object, body=body)


def test_other_processes_find_the_episode_by_the_environment(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
):
    for name, value in serve(["Hello"]).episode.environment.items():
        monkeypatch.setenv(name, value)
    with openai.OpenAI() as client:
        reply = client.chat.completions.create(model="m", messages=[user("Hi")])  # type: ignore[list-item]
    assert reply.choices[0].message.content == "Hello"


def test_an_episode_begins_with_nothing():
    episode = Episode(ScriptedEngine([]), TOKENIZER, SAMPLING)
    assert (episode.last_text, episode.has_answers, episode.reward) == ("", False, None)
