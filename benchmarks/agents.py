"""What the endpoint for agents adds to a call: the same calls to it, and to vLLM itself.

    python benchmarks/agents.py                 # three minutes on two idle cores
    python benchmarks/agents.py --rounds 1      # a quick look

One real vLLM server with the demo's model, and an agent that posts bodies of
`/v1/chat/completions` with aiohttp and reads the replies as JSON. It holds conversations of `TURNS`
turns: in each a new question, and an answer of exactly `ANSWER` tokens that is sent back with the
next. It runs on the loop of this process, as agents of a run do, and so does the endpoint.

- **direct**: to vLLM's own `/v1/chat/completions`, with `logprobs`, without which nothing could be
  trained on. That the answers have a fixed length (`ignore_eos`) is said in its bodies.
- **endpoint**: to an episode of AgentWorkflow, which keeps ids, log-probs and versions itself: the
  agent need not ask for log-probs, and the run says `ignore_eos`.

**One at a time**: conversation by conversation, the ways take turns with the same questions.
`overhead_ms` is the median over all pairs of calls of the endpoint's time less vLLM's.

**Together**: `EPISODES` conversations at once, twice each way in a round, and with the endpoint all
that belongs to an episode, from its beginning to its trajectories. `throughput_ratio` is the median
over the rounds of tokens per second through the endpoint, over those without it in the same round.

The goals are at most 5 ms, and at least .9. With others on the same cores both vary by far more.

Printed beside it, by the server's own counters: how much of its prompts was found in the prefix
cache in a conversation of `LONG_TURNS` turns through the endpoint. The last line is JSON.
"""

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from safetensors.torch import load_file

from arealite import background
from arealite.agents import AgentWorkflow, Episode
from arealite.data import load_rows, load_tokenizer, resolve_model
from arealite.inference.monitor import COUNT_EVERY_S
from arealite.inference.server import ServerConfig, Servers, serve
from arealite.inference.vllm import VLLMEngine
from arealite.types import Row, SamplingParams

TURNS, ANSWER = 4, 64
CONVERSATIONS, EPISODES, LONG_TURNS = 20, 64, 20
ROUNDS = 5
CONTEXT = 4096
SAMPLING = SamplingParams(max_new_tokens=ANSWER, ignore_eos=True)
LIMIT_S = 300.0

Talk = Callable[[list[str]], Awaitable[list[float]]]
"""Questions of a conversation to the milliseconds that each call took."""


def make_model(folder: Path) -> str:
    """The demo's model with a longer context."""
    shutil.copytree(resolve_model("arealite/tiny-math"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


async def converse(
    session: aiohttp.ClientSession, url: str, key: str, fields: dict[str, Any], asked: list[str]
) -> list[float]:
    """Ask one question after the other; the milliseconds that each call took."""
    messages: list[dict[str, str]] = []
    took_ms: list[float] = []
    headers = {"Authorization": f"Bearer {key}"}
    for question in asked:
        messages.append({"role": "user", "content": question})
        body = fields | {"messages": messages, "max_tokens": ANSWER}
        began_s = time.perf_counter()
        async with session.post(f"{url}/chat/completions", json=body, headers=headers) as reply:
            answer = await reply.json()
        took_ms.append(1e3 * (time.perf_counter() - began_s))
        assert reply.status == 200 and answer["usage"]["completion_tokens"] == ANSWER, answer
        text = answer["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": text})
    return took_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Ways:
    """The two, over connections that they share."""

    direct: Talk
    endpoint: Talk


@asynccontextmanager
async def connect(servers: Servers, engine: VLLMEngine, model: str) -> AsyncIterator[Ways]:
    address, key = servers.addresses[0], servers.token or "none"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def direct(asked: list[str]) -> list[float]:
            fields = {"model": model, "logprobs": True, "ignore_eos": True}
            return await converse(session, f"{address}/v1", key, fields, asked)

        async def agent(episode: Episode, row: Row) -> float:
            fields = {"model": "policy"}
            asked = row["asked"]
            row["took_ms"] = await converse(
                session, episode.base_url, episode.api_key, fields, asked
            )
            return 1.0

        workflow = AgentWorkflow(load_tokenizer(model), agent, SAMPLING)

        async def endpoint(asked: list[str]) -> list[float]:
            row: Row = {"asked": asked}
            trajectory = await workflow.arun_sample(engine, row)
            assert trajectory.response_length == ANSWER * len(asked), trajectory.metrics
            return row["took_ms"]

        yield Ways(direct=direct, endpoint=endpoint)


async def one_at_a_time(ways: Ways, conversations: list[list[str]]) -> list[tuple[float, float]]:
    """Milliseconds of each call, directly and through the endpoint."""
    pairs: list[tuple[float, float]] = []
    for number, asked in enumerate(conversations):
        if number % 2:
            direct, endpoint = await ways.direct(asked), await ways.endpoint(asked)
        else:
            endpoint, direct = await ways.endpoint(asked), await ways.direct(asked)
        pairs += zip(direct, endpoint, strict=True)
    return pairs


async def together(talk: Talk, conversations: list[list[str]]) -> float:
    """Seconds that all conversations at once take."""
    began_s = time.perf_counter()
    await asyncio.gather(*map(talk, conversations))
    return time.perf_counter() - began_s


def measure(ways: Ways, engine: VLLMEngine, rounds: int) -> dict[str, float]:
    rows = load_rows("arealite/gsm8k-mini", split="train")
    questions = iter([row["question"] for row in rows])

    def conversations(count: int, turns: int = TURNS) -> list[list[str]]:
        return [[next(questions) for _ in range(turns)] for _ in range(count)]

    for talk in (ways.direct, ways.endpoint):
        on_loop(together(talk, conversations(EPISODES, turns=1)))  # warm
    pairs = on_loop(one_at_a_time(ways, conversations(CONVERSATIONS)))
    rates: list[tuple[float, float]] = []
    for _ in range(rounds):
        # There and back, so that what grows or shrinks meanwhile does so for both.
        turns = (ways.direct, ways.endpoint, ways.endpoint, ways.direct)
        took_s = [on_loop(together(talk, conversations(EPISODES))) for talk in turns]
        tokens = 2 * EPISODES * TURNS * ANSWER
        rates.append((tokens / (took_s[0] + took_s[3]), tokens / (took_s[1] + took_s[2])))
    found_in_cache(engine)
    on_loop(ways.endpoint(conversations(1, LONG_TURNS)[0]))
    return summary(pairs, rates) | {"prefix_hit_rate": found_in_cache(engine)}


def found_in_cache(engine: VLLMEngine) -> float:
    """Share of the prompts' tokens since the last call, once the counters have been read."""
    time.sleep(2 * COUNT_EVERY_S)
    return engine.take_metrics().get("server/prefix_hit_rate", 0.0)


def summary(pairs: list[tuple[float, float]], rates: list[tuple[float, float]]) -> dict[str, float]:
    """The figures, of which the table is printed."""
    direct_ms, endpoint_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    direct_rate, endpoint_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    overhead_ms = statistics.median(endpoint - direct for direct, endpoint in pairs)
    ratio = statistics.median(endpoint / direct for direct, endpoint in rates)
    print("|  | direct | endpoint | |")
    print("|---|---|---|---|")
    print(
        f"| one at a time, ms per call of {ANSWER} tokens ({len(pairs)} pairs) "
        f"| {direct_ms:.1f} | {endpoint_ms:.1f} | median difference {overhead_ms:+.1f} ms |"
    )
    print(
        f"| {EPISODES} episodes together, tokens/s ({len(rates)} rounds) "
        f"| {direct_rate:,.0f} | {endpoint_rate:,.0f} | median ratio {ratio:.2f} |"
    )
    for direct, endpoint in rates:
        print(f"| | {direct:,.0f} | {endpoint:,.0f} | {endpoint / direct:.2f} |")
    return {
        "overhead_ms": round(overhead_ms, 2),
        "throughput_ratio": round(ratio, 3),
        "direct_ms": round(direct_ms, 1),
        "endpoint_ms": round(endpoint_ms, 1),
        "direct_tokens_per_s": round(direct_rate),
        "endpoint_tokens_per_s": round(endpoint_rate),
    }


def on_loop(coroutine: Any) -> Any:
    """The coroutine's result, from the loop on which agents and endpoint run."""
    return background.run(coroutine, timeout_s=LIMIT_S, what="a turn of the benchmark")


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        with serve(model, ServerConfig(), log_dir=folder) as servers, VLLMEngine(servers) as engine:
            weights = load_file(f"{model}/model.safetensors")
            engine.receive_weights(weights.items(), version=0)
            stack = AsyncExitStack()
            ways = on_loop(stack.enter_async_context(connect(servers, engine, model)))
            try:
                figures = measure(ways, engine, rounds)
            finally:
                on_loop(stack.aclose())
    rate = figures["prefix_hit_rate"]
    print(f"\n{LONG_TURNS} turns in one conversation: prefix-cache hit rate {rate:.3f}")
    print(json.dumps(figures | {"prefix_hit_rate": round(rate, 3)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    main(parser.parse_args().rounds)
