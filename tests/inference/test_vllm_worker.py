"""What a worker takes weights from: nothing but what its own trainer offers."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arealite.inference.transport import WEIGHTS_DIR, Disk, SharedMemory

worker = pytest.importorskip("arealite.inference.vllm_worker", reason="needs vllm")


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
    region = worker._map(memory.init_info()["region"])
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


def test_weights_arrive_whole_in_pieces_that_are_smaller_than_a_tensor():
    weights = {"a": torch.randn(300), "b": torch.arange(7, dtype=torch.int64), "c": torch.empty(0)}
    memory = SharedMemory(256)
    receiver = object.__new__(worker.WeightReceiver)
    receiver.init_transfer_engine(worker.InitInfo(**memory.init_info()))
    receiver._partial = {}
    arrived = {}
    for update in memory.updates(weights.items()):
        arrived |= dict(receiver._completed(update["pieces"]))
    assert receiver._partial == {}
    assert {name: tensor.tolist() for name, tensor in arrived.items()} == {
        name: tensor.tolist() for name, tensor in weights.items()
    }
    receiver.shutdown()
    memory.close()


def test_a_folder_is_left_empty_behind(tmp_path: Path):
    disk = Disk(tmp_path, bucket_bytes=64)
    files = []
    for update in disk.updates({"a": torch.ones(20), "b": torch.ones(3)}.items()):
        files.append(Path(update["file"]))
        assert files[-1].exists()
    disk.close()
    assert len(files) == 2
    assert list(tmp_path.iterdir()) == []
