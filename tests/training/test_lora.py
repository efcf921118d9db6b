"""LoRA: what is trained, what is pushed, and what the reference is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from arealite.errors import ConfigError
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from tests.training.helpers import (
    CFG,
    minibatch_of,
    relative_difference,
    step_gradient,
    train_step,
)

LORA = replace(CFG, lora_rank=4, lora_alpha=8, lr=1e-2)


def trained(engine: FSDPEngine, steps: int = 3) -> FSDPEngine:
    for _ in range(steps):
        train_step(engine, minibatch_of())
    return engine


def logprobs(engine: FSDPEngine) -> torch.Tensor:
    return torch.cat(engine.logprobs(minibatch_of()))


def test_before_the_first_step_the_model_is_the_one_without_adapters(model_path: str):
    with FSDPEngine(model_path, LORA) as engine, FSDPEngine(model_path, CFG) as plain:
        assert torch.equal(logprobs(engine), logprobs(plain))
        pushed, weights = dict(engine.named_weights()), dict(plain.named_weights())
    assert list(pushed) == list(weights)
    assert all(torch.equal(pushed[name], weights[name]) for name in weights)


def test_only_adapters_train_and_the_optimizer_holds_nothing_else(model_path: str):
    with FSDPEngine(model_path, LORA) as engine:
        parameters = dict(engine._policy.named_parameters())
        before = {name: weight.detach().clone() for name, weight in parameters.items()}
        trained(engine)
        changed = {name for name in before if not torch.equal(parameters[name], before[name])}
        num_states = len(engine._optimizer.state)
    assert changed == {name for name in before if "lora_" in name}
    assert num_states == len(changed)


def test_the_merged_weights_give_the_log_probs_of_the_adapters(model_path: str, tmp_path: Path):
    with FSDPEngine(model_path, LORA) as engine:
        before = logprobs(engine)
        found = logprobs(trained(engine))
        engine.save_pretrained(tmp_path / "merged")
    assert (found - before).abs().max() > 0.01
    with FSDPEngine(str(tmp_path / "merged"), CFG) as merged:
        torch.testing.assert_close(logprobs(merged), found, atol=2e-5, rtol=0)


def test_the_reference_stays_the_base(model_path: str):
    with FSDPEngine(model_path, LORA) as engine:
        before = logprobs(engine)
        after = logprobs(trained(engine))
        assert torch.equal(torch.cat(engine.reference_logprobs(minibatch_of())), before)
        assert torch.equal(logprobs(engine), after)


def test_a_reference_without_adapters_is_refused(model_path: str):
    with (
        FSDPEngine(model_path, CFG) as engine,
        pytest.raises(ConfigError, match=r"Set train\.lora_rank"),
    ):
        engine.reference_logprobs(minibatch_of())


def test_a_checkpoint_holds_the_adapters_alone_and_continues_with_the_same_steps(
    model_path: str, tmp_path: Path
):
    with FSDPEngine(model_path, LORA) as engine:
        trained(engine).save(tmp_path)
        expected = logprobs(trained(engine))
    with FSDPEngine(model_path, LORA) as continued:
        continued.load(tmp_path)
        assert torch.equal(logprobs(trained(continued)), expected)
    num_bytes = sum(file.stat().st_size for file in tmp_path.rglob("*.distcp"))
    weights = sum(file.stat().st_size for file in Path(model_path).glob("*.safetensors"))
    assert num_bytes < weights


def test_frozen_weights_stay_in_the_precision_of_the_files_where_half_is_computed_in(
    model_path: str,
):
    with FSDPEngine(model_path, replace(LORA, dtype="bfloat16")) as engine:
        dtypes = {"lora_" in name: p.dtype for name, p in engine._policy.named_parameters()}
        assert torch.isfinite(logprobs(trained(engine))).all()
    config: Any = AutoModelForCausalLM.from_pretrained(model_path).config
    assert dtypes == {True: torch.float32, False: config.dtype}


def test_two_ranks_train_the_adapters_of_one(two_ranks: Any, model_path: str):
    with FSDPEngine(model_path, replace(CFG, lora_rank=4)) as engine:
        gradient, stats = step_gradient(engine, minibatch_of())
    assert gradient.keys() == two_ranks("lora_gradient").keys()
    assert relative_difference(two_ranks("lora_gradient"), gradient) < 2e-6
    assert two_ranks("lora_stats").grad_norm == pytest.approx(stats.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            ("q_proj", "v_porj"),
            r": the model has no v_porj\. Its linear layers are q_proj,",
        ),
        (("lm_head",), "=.*the embedding or the head"),
        (("q_proj", "input_layernorm"), "=.*Qwen2RMSNorm"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(
    model_path: str, layers: tuple[str, ...], message: str
):
    with pytest.raises(ConfigError, match=rf"train\.lora_layers{message}"):
        FSDPEngine(model_path, replace(LORA, lora_layers=layers))


@pytest.mark.parametrize("options", [{"lora_rank": -1}, {"lora_alpha": 0}])
def test_settings_of_lora_are_checked(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        FSDPConfig(**options)
