"""What new weights cost: bytes per second on their way to a server, and how long it stands still.

    python benchmarks/push.py                   # two minutes on two cores

**Bandwidth**, with 256 MB of weights in the shapes of a transformer, from the trainer's tensors to
tensors in another process. The ways take turns; each has run once before the clock starts, and the
figure is the median of the ratios to `memcpy` of the same turn: the copy of the same tensors to
others of this process, all of them warm.

- `shm`: written to shared memory, and there for the other process, which has answered. vLLM's load
  into the model's own tensors is not in it, in none of the ways; `shm + copy` shows what one plain
  copy in the other process adds.
- `disk`: copied, written to files with safetensors, and read by the other process.
- `save_file`: safetensors alone, to the same folder, in one file. Nobody reads it.

**Stall**, with the demo's model on a real vLLM server: from the request for a pause until the
server has answered to the resume, so that no token is sampled in it that it does not contain.
`idle`: nobody asks anything. `busy`: so many long responses are being sampled as the demo has in
flight. `load` is what the server needs between start and finish of the update, as its client sees
it; the rest is the pause, of which 20 ms are a sleep in vLLM, and the resume.

The last line is JSON: `shm_of_memcpy` (the goal is .6 at least), `stall_p50_ms` and `stall_p99_ms`
of the busy server (the goal is 60 at most for the first), and the others' figures.
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from arealite import background
from arealite.data.models import resolve_model
from arealite.inference.fleet import Server
from arealite.inference.server import ServerConfig, serve
from arealite.inference.transport import Disk, SharedMemory, Transport, tensor_at
from arealite.inference.vllm import VLLMEngine
from arealite.types import ModelRequest, SamplingParams

SERVER = Server("http://127.0.0.1:1")  # a name; the receiver is no server
TURNS = 7
PUSHES = 60
IN_FLIGHT = 128
HIDDEN, LAYERS = 1024, 6

Weights = dict[str, torch.Tensor]


def transformer_weights() -> Weights:
    """256 MB in bfloat16 and the shapes of blocks of hidden size 1,024."""
    weights = {"embed": torch.randn(32_000, HIDDEN)}
    for number in range(LAYERS):
        for name in ("q", "k", "v", "o"):
            weights[f"{number}.{name}"] = torch.randn(HIDDEN, HIDDEN)
        for name in ("gate", "up", "down"):
            weights[f"{number}.{name}"] = torch.randn(4 * HIDDEN, HIDDEN)
        for name in ("norm", "other_norm"):
            weights[f"{number}.{name}"] = torch.randn(HIDDEN)
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


# --- The other process ----------------------------------------------------------------------------


def receive() -> None:
    """Read one order from each line of standard input, and answer when it is done."""
    import mmap

    copies: Weights = {}
    region: mmap.mmap | None = None
    for line in sys.stdin:
        order = json.loads(line)
        if "region" in order:
            with open(order["region"], "r+b") as file:
                region = mmap.mmap(file.fileno(), 0)
        for path in [order["file"]] if "file" in order else []:
            load_file(path)
        for place in order.get("tensors", []):
            assert region is not None
            tensor = tensor_at(place, region)
            if order["is_copied"]:
                copies.setdefault(place["name"], torch.empty_like(tensor)).copy_(tensor)
        print("done", flush=True)


class Receiver:
    """The other process, seen from here."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "receive"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def order(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def through(transport: Transport, receiver: Receiver, weights: Weights, *, is_copied: bool) -> None:
    transport.keep(weights.items())
    for told in transport.updates([SERVER]):
        receiver.order(told[SERVER] | {"is_copied": is_copied})


def seconds(way: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    way()
    return time.perf_counter() - began_s


def bandwidth(folder: str) -> dict[str, float]:
    """Each way's rate as a share of memcpy's; prints the table."""
    weights = transformer_weights()
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    targets = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    memory, disk = SharedMemory(nbytes), Disk(folder)
    receiver = Receiver()
    receiver.order(memory.init_info(SERVER))

    def memcpy() -> None:
        for name, tensor in weights.items():
            targets[name].copy_(tensor)

    ways: dict[str, Callable[[], object]] = {
        "memcpy": memcpy,
        "shm": lambda: through(memory, receiver, weights, is_copied=False),
        "shm + copy": lambda: through(memory, receiver, weights, is_copied=True),
        "disk": lambda: through(disk, receiver, weights, is_copied=False),
        "save_file": lambda: save_file(weights, Path(folder) / "all.safetensors"),
    }
    first_s = {name: seconds(way) for name, way in ways.items()}
    turns_s: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(TURNS):
        for name in random.Random(number).sample(list(ways), len(ways)):
            turns_s[name].append(seconds(ways[name]))
    receiver.close()
    memory.close()
    disk.close()

    print(f"{nbytes / 1e6:.0f} MB in {len(weights)} tensors, {torch.get_num_threads()} threads")
    print(f"{'':12}{'first, ms':>12}{'warm, ms':>12}{'GB/s':>8}{'of memcpy':>12}")
    shares: dict[str, float] = {}
    for name, times_s in turns_s.items():
        pairs = zip(turns_s["memcpy"], times_s, strict=True)
        shares[name] = statistics.median(copy_s / time_s for copy_s, time_s in pairs)
        middle_s = statistics.median(times_s)
        print(
            f"{name:12}{1000 * first_s[name]:12.1f}{1000 * middle_s:12.1f}"
            f"{nbytes / middle_s / 1e9:8.2f}{shares[name]:12.2f}"
        )
    return shares


# --- A real server --------------------------------------------------------------------------------


class TimedEngine(VLLMEngine):
    """Remembers, of each push, when the server was asked to stop, stood still, and went on."""

    def __init__(self, servers: Any) -> None:
        super().__init__(servers)
        self.parts_ms: list[tuple[float, float, float]] = []  # pause, load, resume

    def pause(self) -> None:
        self._began_s = time.perf_counter()
        super().pause()
        self._paused_s = time.perf_counter()

    def resume(self) -> None:
        loaded_s = time.perf_counter()
        super().resume()
        times_s = (self._began_s, self._paused_s, loaded_s, time.perf_counter())
        pause, load, resume = (
            1000 * (after - before) for before, after in itertools.pairwise(times_s)
        )
        self.parts_ms.append((pause, load, resume))


async def keep_busy(engine: VLLMEngine) -> None:
    """Long responses, again and again, until cancelled."""
    sampling = SamplingParams(max_new_tokens=200, ignore_eos=True)

    async def one(seed: int) -> None:
        number = random.Random(seed)
        while True:
            prompt = [number.randrange(4, 50) for _ in range(40)]
            await engine.agenerate(ModelRequest(token_ids=prompt, sampling=sampling))

    await asyncio.gather(*map(one, range(IN_FLIGHT)))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def stalls(folder: str) -> dict[str, float]:
    """Milliseconds in which the server samples nothing; prints the table."""
    model = resolve_model("arealite/tiny-math")
    weights = load_file(Path(model) / "model.safetensors")
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        servers = stack.enter_context(
            serve(model, ServerConfig(max_num_seqs=IN_FLIGHT), log_dir=Path(folder) / "logs")
        )
        engine = stack.enter_context(TimedEngine(servers))
        for version in range(5):
            engine.receive_weights(weights.items(), version=version)
        print(f"\n{'stall, ms':12}{'pause':>10}{'load':>10}{'resume':>10}{'p50':>10}{'p99':>10}")
        for name in ("idle", "busy"):
            engine.parts_ms.clear()
            busy = background.submit(keep_busy(engine)) if name == "busy" else None
            for _ in range(PUSHES):
                time.sleep(0.3)  # as long as a quick step; requests go on
                engine.receive_weights(weights.items(), version=engine.version + 1)
            if busy is not None:
                assert not busy.done(), busy.exception()
                busy.cancel()
            totals = [sum(parts) for parts in engine.parts_ms]
            middles = [statistics.median(part) for part in zip(*engine.parts_ms, strict=True)]
            p50, p99 = percentile(totals, 0.5), percentile(totals, 0.99)
            print(f"{name:12}" + "".join(f"{value:10.1f}" for value in (*middles, p50, p99)))
            figures |= {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99, f"{name}_load_ms": middles[1]}
    return figures


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shares = bandwidth(folder)
        times_ms = stalls(folder)
    figures = {
        "shm_of_memcpy": shares["shm"],
        "shm_and_copy_of_memcpy": shares["shm + copy"],
        "disk_of_memcpy": shares["disk"],
        "save_file_of_memcpy": shares["save_file"],
        "stall_p50_ms": times_ms["busy_p50_ms"],
        "stall_p99_ms": times_ms["busy_p99_ms"],
        "load_p50_ms": times_ms["busy_load_ms"],
        "idle_stall_p50_ms": times_ms["idle_p50_ms"],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    if sys.argv[1:] == ["receive"]:
        torch.set_num_threads(1)
        receive()
    else:
        main()
