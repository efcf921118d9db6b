"""PPO with a critic on GSM8K: a second model says what is to be expected before each token.

    torchrun recipes/gsm8k_ppo.py                                # two CPU cores, in minutes

The loop is that of gsm8k_grpo.py. New is the critic, the same model with one number per token in
place of its head. Its values and the rewards, less a KL if that has a weight, give the advantages
by GAE and the returns that it learns next. Expected curve: recipes/README.md#gsm8k-ppo.

Source: PPO, arXiv:1707.06347; GAE, arXiv:1506.02438.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from arealite import dist
from arealite.algo.advantages import token_rewards
from arealite.algo.gae import gae, normalized
from arealite.algo.kl import kl_penalized
from arealite.algo.values import explained_variance, value_loss
from arealite.checkpoint import Engines, RunLock, load_checkpoint, save_checkpoint
from arealite.config import check_at_least, parse
from arealite.data import load_rows, load_tokenizer
from arealite.errors import ArealiteError, GateError
from arealite.gates import LogprobGate
from arealite.inference.server import serve
from arealite.inference.vllm import VLLMEngine
from arealite.observe.metrics import MetricLogger, rollout_metrics, train_metrics
from arealite.observe.rollout_log import RolloutLog
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.executor import RolloutConfig, RolloutExecutor, run_episodes
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.training.reference import Reference
from arealite.types import LossOutput, MicroBatch
from arealite.weights import push_weights
from recipes import gsm8k_grpo
from recipes.gsm8k_grpo import evaluate, grpo_loss


@dataclass(frozen=True, kw_only=True)
class Config(gsm8k_grpo.Config):
    """Every knob of this experiment: those of gsm8k_grpo.py, and the critic."""

    gamma: float = 1.0
    """Discount per token, from 0 to 1."""
    gae_lambda: float = 0.95
    """0 trusts the critic after one token, 1 only the rewards."""
    kl_weight: float = 0.0
    """What a token costs per nat between policy and model before training, in units of reward."""
    value_clip: float = 0.5
    """How far a value may move in one step before its gradient stops, in units of the reward."""
    critic_epochs: int = 4
    """Times that the critic goes over a batch; it may learn faster than the policy."""
    critic_warmup_steps: int = 5
    """First training steps, in which only the critic learns."""
    group_size: int = 2
    """Completions per prompt; the critic needs no others to compare with, so more prompts do."""
    clip_high: float = 0.2
    steps: int = 40
    out_dir: str = "runs/gsm8k_ppo"

    rollout: RolloutConfig = RolloutConfig(prompts_per_step=64, max_staleness=2)
    critic: FSDPConfig = FSDPConfig(lr=1e-3, warmup_steps=5, micro_batch_tokens=8_192)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, gamma=0, gae_lambda=0, kl_weight=0, value_clip=1e-9)
        check_at_least(self, critic_epochs=1, critic_warmup_steps=0)


def rewards_of(mb: MicroBatch, cfg: Config) -> torch.Tensor:
    """The rewards [T] of its tokens, less what their distance from the reference costs."""
    if not cfg.kl_weight:
        return mb.advantages
    return kl_penalized(
        mb.advantages, mb.proximal_logprobs, mb.ref_logprobs, mb.loss_mask, weight=cfg.kl_weight
    )


def estimate(
    minibatches: list[list[MicroBatch]], critic: FSDPEngine, cfg: Config
) -> list[list[MicroBatch]]:
    """The same with advantages, old values and returns; their `advantages` were token rewards."""
    discounted = partial(gae, gamma=cfg.gamma, gae_lambda=cfg.gae_lambda)
    every = [mb for minibatch in minibatches for mb in minibatch]
    values, masks = critic.values(every), [mb.loss_mask for mb in every]
    pairs = [
        discounted(rewards_of(mb, cfg), value, mb.loss_mask, mb.cu_seqlens)
        for mb, value in zip(every, values, strict=True)
    ]
    advantages, returns = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    advantages = normalized(advantages, masks, sum_over_ranks=dist.sum)
    known = iter(attach(every, advantages=advantages, old_values=values, returns=returns))
    return [[next(known) for _ in minibatch] for minibatch in minibatches]


def critic_loss(values: torch.Tensor, mb: MicroBatch, cfg: Config) -> LossOutput:
    """Squared error of the critic, weighted so that the whole batch sums to its mean."""
    loss, clipped = value_loss(values, mb.old_values, mb.returns, mb.loss_mask, clip=cfg.value_clip)
    return LossOutput(total=(mb.loss_weight * loss).sum(), metrics={"value_clipped": clipped.sum()})


def knowledge(minibatches: list[list[MicroBatch]]) -> dict[str, float]:
    """How much of the returns the critic foresaw, over this rank's tokens."""
    every = [mb for minibatch in minibatches for mb in minibatch]
    columns = zip(*((mb.old_values, mb.returns, mb.loss_mask) for mb in every), strict=True)
    return {"critic/explained_variance": explained_variance(*map(torch.cat, columns))}


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    train_rows = load_rows(cfg.dataset, split="train")
    test_rows = dist.shard(load_rows(cfg.dataset, split="test"))
    settings = {"system_prompt": cfg.system_prompt, "reward_timeout_s": cfg.reward_timeout_s}
    answer = partial(SingleTurnWorkflow, tokenizer, gsm8k_reward, **settings)
    explore = answer(cfg.sampling, group_size=cfg.group_size)
    greedy = answer(cfg.sampling.greedy())
    loss_fn, critic_loss_fn = partial(grpo_loss, cfg=cfg), partial(critic_loss, cfg=cfg)

    with (
        RunLock(cfg.out_dir),
        MetricLogger(cfg.out_dir, cfg) as metrics,
        FSDPEngine(cfg.model, cfg.train) as train_engine,
        FSDPEngine(cfg.model, cfg.critic, is_critic=True) as critic,
        Reference(cfg.model, train_engine) if cfg.kl_weight else nullcontext() as reference,
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
        both = Engines(policy=train_engine, critic=critic)
        start = load_checkpoint(cfg.out_dir, both)  # zeros for a new run
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
                        save_checkpoint(cfg.out_dir, both, rollouts.cursor(version))
                    raise
                rollout_log.write(version + 1, groups, lost)
                minibatches = pack(
                    groups,
                    token_rewards(groups),  # in the place of advantages, until `estimate`
                    num_minibatches=cfg.minibatches,
                    max_tokens=cfg.train.micro_batch_tokens,
                    aggregation="token",
                )
                # All of them before any update: proximal is the policy at the start of the step.
                minibatches = [
                    attach(mbs, proximal_logprobs=train_engine.logprobs(mbs)) for mbs in minibatches
                ]
                minibatches = [
                    attach(mbs, ref_logprobs=reference.logprobs(mbs)) if reference else mbs
                    for mbs in minibatches
                ]
                minibatches = estimate(minibatches, critic, cfg)
                gap = gate.check(minibatches, version) | knowledge(minibatches)
                for mbs in minibatches * cfg.critic_epochs:
                    critic.step(mbs, critic_loss_fn, head="values")
                is_warm = version >= cfg.critic_warmup_steps
                stats = [train_engine.step(mbs, loss_fn) for mbs in minibatches if is_warm]
                push_weights(train_engine, inference_engine, version=version + 1)

                progress = rollout_metrics(groups, version, lost) | train_metrics(stats) | gap
                metrics.log(version + 1, progress | inference_engine.take_metrics())
                if (version + 1) % cfg.save_every_steps == 0 or version + 1 == cfg.steps:
                    save_checkpoint(cfg.out_dir, both, rollouts.cursor(version + 1))

        metrics.log(inference_engine.version, evaluate(ask, gate))
        train_engine.save_pretrained(Path(cfg.out_dir) / "model")
        metrics.report(checkpoint=Path(cfg.out_dir) / "model")


if __name__ == "__main__":
    main(parse(Config))
