"""How much of a GPU the trainer makes use of: tokens per second, MFU and peak memory of its steps.

    python benchmarks/gpu_trainer.py              # some minutes on one GPU of 80 GB
    python benchmarks/gpu_trainer.py --shape tiny --tokens 512 --lengths 128        # also on a CPU

A model of random weights in the shape of Qwen3-0.6B, in bfloat16 with float32 weights and AdamW,
takes steps on one micro-batch of packed tokens, all of one length:

- `sft` is `step` alone: forward, backward, optimizer.
- `rl` is `logprobs`, for the proximal policy, and `step` with the decoupled PPO loss.

Model FLOPs of a token are 6 for each weight of a matrix, the head included, and 6 * layers *
query width * L for causal attention in a sequence of L tokens; the forward pass of `logprobs`, and
what activation checkpointing computes again, count as nothing. So MFU is what a user gets of what
was paid for. It is a share of the device's rate by its data sheet (dense bfloat16), where that is
known, and `mfu_measured` of the best rate that a matrix product of 8,192 reached in the same run.

Activation checkpointing is on only where the step does not fit without. A time is the median of
several steps after a warm-up. The last line is JSON: each cell by its name, such as
`rl_16384x4096`, with `tokens_per_s`, `mfu`, `mfu_measured`, `peak_gib`; without a GPU, and for any
shape but the tiny one, it says that nothing was run.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from arealite import dist
from arealite.algo.losses import clipped_surrogate, importance_weight
from arealite.errors import OutOfMemoryError
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach
from arealite.types import LossOutput, MicroBatch

TOKENS, LENGTHS = (16_384, 32_768, 65_536), (4_096, 16_384)
WARM_UP_STEPS, STEPS = 2, 5
MATRIX_SIZE, MATRIX_PRODUCTS = 8_192, 30
DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s of the SXM cards, by what is in the device's name (nvidia.com)."""
SHAPES = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What one kind of step reached."""

    seconds: float
    peak_gib: float
    is_checkpointed: bool


def make_model(folder: Path, shape: str, context: int) -> str:
    """A model folder of random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=context)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def make_batch(tokens: int, length: int, vocabulary: int) -> MicroBatch:
    """T tokens in sequences of one length; all but the first of each are trained on."""
    torch.manual_seed(tokens + length)
    is_trained = torch.arange(tokens) % length > 0
    return MicroBatch(
        token_ids=torch.randint(vocabulary, (tokens,)),
        cu_seqlens=torch.arange(0, tokens + 1, length, dtype=torch.int32),
        loss_mask=is_trained,
        behavior_logprobs=torch.where(is_trained, -5.0, 0.0),
        versions=torch.where(is_trained, 0, -1),
        temperature=torch.ones(tokens),
        advantages=torch.where(is_trained, torch.randn(tokens), 0.0),
        loss_weight=is_trained / is_trained.sum(),
    )


def flops_per_token(shape: str, length: int) -> float:
    """Model FLOPs of forward and backward, of one token in a sequence of this length."""
    size = SHAPES[shape]
    hidden, layers = size["hidden_size"], size["num_hidden_layers"]
    queries = size["num_attention_heads"] * size["head_dim"]
    keys = size["num_key_value_heads"] * size["head_dim"]
    attention = 2 * hidden * queries + 2 * hidden * keys
    block = attention + 3 * hidden * size["intermediate_size"]
    return 6 * (layers * block + hidden * size["vocab_size"]) + 6 * layers * queries * length


def nll_loss(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
    return LossOutput(total=-(mb.loss_weight * logprobs).sum())


def ppo_loss(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
    surrogate, _ = clipped_surrogate(
        logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask, 0.2, 0.28
    )
    weight, _ = importance_weight(mb.proximal_logprobs, mb.behavior_logprobs, mb.loss_mask, cap=5.0)
    return LossOutput(total=-(mb.loss_weight * weight * surrogate).sum())


def sft_step(engine: FSDPEngine, mb: MicroBatch) -> None:
    engine.step([mb], nll_loss)


def rl_step(engine: FSDPEngine, mb: MicroBatch) -> None:
    engine.step(attach([mb], proximal_logprobs=engine.logprobs([mb])), ppo_loss)


Step = Callable[[FSDPEngine, MicroBatch], None]
KINDS: dict[str, Step] = {"sft": sft_step, "rl": rl_step}


def measure(model: str, mb: MicroBatch, step: Step) -> Cell:
    """The cheapest way that fits."""
    for is_checkpointed in (False, True):
        cfg = FSDPConfig(
            micro_batch_tokens=len(mb.token_ids), activation_checkpointing=is_checkpointed
        )
        with FSDPEngine(model, cfg) as engine:
            try:
                return take_steps(engine, mb, step, is_checkpointed)
            except OutOfMemoryError:
                if is_checkpointed:
                    raise
        gc.collect()  # engines are full of cycles
        torch.cuda.empty_cache()
    raise AssertionError("one of the two ways returns or raises")


def take_steps(engine: FSDPEngine, mb: MicroBatch, step: Step, is_checkpointed: bool) -> Cell:
    seconds = []
    for number in range(WARM_UP_STEPS + STEPS):
        if number == WARM_UP_STEPS and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began_s = now_s()
        step(engine, mb)
        seconds.append(now_s() - began_s)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Cell(
        seconds=statistics.median(seconds[WARM_UP_STEPS:]),
        peak_gib=peak / 2**30,
        is_checkpointed=is_checkpointed,
    )


def now_s() -> float:
    """When all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(size: int) -> float:
    """FLOP/s of the best of many matrix products, in the dtype in which the trainer computes."""
    where = (
        {"device": "cuda", "dtype": torch.bfloat16}
        if torch.cuda.is_available()
        else {"device": "cpu", "dtype": torch.float32}
    )
    left, right = (torch.randn(size, size, **where) for _ in range(2))
    seconds = []
    for _ in range(MATRIX_PRODUCTS):
        began_s = now_s()
        left @ right
        seconds.append(now_s() - began_s)
    return 2 * size**3 / min(seconds)


def run(
    shape: str, tokens: Sequence[int], lengths: Sequence[int], device: str
) -> dict[str, object]:
    """The figures of every cell; prints the table."""
    measured = matrix_rate(MATRIX_SIZE if torch.cuda.is_available() else 512)
    sheet = next((rate for name, rate in DATA_SHEET.items() if name in device), None)
    figures: dict[str, object] = {"device": device, "matrix_tflops": round(measured / 1e12, 2)}
    print(f"{device}: {measured / 1e12:,.3g} TFLOP/s in matrix products")
    print(f"{'cell':24}{'tokens/s':>12}{'MFU':>8}{'of measured':>13}{'peak GiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), shape, max(lengths))
        for kind, step in KINDS.items():
            for count, length in ((t, n) for t in tokens for n in lengths if n <= t):
                mb = make_batch(count, length, SHAPES[shape]["vocab_size"])
                gc.collect()
                cell = measure(model, mb, step)
                rate = count / cell.seconds * flops_per_token(shape, length)
                figures[f"{kind}_{count}x{length}"] = {
                    "tokens_per_s": round(count / cell.seconds),
                    "mfu": round(rate / sheet, 4) if sheet else None,
                    "mfu_measured": round(rate / measured, 4),
                    "peak_gib": round(cell.peak_gib, 2),
                    "checkpointing": cell.is_checkpointed,
                }
                mfu = f"{rate / sheet:.1%}" if sheet else "?"
                print(
                    f"{kind} {count:,} in {length:,}".ljust(24)
                    + f"{count / cell.seconds:>12,.0f}{mfu:>8}{rate / measured:>13.1%}"
                    + f"{cell.peak_gib:>10.1f}"
                    + ("  with activation checkpointing" if cell.is_checkpointed else "")
                )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and args.shape != "tiny":
        print("Not run: this machine has no GPU.")
        print(json.dumps({"device": "none"}))
        return
    device = torch.cuda.get_device_name() if has_gpu else "cpu"
    figures = run(args.shape, args.tokens, args.lengths, device)
    dist.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
