"""What must hold after any fault, in five parts; every test of a fault ends with them.

1. No process, port, shared memory or lock is left behind.
2. The ledger balances: submitted = accepted + rejected + failed + in flight, no row lost or used
   twice.
3. The staleness bound held for every token.
4. The exit code and one line name the cause.
5. It all ended within its deadline.

`Surroundings` and `Oracle` judge what runs in the process of a test, `RecipeRun` a whole run of
the recipe under its launcher, and `read_ledger` the folder that it leaves.
"""

import contextlib
import ctypes
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil
import pytest
import torch
import yaml

from arealite import waits
from arealite.api import InferenceEngine, RolloutWorkflow
from arealite.errors import ArealiteError
from arealite.inference.supervisor import PR_SET_CHILD_SUBREAPER, mapped_segments
from arealite.observe.rollout_log import read_lost, read_rollouts
from arealite.rewards.pool import default_pool
from arealite.rollout.executor import RolloutConfig, RolloutExecutor
from arealite.types import Cursor, LostRow, Row, Trajectory
from arealite.weights import push_weights

REPOSITORY = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
OUR_ERROR = re.compile(r"^(?:\[rank ?\d+\]:? )*error: ", re.MULTILINE)


# --- Part 1 ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surroundings:
    """What exists on this machine because of this process."""

    processes: frozenset[psutil.Process]
    ports: frozenset[int]
    segments: frozenset[str]
    locks: frozenset[str]
    threads: frozenset[str]

    @classmethod
    def now(cls) -> "Surroundings":
        me = psutil.Process()
        return cls(
            processes=frozenset(p for p in me.children(recursive=True) if is_alive(p)),
            ports=frozenset(
                connection.laddr.port
                for connection in me.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ),
            segments=frozenset(os.listdir("/dev/shm")),
            locks=held_locks({me.pid}),
            threads=frozenset(f"{t.name} {t.ident}" for t in threading.enumerate() if is_extra(t)),
        )

    def left_since(self) -> list[str]:
        """What there is now and was not when this was taken."""
        now = Surroundings.now()
        left = [
            f"{kind}: {item}"
            for kind in ("processes", "ports", "locks", "threads")
            for item in getattr(now, kind) - getattr(self, kind)
        ]
        segments = now.segments - self.segments
        return left + [f"/dev/shm/{name}" for name in segments - used_by_others(segments)]

    def assert_unchanged(self, within_s: float = 5.0) -> None:
        deadline = time.monotonic() + within_s
        while left := self.left_since():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)


def is_extra(thread: threading.Thread) -> bool:
    """Whether a thread should have ended with what it was started for."""
    if not thread.daemon:
        return True
    is_ours = thread.name.startswith(("arealite-", "reward-worker"))
    return is_ours and thread.name not in ("arealite-loop", "arealite-watchdog")


def used_by_others(segments: frozenset[str]) -> set[str]:
    """Those that a process has mapped which is not below this one: another run on this machine."""
    if not segments:
        return set()
    me = psutil.Process()
    ours = {me.pid, *(process.pid for process in me.children(recursive=True))}
    others = [process for process in psutil.process_iter() if process.pid not in ours]
    return {path.name for path in mapped_segments(others)}


def held_locks(pids: set[int]) -> frozenset[str]:
    """Locks on files that these processes hold, as /proc knows them."""
    entries = [line.split()[1:] for line in Path("/proc/locks").read_text().splitlines()]
    held = [entry for entry in entries if entry[0] != "->"]  # or somebody waits for the one above
    return frozenset(" ".join(entry) for entry in held if int(entry[3]) in pids)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


# --- Parts 2 and 3 --------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What became of every row of a run's order."""

    submitted: int = 0  # first place that was never started
    trained: Counter[int] = field(default_factory=Counter)  # place -> steps that consumed it
    lost: Counter[int] = field(default_factory=Counter)  # place -> times it was recorded as lost
    in_flight: set[int] = field(default_factory=set)
    steps: Counter[int] = field(default_factory=Counter)  # step -> groups it consumed
    max_age: int = 0  # in versions, of any token when it was trained on
    num_too_old: int = 0  # samples with a token beyond the bound
    max_staleness: int = 0  # the bound
    # What only a run in the process of a test can tell:
    groups: list[list[Trajectory]] = field(default_factory=list)  # as they were trained on
    reasons: dict[int, str] = field(default_factory=dict)  # place -> why it was lost

    def add_step(self, version: int, groups: list[list[Trajectory]]) -> None:
        """Weights of `version` are trained on these groups."""
        self.steps[version + 1] = len(groups)
        self.groups += groups
        self.trained.update(group[0].row_index for group in groups)
        for sample in itertools.chain(*groups):
            age = version - min(sampled for sampled in sample.versions if sampled >= 0)
            self.max_age = max(self.max_age, age)
            self.num_too_old += age > self.max_staleness

    def add_lost(self, lost: Sequence[LostRow]) -> None:
        self.lost.update(row.place for row in lost)
        self.reasons |= {row.place: row.reason for row in lost}

    def end(self, cursor: Cursor) -> None:
        """The run stops where the cursor says."""
        self.submitted, self.in_flight = cursor.next_row, set(cursor.pending)

    @property
    def missing(self) -> set[int]:
        """Places that were started, and of which nothing is known any more."""
        accounted = set(self.trained) | set(self.lost) | self.in_flight
        return set(range(self.submitted)) - accounted

    @property
    def doubled(self) -> set[int]:
        """Places with more than one fate."""
        fates = self.trained + self.lost + Counter(self.in_flight)
        return {place for place, count in fates.items() if count > 1}

    @property
    def unknown(self) -> set[int]:
        """Places that have a fate, but were never started."""
        accounted = set(self.trained) | set(self.lost) | self.in_flight
        return accounted - set(range(self.submitted))

    def check(self) -> None:
        assert not self.missing, f"rows lost: {sorted(self.missing)}"
        assert not self.doubled, f"rows used twice: {sorted(self.doubled)}"
        assert not self.unknown, f"rows that were never started: {sorted(self.unknown)}"
        assert self.max_age <= self.max_staleness, f"a token of age {self.max_age}"


def read_ledger(out_dir: Path) -> Ledger:
    """The ledger of a run that has ended, as of its last checkpoint."""
    checkpoints = out_dir / "checkpoints"
    name = (checkpoints / "latest").read_text().split()[0]
    cursor = json.loads((checkpoints / name / "cursor.json").read_text())
    config = yaml.safe_load((out_dir / "config.yaml").read_text())
    ledger = Ledger(
        submitted=cursor["next_row"],
        in_flight=set(cursor["pending"]),
        max_staleness=config["rollout"]["max_staleness"],
    )
    samples: dict[int, Counter[int]] = {}
    for line in read_rollouts(out_dir):
        samples.setdefault(line["version"], Counter()).update([line["row_index"]])
        sampled = [version for version in line["versions"] if version >= 0]
        # A line names the version that its step makes; it trained on the one before.
        age = line["version"] - 1 - min(sampled)
        ledger.max_age = max(ledger.max_age, age)
        ledger.num_too_old += age > ledger.max_staleness
    for version, places in samples.items():
        ledger.steps[version] = len(places)
        for place, count in places.items():  # a row that a step used twice has twice the samples
            ledger.trained[place] += math.ceil(count / config["group_size"])
    ledger.lost.update(line["row_index"] for line in read_lost(out_dir))
    return ledger


# --- All parts, for what runs in the process of a test --------------------------------------------

DEADLINE_S = 30.0
AGAIN_S = 10.0
"""Whatever the first alarm did not end gets another one after so long."""
NO_WEIGHTS = ("gate.start_prompts=0", "gate.max_logprob_gap=1000")
"""Settings for a recipe whose server follows a script: its log-probs are of no model."""
SMALL = RolloutConfig(prompts_per_step=4, max_staleness=1, episode_timeout_s=20, batch_timeout_s=20)


class Oracle:
    """Trains a little while a test breaks something, then judges all five parts.

        with oracle.ends_with(RolloutError, "7 of the latest 7 episodes failed"):
            oracle.train(engine, workflow, rows, steps=4)

    Where a test says no ending, the ending is that nothing raises.

    Args:
        deadline_s: a test that takes longer fails with a report of who waits for what.
    """

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._ledgers: list[Ledger] = []
        self._is_late = False

    def train(
        self,
        engine: InferenceEngine,
        workflow: RolloutWorkflow,
        rows: Sequence[Row],
        *,
        steps: int = 4,
        cfg: RolloutConfig = SMALL,
        at: Mapping[int, Callable[[], object]] | None = None,
    ) -> Ledger:
        """What became of every row, after so many steps with a push behind each.

        Args:
            at: what happens in a step, once it has its batch, and before its push.
        """
        ledger = Ledger(max_staleness=cfg.max_staleness)
        self._ledgers.append(ledger)
        trainer: Any = TinyTrainer()
        push_weights(trainer, engine, version=0)
        rollouts = RolloutExecutor(engine, workflow, rows, cfg)
        try:
            for version in range(steps):
                groups, lost = rollouts.next_batch(), rollouts.take_lost()
                ledger.add_lost(lost)
                ledger.add_step(version, groups)
                if at and version in at:
                    at[version]()
                push_weights(trainer, engine, version=version + 1)
        finally:
            rollouts.close()
            ledger.add_lost(rollouts.take_lost())
            ledger.end(rollouts.cursor(version=len(ledger.steps)))
        assert set(ledger.steps.values()) == {cfg.prompts_per_step}
        return ledger

    @contextlib.contextmanager
    def ends_with(self, kind: type[ArealiteError], cause: str) -> Iterator[None]:
        """Part 4: the body raises this error, the first line of which matches `cause`."""
        with pytest.raises(kind) as raised:
            yield
        [line, *_] = str(raised.value).splitlines()
        assert re.search(cause, line), f"{kind.__name__}: {line}"

    def __enter__(self) -> Self:
        adopt_orphans(True)
        self._surroundings = Surroundings.now()
        self._previous = signal.signal(signal.SIGALRM, self._alarm)
        signal.setitimer(signal.ITIMER_REAL, self._deadline_s, AGAIN_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            default_pool().close()  # its workers would stay until this process ends
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous)
        try:
            if kind is None:
                self._judge()
        finally:
            adopt_orphans(False)

    def _judge(self) -> None:
        for ledger in self._ledgers:
            ledger.check()
        self._surroundings.assert_unchanged()
        assert not self._is_late, f"it took longer than {self._deadline_s:g} s"

    def _alarm(self, _: int, __: FrameType | None) -> None:
        self._is_late = True
        # Derives from BaseException: what catches every error does not catch this one.
        pytest.fail(f"The test took longer than {self._deadline_s:g} s. {waits.report()}")


def adopt_orphans(should: bool) -> None:
    """Whether what loses its parent becomes a child of this process, so that it is seen."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(should), 0, 0, 0)


class TinyTrainer:
    """As much of a `TrainEngine` as a push asks for: a few weights, others each time."""

    def __init__(self) -> None:
        self._num_pushes = 0

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._num_pushes += 1
        for name in ("first", "second"):
            yield name, torch.full((4,), float(self._num_pushes))


# --- All parts, for a run of the recipe -----------------------------------------------------------


class RecipeRun:
    """The recipe in a process of its own, with every process that ever belonged to it."""

    def __init__(
        self,
        out_dir: Path,
        settings: Sequence[str] = (),
        *,
        launcher: Sequence[str] = TORCHRUN,
        recipe: str = "recipes/gsm8k_grpo.py",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.out_dir = out_dir
        self.family = dict[int, psutil.Process]()
        self.ports = set[int]()
        self.segments_before = set(os.listdir("/dev/shm"))
        self.log = out_dir.with_suffix(".log")
        self.log_begins = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.agent = psutil.Popen(
                [*launcher, recipe, f"out_dir={out_dir}", *settings],
                cwd=REPOSITORY,
                env=os.environ | (environment or {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def refresh(self) -> None:
        """Remember what runs below the launcher, also what has left its tree since."""
        for root in [self.agent, *self.family.values()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [root, *root.children(recursive=True)]:
                    self.family[process.pid] = process
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                listening = process.net_connections(kind="inet")
                self.ports |= {c.laddr.port for c in listening if c.status == psutil.CONN_LISTEN}

    def wait_until(self, reached: Callable[[], bool], *, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline, f"not reached; {self.printed()[-2000:]}"
            assert self.agent.is_running(), f"ended early; {self.printed()[-2000:]}"
            self.refresh()
            time.sleep(0.2)
        self.refresh()

    def wait(self, timeout_s: float) -> int:
        """Exit code; the family is kept up to date meanwhile."""
        deadline = time.monotonic() + timeout_s
        while (code := self.agent.poll()) is None:
            assert time.monotonic() < deadline, f"did not end; {self.printed()[-2000:]}"
            self.refresh()
            time.sleep(0.5)
        return code

    def find(self, part: str) -> psutil.Process:
        """The living process whose name or command line has `part`, the oldest of them."""
        for process in sorted(self.family.values(), key=lambda p: p.pid):
            with contextlib.suppress(psutil.Error):
                text = " ".join([process.name(), *process.cmdline()])
                if part in text and is_alive(process):
                    return process
        raise LookupError(f"no process with {part!r}")

    def steps_done(self) -> int:
        path = self.out_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["version"] for line in lines), default=-1)

    def printed(self) -> str:
        with open(self.log) as log:
            log.seek(self.log_begins)
            return log.read()

    def leftovers(self) -> list[str]:
        """What of the run still is there."""
        found: list[str] = []
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if is_alive(process):
                    found.append(f"process {process.pid} {' '.join(process.cmdline())[:90]}")
        found += [f"/dev/shm/{n}" for n in set(os.listdir("/dev/shm")) - self.segments_before]
        listening = {
            c.laddr.port for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN
        }
        found += [f"port {port}" for port in self.ports & listening]
        return found + [f"lock {lock}" for lock in held_locks(set(self.family))]

    def assert_gone(self, within_s: float = 10) -> None:
        deadline = time.monotonic() + within_s
        while left := self.leftovers():
            assert time.monotonic() < deadline, f"left after {within_s} s: {left}"
            time.sleep(0.2)

    def assert_ended(self, code: int, message: str = "", *, within_s: float) -> None:
        """Parts 1, 4 and 5: it ended in time, by this code, with one line that matches."""
        ended = self.wait(within_s)
        assert ended == code, f"exit code {ended}; {self.printed()[-3000:]}"
        self.assert_gone()
        errors = OUR_ERROR.findall(self.printed())
        assert len(errors) == bool(message), self.printed()[-3000:]
        assert re.search(message, self.printed()), self.printed()[-3000:]

    def kill(self) -> None:
        """End everything at once; for the end of a test."""
        self.refresh()
        for process in self.family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.agent.wait(10)


@contextlib.contextmanager
def recipe_runs(folder: Path) -> Iterator[Callable[..., RecipeRun]]:
    """A function that starts runs in one folder, each of which is gone in the end."""
    runs: list[RecipeRun] = []

    def start(*settings: str, **options: object) -> RecipeRun:
        runs.append(RecipeRun(folder / "run", settings, **options))  # type: ignore[arg-type]
        return runs[-1]

    try:
        yield start
    finally:
        for run in runs:
            run.kill()
