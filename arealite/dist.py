"""torchrun's ranks, or one plain process: where am I, share work, add up, wait for each other.

`torchrun recipe.py`, `python recipe.py` and a notebook all run the same code. Every wait between
ranks ends within `TIMEOUT`.
"""

import os
import random
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from torch._C._distributed_c10d import HashStore

from arealite.errors import RankError
from arealite.lifeline import end_with
from arealite.waits import waiting

Item = TypeVar("Item")

TIMEOUT = timedelta(minutes=45)
"""Of a collective: longer than one rank may work on what the others wait for, which is 30 minutes
for a batch of rollouts."""
_FAILURE_KEY = "arealite/failure"


def init(*, seed: int = 0) -> None:
    """Join the process group of torchrun, or make one of a single process; seed this rank.

    May be called again (a notebook cell): then it only seeds.
    """
    if not torch_dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _end_with_agent()
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
            torch_dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            torch_dist.init_process_group(
                backend, store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT
            )
    random.seed(seed + rank())
    torch.manual_seed(seed + rank())


def close() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def rank() -> int:
    """Place of this process among all ranks, from 0."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(os.getenv("RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    if torch_dist.is_initialized():
        return torch_dist.get_world_size()
    return int(os.getenv("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Place of this process among the ranks of its host, from 0."""
    return int(os.getenv("LOCAL_RANK", "0"))


def shard(items: Sequence[Item]) -> list[Item]:
    """This rank's share: items rank, rank + world_size, ..."""
    return list(items[rank() :: world_size()])


def sum(values: Sequence[float]) -> list[float]:
    """Each value added up over all ranks, in float64."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    with waiting("the other ranks, to add up numbers"):
        torch_dist.all_reduce(total)
    return total.tolist()


def mean(values: Sequence[float]) -> float:
    """Mean of the values of all ranks together; nan if there are none at all."""
    total, count = sum([float(torch.tensor(values, dtype=torch.float64).sum()), len(values)])
    return total / count if count else float("nan")


def gather(item: Item) -> list[Item]:
    """The item of every rank, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [item]
    items: list[Item | None] = [None] * world_size()
    with waiting("the other ranks, to gather something of each"):
        torch_dist.all_gather_object(items, item)
    return items  # type: ignore[return-value]


def broadcast(item: Item) -> Item:
    """Rank 0's item, on every rank."""
    if world_size() == 1:
        return item
    box: list[Item] = [item]
    with waiting("rank 0, to hear what it has"):
        torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        with waiting("the other ranks, at a barrier"):
            torch_dist.barrier()


def announce_failure(text: str) -> None:
    """Tell all ranks that this one cannot go on; `announced_failure` hears it."""
    if world_size() > 1:
        # A collective would not do: the others may be waiting for something else.
        torch_dist.distributed_c10d._get_default_store().set(_FAILURE_KEY, f"Rank {rank()}: {text}")


def announced_failure() -> str:
    """What a rank has announced, itself included; empty while none has."""
    if world_size() == 1:
        return ""
    store = torch_dist.distributed_c10d._get_default_store()
    return store.get(_FAILURE_KEY).decode() if store.check([_FAILURE_KEY]) else ""


def _end_with_agent() -> None:
    """End this rank when the torchrun agent is gone: a killed agent leaves its ranks running."""
    reason = f"[rank {rank()}] torchrun is gone, so this rank ends too."
    end_with(os.getppid(), reason)
    # An agent that was gone by then is no parent any more; but it kept the store of its ranks.
    store = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        socket.create_connection(store, timeout=30).close()
    except OSError as error:
        raise RankError(f"{reason} Nobody answers at {store[0]}:{store[1]} ({error}).") from None
