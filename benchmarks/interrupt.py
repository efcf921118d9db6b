"""What an update costs: freeze requests and recompute their cache, freeze and keep it, or drain.

    python benchmarks/interrupt.py            # some ten minutes on two cores

The trace, the cores and the trainer of async_vs_sync.py, at sigma 1 and train/generate .5, fifo at
staleness 4, on one real vLLM server. The three kinds take turns, some steps each. A stall is the
time from the pause to the end of the resume, in which no token is sampled and no request begins;
recomputing a cache comes after it, and shows in the tokens/s. The last line is JSON:
`recompute_over_drain`, `reuse_over_drain` (consumed tokens/s), and the stalls in milliseconds.
"""

import json
import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from async_vs_sync import (
    MAX_NUM_SEQS,
    ROUNDS,
    SERVER_CORE,
    TRAINER_CORE,
    Measured,
    Mode,
    Trainer,
    one_by_one,
    run_chunk,
    trace,
)

from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.testing import make_tiny_model
from arealite.weights import push_weights

SIGMA, RATIO = 1.0, 0.5
MODE = Mode("fifo 4", "fifo", 4)
KINDS = {
    "keep, recompute": ServerConfig(interrupt="keep", kv="recompute"),
    "keep, reuse": ServerConfig(interrupt="keep", kv="reuse"),
    "drain": ServerConfig(interrupt="drain"),
}


class TimedEngine(VLLMEngine):
    """Remembers how long each update stopped the server."""

    def __init__(self, addresses: list[str], cfg: ServerConfig) -> None:
        super().__init__(addresses, cfg)
        self.stalls_s: list[float] = []
        self._paused_s = 0.0

    def pause(self) -> None:
        self._paused_s = time.perf_counter()
        super().pause()

    def resume(self) -> None:
        super().resume()
        self.stalls_s.append(time.perf_counter() - self._paused_s)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    rows = trace(SIGMA)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        make_tiny_model(folder, max_model_len=2 * 1024)
        os.sched_setaffinity(0, {SERVER_CORE})
        cfg = ServerConfig(max_num_seqs=MAX_NUM_SEQS)
        servers = stack.enter_context(serve(folder, cfg, log_dir=Path(folder) / "logs"))
        os.sched_setaffinity(0, {TRAINER_CORE})
        trainer = Trainer(folder, threads=1)
        measured = {name: Measured() for name in KINDS}
        stalls_s: dict[str, list[float]] = {name: [] for name in KINDS}
        version = 0
        with VLLMEngine(servers) as engine:
            push_weights(trainer.engine, engine, version=version)
            generate_s, batches = one_by_one(engine, rows)
        trainer.calibrate(batches, RATIO * generate_s)
        for number in range(ROUNDS):
            for name in random.Random(number).sample(list(KINDS), len(KINDS)):
                with TimedEngine(servers.addresses, KINDS[name]) as engine:
                    push_weights(trainer.engine, engine, version=version)
                    engine.stalls_s.clear()
                    run_chunk(engine, trainer, MODE, rows, measured[name], number * 1000)
                    stalls_s[name] += engine.stalls_s
                    version = engine.version + 1

    drain = measured["drain"].tokens_per_s
    print(
        f"{'update':18}{'tokens/s':>10}{'over drain':>12}{'stall p50 ms':>14}{'p99':>8}"
        f"{'mean age':>10}"
    )
    for name, values in measured.items():
        print(
            f"{name:18}{values.tokens_per_s:10.0f}{values.tokens_per_s / drain:12.2f}"
            f"{1000 * percentile(stalls_s[name], 0.5):14.0f}"
            f"{1000 * percentile(stalls_s[name], 0.99):8.0f}{statistics.fmean(values.ages):10.2f}"
        )
    figures: dict[str, float] = {
        "recompute_over_drain": measured["keep, recompute"].tokens_per_s / drain,
        "reuse_over_drain": measured["keep, reuse"].tokens_per_s / drain,
    }
    for name, stalls in stalls_s.items():
        key = name.replace(", ", "_")
        figures[f"{key}_stall_p50_ms"] = 1000 * percentile(stalls, 0.5)
        figures[f"{key}_stall_p99_ms"] = 1000 * percentile(stalls, 0.99)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
