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
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from arealite.observe.rollout_log import read_lost, read_rollouts

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
            threads=frozenset(t.name for t in threading.enumerate() if not t.daemon),
        )

    def left_since(self) -> list[str]:
        """What there is now and was not when this was taken."""
        now = Surroundings.now()
        return [
            f"{kind[:-1]} {item}"
            for kind in ("processes", "ports", "segments", "locks", "threads")
            for item in getattr(now, kind) - getattr(self, kind)
        ]

    def assert_unchanged(self, within_s: float = 5.0) -> None:
        deadline = time.monotonic() + within_s
        while left := self.left_since():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)


def held_locks(pids: set[int]) -> frozenset[str]:
    """Locks on files that these processes hold, as /proc knows them."""
    lines = Path("/proc/locks").read_text().splitlines()
    return frozenset(" ".join(line.split()[1:]) for line in lines if int(line.split()[4]) in pids)


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

    def check(self) -> None:
        assert not self.missing, f"rows lost: {sorted(self.missing)}"
        assert not self.doubled, f"rows used twice: {sorted(self.doubled)}"
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
    groups: dict[int, set[int]] = {}
    for line in read_rollouts(out_dir):
        groups.setdefault(line["version"], set()).add(line["row_index"])
        sampled = [version for version in line["versions"] if version >= 0]
        # A line names the version that its step makes; it trained on the one before.
        age = line["version"] - 1 - min(sampled)
        ledger.max_age = max(ledger.max_age, age)
        ledger.num_too_old += age > ledger.max_staleness
    for version, places in groups.items():
        ledger.steps[version] = len(places)
        ledger.trained.update(places)
    ledger.lost.update(line["row_index"] for line in read_lost(out_dir))
    return ledger


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
