"""Which GPUs servers take, and how much of their memory: for `serve`, and for `--explain`."""

import os
from dataclasses import dataclass

import torch

ALONE, SHARED = 0.9, 0.4
"""Share of a GPU's memory that a server takes by default; shared is one that a rank trains on."""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """The GPUs of the servers of a run."""

    gpus: list[str]
    is_shared: bool  # with ranks that train
    memory_share: float


def plan_gpus(named: str, memory_share: float) -> GpuPlan:
    """By default the GPUs that no rank of this host trains on, or else those of the ranks.

    Args:
        named: `server.gpus`, such as `4,5`; empty for the default.
        memory_share: `server.memory_share`; 0 for the default.
    """
    trained_on = [str(rank) for rank in range(int(os.getenv("LOCAL_WORLD_SIZE", "1")))]
    present = [str(index) for index in range(torch.cuda.device_count())]
    free = [gpu for gpu in present if gpu not in trained_on]
    gpus = named.split(",") if named else free or present
    is_shared = bool(set(gpus) & set(trained_on))
    return GpuPlan(gpus, is_shared, memory_share or (SHARED if is_shared else ALONE))
