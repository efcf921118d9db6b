"""Kill any process of a run, at any moment: nothing is left behind, and the run continues."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arealite.testing.http_server import ScriptedServer
from tests.oracle import NO_WEIGHTS, RecipeRun, read_ledger, recipe_runs

pytestmark = pytest.mark.soak

STEPS, SAVE_EVERY = 12, 3
SETTINGS = [f"steps={STEPS}", f"save_every_steps={SAVE_EVERY}", "eval_every_steps=6"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RecipeRun]]:
    with recipe_runs(tmp_path) as start_with:
        yield lambda *settings: start_with(*(settings or SETTINGS))


MOMENTS: dict[str, Callable[[RecipeRun], bool]] = {
    "while the server starts": lambda run: (run.out_dir / "server-0.log").exists(),
    "before the first step": lambda run: run.steps_done() >= 0,
    "in the middle": lambda run: run.steps_done() >= SAVE_EVERY + 2,
}
VICTIMS = {
    "recipe": "-u recipes/gsm8k_grpo.py",
    "agent": "torch.distributed.run",
    "supervisor": "arealite.inference.supervisor",
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", [*VICTIMS, "Ctrl-C"])
def test_nothing_is_left_and_the_run_continues(
    start: Callable[..., RecipeRun], victim: str, moment: str
):
    run = start()
    run.wait_until(lambda: MOMENTS[moment](run))
    strike(victim, run)
    run.assert_gone()
    assert run.agent.wait(10) != 0

    committed = checkpointed_version(run.out_dir)
    again = start()
    again.assert_ended(0, within_s=400)
    assert f"continues after step {committed}" in again.printed() or committed == 0
    assert_every_row_is_used_once(run.out_dir)


def test_an_agent_killed_while_its_ranks_start_leaves_none(start: Callable[..., RecipeRun]):
    run = start()
    run.wait_until(lambda: any(p.pid != run.agent.pid for p in run.family.values()))
    run.agent.kill()
    run.assert_gone()


def test_a_run_killed_twice_ends_with_the_accuracy_of_one_that_was_not(
    start: Callable[..., RecipeRun],
):
    steps = ["steps=80", "eval_every_steps=40", "save_every_steps=10"]
    for victim, step in [("recipe", 25), ("supervisor", 45)]:
        run = start(*steps)
        strike_at_step(step, victim, run)
        run.assert_gone()
    last = start(*steps)
    last.assert_ended(0, within_s=400)
    figures = json.loads(last.printed().splitlines()[-1])
    assert figures["accuracy_before"] <= 0.60
    assert figures["accuracy_after"] >= 0.90
    assert_every_row_is_used_once(last.out_dir, steps=80)


def test_with_one_of_two_servers_killed_the_demo_ends_with_its_accuracy(
    start: Callable[..., RecipeRun],
):
    run = start("server.num_cpu_servers=2")
    run.wait_until(lambda: run.steps_done() >= 10)  # early: the server needs a minute or two
    run.find("api_server").kill()
    run.assert_ended(0, within_s=500)
    assert "serves again" in run.printed()
    figures = json.loads(run.printed().splitlines()[-1])
    assert figures["accuracy_before"] <= 0.60
    assert figures["accuracy_after"] >= 0.90
    assert_every_row_is_used_once(run.out_dir, steps=80)


@pytest.mark.parametrize("num_servers", [1, 2])
def test_when_all_attached_servers_are_gone_the_run_ends_with_one_line_and_its_last_step_saved(
    start: Callable[..., RecipeRun], num_servers: int
):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(scripted_math_server()) for _ in range(num_servers)]
        addresses = ",".join(server.address for server in servers)
        attached = f"server.addresses=[{addresses}]"
        run = start("steps=100000", "eval_every_steps=100000", attached, *NO_WEIGHTS)
        run.wait_until(lambda: run.steps_done() >= 5)
        for server in servers:
            server.die()
        run.assert_ended(1, "error: No server has served for", within_s=60)
    done = run.steps_done()
    assert checkpointed_version(run.out_dir) == done >= 5
    read_ledger(run.out_dir).check()


def scripted_math_server() -> ScriptedServer:
    """A server whose random answers the embedded model could have given."""
    return ScriptedServer(vocab_size=55, max_model_len=256, tokens_per_s=400)


def strike_at_step(step: int, victim: str, run: RecipeRun) -> None:
    run.wait_until(lambda: run.steps_done() >= step)
    strike(victim, run)


def strike(victim: str, run: RecipeRun) -> None:
    if victim == "Ctrl-C":  # the terminal sends it to every process in the foreground
        os.killpg(run.agent.pid, signal.SIGINT)
    else:
        run.find(VICTIMS[victim]).kill()


def checkpointed_version(out_dir: Path) -> int:
    latest = out_dir / "checkpoints" / "latest"
    return int(latest.read_text().split()[0].removeprefix("version-")) if latest.exists() else 0


def assert_every_row_is_used_once(out_dir: Path, steps: int = STEPS) -> None:
    """16 rows a step, each in exactly one step, and none too old."""
    ledger = read_ledger(out_dir)
    ledger.check()
    assert ledger.steps == dict.fromkeys(range(1, steps + 1), 16)
    assert checkpointed_version(out_dir) == steps
