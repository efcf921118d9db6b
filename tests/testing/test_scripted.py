"""What the scripted engine adds to the contract of all engines: its script, and its pace."""

import asyncio

import pytest

from arealite.errors import TrajectoryError
from arealite.testing import ScriptedEngine, byte_tokenizer, run_with_virtual_clock
from arealite.types import ModelRequest, ModelResponse, SamplingParams

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def request(text: str = "2+2?", **sampling: int) -> ModelRequest:
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    return ModelRequest(token_ids=token_ids, sampling=SamplingParams(**sampling))


def test_each_turn_of_a_conversation_gets_the_next_reply():
    engine = ScriptedEngine(["a", "b"])

    async def converse(question: str) -> list[int]:
        first = request(question)
        response = await engine.agenerate(first)
        second = ModelRequest(
            token_ids=first.token_ids + response.token_ids, sampling=first.sampling
        )
        return response.token_ids + (await engine.agenerate(second)).token_ids

    expected = [*TOKENIZER.encode("a"), END, *TOKENIZER.encode("b"), END]
    assert [asyncio.run(converse(question)) for question in ("x?", "y?")] == [expected] * 2


def test_a_turn_without_a_reply_says_so():
    with pytest.raises(TrajectoryError, match="has 0 replies, but turn 1 was asked for"):
        asyncio.run(ScriptedEngine([]).agenerate(request()))


def test_a_function_sees_the_conversation_as_text():
    engine = ScriptedEngine(lambda conversation: conversation.upper())
    response = asyncio.run(engine.agenerate(request("abc")))
    assert response.token_ids == [*TOKENIZER.encode("ABC"), END]


def test_requests_are_recorded():
    engine = ScriptedEngine(["yes"])
    asyncio.run(engine.agenerate(request("2+2?")))
    assert engine.requests == [request("2+2?")]


@pytest.mark.parametrize(
    ("max_new_tokens", "max_model_len", "expected"),
    [(4, 100, "stop"), (3, 100, "length"), (100, 7, "context"), (3, 7, "length"), (4, 8, "stop")],
)
def test_a_reply_of_four_tokens_ends_for_the_right_reason(
    max_new_tokens: int, max_model_len: int, expected: str
):
    engine = ScriptedEngine(["yes"], max_model_len=max_model_len)
    response = asyncio.run(engine.agenerate(request("2+2?", max_new_tokens=max_new_tokens)))
    assert response.finish_reason == expected
    assert len(response.token_ids) == (4 if expected == "stop" else 3)


async def timed(engine: ScriptedEngine) -> tuple[ModelResponse, float]:
    response = await engine.agenerate(request())
    return response, asyncio.get_running_loop().time()


def test_every_token_takes_its_time():
    engine = ScriptedEngine(["yes"], seconds_per_token=2.5)
    _, seconds = run_with_virtual_clock(timed(engine))
    assert seconds == pytest.approx(4 * 2.5)


def test_each_token_is_of_the_version_that_was_there_when_its_time_had_come():
    engine = ScriptedEngine(["yes"], seconds_per_token=2.0)  # tokens after 2, 4, 6 and 8 s

    async def push_in_mid_generation() -> ModelResponse:
        generation = asyncio.create_task(engine.agenerate(request()))
        for version in (7, 8):
            await asyncio.sleep(2.5)
            engine.receive_weights([], version=version)
        return await generation

    assert run_with_virtual_clock(push_in_mid_generation()).versions == [0, 7, 8, 8]


def test_a_paused_request_stays_where_it_is_until_the_engine_is_resumed():
    engine = ScriptedEngine(["yes"], seconds_per_token=2.0)

    async def pause_for_an_hour() -> tuple[ModelResponse, float]:
        generation = asyncio.create_task(timed(engine))
        await asyncio.sleep(5)  # two tokens have come
        engine.pause()
        engine.receive_weights([], version=1)
        await asyncio.sleep(3600)
        assert not generation.done()
        engine.resume()
        return await generation

    response, seconds = run_with_virtual_clock(pause_for_an_hour())
    assert response.versions == [0, 0, 1, 1]
    # The third token was ready while the engine was paused; the fourth takes its 2 s.
    assert seconds == pytest.approx(5 + 3600 + 2)
