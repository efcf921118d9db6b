"""What a worker takes weights from: nothing but what its own trainer offers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arealite.inference.fleet import Server
from arealite.inference.transport import WEIGHTS_DIR, Disk, SharedMemory

worker = pytest.importorskip("arealite.inference.vllm_worker", reason="needs vllm")

SERVER = Server("http://127.0.0.1:1")


def receiver(folder: Path):
    """A receiver that has agreed on a folder, without the model that vLLM would give it."""
    receiver = object.__new__(worker.WeightReceiver)
    receiver.init_transfer_engine(worker.InitInfo(folder=str(folder)))
    return receiver


@pytest.mark.fault(64, "a path with `..`, an absolute path, a link, a pickle, a folder beside it")
def test_weights_come_only_from_safetensors_files_inside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    inside, outside = tmp_path / "run", tmp_path / "run-of-somebody-else"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        save_file({"w": torch.ones(1)}, folder / "a.safetensors")
    (inside / "link.safetensors").symlink_to(outside / "a.safetensors")
    (inside / "weights.bin").write_bytes(b"pickle")
    (inside / "renamed.safetensors").symlink_to(inside / "weights.bin")
    monkeypatch.setenv(WEIGHTS_DIR, str(inside))
    allowed = receiver(inside)._checked
    assert allowed(str(inside / "a.safetensors")) == inside / "a.safetensors"
    for path in (
        "/etc/passwd",
        f"{inside}/../{outside.name}/a.safetensors",
        str(outside / "a.safetensors"),
        str(inside / "link.safetensors"),
    ):
        with pytest.raises(ValueError, match="not inside the folder agreed on"):
            allowed(path)
    for path in ("weights.bin", "renamed.safetensors"):
        with pytest.raises(ValueError, match="not a safetensors file"):
            allowed(str(inside / path))


@pytest.mark.fault(64, "a client that names another folder than the server was started with")
def test_a_folder_is_agreed_on_only_below_that_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(WEIGHTS_DIR, raising=False)
    with pytest.raises(ValueError, match=r"not inside server.weights_dir= of this server"):
        receiver(tmp_path)
    monkeypatch.setenv(WEIGHTS_DIR, str(tmp_path / "run"))
    assert receiver(tmp_path / "run" / "push-1")
    for folder in (tmp_path, tmp_path / "run" / "..", tmp_path / "run-2", Path("/")):
        with pytest.raises(ValueError, match=r"not inside server.weights_dir="):
            receiver(folder)


def test_only_the_memory_of_a_trainer_is_mapped(tmp_path: Path):
    memory = SharedMemory(4096)
    region = worker._map(memory.init_info(SERVER)["region"])
    assert len(region) == 4096
    region.close()
    memory.close()
    file = tmp_path / "arealite-weights"
    file.write_bytes(b"x" * 4096)
    descriptor = os.open(file, os.O_RDWR)
    for path in (f"/proc/{os.getpid()}/fd/{descriptor}", f"/proc/{os.getpid()}/exe"):
        with pytest.raises(ValueError, match="not the memory of an arealite trainer"):
            worker._map(path)
    os.close(descriptor)


def arrived(memory: SharedMemory, receiver: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for messages in memory.updates([SERVER])
        for name, tensor in receiver._tensors(messages[SERVER]["tensors"])
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(256)
    yield memory
    memory.close()


@pytest.fixture
def mapped(memory: SharedMemory) -> Iterator[Any]:
    """A receiver that has mapped the memory while it was small."""
    receiver = object.__new__(worker.WeightReceiver)
    receiver.init_transfer_engine(worker.InitInfo(**memory.init_info(SERVER)))
    yield receiver
    receiver.shutdown()


def odd_weights() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 7),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "transposed": torch.randn(4, 5).T,
        "half": torch.randn(11).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "large": torch.arange(300, dtype=torch.int64),
        "low": torch.randn(9).to(torch.float8_e4m3fn),
    }


def test_weights_of_every_kind_arrive_through_memory_that_grows_under_them(
    memory: SharedMemory, mapped: Any
):
    weights = odd_weights()
    weights["low"] = weights["low"].view(torch.uint8)
    memory.keep(weights.items())
    assert same(arrived(memory, mapped), weights)
    assert same(arrived(memory, mapped), weights)  # as often as servers come back


def test_the_next_weights_take_the_place_of_those_before(memory: SharedMemory, mapped: Any):
    first, second = odd_weights(), odd_weights()
    memory.keep((name, first[name]) for name in list(first)[:-1])
    before = arrived(memory, mapped)
    memory.keep((name, second[name]) for name in list(second)[:-1])
    after = arrived(memory, mapped)
    second.pop("low")
    assert same(after, second)
    assert same(before, second)  # the same memory: nothing was copied, nothing was allocated
    memory.keep({"b": torch.ones(2)}.items())
    assert same(arrived(memory, mapped), {"b": torch.ones(2)})


def test_weights_of_eight_bits_arrive_bit_for_bit(memory: SharedMemory, mapped: Any):
    low = odd_weights()["low"]
    memory.keep({"low": low}.items())
    [got] = arrived(memory, mapped).values()
    assert got.dtype == low.dtype
    assert torch.equal(got.view(torch.uint8), low.view(torch.uint8))


def test_a_message_tells_of_no_more_than_a_bucket_and_a_tensor(
    memory: SharedMemory, mapped: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("arealite.inference.transport.BUCKET_BYTES", 1024)
    weights = {str(number): torch.full((50,), float(number)) for number in range(40)}
    memory.keep(weights.items())
    sizes = [len(told[SERVER]["tensors"]) for told in memory.updates([SERVER])]
    assert sum(sizes) == 40
    assert max(sizes) <= 1024 // 256 + 1
    assert same(arrived(memory, mapped), weights)


def test_tensors_need_memory_to_lie_in():
    receiver = object.__new__(worker.WeightReceiver)
    with pytest.raises(ValueError, match="need init_weight_transfer_engine with a region first"):
        list(receiver._tensors([]))


def test_a_folder_is_left_empty_behind(tmp_path: Path):
    disk = Disk(tmp_path, bucket_bytes=64)
    weights = {"a": torch.ones(20), "b": torch.ones(3)}
    disk.keep(weights.items())
    for _ in range(2):  # once more for a server that comes back
        read = [load_file(told[SERVER]["file"]) for told in disk.updates([SERVER])]
        assert same(read[0] | read[1], weights)
    disk.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_holds_the_weights_as_they_were_when_they_were_kept(tmp_path: Path):
    disk = Disk(tmp_path)
    weights = {"a": torch.ones(3), "gone": torch.ones(1)}
    disk.keep(weights.items())
    weights["a"] += 1
    [update] = (load_file(told[SERVER]["file"]) for told in disk.updates([SERVER]))
    assert update["a"].tolist() == [1, 1, 1]
    disk.keep({"a": weights["a"]}.items())
    [update] = (load_file(told[SERVER]["file"]) for told in disk.updates([SERVER]))
    assert same(update, {"a": torch.full((3,), 2.0)})
    disk.close()
