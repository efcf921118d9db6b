"""Weight pushes over CUDA IPC or NCCL, through the trainer-side engines of vLLM itself.

Each server has an engine of its own, in a thread of its own, so that one server that dies takes
none of the others with it. What an engine wants to tell its server goes the usual way instead, with
our limits and our token:

    engine, in its thread ──> messages ──> pusher ──> vllm_worker.WeightReceiver ──> vLLM's receiver
              ^                                 │
              └──── next, once it answered ─────┘

The only module of a trainer that imports vLLM; only `server.transport` ipc or nccl does that.
"""

import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from arealite.errors import ServerError
from arealite.inference.cuda_handles import handles_to_json
from arealite.inference.fleet import Server
from arealite.inference.supervisor import free_port
from arealite.inference.transport import BUCKET_BYTES, KeptWeights, NamedWeights

Name = Literal["ipc", "nccl"]

ENGINE_TIMEOUT_S = 15.0
"""So long an engine may take for a step in which it waits for nobody but its GPU."""


class VLLMTransport:
    """`Transport` through vLLM's engines.

    With ipc, for servers on this process's own GPU, weights are kept on that GPU, once more; with
    nccl in CPU memory, from where they pass through two buffers on the GPU.
    """

    def __init__(self, name: Name, device: torch.device) -> None:
        self._name: Name = name
        self._device = device
        self._kept = KeptWeights(device if name == "ipc" else torch.device("cpu"))
        self._lines: dict[Server, _Line] = {}

    def init_info(self, server: Server) -> dict[str, Any]:
        """Begin anew with this server: its side of the engine is made from what this returns."""
        if server in self._lines:
            self._lines.pop(server).close()
        line = _Line(self._engine_info(server), _Source(self._kept, self._device), self._device)
        self._lines[server] = line
        return {"engine": self._name, "engine_info": line.next_message()}

    def keep(self, weights: NamedWeights) -> None:
        self._kept.keep(weights)

    def updates(self, servers: Sequence[Server]) -> Iterator[dict[Server, dict[str, Any]]]:
        """One server after the other: their engines share the streams of a GPU."""
        for server in servers:
            line = self._lines[server]
            line.begin()
            while message := self._next_message(server):
                yield {server: message}
                line.answered()

    def close(self) -> None:
        while self._lines:
            self._lines.popitem()[1].close()

    def _next_message(self, server: Server) -> dict[str, Any] | None:
        """What the server is to be told next; None at the end.

        The engine of a server that went away in the middle waits for it for ever. One that fails,
        or waits like that, is given up, and its server told so: it would take the end of the update
        for that of a whole one.
        """
        line = self._lines.get(server)
        if line is None:  # given up
            return None
        try:
            message = line.next_message()
        except ServerError as error:
            self._lines.pop(server).close()
            return {"is_abandoned": True, "reason": str(error)}
        return message and {"engine_update": message}

    def _engine_info(self, server: Server) -> TrainerInitInfo:
        size = max(BUCKET_BYTES, self._kept.largest_bytes)
        if self._name == "ipc":
            return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=0)
        return NCCLTrainerInitInfo(
            master_address=_own_address(server.address),
            master_port=free_port(),
            world_size=1 + server.num_workers,
            packed_buffer_size_bytes=size,
            rank=0,
        )


class _Line:
    """An engine at work for one server. It is the client that the engine talks to as well."""

    def __init__(self, info: TrainerInitInfo, source: WeightSource, device: torch.device) -> None:
        self._info, self._source, self._device = info, source, device
        self._messages = queue.Queue[dict[str, Any] | Exception | None]()
        self._begins = queue.Queue[bool]()
        self._answers = queue.Queue[bool]()
        self._engine: Any = None
        # A daemon: the death of a server may leave it in a call that never returns.
        threading.Thread(target=self._run, name=f"{info.backend} engine", daemon=True).start()

    def begin(self) -> None:
        """Send what is kept now."""
        self._begins.put(True)

    def next_message(self) -> dict[str, Any] | None:
        """What the server is to be told next; None at the end of an update.

        Raises:
            ServerError: the engine failed, or waits for somebody who does not come.
        """
        try:
            message = self._messages.get(timeout=ENGINE_TIMEOUT_S)
        except queue.Empty:
            raise ServerError(
                f"The {self._info.backend} engine of the trainer has not gone on for "
                f"{ENGINE_TIMEOUT_S:.0f} s, as if its server were gone."
            ) from None
        if isinstance(message, Exception):
            raise ServerError(f"The {self._info.backend} engine failed: {message}") from message
        return message

    def answered(self) -> None:
        """The server has taken the last message, or never will."""
        self._answers.put(True)

    def close(self) -> None:
        """End the engine; one that hangs is left alone in its thread."""
        self._begins.put(False)
        self._answers.put(False)
        if self._engine is not None:
            self._engine.shutdown()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self._engine = WeightTransferTrainerFactory.trainer_init(
                self._info, client=self, source=self._source
            )
            while self._begins.get():
                self._engine.send_weights()
                self._messages.put(None)
        except Exception as error:  # raised where the update runs
            self._messages.put(error)

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
    """Kept weights as an engine reads them.

    Those of the widest dtype first: vLLM packs tensors without gaps, and cannot view one that lies
    at a place which its dtype's size does not divide.
    """

    def __init__(self, kept: KeptWeights, device: torch.device) -> None:
        self._kept, self._device = kept, device

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self._sorted()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.to(self._device)) for name, tensor in self._sorted())

    def _sorted(self) -> list[tuple[str, torch.Tensor]]:
        return sorted(self._kept, key=lambda pair: -pair[1].dtype.itemsize)


def _own_address(peer: str) -> str:
    """The address of this host under which the server's host can reach it."""
    host = urlsplit(peer).hostname
    if host is None:  # a Unix socket
        return "127.0.0.1"
    # IPv4, as the store through which the two ends of NCCL meet takes no other.
    [(*_, target), *_] = socket.getaddrinfo(host, 9, socket.AF_INET, socket.SOCK_DGRAM)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing; only asks for the way
        return probe.getsockname()[0]
