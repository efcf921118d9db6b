"""Who may ask at which address, and what becomes of a call whose client goes away."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from arealite.agents import Endpoint, Episode
from arealite.errors import ConfigError, ServerError
from arealite.inference.vllm import VLLMEngine
from arealite.testing import ScriptedEngine, ScriptedServer
from tests.agents.conftest import (
    SAMPLING,
    TOKENIZER,
    BrokenEngine,
    Serve,
    WatchedEngine,
    sampled_text,
    served,
)

QUESTION = [{"role": "user", "content": "Hi"}]


def ask(base_url: str, api_key: str) -> str | None:
    with OpenAI(base_url=base_url, api_key=api_key) as client:
        reply = client.chat.completions.create(model="m", messages=QUESTION)  # type: ignore[arg-type]
        return reply.choices[0].message.content


def test_answers_whoever_has_the_key_of_the_episode(serve: Serve):
    episode = serve(["Hello"]).episode
    assert ask(episode.base_url, episode.api_key) == "Hello"


@pytest.mark.fault(69, "a wrong key, and that of another episode")
def test_refuses_a_wrong_key_and_that_of_another_episode(serve: Serve):
    episode, other = serve(["a"]).episode, serve(["b"]).episode
    for key in ("sk-wrong", other.api_key, f"{episode.api_key}x", "ключ".encode().decode("latin1")):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            ask(episode.base_url, key)


@pytest.mark.fault(69, "each path without a key")
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer \xff"])
@pytest.mark.parametrize("path", ["/chat/completions", "/reward", "/no/such/path"])
def test_refuses_a_call_without_a_key(serve: Serve, header: str | None, path: str):
    async def post() -> tuple[int, str]:
        headers = {} if header is None else {"Authorization": header}
        url = serve(["a"]).episode.base_url + path
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json={}, headers=headers) as reply,
        ):
            return reply.status, (await reply.json())["error"]["code"]

    assert asyncio.run(post()) == (401, "invalid_api_key")


@pytest.mark.fault(69, "the key of an episode that is over")
def test_refuses_an_episode_that_is_over_and_one_that_never_was(endpoint: Endpoint):
    episode = Episode(ScriptedEngine(["a", "b"]), TOKENIZER, SAMPLING)
    with served(endpoint, episode):
        ask(episode.base_url, episode.api_key)
    for base_url in (episode.base_url, f"{endpoint.address}/episodes/none/v1", endpoint.address):
        with pytest.raises(openai.AuthenticationError, match="while the episode runs"):
            ask(base_url, episode.api_key)


def test_says_which_path_there_is_not(serve: Serve):
    each = serve(["a"])
    with pytest.raises(openai.NotFoundError, match=r"no POST /chat/completions here\. Answers are"):
        ask(each.episode.base_url.removesuffix("/v1"), each.episode.api_key)
    client = each.client
    with pytest.raises(openai.NotFoundError, match="no POST /v1/responses here"):
        client.responses.create(model="m", input="Hi")


def test_knows_a_model_by_any_name(serve: Serve):
    client = serve(["a"]).client
    assert [model.id for model in client.models.list()] == ["policy"]
    assert client.models.retrieve("Qwen/Qwen2.5-7B").id == "Qwen/Qwen2.5-7B"


def test_many_episodes_at_once_know_nothing_of_each_other(serve: Serve):
    def say_it_again(conversation: str) -> str:
        return conversation.rpartition("user\n")[2].partition("<|im_end|>")[0]

    engine = ScriptedEngine(say_it_again)
    all_served = [serve(engine) for _ in range(8)]

    def talk(number: int) -> str:
        messages: list[dict[str, str]] = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"<{number}.{turn}>"})
            reply = all_served[number].ask(messages)
            messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        return "".join(f"{message['content']}<|im_end|>" for message in messages[1::2])

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(talk, range(8)))
    assert told[3] == "<3.0><|im_end|><3.1><|im_end|><3.2><|im_end|>"
    assert [each.sampled() for each in all_served] == [[text] for text in told]


# --- Clients that go away -------------------------------------------------------------------------


@pytest.mark.fault(70, "a client goes away in the middle of a call")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_call_that_its_client_gives_up_is_aborted_and_not_trained_on(
    serve: Serve, is_streamed: bool
):
    engine = WatchedEngine(["first", "second", "third"])
    each = serve(engine)
    messages = [{"role": "user", "content": "a"}]
    messages += [each.ask(messages).choices[0].message, {"role": "user", "content": "b"}]
    engine.began.get(timeout=10)

    async def give_up() -> None:
        async with AsyncOpenAI(
            base_url=each.client.base_url, api_key=each.client.api_key
        ) as client:
            asking = asyncio.create_task(
                client.chat.completions.create(model="m", messages=messages, stream=is_streamed)  # type: ignore[arg-type]
            )
            await asyncio.to_thread(engine.began.get, timeout=10)
            asking.cancel()
            await asyncio.wait([asking])

    engine.pause()
    asyncio.run(give_up())
    assert TOKENIZER.decode(engine.cancelled.get(timeout=10).token_ids).count("user") == 2
    engine.resume()
    assert each.sampled() == ["first<|im_end|>"]


def test_a_call_that_timed_out_may_be_made_again(serve: Serve):
    engine = WatchedEngine(["in time"])
    each = serve(engine)
    engine.pause()
    with pytest.raises(openai.APITimeoutError):
        each.client.with_options(timeout=0.05, max_retries=1).chat.completions.create(
            model="m",
            messages=QUESTION,  # type: ignore[arg-type]
        )
    for _ in range(2):  # the client's own second try, too
        engine.cancelled.get(timeout=10)
    engine.resume()
    assert each.ask("Hi").choices[0].message.content == "in time"
    assert each.sampled() == ["in time<|im_end|>"]


def test_a_server_is_told_that_nobody_waits_any_more(serve: Serve):
    def script(prompt: list[int]) -> list[int]:
        is_quick = "quick" in TOKENIZER.decode(prompt)
        return TOKENIZER.encode("ok<|im_end|>") if is_quick else [70] * 400

    with (
        ScriptedServer(script, max_num_seqs=1, tokens_per_s=20) as server,
        VLLMEngine([server.address]) as engine,
    ):
        engine.receive_weights([("weight", torch.ones(1))], version=0)
        each = serve(engine)
        with pytest.raises(openai.APITimeoutError):
            each.client.with_options(timeout=0.2, max_retries=0).chat.completions.create(
                model="m",
                messages=QUESTION,  # type: ignore[arg-type]
            )
        # It has one place, and the first call would keep it for ten seconds.
        patient = each.client.with_options(timeout=5, max_retries=0)
        reply = patient.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "quick"}]
        )
        assert reply.choices[0].message.content == "ok"
        assert [sampled_text(part) for part in each.trajectories()] == ["ok<|im_end|>"]


# --- Engines that fail ----------------------------------------------------------------------------


def test_a_failure_of_the_engine_is_an_error_of_the_server_and_is_not_asked_again(serve: Serve):
    engine = BrokenEngine(ServerError("No server is left."), failures=5)
    each = serve(engine)
    with pytest.raises(openai.InternalServerError, match=r"ServerError: No server is left\."):
        each.ask("Hi")
    assert engine.failures == 4
    assert each.episode.failure is engine.error


@pytest.mark.fault(71, "the engine fails once, and the agent asks again")
def test_a_failure_that_was_overcome_is_none(serve: Serve):
    each = serve(BrokenEngine(ServerError("busy"), ["now"], failures=1))
    with pytest.raises(openai.InternalServerError):
        each.ask("Hi")
    each.ask("Hi")
    assert each.episode.failure is None


# --- The address ----------------------------------------------------------------------------------


def test_says_that_it_cannot_listen_there(endpoint: Endpoint):
    port = int(endpoint.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"No endpoint for agents at 127.0.0.1:{port}"):
        Endpoint(port=port)


def test_goes_by_the_name_of_the_host_where_it_listens_at_all_addresses():
    with Endpoint("0.0.0.0") as endpoint:
        assert endpoint.address.startswith(f"http://{socket.gethostname()}:")


def test_nobody_answers_once_it_is_closed(endpoint: Endpoint):
    with Endpoint() as closed:
        address = closed.address
    closed.close()  # twice is not too often
    client = OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.models.list()
