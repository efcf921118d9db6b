"""Weight pushes over CUDA IPC or NCCL, through the trainer-side engines of vLLM itself.

Each server has an engine of its own, in a thread of its own, so that one server that dies takes
none of the others with it. What an engine wants to tell its server goes the usual way instead, with
our limits and our token:

    engine, in its thread ──> messages ──> pusher ──> vllm_worker.WeightReceiver ──> vLLM's receiver
              ^                                 │
              └──── next, once it answered ─────┘

The only module of a trainer that imports vLLM, which changes settings of torch when imported; only
`server.transport` ipc or nccl does that.
"""

import base64
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    uid_init_process_group,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

from arealite.errors import ServerError
from arealite.inference.cuda_handles import handles_to_json
from arealite.inference.fleet import Server
from arealite.inference.transport import BUCKET_BYTES, Bucket, KeptWeights, NamedWeights

Backend = Literal["ipc", "nccl"]
Engine = TrainerWeightTransferEngine[Any]

ENGINE_TIMEOUT_S = 15.0
"""So long an engine may take for a step in which it waits for nobody but its GPU."""


class VLLMTransport:
    """`Transport` through vLLM's engines.

    With ipc, for a server on this process's own GPU, weights are kept on that GPU, once more. With
    nccl they are kept in CPU memory, and pass through the GPU in buckets: a server that takes one
    answers nobody, and may seem to hang.
    """

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self._backend: Backend = backend
        self._device = device
        self._kept = KeptWeights(device if backend == "ipc" else torch.device("cpu"))
        self._engines: dict[Server, _EngineThread] = {}

    def init_info(self, server: Server) -> dict[str, Any]:
        """Begin anew with this server: its side of the engine is made from what this returns."""
        if server in self._engines:
            self._engines.pop(server).close()
        size = max(BUCKET_BYTES, self._kept.largest_bytes)
        if self._backend == "ipc":
            make = partial(_make_ipc, size=size)
        else:
            make = partial(_make_nccl, size=size, num_workers=server.num_workers)
        engine = _EngineThread(f"{self._backend} engine for {server.address}", make, self._device)
        self._engines[server] = engine
        return {"engine": self._backend, "engine_info": engine.next_message()}

    def keep(self, weights: NamedWeights) -> None:
        self._kept.keep(weights)

    def updates(self, servers: Sequence[Server]) -> Iterator[dict[Server, dict[str, Any]]]:
        """One server after the other: their engines share the streams of a GPU."""
        # ipc cuts the weights itself, to one buffer that it goes on using.
        nbytes = BUCKET_BYTES if self._backend == "nccl" else None
        for server in servers:
            engine = self._engines[server]
            try:
                for bucket in self._kept.buckets(nbytes):
                    engine.send(bucket)
                    while message := engine.next_message():
                        yield {server: {"engine_update": message}}
                        engine.answered()
            except ServerError as error:
                # Its server is told: it would take the end of the update for that of a whole one.
                self._engines.pop(server).close()
                yield {server: {"is_abandoned": True, "reason": str(error)}}

    def close(self) -> None:
        while self._engines:
            self._engines.popitem()[1].close()


# --- Engines --------------------------------------------------------------------------------------


def _make_ipc(client: VLLMWeightSyncClient, source: WeightSource, *, size: int) -> Engine:
    info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def _make_nccl(
    client: VLLMWeightSyncClient, source: WeightSource, *, size: int, num_workers: int
) -> Engine:
    """The two ends meet by an id that goes in the message.

    vLLM's own way is a store at which the server would unpickle what it finds.
    """
    unique_id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
    info = NCCLWeightTransferInitInfo(
        rank_offset=1,
        world_size=1 + num_workers,
        nccl_unique_id_b64=base64.b64encode(unique_id).decode(),
        packed=True,
        packed_buffer_size_bytes=size,
    )
    engine = NCCLTrainerWeightTransferEngine(
        client=client, source=source, packed_buffer_size_bytes=size
    )
    client.init_weight_transfer_engine(worker_init_payload(info))
    group = uid_init_process_group(
        unique_id, 0, info.world_size, torch.accelerator.current_device_index()
    )
    if not group.available:  # broadcasts would do nothing, and say nothing
        raise ServerError("vLLM's NCCL is switched off here. Unset VLLM_DISABLE_PYNCCL.")
    engine.model_update_group = group
    return engine


class _EngineThread:
    """An engine at work for one server. It is the client that the engine talks to as well."""

    def __init__(
        self,
        name: str,
        make: Callable[[VLLMWeightSyncClient, WeightSource], Engine],
        device: torch.device,
    ) -> None:
        self._name, self._make, self._device = name, make, device
        self._source = _Source(device)
        self._engine: Engine | None = None
        self._ending = threading.Lock()
        self._buckets = queue.Queue[Bucket | None]()
        self._messages = queue.Queue[dict[str, Any] | Exception | None]()
        self._answers = queue.Queue[bool]()
        # A daemon: the death of a server may leave it in a call that never returns.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def send(self, bucket: Bucket) -> None:
        """Let the engine send these weights; what its server has to hear of it comes next."""
        self._buckets.put(bucket)

    def next_message(self) -> dict[str, Any] | None:
        """What the server is to be told next; None at the end of a bucket.

        Raises:
            ServerError: the engine failed, or waits for somebody who does not come.
        """
        try:
            message = self._messages.get(timeout=ENGINE_TIMEOUT_S)
        except queue.Empty:
            raise ServerError(
                f"The {self._name} has not gone on for {ENGINE_TIMEOUT_S:.0f} s, as if its server "
                "were gone."
            ) from None
        if isinstance(message, Exception):
            raise ServerError(f"The {self._name} failed: {message}") from message
        return message

    def answered(self) -> None:
        """The server has taken the last message, or never will."""
        self._answers.put(True)

    def close(self) -> None:
        """End the engine, also one that waits for its server."""
        self._source.is_closed = True  # first: nothing new is sent over what is being ended
        self._buckets.put(None)
        self._answers.put(False)
        self._shut_down()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self._engine = self._make(self, self._source)
            while (bucket := self._buckets.get()) is not None:
                self._source.bucket = bucket
                self._engine.send_weights()
                self._messages.put(None)
        except Exception as error:
            if not self._source.is_closed:  # who waits for the server hears of it too late
                print(f"warning: the {self._name} failed: {error}", flush=True)
            self._messages.put(error)
        finally:
            self._shut_down()

    def _shut_down(self) -> None:
        with self._ending:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.shutdown()

    # --- What vLLM's engines ask of a client, from threads of theirs ------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._messages.put(init_info)

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None:
        self._messages.put(handles_to_json(update_info))
        if not self._answers.get():
            raise ServerError("the update was given up")

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class _Source(WeightSource):
    """One bucket of weights after the other, as an engine reads them.

    Those of the widest dtype first: vLLM packs tensors without gaps, and cannot view one that lies
    at a place which its dtype's size does not divide.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bucket: Bucket = []
        self.is_closed = False

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self._sorted()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._sorted():
            if self.is_closed:
                raise ServerError("the update was given up")
            yield name, tensor.to(self._device)

    def _sorted(self) -> Bucket:
        return sorted(self.bucket, key=lambda pair: -pair[1].dtype.itemsize)
