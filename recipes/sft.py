"""Supervised fine-tuning: the policy learns to give the answers of the rows.

    torchrun recipes/sft.py                                      # two CPU cores, seconds
    torchrun recipes/sft.py max_rows=200                         # the same rows again and again

A step takes the next rows in order and lowers the mean negative log-probability of their answers'
tokens; the prompt is context. A few hundred worked answers are enough to teach a model how to go
about problems that it has the knowledge for: AReaL v0.2 took 200, and a model of 32 billion
parameters. Expected figures: recipes/README.md#sft.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from arealite import dist
from arealite.checkpoint import RunLock, load_checkpoint, save_checkpoint
from arealite.config import check_at_least, parse
from arealite.data import RowOrder, load_rows, load_tokenizer
from arealite.observe.metrics import MetricLogger, train_metrics
from arealite.rollout.chat_template import ChatTemplate, first_messages
from arealite.rollout.demonstration import demonstration
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import pack
from arealite.types import Cursor, LossOutput, MicroBatch, Row, Trajectory


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of this experiment."""

    model: str = "arealite/tiny-math"
    """Hugging Face id or folder; `arealite/tiny-math` is the embedded model that runs anywhere."""
    dataset: str = "arealite/gsm8k-mini"
    """Hugging Face id, or a folder or file of rows with `question` and `answer`, or `messages`."""
    max_rows: int = 0
    """Rows to train on, the first of the data set; 0: all."""
    system_prompt: str = ""
    """First message of every conversation, such as how to mark the answer; empty: none."""
    steps: int = 40
    """Optimizer steps; times rows_per_step and divided by the rows, these are the epochs."""
    rows_per_step: int = 32
    """Rows in one optimizer step over all ranks."""
    eval_every_steps: int = 10
    """Steps between evaluations on the test rows."""
    max_eval_rows: int = 200
    """Test rows to evaluate on, the first of them; 0: no evaluation, and no test rows needed."""
    save_every_steps: int = 20
    """Steps between checkpoints."""
    seed: int = 1
    """Order of the rows and of everything random in the trainer derive from it."""
    out_dir: str = "runs/sft"
    """Metrics and checkpoints; a run that finds a checkpoint here continues from it."""

    train: FSDPConfig = FSDPConfig(lr=1e-4, warmup_steps=4, micro_batch_tokens=8_192)

    def __post_init__(self) -> None:
        check_at_least(self, max_rows=0, steps=0, rows_per_step=1, max_eval_rows=0)
        check_at_least(self, eval_every_steps=1, save_every_steps=1)


def sft_loss(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
    """Negative log-likelihood of the answers, weighted so that the whole batch sums to its mean.

    Args:
        logprobs: [T] log-probability of each token, with gradient.
        mb: the packed tokens and their [T] fields.
    """
    return LossOutput(total=-(mb.loss_weight * logprobs).sum())


def learn(row: Row, place: int, template: ChatTemplate, cfg: Config) -> Trajectory:
    """The row's answer as something to imitate."""
    question = first_messages(row["question"], cfg.system_prompt)
    return demonstration(template, question, row["answer"], row_index=place)


def minibatch_of(answers: Sequence[Trajectory], cfg: Config) -> list[MicroBatch]:
    """All of them in one; every token of every answer counts alike. A collective of all ranks."""
    [minibatch] = pack(
        [[answer] for answer in answers],
        [[1.0] for _ in answers],
        num_minibatches=1,
        max_tokens=cfg.train.micro_batch_tokens,
        aggregation="token",
    )
    return minibatch


def held_out(cfg: Config, template: ChatTemplate) -> list[MicroBatch]:
    """The answers of the test rows; nothing without any."""
    if not cfg.max_eval_rows:
        return []
    rows = load_rows(cfg.dataset, split="test")[: cfg.max_eval_rows]
    return minibatch_of([learn(row, -1, template, cfg) for row in dist.shard(rows)], cfg)


def evaluate(engine: FSDPEngine, minibatch: list[MicroBatch]) -> dict[str, float]:
    """Mean negative log-probability of a token of the test rows' answers."""
    found = zip(engine.logprobs(minibatch), minibatch, strict=True)
    [loss] = dist.sum([-sum(float((mb.loss_weight * logprobs).sum()) for logprobs, mb in found)])
    return {"eval/loss": loss}


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    template = ChatTemplate(load_tokenizer(cfg.model))
    rows = load_rows(cfg.dataset, split="train")[: cfg.max_rows or None]
    order = RowOrder(len(rows), seed=cfg.seed)
    test = held_out(cfg, template)

    with (
        RunLock(cfg.out_dir),
        MetricLogger(cfg.out_dir, cfg) as metrics,
        FSDPEngine(cfg.model, cfg.train) as engine,
    ):
        start = load_checkpoint(cfg.out_dir, engine)  # zeros for a new run
        metrics.resume(start.version)

        for version in range(start.version, cfg.steps):
            if test and version % cfg.eval_every_steps == 0:
                metrics.log(version, evaluate(engine, test))
            first = version * cfg.rows_per_step
            places = dist.shard(range(first, first + cfg.rows_per_step))
            answers = [learn(rows[order[place]], place, template, cfg) for place in places]
            minibatch = minibatch_of(answers, cfg)
            stats = engine.step(minibatch, sft_loss)
            metrics.log(version + 1, train_metrics([stats]) | {"train/tokens": stats.num_tokens})
            if (version + 1) % cfg.save_every_steps == 0 or version + 1 == cfg.steps:
                cursor = Cursor(version=version + 1, next_row=first + cfg.rows_per_step)
                save_checkpoint(cfg.out_dir, engine, cursor)

        if test:
            metrics.log(cfg.steps, evaluate(engine, test))
        engine.save_pretrained(Path(cfg.out_dir) / "model")
        metrics.report(checkpoint=Path(cfg.out_dir) / "model")


if __name__ == "__main__":
    main(parse(Config))
