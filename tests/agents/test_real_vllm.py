"""A long conversation with a real server through the endpoint, with the real client."""

import re
import urllib.request

import pytest
from openai import OpenAI

from arealite.agents import Endpoint, Episode
from arealite.data import load_tokenizer
from arealite.inference.vllm import VLLMEngine
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from tests.agents.conftest import served
from tests.inference.conformance import wait_until
from tests.inference.parity import checkpoint, push
from tests.real_server import RealServer

TURNS = 20
BEGIN, GO_ON = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
COUNTERS = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")


class Recorded:
    """The engine, and all that it was asked and answered."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self.version = engine.version
        self.responses: list[ModelResponse] = []

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        self.responses.append(await self._engine.agenerate(request))
        return self.responses[-1]


def metrics(server: RealServer) -> str:
    request = urllib.request.Request(
        f"{server.address}/metrics", headers={"Authorization": f"Bearer {server.token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.read().decode()


def counters(server: RealServer) -> tuple[float, float]:
    """Prompt tokens looked up in the cache, and found."""
    lines = metrics(server).splitlines()
    queries, hits = (
        sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))
        for name in COUNTERS
    )
    return queries, hits


def block_size(server: RealServer) -> int:
    found = re.search(r'[{,]block_size="(\d+)"', metrics(server))
    assert found
    return int(found[1])


@pytest.mark.parametrize("tiny_model", ["tied"], indirect=True)
def test_twenty_turns_encode_each_message_once_and_are_found_in_the_cache(
    tiny_model: str,
    vllm_server: RealServer,
    engine: VLLMEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    push(engine, checkpoint(tiny_model), version=0)
    tokenizer, recorded = load_tokenizer(tiny_model), Recorded(engine)
    encoded: list[str] = []
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, **how: encoded.append(text) or encode(text, **how)
    )
    queries_before, hits_before = counters(vllm_server)
    episode = Episode(recorded, tokenizer, SamplingParams(max_new_tokens=2))  # type: ignore[arg-type]

    with Endpoint() as endpoint, served(endpoint, episode):
        client = OpenAI(base_url=episode.base_url, api_key=episode.api_key)
        messages: list = []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": chr(ord("a") + turn)})
            reply = client.chat.completions.create(model="policy", messages=messages)
            messages.append(reply.choices[0].message.model_dump(exclude_none=True))
        client.close()

    # Each message once, and nothing that was sampled: that is what the text would be without it.
    first, *rest = (BEGIN.format(chr(ord("a") + turn)) for turn in range(TURNS))
    assert encoded == [first, *(GO_ON + text for text in rest)]
    asked = [response.request.token_ids for response in recorded.responses if response.request]
    known: list[int] = []
    for prompt, response in zip(asked, recorded.responses, strict=True):
        assert prompt[: len(known)] == known
        known = prompt + response.token_ids

    num_asked = sum(map(len, asked))
    wait_until(lambda: counters(vllm_server)[0] - queries_before >= num_asked)
    queries, hits = counters(vllm_server)
    block = block_size(vllm_server)
    in_whole_blocks = sum(len(prompt) // block * block for prompt in asked[:-1])
    with capsys.disabled():
        print(
            f"\n{TURNS} turns, {len(known)} tokens: prefix-cache hit rate "
            f"{(hits - hits_before) / num_asked:.3f} of {num_asked} prompt tokens, "
            f"in blocks of {block}"
        )
    assert queries - queries_before == num_asked
    assert hits - hits_before >= in_whole_blocks
