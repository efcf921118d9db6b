"""What the client makes of replies that are late, broken or wrong: never a guess, never a hang."""

import asyncio
import copy
import json
import math
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from arealite import background
from arealite.errors import ArealiteError, ServerError, TrajectoryError
from arealite.inference import connection
from arealite.inference.connection import Connection, NoAnswerError
from arealite.inference.reply import parse_reply
from arealite.inference.reply_formats import compact
from arealite.inference.server import ServerConfig
from arealite.inference.vllm import VLLMEngine
from arealite.testing import FaultProxy, ScriptedServer
from arealite.testing.fault_proxy import Fault
from arealite.testing.faults import (
    BAD_CHUNK,
    BAD_GENERATE_REPLIES,
    BYTE_ORDER_MARK,
    GZIP_LIE,
    HTML_PAGE,
    Blackhole,
    CloseIdle,
    CutBody,
    Delay,
    Duplicate,
    Oversized,
    Raw,
    Redirect,
    ReplaceBody,
    Reset,
    SetHeader,
    SlowBody,
    Status,
)
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from arealite.waits import report
from tests.inference.conformance import wait_until

pytest_plugins = ["arealite.testing.plugin"]

GENERATE = "/inference/v1/generate"
VOCAB_SIZE = 320
VERSION = 4
NEVER_S = 1000.0

StartEngine = Callable[..., VLLMEngine]


@pytest.fixture
def proxy(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
) -> FaultProxy:
    """In front of a scripted server."""
    return fault_proxy(scripted_server(vocab_size=VOCAB_SIZE).address)


@pytest.fixture
def engine(proxy: FaultProxy) -> Iterator[VLLMEngine]:
    """A client that has pushed weights."""
    with connected(proxy, ServerConfig()) as engine:
        yield engine


def connected(proxy: FaultProxy, cfg: ServerConfig) -> VLLMEngine:
    engine = VLLMEngine([proxy.address], cfg)
    engine.receive_weights([("weight", torch.zeros(2))], version=VERSION)
    return engine


def ask(engine: VLLMEngine, *prompt: int) -> ModelResponse:
    """A response of eight tokens."""
    request = ModelRequest(
        token_ids=list(prompt) or [1, 2, 3], sampling=SamplingParams(max_new_tokens=8)
    )
    return background.run(engine.agenerate(request), timeout_s=20, what="a request")


def break_generation(
    proxy: FaultProxy, fault: Fault, *, on: range | list[int] | None = None
) -> None:
    proxy.inject(fault, on=on, path=GENERATE)


def faults_met(proxy: FaultProxy) -> list[Fault | None]:
    """What became of each request to generate, in order, since the fault was injected."""
    return [exchange.fault for exchange in proxy.exchanges_of(GENERATE)]


@pytest.fixture
def truth(engine: VLLMEngine, proxy: FaultProxy) -> ModelResponse:
    """What the server answers; it is forgotten again that it was asked."""
    response = ask(engine)
    proxy.exchanges.clear()
    return response


# --- A server that fails for a moment (FAULTS 11-13) ----------------------------------------------


def test_a_burst_of_500_is_waited_out(engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse):
    break_generation(proxy, Status(500), on=range(3))
    began = time.monotonic()
    assert ask(engine) == truth
    assert time.monotonic() - began >= 0.1  # not one after the other at once
    assert faults_met(proxy) == [Status(500)] * 3 + [None]
    assert engine.take_metrics()["server/retries"] == 3


def test_a_server_that_always_fails_is_given_up_with_its_words(
    engine: VLLMEngine, proxy: FaultProxy
):
    break_generation(proxy, Status(500))
    with pytest.raises(ServerError, match=r"answered 500: .*injected"):
        ask(engine)
    assert 2 <= len(faults_met(proxy)) <= 10


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("is_date", [False, True])
def test_retry_after_is_honoured(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse, status: int, is_date: bool
):
    busy = Status(status, retry_after_s=1, is_date=is_date)
    break_generation(proxy, busy, on=[0])
    began = time.monotonic()
    assert ask(engine) == truth
    assert 0.99 <= time.monotonic() - began < 5
    assert faults_met(proxy) == [busy, None]


def test_a_server_that_asks_for_rest_gets_no_new_requests(engine: VLLMEngine, proxy: FaultProxy):
    break_generation(proxy, Status(429, retry_after_s=2), on=[0])
    asked = ModelRequest(token_ids=[1, 2, 3], sampling=SamplingParams(max_new_tokens=8))
    first = background.submit(engine.agenerate(asked))
    wait_until(lambda: len(faults_met(proxy)) == 1)
    others = [background.submit(engine.agenerate(asked)) for _ in range(4)]
    time.sleep(0.5)
    assert len(faults_met(proxy)) == 1
    assert "to be ready again (it answered 429 or 503 with Retry-After) (5 times)" in report()
    assert all(one.result(20) for one in [first, *others])
    assert len(faults_met(proxy)) == 6


def test_a_request_that_one_server_is_too_busy_for_goes_to_another(
    proxy: FaultProxy, scripted_server: Callable[..., ScriptedServer]
):
    other = scripted_server()
    with VLLMEngine([proxy.address, other.address]) as engine:
        engine.receive_weights([("weight", torch.zeros(2))], version=VERSION)
        break_generation(proxy, Status(503, retry_after_s=60))
        assert ask(engine).versions == [VERSION] * 8
        assert ask(engine).versions == [VERSION] * 8
        assert len(faults_met(proxy)) <= 1


def test_a_bad_request_is_refused_with_the_servers_reason_and_not_asked_again(
    engine: VLLMEngine, proxy: FaultProxy
):
    proxy.exchanges.clear()
    with pytest.raises(ServerError, match=r"400: .*Token id 320 is out of vocabulary"):
        ask(engine, VOCAB_SIZE)
    assert faults_met(proxy) == [None]


# --- A reply that does not come (FAULTS 14-15) ----------------------------------------------------


@pytest.mark.parametrize("fault", [Delay(NEVER_S), Blackhole(), Blackhole(is_forwarded=True)])
def test_a_reply_that_does_not_come_is_given_up_and_asked_for_again(
    proxy: FaultProxy, fault: Fault
):
    with connected(proxy, ServerConfig(request_timeout_s=0.3)) as engine:
        truth = ask(engine)
        break_generation(proxy, fault, on=[0])
        began = time.monotonic()
        assert ask(engine) == truth
        assert 0.3 <= time.monotonic() - began < 5
    assert faults_met(proxy)[-2:] == [fault, None]


@pytest.mark.parametrize("change", [lambda c: c.give_up("it is lost"), Connection.stop_clocks])
def test_a_server_may_be_given_up_in_the_moment_in_which_a_request_runs_out_of_time(
    change: Callable[[Connection], None],
):
    async def both_at_once() -> BaseException | None:
        loop, deadline, outcome = asyncio.get_running_loop(), asyncio.timeout(0), []
        given_up = Connection("http://127.0.0.1:9")

        def change_now() -> None:
            try:
                outcome.append(change(given_up))
            except RuntimeError as error:
                outcome.append(error)

        with suppress(TimeoutError):
            async with deadline:
                given_up._deadlines[deadline] = True
                loop.call_soon(change_now)
                await asyncio.sleep(1)
        return outcome[0]

    assert asyncio.run(both_at_once()) is None


def test_while_a_server_sleeps_only_responses_have_no_clock():
    async def outcomes() -> list[bool]:
        is_over = asyncio.Event()

        async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await is_over.wait()
            writer.close()

        silent = await asyncio.start_server(hold, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        connection = Connection(f"http://127.0.0.1:{port}")
        connection.stop_clocks()
        calls = [
            connection.post("/inference/v1/generate", b"{}", limit_s=0.1, echo=b"id"),
            connection.get("/metrics", limit_s=0.1),
            connection.post("/resume", b"{}", limit_s=0.1),
        ]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.wait(tasks, timeout=0.5)
        ended = [task.done() for task in tasks]
        connection.start_clocks()
        await asyncio.wait(tasks, timeout=2)
        ended += [isinstance(task.exception(), NoAnswerError) for task in tasks]
        is_over.set()
        await connection.close()
        silent.close()
        await silent.wait_closed()
        await asyncio.sleep(0.05)
        return ended

    assert asyncio.run(outcomes()) == [False, True, True, True, True, True]


def test_a_reply_much_slower_than_those_before_it_is_asked_for_again(proxy: FaultProxy):
    with connected(proxy, ServerConfig(patience_s=0.3)) as engine:
        truth = [ask(engine) for _ in range(16)][-1]
        break_generation(proxy, Delay(NEVER_S), on=[0])
        assert ask(engine) == truth
    assert faults_met(proxy)[-2:] == [Delay(NEVER_S), None]


def test_a_body_that_comes_byte_by_byte_is_given_up_and_asked_for_again(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 0.3)
    break_generation(proxy, SlowBody(), on=[0])
    assert ask(engine) == truth
    assert faults_met(proxy) == [SlowBody(), None]


# --- A reply that breaks on its way (FAULTS 16-18) ------------------------------------------------

BROKEN_ON_ITS_WAY = [
    CutBody(0),
    CutBody(1),
    CutBody(200),
    CutBody(200, is_announced=False),
    Reset(),
    Reset(is_forwarded=True),
    Raw(b""),
    Raw(b"\x00\xff no http\r\n\r\n"),
    BAD_CHUNK,
    HTML_PAGE,
    BYTE_ORDER_MARK,
    ReplaceBody(b"\x1f\x8b\x08\x00 packed"),
    SetHeader("Content-Length", "50"),
]


@pytest.mark.parametrize("fault", BROKEN_ON_ITS_WAY, ids=repr)
def test_a_reply_that_breaks_on_its_way_is_asked_for_again(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse, fault: Fault
):
    break_generation(proxy, fault, on=[0])
    assert ask(engine) == truth
    assert faults_met(proxy) == [fault, None]


def test_a_content_length_that_is_too_large_is_not_waited_for(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 0.3)
    break_generation(proxy, SetHeader("Content-Length", "100000"), on=[0])
    assert ask(engine) == truth


@pytest.mark.parametrize(
    "fault", [SetHeader("Content-Type", "text/html"), GZIP_LIE, SetHeader("X-Other", "1")]
)
def test_a_header_that_lies_about_a_good_body_does_no_harm(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse, fault: Fault
):
    break_generation(proxy, fault, on=[0])
    assert ask(engine) == truth


@pytest.mark.parametrize("fault", [Status(204), Redirect("http://127.0.0.1:9/elsewhere")])
def test_an_answer_that_is_no_reply_is_refused_and_not_followed(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse, fault: Fault
):
    break_generation(proxy, fault)
    with pytest.raises(ServerError, match=r"answered (204|307)"):
        ask(engine)
    assert faults_met(proxy) == [fault]


def test_connections_that_are_closed_while_idle_go_unnoticed(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse
):
    break_generation(proxy, CloseIdle())
    assert [ask(engine) for _ in range(8)] == [truth] * 8


@pytest.mark.parametrize("after_s", [0.0, 0.02])
def test_a_reply_that_comes_twice_counts_once(
    engine: VLLMEngine, proxy: FaultProxy, after_s: float
):
    prompts = [[i, 7, 7] for i in range(8)]
    truth = [ask(engine, *prompt) for prompt in prompts]
    break_generation(proxy, Duplicate(after_s))
    for prompt, response in zip(prompts, truth, strict=True):
        assert ask(engine, *prompt) == response
        time.sleep(2 * after_s)  # the second one arrives on an idle connection


def test_a_late_reply_is_taken_by_nobody(proxy: FaultProxy):
    prompts = [[i, 7, 7] for i in range(8)]
    with connected(proxy, ServerConfig(request_timeout_s=0.2)) as engine:
        truth = [ask(engine, *prompt) for prompt in prompts]
        break_generation(proxy, Delay(0.25), on=[0, 3, 6])
        assert [ask(engine, *prompt) for prompt in prompts] == truth


# --- A reply that is wrong (FAULTS 19-23) ---------------------------------------------------------

OF_OTHER_WEIGHTS = "span of a version that is no number"
"""Such a server is given the weights again before it is asked again."""
NO_JSON = ("log-prob is infinite", "log-prob is nan")
"""JSON has no such numbers, so that these are as if broken on their way."""


@pytest.mark.parametrize("name", sorted(BAD_GENERATE_REPLIES.keys() - {OF_OTHER_WEIGHTS, *NO_JSON}))
def test_a_wrong_reply_is_refused_and_not_asked_for_again(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse, name: str
):
    fault = BAD_GENERATE_REPLIES[name]
    break_generation(proxy, fault, on=[0])
    with pytest.raises(TrajectoryError):
        ask(engine)
    assert faults_met(proxy) == [fault]
    assert ask(engine) == truth  # the server and the client go on


@pytest.mark.parametrize("name", [OF_OTHER_WEIGHTS, *NO_JSON])
def test_a_wrong_reply_that_may_pass_is_not_taken_either(
    engine: VLLMEngine, proxy: FaultProxy, truth: ModelResponse, name: str
):
    fault = BAD_GENERATE_REPLIES[name]
    break_generation(proxy, fault, on=[0])
    assert ask(engine) == truth
    assert faults_met(proxy)[0] == fault


def test_replies_of_unknown_weights_end_with_an_error(engine: VLLMEngine, proxy: FaultProxy):
    break_generation(proxy, BAD_GENERATE_REPLIES[OF_OTHER_WEIGHTS])
    with pytest.raises(ArealiteError):
        ask(engine)


@pytest.mark.parametrize("body", [b"null", b"[]", b"{}", b"3", b'"text"', b'{"choices": 1}'])
def test_json_that_is_no_reply_is_refused(engine: VLLMEngine, proxy: FaultProxy, body: bytes):
    break_generation(proxy, ReplaceBody(body))
    with pytest.raises(TrajectoryError, match="is not what vLLM's"):
        ask(engine)


def test_a_reply_over_the_limit_is_refused_before_it_is_read_to_its_end(proxy: FaultProxy):
    cfg = ServerConfig(max_reply_bytes=2**20)
    with connected(proxy, cfg) as engine:
        break_generation(proxy, Oversized(2**30), on=[0])
        with pytest.raises(ServerError, match="more than 1,048,576 bytes"):
            ask(engine)
        ask(engine)
    [oversized] = [exchange for exchange in proxy.exchanges if exchange.fault is not None]
    assert oversized.num_bytes_sent < 2**26


# --- Any bytes at all, without a network ----------------------------------------------------------


def valid_reply() -> dict[str, Any]:
    """As vLLM sends it: five tokens, new weights after the third one."""
    entries = [{"token_id": 10 + i, "logprob": -0.5 * (i + 1), "rank": 1} for i in range(5)]
    return {
        "request_id": "generate-tokens-1",
        "usage": {"prompt_tokens": 3, "total_tokens": 8, "completion_tokens": 5},
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": [10, 11, 12, 13, 14],
                "logprobs": {"content": [entry | {"top_logprobs": [entry]} for entry in entries]},
                "weight_versions": [
                    {"version": "3", "start": 0, "end": 3},
                    {"version": "4", "start": 3, "end": 5},
                ],
            }
        ],
    }


def in_format(kind: str, reply: Any) -> bytes:
    """vLLM's valid JSON, or what our guard makes of it."""
    content = json.dumps(reply).encode()
    if kind == "json":
        return content
    compacted = compact(content)
    assert compacted is not None
    return compacted


FORMATS = pytest.mark.parametrize("kind", ["json", "compact"])


def assert_parsed_or_refused(content: bytes) -> ModelResponse | None:
    """A response in which everything fits, or one of our errors; either within 50 ms of work."""
    began = time.thread_time()
    try:
        response = parse_reply(content, vocab_size=VOCAB_SIZE, latest_version=VERSION)
    except ArealiteError as error:
        assert len(str(error)) < 1000
        response = None
    assert time.thread_time() - began < 0.05
    if response is not None:
        assert_fits_together(response)
    return response


def assert_fits_together(response: ModelResponse) -> None:
    length = len(response.token_ids)
    assert len(response.behavior_logprobs) == len(response.versions) == length
    assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in response.token_ids)
    assert all(math.isfinite(x) and -9998 < x < 1e-3 for x in response.behavior_logprobs)
    assert all(type(version) is int and 0 <= version <= VERSION for version in response.versions)
    assert response.versions == sorted(response.versions)
    assert response.finish_reason in ("stop", "length", "abort")


@FORMATS
def test_a_valid_reply_is_parsed(kind: str):
    assert parse_reply(in_format(kind, valid_reply())) == ModelResponse(
        token_ids=[10, 11, 12, 13, 14],
        behavior_logprobs=[-0.5, -1.0, -1.5, -2.0, -2.5],
        versions=[3, 3, 3, 4, 4],
        finish_reason="stop",
    )


@FORMATS
def test_a_reply_without_tokens_is_parsed(kind: str):
    reply = valid_reply()
    empty = {"token_ids": [], "logprobs": {"content": []}, "weight_versions": []}
    reply["choices"][0] |= empty | {"finish_reason": "abort"}
    reply["usage"]["completion_tokens"] = 0
    assert parse_reply(in_format(kind, reply)).token_ids == []


def test_every_bit_of_a_logprob_survives_both_formats():
    reply = valid_reply()
    exact = [-(2.0**-149), -0.1, -math.pi, -1e-300, -9997.999999999999]
    for entry, logprob in zip(reply["choices"][0]["logprobs"]["content"], exact, strict=True):
        entry["logprob"] = logprob
    for kind in ("json", "compact"):
        assert parse_reply(in_format(kind, reply)).behavior_logprobs == exact


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logprob_that_only_the_compact_format_can_hold_is_refused(place: int, value: float):
    reply = msgspec.msgpack.decode(in_format("compact", valid_reply()))
    logprobs = array("d", reply["logprobs"])
    logprobs[place] = value
    reply["logprobs"] = logprobs.tobytes()
    with pytest.raises(TrajectoryError, match=f"the log-prob {value}, which is not finite"):
        parse_reply(msgspec.msgpack.encode(reply))


@FORMATS
def test_no_beginning_of_a_reply_is_taken_for_a_reply(kind: str):
    content = in_format(kind, valid_reply())
    for end in range(len(content)):
        with pytest.raises(TrajectoryError, match="is not what vLLM's"):
            parse_reply(content[:end])


# Limits of the parser itself: depth, digits, size, repetition, encodings.
DEEP = 100_000
NASTY = {
    "empty": b"",
    "deep lists": b"[" * DEEP,
    "closed deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep lists in a field nobody reads": b'{"x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"choices": ' + b'{"a": ' * DEEP,
    "many digits": b'{"choices": [{"token_ids": [' + b"9" * 100_000 + b"]}]}",
    "a huge exponent": b'{"choices": [{"token_ids": [1e999999999]}]}',
    "many choices": b'{"choices": [' + b"{}," * 10_000 + b"{}]}",
    "a NUL": b"\x00",
    "a lone surrogate": b'{"choices": "\\ud800"}',
    "not UTF-8": b'{"choices": "\xff\xfe"}',
    "UTF-16": json.dumps(valid_reply()).encode("utf-16"),
    "two documents": json.dumps(valid_reply()).encode() * 2,
    "deep lists of MessagePack": b"\x91" * DEEP + b"\xc0",
    "a list of 4 billion items": b"\x81\xa9token_ids\xdd\xff\xff\xff\xff",
    "two documents of MessagePack": in_format("compact", valid_reply()) * 2,
}


@pytest.mark.parametrize("content", NASTY.values(), ids=NASTY)
def test_nasty_bytes_are_refused(content: bytes):
    assert assert_parsed_or_refused(content) is None


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(content: bytes):
    assert_parsed_or_refused(content)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 400)
    | st.integers()
    | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400])
    | st.floats()
    | st.sampled_from(["stop", "length", "abort", "context", "", "3", "4", "-1", "٣", "9" * 20])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(deadline=None)
@given(JSON_VALUES)
def test_any_json_is_parsed_or_refused(value: Any):
    assert_parsed_or_refused(json.dumps(value).encode())
    assert_parsed_or_refused(as_message_pack(value))


def as_message_pack(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except (OverflowError, UnicodeEncodeError):
        assume(False)
        raise


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON tree with each of its keys or indices."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


@FORMATS
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_a_mutilated_reply_is_parsed_or_refused(data: st.DataObject, kind: str):
    reply: Any = valid_reply()
    if kind == "compact":
        reply = msgspec.msgpack.decode(in_format(kind, reply))
    for _ in range(data.draw(st.integers(1, 3), label="mutations")):
        found = places(reply)
        if not found:
            break
        parent, key = found[data.draw(st.integers(0, len(found) - 1), label="place")]
        match data.draw(st.sampled_from(["delete", "replace", "repeat", "swap"]), label="mutation"):
            case "delete":
                del parent[key]
            case "replace":
                values = JSON_VALUES if kind == "json" else JSON_VALUES | st.binary(max_size=40)
                parent[key] = data.draw(values, label="value")
            case "repeat" if isinstance(parent, list):
                parent.insert(key, parent[key])
            case "swap":
                other, other_key = found[data.draw(st.integers(0, len(found) - 1), label="other")]
                parent[key] = copy.deepcopy(other[other_key])
    is_json = kind == "json"
    assert_parsed_or_refused(json.dumps(reply).encode() if is_json else as_message_pack(reply))


@FORMATS
@settings(deadline=None)
@given(at=st.integers(0, 10_000), foreign=st.binary(min_size=1, max_size=3))
@example(at=0, foreign=b"\xef\xbb\xbf")
def test_a_reply_with_foreign_bytes_in_it_is_parsed_or_refused(kind: str, at: int, foreign: bytes):
    content = in_format(kind, valid_reply())
    at %= len(content)
    assert_parsed_or_refused(content[:at] + foreign + content[at:])
    assert_parsed_or_refused(content[:at] + foreign + content[at + len(foreign) :])
