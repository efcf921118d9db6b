"""Trajectories, a loss and slow references that the tests of this folder share."""

import random
from itertools import pairwise
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from arealite import dist
from arealite.algo.advantages import group_advantages
from arealite.algo.losses import clipped_surrogate, importance_weight
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.types import Head, LossFn, LossOutput, MicroBatch, StepStats, Trajectory

VOCABULARY = 320  # of make_tiny_model

# An lr large enough to see, a gradient that is never clipped.
CFG = FSDPConfig(lr=1e-2, max_grad_norm=1e9)

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.05,
}
"""Of a tiny model of any family that has these settings."""


def save_random_model(config: PreTrainedConfig, folder: Path) -> str:
    """The folder, with random weights for the config in it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def make_trajectory(
    prompt_length: int,
    response_length: int,
    *,
    seed: int = 0,
    row_index: int = -1,
    temperature: float = 1.0,
    reward: float = 0.0,
) -> Trajectory:
    """Random tokens whose behavior log-probs are about those of an untrained model."""
    rng = random.Random(seed)
    length = prompt_length + response_length
    mask = [False] * prompt_length + [True] * response_length
    return Trajectory(
        token_ids=[rng.randrange(VOCABULARY) for _ in range(length)],
        loss_mask=mask,
        behavior_logprobs=[rng.uniform(-7, -5) if is_sampled else 0.0 for is_sampled in mask],
        versions=[0 if is_sampled else -1 for is_sampled in mask],
        reward=reward,
        temperature=temperature,
        finish_reason="stop",
        row_index=row_index,
    )


def make_groups(num_groups: int = 4, group_size: int = 3) -> list[list[Trajectory]]:
    """Ragged lengths from 4 to 40 tokens, two temperatures, both kinds of reward."""
    rng = random.Random(7)
    return [
        [
            make_trajectory(
                rng.randint(1, 10),
                rng.randint(3, 30),
                seed=100 * row + sample,
                row_index=row,
                temperature=(1.0, 0.6)[row % 2],
                reward=float(sample % 2),
            )
            for sample in range(group_size)
        ]
        for row in range(num_groups)
    ]


def minibatch_of(num_groups: int = 4, max_tokens: int = 10_000) -> list[MicroBatch]:
    """This rank's micro-batches of these groups, which all ranks share."""
    groups = dist.shard(make_groups(num_groups))
    [minibatch] = pack(
        groups,
        group_advantages(groups),
        num_minibatches=1,
        max_tokens=max_tokens,
        aggregation="token",
    )
    return minibatch


def ppo_loss(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
    """The decoupled loss as recipes write it."""
    surrogate, clipped = clipped_surrogate(
        logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask, 0.2, 0.28
    )
    weight, dropped = importance_weight(
        mb.proximal_logprobs, mb.behavior_logprobs, mb.loss_mask, cap=5.0
    )
    return LossOutput(
        total=-(mb.loss_weight * weight * surrogate).sum(),
        metrics={"clipped": clipped.sum(), "dropped": dropped.sum(), "tokens": mb.loss_mask.sum()},
    )


def train_step(
    engine: FSDPEngine,
    minibatch: list[MicroBatch],
    loss_fn: LossFn = ppo_loss,
    *,
    head: Head = "logprobs",
) -> StepStats:
    """One step as recipes take it, with the engine's own log-probs as proximal ones."""
    attached = attach(minibatch, proximal_logprobs=engine.logprobs(minibatch))
    return engine.step(attached, loss_fn, head=head)


def step_gradient(
    engine: FSDPEngine,
    minibatch: list[MicroBatch],
    loss_fn: LossFn = ppo_loss,
    *,
    head: Head = "logprobs",
) -> tuple[dict[str, torch.Tensor], StepStats]:
    """The full gradient that one step gives to the optimizer, by parameter name."""
    gradient: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        for name, parameter in engine._policy.model.named_parameters():
            if parameter.requires_grad:
                assert isinstance(parameter.grad, DTensor)
                gradient[name] = parameter.grad.full_tensor().clone()

    hook = engine._optimizer.register_step_pre_hook(keep)
    stats = train_step(engine, minibatch, loss_fn, head=head)
    hook.remove()
    return gradient, stats


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all tensors together, in float64."""
    assert found.keys() == expected.keys()
    difference = sum(
        (found[name].double() - expected[name].double()).square().sum() for name in expected
    )
    total = sum(value.double().square().sum() for value in expected.values())
    return float((difference / total) ** 0.5)


def plain_model(path: str | Path) -> PreTrainedModel:
    """The same model as transformers runs it: textbook attention, one sequence at a time."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def plain_logprobs(
    model: PreTrainedModel, token_ids: list[int], temperature: list[float]
) -> torch.Tensor:
    """Log-prob [L] of each token, 0 for the first; temperature[t] divides the logits of token t."""
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    scaled = logits[:-1] / torch.tensor(temperature)[1:, None]
    found = scaled.log_softmax(-1).gather(1, torch.tensor(token_ids)[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), found])


def sequences(mb: MicroBatch, values: torch.Tensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """(token ids, values) of each packed sequence."""
    bounds = mb.cu_seqlens.tolist()
    return [
        (tuple(mb.token_ids[start:end].tolist()), values[start:end])
        for start, end in pairwise(bounds)
    ]
