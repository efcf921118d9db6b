"""What two ranks compute, for the tests of this folder: one start of torchrun serves them all.

torchrun --nproc-per-node 2 -m tests.training.two_ranks MODEL ONE_RANK_CHECKPOINT OUT
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from arealite import dist
from arealite.errors import ConfigError
from arealite.training.fsdp import FSDPEngine
from arealite.training.packing import pack
from arealite.types import MicroBatch, StepStats
from tests.training.helpers import (
    CFG,
    make_groups,
    minibatch_of,
    sequences,
    step_gradient,
    train_step,
)


def one_trajectory() -> list[MicroBatch]:
    """One rank has one sequence, the other nothing."""
    groups = [make_groups(1, 1)[0]] if dist.rank() == 0 else []
    [minibatch] = pack(
        groups, [[1.0]] * len(groups), num_minibatches=1, max_tokens=64, aggregation="token"
    )
    return minibatch


def cuts(model: str) -> dict[tuple[str, int], tuple[dict[str, torch.Tensor], StepStats]]:
    """Gradient and stats by precision and tokens per micro-batch."""
    return {
        (dtype, max_tokens): step_gradient(
            FSDPEngine(model, replace(CFG, dtype=dtype)), minibatch_of(max_tokens=max_tokens)
        )
        for dtype in ("float64", "float32")
        for max_tokens in (10_000, 64, 40)
    }


def main(model: str, checkpoint: str, out: Path) -> None:
    dist.init()
    engine = FSDPEngine(model, CFG)
    minibatch = minibatch_of(max_tokens=64)
    logprobs = dict(
        pair
        for mb, values in zip(minibatch, engine.logprobs(minibatch), strict=True)
        for pair in sequences(mb, values)
    )
    gradient, stats = step_gradient(engine, minibatch)
    engine.save(out / "checkpoint")
    after_next_step_stats = train_step(engine, minibatch)
    weights = dict(engine.named_weights())
    engine.save_pretrained(out / "exported")

    lonely_gradient, lonely_stats = step_gradient(FSDPEngine(model, CFG), one_trajectory())

    lora = FSDPEngine(model, replace(CFG, lora_rank=4))
    lora_gradient, lora_stats = step_gradient(lora, minibatch)

    resumed = FSDPEngine(model, CFG)
    resumed.load(Path(checkpoint))
    resumed_stats = train_step(resumed, minibatch)
    try:
        resumed.logprobs([minibatch[0]] * (2 - dist.rank()))
        uneven = ""
    except ConfigError as error:
        uneven = str(error)
    results = {
        "uneven": dist.gather(uneven),
        "logprobs": dist.gather(logprobs),
        "num_micro_batches": dist.gather(len(minibatch)),
        "gradient": gradient,
        "lora_gradient": lora_gradient,
        "lora_stats": lora_stats,
        "stats": stats,
        "after_next_step_stats": after_next_step_stats,
        "weights": weights,
        "lonely_gradient": lonely_gradient,
        "lonely_stats": lonely_stats,
        "resumed_weights": dict(resumed.named_weights()),
        "resumed_stats": resumed_stats,
        "cuts": cuts(model),
    }
    if dist.rank() == 0:
        torch.save(results, out / "results.pt")
    dist.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
