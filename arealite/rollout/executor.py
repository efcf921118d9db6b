"""Runs episodes beside training: admits rows, collects groups, and brings every error home.

    main thread                         rollout thread (arealite.background)
    next_batch() <── groups in order ── episodes, as many at once as admission allows
    push_weights ── engine.version ──>  admission: how far ahead of training it may run

Nothing is lost in silence: a row whose episode fails, is rejected or gets too old is recorded with
its reason, the next row takes its place, and many failures raise in the main thread.
"""

import asyncio
import concurrent.futures
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Self, cast

import arealite
from arealite import background, dist
from arealite.api import InferenceEngine, RolloutWorkflow
from arealite.config import check_at_least
from arealite.data.order import RowOrder
from arealite.errors import (
    ArealiteError,
    ConfigError,
    DataError,
    DeadlineError,
    NoServerError,
    RolloutError,
    TrajectoryError,
    first_cause,
)
from arealite.rollout.admission import Admission, Order, Ticket, merge_cursors
from arealite.rollout.groups import check_group
from arealite.rollout.witness import Witness
from arealite.types import Cursor, LostRow, Row, Trajectory
from arealite.waits import note_cut_waits, report, waiting

POLL_S = 0.01
"""How often the rollout thread looks for a new weight version."""
FATAL = (ConfigError, DataError, NoServerError)
"""What no other row would do better with."""
NOT_THE_USERS = (
    str(Path(arealite.__file__).parent) + os.sep,
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")),
    "<frozen",
)
"""Where files begin that are not the user's: ours, Python's and those of installed packages."""
FAILURE_WINDOW = 64
"""Latest episodes over which the share of failures is taken."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How rollouts are produced."""

    prompts_per_step: int = 128
    """Prompts in one training batch over all ranks; must divide by the number of ranks."""
    max_staleness: int = 2
    """How many weight versions a group may lag behind the policy in training; 0 is synchronous."""
    order: Order = "fifo"
    """What a batch is made of. `fifo`: the next rows in order, whatever the timing. `window`: rows
    may overtake a slow one until its last chance; half the mean age. `ready`: the oldest rows that
    have finished; what gets too old is dropped, long answers most. docs/staleness.md compares."""
    max_running_prompts: int = 0
    """Prompts in flight over all ranks; 0: as many as max_staleness admits. In any case no more
    than the servers work on at the same time (server.max_num_seqs)."""
    episode_timeout_s: float = 600.0
    """Limit of one episode in seconds; beyond it the row is recorded as failed."""
    batch_timeout_s: float = 1800.0
    """Limit in seconds for next_batch, which then raises and says what it waited for."""
    max_failure_share: float = 0.1
    """Share of the latest 64 episodes that may fail before the run stops."""

    def __post_init__(self) -> None:
        check_at_least(self, "rollout", prompts_per_step=1, max_staleness=0, max_running_prompts=0)
        check_at_least(self, "rollout", episode_timeout_s=1e-3, batch_timeout_s=1e-3)
        if not 0 <= self.max_failure_share <= 1:
            raise ConfigError(
                f"rollout.max_failure_share={self.max_failure_share} must be between 0 and 1."
            )
        prompts, ranks = self.prompts_per_step, dist.world_size()
        if prompts % ranks:
            below = prompts // ranks * ranks
            choices = " or ".join(str(choice) for choice in (below, below + ranks) if choice)
            raise ConfigError(
                f"rollout.prompts_per_step={prompts} does not divide by the {ranks} ranks of this "
                f"run. Set it to {choices}."
            )


class RolloutExecutor:
    """Produces training batches in the order of `cfg.order`. Use it as a context manager.

    Args:
        rows: the whole data set; this rank takes its share of the endless shuffled order.
        seed: of the order, which is a pure function of (seed, epoch, index).
        start: where the run stands, from `load_checkpoint`.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        workflow: RolloutWorkflow,
        rows: Sequence[Row],
        cfg: RolloutConfig,
        *,
        seed: int = 0,
        start: Cursor | None = None,
    ) -> None:
        if engine.version < 0:
            raise ConfigError(
                "The servers have no weight version yet. Call push_weights once before the first "
                "rollout, so that every token can name its weights."
            )
        ranks = dist.world_size()
        self._engine = engine
        self._workflow = workflow
        self._rows = rows
        self._order = RowOrder(len(rows), seed=seed)
        self._cfg = cfg
        batch = cfg.prompts_per_step // ranks
        limit = cfg.max_running_prompts or cfg.prompts_per_step * (cfg.max_staleness + 1)
        self._admission = Admission[list[Trajectory]](
            batch=batch,
            max_staleness=cfg.max_staleness,
            max_running=max(1, limit // ranks),
            start=start or Cursor(),
            order=cfg.order,
            rank=dist.rank(),
            world_size=ranks,
        )
        self._patience = 10 * batch + FAILURE_WINDOW  # rows in a row that may give nothing
        self._lost: list[LostRow] = []
        self._untrained: list[list[Trajectory]] = []  # a batch that another rank's failure held up
        self._recent = deque[Exception | None](maxlen=FAILURE_WINDOW)  # None: did not fail
        self._lost_since_a_group = Counter[str]()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._future = background.submit(self._run())

    def next_batch(self) -> list[list[Trajectory]]:
        """This rank's groups for the next training step. A collective of all ranks.

        What fails on one rank raises on all of them, at the same step: then no rank has begun it,
        and `cursor` still has all of its rows.

        Raises:
            RolloutError: too many episodes failed, or all were rejected.
            DataError: a row cannot be read by the model's tokenizer.
            NoServerError: no server is left.
            DeadlineError: nothing came within `batch_timeout_s`.
        """
        failure: Exception | None = None
        try:
            self._untrained = self._wait_for_batch()
        except Exception as error:
            failure = error
            dist.announce_failure(describe(error))
        raise_on_all_ranks(failure)
        self._engine.sleep()
        groups, self._untrained = self._untrained, []
        return groups

    def _wait_for_batch(self) -> list[list[Trajectory]]:
        deadline = time.monotonic() + self._cfg.batch_timeout_s
        with self._changed, waiting(self._admission.waiting_for):
            while True:
                if self._error is not None:
                    raise self._error
                if (groups := self._admission.take()) is not None:
                    return groups
                if failure := dist.announced_failure():
                    raise RolloutError(failure)
                if time.monotonic() > deadline:
                    print(report(), file=sys.stderr, flush=True)
                    raise DeadlineError(
                        f"next_batch waited {self._cfg.batch_timeout_s:.0f} s: "
                        f"{self._admission.waiting_for()}. What each episode waits for stands "
                        "above; if all of it takes its time, raise rollout.batch_timeout_s."
                    )
                self._changed.wait(timeout=1.0)

    def cursor(self, version: int) -> Cursor:
        """Where the run stands after `version` training steps; a collective of all ranks.

        A lost row counts as done with only once `take_lost` has returned it: whoever stops before
        that has not recorded it, and meets it again.
        """
        with self._changed:
            next_place, places = self._admission.unconsumed()
            places += [row.place for row in self._lost]
            places += [group[0].row_index for group in self._untrained]
        return merge_cursors(version, dist.gather((next_place, places)))

    def take_lost(self) -> list[LostRow]:
        """This rank's rows that were rejected, failed or got too old since the last call."""
        with self._changed:
            lost, self._lost = self._lost, []
        return lost

    def close(self) -> None:
        """Stop all episodes and wait until they have ended."""
        self._closing = True
        try:
            self._future.result(10)
        except concurrent.futures.TimeoutError as error:
            print(report(), file=sys.stderr, flush=True)
            raise DeadlineError(
                "The rollout thread did not stop within 10 s: a workflow blocks its event loop, or "
                "goes on when it is cancelled. Await what takes time, or run it in "
                "asyncio.to_thread, and let asyncio.CancelledError pass."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except DeadlineError as problem:
            if error is None:
                raise
            print(f"warning: {problem}", file=sys.stderr, flush=True)  # the error tells more

    async def _run(self) -> None:
        episodes: dict[Ticket, asyncio.Task[None]] = {}
        try:
            while not self._closing:
                for ticket in self._give_up_too_old():
                    if ticket in episodes:
                        episodes[ticket].cancel()
                for ticket in self._tickets():
                    episodes[ticket] = asyncio.create_task(self._run_episode(ticket))
                    episodes[ticket].add_done_callback(lambda _, ended=ticket: episodes.pop(ended))
                await asyncio.sleep(POLL_S)
        except Exception as error:  # whatever it is, the main thread must not wait for ever
            is_ours = isinstance(error, ArealiteError)
            self._fail(error if is_ours else error_of_ours("The rollout thread", error))
        finally:
            running = list(episodes.values())
            for episode in running:
                episode.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _give_up_too_old(self) -> list[Ticket]:
        """Record what no step may train on any more; returns its tickets."""
        with self._changed:
            given_up = self._admission.give_up_too_old()
            self._lost += [lost_row(ticket, "too old", group) for ticket, group in given_up]
        return [ticket for ticket, _ in given_up]

    def _tickets(self) -> list[Ticket]:
        """Of all episodes that may start, and that the engine has room for.

        What only waits in a server's queue gets old there, since its age counts from its start.
        """
        tickets: list[Ticket] = []
        room = self._engine.room
        group_size = getattr(self._workflow, "group_size", 1)
        with self._changed:
            while room is None or room > len(tickets) * group_size:
                ticket = self._admission.start(self._engine.version)
                if ticket is None:
                    break
                tickets.append(ticket)
        return tickets

    async def _run_episode(self, ticket: Ticket) -> None:
        """One row: its group, or the reason why there is none, goes to the admission."""
        try:
            row = self._rows[self._order[ticket.place]]
            group = await run_episode(
                self._engine, self._workflow, row, timeout_s=self._cfg.episode_timeout_s
            )
        except Exception as error:
            self._lose(ticket, error)
        else:
            if group is None:
                self._lose(ticket, None)
            else:
                self._accept(ticket, group)

    def _accept(self, ticket: Ticket, group: list[Trajectory]) -> None:
        labelled = [replace(trajectory, row_index=ticket.place) for trajectory in group]
        with self._changed:
            if not self._admission.accept(ticket, labelled):
                return  # given up and recorded before: the episode did not let itself be cancelled
            self._recent.append(None)
            self._lost_since_a_group.clear()
            self._changed.notify_all()

    def _lose(self, ticket: Ticket, error: Exception | None) -> None:
        reason = f"failed: {describe(error)}" if error else "rejected"
        with self._changed:
            if self._closing or not self._admission.lose(ticket):
                return  # cancelled, and this is what the episode made of it
            self._lost.append(lost_row(ticket, reason))
            self._recent.append(error)
            self._lost_since_a_group[type(error).__name__ if error else reason] += 1
        num_failed = sum(failure is not None for failure in self._recent)
        if isinstance(error, FATAL):
            self._fail(error)
        elif num_failed > self._cfg.max_failure_share * FAILURE_WINDOW:
            self._fail(self._too_many_failures())
        elif self._lost_since_a_group.total() > self._patience:
            self._fail(self._nothing_but_losses(ticket))

    def _too_many_failures(self) -> RolloutError:
        failures = [failure for failure in self._recent if failure is not None]
        error = RolloutError(
            f"{len(failures)} of the latest {len(self._recent)} episodes failed "
            f"({count_kinds(type(failure).__name__ for failure in failures)}), more than "
            f"rollout.max_failure_share={self._cfg.max_failure_share} of {FAILURE_WINDOW}. "
            f"The first: {describe(failures[0])}{user_frames(failures[0])}"
        )
        error.__cause__ = failures[0]
        return error

    def _nothing_but_losses(self, latest: Ticket) -> RolloutError:
        index = self._order[latest.place]
        return RolloutError(
            f"{self._lost_since_a_group.total()} rows in a row gave no group "
            f"({count_kinds(self._lost_since_a_group.elements())}); the latest is row {index} of "
            f"the data set, {self._rows[index]!r:.200}. Check what "
            f"{type(self._workflow).__name__}.arun_episode rejects."
        )

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._closing = True
            self._changed.notify_all()


async def run_episode(
    engine: InferenceEngine, workflow: RolloutWorkflow, row: Row, *, timeout_s: float
) -> list[Trajectory] | None:
    """The checked group of one row; None if the workflow rejects it.

    What goes wrong is raised as an Exception, also a `sys.exit`, a cancellation from within, or a
    panic of a library: it concerns this row, and must not end the loop that all rows share.

    Raises:
        DeadlineError: it took longer than `timeout_s`; the message shows where it was.
    """
    cut_waits = note_cut_waits()
    witness = Witness(engine)
    began_s = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s) as limit:
            group = await _started(workflow, cast(InferenceEngine, witness), row)
    except GeneratorExit:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # by us; otherwise something inside the episode was cancelled
        raise RolloutError("The episode was cancelled from within.") from error
    except BaseException as error:
        if limit.expired():
            # What cancelled it knows where it was; Python before 3.11.4 gives no cause, only this.
            cut = error.__cause__ or error.__context__ or error
            frames, waits = user_frames(cut), cut_waits()
            late_s = time.monotonic() - began_s - timeout_s
            raise DeadlineError(
                f"An episode took longer than rollout.episode_timeout_s={timeout_s:g}. Raise it"
                + (f", or see why it waited for {waits}" if waits else "")
                + (f", or see who blocked the event loop for {late_s:.0f} s" if late_s > 1 else "")
                + (f", or see what took so long:{frames}" if frames else ".")
            ) from error
        cause = first_cause(error)
        if not isinstance(cause, Exception):
            cause = error_of_ours("The episode", cause)
        raise cause from cause.__cause__
    return None if group is None else check_group(group, type(workflow).__name__, witness)


def _started(
    workflow: RolloutWorkflow, engine: InferenceEngine, row: Row
) -> Awaitable[list[Trajectory] | None]:
    episode: object = workflow.arun_episode(engine, row)
    if not isinstance(episode, Awaitable):
        name = type(workflow).__name__
        raise ConfigError(
            f"{name}.arun_episode is not a coroutine function. Write `async def arun_episode(self, "
            "engine, row)`, with `return` and not `yield`."
        )
    return episode


def run_episodes(
    engine: InferenceEngine,
    workflow: RolloutWorkflow,
    rows: Sequence[Row],
    *,
    limits: RolloutConfig | type[RolloutConfig] = RolloutConfig,
    max_running: int = 256,
) -> list[list[Trajectory]]:
    """The group of each row, for evaluation: at once, whatever the staleness of training.

    Rows that the workflow rejects are left out; an episode that fails is tried once more. A
    collective of all ranks, each with rows of its own: what fails on one raises on all.

    Args:
        limits: whose episode_timeout_s and batch_timeout_s hold; the class has the defaults.

    Raises:
        RolloutError: an episode failed, so that a mean would be over other rows than asked for; it
            shows the row.
        NoServerError, ConfigError, DataError: what no other row would do better with.
        DeadlineError: they took longer than `batch_timeout_s` together.
    """
    gate, limit_s = asyncio.Semaphore(max_running), limits.episode_timeout_s

    async def run_one(row: Row) -> list[Trajectory] | None:
        async with gate:
            for is_last in (False, True):
                try:
                    return await run_episode(engine, workflow, row, timeout_s=limit_s)
                except FATAL:
                    raise
                except Exception as error:
                    if is_last or isinstance(error, TrajectoryError):
                        raise RolloutError(
                            f"An episode outside training, such as of an evaluation, failed on "
                            f"the row {row!r:.200}: {describe(error)}{user_frames(error)}"
                        ) from error
                    print(f"warning: an episode is tried again: {describe(error)}", flush=True)

    async def run_all() -> list[list[Trajectory] | None]:
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(_fail_with_another_rank())
            episodes = [tasks.create_task(run_one(row)) for row in rows]
            for episode in episodes:
                await episode
            watcher.cancel()
        return [episode.result() for episode in episodes]

    groups: list[list[Trajectory] | None] = []
    failure: BaseException | None = None
    try:
        what = f"{len(rows)} episodes (limit rollout.batch_timeout_s)"
        groups = background.run(run_all(), timeout_s=limits.batch_timeout_s, what=what)
    except Exception as error:
        failure = first_cause(error)
        dist.announce_failure(describe(failure))
    raise_on_all_ranks(failure)
    if rows and not any(groups):
        name = type(workflow).__name__
        print(f"warning: {name} rejected all of the {len(rows)} rows of an evaluation.", flush=True)
    return [group for group in groups if group is not None]


async def _fail_with_another_rank() -> None:
    """Raise as soon as another rank has failed; whoever waits for nothing more cancels it."""
    while not (failure := dist.announced_failure()):
        await asyncio.sleep(1.0)
    raise RolloutError(failure)


def raise_on_all_ranks(failure: BaseException | None) -> None:
    """Raise what failed here, or else what failed on another rank; a collective of all ranks."""
    failures = dist.gather(describe(failure) if failure else "")
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text:
            raise RolloutError(f"Rank {rank} failed: {text}")


def lost_row(ticket: Ticket, reason: str, group: Sequence[Trajectory] | None = None) -> LostRow:
    """The record of a row that will not be trained on; with means if its group had finished."""
    return LostRow(
        place=ticket.place,
        reason=reason,
        response_length=fmean(sample.response_length for sample in group) if group else None,
        reward=fmean(sample.reward for sample in group) if group else None,
    )


def count_kinds(kinds: Iterable[str]) -> str:
    """How many there are of each, as "OSError 5, KeyError 2", the most frequent first."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(kinds).most_common())


def error_of_ours(who: str, cause: BaseException) -> RolloutError:
    """An error that may be raised anywhere, for one that may not."""
    error = RolloutError(f"{who} raised {describe(cause)}")
    error.__cause__ = cause
    return error


def user_frames(error: BaseException) -> str:
    """Where in the user's code an error arose, below its message; empty for errors of ours."""
    if isinstance(error, ArealiteError):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(NOT_THE_USERS)]
    return "".join("\n" + line.rstrip() for line in traceback.format_list(theirs[-2:]))


def describe(error: BaseException | None) -> str:
    """The error's type and message, in one line where it has one."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")
