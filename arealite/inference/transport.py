"""The sending end of a weight push: named tensors in, `update_info` messages out.

    weights -> kept, by shape and place -> buckets -> vllm_worker.WeightReceiver, on every server

What was kept last is there for servers that come back later, until the next push.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from arealite.inference.fleet import Server

NamedWeights = Iterable[tuple[str, torch.Tensor]]
Bucket = list[tuple[str, torch.Tensor]]

BUCKET_BYTES = 256 * 2**20
"""Of weights in one message, which a server loads without answering anything else meanwhile."""
ALIGNMENT = 64
"""Of each tensor in shared memory, in bytes."""
WEIGHTS_DIR = "AREALITE_WEIGHTS_DIR"
"""Environment variable of a server: the folder below which it takes files of weights, if any."""
TRANSPORT = "AREALITE_TRANSPORT"
"""Environment variable of a server: ipc or nccl, if it takes weights from another GPU process."""
REGION_NAME = "arealite-weights"
"""Of the memory file, as /proc shows it; a server maps no other."""


class Transport(Protocol):
    """One way to bring weights to every server of a run."""

    def init_info(self, server: Server) -> dict[str, Any]:
        """What a server has to know before its first update."""
        ...

    def keep(self, weights: NamedWeights) -> None:
        """Copy the weights in place of those before; no server may be reading them."""
        ...

    def updates(self, servers: Sequence[Server]) -> Iterator[dict[Server, dict[str, Any]]]:
        """Messages for `/update_weights` that bring each server what was kept.

        All that were drawn must be answered before the next are. A server that failed at one gets
        no more, and may be passed over in any of them.
        """
        ...

    def close(self) -> None: ...


class SharedMemory:
    """Memory that both sides map: for servers on the same host.

    Each tensor is written once, and read where it lies. The memory has no name in any file system,
    so that nothing is left behind whatever dies, and no limit of /dev/shm applies. A server opens
    it through our process; a new one can do so at any time. First-touch page faults are most of
    the cost of the first push; later ones find the memory warm.
    """

    def __init__(self, size_bytes: int = BUCKET_BYTES) -> None:
        self._descriptor = os.memfd_create(REGION_NAME)
        self._map(size_bytes)
        self._places: list[dict[str, Any]] = []

    def init_info(self, server: Server) -> dict[str, Any]:
        return {"region": f"/proc/{os.getpid()}/fd/{self._descriptor}"}

    def keep(self, weights: NamedWeights) -> None:
        self._places = []
        offset = 0
        for name, tensor in weights:
            if offset + tensor.nbytes > len(self._region):
                self._map(max(2 * len(self._region), offset + tensor.nbytes))
            place = {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "offset": offset,
            }
            tensor_at(place, self._region).copy_(tensor.detach())
            self._places.append(place)
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def updates(self, servers: Sequence[Server]) -> Iterator[dict[Server, dict[str, Any]]]:
        bucket: list[dict[str, Any]] = []
        for place in self._places:
            if bucket and place["offset"] - bucket[0]["offset"] >= BUCKET_BYTES:
                yield {server: {"tensors": bucket} for server in servers}
                bucket = []
            bucket.append(place)
        if bucket:
            yield {server: {"tensors": bucket} for server in servers}

    def close(self) -> None:
        with suppress(BufferError):
            self._region.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _map(self, size_bytes: int) -> None:
        """Make the memory larger; what lies in it stays, and pages that nobody writes cost none."""
        os.ftruncate(self._descriptor, size_bytes)
        self._region = mmap.mmap(self._descriptor, size_bytes)


def tensor_at(place: dict[str, Any], region: mmap.mmap) -> torch.Tensor:
    """The tensor that lies at a place in memory: no copy."""
    dtype, shape = getattr(torch, place["dtype"]), place["shape"]
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    count = math.prod(shape)
    return torch.frombuffer(region, dtype=dtype, count=count, offset=place["offset"]).view(shape)


class KeptWeights:
    """The newest weights, whole: each tensor is copied in place of the one before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[str, torch.Tensor] = {}

    def keep(self, weights: NamedWeights) -> None:
        before, self._tensors = self._tensors, {}
        for name, tensor in weights:
            kept = before.pop(name, None)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            self._tensors[name] = kept.copy_(tensor.detach())

    def buckets(self, nbytes: int | None) -> Iterator[Bucket]:
        """All of them in order, a bucket of at most so many bytes or one tensor; None: in one."""
        bucket: Bucket = []
        filled = 0
        for name, tensor in self._tensors.items():
            if bucket and nbytes is not None and filled + tensor.nbytes > nbytes:
                yield bucket
                bucket, filled = [], 0
            bucket.append((name, tensor))
            filled += tensor.nbytes
        if bucket:
            yield bucket

    @property
    def largest_bytes(self) -> int:
        return max((tensor.nbytes for tensor in self._tensors.values()), default=0)


class Disk:
    """Safetensors files in a folder that trainer and servers both see: for other hosts.

    In small buckets, because an engine that reads one answers nobody, and may seem to hang; each
    is deleted as soon as it was read.
    """

    def __init__(self, folder: str | Path, bucket_bytes: int = BUCKET_BYTES) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="push-", dir=folder)).resolve()
        self._bucket_bytes = bucket_bytes
        self._kept = KeptWeights(torch.device("cpu"))

    def init_info(self, server: Server) -> dict[str, Any]:
        return {"folder": str(self._folder)}

    def keep(self, weights: NamedWeights) -> None:
        self._kept.keep(weights)

    def updates(self, servers: Sequence[Server]) -> Iterator[dict[Server, dict[str, Any]]]:
        for bucket in self._kept.buckets(self._bucket_bytes):
            path = self._folder / "bucket.safetensors"
            save_file(dict(bucket), path)
            try:
                yield {server: {"file": str(path)} for server in servers}
            finally:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        with suppress(OSError):
            self._folder.rmdir()
