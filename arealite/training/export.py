"""A sharded model to what others read: Hugging Face tensors and folders, and run checkpoints.

Every function is a collective of all ranks.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from arealite import dist
from arealite.data.models import resolve_model
from arealite.errors import CheckpointError
from arealite.training.lora import merged

# Copied, not loaded and saved: a tokenizer class may drop what it does not know.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
)


def checkpoint_tensors(
    model: PreTrainedModel, dtypes: dict[str, torch.dtype]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of the full tensors under the names of the model's checkpoint.

    Args:
        model: sharded or not; transformers' names of its weights are turned back into those of
            the checkpoint (mixtures of experts are stored fused, but published one by one).
        dtypes: per name in the model as it was loaded, what to round to.
    """
    state = model.state_dict()
    unique = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - unique
    for group in _convertible(model, [name for name in dtypes if name not in tied]):
        # Always a copy: on one rank the full tensor is the weight itself, which the next step
        # changes.
        full = {name: merged(model, state, name).to(dtypes[name], copy=True) for name in group}
        yield from revert_weight_conversion(model, full).items()


def _convertible(model: PreTrainedModel, names: list[str]) -> list[list[str]]:
    """Names that must be converted together: one by one, or a block's if the model fuses some."""
    if not getattr(model, "_weight_conversions", None):
        return [[name] for name in names]
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        groups.setdefault(".".join(parts[: index + 1]) or name, []).append(name)
    return list(groups.values())


def save_pretrained(
    path: Path, model: PreTrainedModel, dtypes: dict[str, torch.dtype], source: str
) -> None:
    """Write a model folder that plain transformers and vLLM load; rank 0 holds all tensors at once.

    Args:
        source: what the model was loaded from; its tokenizer files are copied.
    """
    is_writer = dist.rank() == 0
    tensors = {
        name: tensor.cpu() for name, tensor in checkpoint_tensors(model, dtypes) if is_writer
    }
    if is_writer:
        path.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(tensors, path)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(path)
        for file in path.glob("*.safetensors"):
            shutil.copymode(path / "config.json", file)  # safetensors writes for its owner alone
        if model.generation_config is not None:
            model.generation_config.save_pretrained(path)
        _copy_tokenizer(source, path)
    dist.barrier()


def _copy_tokenizer(source: str, path: Path) -> None:
    folder = Path(resolve_model(source))
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=list(TOKENIZER_FILES)))
    for pattern in TOKENIZER_FILES:
        for file in folder.glob(pattern):
            if file.parent.resolve() != path.resolve():
                shutil.copy2(file, path / file.name)


def save_state(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, int],
) -> None:
    """Write weights, optimizer state and counters, each rank its own part.

    Raises CheckpointError if that fails.
    """
    try:
        save(_state(module, optimizer, counters), checkpoint_id=path)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"The training state could not be written to {path}: {error}. "
            "Check that all ranks can write there and that the disk is not full."
        ) from error


def load_state(
    path: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: dict[str, int],
) -> dict[str, int]:
    """Fill module and optimizer from `save_state`; returns its counters.

    Settings of the optimizer, such as its betas, stay those of this run. After an error the
    weights are those of neither: load another checkpoint, or stop.

    Raises CheckpointError if the folder is missing, damaged or of another model.
    """
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    state = _state(module, optimizer, counters)
    try:
        load(state, checkpoint_id=path)
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise CheckpointError(
            f"The training state in {path} could not be read: {error}. "
            "Continue from an older checkpoint, with the model and optimizer it was written for."
        ) from error
    set_state_dict(
        module,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    return state["counters"]


def _state(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, counters: dict[str, int]
) -> dict[str, Any]:
    # Frozen weights are those of the model's own files.
    options = StateDictOptions(ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(module, optimizer, options=options)
    return {"model": weights, "optimizer": optimizer_state, "counters": dict(counters)}
