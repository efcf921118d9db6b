"""The sending end of a weight push: named tensors in, `update_info` messages out.

    weights -> buckets of pieces -> shared memory or a file -> vllm_worker.WeightReceiver

Both transports bound what they hold at once: the region by its size, the folder by one file.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

NamedWeights = Iterable[tuple[str, torch.Tensor]]

REGION_BYTES = 256 * 2**20
"""Largest shared region; a model with less uses less."""
WEIGHTS_DIR = "AREALITE_WEIGHTS_DIR"
"""Environment variable of a server: the folder below which it takes files of weights, if any."""
REGION_NAME = "arealite-weights"
"""Of the memory file, as /proc shows it; a server maps no other."""


class Transport(Protocol):
    """One way to bring weights to every server of a run."""

    def init_info(self) -> dict[str, Any]:
        """What a server has to know before its first update."""
        ...

    def updates(self, weights: NamedWeights) -> Iterator[dict[str, Any]]:
        """Messages for `/update_weights`; each must be answered before the next is drawn."""
        ...

    def close(self) -> None: ...


class SharedMemory:
    """Memory that both sides map: for servers on the same host.

    It has no name in any file system, so that nothing is left behind whatever dies, and no limit
    of /dev/shm applies. A server opens it through our process; a new one can do so at any time.
    First-touch page faults are most of the cost of a fresh region; this one stays warm.
    """

    def __init__(self, size_bytes: int = REGION_BYTES) -> None:
        self._descriptor = os.memfd_create(REGION_NAME)
        os.ftruncate(self._descriptor, size_bytes)
        self._region = mmap.mmap(self._descriptor, size_bytes)
        self._size = size_bytes

    def init_info(self) -> dict[str, Any]:
        return {"region": f"/proc/{os.getpid()}/fd/{self._descriptor}"}

    def updates(self, weights: NamedWeights) -> Iterator[dict[str, Any]]:
        pieces: list[dict[str, Any]] = []
        used = 0
        for name, tensor in weights:
            source = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            start = 0
            while True:
                nbytes = min(source.numel() - start, self._size - used)
                self._write(used, source[start : start + nbytes])
                pieces.append(_piece(name, tensor, start=start, offset=used, nbytes=nbytes))
                start, used = start + nbytes, used + nbytes
                if start == source.numel():
                    break
                yield {"pieces": pieces}
                pieces, used = [], 0
        if pieces:
            yield {"pieces": pieces}

    def close(self) -> None:
        with suppress(BufferError):
            self._region.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _write(self, offset: int, source: torch.Tensor) -> None:
        if source.numel():
            target = torch.frombuffer(
                self._region, dtype=torch.uint8, count=source.numel(), offset=offset
            )
            target.copy_(source)


class Disk:
    """Safetensors files in a folder that trainer and servers both see: for other hosts.

    In small buckets, because an engine that reads one answers nobody, and may seem to hang.
    """

    def __init__(self, folder: str | Path, bucket_bytes: int = REGION_BYTES) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="push-", dir=folder)).resolve()
        self._bucket_bytes = bucket_bytes

    def init_info(self) -> dict[str, Any]:
        return {"folder": str(self._folder)}

    def updates(self, weights: NamedWeights) -> Iterator[dict[str, Any]]:
        bucket: dict[str, torch.Tensor] = {}
        nbytes = 0
        for name, tensor in weights:
            if bucket and nbytes + tensor.nbytes > self._bucket_bytes:
                yield from self._file(bucket)
                bucket, nbytes = {}, 0
            bucket[name] = tensor.detach().cpu().contiguous()
            nbytes += tensor.nbytes
        if bucket:
            yield from self._file(bucket)

    def close(self) -> None:
        with suppress(OSError):
            self._folder.rmdir()

    def _file(self, bucket: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
        path = self._folder / "bucket.safetensors"
        save_file(bucket, path)
        try:
            yield {"file": str(path)}
        finally:
            path.unlink(missing_ok=True)


def _piece(
    name: str, tensor: torch.Tensor, *, start: int, offset: int, nbytes: int
) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "start": start,
        "offset": offset,
        "nbytes": nbytes,
    }
