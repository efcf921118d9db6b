"""DPO: of two answers to a question, somebody preferred one, and the policy learns to.

    torchrun recipes/dpo.py                                      # two CPU cores, a minute
    torchrun recipes/dpo.py dataset=DATASET                      # rows: question, chosen, rejected

No server and no reward: a reference model, which is the policy before training, says how far it has
gone, and the loss is a logistic regression on what the policy prefers by more than the reference.
The two answers to a question stay side by side in one micro-batch. With train.lora_rank the
reference takes no memory. Expected figures: recipes/README.md#dpo.

Source: DPO, arXiv:2305.18290.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from arealite import dist
from arealite.algo.losses import sum_of_sequence
from arealite.algo.preferences import dpo_loss
from arealite.checkpoint import RunLock, load_checkpoint, save_checkpoint
from arealite.config import check_at_least, parse
from arealite.data import RowOrder, load_rows, load_tokenizer
from arealite.observe.metrics import MetricLogger, train_metrics
from arealite.rollout.chat_template import ChatTemplate, first_messages
from arealite.rollout.demonstration import demonstration
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.training.reference import Reference
from arealite.types import Cursor, LossOutput, MicroBatch, Row, Trajectory

# T packed tokens, N sequences: chosen and rejected take turns.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of this experiment."""

    model: str = "arealite/tiny-math"
    """Hugging Face id or folder; `arealite/tiny-math` is the embedded model that runs anywhere."""
    dataset: str = "arealite/mini-preferences"
    """Hugging Face id, or a folder or file of rows with `question` or `prompt`, `chosen` and
    `rejected`, each of them text or messages."""
    system_prompt: str = ""
    """First message of every conversation, such as how to mark the answer; empty: none."""
    beta: float = 0.1
    """Weight of a nat by which the policy prefers an answer more than the reference does; the
    larger, the nearer the policy stays to the reference. .1 in the paper."""
    steps: int = 30
    """Optimizer steps; times pairs_per_step and divided by the rows, these are the epochs."""
    pairs_per_step: int = 32
    """Pairs of answers in one optimizer step over all ranks."""
    eval_every_steps: int = 10
    """Steps between evaluations on the test rows."""
    max_eval_rows: int = 200
    """Test rows to evaluate on, the first of them; 0: no evaluation, and no test rows needed."""
    save_every_steps: int = 20
    """Steps between checkpoints."""
    seed: int = 1
    """Order of the rows and of everything random in the trainer derive from it."""
    out_dir: str = "runs/dpo"
    """Metrics and checkpoints; a run that finds a checkpoint here continues from it."""

    train: FSDPConfig = FSDPConfig(lr=5e-5, warmup_steps=4, micro_batch_tokens=8_192)

    def __post_init__(self) -> None:
        check_at_least(self, beta=1e-9, steps=0, pairs_per_step=1, max_eval_rows=0)
        check_at_least(self, eval_every_steps=1, save_every_steps=1)


def of_answers(values: torch.Tensor, mb: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums over the tokens of the chosen answers and of the rejected ones, both [N / 2]."""
    first_tokens = mb.cu_seqlens[:-1].long()
    sums = sum_of_sequence(values, mb.loss_mask, mb.cu_seqlens)[first_tokens]
    return sums[0::2], sums[1::2]


def pair_loss(logprobs: torch.Tensor, mb: MicroBatch, cfg: Config) -> LossOutput:
    """Loss of preferring the rejected answers, weighted so that all pairs sum to their mean.

    Args:
        logprobs: [T] log-probability of each token under the policy, with gradient.
        mb: the packed pairs; each of the N sequences has 1 / N of the weight of a minibatch.
    """
    losses = dpo_loss(*of_answers(logprobs, mb), *of_answers(mb.ref_logprobs, mb), beta=cfg.beta)
    chosen_weight, rejected_weight = of_answers(mb.loss_weight, mb)
    return LossOutput(total=((chosen_weight + rejected_weight) * losses).sum())


def compare(row: Row, place: int, template: ChatTemplate, cfg: Config) -> list[Trajectory]:
    """The chosen answer of a row and the rejected one, as something to compare."""
    question = first_messages(row["question"], cfg.system_prompt)
    answers = (row["chosen"], row["rejected"])
    return [demonstration(template, question, each, row_index=place) for each in answers]


def minibatch_of(
    pairs: Sequence[list[Trajectory]], reference: Reference, cfg: Config
) -> list[MicroBatch]:
    """All of them in one, with what the reference says. A collective of all ranks."""
    [minibatch] = pack(
        list(pairs),
        [[0.0, 0.0] for _ in pairs],
        num_minibatches=1,
        max_tokens=cfg.train.micro_batch_tokens,
        aggregation="sequence",
        keep_groups=True,
    )
    return attach(minibatch, ref_logprobs=reference.logprobs(minibatch))


def evaluate(engine: FSDPEngine, minibatch: list[MicroBatch], cfg: Config) -> dict[str, float]:
    """Loss on the test pairs; in how many the policy has moved towards the chosen, and how far."""
    found = list(zip(engine.logprobs(minibatch), minibatch, strict=True))
    [loss] = dist.sum([sum(float(pair_loss(each, mb, cfg).total) for each, mb in found)])
    moved = [of_answers(each - mb.ref_logprobs, mb) for each, mb in found if mb.num_sequences]
    margins = [float(margin) for chosen, rejected in moved for margin in chosen - rejected]
    return {
        "eval/loss": loss,
        "eval/preferred": dist.mean([float(margin > 0) for margin in margins]),
        "eval/margin": dist.mean(margins),
    }


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    template = ChatTemplate(load_tokenizer(cfg.model))
    load = partial(load_rows, cfg.dataset, required=("question", "chosen", "rejected"))
    rows = load(split="train")
    test_rows = load(split="test")[: cfg.max_eval_rows] if cfg.max_eval_rows else []
    order = RowOrder(len(rows), seed=cfg.seed)

    with (
        RunLock(cfg.out_dir),
        MetricLogger(cfg.out_dir, cfg) as metrics,
        FSDPEngine(cfg.model, cfg.train) as engine,
        Reference(cfg.model, engine) as reference,
    ):
        start = load_checkpoint(cfg.out_dir, engine)  # zeros for a new run
        metrics.resume(start.version)
        places = dist.shard(range(len(test_rows)))
        pairs = [compare(test_rows[place], place, template, cfg) for place in places]
        test = minibatch_of(pairs, reference, cfg) if test_rows else []

        for version in range(start.version, cfg.steps):
            if test and version % cfg.eval_every_steps == 0:
                metrics.log(version, evaluate(engine, test, cfg))
            first = version * cfg.pairs_per_step
            places = dist.shard(range(first, first + cfg.pairs_per_step))
            pairs = [compare(rows[order[place]], place, template, cfg) for place in places]
            stats = engine.step(minibatch_of(pairs, reference, cfg), partial(pair_loss, cfg=cfg))
            metrics.log(version + 1, train_metrics([stats]) | {"train/tokens": stats.num_tokens})
            if (version + 1) % cfg.save_every_steps == 0 or version + 1 == cfg.steps:
                cursor = Cursor(version=version + 1, next_row=first + cfg.pairs_per_step)
                save_checkpoint(cfg.out_dir, engine, cursor)

        if test:
            metrics.log(cfg.steps, evaluate(engine, test, cfg))
        engine.save_pretrained(Path(cfg.out_dir) / "model")
        metrics.report(checkpoint=Path(cfg.out_dir) / "model")


if __name__ == "__main__":
    main(parse(Config))
