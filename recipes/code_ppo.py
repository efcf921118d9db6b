"""The PPO of AReaL v0.3 on programming tasks: decoupled, without a critic, of groups that differ.

    torchrun recipes/code_ppo.py                                 # two CPU cores, in minutes

The loop and the mathematics are those of math_ppo.py: 5 for a right program and -5 for a wrong one,
normalized over all tokens of the batch, in a loss that sets the policy which sampled apart from the
one that is clipped to. New are the reward, which runs the program in a sandbox on the tests of its
row, and that the next row is taken where all programs of a group are right, or all wrong. Settings
of the published runs: recipes/configs/areal_v0.3_8b.yaml and areal_v0.3_14b.yaml.

Source: https://github.com/inclusionAI/AReaL, blog of v0.3; arXiv:2505.24298.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arealite import dist
from arealite.algo.advantages import batch_normalized, reward_advantages
from arealite.algo.shaping import scaled_rewards
from arealite.checkpoint import RunLock, load_checkpoint, save_checkpoint
from arealite.config import parse
from arealite.data import load_rows, load_tokenizer
from arealite.errors import ArealiteError, GateError
from arealite.gates import LogprobGate
from arealite.inference.server import serve
from arealite.inference.vllm import VLLMEngine
from arealite.observe.metrics import MetricLogger, rollout_metrics, train_metrics
from arealite.observe.rollout_log import RolloutLog
from arealite.rewards.code import code_reward
from arealite.rollout.executor import RolloutConfig, RolloutExecutor, run_episodes
from arealite.rollout.workflows import DynamicSampling, SingleTurnWorkflow
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.weights import push_weights
from recipes import math_ppo
from recipes.gsm8k_grpo import evaluate, grpo_loss


@dataclass(frozen=True, kw_only=True)
class Config(math_ppo.Config):
    """Every knob of this experiment: those of math_ppo.py with other defaults."""

    model: str = "arealite/tiny-agent"
    """Hugging Face id or folder; `arealite/tiny-agent` is the embedded model that can program."""
    dataset: str = "arealite/tiny-programs"
    """Hugging Face id, or a folder or file of rows with `question` and `tests`."""
    minibatches: int = 1
    """Optimizer steps per training step; the clip only acts from the second one on."""
    steps: int = 60
    """Training steps; each consumes one batch and makes one weight version."""
    out_dir: str = "runs/code_ppo"
    """Metrics, rollouts and checkpoints; a run that finds a checkpoint here continues from it."""

    rollout: RolloutConfig = RolloutConfig(prompts_per_step=8, max_staleness=4)
    train: FSDPConfig = FSDPConfig(lr=4e-6, warmup_steps=10, micro_batch_tokens=8_192)


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    train_rows = load_rows(cfg.dataset, split="train", required=("question",))
    test_rows = dist.shard(load_rows(cfg.dataset, split="test", required=("question",)))
    settings = {"system_prompt": cfg.system_prompt, "reward_timeout_s": cfg.reward_timeout_s}
    answer = partial(SingleTurnWorkflow, tokenizer, code_reward, **settings)
    explore = DynamicSampling(answer(cfg.sampling, group_size=cfg.group_size))
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
        gate.check_start(explore.workflow, train_rows, cfg.rollout)
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
                progress |= explore.take_metrics() | inference_engine.take_metrics()
                metrics.log(version + 1, progress)
                if (version + 1) % cfg.save_every_steps == 0 or version + 1 == cfg.steps:
                    save_checkpoint(cfg.out_dir, train_engine, rollouts.cursor(version + 1))

        metrics.log(inference_engine.version, evaluate(ask, gate))
        train_engine.save_pretrained(Path(cfg.out_dir) / "model")
        metrics.report(checkpoint=Path(cfg.out_dir) / "model")


if __name__ == "__main__":
    main(parse(Config))
