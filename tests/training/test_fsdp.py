import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from arealite import dist
from arealite.errors import (
    CheckpointError,
    ConfigError,
    LossError,
    OutOfMemoryError,
    TrajectoryError,
)
from arealite.testing import make_tiny_model
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import pack
from arealite.types import LossOutput, MicroBatch
from tests.training.helpers import (
    CFG,
    VOCABULARY,
    make_groups,
    minibatch_of,
    plain_logprobs,
    plain_model,
    ppo_loss,
    relative_difference,
    sequences,
    step_gradient,
    train_step,
)


def weights_of(engine: FSDPEngine) -> dict[str, torch.Tensor]:
    return dict(engine.named_weights())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def engine(model_path: str) -> Iterator[FSDPEngine]:
    with FSDPEngine(model_path, CFG) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(model_path: str) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and loss of the minibatch, by transformers and the formulas, without packing."""
    model = plain_model(model_path)
    [mb] = minibatch_of()
    found = [
        plain_logprobs(model, list(ids), temperature.tolist())
        for ids, temperature in sequences(mb, mb.temperature)
    ]
    logprobs = torch.cat(found)
    # theta = proximal, so the ratio is 1 in value; the weight has no gradient.
    ratio = (logprobs - logprobs.detach()).exp()
    weight = (logprobs.detach() - mb.behavior_logprobs).exp()
    weight = torch.where(weight > 5, 0.0, weight)
    per_token = (-weight * ratio * mb.advantages)[mb.loss_mask]
    loss = per_token.sum() / mb.loss_mask.sum()
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradient, loss.item()


# ---- what it computes


@pytest.mark.parametrize(("family", "is_tied"), [("qwen2", True), ("qwen3", False)])
def test_log_probs_are_those_of_plain_transformers_at_each_tokens_temperature(
    family: Any, is_tied: bool, tmp_path: Path
):
    path = make_tiny_model(tmp_path, family=family, is_tied=is_tied, dtype=torch.float32)
    minibatch = minibatch_of(max_tokens=64)
    assert len(minibatch) > 2
    model = plain_model(path)
    with torch.no_grad():
        for mb, found in zip(minibatch, FSDPEngine(path, CFG).logprobs(minibatch), strict=True):
            temperatures = sequences(mb, mb.temperature)
            for (ids, temperature), (_, values) in zip(
                temperatures, sequences(mb, found), strict=True
            ):
                expected = plain_logprobs(model, list(ids), temperature.tolist())
                torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_step_gives_the_optimizer_the_gradient_of_the_textbook_loss(
    engine: FSDPEngine, reference: tuple[dict[str, torch.Tensor], float]
):
    gradient, stats = step_gradient(engine, minibatch_of())
    expected, loss = reference
    assert relative_difference(gradient, expected) < 1e-5
    assert stats.loss == pytest.approx(loss, rel=1e-5)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)


def test_gradient_and_loss_do_not_depend_on_the_split_the_order_or_empty_micro_batches(
    engine: FSDPEngine, reference: tuple[dict[str, torch.Tensor], float]
):
    fine = minibatch_of(max_tokens=45)
    [empty] = [mb for mb in _with_empty(fine) if mb.num_sequences == 0]
    gradient, stats = step_gradient(engine, [empty, *fine[::-1], empty])
    assert relative_difference(gradient, reference[0]) < 2e-6
    assert stats.loss == pytest.approx(reference[1], rel=1e-5)
    assert stats.num_sequences == 12


def _with_empty(minibatch: list[MicroBatch]) -> list[MicroBatch]:
    """Plus the empty micro-batch that a second rank without work would get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "rank", lambda: 1)
        patch.setattr(dist, "world_size", lambda: 2)
        patch.setattr(dist, "gather", lambda item: [item])
        [more] = pack(
            [make_groups(1, 1)[0]],
            [[1.0]],
            num_minibatches=1,
            max_tokens=100,
            aggregation="token",
        )
    return [*minibatch, *more]


@pytest.mark.parametrize("max_tokens", [10_000, 64])
def test_a_loss_of_logits_gives_the_gradient_of_the_same_loss_of_log_probs(
    engine: FSDPEngine, model_path: str, max_tokens: int
):
    def of_logits(logits: torch.Tensor, mb: MicroBatch) -> LossOutput:
        assert logits.shape == (len(mb.token_ids), VOCABULARY)
        logprobs = logits.log_softmax(-1).gather(1, mb.token_ids[:, None])[:, 0]
        return ppo_loss(logprobs, mb)

    expected, stats = step_gradient(engine, minibatch_of(max_tokens=max_tokens))
    with FSDPEngine(model_path, CFG) as again:
        found, found_stats = step_gradient(
            again, minibatch_of(max_tokens=max_tokens), of_logits, head="logits"
        )
    assert relative_difference(found, expected) < 2e-6
    assert found_stats.loss == pytest.approx(stats.loss, rel=1e-5)
    assert found_stats.metrics["entropy"] == pytest.approx(stats.metrics["entropy"], rel=1e-5)


def test_ratio_is_exactly_one_before_the_first_update(engine: FSDPEngine):
    minibatch = minibatch_of(max_tokens=64)
    differences = []

    def compare(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
        differences.append((logprobs - mb.proximal_logprobs).abs().max().item())
        return ppo_loss(logprobs, mb)

    train_step(engine, minibatch, compare)
    assert differences == [0.0] * len(minibatch)


def test_stats_count_tokens_and_average_metrics_over_them(engine: FSDPEngine):
    minibatch = minibatch_of(max_tokens=64)
    stats = train_step(engine, minibatch)
    assert stats.num_tokens == sum(int(mb.loss_mask.sum()) for mb in minibatch)
    assert stats.metrics["tokens"] == 1.0  # ppo_loss reports the count itself
    assert stats.metrics["clipped"] == 0.0
    # Of an untrained model over 320 tokens, partly at temperature 0.6.
    assert 5.0 < stats.metrics["entropy"] < math.log(320)
    assert (stats.lr, stats.skipped) == (1e-2, False)


def test_training_on_the_same_batch_raises_the_log_probs_of_rewarded_tokens(engine: FSDPEngine):
    [mb] = minibatch_of()
    good = mb.advantages > 0
    before = engine.logprobs([mb])[0][good].mean()
    for _ in range(3):
        train_step(engine, [mb])
    assert engine.logprobs([mb])[0][good].mean() > before + 0.01


def test_learning_rate_zero_changes_no_weight(model_path: str):
    engine = FSDPEngine(model_path, FSDPConfig(lr=0.0, weight_decay=0.1))
    before = weights_of(engine)
    assert train_step(engine, minibatch_of()).grad_norm > 0
    assert same(weights_of(engine), before)


def test_a_gradient_above_the_limit_is_scaled_down_to_it(model_path: str):
    free, stats = step_gradient(FSDPEngine(model_path, CFG), minibatch_of())
    limit = stats.grad_norm / 10
    engine = FSDPEngine(model_path, FSDPConfig(lr=1e-2, max_grad_norm=limit))
    clipped, clipped_stats = step_gradient(engine, minibatch_of())
    assert clipped_stats.grad_norm == pytest.approx(stats.grad_norm)  # before clipping
    scaled = {name: gradient / 10 for name, gradient in free.items()}
    assert relative_difference(clipped, scaled) < 1e-6


@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": True}, {"reshard_after_forward": False}]
)
def test_memory_options_do_not_change_the_gradient(
    options: dict[str, bool], model_path: str, reference: tuple[dict[str, torch.Tensor], float]
):
    cfg = FSDPConfig(max_grad_norm=1e9, **options)  # type: ignore[arg-type]
    gradient, _ = step_gradient(FSDPEngine(model_path, cfg), minibatch_of(max_tokens=64))
    assert relative_difference(gradient, reference[0]) < 2e-6


def test_activation_checkpointing_runs_each_block_once_more(model_path: str):
    engine = FSDPEngine(model_path, FSDPConfig(activation_checkpointing=True))
    forwards: list[torch.nn.Module] = []
    for block in engine._policy.model.base_model.layers:
        # Before, not after: recomputation ends as soon as it has what the backward needs.
        block.register_forward_pre_hook(lambda module, _: forwards.append(module))
    train_step(engine, minibatch_of())
    # Two blocks: in logprobs(), in step(), and again in its backward.
    assert len(forwards) == 3 * 2 * len(minibatch_of())


def test_activation_checkpointing_keeps_less_for_the_backward_pass(model_path: str):
    def kept(is_checkpointed: bool) -> int:
        """Bytes that autograd keeps of one forward pass."""
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        cfg = FSDPConfig(activation_checkpointing=is_checkpointed)
        with (
            FSDPEngine(model_path, cfg) as engine,
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            engine._policy(minibatch_of()[0])
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_resharding_frees_the_blocks_between_forward_and_backward(
    model_path: str, reshard_after_forward: bool
):
    cfg = FSDPConfig(reshard_after_forward=reshard_after_forward)
    with FSDPEngine(model_path, cfg) as engine:
        of_blocks = [name for name, _ in engine._policy.named_parameters() if ".layers." in name]

        def look(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
            now = dict(engine._policy.named_parameters())
            are_sharded.append({isinstance(now[name], DTensor) for name in of_blocks})
            return ppo_loss(logprobs, mb)

        are_sharded: list[set[bool]] = []
        train_step(engine, minibatch_of(), look)
    assert are_sharded == [{reshard_after_forward}] * len(minibatch_of())


def test_gradients_are_summed_over_ranks_once_after_the_last_micro_batch(
    engine: FSDPEngine,
):
    num_gradients: list[int] = []

    def look(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
        # What has been summed lies in `grad` of the sharded weights; what has not does not.
        found = [p.grad for p in engine._root.parameters() if isinstance(p, DTensor)]
        num_gradients.append(sum(gradient is not None for gradient in found))
        return ppo_loss(logprobs, mb)

    minibatch = minibatch_of(max_tokens=64)
    assert len(minibatch) > 2
    step_gradient(engine, minibatch, look)
    assert num_gradients == [0] * len(minibatch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizer_keeps_its_state_in_float32_and_updates_in_one_pass(
    model_path: str, dtype: Any
):
    with FSDPEngine(model_path, FSDPConfig(dtype=dtype)) as engine:
        train_step(engine, minibatch_of())
        states = engine._optimizer.state.values()
        assert {v.dtype for state in states for v in state.values()} == {torch.float32}
        assert all(group["fused"] for group in engine._optimizer.param_groups)


def test_bfloat16_computes_roughly_the_same_and_keeps_weights_in_float32(model_path: str):
    def smooth(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
        # No cap and no clip: a token that rounding moves over one changes the gradient a lot.
        return LossOutput(total=-(mb.loss_weight * mb.advantages * logprobs).sum())

    expected, exact = step_gradient(FSDPEngine(model_path, CFG), minibatch_of(), smooth)
    engine = FSDPEngine(model_path, FSDPConfig(lr=1e-6, dtype="bfloat16", max_grad_norm=1e9))
    before = weights_of(engine)
    gradient, stats = step_gradient(engine, minibatch_of(max_tokens=64), smooth)
    assert 1e-4 < relative_difference(gradient, expected) < 0.02
    assert stats.loss == pytest.approx(exact.loss, abs=0.01)
    # A step of 1e-6 would vanish in weights of bfloat16.
    moved = [not torch.equal(value, before[name]) for name, value in engine.named_weights()]
    assert all(moved)


# ---- steps that must not be taken


def test_a_gradient_that_is_not_finite_skips_the_step_and_nothing_but_the_schedule_moves(
    model_path: str,
):
    cfg = FSDPConfig(lr=1e-2, warmup_steps=4)
    engine, untouched = FSDPEngine(model_path, cfg), FSDPEngine(model_path, cfg)
    minibatch = minibatch_of()

    def broken(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
        return LossOutput(total=logprobs.sum() * math.nan)

    train_step(engine, minibatch)
    before = weights_of(engine)
    skipped = train_step(engine, minibatch, broken)
    assert skipped.skipped
    assert math.isnan(skipped.grad_norm)
    assert same(weights_of(engine), before)

    # The same two good steps, with the skipped one's place in the schedule left out.
    train_step(untouched, minibatch)
    untouched._num_calls += 1
    good, expected = train_step(engine, minibatch), train_step(untouched, minibatch)
    assert good == expected
    assert good.lr == pytest.approx(0.75e-2)
    assert same(weights_of(engine), weights_of(untouched))


@pytest.mark.parametrize("has_gradient", [False, True], ids=["constant", "of something else"])
def test_a_loss_that_does_not_use_its_log_probs_is_refused(engine: FSDPEngine, has_gradient: bool):
    total = torch.zeros((), requires_grad=has_gradient)
    with pytest.raises(ConfigError, match="does not depend on what it was given"):
        engine.step(minibatch_of(), lambda logprobs, mb: LossOutput(total=total * 2))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda logprobs, mb: logprobs.sum(), "returned a Tensor. Return LossOutput"),
        (lambda logprobs, mb: LossOutput(total=logprobs), "total of LossOutput is no tensor of on"),
        (
            lambda logprobs, mb: LossOutput(total=logprobs.sum(), metrics={"gap": logprobs}),
            "gap of LossOutput is no tensor of one number. Add up the tokens",
        ),
    ],
)
def test_what_a_loss_may_not_return_is_said(engine: FSDPEngine, loss_fn: Any, message: str):
    with pytest.raises(LossError, match=message):
        engine.step(minibatch_of(), loss_fn)


def test_another_head_than_there_is_is_refused(engine: FSDPEngine):
    with pytest.raises(ConfigError, match=r"head='logit'; it is one of \('logprobs', 'logits', "):
        engine.step(minibatch_of(), ppo_loss, head="logit")  # type: ignore[arg-type]


def test_a_token_that_the_model_has_not_is_named(engine: FSDPEngine):
    minibatch = minibatch_of()
    minibatch[0].token_ids[3] = 123_456
    with pytest.raises(TrajectoryError, match="Token 123456 is not among the 320 of the model"):
        engine.step(minibatch, ppo_loss)


def test_what_is_no_minibatch_is_refused(engine: FSDPEngine):
    for wrong in (minibatch_of()[0], [minibatch_of()]):
        with pytest.raises(ConfigError, match="Pass a list of micro-batches"):
            engine.logprobs(wrong)  # type: ignore[arg-type]


def test_ranks_with_different_numbers_of_micro_batches_are_told_so(two_ranks: Any):
    for answer in two_ranks("uneven"):
        assert "The ranks got [2, 1] micro-batches, where all need equally many" in answer


def test_a_step_without_micro_batches_is_refused(engine: FSDPEngine):
    with pytest.raises(ConfigError, match=r"ranks got \[0\] micro-batches, where all need"):
        engine.step([], ppo_loss)


def test_folders_may_be_given_as_text(engine: FSDPEngine, tmp_path: Path):
    engine.save(str(tmp_path / "state"))
    engine.load(str(tmp_path / "state"))
    engine.save_pretrained(str(tmp_path / "model"))
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"train.lr=-1.0 must be 0 or more"),
        ({"lr": math.nan}, "train.lr"),
        ({"warmup_steps": -1}, "train.warmup_steps"),
        ({"max_grad_norm": 0.0}, "train.max_grad_norm"),
        ({"betas": (0.9, 1.0)}, "train.betas"),
        ({"micro_batch_tokens": 0}, "train.micro_batch_tokens"),
        ({"schedule": "falling"}, r"train.schedule='falling' is none of"),
        ({"dtype": "float16"}, "train.dtype"),
        ({"schedule": "cosine"}, "train.total_steps=None"),
        ({"schedule": "linear", "total_steps": 5, "warmup_steps": 5}, "must exceed"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        FSDPConfig(**options)


@pytest.mark.parametrize(("cpu_threads", "expected"), [(3, 3), (0, 1)])
def test_a_rank_uses_the_chosen_threads_or_leaves_half_of_the_cores_to_the_servers(
    cpu_threads: int, expected: int, model_path: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    try:
        FSDPEngine(model_path, FSDPConfig(cpu_threads=cpu_threads))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(1)


# ---- what it writes


def test_weights_have_the_names_shapes_and_dtype_of_the_checkpoint(tmp_path: Path):
    path = make_tiny_model(tmp_path, is_tied=True, dtype=torch.bfloat16)
    published = AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
    del published["lm_head.weight"]  # tied: not in the checkpoint
    assert same(weights_of(FSDPEngine(path, CFG)), published)


def test_weights_of_a_mixture_of_experts_come_under_their_published_names(tmp_path: Path):
    from safetensors.torch import load_file

    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in published
    assert same(weights_of(FSDPEngine(str(tmp_path), CFG)), published)


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_weights_are_not_rounded_by_a_computation_in_bfloat16(
    reshard_after_forward: bool, model_path: str
):
    cfg = FSDPConfig(dtype="bfloat16", reshard_after_forward=reshard_after_forward)
    engine = FSDPEngine(model_path, cfg)
    engine.logprobs(minibatch_of())
    published = plain_model(model_path).state_dict()
    del published["lm_head.weight"]
    assert same(weights_of(engine), published)


def test_weights_handed_out_do_not_change_with_the_next_step(engine: FSDPEngine):
    handed_out = weights_of(engine)
    copies = {name: value.clone() for name, value in handed_out.items()}
    train_step(engine, minibatch_of())
    assert same(handed_out, copies)
    assert not same(weights_of(engine), copies)


def test_a_run_continued_from_a_checkpoint_takes_the_same_next_steps(
    model_path: str, tmp_path: Path
):
    cfg = FSDPConfig(lr=1e-2, warmup_steps=5, weight_decay=0.1)
    minibatch = minibatch_of()
    engine = FSDPEngine(model_path, cfg)
    train_step(engine, minibatch)
    engine.save(tmp_path / "checkpoint")
    stats = [train_step(engine, minibatch) for _ in range(2)]

    resumed = FSDPEngine(model_path, cfg)
    resumed.logprobs(minibatch)  # weights gathered before load must not be used after it
    resumed.load(tmp_path / "checkpoint")
    assert [train_step(resumed, minibatch) for _ in range(2)] == stats
    assert same(weights_of(resumed), weights_of(engine))


def test_a_checkpoint_from_before_the_first_step_can_be_continued(model_path: str, tmp_path: Path):
    engine = FSDPEngine(model_path, CFG)
    engine.save(tmp_path / "checkpoint")
    stats = train_step(engine, minibatch_of())
    resumed = FSDPEngine(model_path, CFG)
    train_step(resumed, minibatch_of(num_groups=2))
    resumed.load(tmp_path / "checkpoint")
    assert train_step(resumed, minibatch_of()) == stats


def test_a_missing_or_damaged_checkpoint_is_named(engine: FSDPEngine, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere"):
        engine.load(tmp_path / "nowhere")
    before = weights_of(engine)
    for name in ("intact", "damaged"):
        engine.save(tmp_path / name)
    train_step(engine, minibatch_of())
    [part] = (tmp_path / "damaged").glob("*.distcp")
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"damaged could not be read"):
        engine.load(tmp_path / "damaged")
    engine.load(tmp_path / "intact")
    assert same(weights_of(engine), before)


def test_a_checkpoint_of_another_model_is_refused(engine: FSDPEngine, tmp_path: Path):
    engine.save(tmp_path / "checkpoint")
    other = make_tiny_model(tmp_path / "other", family="qwen3", is_tied=False)
    with pytest.raises(CheckpointError, match="could not be read"):
        FSDPEngine(other, CFG).load(tmp_path / "checkpoint")


def test_a_continued_run_uses_its_own_settings_and_not_those_of_the_checkpoint(
    engine: FSDPEngine, model_path: str, tmp_path: Path
):
    train_step(engine, minibatch_of())
    engine.save(tmp_path / "checkpoint")
    cfg = FSDPConfig(lr=1e-3, betas=(0.0, 0.0), eps=1e3, max_grad_norm=1e9)
    resumed = FSDPEngine(model_path, cfg)
    resumed.load(tmp_path / "checkpoint")
    before = weights_of(resumed)
    gradient, stats = step_gradient(resumed, minibatch_of())
    assert stats.lr == 1e-3
    # Without memory and with this eps, AdamW is gradient descent with lr / eps.
    change = max((value - before[name]).abs().max() for name, value in resumed.named_weights())
    largest = max(value.abs().max() for value in gradient.values())
    assert change <= 1.01e-6 * largest + 1e-8


def test_an_exported_folder_loads_in_plain_transformers_with_the_trained_weights(
    engine: FSDPEngine, model_path: str, tmp_path: Path
):
    train_step(engine, minibatch_of())
    engine.save_pretrained(tmp_path / "exported")
    [mb] = minibatch_of(num_groups=1)
    found = engine.logprobs([mb])[0]
    model = plain_model(tmp_path / "exported")
    with torch.no_grad():
        for (ids, temperature), (_, values) in zip(
            sequences(mb, mb.temperature), sequences(mb, found), strict=True
        ):
            expected = plain_logprobs(model, list(ids), temperature.tolist())
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.get_vocab() == AutoTokenizer.from_pretrained(model_path).get_vocab()
    assert exported.chat_template


def test_an_exported_folder_can_be_trained_again_from_the_same_weights(
    engine: FSDPEngine, tmp_path: Path
):
    train_step(engine, minibatch_of())
    engine.save_pretrained(tmp_path / "exported")
    again = FSDPEngine(str(tmp_path / "exported"), CFG)
    assert same(weights_of(again), weights_of(engine))
    with again:
        pass
    again.close()


# ---- two ranks


def test_two_ranks_compute_the_log_probs_of_one(two_ranks: Any, engine: FSDPEngine):
    [mb] = minibatch_of()
    expected = dict(sequences(mb, engine.logprobs([mb])[0]))
    parts = two_ranks("logprobs")
    assert len(set(two_ranks("num_micro_batches"))) == 1
    assert min(len(part) for part in parts) > 0
    found = parts[0] | parts[1]
    assert found.keys() == expected.keys()
    for ids, values in expected.items():
        torch.testing.assert_close(found[ids], values, rtol=1e-5, atol=1e-5)


def test_two_ranks_compute_the_gradient_and_stats_of_one(
    two_ranks: Any, engine: FSDPEngine, reference: tuple[dict[str, torch.Tensor], float]
):
    _, alone = step_gradient(engine, minibatch_of())
    stats = two_ranks("stats")
    assert relative_difference(two_ranks("gradient"), reference[0]) < 2e-6
    assert stats.loss == pytest.approx(alone.loss, rel=1e-5)
    assert stats.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)
    assert (stats.num_tokens, stats.num_sequences) == (alone.num_tokens, alone.num_sequences)
    assert stats.metrics == pytest.approx(alone.metrics, rel=1e-5)


def test_a_rank_with_nothing_to_do_does_not_change_the_gradient(two_ranks: Any, engine: FSDPEngine):
    [minibatch] = pack(
        [make_groups(1, 1)[0]], [[1.0]], num_minibatches=1, max_tokens=64, aggregation="token"
    )
    gradient, stats = step_gradient(engine, minibatch)
    assert relative_difference(two_ranks("lonely_gradient"), gradient) < 2e-6
    assert two_ranks("lonely_stats").metrics == pytest.approx(stats.metrics, rel=1e-5)


def test_a_checkpoint_of_two_ranks_continues_on_one(two_ranks: Any, engine: FSDPEngine):
    engine.load(two_ranks("out") / "checkpoint")
    stats = train_step(engine, minibatch_of())
    assert stats.loss == pytest.approx(two_ranks("after_next_step_stats").loss, rel=1e-4)
    assert relative_difference(weights_of(engine), two_ranks("weights")) < 1e-5


def test_a_checkpoint_of_one_rank_continues_on_two(two_ranks: Any, engine: FSDPEngine):
    engine.load(two_ranks("out") / "one_rank_checkpoint")
    stats = train_step(engine, minibatch_of())
    assert stats.loss == pytest.approx(two_ranks("resumed_stats").loss, rel=1e-4)
    assert relative_difference(weights_of(engine), two_ranks("resumed_weights")) < 1e-5


def test_two_ranks_export_the_folder_of_one(two_ranks: Any):
    exported = AutoModelForCausalLM.from_pretrained(two_ranks("out") / "exported").state_dict()
    weights = two_ranks("weights")
    assert same({name: exported[name] for name in weights}, weights)


def test_memory_that_runs_out_says_which_settings_free_some(model_path: str):
    def greedy(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with FSDPEngine(model_path, CFG) as engine:
        with pytest.raises(OutOfMemoryError, match=r"lower train.micro_batch_tokens=8192; ") as out:
            engine.step(minibatch_of(), greedy)
        assert "Tried to allocate 2.00 GiB" in str(out.value.__cause__)
        assert not train_step(engine, minibatch_of()).skipped  # and nothing is lost
