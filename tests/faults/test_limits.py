"""The limits of a process, of a configuration, and of what a stranger may do."""

import asyncio
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from arealite.config import parse, save_config
from arealite.errors import ArealiteError, ConfigError, NoServerError, RolloutError, ServerError
from arealite.inference.monitor import Monitor
from arealite.inference.tokens import TOKEN
from arealite.inference.vllm import VLLMEngine
from arealite.inference.vllm_guard import Guard
from arealite.rollout.executor import RolloutExecutor
from arealite.testing import FaultProxy, ScriptedEngine, ScriptedServer
from arealite.testing.faults import Status
from arealite.types import Row, Trajectory
from arealite.waits import report
from recipes.gsm8k_grpo import Config
from tests.faults.training import (
    GENERATE,
    ROWS,
    VOCAB_SIZE,
    asking,
    assert_as_sampled,
    wait_until,
)
from tests.oracle import SMALL, Oracle

Connect = Callable[..., VLLMEngine]
REPOSITORY = Path(__file__).parents[2]


# --- Settings -------------------------------------------------------------------------------------

WRONG_SETTINGS = {
    "rollout.max_stalenes=1": "The nearest is rollout.max_staleness",
    "steps=many": "not a whole number",
    "group_size=-8": "must be at least 2",
    "train.lr=nan": "not a finite number",
    "sampling.top_p=0": "must be above 0",
    "rollout.order=fastest": "fifo",
    "server.addresses=[localhost:8000]": "Write http://host:port",
}


@pytest.mark.fault(57, "seven wrong settings at once, on the command line and in a file")
@pytest.mark.parametrize("is_file", [False, True])
def test_all_wrong_settings_are_refused_at_once(
    oracle: Oracle, start_recipe: Callable[..., None], tmp_path: Path, is_file: bool
):
    settings = list(WRONG_SETTINGS)
    if is_file:
        file = tmp_path / "run.yaml"
        file.write_text("\n".join(setting.replace("=", ": ", 1) for setting in settings[2:]))
        settings = [*settings[:2], "--config", str(file)]
    with pytest.raises(ConfigError) as refused:
        start_recipe(*settings)
    for setting, reason in WRONG_SETTINGS.items():
        key = setting.partition("=")[0]
        assert [line for line in str(refused.value).splitlines() if key in line and reason in line]


# --- File descriptors -----------------------------------------------------------------------------

FEW_FILES = """
import json, resource, sys, time
from dataclasses import replace
from arealite.errors import ArealiteError
from arealite.inference.vllm import VLLMEngine
from tests.faults.training import ROWS, asking
from tests.oracle import SMALL, Oracle

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
began_s, cpu_s = time.monotonic(), time.process_time()
try:
    with Oracle() as oracle, VLLMEngine([sys.argv[1]]) as engine:
        oracle.train(engine, asking(), ROWS, cfg=replace(SMALL, prompts_per_step=50))
except ArealiteError as error:
    used_s = time.process_time() - cpu_s
    print(json.dumps([str(error), time.monotonic() - began_s, used_s]))
"""


@dataclass(frozen=True)
class Ending:
    """Of a run with few file descriptors."""

    message: str
    took_s: float
    cpu_s: float


@pytest.fixture(scope="module")
def with_few_files() -> Ending:
    # So slow that no episode ends before the first ones have failed.
    with ScriptedServer(vocab_size=VOCAB_SIZE, tokens_per_s=0.1) as server:
        done = subprocess.run(
            [sys.executable, "-c", FEW_FILES, server.address],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=150,
        )
    return Ending(*json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.fault(60, "200 requests at once under `ulimit -n 64`")
def test_a_run_out_of_file_descriptors_ends_soon_and_does_not_spin(with_few_files: Ending):
    assert "7 of the latest 7 episodes failed" in with_few_files.message
    assert with_few_files.took_s < 20
    assert with_few_files.cpu_s < 5


@pytest.mark.fault(60, "200 requests at once under `ulimit -n 64`")
def test_a_run_out_of_file_descriptors_names_the_limit(with_few_files: Ending):
    assert re.search(r"(?i)too many open files|ulimit", with_few_files.message)


# --- Background -----------------------------------------------------------------------------------


class BreakingEngine(ScriptedEngine):
    """An engine that the rollout thread cannot use any more once it is broken."""

    is_broken = False
    broken_s = 0.0

    @property
    def version(self) -> int:
        if self.is_broken:
            raise OSError("no luck")
        return self._version

    @version.setter
    def version(self, version: int) -> None:
        self._version = version

    def break_down(self) -> None:
        self.is_broken, self.broken_s = True, time.monotonic()


@pytest.mark.fault(61, "the engine raises in the rollout thread")
def test_what_raises_in_the_rollout_thread_raises_in_the_main_thread(oracle: Oracle):
    engine = BreakingEngine(replies=["fine"])
    with oracle.ends_with(RolloutError, "The rollout thread raised OSError: no luck"):
        oracle.train(engine, asking(), ROWS, at={1: engine.break_down})
    assert time.monotonic() - engine.broken_s < 1


@pytest.mark.fault(61, "the task that watches the servers raises")
def test_what_raises_in_the_watcher_of_the_servers_raises_in_the_main_thread(
    oracle: Oracle, server: ScriptedServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
):
    engine = connect(server)

    async def probe(*_: object) -> None:
        raise OSError("no luck")

    def break_watcher() -> None:
        monkeypatch.setattr(Monitor, "probe", probe)
        wait_until(lambda: engine._watching is not None and engine._watching.done())

    with oracle.ends_with(NoServerError, "Nobody watches the servers any more"):
        oracle.train(engine, asking(), ROWS, at={1: break_watcher})


class Raising:
    """A workflow that raises this for one row, and answers the others."""

    def __init__(self, kind: type[BaseException]) -> None:
        self._kind = kind
        self._answering = asking()

    async def arun_episode(self, engine: ScriptedEngine, row: Row) -> list[Trajectory] | None:
        if row["id"] == 3:
            raise self._kind("bye")
        return await self._answering.arun_episode(engine, row)


@pytest.mark.fault(61, "an episode is cancelled from within")
def test_an_episode_that_was_cancelled_from_within_is_recorded(oracle: Oracle):
    impatient = replace(SMALL, batch_timeout_s=1)
    workflow = Raising(asyncio.CancelledError)
    ledger = oracle.train(ScriptedEngine(replies=["fine"]), workflow, ROWS, cfg=impatient)
    assert all("cancelled" in reason.lower() for reason in ledger.reasons.values())


class Panic(BaseException):
    """What a library written in another language raises when it breaks."""


@pytest.mark.fault(61, "a library that an episode uses panics")
def test_an_episode_whose_library_panics_is_recorded(oracle: Oracle):
    impatient = replace(SMALL, batch_timeout_s=1)
    ledger = oracle.train(ScriptedEngine(replies=["fine"]), Raising(Panic), ROWS, cfg=impatient)
    assert set(ledger.reasons.values()) == {"failed: RolloutError: The episode raised Panic: bye"}


@pytest.mark.fault(61, "an episode calls sys.exit")
def test_an_episode_that_exits_is_named(oracle: Oracle):
    cfg = replace(SMALL, max_staleness=2, batch_timeout_s=1)
    rollouts = RolloutExecutor(ScriptedEngine(["fine"]), Raising(SystemExit), ROWS, cfg)
    try:
        rollouts.next_batch()
        said = str(rollouts.take_lost())
    except ArealiteError as error:
        said = str(error)
    assert "SystemExit" in said
    rollouts.close()


# --- Strangers ------------------------------------------------------------------------------------

SECRET = "sentinel-2b8e41d0"
OPEN_PATH = "/health"
PATHS = [
    *("/pause", "/resume", "/is_paused", "/weight_info", "/collective_rpc", "/arealite/model"),
    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights"),
    *("/finish_weight_update", "/update_weight_version", "/inference/v1/generate", "/v1/models"),
    *("/metrics", "/docs", "/openapi.json", "/", "/nothing", "/health/", "/health/../pause"),
]


async def statuses(guard: Guard, authorization: str) -> dict[str, int]:
    """What the guard answers on each path; 200 is the server behind it."""
    found: dict[str, int] = {}
    for path in [*PATHS, OPEN_PATH]:

        async def send(message: dict[str, Any], path: str = path) -> None:
            found.setdefault(path, message.get("status", 0))

        headers = [(b"authorization", authorization.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await guard(scope, None, send)
    return found


@pytest.mark.fault(63, "each path of a server, without its token or with another")
@pytest.mark.parametrize("authorization", ["", "Bearer ", f"Bearer {SECRET}1", f"Basic {SECRET}"])
def test_a_stranger_is_refused_on_every_path_but_health(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch, authorization: str
):
    monkeypatch.setenv(TOKEN, SECRET)

    async def server(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    found = asyncio.run(statuses(Guard(server), authorization))
    assert found == dict.fromkeys(PATHS, 401) | {OPEN_PATH: 200}


@pytest.mark.fault(63, "a run without the token of its servers")
def test_a_run_without_the_token_is_told_where_to_put_it(
    oracle: Oracle,
    scripted_server: Callable[..., ScriptedServer],
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(TOKEN, raising=False)
    server = scripted_server(token=SECRET)
    with oracle.ends_with(ServerError, r"asks for a token\. Set AREALITE_TOKEN"):
        connect(server)
    assert server.version == "default"


@pytest.mark.fault(65, "a run with a token meets errors; all that it says and shows is searched")
def test_the_token_is_in_nothing_that_a_run_says_or_writes(
    oracle: Oracle,
    scripted_server: Callable[..., ScriptedServer],
    fault_proxy: Callable[..., FaultProxy],
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv(TOKEN, SECRET)
    server = scripted_server(vocab_size=VOCAB_SIZE, token=SECRET)
    proxy = fault_proxy(server.address)
    engine = connect(proxy)
    refuse = lambda: proxy.inject(Status(400), on=[0], path=GENERATE)  # noqa: E731
    ledger = oracle.train(engine, asking(), ROWS, at={0: refuse})
    assert_as_sampled(ledger)
    assert len(ledger.reasons) == 1

    proxy.inject(Status(400), path="/start_weight_update")
    with pytest.raises(ServerError) as failed:
        oracle.train(engine, asking(), ROWS)
    save_config(parse(Config, []), tmp_path / "config.yaml")
    said = [str(ledger.reasons), *traceback.format_exception(failed.value), report()]
    said += [*capfd.readouterr(), (tmp_path / "config.yaml").read_text(), repr(vars(engine))]
    assert [text for text in said if SECRET in text] == []
