"""Servers that die, hang or never get ready: the run goes on, or says why it cannot."""

import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arealite.errors import NoServerError, ServerError
from arealite.inference.server import _Supervisor
from arealite.inference.vllm import VLLMEngine
from arealite.testing import FaultProxy, ScriptedServer
from arealite.testing.faults import Status
from tests.faults.training import (
    ROWS,
    VOCAB_SIZE,
    asking,
    assert_as_sampled,
    is_given_up,
    is_serving,
    wait_until,
)
from tests.oracle import Oracle

Connect = Callable[..., VLLMEngine]


# --- One of two, to the client --------------------------------------------------------------------


@pytest.mark.fault(1, "all connections of one of two servers break while it generates")
def test_requests_of_a_server_that_dies_start_again_on_the_other(
    oracle: Oracle, scripted_server: Callable[..., ScriptedServer], connect: Connect
):
    dying, other = (scripted_server(vocab_size=VOCAB_SIZE, tokens_per_s=20) for _ in range(2))
    engine = connect(dying, other)

    def die_while_generating() -> None:
        wait_until(lambda: engine._fleet.servers[0].running > 0)
        dying.die()

    ledger = oracle.train(engine, asking(), ROWS, at={1: die_while_generating})
    assert_as_sampled(ledger)
    assert ledger.lost == {}
    assert engine.take_metrics()["server/lost"] == 1


@pytest.mark.fault(1, "the only server is gone for good")
def test_a_run_whose_servers_all_are_gone_ends_with_one_line(
    oracle: Oracle, server: ScriptedServer, connect: Connect
):
    engine = connect(server, recovery_timeout_s=1.0)
    with oracle.ends_with(NoServerError, "No server has served for 1 s: .* is down"):
        oracle.train(engine, asking(), ROWS, at={1: server.die})


@pytest.mark.fault(3, "one of two servers answers 500 to everything, then starts again")
def test_a_server_with_a_dead_engine_is_given_up_and_serves_again_with_the_weights(
    oracle: Oracle,
    server: ScriptedServer,
    other_server: ScriptedServer,
    proxy: FaultProxy,
    connect: Connect,
):
    engine = connect(proxy, other_server)

    def restart_once_given_up() -> None:
        wait_until(lambda: is_given_up(engine, proxy))
        server.restart()
        proxy.clear()
        wait_until(lambda: is_serving(engine, proxy))

    break_engine = {1: lambda: proxy.inject(Status(500)), 2: restart_once_given_up}
    ledger = oracle.train(engine, asking(), ROWS, at=break_engine)
    assert_as_sampled(ledger)
    assert ledger.lost == {}
    assert server.version == "4"


@pytest.mark.fault(4, "the engine of one of two servers stops; /health answers")
def test_a_server_that_hangs_is_given_up_and_serves_again_when_it_answers(
    oracle: Oracle, server: ScriptedServer, other_server: ScriptedServer, connect: Connect
):
    engine = connect(server, other_server, hang_timeout_s=2.0)

    def go_on_once_given_up() -> None:
        with urllib.request.urlopen(f"{server.address}/health", timeout=10) as reply:
            assert reply.status == 200
        wait_until(lambda: is_given_up(engine, server))
        server.unhang()
        wait_until(lambda: is_serving(engine, server))

    ledger = oracle.train(engine, asking(), ROWS, at={1: server.hang, 2: go_on_once_given_up})
    assert_as_sampled(ledger)
    assert ledger.lost == {}
    assert engine.take_metrics()["server/lost"] == 1


@pytest.mark.fault(5, "the engine of the only server stops for 2 s")
def test_a_server_that_stalls_for_a_moment_is_not_given_up(
    oracle: Oracle, server: ScriptedServer, connect: Connect
):
    engine = connect(server)

    def stall() -> None:
        server.hang()
        time.sleep(2)
        server.unhang()

    ledger = oracle.train(engine, asking(), ROWS, at={1: stall})
    assert_as_sampled(ledger)
    assert ledger.lost == {}
    assert engine.take_metrics()["server/lost"] == 0


# --- Before the run begins, to the supervisor -----------------------------------------------------

CRASHES_AT_A_REQUEST = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        os.kill(os.getpid(), 4)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def process_tree(tmp_path: Path) -> Iterator[Callable[[str], _Supervisor]]:
    """Starts a supervisor with this Python code for a server; closed in the end."""
    running: list[_Supervisor] = []

    def start(code: str) -> _Supervisor:
        spec = {
            "commands": [[sys.executable, "-c", code, "{port}"]],
            "environments": [{}],
            "log_dir": str(tmp_path),
            "startup_timeout_s": 20,
        }
        running.append(_Supervisor(spec, startup_timeout_s=20))
        return running[-1]

    yield start
    for supervisor in running:
        supervisor.close()


@pytest.mark.fault(6, "a server that dies of SIGILL when it is first asked to generate")
def test_a_crash_at_the_first_request_is_met_before_the_run_begins(
    oracle: Oracle, process_tree: Callable[[str], _Supervisor]
):
    with oracle.ends_with(ServerError, "vLLM server was killed by signal 4"):
        process_tree(CRASHES_AT_A_REQUEST)
