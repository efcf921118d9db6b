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


class Transport(Protocol):
    """One way to bring weights to every server of a run."""

    def init_info(self) -> dict[str, Any]:
        """What a server has to know before the first update."""
        ...

    def connected(self) -> None:
        """Every server has taken the `init_info`."""
        ...

    def updates(self, weights: NamedWeights) -> Iterator[dict[str, Any]]:
        """Messages for `/update_weights`; each must be answered before the next is drawn."""
        ...

    def close(self) -> None: ...


class SharedMemory:
    """A region of /dev/shm that both sides keep mapped: for servers on the same host.

    The file is unlinked once every server has mapped it, so that nothing is left behind whatever
    dies. First-touch page faults are most of the cost of a fresh region; this one stays warm.
    """

    def __init__(self, size_bytes: int = REGION_BYTES) -> None:
        prefix = f"{region_prefix(os.getpid())}{os.urandom(4).hex()}"
        self._path = Path("/dev/shm") / prefix
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            self._region = mmap.mmap(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        self._size = size_bytes

    def init_info(self) -> dict[str, Any]:
        return {"region": str(self._path)}

    def connected(self) -> None:
        self._path.unlink(missing_ok=True)

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
        self._path.unlink(missing_ok=True)
        with suppress(BufferError):
            self._region.close()

    def _write(self, offset: int, source: torch.Tensor) -> None:
        if source.numel():
            target = torch.frombuffer(
                self._region, dtype=torch.uint8, count=source.numel(), offset=offset
            )
            target.copy_(source)


class Disk:
    """Safetensors files in a folder that trainer and servers both see: for other hosts."""

    def __init__(self, folder: str | Path, bucket_bytes: int = 4 * REGION_BYTES) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="push-", dir=folder)).resolve()
        self._bucket_bytes = bucket_bytes

    def init_info(self) -> dict[str, Any]:
        return {"folder": str(self._folder)}

    def connected(self) -> None:
        pass

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


def region_prefix(pid: int) -> str:
    """How the names of all regions of process `pid` begin; the supervisor sweeps by it."""
    return f"arealite-{pid}-"


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
