"""DAPO on GSM8K: every group teaches something, and answers near their budget cost.

    torchrun recipes/gsm8k_dapo.py                               # two CPU cores, in minutes

The loop is that of gsm8k_grpo.py, which has DAPO's asymmetric clip and mean over tokens already.
New are dynamic sampling, which takes the next row where all rewards of a group are equal, a penalty
that grows over the last tokens of the budget, and advantages in units of the group's standard
deviation. Expected curve: recipes/README.md#gsm8k-dapo.

Source: arXiv:2503.14476.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arealite import dist
from arealite.algo.advantages import group_advantages
from arealite.algo.shaping import overlong_penalty
from arealite.checkpoint import RunLock, load_checkpoint, save_checkpoint
from arealite.config import check_at_least, parse
from arealite.data import load_rows, load_tokenizer
from arealite.errors import ArealiteError, GateError
from arealite.gates import LogprobGate
from arealite.inference.server import serve
from arealite.inference.vllm import VLLMEngine
from arealite.observe.metrics import MetricLogger, rollout_metrics, train_metrics
from arealite.observe.rollout_log import RolloutLog
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.executor import RolloutExecutor, run_episodes
from arealite.rollout.workflows import DynamicSampling, SingleTurnWorkflow
from arealite.training.fsdp import FSDPEngine
from arealite.training.packing import attach, pack
from arealite.weights import push_weights
from recipes import gsm8k_grpo
from recipes.gsm8k_grpo import evaluate, grpo_loss


@dataclass(frozen=True, kw_only=True)
class Config(gsm8k_grpo.Config):
    """Every knob of this experiment: those of gsm8k_grpo.py, and the penalty."""

    overlong_tokens: int = 16
    """Tokens before the budget where the penalty begins; at the budget it is `overlong_factor`."""
    overlong_factor: float = 1.0
    """Largest penalty, in units of the reward."""
    out_dir: str = "runs/gsm8k_dapo"
    """Metrics, rollouts and checkpoints; a run that finds a checkpoint here continues from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, overlong_tokens=1, overlong_factor=0)


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    train_rows = load_rows(cfg.dataset, split="train")
    test_rows = dist.shard(load_rows(cfg.dataset, split="test"))
    settings = {"system_prompt": cfg.system_prompt, "reward_timeout_s": cfg.reward_timeout_s}
    answer = partial(SingleTurnWorkflow, tokenizer, gsm8k_reward, **settings)
    explore = DynamicSampling(answer(cfg.sampling, group_size=cfg.group_size))
    greedy = answer(cfg.sampling.greedy())
    penalize = partial(
        overlong_penalty,
        max_tokens=cfg.sampling.max_new_tokens,
        tolerance=cfg.overlong_tokens,
        factor=cfg.overlong_factor,
    )
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
        gate.check_start(explore.workflow, train_rows, cfg.rollout)
        ask = partial(run_episodes, inference_engine, greedy, test_rows, limits=cfg.rollout)

        with RolloutExecutor(
            inference_engine, explore, train_rows, cfg.rollout, seed=cfg.seed, start=start
        ) as rollouts:
            for version in range(start.version, cfg.steps):
                try:
                    if version % cfg.eval_every_steps == 0 or version == start.version:
                        metrics.log(version, evaluate(ask, gate))
                    groups, lost = penalize(rollouts.next_batch()), rollouts.take_lost()
                except ArealiteError as error:  # on all ranks; nothing of this step has happened
                    if version > start.version and not isinstance(error, GateError):
                        save_checkpoint(cfg.out_dir, train_engine, rollouts.cursor(version))
                    raise
                rollout_log.write(version + 1, groups, lost)
                minibatches = pack(
                    groups,
                    group_advantages(groups, divide_by_std=True),
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
                progress |= explore.take_metrics() | inference_engine.take_metrics()
                metrics.log(version + 1, progress)
                if (version + 1) % cfg.save_every_steps == 0 or version + 1 == cfg.steps:
                    save_checkpoint(cfg.out_dir, train_engine, rollouts.cursor(version + 1))

        metrics.log(inference_engine.version, evaluate(ask, gate))
        train_engine.save_pretrained(Path(cfg.out_dir) / "model")
        metrics.report(checkpoint=Path(cfg.out_dir) / "model")


if __name__ == "__main__":
    main(parse(Config))
