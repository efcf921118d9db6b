"""Loads a model on each rank, and writes what that took.

torchrun --nproc-per-node 2 -m tests.training.loading_ranks MODEL OUT.json
"""

import json
import sys
from itertools import chain
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from arealite import dist
from arealite.errors import DataError
from arealite.training.model import PolicyModel
from arealite.training.sharding import load_from_rank_0, shard
from tests.training.helpers import CFG


def memory_mb(key: str) -> float:
    """VmHWM (peak) or VmRSS of this process."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)]
    return int(line.split()[1]) / 1e3


def described(tensor: torch.Tensor) -> list[str | float]:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    total = float(whole.detach().double().abs().sum())
    return [str(list(whole.shape)), str(whole.dtype), str(tensor.requires_grad), total]


def main(model: str, out: Path) -> None:
    dist.init()
    calls: list[str] = []
    read = AutoModelForCausalLM.from_pretrained

    def noted(path: str, **settings: object) -> object:
        calls.append(path)
        return read(path, **settings)

    AutoModelForCausalLM.from_pretrained = noted
    before_mb = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    try:
        policy = PolicyModel(load_from_rank_0(model)[0])
    except DataError as error:
        print(f"rank {dist.rank()}: DataError: {error}", flush=True)
        raise
    shard(policy, CFG, torch.device("cpu"))
    peak_mb = memory_mb("VmHWM") - before_mb
    tensors = chain(policy.named_parameters(), policy.named_buffers())
    figures = {
        "tensors": {name: described(tensor) for name, tensor in tensors},
        "has_read": bool(calls),
        "peak_mb": peak_mb,
        "model_mb": 4e-6 * sum(parameter.numel() for parameter in policy.parameters()),
        "sum": sum(float(p.full_tensor().double().abs().sum()) for p in policy.parameters()),
    }
    whole = dist.gather(figures)
    if dist.rank() == 0:
        out.write_text(json.dumps(whole))
    dist.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
