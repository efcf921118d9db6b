"""vLLM's own engines behind a push; where a GPU would be, memory of this process stands in."""

import contextlib
import itertools
import json
import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arealite.errors import ServerError
from arealite.inference.cuda_handles import handles_to_json
from arealite.inference.fleet import Server
from arealite.inference.transport import TRANSPORT

transport = pytest.importorskip("arealite.inference.vllm_transport", reason="needs vllm")
worker = pytest.importorskip("arealite.inference.vllm_worker", reason="needs vllm")

CPU = torch.device("cpu")


class End:
    """One end of a group of two, in place of NCCL's."""

    available = True

    def __init__(self, wire: queue.Queue[torch.Tensor], rank: int) -> None:
        self._wire, self._rank = wire, rank
        self.is_broken = threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        if self._rank == src:
            self._wire.put(tensor.clone())
            while not self._wire.empty() and not self.is_broken.is_set():
                self.is_broken.wait(0.001)
        else:
            tensor.copy_(self._wire.get(timeout=5))

    def destroy(self) -> None:
        self.is_broken.set()


@pytest.fixture
def wires(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Groups between threads instead of GPUs, and no streams."""
    groups: dict[bytes, queue.Queue[torch.Tensor]] = {}
    unique_ids = itertools.count()

    def join(unique_id: bytes, rank: int, world_size: int, device: object) -> End:
        assert world_size == 2
        return End(groups.setdefault(unique_id, queue.Queue()), rank)

    class Library:
        def ncclGetUniqueId(self) -> SimpleNamespace:
            return SimpleNamespace(internal=next(unique_ids).to_bytes(128))

    stream = SimpleNamespace(synchronize=lambda: None)
    package = "vllm.distributed.weight_transfer"
    monkeypatch.setenv(TRANSPORT, "nccl")
    monkeypatch.setattr(f"{package}.nccl_common.uid_init_process_group", join)
    monkeypatch.setattr(transport, "uid_init_process_group", join)
    monkeypatch.setattr(transport, "NCCLLibrary", Library)
    monkeypatch.setattr(
        f"{package}.packed_tensor._get_streams", lambda _, number: [stream] * number
    )
    monkeypatch.setattr("torch.cuda.stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 0)
    monkeypatch.setattr(transport, "ENGINE_TIMEOUT_S", 1.0)
    yield


class Model(torch.nn.Module):
    """Takes weights as a vLLM model does."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.got |= {name: tensor.clone() for name, tensor in weights}


class Worker:
    """A vLLM worker's receiver; every message comes as JSON, as over HTTP."""

    def __init__(self) -> None:
        self.model = Model()
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config = SimpleNamespace(parallel_config=parallel, model_config=None)
        self._receiver = worker.WeightReceiver(None, config, CPU, self.model)

    def introduce(self, info: dict[str, Any]) -> None:
        self._receiver.init_transfer_engine(worker.InitInfo(**json.loads(json.dumps(info))))

    def take(self, message: dict[str, Any]) -> None:
        self._receiver.receive_weights(worker.UpdateInfo(**json.loads(json.dumps(message))))


def weights(value: float) -> dict[str, torch.Tensor]:
    return {
        "embed": torch.full((50, 8), value),
        "half": torch.full((3, 5), value, dtype=torch.bfloat16),
        "transposed": torch.arange(12.0).view(3, 4).T * value,
        "scalar": torch.tensor(value),
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.fixture
def sender(wires: None) -> Iterator[Any]:
    sender = transport.VLLMTransport("nccl", CPU)
    yield sender
    sender.close()


def test_weights_reach_every_server_again_and_again(sender: Any):
    servers = {Server(f"http://127.0.0.1:{port}"): Worker() for port in (1, 2)}
    for server, of_vllm in servers.items():
        of_vllm.introduce(sender.init_info(server))
    for value in (1.0, 2.0):
        sender.keep(weights(value).items())
        for messages in sender.updates(list(servers)):
            for server, message in messages.items():
                servers[server].take(message)
        assert all(same(of_vllm.model.got, weights(value)) for of_vllm in servers.values())


def test_a_server_that_comes_back_is_introduced_again_and_gets_what_was_kept(sender: Any):
    server = Server("http://127.0.0.1:1")
    sender.keep(weights(3.0).items())
    for _ in range(2):
        again = Worker()
        again.introduce(sender.init_info(server))
        for messages in sender.updates([server]):
            again.take(messages[server])
        assert same(again.model.got, weights(3.0))


@pytest.mark.fault(36, "a server that dies while NCCL waits for it")
def test_a_server_that_is_gone_in_the_middle_takes_no_other_with_it(sender: Any):
    alive, dead = Server("http://127.0.0.1:1"), Server("http://127.0.0.1:2")
    of_vllm = Worker()
    of_vllm.introduce(sender.init_info(alive))
    sender.init_info(dead)
    sender.keep(weights(4.0).items())
    told = []
    for [(server, message)] in (messages.items() for messages in sender.updates([dead, alive])):
        if server is alive:
            of_vllm.take(message)
        else:
            told.append(message)
    assert same(of_vllm.model.got, weights(4.0))
    assert told[-1]["is_abandoned"]
    with pytest.raises(ValueError, match=r"abandoned: .* as if its server were gone"):
        of_vllm.take(told[-1])
    sender.init_info(dead)  # and begins anew


def test_an_engine_that_fails_says_so_at_once_and_to_its_server(
    sender: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    server = Server("http://127.0.0.1:1")
    sender.init_info(server)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(End, "broadcast", fail)
    sender.keep(weights(1.0).items())
    *_, last = sender.updates([server])
    reason = f"The nccl engine for {server.address} failed: out of memory"
    assert last == {server: {"is_abandoned": True, "reason": reason}}
    assert "warning: the nccl engine for" in capsys.readouterr().out


def test_an_engine_that_cannot_begin_says_why(sender: Any, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such engine")

    monkeypatch.setattr(transport, "NCCLLibrary", refuse)
    with pytest.raises(ServerError, match=r"The nccl engine for \S+ failed: no such engine"):
        sender.init_info(Server("http://127.0.0.1:1"))


def test_an_engine_message_needs_an_engine():
    with pytest.raises(ValueError, match="needs init_weight_transfer_engine with one first"):
        Worker().take({"engine_update": {}})


def test_weights_come_in_buckets(sender: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "BUCKET_BYTES", 200)
    server, of_vllm = Server("http://127.0.0.1:1"), Worker()
    sender.keep(weights(5.0).items())
    of_vllm.introduce(sender.init_info(server))
    told = []
    for messages in sender.updates([server]):
        told.append(messages[server]["engine_update"]["names"])
        of_vllm.take(messages[server])
    assert [sorted(names) for names in told] == [["embed"], ["half", "scalar", "transposed"]]
    assert same(of_vllm.model.got, weights(5.0))


def test_an_engine_is_ended_in_the_middle_of_an_update(sender: Any):
    server = Server("http://127.0.0.1:1")
    sender.init_info(server)
    sender.keep(weights(1.0).items())
    for _ in sender.updates([server]):  # nobody receives
        break
    sender.close()
    for thread in threading.enumerate():
        if thread.name.startswith("nccl engine"):
            thread.join(5)
            assert not thread.is_alive()


def test_nccl_that_is_switched_off_is_noticed_on_both_sides(
    sender: Any, monkeypatch: pytest.MonkeyPatch
):
    info = sender.init_info(Server("http://127.0.0.1:1"))
    monkeypatch.setattr(End, "available", False)  # every broadcast would do nothing
    with pytest.raises(ValueError, match="NCCL is switched off: unset VLLM_DISABLE_PYNCCL"):
        Worker().introduce(info)
    server = Server("http://127.0.0.1:2")
    sender.init_info(server)
    sender.keep(weights(1.0).items())
    [told] = sender.updates([server])
    assert "NCCL is switched off here. Unset VLLM_DISABLE_PYNCCL" in told[server]["reason"]


@pytest.mark.fault(64, "an engine that the server was not started for, and a store of pickles")
def test_a_server_takes_weights_only_the_way_that_it_was_started_for(
    wires: None, monkeypatch: pytest.MonkeyPatch
):
    store = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    with pytest.raises(ValueError, match="needs nccl_unique_id_b64 here, not master_address"):
        Worker().introduce({"engine": "nccl", "engine_info": store})
    with pytest.raises(ValueError, match=r"set server.transport=ipc where it is started"):
        Worker().introduce({"engine": "ipc", "engine_info": {"packed": True}})
    monkeypatch.delenv(TRANSPORT)
    with pytest.raises(ValueError, match=r"set server.transport=nccl where it is started"):
        Worker().introduce({"engine": "nccl", "engine_info": {}})


def test_handles_of_cuda_memory_reach_the_receiver_of_vllm(monkeypatch: pytest.MonkeyPatch):
    got = []

    class Receiver(worker.IPCWeightTransferEngine):
        def receive_weights(self, update_info: Any) -> None:
            got.append((self.packed, update_info.ipc_handles, update_info.tensor_sizes))

    monkeypatch.setitem(worker._ENGINES, "ipc", Receiver)
    monkeypatch.setenv(TRANSPORT, "ipc")
    fields = [0, (8,), (1,), 0, 0, 0, 0, b"handle", 8, 0, False, b"counter", 0, b"event", True]
    fields[0], fields[4], fields[5] = torch.Tensor, torch.storage.TypedStorage, torch.uint8
    handles = {"GPU-1": tuple(fields)}
    update = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]], "tensor_sizes": [8]}
    of_vllm = Worker()
    of_vllm.introduce({"engine": "ipc", "engine_info": {"packed": True}})
    of_vllm.take({"engine_update": handles_to_json(update | {"ipc_handles": handles})})
    assert got == [(True, handles, [8])]
