"""The critic-free PPO of AReaL v0.1 and v0.2: no value model, no means of groups, no KL.

    torchrun recipes/math_ppo.py                                 # two CPU cores, in minutes

The loop is that of gsm8k_grpo.py. A right answer is worth 5 and a wrong one -5; with gamma and
lambda 1 and no critic, that is the return of every token, and the advantage once it is normalized
over all tokens of the batch. A step takes four minibatches. Expected curve:
recipes/README.md#math-ppo.

Source: https://github.com/inclusionAI/AReaL, blog of v0.2; PPO, arXiv:1707.06347.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arealite import dist
from arealite.algo.advantages import batch_normalized, reward_advantages
from arealite.algo.shaping import scaled_rewards
from arealite.checkpoint import RunLock, load_checkpoint, save_checkpoint
from arealite.config import check_at_least, parse
from arealite.data import load_rows, load_tokenizer
from arealite.errors import ArealiteError, GateError
from arealite.gates import LogprobGate
from arealite.inference.server import serve
from arealite.inference.vllm import VLLMEngine
from arealite.observe.metrics import MetricLogger, rollout_metrics, train_metrics
from arealite.observe.rollout_log import RolloutLog
from arealite.rewards.math import math_reward
from arealite.rollout.executor import RolloutExecutor, run_episodes
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.weights import push_weights
from recipes import gsm8k_grpo
from recipes.gsm8k_grpo import evaluate, grpo_loss


@dataclass(frozen=True, kw_only=True)
class Config(gsm8k_grpo.Config):
    """Every knob of this experiment: those of gsm8k_grpo.py, and the rewards."""

    right_reward: float = 5.0
    """Reward of a right answer."""
    wrong_reward: float = -5.0
    """Reward of a wrong one."""
    minibatches: int = 4
    """Optimizer steps per training step; the clip only acts from the second one on."""
    clip_high: float = 0.2
    """The ratio current/proximal may rise to 1 + clip_high before its gradient stops."""
    steps: int = 40
    """Training steps; each consumes one batch and makes one weight version."""
    out_dir: str = "runs/math_ppo"
    """Metrics, rollouts and checkpoints; a run that finds a checkpoint here continues from it."""

    train: FSDPConfig = FSDPConfig(lr=2e-5, warmup_steps=10, micro_batch_tokens=8_192)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, right_reward=self.wrong_reward)


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    train_rows = load_rows(cfg.dataset, split="train")
    test_rows = dist.shard(load_rows(cfg.dataset, split="test"))
    settings = {"system_prompt": cfg.system_prompt, "reward_timeout_s": cfg.reward_timeout_s}
    answer = partial(SingleTurnWorkflow, tokenizer, math_reward, **settings)
    explore = answer(cfg.sampling, group_size=cfg.group_size)
    greedy = answer(cfg.sampling.greedy())
    scale = partial(scaled_rewards, right=cfg.right_reward, wrong=cfg.wrong_reward)
    normalize = partial(batch_normalized, over="tokens", sum_over_ranks=dist.sum)
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
                    groups, lost = scale(rollouts.next_batch()), rollouts.take_lost()
                except ArealiteError as error:  # on all ranks; nothing of this step has happened
                    if version > start.version and not isinstance(error, GateError):
                        save_checkpoint(cfg.out_dir, train_engine, rollouts.cursor(version))
                    raise
                rollout_log.write(version + 1, groups, lost)
                minibatches = pack(
                    groups,
                    normalize(reward_advantages(groups), groups),
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
