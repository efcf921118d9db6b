"""Faults of real vLLM servers: each is noticed, mended, and never changes what a token is worth."""

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from arealite import background
from arealite.errors import ServerError
from arealite.inference.server import ServerConfig, Servers, serve
from arealite.inference.vllm import VLLMEngine
from arealite.testing import make_tiny_model
from arealite.testing.fault_proxy import FaultProxy
from arealite.testing.faults import Status
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from tests.inference.parity import (
    LIMIT,
    Reference,
    Weights,
    checkpoint,
    gap,
    make_prompts,
    perturbed,
    push,
)
from tests.oracle import Surroundings

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def servers(model: str, tmp_path: Path) -> Iterator[Servers]:
    """Two servers, which leave nothing behind."""
    before = Surroundings.now()
    with serve(model, ServerConfig(num_cpu_servers=2), log_dir=tmp_path) as servers:
        yield servers
    before.assert_unchanged(within_s=10)


@pytest.fixture
def engine(servers: Servers) -> Iterator[VLLMEngine]:
    with VLLMEngine(servers) as engine:
        yield engine


@pytest.fixture
def weights(model: str) -> dict[int, Weights]:
    return {version: perturbed(checkpoint(model), seed=version) for version in range(4)}


def api_server(address: str) -> psutil.Process:
    """The process that listens at the address."""
    port = int(address.rpartition(":")[2])
    for process in psutil.process_iter():
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            continue
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            return process
    raise LookupError(address)


def part(address: str, name: str) -> psutil.Process:
    """A process below the API server: EngineCore or Worker."""
    children = api_server(address).children(recursive=True)
    return next(child for child in children if name in child.name())


def start_generating(engine: VLLMEngine, count: int = 16) -> "Future[list[ModelResponse]]":
    """Long responses, some on each server, all of them begun."""

    async def generate() -> list[ModelResponse]:
        sampling = SamplingParams(max_new_tokens=480, ignore_eos=True)
        requests = [
            ModelRequest(token_ids=prompt, sampling=sampling) for prompt in make_prompts(count)
        ]
        return list(await asyncio.gather(*map(engine.agenerate, requests)))

    running = background.submit(generate())
    time.sleep(0.5)
    assert not running.done()
    return running


def wait_until(holds: Callable[[], bool], within_s: float) -> float:
    """Seconds until it holds."""
    began_s = time.monotonic()
    while not holds():
        assert time.monotonic() - began_s < within_s
        time.sleep(0.05)
    return time.monotonic() - began_s


def state(engine: VLLMEngine, index: int) -> str:
    return engine._fleet.servers[index].state


def assert_all_agree(
    responses: list[ModelResponse], weights: dict[int, Weights], model: str, count: int = 16
) -> None:
    """Every response is whole, and each token has the log-prob of the weights that it names."""
    assert [len(response.token_ids) for response in responses] == [480] * count
    assert gap(Reference(model), weights, make_prompts(count), responses, 1.0) <= LIMIT


def assert_serves_again(engine: VLLMEngine, index: int, version: int) -> None:
    wait_until(lambda: state(engine, index) == "serving", within_s=120)
    assert engine._fleet.servers[index].version == version


KILLS = [
    pytest.param(
        "API server",
        signal.SIGKILL,
        5,
        id="api",
        marks=[
            pytest.mark.fault(1, "kill -9 of the API server while it generates"),
            pytest.mark.fault(2, "the same; its engine and worker live on as orphans"),
        ],
    ),
    pytest.param(
        "EngineCore",
        signal.SIGKILL,
        10,
        id="engine",
        marks=pytest.mark.fault(3, "kill -9 of EngineCore"),
    ),
    pytest.param(
        "Worker", signal.SIGKILL, 10, id="worker", marks=pytest.mark.fault(3, "kill -9 of a worker")
    ),
    pytest.param(
        "EngineCore",
        signal.SIGSTOP,
        15,
        id="hang",
        marks=pytest.mark.fault(4, "SIGSTOP of EngineCore; /health still answers 200"),
    ),
]


@pytest.mark.parametrize(("victim", "kind", "within_s"), KILLS)
def test_requests_go_elsewhere_and_the_server_comes_back_with_the_weights(
    engine: VLLMEngine,
    servers: Servers,
    weights: dict[int, Weights],
    model: str,
    victim: str,
    kind: signal.Signals,
    within_s: float,
):
    push(engine, weights[0], 0)
    running = start_generating(engine)
    address = servers.addresses[0]
    root = api_server(address)
    family = [root, *root.children(recursive=True)]
    process = root if victim == "API server" else part(address, victim)
    process.send_signal(kind)
    wait_until(lambda: state(engine, 0) == "down", within_s)
    push(engine, weights[1], 1)  # which it misses
    responses = running.result(120)
    assert_all_agree(responses, weights, model)
    wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in family), 20)
    assert_serves_again(engine, 0, version=1)
    assert_all_agree(start_generating(engine).result(120), weights, model)


@pytest.mark.fault(5, "SIGSTOP of EngineCore for 3 s")
def test_a_server_that_stalls_for_three_seconds_is_not_given_up(
    engine: VLLMEngine, servers: Servers, weights: dict[int, Weights], model: str
):
    push(engine, weights[0], 0)
    running = start_generating(engine)
    process = part(servers.addresses[0], "EngineCore")
    process.suspend()
    time.sleep(3)
    process.resume()
    assert_all_agree(running.result(120), weights, model)
    assert part(servers.addresses[0], "EngineCore") == process
    assert engine.take_metrics()["server/lost"] == 0


@pytest.mark.fault(36, "a proxy answers 500 to /update_weights of one of two servers")
def test_a_server_that_refuses_an_update_is_left_out_until_it_has_the_weights(
    servers: Servers, weights: dict[int, Weights], model: str
):
    with (
        FaultProxy(servers.addresses[0]) as proxy,
        VLLMEngine([proxy.address, servers.addresses[1]]) as engine,
    ):
        push(engine, weights[0], 0)
        running = start_generating(engine)
        proxy.inject(Status(500), path="/update_weights", on=[0, 1])
        push(engine, weights[1], 1)
        assert state(engine, 0) == "stale"
        assert_serves_again(engine, 0, version=1)
        assert_all_agree(running.result(120), weights, model)
        assert_all_agree(start_generating(engine).result(120), weights, model)


DYING_TRAINER = """
import os, signal, sys, time
from arealite.inference import transport
from arealite.inference.vllm import VLLMEngine
from tests.inference.parity import checkpoint
address, model, moment = sys.argv[1:]
engine = VLLMEngine([address])
engine.pause()
if moment == "while paused":
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "with half of a layer":
    transport.BUCKET_BYTES = 1  # each tensor in a message of its own
send = engine._pusher._post_each
def dying(servers, path, body):
    if path == "/update_weights" and moment == "in the middle of an update":
        os.kill(os.getpid(), signal.SIGKILL)
    if moment == "with half of a layer" and "up_proj" in str(body):
        os.kill(os.getpid(), signal.SIGKILL)
    if path == "/finish_weight_update" and moment == "before the version":
        send(servers, path, {})
        os.kill(os.getpid(), signal.SIGKILL)
    return send(servers, path, body)
engine._pusher._post_each = dying
engine.receive_weights(checkpoint(model).items(), version=9)
"""


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(
            "while paused", marks=pytest.mark.fault(37, "kill -9 of a trainer that paused")
        ),
        pytest.param(
            "in the middle of an update",
            marks=pytest.mark.fault(37, "kill -9 of a trainer in the middle of an update"),
        ),
        pytest.param(
            "with half of a layer",
            marks=pytest.mark.fault(37, "kill -9 of a trainer that has sent half of a layer"),
        ),
        pytest.param(
            "before the version",
            marks=pytest.mark.fault(67, "kill -9 of a trainer between weights and version"),
        ),
    ],
)
def test_what_a_dead_trainer_left_is_undone_and_the_next_one_starts_clean(
    servers: Servers,
    weights: dict[int, Weights],
    model: str,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
):
    address = servers.addresses[0]
    command = [sys.executable, "-c", DYING_TRAINER, address, model, moment]
    trainer = subprocess.run(command, check=False, cwd=Path(__file__).parents[2])
    assert trainer.returncode == -signal.SIGKILL

    def is_paused() -> bool:
        with urllib.request.urlopen(f"{address}/is_paused", timeout=10) as reply:
            return json.load(reply)["is_paused"]

    wait_until(lambda: not is_paused(), within_s=40)
    with VLLMEngine([address]) as engine:
        refused: list[str] = []
        monkeypatch.setattr(engine._fleet, "missed_update", lambda _, why: refused.append(why))
        push(engine, weights[1], 1)
        assert refused == []  # nothing of the other update is in its way
        assert_all_agree(start_generating(engine).result(120), weights, model)


@pytest.mark.fault(68, "kill -9 of an attached server, and a start by hand at the same address")
def test_an_attached_server_that_somebody_restarts_gets_the_weights_first(
    servers: Servers, weights: dict[int, Weights], model: str
):
    # To a client that was given addresses, what the supervisor does is what somebody else does.
    with VLLMEngine(servers.addresses) as engine:
        push(engine, weights[2], 2)
        api_server(servers.addresses[1]).kill()
        wait_until(lambda: state(engine, 1) == "down", 5)
        assert_serves_again(engine, 1, version=2)
        assert_all_agree(start_generating(engine).result(120), weights, model)


@pytest.mark.fault(6, "a worker that dies of SIGILL at its first request")
def test_a_native_crash_at_the_first_request_is_a_clear_error_before_the_run_begins(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Python imports sitecustomize in every process of the server.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'multiprocessing' in ' '.join(sys.orig_argv):\n"
        "    import vllm.v1.worker.cpu_worker as cpu\n"
        "    cpu.CPUWorker.execute_model = lambda *_: os.kill(os.getpid(), 4)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began_s = time.monotonic()
    with pytest.raises(ServerError, match=r"server-0.log ends:"):
        serve(model, ServerConfig(startup_timeout_s=120), log_dir=tmp_path)
    assert time.monotonic() - began_s < 130


def test_all_attached_servers_gone_end_a_run_with_one_line(model: str, tmp_path: Path):
    with (
        serve(model, ServerConfig(), log_dir=tmp_path) as servers,
        VLLMEngine(servers.addresses) as engine,
    ):
        push(engine, checkpoint(model), 0)
        running = start_generating(engine, count=2)
        servers.close()
        with pytest.raises(ServerError, match="No server has served for"):
            running.result(60)
