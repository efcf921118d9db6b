"""GRPO on GSM8K with asynchronous rollouts: one file, read from top to bottom.

    torchrun recipes/gsm8k_grpo.py                               # two CPU cores, in minutes
    torchrun --nproc-per-node 4 recipes/gsm8k_grpo.py --config recipes/configs/qwen2.5_1.5b.yaml
    torchrun --nproc-per-node 8 recipes/gsm8k_grpo.py server.addresses=[http://127.0.0.1:8000]

Every rank runs this whole file and owns its prompts from data set row to advantage. Ranks meet in
next_batch, in pack (to balance work and count tokens), in the engine, in push_weights and in the
evaluation. Expected curve, hardware and wall-clock: recipes/README.md#gsm8k-grpo.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from arealite import dist
from arealite.algo.advantages import group_advantages
from arealite.algo.losses import clipped_surrogate, importance_weight
from arealite.checkpoint import RunLock, load_checkpoint, save_checkpoint
from arealite.config import check_at_least, parse
from arealite.data import load_rows, load_tokenizer
from arealite.errors import ArealiteError, GateError
from arealite.gates import GateConfig, LogprobGate
from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.observe.metrics import MetricLogger, rollout_metrics, train_metrics
from arealite.observe.rollout_log import RolloutLog
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.executor import RolloutConfig, RolloutExecutor, run_episodes
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.types import LossOutput, MicroBatch, SamplingParams, Trajectory
from arealite.weights import push_weights


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of this experiment. `rollout.max_staleness=0` makes it synchronous."""

    model: str = "arealite/tiny-math"
    """Hugging Face id or folder; `arealite/tiny-math` is the embedded model that runs anywhere."""
    dataset: str = "arealite/gsm8k-mini"
    """Hugging Face id, or a folder or file of rows with `question` and `answer`."""
    system_prompt: str = ""
    """First message of every conversation, such as how to mark the answer; empty: none."""
    reward_timeout_s: float = 15.0
    """Limit of one call of the reward in seconds; beyond it the row is lost."""
    steps: int = 80
    """Training steps; each consumes one batch and makes one weight version."""
    group_size: int = 8
    """Completions per prompt; their mean reward is the baseline, so at least 2."""
    minibatches: int = 1
    """Optimizer steps per training step; the clip only acts from the second one on."""
    clip_low: float = 0.2
    """The ratio current/proximal may fall to 1 - clip_low before its gradient stops."""
    clip_high: float = 0.28
    """The ratio current/proximal may rise to 1 + clip_high before its gradient stops."""
    behavior_weight_cap: float = 5.0
    """Tokens whose proximal/behavior ratio exceeds this are left out of the loss."""
    eval_every_steps: int = 10
    """Steps between greedy evaluations on the test rows."""
    save_every_steps: int = 20
    """Steps between checkpoints."""
    seed: int = 1
    """Order of the rows and of everything random in the trainer derive from it."""
    out_dir: str = "runs/gsm8k_grpo"
    """Metrics, rollouts and checkpoints; a run that finds a checkpoint here continues from it."""

    sampling: SamplingParams = SamplingParams(temperature=1.0, max_new_tokens=64)
    server: ServerConfig = ServerConfig()
    rollout: RolloutConfig = RolloutConfig(prompts_per_step=16, max_staleness=2)
    train: FSDPConfig = FSDPConfig(lr=5e-5, warmup_steps=10, micro_batch_tokens=8_192)
    gate: GateConfig = GateConfig()

    def __post_init__(self) -> None:
        check_at_least(self, steps=0, group_size=2, minibatches=1, clip_low=0, clip_high=0)
        check_at_least(self, behavior_weight_cap=1, eval_every_steps=1, save_every_steps=1)
        check_at_least(self, reward_timeout_s=1e-3)


def grpo_loss(logprobs: torch.Tensor, mb: MicroBatch, cfg: Config) -> LossOutput:
    """Decoupled clipped policy loss, weighted so that the whole batch sums to its mean.

    Three policies meet here: *behavior* sampled the token, maybe some weight versions ago;
    *proximal* is the policy at the start of this step; *current* is being updated. The clip keeps
    current near proximal; the capped weight accounts for behavior being older than proximal.

    Args:
        logprobs: [T] log-probability of each token under the current policy, with gradient.
        mb: the packed tokens and their [T] fields.

    Source: clip, arXiv:1707.06347; decoupling, arXiv:2110.00641; its use here, arXiv:2505.24298.
    """
    surrogate, clipped = clipped_surrogate(
        logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask, cfg.clip_low, cfg.clip_high
    )
    weight, dropped = importance_weight(
        mb.proximal_logprobs, mb.behavior_logprobs, mb.loss_mask, cap=cfg.behavior_weight_cap
    )
    return LossOutput(
        total=-(mb.loss_weight * weight * surrogate).sum(),
        metrics={"clipped": clipped.sum(), "dropped": dropped.sum()},
    )


def evaluate(ask: Callable[[], list[list[Trajectory]]], gate: LogprobGate) -> dict[str, float]:
    """Mean reward and response length over the rows of all ranks, whatever the staleness limit.

    Fresh samples also show whether server and trainer still compute the same log-probs.
    """
    groups = ask()
    samples = [sample for group in groups for sample in group]
    return gate.check_fresh(groups) | {
        "eval/reward": dist.mean([sample.reward for sample in samples]),
        "eval/response_length": dist.mean([sample.response_length for sample in samples]),
    }


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    train_rows = load_rows(cfg.dataset, split="train")
    test_rows = dist.shard(load_rows(cfg.dataset, split="test"))
    settings = {"system_prompt": cfg.system_prompt, "reward_timeout_s": cfg.reward_timeout_s}
    answer = partial(SingleTurnWorkflow, tokenizer, gsm8k_reward, **settings)
    explore = answer(cfg.sampling, group_size=cfg.group_size)
    greedy = answer(cfg.sampling.greedy())
    loss_fn = partial(grpo_loss, cfg=cfg)

    with (
        RunLock(cfg.out_dir),
        MetricLogger(cfg.out_dir, cfg) as metrics,
        FSDPEngine(cfg.model, cfg.train) as train_engine,
        serve(cfg.model, cfg.server, log_dir=cfg.out_dir) as server,
        VLLMEngine(server) as inference_engine,
    ):
        gate = LogprobGate(
            train_engine,
            inference_engine,
            cfg.model,
            cfg.gate,
            max_tokens=cfg.train.micro_batch_tokens,
            out_dir=cfg.out_dir,
        )
        rollout_log = RolloutLog(cfg.out_dir, tokenizer)
        start = load_checkpoint(cfg.out_dir, train_engine)  # zeros for a new run
        metrics.resume(start.version)
        rollout_log.resume(start.version)
        # Before the first rollout, so that what cannot work fails now and not after a day.
        push_weights(train_engine, inference_engine, version=start.version)
        gate.check_start(explore, train_rows, cfg.rollout)
        ask = partial(run_episodes, inference_engine, greedy, test_rows, limits=cfg.rollout)

        with RolloutExecutor(
            inference_engine, explore, train_rows, cfg.rollout, seed=cfg.seed, start=start
        ) as rollouts:
            for version in range(start.version, cfg.steps):
                try:
                    if version % cfg.eval_every_steps == 0 or version == start.version:
                        metrics.log(version, evaluate(ask, gate))
                    groups, lost = rollouts.next_batch(), rollouts.take_lost()
                except ArealiteError as error:  # on all ranks; nothing of this step has happened
                    if version > start.version and not isinstance(error, GateError):
                        save_checkpoint(cfg.out_dir, train_engine, rollouts.cursor(version))
                    raise
                rollout_log.write(version + 1, groups, lost)
                minibatches = pack(
                    groups,
                    group_advantages(groups),
                    num_minibatches=cfg.minibatches,
                    max_tokens=cfg.train.micro_batch_tokens,
                    aggregation="token",
                )
                # All of them before any update: proximal is the policy at the start of the step.
                minibatches = [
                    attach(mbs, proximal_logprobs=train_engine.logprobs(mbs)) for mbs in minibatches
                ]
                gap = gate.check(minibatches, version)
                stats = [train_engine.step(mbs, loss_fn) for mbs in minibatches]
                push_weights(train_engine, inference_engine, version=version + 1)

                progress = rollout_metrics(groups, version, lost) | train_metrics(stats) | gap
                metrics.log(version + 1, progress | inference_engine.take_metrics())
                if (version + 1) % cfg.save_every_steps == 0 or version + 1 == cfg.steps:
                    save_checkpoint(cfg.out_dir, train_engine, rollouts.cursor(version + 1))

        metrics.log(inference_engine.version, evaluate(ask, gate))
        train_engine.save_pretrained(Path(cfg.out_dir) / "model")
        metrics.report(checkpoint=Path(cfg.out_dir) / "model")


if __name__ == "__main__":
    main(parse(Config))
