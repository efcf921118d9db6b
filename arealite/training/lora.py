"""LoRA through peft: the model's weights stay, and small matrices beside them are trained.

    y = W x + (alpha / rank) B A x        A [rank, in], B [out, rank], and B is 0 at the start

Servers and exported folders get the sum, W + (alpha / rank) B A, under the name of W.
Source: arXiv:2106.09685.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from arealite.errors import ConfigError

if TYPE_CHECKING:
    from arealite.training.fsdp import FSDPConfig

ADAPTER = "default"
"""peft's name for the only adapter of a model."""


def add_adapters(model: PreTrainedModel, cfg: "FSDPConfig") -> None:
    """Freeze all weights, and put adapters beside the linear layers that `cfg.lora_layers` names.

    The same numbers on every rank. Raises ConfigError without peft, or for layers that the model
    has not, or whose adapters would not be trained.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # optional, and slow to import
    except ImportError as error:
        raise ConfigError(
            'train.lora_rank needs peft: pip install "arealite[lora]", or set train.lora_rank=0.'
        ) from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    last_parts = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    if unknown := sorted(set(cfg.lora_layers) - last_parts.keys()):
        linear = [n for n, m in last_parts.items() if isinstance(m, torch.nn.Linear)]
        raise ConfigError(
            f"train.lora_layers: the model has no {', '.join(unknown)}. Its linear layers are "
            f"{', '.join(linear)}."
        )
    if any(last_parts[name] in ends for name in cfg.lora_layers):
        raise ConfigError(
            f"train.lora_layers={list(cfg.lora_layers)} has the embedding or the head, whose "
            "adapters would not be trained. Name linear layers of the blocks, such as q_proj."
        )
    settings = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules=list(cfg.lora_layers) or "all-linear",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            inject_adapter_in_model(settings, model)
        except ValueError as error:
            raise ConfigError(f"train.lora_layers={list(cfg.lora_layers)}: {error}") from error


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before any training, within the body."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, 0.0):
        yield


def merged(model: PreTrainedModel, state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The full weight of this name in the model without adapters; a collective of all ranks."""
    path, _, kind = name.rpartition(".")
    if name in state:
        return full(state[name])
    base = full(state[f"{path}.base_layer.{kind}"])
    if kind != "weight":
        return base
    down, up = (full(state[f"{path}.lora_{which}.{ADAPTER}.weight"]) for which in "AB")
    scaling = model.get_submodule(path).scaling[ADAPTER]  # type: ignore[index]
    return base.to(down.dtype) + scaling * (up @ down)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; without a gradient, and maybe the weight itself."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
