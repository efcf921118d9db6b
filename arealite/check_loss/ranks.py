"""Ranks as threads of this process: they start in a millisecond and take any closure.

Each has a real gloo group, so that `arealite.dist` and `torch.distributed` answer it as they do
under torchrun. All other threads keep the process group they have, if any.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch._C._distributed_c10d import HashStore, ProcessGroupGloo, Store
from torch.distributed import ProcessGroup, distributed_c10d

from arealite.errors import RankError

Result = TypeVar("Result")

TIMEOUT = timedelta(seconds=10)
MAX_ATTEMPTS = 3
_one_call = threading.Lock()


def run_on_ranks(num_ranks: int, function: Callable[[], Result]) -> list[Result]:
    """What `function` returns on rank 0, 1, ...; raises what it raised on the first that failed.

    Ranks that could not connect, as happens on a busy machine, begin anew; the function then is
    called again where it had been called.
    """
    for attempt in range(MAX_ATTEMPTS):
        results, errors = _run_once(num_ranks, function)
        if not any(isinstance(error, _NoConnectionError) for error in errors):
            break
        if attempt == MAX_ATTEMPTS - 1:
            raise RankError(
                f"{num_ranks} ranks in this process could not connect to each other in "
                f"{MAX_ATTEMPTS} attempts. Is something keeping programs from 127.0.0.1?"
            ) from errors[0]
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(num_ranks)]


class _NoConnectionError(Exception):
    """A rank did not reach the others, which says nothing of what it was to run."""


def _run_once(
    num_ranks: int, function: Callable[[], Result]
) -> tuple[dict[int, Result], list[BaseException]]:
    """What came back, by rank, and what was raised, the first first."""
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    store = HashStore()
    with _one_call, _worlds() as worlds, _world_size_in_environment(num_ranks):

        def run(rank: int) -> None:
            try:
                worlds.enter(_connected(store, rank, num_ranks))
                results[rank] = function()
            except BaseException as error:
                errors.append(error)
            finally:
                # Its connections close, so that a rank which waits for this one fails at once.
                worlds.leave()

        threads = [
            threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in range(num_ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results, errors


def _connected(store: Store, rank: int, num_ranks: int) -> ProcessGroup:
    try:
        return _gloo(store, rank, num_ranks)
    except RuntimeError as error:
        raise _NoConnectionError(str(error)) from error


def _gloo(store: Store, rank: int, num_ranks: int) -> ProcessGroup:
    # By hand, as init_process_group would also set the excepthook and registries of the process.
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # By address, as a laptop without a network cannot resolve its own name.
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = TIMEOUT
    group = ProcessGroup(store, rank, num_ranks)
    gloo = ProcessGroup.BackendType.GLOO
    group._set_default_backend(gloo)
    backend = ProcessGroupGloo(store, rank, num_ranks, options)
    group._register_backend(torch.device("cpu"), gloo, backend)
    return group


class _Worlds:
    """Stands in for torch's record of process groups, with one for each thread that entered."""

    def __init__(self, usual: Any) -> None:
        self.__dict__.update(_usual=usual, _own=threading.local())

    def enter(self, group: ProcessGroup) -> None:
        self._own.world = SimpleNamespace(
            default_pg=group,
            pg_map={group: ("gloo", None)},
            pg_names={group: "simulated"},
            pg_group_ranks={group: {rank: rank for rank in range(group.size())}},
            pg_backend_config={group: "cpu:gloo"},
            group_count=1,
            tags_to_pg={},
            pg_to_tag={group: ""},
            pg_coalesce_state={},
            comms=[],
        )

    def leave(self) -> None:
        self._own.__dict__.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self._own, "world", self._usual), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(getattr(self._own, "world", self._usual), name, value)


@contextmanager
def _worlds() -> Iterator[_Worlds]:
    usual = distributed_c10d._world
    worlds = _Worlds(usual)
    distributed_c10d._world = worlds  # type: ignore[assignment]
    try:
        yield worlds
    finally:
        distributed_c10d._world = usual


@contextmanager
def _world_size_in_environment(num_ranks: int) -> Iterator[None]:
    """As torchrun sets it. RANK cannot differ between threads, so it stays as it is."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(num_ranks)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before
