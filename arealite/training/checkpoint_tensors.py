"""The tensors of a model's files: what a push must hold, and changes whose effect is known."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from arealite.data.models import resolve_model

Weights = Iterator[tuple[str, torch.Tensor]]
LOUDER = 1.25
"""Enough to be seen after rounding to any precision, and for every layer to matter."""


class CheckpointTensors:
    """Names, shapes and dtypes of the tensors of a model's files.

    Args:
        model: folder or Hub id.
    """

    def __init__(self, model: str) -> None:
        self._source = resolve_model(model)
        config = AutoConfig.from_pretrained(self._source)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        self._vocab_size = int(skeleton.get_input_embeddings().weight.shape[0])
        ends = (skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings().weight)
        named = dict(skeleton.named_parameters(remove_duplicate=False))
        self._of_vocabulary = {name for name, p in named.items() if any(p is end for end in ends)}
        self._tied = set(named) - {name for name, _ in skeleton.named_parameters()}
        self._ignored = list(skeleton._keys_to_ignore_on_load_unexpected or ())

    def unaccounted(self, pushed: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> list[str]:
        """In words, each difference between the tensors of the files and those that are pushed.

        A tied head has no tensor of its own, and transformers names some that it leaves out.
        """
        expected = self._in_files()
        missing = [
            f"{name} is not pushed"
            for name in expected.keys() - pushed.keys() - self._tied
            if not any(re.search(pattern, name) for pattern in self._ignored)
        ]
        unknown = [f"the model has no {name}" for name in pushed.keys() - expected.keys()]
        different = [
            f"{name} is pushed as {_described(pushed[name])}, not {_described(expected[name])}"
            for name in expected.keys() & pushed.keys()
            if pushed[name] != expected[name]
        ]
        return sorted(missing) + sorted(unknown if expected else []) + sorted(different)

    def reversed_ids(self, token_ids: list[int]) -> list[int]:
        """Each id counted from the end of the vocabulary."""
        return [self._vocab_size - 1 - token_id for token_id in token_ids]

    def reversed_vocabulary(self, weights: Weights) -> Weights:
        """The same model for `reversed_ids`."""
        for name, tensor in weights:
            yield name, tensor.flip(0) if name in self._of_vocabulary else tensor

    def louder_layers(self, weights: Weights) -> Weights:
        """Another model: all matrices but embedding and head are larger."""
        for name, tensor in weights:
            is_changed = tensor.dim() >= 2 and name not in self._of_vocabulary
            yield name, tensor * LOUDER if is_changed else tensor

    def _in_files(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Empty for a model without safetensors."""
        folder = Path(self._source)
        if not folder.is_dir():
            folder = Path(snapshot_download(self._source, allow_patterns=["*.safetensors"]))
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    part = tensors.get_slice(name)
                    shape = tuple(part.get_shape())
                    whole = tensors.get_tensor(name) if not shape else part[:0]
                    found[name] = (shape, whole.dtype)
        return found


def _described(entry: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = entry
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
