"""The token on every path, and the end of a pause whose trainer is gone; then on real vLLM."""

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from arealite.errors import ConfigError, ServerError
from arealite.inference import vllm_guard
from arealite.inference.server import ServerConfig, serve
from arealite.inference.tokens import CLIENT_HEADER, TOKEN, find_token
from arealite.inference.vllm import VLLMEngine
from arealite.inference.vllm_guard import Guard
from arealite.testing import make_tiny_model
from arealite.types import ModelRequest, SamplingParams
from tests.inference.parity import checkpoint, push

SECRET = "sentinel-5f1c0c9e"


class App:
    """What the guard stands in front of: remembers what comes through."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        self.seen.append((scope["path"], body))
        if b"is_abandoned" in body:
            raise RuntimeError("this weight update was abandoned")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]


async def ask(guard: Guard, method: str, path: str, **headers: str) -> int:
    """Status of one request."""
    state = SimpleNamespace(vllm_config=None)
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        "app": SimpleNamespace(state=state),
    }
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status", 0))

    await guard(scope, receive, send)
    return statuses[0]


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


# --- Real vLLM ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, str]]:
    """Address of a server that asks for a token, the folder of its run, and its model."""
    folder = tmp_path_factory.mktemp("protected")
    model = make_tiny_model(folder / "model")
    token_file = folder / "secret" / "token"
    token_file.parent.mkdir()
    token_file.write_text(SECRET)
    token_file.chmod(0o600)
    cfg = ServerConfig(token_file=str(token_file))
    with serve(model, cfg, log_dir=folder / "run") as servers:
        yield servers.addresses[0], folder / "run", model


def status(method: str, url: str, token: str = "") -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_every_route_of_a_protected_server_answers_401_but_health(
    protected: tuple[str, Path, str],
):
    address = protected[0]
    request = urllib.request.Request(
        f"{address}/openapi.json", headers={"Authorization": f"Bearer {SECRET}"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        documented = json.load(reply)["paths"]
    assert {"/pause", "/collective_rpc", "/inference/v1/generate"} <= set(documented)
    others = ["/", "/docs", "/openapi.json", "/metrics", "/nothing", "/arealite/model"]
    routes = [(m.upper(), path) for path, methods in documented.items() for m in methods]
    routes += [("GET", path) for path in others]
    open_routes = [route for route in routes if status(route[0], address + route[1]) != 401]
    assert open_routes == [("GET", "/health")]
    assert status("GET", address + "/health") == 200


def test_the_token_is_in_no_log_process_list_exception_or_file(protected: tuple[str, Path, str]):
    address, run_dir, model = protected
    with pytest.raises(ServerError, match=r"asks for a token\. Set AREALITE_TOKEN") as refused:
        VLLMEngine([address])
    assert SECRET not in repr(refused.value)

    token_file = run_dir.parent / "secret" / "token"
    cfg = ServerConfig(token_file=str(token_file))
    with VLLMEngine([address], cfg) as engine:
        push(engine, checkpoint(model), 0)
        request = ModelRequest(token_ids=[7] * 8, sampling=SamplingParams(max_new_tokens=4))
        asyncio.run(engine.agenerate(request))
        assert SECRET not in repr(vars(engine)) + repr(cfg)
    for process in psutil.process_iter():
        try:
            assert SECRET not in " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.name == "server-0.log" for path in files)
    assert [path for path in files if SECRET in path.read_text(errors="replace")] == []


def test_a_server_says_how_many_tokens_its_model_has_and_how_many_sequences_it_samples(
    protected: tuple[str, Path, str],
):
    request = urllib.request.Request(
        f"{protected[0]}/arealite/model", headers={"Authorization": f"Bearer {SECRET}"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert json.load(reply) == {"vocab_size": 320, "max_num_seqs": 128}


def test_a_pause_by_a_trainer_that_died_ends_on_the_server(protected: tuple[str, Path, str]):
    address, _, _ = protected
    headers = {"Authorization": f"Bearer {SECRET}", CLIENT_HEADER: f"dead-{os.getpid()}"}

    def call(method: str, path: str) -> bytes:
        body = b"{}" if method == "POST" else None
        request = urllib.request.Request(
            address + path,
            data=body,
            method=method,
            headers=headers | {"Content-Type": "text/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.read()

    def is_paused() -> bool:
        del headers[CLIENT_HEADER]
        try:
            return bool(json.loads(call("GET", "/is_paused"))["is_paused"])
        finally:
            headers[CLIENT_HEADER] = "somebody else"

    call("POST", "/pause?mode=keep")
    assert is_paused()
    deadline = asyncio.run(_until(lambda: not is_paused(), within_s=vllm_guard.LEASE_S + 10))
    assert deadline


async def _until(holds: Any, *, within_s: float) -> bool:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.5)
    return True
