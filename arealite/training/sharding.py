"""FSDP2: a model from its files to shards on all ranks, each file read once.

files --rank 0--> model --block by block--> in float32 --> sharded --> each rank's part, scattered
shapes --other ranks--> empty model on the meta device -->┘
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from arealite import dist
from arealite.training.model import PolicyModel, blocks, load_model

if TYPE_CHECKING:
    from arealite.training.fsdp import FSDPConfig


class _Entry(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


def load_from_rank_0(name: str) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """The model, and the dtype of each tensor of its state. Only rank 0 reads its files.

    The model of the others is empty, unless it would be another one than the files make: then all
    read them. Raises on all ranks what `load_model` raised on rank 0.
    """
    if dist.rank() > 0:
        told = dist.broadcast(({}, {}))
        if isinstance(told, Exception):
            raise told
        entries, dtypes = told
        model = _empty(name, entries)
    else:
        try:
            model = load_model(name)
        except Exception as error:
            dist.broadcast(error)
            raise
        dtypes = {path: tensor.dtype for path, tensor in model.state_dict().items()}
        dist.broadcast((_entries(model), dtypes))
    is_known = all(dist.gather(model is not None))
    if model is None or (dist.rank() > 0 and not is_known):
        model = load_model(name)
    return model, dtypes


def _empty(name: str, entries: dict[str, _Entry]) -> PreTrainedModel | None:
    """The model without weights, as rank 0 has it; None if it cannot be made from the config."""
    try:
        model = load_model(name, is_empty=True)
    except Exception:  # rank 0 could load it
        return None
    if _shapes(_entries(model)) != _shapes(entries):  # files that untie what the config ties, say
        return None
    for path, tensor in _tensors(model):
        tensor.data = tensor.data.to(entries[path].dtype)
        tensor.requires_grad_(entries[path].requires_grad)
    return model


def _entries(model: PreTrainedModel) -> dict[str, _Entry]:
    return {
        path: _Entry(tensor.shape, tensor.dtype, tensor.requires_grad)
        for path, tensor in _tensors(model)
    }


def _shapes(entries: dict[str, _Entry]) -> dict[str, torch.Size]:
    return {path: entry.shape for path, entry in entries.items()}


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def shard(policy: PolicyModel, cfg: "FSDPConfig", device: torch.device) -> FSDPModule:
    """The policy itself, sharded in place: each block, then the rest with the root."""
    is_half = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    if cfg.activation_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in policy.modules():
            # Not train(): what is inside of the blocks would draw random numbers.
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    is_offloaded = cfg.cpu_offload and device.type == "cuda"
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    master = torch.float64 if cfg.dtype == "float64" else torch.float32
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_half else None, reduce_dtype=master
    )
    offload = CPUOffloadPolicy() if is_offloaded else OffloadPolicy()
    home = torch.device("cpu") if is_offloaded else device
    for block in blocks(policy.model):
        _cast(block, master, but_frozen=is_half)
        with _from_rank_0(block, home):
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=precision,
                offload_policy=offload,
                reshard_after_forward=cfg.reshard_after_forward,
            )
    _cast(policy, master, but_frozen=is_half)
    with _from_rank_0(policy, home):
        root = fully_shard(policy, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for buffer in policy.buffers():
        torch.distributed.broadcast(buffer, 0)
    for name in ("hidden", "alone"):
        register_fsdp_forward_method(policy, name)
    # A sum, not FSDP's mean: loss_weight is already divided by the count of all ranks.
    for module in sharded_modules(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return root


@contextmanager
def _from_rank_0(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Shard the module inside; each rank then gets its part of what rank 0 has in it.

    Only the largest parameter is ever whole on another rank, and only for a moment.
    """
    if dist.world_size() == 1:
        yield
        return
    whole = {
        name: parameter.detach()
        for name, parameter in module.named_parameters()
        if not isinstance(parameter, DTensor)
    }
    yield
    if dist.rank() > 0:
        # Not to_empty(), which would also empty the buffers.
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    with torch.no_grad():
        for name, tensor in whole.items():
            _scatter(tensor, module.get_parameter(name))


def _scatter(whole: torch.Tensor, sharded: torch.Tensor) -> None:
    """Give each rank its part of rank 0's tensor."""
    assert isinstance(sharded, DTensor)
    mesh = sharded.device_mesh
    source = torch.empty_like(whole, device=mesh.device_type) if whole.is_meta else whole
    part = distribute_tensor(source, mesh, sharded.placements, src_data_rank=0)
    sharded.to_local().copy_(part.to_local())


def sharded_modules(root: FSDPModule) -> list[FSDPModule]:
    assert isinstance(root, torch.nn.Module)
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _cast(module: torch.nn.Module, dtype: torch.dtype, *, but_frozen: bool) -> None:
    # Block by block, just before it is sharded: only one block is whole in float32 at a time.
    for parameter in module.parameters():
        is_kept = but_frozen and not parameter.requires_grad
        if parameter.is_floating_point() and not is_kept and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(dtype)
