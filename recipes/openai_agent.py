"""GRPO of an agent that knows nothing of training: it only talks to OpenAI's API.

    torchrun recipes/openai_agent.py                             # two CPU cores, in minutes

`solve` below is an ordinary program of the `openai` package. AgentWorkflow gives each of its
episodes an address and a key, and trains on the tokens that were sampled for its calls. Task, tool
and loop are those of gsm8k_agent.py. Expected curve: recipes/README.md#openai-agent.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from transformers.utils.chat_template_utils import get_json_schema

from arealite import dist
from arealite.agents import AgentWorkflow, Episode
from arealite.algo.advantages import group_advantages
from arealite.checkpoint import RunLock, load_checkpoint, save_checkpoint
from arealite.config import parse
from arealite.data import load_rows, load_tokenizer
from arealite.errors import ArealiteError, GateError
from arealite.gates import LogprobGate
from arealite.inference.server import serve
from arealite.inference.vllm import VLLMEngine
from arealite.observe.metrics import MetricLogger, rollout_metrics, train_metrics
from arealite.observe.rollout_log import RolloutLog
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.executor import RolloutExecutor, run_episodes
from arealite.training.fsdp import FSDPEngine
from arealite.training.packing import attach, pack
from arealite.types import Row
from arealite.weights import push_weights
from recipes import gsm8k_agent
from recipes.gsm8k_agent import calculate, evaluate
from recipes.gsm8k_grpo import grpo_loss


@dataclass(frozen=True, kw_only=True)
class Config(gsm8k_agent.Config):
    """Every knob of this experiment: those of gsm8k_agent.py."""

    out_dir: str = "runs/openai_agent"
    """Metrics, rollouts and checkpoints; a run that finds a checkpoint here continues from it."""


async def solve(episode: Episode, row: Row, *, client: AsyncOpenAI, max_turns: int) -> None:
    """Ask, calculate what the model wants calculated, and ask again until it has an answer."""
    client = client.with_options(base_url=episode.base_url, api_key=episode.api_key)
    tools: list[Any] = [get_json_schema(calculate)]
    messages: list[Any] = [{"role": "user", "content": row["question"]}]
    for _ in range(max_turns):
        reply = await client.chat.completions.create(model="policy", messages=messages, tools=tools)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            assert call.type == "function"
            result = calculated(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not message.tool_calls:
            return


def calculated(arguments: str) -> str:
    try:
        return calculate(**json.loads(arguments))
    except (TypeError, ValueError, SyntaxError) as error:  # the model shall see what was wrong
        return f"Error: {error}"


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    train_rows = load_rows(cfg.dataset, split="train")
    test_rows = dist.shard(load_rows(cfg.dataset, split="test"))
    # One client for all episodes: to make one takes as long as to ask a small model.
    client = AsyncOpenAI(base_url="http://of-the-episode", api_key="of-the-episode")
    agent = partial(
        AgentWorkflow,
        tokenizer,
        partial(solve, client=client, max_turns=cfg.max_turns),
        reward=gsm8k_reward,
        reward_timeout_s=cfg.reward_timeout_s,
    )
    explore = agent(cfg.sampling, group_size=cfg.group_size)
    greedy = agent(cfg.sampling.greedy())
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
