"""Two ranks on this machine, for tests of what is collective."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist


@cache
def _processes() -> ProcessPoolExecutor:
    # Kept until the tests end: starting two processes that import torch takes seconds.
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


def run_on_two_ranks(function: Callable[[Path], Any], folder: Path) -> list[Any]:
    """What `function(folder)` returns on rank 0 and on rank 1, each in a process of its own."""
    runs = [_processes().submit(_run, function, folder, rank) for rank in range(2)]
    return [run.result(timeout=120) for run in runs]


def _run(function: Callable[[Path], Any], folder: Path, rank: int) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting_point = f"file://{folder}/.meeting_point"
    torch_dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
    try:
        return function(folder)
    finally:
        torch_dist.destroy_process_group()
