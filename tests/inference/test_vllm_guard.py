"""The token on every path, and the end of a pause whose trainer is gone; then on real vLLM."""

import asyncio
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from arealite.errors import ConfigError, ServerError
from arealite.inference import vllm_guard
from arealite.inference.reply_formats import COMPACT, read_reply
from arealite.inference.server import ServerConfig, serve
from arealite.inference.tokens import CLIENT_HEADER, TOKEN, find_token
from arealite.inference.vllm import VLLMEngine
from arealite.inference.vllm_guard import Guard
from arealite.types import ModelRequest, SamplingParams
from tests.inference.parity import checkpoint, push
from tests.real_server import RealServer

SECRET = "sentinel-5f1c0c9e"


class App:
    """What the guard stands in front of: remembers what comes through, and answers with `parts`."""

    def __init__(self, *parts: bytes, status: int = 200) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self._parts, self._status = parts or (b"{}",), status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        self.seen.append((scope["path"], body))
        if b"is_abandoned" in body:
            raise RuntimeError("this weight update was abandoned")
        length = sum(map(len, self._parts))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        for part in self._parts:
            is_last = part is self._parts[-1]
            await send({"type": "http.response.body", "body": part, "more_body": not is_last})

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]


async def ask(guard: Guard, method: str, path: str, **headers: str) -> int:
    """Status of one request."""
    return (await exchange(guard, method, path, **headers))[0]


async def exchange(
    guard: Guard, method: str, path: str, **headers: str
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the reply to one request."""
    state = SimpleNamespace(vllm_config=None)
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        "app": SimpleNamespace(state=state),
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await guard(scope, receive, send)
    body = b"".join(message["body"] for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


@pytest.mark.parametrize(
    "authorization", ["", SECRET, f"Basic {SECRET}", f"Bearer {SECRET}x", "Bearer ", "Bearer nön"]
)
def test_every_path_but_health_asks_for_the_token(
    authorization: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(TOKEN, SECRET)
    app = App()
    guard = Guard(app)

    async def sweep() -> list[int]:
        paths = ["/pause", "/v1/models", "/", "/metrics", "/health/../pause", "/Health", "/healthz"]
        return [await ask(guard, "POST", path, Authorization=authorization) for path in paths]

    assert asyncio.run(sweep()) == [401] * 7
    assert app.paths() == []
    assert asyncio.run(ask(guard, "GET", "/health")) == 200
    assert asyncio.run(ask(guard, "GET", "/v1/models", Authorization=f"Bearer {SECRET}")) == 200


def test_a_pause_ends_when_its_client_is_gone_and_an_open_update_is_closed_first(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(vllm_guard, "LEASE_S", 0.1)
    app = App()

    async def trainer_dies() -> None:
        guard = Guard(app)
        await ask(guard, "POST", "/pause", **{CLIENT_HEADER: "trainer"})
        await ask(guard, "POST", "/start_weight_update", **{CLIENT_HEADER: "trainer"})
        await ask(guard, "GET", "/weight_info", **{CLIENT_HEADER: "somebody else"})
        await asyncio.sleep(0.3)

    asyncio.run(trainer_dies())
    assert app.paths()[3:] == ["/update_weights", "/update_weight_version", "/resume"]
    assert json.loads(app.seen[4][1]) == {"new_version": "unfinished-update"}


def test_a_pause_lasts_while_its_client_is_heard_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_guard, "LEASE_S", 0.2)
    app = App()

    async def trainer_lives() -> None:
        guard = Guard(app)
        await ask(guard, "POST", "/pause", **{CLIENT_HEADER: "trainer"})
        for _ in range(10):
            await asyncio.sleep(0.05)
            await ask(guard, "GET", "/weight_info", **{CLIENT_HEADER: "trainer"})
        await ask(guard, "POST", "/resume", **{CLIENT_HEADER: "trainer"})
        await asyncio.sleep(0.4)

    asyncio.run(trainer_lives())
    assert app.paths().count("/resume") == 1


def test_a_server_whose_trainer_died_while_it_slept_is_woken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_guard, "LEASE_S", 0.05)
    monkeypatch.setattr(vllm_guard, "SLEEP_LEASE_S", 0.4)
    app = App()

    async def trainer_dies(*paths: str) -> None:
        guard = Guard(app)
        for path in paths:
            await ask(guard, "POST", path, **{CLIENT_HEADER: "trainer"})
        asked = len(app.seen)
        await asyncio.sleep(0.2)  # training takes its time
        assert len(app.seen) == asked
        await asyncio.sleep(0.5)

    asyncio.run(trainer_dies("/pause", "/sleep"))
    assert app.paths() == ["/pause", "/sleep", "/wake_up", "/resume"]
    app.seen.clear()
    asyncio.run(trainer_dies("/pause", "/sleep", "/wake_up?tags=weights", "/start_weight_update"))
    assert app.paths()[4:] == ["/update_weights", "/update_weight_version", "/wake_up", "/resume"]


def test_a_server_that_was_woken_has_the_lease_of_any_pause(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_guard, "LEASE_S", 0.05)
    app = App()

    async def trainer_dies() -> None:
        guard = Guard(app)
        for path in ("/pause", "/sleep", "/wake_up"):
            await ask(guard, "POST", path, **{CLIENT_HEADER: "trainer"})
        await asyncio.sleep(0.3)

    asyncio.run(trainer_dies())
    assert app.paths() == ["/pause", "/sleep", "/wake_up", "/resume"]


def test_a_pause_by_hand_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_guard, "LEASE_S", 0.05)
    app = App()

    async def by_hand() -> None:
        await ask(Guard(app), "POST", "/pause")
        await asyncio.sleep(0.2)

    asyncio.run(by_hand())
    assert app.paths() == ["/pause"]


def test_the_token_comes_from_a_file_that_only_its_owner_can_read(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    file.chmod(0o600)
    assert find_token(str(file)) == SECRET
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others: chmod 600"):
        find_token(str(file))
    with pytest.raises(ConfigError, match="No such file"):
        find_token(str(tmp_path / "none"))
    file.chmod(0o600)
    file.write_text("")
    with pytest.raises(ConfigError, match="holds no token"):
        find_token(str(file))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "my-host"])
def test_a_server_that_other_machines_can_reach_needs_a_token(
    host: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ConfigError, match=r"can be reached from other machines.*AREALITE_TOKEN"):
        serve("arealite/tiny-math", ServerConfig(host=host))


GENERATE = "/inference/v1/generate"
SAMPLED = {
    "request_id": "generate-tokens-7",
    "choices": [
        {
            "token_ids": [5, 6],
            "finish_reason": "stop",
            "logprobs": {"content": [{"logprob": -0.25}, {"logprob": -1.5}]},
            "weight_versions": [{"version": "3", "start": 0, "end": 2}],
        }
    ],
    "usage": {"completion_tokens": 2},
}
BODY = json.dumps(SAMPLED).encode()


def ask_to_generate(app: App, accept: str) -> tuple[int, dict[bytes, bytes], bytes]:
    return asyncio.run(exchange(Guard(app), "POST", GENERATE, Accept=accept))


@pytest.mark.parametrize("parts", [[BODY], [BODY[:9], BODY[9:], b""]], ids=["whole", "in parts"])
def test_a_client_that_accepts_it_gets_the_same_facts_in_fewer_bytes(parts: list[bytes]):
    status, headers, body = ask_to_generate(App(*parts), f"{COMPACT}, application/json")
    assert (status, headers[b"content-type"]) == (200, COMPACT.encode())
    assert int(headers[b"content-length"]) == len(body) < len(BODY)
    assert read_reply(body) == read_reply(BODY)
    assert b"generate-tokens-7" in body  # by which a client knows the reply to its own request


@pytest.mark.parametrize("accept", ["", "*/*", "application/json"])
def test_other_clients_get_what_the_server_sends(accept: str):
    _, headers, body = ask_to_generate(App(BODY), accept)
    assert (headers[b"content-type"], body) == (b"application/json", BODY)


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{}", 200), (BODY[:-1], 200), (b"", 200), (b"\xff", 200), (BODY, 500)],
    ids=["other facts", "cut", "empty", "no text", "an error"],
)
def test_what_is_no_reply_with_tokens_is_passed_on_as_it_is(content: bytes, status: int):
    told, headers, body = ask_to_generate(App(content, status=status), COMPACT)
    assert (told, headers[b"content-type"], body) == (status, b"application/json", content)
    assert int(headers[b"content-length"]) == len(content)


# --- Real vLLM ------------------------------------------------------------------------------------


untied = pytest.mark.parametrize("tiny_model", ["untied"], indirect=True)
"""Either model would do: for these tests one is enough."""


def fetch(server: RealServer, method: str, path: str, body: bytes = b"{}", **headers: str) -> bytes:
    """The reply to one request that shows the token."""
    request = urllib.request.Request(
        server.address + path,
        data=body if method == "POST" else None,
        method=method,
        headers={
            "Authorization": f"Bearer {server.token}",
            "Content-Type": "application/json",
            **headers,
        },
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read()


def status_without_token(method: str, url: str) -> int:
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(url, data=body, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


@untied
def test_every_route_of_a_protected_server_answers_401_but_health(vllm_server: RealServer):
    address = vllm_server.address
    documented = json.loads(fetch(vllm_server, "GET", "/openapi.json"))["paths"]
    assert {"/pause", "/collective_rpc", "/inference/v1/generate"} <= set(documented)
    others = ["/", "/docs", "/openapi.json", "/metrics", "/nothing", "/arealite/model"]
    routes = [(m.upper(), path) for path, methods in documented.items() for m in methods]
    routes += [("GET", path) for path in others]
    open_routes = [
        route for route in routes if status_without_token(route[0], address + route[1]) != 401
    ]
    assert open_routes == [("GET", "/health")]
    assert status_without_token("GET", address + "/health") == 200


@untied
def test_the_token_is_in_no_log_process_list_exception_or_file(vllm_server: RealServer):
    token = vllm_server.token
    with pytest.raises(ServerError, match=r"asks for a token\. Set AREALITE_TOKEN") as refused:
        VLLMEngine([vllm_server.address])
    assert token not in repr(refused.value)

    with VLLMEngine([vllm_server.address], vllm_server.cfg) as engine:
        push(engine, checkpoint(vllm_server.model), 0)
        request = ModelRequest(token_ids=[7] * 8, sampling=SamplingParams(max_new_tokens=4))
        asyncio.run(engine.agenerate(request))
        assert token not in repr(vars(engine)) + repr(vllm_server.cfg)
    for process in psutil.process_iter():
        try:
            assert token not in " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    files = [path for path in vllm_server.run_dir.rglob("*") if path.is_file()]
    assert any(path.name == "server-0.log" for path in files)
    assert [path for path in files if token in path.read_text(errors="replace")] == []


@untied
def test_a_real_server_tells_the_same_in_both_formats(vllm_server: RealServer):
    sampling = {"max_tokens": 9, "logprobs": 0, "temperature": 0.0, "detokenize": False}
    request = {"token_ids": [3, 4, 5], "sampling_params": sampling, "request_id": "same"}
    body = json.dumps(request).encode()
    bodies = [
        fetch(vllm_server, "POST", GENERATE, body, Accept=accept)
        for accept in (COMPACT, "application/json")  # greedy, so that both are alike
    ]
    assert len(bodies[0]) * 4 < len(bodies[1])
    assert read_reply(bodies[0]) == read_reply(bodies[1])


@untied
def test_a_server_says_how_many_tokens_its_model_has_and_how_many_sequences_it_samples(
    vllm_server: RealServer,
):
    told = json.loads(fetch(vllm_server, "GET", "/arealite/model"))
    assert told == {
        "weights_dir": "",
        "vocab_size": 320,
        "max_num_seqs": 128,
        "num_workers": 1,
    }


@untied
def test_a_pause_by_a_trainer_that_died_ends_on_the_server(vllm_server: RealServer):
    fetch(vllm_server, "POST", "/pause?mode=keep", **{CLIENT_HEADER: f"dead-{os.getpid()}"})

    def is_paused() -> bool:
        return bool(json.loads(fetch(vllm_server, "GET", "/is_paused"))["is_paused"])

    assert is_paused()
    assert asyncio.run(_until(lambda: not is_paused(), within_s=vllm_guard.LEASE_S + 10))


async def _until(holds: Any, *, within_s: float) -> bool:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.5)
    return True
