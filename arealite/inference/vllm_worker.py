"""The receiving end of a weight push, inside a vLLM worker.

The sender is `arealite.inference.transport`. Weights come in buckets: of places in memory that both
map, or in a safetensors file; or vLLM's own receivers for CUDA IPC and NCCL take them.
"""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from arealite import malloc
from arealite.inference.cuda_handles import handles_from_json
from arealite.inference.transport import REGION_NAME, TRANSPORT, WEIGHTS_DIR, tensor_at

_ENGINES = {"ipc": IPCWeightTransferEngine, "nccl": NCCLWeightTransferEngine}


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where weights may come from."""

    region: str | None = None
    """Path of the sender's memory file in /proc, for `tensors`."""
    folder: str | None = None
    """The only folder from which `file` is read."""
    engine: Literal["ipc", "nccl"] | None = None
    """vLLM's receiver for `engine_update`."""
    engine_info: dict[str, Any] = field(default_factory=dict)
    """What that one has to know first."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Either tensors in the shared region, or one safetensors file, or a message for the engine."""

    tensors: list[dict[str, Any]] = field(default_factory=list)
    """Each: name, dtype, shape, and offset in the region in bytes."""
    file: str | None = None
    engine_update: dict[str, Any] | None = None
    is_abandoned: bool = False
    """The update never came to its end: layers that are not complete get back what they had."""
    reason: str = "nobody goes on with it"


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads Hugging Face weights into the running model, layer by layer."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    _region: str | None = None
    _mapped: mmap.mmap | None = None
    _folder: Path | None = None
    _engine: WeightTransferEngine[Any, Any] | None = None
    _num_updates = 0

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Map the region, remember the folder, or make the engine."""
        self.shutdown()
        if init_info.region is not None:
            self._region, self._mapped = init_info.region, _map(init_info.region)
        if init_info.folder is not None:
            self._folder = _agreed(init_info.folder)
        if init_info.engine is not None:
            self._engine = self._make_engine(init_info.engine, init_info.engine_info)

    def start_weight_update(self) -> None:
        """Prepare the layers, also behind an update that never finished."""
        self._put_back()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one bucket."""
        if update_info.is_abandoned:
            # The one way to close an update that no longer has a sender: vLLM takes it as failed.
            self._put_back()
            raise ValueError(f"this weight update was abandoned: {update_info.reason}")
        if update_info.engine_update is not None:
            if self._engine is None:
                raise ValueError("engine_update needs init_weight_transfer_engine with one first")
            update = handles_from_json(update_info.engine_update)
            return self._engine.receive_weights(self._engine.parse_update_info(update))
        model: Any = self.model  # every vLLM model has load_weights; nn.Module does not say so
        if update_info.file is not None:
            model.load_weights(iter(load_file(self._checked(update_info.file)).items()))
        else:
            model.load_weights(self._tensors(update_info.tensors))

    def finish_weight_update(self) -> None:
        """Put the last layers in place, and repack what the reload does not know about."""
        if self._engine is not None:  # which may also let go of the sender's memory
            self._engine.finish_weight_update()
        else:
            finalize_layerwise_reload(self.model, self.model_config)
        repack_heads(self.model)
        self._num_updates += 1
        if self.device.type == "cpu":
            malloc.trim(self._num_updates)

    def shutdown(self) -> None:
        """Give the region back, which goes as soon as nobody has a tensor in it; end the engine."""
        self._region = self._mapped = self._folder = None
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _make_engine(self, backend: str, info: dict[str, Any]) -> WeightTransferEngine[Any, Any]:
        if backend != os.environ.get(TRANSPORT):
            raise ValueError(
                f"this server was not started to take weights over {backend}: set "
                f"server.transport={backend} where it is started"
            )
        if info.get("master_address") is not None:  # a store, from which vLLM unpickles
            raise ValueError("NCCL needs nccl_unique_id_b64 here, not master_address")
        kind: Any = _ENGINES[backend]
        engine = kind(self.config, self.vllm_config, self.device, self.model)
        engine.init_transfer_engine(engine.parse_init_info(info))
        if backend == "nccl" and not engine.model_update_group.available:
            raise ValueError("vLLM's NCCL is switched off: unset VLLM_DISABLE_PYNCCL")
        return engine

    def _put_back(self) -> None:
        """End an update that never finished; layers that are not complete get back what they had.

        vLLM would go on with them in the next update, and take a part that comes twice for the one
        that is missing.
        """
        infos = map(get_layerwise_info, self.model.modules())
        unfinished = [info for info in infos if info.can_load()]
        for info in unfinished:
            info.load_numel = 0
            info.loaded_weights.clear()
        if unfinished:
            finalize_layerwise_reload(self.model, self.model_config)

    def _tensors(self, places: list[dict[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of the region, where they lie: vLLM copies them into its own.

        It keeps references until a layer is complete, and the sender changes nothing until the
        update has come to its end, or was given up and begins again.
        """
        if self._region is None or self._mapped is None:
            raise ValueError("tensors need init_weight_transfer_engine with a region first")
        for place in places:
            try:
                tensor = tensor_at(place, self._mapped)
            except ValueError:  # it has grown
                self._mapped = _map(self._region)
                tensor = tensor_at(place, self._mapped)
            yield place["name"], tensor

    def _checked(self, file: str) -> Path:
        path = Path(file).resolve()  # follows links, so that one cannot lead out of the folder
        if self._folder is None or self._folder not in path.parents:
            raise ValueError(f"{file} is not inside the folder agreed on at the start")
        if path.suffix != ".safetensors":
            raise ValueError(f"{file} is not a safetensors file")
        return path


def _agreed(folder: str) -> Path:
    """The folder, if it is below the one that this server was started with."""
    path, allowed = Path(folder).resolve(), os.environ.get(WEIGHTS_DIR)
    if allowed is None or not path.is_relative_to(allowed):
        raise ValueError(
            f"{folder} is not inside server.weights_dir={allowed or ''} of this server"
        )
    return path


def _map(region: str) -> mmap.mmap:
    """The sender's memory; only what `transport.SharedMemory` has made, and of our own user."""
    if os.readlink(region) != f"/memfd:{REGION_NAME} (deleted)":
        raise ValueError(f"{region} is not the memory of an arealite trainer")
    # Writable although nothing writes: torch.frombuffer warns about read-only memory.
    with open(region, "r+b") as file:
        if os.fstat(file.fileno()).st_uid != os.getuid():
            raise ValueError(f"{region} belongs to another user")
        return mmap.mmap(file.fileno(), 0)


def repack_heads(model: torch.nn.Module) -> None:
    """Repack embeddings and heads from the weights they hold now.

    On CPU vLLM multiplies by a packed copy of `lm_head`. A tied head has no weight of its own in
    the checkpoint, so the layerwise reload never touches it and the packed copy stays old.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)
