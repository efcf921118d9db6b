"""An agent of pydantic-ai, written as its documentation says, runs and trains unmodified."""

import asyncio
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from arealite import dist
from arealite.agents import AgentWorkflow, Episode
from arealite.algo.advantages import group_advantages
from arealite.data import load_tokenizer
from arealite.gates import GateConfig, LogprobGate
from arealite.inference.vllm import VLLMEngine
from arealite.rollout.executor import run_episodes
from arealite.testing import ScriptedEngine
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.types import Row, SamplingParams
from arealite.weights import push_weights
from recipes.gsm8k_grpo import Config, grpo_loss
from tests.rollout.chat_templates import template_tokenizer

agent = Agent(system_prompt="Count with the tool.", retries=3)


@agent.tool_plain
def letters(word: str) -> int:
    """Count the letters of a word.

    Args:
        word: The word.
    """
    return len(word)


async def talk(episode: Episode, row: Row, *, is_streamed: bool = False) -> float:
    """Two questions to the agent, the second in the same conversation."""
    async with AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key) as client:
        model = OpenAIChatModel("policy", provider=OpenAIProvider(openai_client=client))
        if is_streamed:
            async with agent.run_stream(row["first"], model=model) as stream:
                first = stream
                await stream.get_output()
        else:
            first = await agent.run(row["first"], model=model)
        known = first.all_messages()
        second = await agent.run(row["second"], model=model, message_history=known)
    return float(row["answer"] in second.output)


def call(word: str) -> str:
    return f'<tool_call>\n{{"name": "letters", "arguments": {{"word": "{word}"}}}}\n</tool_call>'


def policy(conversation: str) -> str:
    """What a model would say that calls the tool for each word, and adds up."""
    if conversation.count("<tool_response>") == 0:
        return call("horse") + call("ox")
    if "third?" not in conversation:
        return "5 and 2."
    return call("cat") if conversation.count("<tool_response>") < 3 else "3, so 10 in all."


ROW: Row = {"first": "horse, ox?", "second": "third? cat", "answer": "10"}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_its_calls_are_one_ledger(is_streamed: bool):
    tokenizer = template_tokenizer("qwen2_5")
    engine = ScriptedEngine(policy, tokenizer)
    run = partial(talk, is_streamed=is_streamed)
    workflow = AgentWorkflow(tokenizer, run, SamplingParams(max_new_tokens=400), group_size=2)
    group = asyncio.run(workflow.arun_episode(engine, ROW))
    assert group is not None
    assert [(t.reward, t.metrics) for t in group] == [
        (1.0, {"turns": 4.0, "tool_calls": 3.0, "forks": 0.0})
    ] * 2
    pairs = zip(group[0].token_ids, group[0].loss_mask, strict=True)
    sampled = tokenizer.decode([token_id for token_id, is_sampled in pairs if is_sampled])
    assert sampled == "<|im_end|>".join(
        [call("horse") + call("ox"), "5 and 2.", call("cat"), "3, so 10 in all.", ""]
    )
    # Each request is the one before, with the answer and what was said then.
    asked = [
        r.token_ids for r in engine.requests if r.conversation == engine.requests[0].conversation
    ]
    assert len(asked) == 4
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(asked))


@pytest.mark.parametrize("tiny_model", ["tied"], indirect=True)
def test_it_is_trained_on_what_a_real_server_sampled(
    tiny_model: str, engine: VLLMEngine, tmp_path: Path
):
    async def scored(episode: Episode, row: Row) -> float:
        await talk(episode, row)
        return float(len(episode.last_text))

    # An answer without text would make the framework ask again.
    sampling = SamplingParams(max_new_tokens=16, ignore_eos=True)
    workflow = AgentWorkflow(load_tokenizer(tiny_model), scored, sampling, group_size=4)
    with FSDPEngine(tiny_model, FSDPConfig(lr=1e-3)) as trainer:
        push_weights(trainer, engine, version=0)
        groups = run_episodes(engine, workflow, [ROW])
        assert [t.metrics["turns"] for t in groups[0]] == [2.0] * 4
        advantages = group_advantages(groups)
        batch = pack(groups, advantages, num_minibatches=1, max_tokens=4096, aggregation="token")
        [minibatch] = [attach(mbs, proximal_logprobs=trainer.logprobs(mbs)) for mbs in batch]
        gate = LogprobGate(
            trainer, engine, tiny_model, GateConfig(), max_tokens=4096, out_dir=tmp_path
        )
        gap = gate.check([minibatch], 0)
        stats = trainer.step(minibatch, partial(grpo_loss, cfg=Config()))
    dist.close()
    print(f"mean |server - trainer| log-prob {gap['gate/logprob_gap_mean']:.5f}")
    assert gap["gate/logprob_gap_mean"] < 0.01
    assert stats.num_tokens == 4 * 2 * 16
    assert stats.grad_norm > 0
