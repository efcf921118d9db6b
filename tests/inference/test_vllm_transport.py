"""vLLM's own engines behind a push; where a GPU would be, memory of this process stands in."""

import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arealite.errors import ServerError
from arealite.inference.fleet import Server

transport = pytest.importorskip("arealite.inference.vllm_transport", reason="needs vllm")
worker = pytest.importorskip("arealite.inference.vllm_worker", reason="needs vllm")

CPU = torch.device("cpu")


class End:
    """One end of a group of two, in place of NCCL's."""

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
    groups: dict[int, queue.Queue[torch.Tensor]] = {}

    def join(address: str, port: int, rank: int, world_size: int, device: object) -> End:
        assert (address, world_size) == ("127.0.0.1", 2)
        return End(groups.setdefault(port, queue.Queue()), rank)

    stream = SimpleNamespace(synchronize=lambda: None)
    package = "vllm.distributed.weight_transfer"
    monkeypatch.setattr(f"{package}.nccl_common.stateless_init_process_group", join)
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


def test_an_engine_that_fails_tells_its_server_so(sender: Any, monkeypatch: pytest.MonkeyPatch):
    server = Server("http://127.0.0.1:1")
    sender.init_info(server)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(End, "broadcast", fail)
    sender.keep(weights(1.0).items())
    *_, last = sender.updates([server])
    assert last == {
        server: {"is_abandoned": True, "reason": "The nccl engine failed: out of memory"}
    }


def test_an_engine_that_cannot_begin_says_why(sender: Any, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such engine")

    monkeypatch.setattr(transport.WeightTransferTrainerFactory, "trainer_init", refuse)
    with pytest.raises(ServerError, match="The nccl engine failed: no such engine"):
        sender.init_info(Server("http://127.0.0.1:1"))


def test_an_engine_message_needs_an_engine():
    with pytest.raises(ValueError, match="needs init_weight_transfer_engine with one first"):
        Worker().take({"engine_update": {}})


def test_this_host_is_named_as_the_server_sees_it():
    assert transport._own_address("http://127.0.0.1:8000") == "127.0.0.1"
    assert transport._own_address("http://localhost:8000") == "127.0.0.1"
    assert transport._own_address("unix:///tmp/socket") == "127.0.0.1"
