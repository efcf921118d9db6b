"""Keeps the rows of a data set that a model can learn from: neither always right nor never.

    python recipes/filter_by_difficulty.py out=runs/filtered
    torchrun recipes/gsm8k_grpo.py dataset=runs/filtered/train.jsonl

Asks each question several times and grades the answers. A question that is always answered right
teaches nothing; one that never is may become easier later, and is kept unless `keep_never=false`.
The kept rows get a `pass_rate`. The last line is JSON with how many were of each kind.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from arealite.config import check_at_least, parse
from arealite.data import load_rows, load_tokenizer
from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.observe.terminal import show
from arealite.rewards.math import math_reward
from arealite.rollout.executor import RolloutConfig, run_episodes
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.types import Row, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of the filter."""

    model: str = "arealite/tiny-math"
    """Hugging Face id or folder: whose answers say how difficult a question is."""
    dataset: str = "arealite/gsm8k-mini"
    """Hugging Face id, or a folder or file of rows with `question` and `answer`."""
    split: str = "train"
    """Which rows of the data set: train, test, or what else it has."""
    out: str = "runs/filtered"
    """Folder for `train.jsonl` with the kept rows, a file that a recipe takes as `dataset`."""
    samples: int = 8
    """Answers to each question; the more, the fewer that were only lucky."""
    right_from: float = 1.0
    """An answer is right whose reward is not below; rewards are from 0 to 1."""
    keep_never: bool = True
    """Keep questions without any right answer."""
    system_prompt: str = ""
    """First message of every conversation, such as how to mark the answer; empty: none."""

    sampling: SamplingParams = SamplingParams(temperature=1.0, max_new_tokens=64)
    server: ServerConfig = ServerConfig()
    rollout: RolloutConfig = RolloutConfig()

    def __post_init__(self) -> None:
        check_at_least(self, samples=1)


def pass_rates(cfg: Config, rows: list[Row]) -> list[float]:
    """Of each row, the share of answers that are right."""
    answer = SingleTurnWorkflow(
        load_tokenizer(cfg.model),
        math_reward,
        cfg.sampling,
        group_size=cfg.samples,
        system_prompt=cfg.system_prompt,
    )
    with (
        serve(cfg.model, cfg.server, log_dir=cfg.out) as server,
        VLLMEngine(server) as engine,
    ):
        engine.receive_weights([], version=0)  # those on disk, so that each token can say so
        # No more at a time than a server works on: what waits in its queue for long looks stuck.
        max_running = max(1, cfg.server.max_num_seqs // cfg.samples)
        groups = run_episodes(engine, answer, rows, limits=cfg.rollout, max_running=max_running)
    return [fmean(sample.reward >= cfg.right_from for sample in group) for group in groups]


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = load_rows(cfg.dataset, split=cfg.split)
    rates = pass_rates(cfg, rows)
    kept = [
        row | {"pass_rate": rate}
        for row, rate in zip(rows, rates, strict=True)
        if rate < 1 and (rate > 0 or cfg.keep_never)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
    (out / "train.jsonl").write_text("".join(lines))
    always, never = sum(rate == 1 for rate in rates), sum(rate == 0 for rate in rates)
    figures = {"rows": len(rows), "kept": len(kept), "always_right": always, "never_right": never}
    show(f"The kept rows are in {out / 'train.jsonl'}.")
    print(json.dumps(figures | {"pass_rate": round(fmean(rates), 4)}))


if __name__ == "__main__":
    main(parse(Config))
