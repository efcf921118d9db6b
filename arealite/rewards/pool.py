"""Runs reward functions so that none can hang, crash, starve or silently spoil a run.

    reward = await score(gsm8k_reward, response_text, row)        # on any event loop

A `def` runs in a killable process, one call at a time in each; an `async def` runs on the caller's
loop, with the same deadline. Either way the outcome is a finite float, or a RewardError that names
the function and says what went wrong.

    score()      --queue-->   one thread per worker   --socket-->   worker.py
    on the loop               keeps the deadline                    a process group of its own

Why not pebble or concurrent.futures: in theirs all workers share one pipe and its locks, so that a
worker that dies at the wrong moment takes the calls of others with it. In pebble 5.2.3 `kill -9`
of an idle worker breaks the pool, and of a busy one loses calls for good. Here nothing is shared.
"""

import asyncio
import atexit
import contextlib
import functools
import hashlib
import inspect
import math
import os
import queue
import threading
import weakref
from typing import TYPE_CHECKING, Any

import cloudpickle

from arealite.errors import ConfigError, RewardError
from arealite.rewards.by_row import RewardByRow, RewardFn
from arealite.rewards.process import Call, CallStoppedError, WorkerLostError, WorkerProcess
from arealite.rewards.worker import NotANumberError, as_reward, describe
from arealite.waits import waiting

if TYPE_CHECKING:  # arealite.types imports torch, which is nothing to wait for here
    from arealite.types import Row

MAX_FUNCTIONS = 64
"""A worker that holds so many is replaced: a notebook makes a new one each time a cell runs."""
REPICKLE_BYTES = 65_536
CLOSE_TIMEOUT_S = 5.0
"""For a thread to see its worker off, and what that has started."""


class RewardPool:
    """Worker processes for reward functions, started when they are first needed.

        with RewardPool(num_workers=4, timeout_s=15.0) as pool:
            reward = await pool.score(gsm8k_reward, response_text, row)

    A call that passes its deadline is killed, with the processes it started, and the next one gets
    a fresh worker. A call whose worker dies (out of memory, os._exit, segmentation fault) is tried
    once more. Cancelling the task that awaits a call kills the call.

    Safe to use from several threads and event loops at once.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        timeout_s: float = 15.0,
        memory_bytes: int | None = 4 * 2**30,
    ) -> None:
        """Only remembers its arguments.

        Args:
            num_workers: processes at most; by default one per usable core, but no more than 4.
            timeout_s: what one call may take from the moment it runs; waiting does not count.
            memory_bytes: private memory of one worker; None for no limit.
        """
        cores = len(os.sched_getaffinity(0))
        self.num_workers = min(4, cores) if num_workers is None else num_workers
        self.timeout_s = _checked_timeout(timeout_s)
        self.memory_bytes = memory_bytes
        if self.num_workers < 1:
            raise ConfigError(f"RewardPool: num_workers={num_workers} must be at least 1.")
        self._pid = os.getpid()
        self._pickler = _Pickler()
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over what follows, and over starting and killing workers
        self._is_closed = False
        self._num_unfinished = 0
        self._workers: list[WorkerProcess] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        """True after close(), and in a process that was forked from the one that made the pool."""
        return self._is_closed or os.getpid() != self._pid

    async def score(
        self, reward: RewardFn, text: str, row: "Row", *, timeout_s: float | None = None
    ) -> float:
        """What `reward(text, row)` returns, as a finite float.

        Args:
            reward: a `def`, lambda, closure or callable object that cloudpickle can pickle; or
                anything whose call is `async`, which is never pickled. Of a `RewardByRow` it is
                the one that the row names.
            text: the model's response.
            row: the row it responds to.
            timeout_s: deadline of this call, instead of the pool's.

        Raises:
            RewardError: it raised, took too long, died twice, or returned no finite number.
        """
        limit_s = self.timeout_s if timeout_s is None else _checked_timeout(timeout_s)
        if isinstance(reward, RewardByRow):
            reward = reward.of(row)
        if _is_async(reward):
            return await _score_on_loop(reward, text, row, limit_s)
        call = self._pickler.call(reward, text, row, limit_s)
        self._submit(call)
        try:
            with waiting(f"reward {call.name}", alarm_after_s=math.inf):
                return await asyncio.wrap_future(call.outcome)
        finally:
            self._abandon(call)

    def close(self) -> None:
        """Kill every worker; calls that still run or wait end in a RewardError."""
        if os.getpid() != self._pid:
            return  # the workers are not this process's to kill
        with self._lock:
            self._is_closed = True
            for worker in self._workers:
                worker.kill()
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=CLOSE_TIMEOUT_S)

    def _submit(self, call: Call) -> None:
        with self._lock:
            if self.is_closed:
                raise RewardError(f"Reward {call.name} was asked of a RewardPool that is closed.")
            self._num_unfinished += 1
            call.outcome.add_done_callback(self._count_down)
            self._queue.put(call)
            if len(self._threads) < min(self.num_workers, self._num_unfinished):
                # The thread that starts a worker has to outlive it: PR_SET_PDEATHSIG kills a
                # process when the thread that started it ends, not only the whole parent.
                thread = threading.Thread(target=self._serve, name="reward-worker", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _count_down(self, _: object) -> None:
        # The first callback of an outcome, so that whoever awaits it finds the count right.
        with self._lock:
            self._num_unfinished -= 1

    def _abandon(self, call: Call) -> None:
        """Stop a call that nobody awaits any more; it may well be over."""
        if call.outcome.done() or call.outcome.cancel():
            return
        with self._lock:
            call.is_abandoned = True
            if call.worker is not None:
                call.worker.kill()

    def _serve(self) -> None:
        """The work of one thread: feed one worker, and replace it whenever it is gone."""
        worker = WorkerProcess(self.memory_bytes, self._lock)
        with self._lock:
            self._workers.append(worker)
        while (call := self._queue.get()) is not None:
            if call.outcome.set_running_or_notify_cancel():
                try:
                    call.outcome.set_result(self._run(worker, call))
                except BaseException as error:
                    call.outcome.set_exception(error)
            del call  # a large row should not live on while this thread waits
        worker.end()

    def _run(self, worker: WorkerProcess, call: Call) -> float:
        """The value of one call, with a second try if its worker is lost."""
        for _ in range(2):
            self._assign(worker, call)
            try:
                return worker.run(call)
            except CallStoppedError as stopped:
                worker.end()
                raise RewardError(
                    f"Reward {call.name} {stopped} {call.where}; its worker was killed."
                ) from None
            except WorkerLostError as lost:
                ending = lost.args[0] if lost.args else worker.end()
                worker.end()
            finally:
                with self._lock:
                    call.worker = None
        raise RewardError(f"Reward {call.name}: its worker {ending}, twice, {call.where}.")

    def _assign(self, worker: WorkerProcess, call: Call) -> None:
        """Ready a worker; while `call.worker` is set, abandoning the call kills that worker."""
        if len(worker.loaded) >= MAX_FUNCTIONS:
            worker.end()
        with self._lock:
            if call.is_abandoned or self._is_closed:
                raise RewardError(f"Reward {call.name} was stopped: its RewardPool was closed.")
            try:
                worker.start()
            except OSError as error:
                raise RewardError(f"No process for reward {call.name}: {error}.") from error
            call.worker = worker


class _Pickler:
    """Turns functions and their arguments into bytes, on the thread of the caller."""

    def __init__(self) -> None:
        self._large: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()

    def call(self, reward: RewardFn, text: str, row: "Row", timeout_s: float) -> Call:
        """A call ready to be queued; RewardError if something cannot be pickled."""
        name = _name(reward)
        try:
            function = self._function(reward)
        except Exception as error:
            raise RewardError(
                f"Reward {name} cannot be sent to a worker process ({type(error).__name__}: "
                f"{error}). Make what it needs inside the function, or define it with "
                "`async def`, so that it runs in this process."
            ) from error
        try:
            arguments = cloudpickle.dumps((text, row))
        except Exception as error:
            raise RewardError(
                f"The row for reward {name} cannot be sent to a worker process "
                f"({type(error).__name__}: {error}). Its keys are {list(row)}."
            ) from error
        return Call(
            name=name,
            file=_file(reward),
            function=function,
            digest=hashlib.blake2b(function, digest_size=16).digest(),
            arguments=arguments,
            where=f"on the response that ends with {text[-60:]!r}",
            timeout_s=timeout_s,
        )

    def _function(self, reward: RewardFn) -> bytes:
        """The function as bytes: a small one anew for each call, a large one only once.

        A small one takes some 50 us, and a helper or a constant that a notebook cell has changed
        since is seen. A large one, say with a table in its closure, stays as it first was.
        """
        with contextlib.suppress(TypeError):  # it has no hash, or cannot be referenced weakly
            if (function := self._large.get(reward)) is not None:
                return function
        function = cloudpickle.dumps(reward)
        if len(function) > REPICKLE_BYTES:
            with contextlib.suppress(TypeError):
                self._large[reward] = function
        return function


_default: RewardPool | None = None
_default_lock = threading.Lock()


def default_pool() -> RewardPool:
    """The pool of this process, made when first asked for and closed when Python exits."""
    global _default
    with _default_lock:
        if _default is None or _default.is_closed:
            _default = RewardPool()
            atexit.register(_default.close)
        return _default


async def score(
    reward: RewardFn, text: str, row: "Row", *, timeout_s: float | None = None
) -> float:
    """`RewardPool.score` of the default pool."""
    return await default_pool().score(reward, text, row, timeout_s=timeout_s)


async def _score_on_loop(reward: RewardFn, text: str, row: "Row", timeout_s: float) -> float:
    name = _name(reward)
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            awaitable: Any = reward(text, row)
            value = await awaitable
        return as_reward(value)
    except NotANumberError as error:
        raise RewardError(f"Reward {name} {error}") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise  # the caller wants to stop; otherwise something inside the reward was cancelled
        raise RewardError(f"Reward {name} was cancelled from within.") from None
    except (Exception, SystemExit) as error:
        if isinstance(error, TimeoutError) and deadline.expired():
            raise RewardError(
                f"Reward {name} took longer than {timeout_s:g} s (reward_timeout_s)."
            ) from None
        raise RewardError(f"Reward {name} {describe(error)}") from error


def _is_async(reward: RewardFn) -> bool:
    function = _unwrapped(reward)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def _name(reward: RewardFn) -> str:
    function = _unwrapped(reward)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return name.rpartition("<locals>.")[2]


def _file(reward: RewardFn) -> str:
    """Where its code is; empty for one without code of its own."""
    function = _unwrapped(reward)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code.co_filename if code else ""


def _unwrapped(reward: Any) -> Any:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def _checked_timeout(timeout_s: float) -> float:
    if not timeout_s > 0:
        raise ConfigError(f"RewardPool: timeout_s={timeout_s} must be above 0.")
    return timeout_s
