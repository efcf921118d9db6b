"""Updates that do not come to their end: no server serves what it was not given."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from arealite.errors import ServerError
from arealite.inference.fleet import Fleet
from arealite.inference.vllm import VLLMEngine
from arealite.testing import FaultProxy, ScriptedServer
from arealite.testing.faults import Blackhole, Reset, Status
from tests.faults.training import (
    ROWS,
    asking,
    assert_as_sampled,
    is_given_up,
    is_serving,
    post,
    wait_until,
)
from tests.oracle import SMALL, Oracle

Connect = Callable[..., VLLMEngine]
FINISH = "/finish_weight_update"
PHASES = ["/pause", "/start_weight_update", "/update_weights", FINISH, "/resume"]


@pytest.mark.fault(36, "500 to one phase of one update on one of two servers")
@pytest.mark.parametrize("phase", PHASES)
def test_a_server_that_fails_an_update_serves_again_once_it_has_the_weights(
    oracle: Oracle,
    server: ScriptedServer,
    other_server: ScriptedServer,
    proxy: FaultProxy,
    connect: Connect,
    phase: str,
):
    engine = connect(proxy, other_server)
    ledger = oracle.train(
        engine,
        asking(),
        ROWS,
        at={
            1: lambda: proxy.inject(Status(500), path=phase, on=range(3)),
            2: lambda: wait_until(lambda: is_serving(engine, proxy)),
        },
    )
    assert_as_sampled(ledger)
    assert ledger.lost == {}
    assert server.version == other_server.version == "4"


@pytest.mark.fault(36, "500 to every update, by the only server")
def test_an_update_that_no_server_takes_ends_the_run_with_its_answer(
    oracle: Oracle, proxy: FaultProxy, connect: Connect
):
    engine = connect(proxy)
    refuse = lambda: proxy.inject(Status(500), path="/start_weight_update")  # noqa: E731
    with oracle.ends_with(ServerError, "version 2 did not reach the servers: .*no server took the"):
        oracle.train(engine, asking(), ROWS, at={1: refuse})


@pytest.mark.fault(36, "a server that has missed an update answers a probe")
def test_a_server_that_missed_an_update_is_described_by_what_made_it():
    fleet = Fleet(["http://a"], is_pusher=True)
    [server] = fleet.servers
    fleet.version = 0
    fleet.heard(server, 0)
    fleet.missed_update(server, "it answered 500")
    fleet.heard(server, 0)
    assert "it answered 500" in fleet.describe()


@pytest.mark.fault(37, "a trainer pauses, begins an update, and is never heard of again")
def test_the_next_trainer_puts_in_order_what_a_dead_one_left(
    oracle: Oracle, server: ScriptedServer, connect: Connect
):
    post(server.address, "/pause?mode=keep")
    post(server.address, "/start_weight_update")
    ledger = oracle.train(connect(server), asking(), ROWS)
    assert_as_sampled(ledger)


@pytest.mark.fault(66, "every request to one of two servers is swallowed")
def test_a_server_that_nothing_reaches_is_given_up_and_the_other_carries_on(
    oracle: Oracle,
    other_server: ScriptedServer,
    proxy: FaultProxy,
    connect: Connect,
):
    engine = connect(proxy, other_server, hang_timeout_s=2.0)
    ledger = oracle.train(engine, asking(), ROWS, at={1: lambda: proxy.inject(Blackhole())})
    assert_as_sampled(ledger)
    assert ledger.lost == {}
    assert is_given_up(engine, proxy)
    assert other_server.version == "4"
    assert engine.take_metrics()["server/lost"] == 1

    proxy.clear()
    wait_until(lambda: is_serving(engine, proxy))


@pytest.mark.fault(67, "the connection is reset once the server has done what ends an update")
def test_a_server_that_may_or_may_not_have_ended_an_update_gets_the_weights_again(
    oracle: Oracle, server: ScriptedServer, proxy: FaultProxy, connect: Connect
):
    engine = connect(proxy)
    lose_the_answer = lambda: proxy.inject(Reset(is_forwarded=True), path=FINISH, on=[0])  # noqa: E731
    ledger = oracle.train(engine, asking(), ROWS, at={1: lose_the_answer})
    assert_as_sampled(ledger)
    assert ledger.lost == {}
    # One for each version from 0 to 4, the one with the lost answer, and what made it good.
    assert server.count(FINISH) > 5


@pytest.mark.fault(68, "a server is down for a while, then starts with its first weights")
def test_a_server_restarted_by_hand_gets_the_weights_before_it_serves(
    oracle: Oracle, server: ScriptedServer, other_server: ScriptedServer, connect: Connect
):
    engine = connect(server, other_server)

    def restart_once_noticed() -> None:
        wait_until(lambda: is_given_up(engine, server))
        server.restart()
        wait_until(lambda: is_serving(engine, server))

    ledger = oracle.train(engine, asking(), ROWS, at={1: server.die, 2: restart_once_noticed})
    assert_as_sampled(ledger)
    assert ledger.lost == {}
    assert server.version == "4"


@pytest.mark.fault(68, "a server restarts so fast that nobody finds it down")
def test_a_server_restarted_between_two_requests_gets_the_weights_before_it_serves(
    oracle: Oracle, server: ScriptedServer, connect: Connect
):
    def restart() -> None:
        server.restart()
        wait_until(lambda: server.version == "1", within_s=5)

    synchronous = replace(SMALL, max_staleness=0)  # nobody asks while it restarts
    ledger = oracle.train(connect(server), asking(), ROWS, cfg=synchronous, at={1: restart})
    assert_as_sampled(ledger)
    assert ledger.lost == {}
