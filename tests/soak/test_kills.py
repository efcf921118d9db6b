"""Kill any process of a run, at any moment: nothing is left behind, and the run continues."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from arealite.observe.rollout_log import read_rollouts

pytestmark = pytest.mark.soak

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STEPS, SAVE_EVERY = 12, 3
SETTINGS = [f"steps={STEPS}", f"save_every_steps={SAVE_EVERY}", "eval_every_steps=6"]


class Run:
    """The recipe under torchrun, and every process that belongs to it."""

    def __init__(self, out_dir: Path, settings: Sequence[str]) -> None:
        self.out_dir = out_dir
        self.family = dict[int, psutil.Process]()
        self.ports = set[int]()
        self.segments_before = set(os.listdir("/dev/shm"))
        self.log = out_dir.with_suffix(".log")
        with open(self.log, "ab") as log:
            self.agent = psutil.Popen(
                [*TORCHRUN, "recipes/gsm8k_grpo.py", f"out_dir={out_dir}", *settings],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def refresh(self) -> None:
        """Remember what runs below the agent, also what has left its tree since."""
        for root in [self.agent, *self.family.values()]:
            try:
                for process in [root, *root.children(recursive=True)]:
                    self.family[process.pid] = process
            except psutil.NoSuchProcess:
                continue
        for process in self.family.values():
            try:
                listening = process.net_connections(kind="inet")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            self.ports |= {c.laddr.port for c in listening if c.status == psutil.CONN_LISTEN}

    def wait_until(self, reached: Callable[[], bool], *, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline, f"not reached; {self.log.read_text()[-2000:]}"
            assert self.agent.is_running(), f"ended early; {self.log.read_text()[-2000:]}"
            self.refresh()
            time.sleep(0.2)
        self.refresh()

    def find(self, part: str) -> psutil.Process:
        """The process of the family whose command line has `part`, the oldest of them."""
        for process in sorted(self.family.values(), key=lambda p: p.pid):
            try:
                if part in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        raise AssertionError(f"no process with {part!r}")

    def steps_done(self) -> int:
        path = self.out_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["version"] for line in lines), default=-1)

    def leftovers(self) -> list[str]:
        """What of the run still is there."""
        alive = [p for p in self.family.values() if p.is_running() and p.status() != "zombie"]
        found = [f"process {p.pid} {' '.join(p.cmdline())[:90]}" for p in alive]
        found += [f"/dev/shm/{n}" for n in set(os.listdir("/dev/shm")) - self.segments_before]
        listening = {
            c.laddr.port for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN
        }
        return found + [f"port {port}" for port in self.ports & listening]

    def assert_gone(self, within_s: float = 10) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            try:
                left = self.leftovers()
            except psutil.NoSuchProcess:
                continue
            if not left:
                return
            time.sleep(0.2)
        raise AssertionError(f"left after {within_s} s: {left}")

    def end(self) -> None:
        self.refresh()
        for process in self.family.values():
            if process.is_running():
                process.kill()
        self.agent.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start_one(*settings: str) -> Run:
        runs.append(Run(tmp_path / "run", settings or SETTINGS))
        return runs[-1]

    yield start_one
    for run in runs:
        run.end()


MOMENTS: dict[str, Callable[[Run], bool]] = {
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
def test_nothing_is_left_and_the_run_continues(start: Callable[..., Run], victim: str, moment: str):
    run = start()
    run.wait_until(lambda: MOMENTS[moment](run))
    strike(victim, run)
    run.assert_gone()
    assert run.agent.wait(10) != 0

    committed = checkpointed_version(run.out_dir)
    again = start()
    assert again.agent.wait(400) == 0, again.log.read_text()[-3000:]
    assert f"continues after step {committed}" in again.log.read_text() or committed == 0
    again.assert_gone()
    assert checkpointed_version(run.out_dir) == STEPS
    assert_every_row_is_used_once(run.out_dir)


def test_an_agent_killed_while_its_ranks_start_leaves_none(start: Callable[..., Run]):
    run = start()
    run.wait_until(lambda: any(p.pid != run.agent.pid for p in run.family.values()))
    run.agent.kill()
    run.assert_gone()


def test_a_run_killed_twice_ends_with_the_accuracy_of_one_that_was_not(start: Callable[..., Run]):
    steps = ["steps=80", "eval_every_steps=40", "save_every_steps=10"]
    for victim, step in [("recipe", 25), ("supervisor", 45)]:
        run = start(*steps)
        strike_at_step(step, victim, run)
        run.assert_gone()
    last = start(*steps)
    assert last.agent.wait(400) == 0, last.log.read_text()[-3000:]
    figures = json.loads(last.log.read_text().splitlines()[-1])
    assert figures["accuracy_before"] <= 0.60
    assert figures["accuracy_after"] >= 0.90
    assert checkpointed_version(last.out_dir) == 80
    assert_every_row_is_used_once(last.out_dir, steps=80)


def strike_at_step(step: int, victim: str, run: Run) -> None:
    run.wait_until(lambda: run.steps_done() >= step)
    strike(victim, run)


def strike(victim: str, run: Run) -> None:
    if victim == "Ctrl-C":  # the terminal sends it to every process in the foreground
        os.killpg(run.agent.pid, signal.SIGINT)
    else:
        run.find(VICTIMS[victim]).kill()


def checkpointed_version(out_dir: Path) -> int:
    latest = out_dir / "checkpoints" / "latest"
    return int(latest.read_text().split()[0].removeprefix("version-")) if latest.exists() else 0


def assert_every_row_is_used_once(out_dir: Path, steps: int = STEPS) -> None:
    """16 rows a step in the order of the run, each in exactly one step."""
    used: dict[int, set[int]] = {}
    for line in read_rollouts(out_dir):
        used.setdefault(line["version"], set()).add(line["row_index"])
    assert sorted(used) == list(range(1, steps + 1))
    assert [len(rows) for rows in used.values()] == [16] * steps
    assert len(set().union(*used.values())) == 16 * steps
