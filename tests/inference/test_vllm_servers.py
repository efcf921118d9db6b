"""The client of several servers, which here are scripted: they die, hang and return in no time."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import pytest
import torch

from arealite import background
from arealite.errors import ConfigError, NoServerError, ServerError
from arealite.inference.server import ServerConfig
from arealite.inference.tokens import TOKEN
from arealite.inference.vllm import VLLMEngine
from arealite.testing import faults
from arealite.testing.fault_proxy import FaultProxy
from arealite.testing.faults import SetValue
from arealite.testing.http_server import ScriptedServer
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from tests.inference.conformance import wait_until

pytest_plugins = ["arealite.testing.plugin"]

WEIGHTS = {"w": torch.ones(3)}


def push(engine: VLLMEngine, version: int) -> None:
    engine.pause()
    try:
        engine.receive_weights(WEIGHTS.items(), version=version)
    finally:
        engine.resume()


def request(conversation: int | None = None, *, tokens: int = 16) -> ModelRequest:
    return ModelRequest(
        token_ids=[5] * 8,
        sampling=SamplingParams(max_new_tokens=tokens),
        conversation=conversation,
    )


def start(engine: VLLMEngine, count: int, **options: Any) -> "Future[list[ModelResponse]]":
    async def all_of_them() -> list[ModelResponse]:
        return list(
            await asyncio.gather(*(engine.agenerate(request(**options)) for _ in range(count)))
        )

    return background.submit(all_of_them())


def generated(server: ScriptedServer) -> int:
    return server.count("/inference/v1/generate")


def test_requests_are_spread_and_those_of_a_dead_server_go_to_the_others(
    scripted_server: Callable[..., ScriptedServer],
):
    servers = [scripted_server(tokens_per_s=20) for _ in range(3)]
    with VLLMEngine([server.address for server in servers]) as engine:
        push(engine, 0)
        running = start(engine, 12)
        wait_until(lambda: [generated(server) for server in servers] == [4, 4, 4])
        servers[1].die()
        responses = running.result(30)
    assert [len(response.token_ids) for response in responses] == [16] * 12
    assert generated(servers[0]) + generated(servers[2]) == 12


def test_requests_of_a_server_that_hangs_go_to_another(
    scripted_server: Callable[..., ScriptedServer],
):
    servers = [scripted_server(tokens_per_s=100) for _ in range(2)]
    cfg = ServerConfig(hang_timeout_s=3)
    with VLLMEngine([server.address for server in servers], cfg) as engine:
        push(engine, 0)
        servers[0].hang()
        began_s = time.monotonic()
        assert len(start(engine, 4).result(30)) == 4
        assert time.monotonic() - began_s < 15
        servers[0].unhang()
        wait_until(lambda: len(engine._fleet.serving()) == 2)


def test_requests_wait_for_the_only_server_and_it_gets_the_weights_before_it_serves(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server()
    with VLLMEngine([server.address]) as engine:
        push(engine, 7)
        server.die()
        wait_until(lambda: not engine._fleet.serving())
        push(engine, 8)  # nobody hears it, and that is no error
        running = start(engine, 4)
        time.sleep(0.2)
        assert not running.done()
        server.restart()
        responses = running.result(30)
    assert [response.versions for response in responses] == [[8] * 16] * 4


def test_a_server_that_misses_an_update_serves_again_once_it_has_the_weights(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    servers = [scripted_server() for _ in range(2)]
    proxy = fault_proxy(servers[0].address)
    with VLLMEngine([proxy.address, servers[1].address]) as engine:
        push(engine, 0)
        proxy.inject(faults.Status(500), path="/finish_weight_update", on=[0])
        push(engine, 1)
        assert [s.address for s in engine._fleet.serving()] == [servers[1].address]
        wait_until(lambda: len(engine._fleet.serving()) == 2)
        assert servers[0].version == "1"


def test_weights_that_every_server_refuses_again_and_again_are_an_error(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    proxy = fault_proxy(scripted_server().address)
    proxy.inject(faults.Status(400), path="/update_weights")
    with (
        VLLMEngine([proxy.address]) as engine,
        pytest.raises(ServerError, match=r"no server took the weights: http\S+ is stale: "),
    ):
        push(engine, 0)


def test_a_server_whose_engine_is_dead_refuses_weights_and_that_is_no_error(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    proxy = fault_proxy(scripted_server().address)
    with VLLMEngine([proxy.address]) as engine:
        push(engine, 0)
        proxy.inject(faults.Status(500))  # what vLLM answers until its API server has ended
        push(engine, 1)
        running = start(engine, 2)
        proxy.clear()
        assert [set(response.versions) for response in running.result(30)] == [{1}] * 2


def test_a_server_that_refuses_weights_because_it_dies_is_waited_for(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    server = scripted_server()
    proxy = fault_proxy(server.address)
    with VLLMEngine([proxy.address]) as engine:
        push(engine, 0)
        proxy.inject(
            faults.Status(500), path="/pause"
        )  # its engine is dead, the rest still answers
        pushing = background.submit(asyncio.to_thread(push, engine, 1))
        wait_until(lambda: len(proxy.exchanges_of("/pause")) >= 3)
        server.die()
        pushing.result(20)
        proxy.clear()
        running = start(engine, 2)
        server.restart()
        assert [set(response.versions) for response in running.result(30)] == [{1}] * 2


def test_a_conversation_stays_on_its_server(scripted_server: Callable[..., ScriptedServer]):
    servers = [scripted_server() for _ in range(3)]
    with VLLMEngine([server.address for server in servers]) as engine:
        push(engine, 0)
        for _ in range(6):
            start(engine, 1, conversation=3).result(10)
    assert sorted(generated(server) for server in servers) == [0, 0, 6]


@pytest.mark.parametrize(
    ("interrupt", "kv", "query"),
    [
        ("keep", "recompute", {"mode": "keep", "clear_cache": "true"}),
        ("keep", "reuse", {"mode": "keep", "clear_cache": "false"}),
        ("drain", "recompute", {"mode": "wait", "clear_cache": "true"}),
    ],
)
def test_an_update_interrupts_requests_as_it_is_told(
    scripted_server: Callable[..., ScriptedServer], interrupt: Any, kv: Any, query: dict[str, str]
):
    server = scripted_server(tokens_per_s=100)
    with VLLMEngine([server.address], ServerConfig(interrupt=interrupt, kv=kv)) as engine:
        push(engine, 0)
        running = start(engine, 4, tokens=60)
        wait_until(lambda: generated(server) == 4)
        time.sleep(0.2)
        push(engine, 1)
        late = start(engine, 1).result(10)
        responses = running.result(10)
    assert [r.query for r in server.received if r.path == "/pause"] == [query] * 2
    kinds = {tuple(sorted(set(response.versions))) for response in responses}
    assert kinds == ({(0,)} if interrupt == "drain" else {(0, 1)})
    assert set(late[0].versions) == {1}


def test_while_a_server_drains_requests_wait_instead_of_being_refused(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server(tokens_per_s=100, refuses_while_paused=True)
    with VLLMEngine([server.address], ServerConfig(interrupt="drain")) as engine:
        push(engine, 0)
        running = start(engine, 1, tokens=100)
        wait_until(lambda: generated(server) == 1)
        draining = background.submit(asyncio.to_thread(push, engine, 1))
        time.sleep(0.2)
        late = start(engine, 4)
        time.sleep(0.2)
        assert generated(server) == 1, "no request is sent to a server that drains"
        draining.result(20)
        assert {v for r in late.result(10) for v in r.versions} == {1}
        assert set(running.result(10)[0].versions) == {0}


def test_when_all_attached_servers_are_gone_requests_end_with_one_clear_line(
    scripted_server: Callable[..., ScriptedServer],
):
    servers = [scripted_server() for _ in range(2)]
    cfg = ServerConfig(recovery_timeout_s=0.5)
    with VLLMEngine([server.address for server in servers], cfg) as engine:
        push(engine, 0)
        for server in servers:
            server.die()
        with pytest.raises(NoServerError) as gone:
            start(engine, 3).result(20)
    assert re.match(r"No server has served for \d+ s: http\S+ is down", str(gone.value))
    assert "`arealite serve` does, raise server.recovery_timeout_s=0.5." in str(gone.value)


def test_a_wrong_token_is_told_from_none(
    scripted_server: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
):
    server = scripted_server(token="the right one")
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ServerError, match=r"asks for a token\. Set AREALITE_TOKEN to"):
        VLLMEngine([server.address])
    monkeypatch.setenv(TOKEN, "a-wrong-one-of-many-characters")
    with pytest.raises(ServerError, match=r"refuses the token of this run\. Set") as refused:
        VLLMEngine([server.address])
    assert "a-wrong-one" not in str(refused.value)


@pytest.mark.parametrize(("allowed", "shown"), [("/elsewhere", "/elsewhere"), ("", "none")])
def test_a_server_that_was_started_with_another_folder_for_weights_is_refused_at_once(
    scripted_server: Callable[..., ScriptedServer],
    fault_proxy: Callable[..., FaultProxy],
    allowed: str,
    shown: str,
):
    proxy = fault_proxy(scripted_server().address)
    proxy.inject(SetValue("weights_dir", allowed), path="/arealite/model")
    message = rf"server.weights_dir is /here, but http\S+ was started with {shown},"
    with pytest.raises(ConfigError, match=message):
        VLLMEngine([proxy.address], ServerConfig(weights_dir="/here"))


def test_weights_may_go_to_any_folder_below_that_of_the_server(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    proxy = fault_proxy(scripted_server().address)
    proxy.inject(SetValue("weights_dir", "/here"), path="/arealite/model")
    VLLMEngine([proxy.address], ServerConfig(weights_dir="/here/run")).close()


def test_a_server_restarted_behind_our_back_is_noticed_by_what_it_answers(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server()
    with VLLMEngine([server.address]) as engine:
        push(engine, 3)
        for _ in range(5):
            server.restart()  # faster than any probe
            [response] = start(engine, 1).result(20)
            assert set(response.versions) == {3}


def test_the_share_of_prompt_tokens_found_in_the_cache_is_reported(
    scripted_server: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("arealite.inference.monitor.COUNT_EVERY_S", 0.05)
    server = scripted_server()
    with VLLMEngine([server.address]) as engine:
        push(engine, 0)
        start(engine, 8).result(10)
        metrics: dict[str, float] = {}

        def is_reported() -> bool:
            metrics.update(engine.take_metrics())
            return "server/prefix_hit_rate" in metrics

        wait_until(is_reported)
    assert metrics["server/lost"] == 0
    assert 0 <= metrics["server/prefix_hit_rate"] <= 1


def test_closing_ends_requests_that_run(scripted_server: Callable[..., ScriptedServer]):
    server = scripted_server(tokens_per_s=1)
    engine = VLLMEngine([server.address])
    push(engine, 0)
    running = start(engine, 2)
    wait_until(lambda: generated(server) == 2)
    engine.close()
    with pytest.raises(ServerError, match="was closed while a request was running"):
        running.result(5)


@pytest.mark.fault(61, "the task that watches the servers raises")
def test_an_error_of_the_task_that_watches_the_servers_reaches_whoever_asks(
    scripted_server: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
):
    with VLLMEngine([scripted_server().address]) as engine:
        push(engine, 0)

        async def broken(_: object) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(engine._monitor, "probe", broken)
        wait_until(lambda: engine._watching is not None and engine._watching.done())
        with pytest.raises(NoServerError, match="Nobody watches the servers any more") as raised:
            start(engine, 1).result(5)
    assert "a bug" in repr(raised.value.__cause__.exceptions)  # type: ignore[union-attr]


# --- Pushes and requests that do not go as usual --------------------------------------------------


def test_weights_that_cannot_be_gathered_change_nothing(
    scripted_server: Callable[..., ScriptedServer],
):
    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.ones(3)
        raise OSError("the other rank is gone")

    server = scripted_server()
    with VLLMEngine([server.address]) as engine:
        push(engine, 0)
        with pytest.raises(OSError, match="the other rank is gone"):
            engine.receive_weights(breaking(), version=1)
        assert len(engine._fleet.serving()) == 1
        assert start(engine, 1).result(20)[0].versions == [0] * 16
        push(engine, 1)
        assert start(engine, 1).result(20)[0].versions == [1] * 16


def test_servers_generate_until_the_weights_are_gathered(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server()
    with VLLMEngine([server.address]) as engine:
        push(engine, 0)

        def slow() -> Iterator[tuple[str, torch.Tensor]]:
            assert start(engine, 1).result(20)[0].versions == [0] * 16
            yield "w", torch.ones(3)

        engine.receive_weights(slow(), version=1)
        assert start(engine, 1).result(20)[0].versions == [1] * 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_weights_from_gpu_to_gpu_need_one(
    transport: Literal["ipc", "nccl"], scripted_server: Callable[..., ScriptedServer]
):
    server = scripted_server()
    with (
        VLLMEngine([server.address], ServerConfig(transport=transport)) as engine,
        pytest.raises(ConfigError, match=f"server.transport={transport} needs a GPU; auto does"),
    ):
        push(engine, 0)


def test_servers_of_an_update_that_breaks_off_do_not_serve_until_they_have_the_next_one(
    scripted_server: Callable[..., ScriptedServer], tmp_path: Path
):
    server = scripted_server()
    with VLLMEngine([server.address], ServerConfig(weights_dir=str(tmp_path / "w"))) as engine:
        push(engine, 0)
        (tmp_path / "w").rename(tmp_path / "elsewhere")
        with pytest.raises(ServerError, match=r"broke off .*No such file"):
            engine.receive_weights(WEIGHTS.items(), version=1)
        assert engine._fleet.serving() == []
        (tmp_path / "elsewhere").rename(tmp_path / "w")
        push(engine, 1)
        assert start(engine, 1).result(20)[0].versions == [1] * 16


@pytest.mark.fault(3, "an API server that takes no connections any more, and hangs as it ends")
def test_requests_outlast_a_server_that_refuses_them_before_its_probe_has_an_answer(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    proxy = fault_proxy(scripted_server().address)
    with VLLMEngine([proxy.address]) as engine:
        push(engine, 0)
        proxy.inject(faults.Blackhole(), path="/weight_info")
        wait_until(lambda: proxy.exchanges_of("/weight_info")[-1].fault is not None)
        proxy.stop_listening()
        requests = start(engine, 32)
        time.sleep(3)
        proxy.clear()
        proxy.listen_again()
        assert len(requests.result(20)) == 32


def test_a_request_that_takes_longer_than_others_gets_more_time_with_each_attempt(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    proxy = fault_proxy(scripted_server().address)
    with VLLMEngine([proxy.address], ServerConfig(patience_s=0.4)) as engine:
        push(engine, 0)
        start(engine, 16).result(20)
        proxy.inject(faults.Delay(1.0), on=range(1000), path="/inference/v1/generate")
        assert len(start(engine, 1).result(20)) == 1  # after limits of 0.4 and 0.8 s
        assert engine.take_metrics()["server/retries"] == 2


def test_new_requests_share_no_cache_with_those_of_earlier_weights_where_it_is_kept(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server()
    with VLLMEngine([server.address], ServerConfig(kv="reuse")) as engine:
        for version in range(2):
            push(engine, version)
            start(engine, 2).result(20)
    asked = [one.json() for one in server.received if one.path == "/inference/v1/generate"]
    assert [body.get("cache_salt") for body in asked] == ["version 0"] * 2 + ["version 1"] * 2


def test_a_request_that_is_cancelled_just_when_it_shall_look_again_ends(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server()
    with VLLMEngine([server.address]) as engine:
        push(engine, 0)
        server.die()
        wait_until(lambda: not engine._fleet.serving())

        async def wake_and_cancel() -> None:
            waiting = asyncio.create_task(engine.agenerate(request()))
            await asyncio.sleep(0.05)
            engine._let_requests_look_again()
            await asyncio.sleep(0)  # the event is heard, and its listener not yet awake
            waiting.cancel()
            async with asyncio.timeout(2):
                await asyncio.wait([waiting])
            assert waiting.cancelled()

        background.run(wake_and_cancel(), timeout_s=10, what="a cancelled request")


# --- Sleep ----------------------------------------------------------------------------------------

SLEEPY = ServerConfig(sleep=True)


def changes(server: ScriptedServer) -> list[str]:
    """What was asked of the server that changes what it does, in order."""
    asked = [f"{one.path}?{urlencode(one.query)}".rstrip("?") for one in server.received]
    controls = ("/pause", "/sleep", "/start", "/update", "/finish", "/wake_up", "/resume")
    return [path for path in asked if path.startswith(controls)]


def assert_both_serve(engine: VLLMEngine, *, version: int) -> None:
    wait_until(lambda: len(engine._fleet.serving()) == 2)
    assert all(response.versions == [version] * 16 for response in start(engine, 8).result(20))


def test_a_server_sleeps_from_a_batch_to_the_next_weights_and_requests_go_on_with_those(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server(tokens_per_s=100)
    with VLLMEngine([server.address], SLEEPY) as engine:
        push(engine, 0)
        running = start(engine, 4, tokens=40)
        wait_until(lambda: generated(server) == 4)
        time.sleep(0.1)
        before = len(changes(server))
        engine.sleep()
        late = start(engine, 1)
        time.sleep(0.5)
        assert not running.done()
        assert not late.done()
        engine.receive_weights(WEIGHTS.items(), version=1)
        responses = running.result(20)
        assert all(set(response.versions) == {0, 1} for response in responses)
        assert late.result(20)[0].versions == [1] * 16
    assert changes(server)[before:] == [
        "/pause?mode=keep&clear_cache=true",
        "/sleep?level=1&mode=keep",
        "/wake_up?tags=weights",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/wake_up",
        "/resume",
    ]


def test_without_the_setting_a_batch_stops_nothing(scripted_server: Callable[..., ScriptedServer]):
    server = scripted_server()
    with VLLMEngine([server.address]) as engine:
        push(engine, 0)
        before = changes(server)
        engine.sleep()
        assert changes(server) == before
        assert start(engine, 1).result(20)[0].versions == [0] * 16


def test_a_sleeping_server_is_woken_without_weights(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server()
    with VLLMEngine([server.address], SLEEPY) as engine:
        push(engine, 0)
        engine.sleep()
        engine.sleep()  # which changes nothing
        engine.resume()
        assert start(engine, 1).result(20)[0].versions == [0] * 16
        engine.sleep()
        engine.receive_weights(WEIGHTS.items(), version=1)
        assert start(engine, 1).result(20)[0].versions == [1] * 16


def test_requests_have_as_much_time_as_if_nobody_had_slept(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server(tokens_per_s=100)
    with VLLMEngine([server.address], ServerConfig(sleep=True, patience_s=0.8)) as engine:
        push(engine, 0)
        running = start(engine, 2, tokens=40)
        wait_until(lambda: generated(server) == 2)
        engine.sleep()
        late = start(engine, 1, tokens=40)
        time.sleep(1.6)  # twice as long as a request may take
        engine.receive_weights(WEIGHTS.items(), version=1)
        assert all(len(response.token_ids) == 40 for response in running.result(20))
        assert late.result(20)[0].versions == [1] * 40
        assert engine.take_metrics()["server/retries"] == 0
        assert max(engine._durations_s) < 1.6


def test_a_server_that_dies_in_its_sleep_comes_back_awake_and_gets_the_next_weights(
    scripted_server: Callable[..., ScriptedServer],
):
    servers = [scripted_server(), scripted_server()]
    with VLLMEngine([server.address for server in servers], SLEEPY) as engine:
        push(engine, 0)
        engine.sleep()
        servers[0].die()
        wait_until(lambda: engine._fleet.servers[0].state == "down")
        servers[0].restart()
        engine.receive_weights(WEIGHTS.items(), version=1)
        assert_both_serve(engine, version=1)


def test_a_pause_by_hand_is_no_second_one_for_a_server_that_sleeps(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server()
    with VLLMEngine([server.address], SLEEPY) as engine:
        push(engine, 0)
        engine.sleep()
        push(engine, 1)
        assert start(engine, 1).result(20)[0].versions == [1] * 16


def test_weights_that_cannot_be_gathered_end_the_sleep(
    scripted_server: Callable[..., ScriptedServer],
):
    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        raise OSError("the other rank is gone")
        yield

    with VLLMEngine([scripted_server().address], SLEEPY) as engine:
        push(engine, 0)
        engine.sleep()
        with pytest.raises(OSError, match="the other rank is gone"):
            engine.receive_weights(breaking(), version=1)
        assert start(engine, 1).result(20)[0].versions == [0] * 16


def test_a_sleeping_server_that_was_out_of_reach_is_woken_before_it_gets_weights(
    scripted_server: Callable[..., ScriptedServer],
    fault_proxy: Callable[..., FaultProxy],
):
    server = scripted_server()
    proxy = fault_proxy(server.address)
    with VLLMEngine([proxy.address, scripted_server().address], SLEEPY) as engine:
        push(engine, 0)
        engine.sleep()
        proxy.inject(faults.Reset())
        wait_until(lambda: engine._fleet.servers[0].state == "down")
        engine.receive_weights(WEIGHTS.items(), version=1)
        proxy.clear()
        assert_both_serve(engine, version=1)


def test_the_next_trainer_wakes_what_a_dead_one_left_asleep(
    scripted_server: Callable[..., ScriptedServer],
):
    server = scripted_server()
    with VLLMEngine([server.address], SLEEPY) as engine:
        push(engine, 0)
        engine.sleep()
    with VLLMEngine([server.address], SLEEPY) as engine:
        engine.receive_weights(WEIGHTS.items(), version=1)
        assert start(engine, 1).result(20)[0].versions == [1] * 16


@pytest.mark.parametrize("path", ["/wake_up", "/sleep"])
def test_a_server_that_fails_at_sleeping_or_waking_is_left_out_until_it_is_in_order(
    scripted_server: Callable[..., ScriptedServer],
    fault_proxy: Callable[..., FaultProxy],
    path: str,
):
    proxy, other = fault_proxy(scripted_server().address), scripted_server()
    with VLLMEngine([proxy.address, other.address], SLEEPY) as engine:
        push(engine, 0)
        proxy.inject(faults.Status(500), path=path, on=[0])
        engine.sleep()
        engine.receive_weights(WEIGHTS.items(), version=1)
        assert [server.address for server in engine._fleet.serving()] == [other.address]
        assert_both_serve(engine, version=1)


# --- Room -----------------------------------------------------------------------------------------


def test_room_is_what_the_serving_servers_would_work_on_at_once(
    scripted_server: Callable[..., ScriptedServer],
):
    first, second = (scripted_server(max_num_seqs=n, tokens_per_s=50) for n in (5, 3))
    with VLLMEngine([first.address, second.address]) as engine:
        push(engine, 0)
        assert engine.room == 8
        running = start(engine, 6, tokens=20)
        wait_until(lambda: engine.room == 2)
        running.result(20)
        assert engine.room == 8
        first.die()
        wait_until(lambda: engine.room == 3)
        second.die()
        wait_until(lambda: engine.room is None)  # whoever asks is told what has happened
