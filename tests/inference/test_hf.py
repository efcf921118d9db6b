"""What the in-process engine adds to the contract of all engines."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from arealite.errors import ConfigError, DataError, ServerError, TrajectoryError
from arealite.inference import hf
from arealite.inference.hf import HFEngine, sample
from arealite.testing import make_tiny_model
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from tests.inference.conformance import start, wait_until, wait_until_sampling
from tests.inference.parity import (
    Reference,
    Weights,
    checkpoint,
    gap,
    generate,
    make_prompts,
    perturbed,
    push,
)

EXACT = 1e-4
"""Greatest mean |engine - transformers| log-prob, both in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def weights(folder: str) -> Weights:
    return checkpoint(folder)


def greedy_ids(engine: HFEngine) -> list[int]:
    [response] = generate(engine, make_prompts(1), SamplingParams(max_new_tokens=8).greedy())
    return response.token_ids


# --- The distribution that is sampled from --------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, [0.6849, 0.2466, 0.0616, 0.0068]),  # squares, divided by their sum of 0.365
        (1.0, 0.8, [0.625, 0.375, 0.0, 0.0]),
        (1.0, 0.81, [0.5263, 0.3158, 0.1579, 0.0]),
        (1.0, 0.01, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_whose_log_probs_are_reported(
    temperature: float, top_p: float, expected: list[float]
):
    count = 20_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(count, 4) + 7.0
    tokens, logprobs = sample(
        logits,
        torch.full((count,), temperature),
        torch.full((count,), top_p),
        torch.Generator().manual_seed(0),
    )
    wanted = torch.tensor(expected)
    assert torch.allclose(logprobs.exp(), wanted[tokens], atol=1e-4)
    assert torch.allclose(tokens.bincount(minlength=4) / count, wanted, atol=0.015)


def test_temperature_zero_takes_the_most_likely_token_and_reports_it_at_temperature_one():
    logits = torch.tensor([[0.2, 0.7, 0.1], [0.2, 0.7, 0.1]]).log()
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = sample(logits, torch.zeros(2), torch.tensor([1.0, 0.1]), generator)
    assert tokens.tolist() == [1, 1]
    assert logprobs.exp().tolist() == pytest.approx([0.7, 0.7])


def test_the_random_numbers_are_the_engines_own(folder: str):
    def sampled(seed: int) -> list[int]:
        with HFEngine(folder, seed=seed) as engine:
            [response] = generate(engine, make_prompts(1), SamplingParams(max_new_tokens=16))
        return response.token_ids

    before = torch.random.get_rng_state()
    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- Batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_sequences_do_not_notice_with_whom_they_share_a_batch(
    tmp_path: Path, family: Literal["qwen2", "qwen3", "llama"]
):
    folder = make_tiny_model(tmp_path, family=family)
    prompts = [prompt[: 1 + 5 * i] for i, prompt in enumerate(make_prompts(12, length=60))]
    with HFEngine(folder, max_running=5) as engine:
        responses = generate(engine, prompts, SamplingParams(max_new_tokens=16, temperature=0.7))
    assert gap(Reference(folder), {-1: checkpoint(folder)}, prompts, responses, 0.7) <= EXACT


def test_a_cancelled_request_makes_room_for_the_next(folder: str):
    with HFEngine(folder, max_running=1) as engine:
        first, second = start(engine, make_prompts(2), max_new_tokens=480)
        assert first.cancel()
        assert second.result(60).token_ids


def test_an_answer_gives_its_room_back_before_it_arrives(folder: str):
    async def rooms(engine: HFEngine) -> list[int]:
        request = ModelRequest(token_ids=[5] * 9, sampling=SamplingParams(max_new_tokens=1))
        return [engine.room for _ in range(100) if await engine.agenerate(request)]

    with HFEngine(folder, max_running=3) as engine:
        assert set(asyncio.run(rooms(engine))) == {3}


def test_closing_ends_running_and_waiting_requests_with_an_error(folder: str):
    engine = HFEngine(folder, max_running=2)
    engine.pause()
    requests = start(engine, make_prompts(4), max_new_tokens=400)
    engine.close()
    for request in requests:
        with pytest.raises(ServerError, match="closed"):
            request.result(10)
    with pytest.raises(ServerError, match="Make a new one"):
        greedy_ids(engine)


def test_python_may_end_while_the_engine_samples(folder: str):
    script = (
        "import sys\n"
        "from arealite import background\n"
        "from arealite.inference.hf import HFEngine\n"
        "from arealite.types import ModelRequest, SamplingParams\n"
        "engine = HFEngine(sys.argv[1])\n"
        "def ask(budget):\n"
        "    sampling = SamplingParams(max_new_tokens=budget)\n"
        "    request = ModelRequest(token_ids=[5] * 9, sampling=sampling)\n"
        "    return background.submit(engine.agenerate(request))\n"
        "long = [ask(480) for _ in range(8)]\n"
        "ask(4).result(30)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, folder], check=False, timeout=60)
    assert ended.returncode == 0


# --- Failures -------------------------------------------------------------------------------------


def test_a_step_that_fails_reaches_everyone_who_waits_and_the_engine_goes_on(
    folder: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise MemoryError("no room for 3 GB")

    with HFEngine(folder) as engine:
        engine.pause()
        requests = start(engine, make_prompts(6), max_new_tokens=8)
        with monkeypatch.context() as patch:
            patch.setattr(hf, "sample", fail)
            engine.resume()
            for request in requests:
                with pytest.raises(
                    ServerError, match=r"MemoryError\('no room for 3 GB'\).* lower max_running"
                ):
                    request.result(10)
        assert greedy_ids(engine)


def test_a_thread_that_dies_reaches_everyone_who_waits(
    folder: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: object) -> None:
        raise SystemExit("killed")

    with HFEngine(folder) as engine:
        engine.pause()
        requests = start(engine, make_prompts(6), max_new_tokens=8)
        monkeypatch.setattr(HFEngine, "_admit", fail)
        engine.resume()
        for request in requests:
            with pytest.raises(ServerError, match=r"SystemExit\('killed'\)"):
                request.result(10)
        with pytest.raises(ServerError, match="Make a new one"):
            greedy_ids(engine)
        engine.pause()  # must not wait for a token that never comes


def test_weights_with_nan_are_an_error_until_better_ones_come(folder: str, weights: Weights):
    with HFEngine(folder) as engine:
        push(engine, {name: tensor * torch.nan for name, tensor in weights.items()}, 0)
        with pytest.raises(TrajectoryError, match="weights may hold nan"):
            greedy_ids(engine)
        push(engine, weights, 1)
        assert greedy_ids(engine)


# --- New weights ----------------------------------------------------------------------------------


def test_before_the_first_push_tokens_are_of_version_minus_one(folder: str):
    with HFEngine(folder) as engine:
        [response] = generate(engine, make_prompts(1), SamplingParams(max_new_tokens=4))
    assert set(response.versions) == {-1}


def test_a_push_that_does_not_fit_is_refused_and_changes_nothing(folder: str, weights: Weights):
    name = "model.layers.1.mlp.down_proj.weight"
    moved = perturbed(weights, seed=1)
    wrong = {
        r"have model.nowhere of shape \[3\], but .* no such tensor": moved
        | {"model.nowhere": torch.zeros(3)},
        rf"have {name} of shape \[3\], but .* \[128, 256\] there": moved | {name: torch.zeros(3)},
        rf"lack 1 of 27 tensors, such as {name}": {n: t for n, t in moved.items() if n != name},
    }
    with HFEngine(folder) as engine:
        push(engine, weights, 0)
        before = greedy_ids(engine)
        for message, tensors in wrong.items():
            with pytest.raises(ServerError, match=message):
                push(engine, tensors, 1)
            assert (engine.version, greedy_ids(engine)) == (0, before)


def test_a_tied_head_may_come_along(folder: str, weights: Weights):
    moved = perturbed(weights, seed=1)
    results: list[list[int]] = []
    for extra in ({}, {"lm_head.weight": moved["model.embed_tokens.weight"]}):
        with HFEngine(folder) as engine:
            push(engine, moved | extra, 0)
            results.append(greedy_ids(engine))
    assert results[0] == results[1]


def continued_with_reused_cache(
    folder: str, before: Weights, after: Weights, prompt: list[int], response: ModelResponse
) -> torch.Tensor:
    """Log-probs of the tokens of version 1, after a cache that version 0 has made."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    switch = response.versions.index(1)
    tokens = prompt + response.token_ids
    start = len(prompt) + switch - 1  # this token goes in with the new weights, those before not
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.load_state_dict({n: t.float() for n, t in before.items()}, strict=False)
        model(torch.tensor([tokens[:start]]), past_key_values=cache)
        model.load_state_dict({n: t.float() for n, t in after.items()}, strict=False)
        logits = model(torch.tensor([tokens[start:-1]]), past_key_values=cache).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[start + 1 :])[:, None])[:, 0]


@pytest.mark.parametrize("kv", ["recompute", "reuse"])
def test_the_cache_of_running_sequences_is_made_anew_or_kept(
    folder: str, weights: Weights, kv: Literal["recompute", "reuse"]
):
    pushed = {version: perturbed(weights, seed=version) for version in (0, 1)}
    prompts = make_prompts(3)
    with HFEngine(folder, kv=kv) as engine:
        push(engine, pushed[0], 0)
        engine.pause()
        running = start(engine, prompts, max_new_tokens=200)
        wait_until(lambda: engine.room == 64 - len(prompts))
        engine.resume()  # all of them in one batch: batches that are joined lose their caches
        wait_until_sampling(engine)
        push(engine, pushed[1], 1)
        responses = [request.result(60) for request in running]
    mixed = [(p, r) for p, r in zip(prompts, responses, strict=True) if len(set(r.versions)) == 2]
    assert mixed
    for prompt, response in mixed:
        expected = continued_with_reused_cache(folder, pushed[0], pushed[1], prompt, response)
        measured = torch.tensor(response.behavior_logprobs)[torch.tensor(response.versions) == 1]
        is_reused = float((measured - expected).abs().mean()) <= EXACT
        assert is_reused == (kv == "reuse")
    if kv == "recompute":
        assert gap(Reference(folder), pushed, prompts, responses, 1.0) <= EXACT


# --- What it is made with -------------------------------------------------------------------------


def test_several_ranks_are_refused(folder: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="this run has 2 ranks"):
        HFEngine(folder)


@pytest.mark.parametrize("setting", [{"kv": "drop"}, {"max_running": 0}])
def test_a_setting_that_cannot_work_is_named(folder: str, setting: dict):
    [(name, value)] = setting.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        HFEngine(folder, **setting)


@pytest.mark.parametrize(
    ("file", "key", "message"),
    [
        ("generation_config.json", "eos_token_id", "has no end token"),
        ("config.json", "model_type", "could not be loaded as a causal language model"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused(
    tmp_path: Path, file: str, key: str, message: str
):
    folder = Path(make_tiny_model(tmp_path))
    for path in {folder / file, folder / "config.json"}:
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    with pytest.raises(DataError, match=message):
        HFEngine(str(folder))


def test_a_model_with_other_names_than_its_checkpoint_is_refused(tmp_path: Path):
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Qwen3MoeForCausalLM keeps some weights under other"):
        HFEngine(str(tmp_path))
