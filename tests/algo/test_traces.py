"""Three training steps of each algorithm on a linear policy, beside numpy written from the papers.

A policy of six tokens whose logits are a matrix times the features of a place. Responses were
sampled by older weights, groups are ragged, a step takes two minibatches, and the learning rate is
large enough that clips act. Both sides begin with the same weights and must end with the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from arealite.algo.advantages import (
    batch_normalized,
    group_advantages,
    leave_one_out_advantages,
    reward_advantages,
)
from arealite.algo.losses import (
    cispo_surrogate,
    clipped_surrogate,
    dual_clipped,
    importance_weight,
    sapo_surrogate,
    sequence_surrogate,
    tv_surrogate,
)
from arealite.algo.shaping import scaled_rewards
from arealite.types import Trajectory

NUM_TOKENS, NUM_FEATURES, LONGEST = 6, 4, 7
NUM_STEPS = 3
Array = np.ndarray


@dataclass
class Response:
    """A prompt token, then `len(tokens) - 1` sampled ones."""

    features: Array  # [L, F]
    tokens: Array  # [L]
    mask: Array  # [L] bool
    behavior: Array  # [L] log-probs of the weights that sampled each token
    reward: float

    @property
    def trajectory(self) -> Trajectory:
        return Trajectory(
            token_ids=self.tokens.tolist(),
            loss_mask=self.mask.tolist(),
            behavior_logprobs=self.behavior.tolist(),
            versions=[0 if is_sampled else -1 for is_sampled in self.mask],
            reward=self.reward,
            temperature=1.0,
            finish_reason="stop",
        )


def flat(groups: list[list[Any]]) -> list[Any]:
    return [each for group in groups for each in group]


def logprobs_of(weights: Array, features: Array, tokens: Array) -> Array:
    """[L] by log-softmax."""
    logits = features @ weights.T
    logits = logits - logits.max(1, keepdims=True)
    normalized = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return normalized[np.arange(len(tokens)), tokens]


def make_batch(weights: Array, source: np.random.Generator) -> list[list[Response]]:
    """Three groups; two and three updates ago the weights were others."""
    groups = []
    for size in (4, 3, 5):
        group = []
        for number in range(size):
            length = int(source.integers(3, LONGEST + 1))
            features = source.normal(size=(length, NUM_FEATURES))
            tokens = source.integers(NUM_TOKENS, size=length)
            older = weights + source.normal(size=weights.shape) * (0.3 if number % 2 else 0.2)
            mask = np.arange(length) > 0
            behavior = np.where(mask, logprobs_of(older, features, tokens), 0.0)
            reward = float(number % 2 == 0) if number else float(source.random() < 0.5)
            group.append(Response(features, tokens, mask, behavior, reward))
        groups.append(group)
    return groups


# --- In numpy, from the papers --------------------------------------------------------------------

Coefficients = Callable[[Array, Array, Response, float], Array]
"""d objective / d log-prob of each token [L], from current, proximal, the response and A."""


def grpo_numpy(groups: list[list[Response]]) -> list[list[float]]:
    found = []
    for group in groups:
        rewards = np.array([each.reward for each in group])
        std = rewards.std(ddof=1)
        centered = rewards - rewards.mean()
        found.append(list(centered / (std + 1e-6)) if std else [0.0] * len(group))
    return found


def dr_grpo_numpy(groups: list[list[Response]]) -> list[list[float]]:
    return [
        [each.reward - sum(r.reward for r in group) / len(group) for each in group]
        for group in groups
    ]


def rloo_numpy(groups: list[list[Response]]) -> list[list[float]]:
    return [
        [
            each.reward - sum(r.reward for r in group if r is not each) / (len(group) - 1)
            for each in group
        ]
        for group in groups
    ]


def normalized_numpy(values: list[list[float]], counts: list[list[int]]) -> list[list[float]]:
    flat = np.repeat(np.concatenate(values), np.concatenate(counts))
    return [[(v - flat.mean()) / (flat.std(ddof=1) + 1e-6) for v in group] for group in values]


def areal_numpy(groups: list[list[Response]]) -> list[list[float]]:
    rewards = [[5.0 if each.reward else -5.0 for each in group] for group in groups]
    return normalized_numpy(rewards, [[int(r.mask.sum()) for r in group] for group in groups])


def lite_numpy(groups: list[list[Response]]) -> list[list[float]]:
    return normalized_numpy(dr_grpo_numpy(groups), [[1] * len(group) for group in groups])


def ppo_numpy(low: float, high: float) -> Coefficients:
    def coefficients(now: Array, proximal: Array, _: Response, a: float) -> Array:
        ratio = np.exp(now - proximal)
        is_clipped = (ratio > 1 + high) if a > 0 else (ratio < 1 - low)
        return np.where(is_clipped, 0.0, ratio * a)

    return coefficients


def decoupled_numpy(now: Array, proximal: Array, response: Response, a: float) -> Array:
    weight = np.exp(proximal - response.behavior)
    weight = np.where(weight > 1.5, 0.0, weight)
    return weight * ppo_numpy(0.2, 0.28)(now, proximal, response, a)


def dual_numpy(now: Array, proximal: Array, response: Response, a: float) -> Array:
    found = ppo_numpy(0.2, 0.2)(now, proximal, response, a)
    return np.where((a < 0) & (np.exp(now - proximal) > 1.3), 0.0, found)


def gspo_numpy(now: Array, proximal: Array, response: Response, a: float) -> Array:
    length = response.mask.sum()
    ratio = math.exp((now - proximal)[response.mask].sum() / length)
    is_clipped = (ratio > 1.04) if a > 0 else (ratio < 0.97)
    # Of the sum over its tokens, each of which has the ratio of the whole.
    return np.full(len(now), 0.0 if is_clipped else ratio * a)


def cispo_numpy(now: Array, proximal: Array, _: Response, a: float) -> Array:
    return np.clip(np.exp(now - proximal), 0.0, 1.1) * a


def sapo_numpy(now: Array, proximal: Array, _: Response, a: float) -> Array:
    tau = 1.0 if a > 0 else 1.05
    ratio = np.exp(now - proximal)
    gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
    return 4 * gate * (1 - gate) * ratio * a


def dppo_numpy(now: Array, proximal: Array, _: Response, a: float) -> Array:
    moved = np.exp(now) - np.exp(proximal)
    is_dropped = (moved > 0.02) if a > 0 else (moved < -0.02)
    return np.where(is_dropped, 0.0, np.exp(now - proximal) * a)


def token_weights_numpy(responses: list[Response], aggregation: str) -> list[Array]:
    """What multiplies the loss of each token."""
    num_tokens = sum(int(r.mask.sum()) for r in responses)
    weights = {
        "token": lambda r: 1 / num_tokens,
        "sequence": lambda r: 1 / (len(responses) * r.mask.sum()),
        "constant": lambda r: 1 / (len(responses) * LONGEST),
    }
    return [np.where(r.mask, weights[aggregation](r), 0.0) for r in responses]


def train_in_numpy(weights: Array, algorithm: "Algorithm", seed: int) -> tuple[Array, float]:
    source = np.random.default_rng(seed)
    num_stopped = num_sampled = 0
    for _ in range(NUM_STEPS):
        groups = make_batch(weights, source)
        advantages = flat(algorithm.advantages_numpy(groups))
        responses = flat(groups)
        proximals = [logprobs_of(weights, r.features, r.tokens) for r in responses]
        for part in (slice(0, None, 2), slice(1, None, 2)):
            chosen = list(zip(responses, advantages, proximals, strict=True))[part]
            scales = token_weights_numpy([r for r, _, _ in chosen], algorithm.aggregation)
            gradient = np.zeros_like(weights)
            for (response, a, proximal), scale in zip(chosen, scales, strict=True):
                now = logprobs_of(weights, response.features, response.tokens)
                each = algorithm.coefficients_numpy(now, proximal, response, a)
                num_stopped += int(((each == 0) & response.mask).sum()) if a else 0
                num_sampled += int(response.mask.sum())
                for place in np.flatnonzero(response.mask):
                    logits = weights @ response.features[place]
                    likely = np.exp(logits - logits.max())
                    likely /= likely.sum()
                    slope = -likely
                    slope[response.tokens[place]] += 1  # d log-prob / d logits
                    gradient += (
                        scale[place] * each[place] * np.outer(slope, response.features[place])
                    )
            weights = (
                weights + algorithm.learning_rate * gradient
            )  # the objective is to be maximized
    return weights, num_stopped / num_sampled


# --- With the functions of arealite.algo ----------------------------------------------------------


@dataclass
class Packed:
    """One minibatch, end to end."""

    features: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    behavior: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, responses: list[Response]) -> "Packed":
        fields = ("features", "tokens", "mask", "behavior")
        joined = [np.concatenate([getattr(r, field) for r in responses]) for field in fields]
        ends = torch.tensor([0, *(len(r.tokens) for r in responses)]).cumsum(0)
        return cls(*map(torch.from_numpy, joined), ends)

    def logprobs(self, weights: torch.Tensor) -> torch.Tensor:
        every = (self.features @ weights.T).log_softmax(-1)
        return every.gather(-1, self.tokens[:, None])[:, 0]


Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Packed], torch.Tensor]
"""[T] to be maximized, from current, proximal, advantages and the minibatch."""


def ppo(low: float, high: float) -> Objective:
    return lambda now, proximal, a, mb: clipped_surrogate(now, proximal, a, mb.mask, low, high)[0]


def decoupled(
    now: torch.Tensor, proximal: torch.Tensor, a: torch.Tensor, mb: Packed
) -> torch.Tensor:
    surrogate, _ = clipped_surrogate(now, proximal, a, mb.mask, 0.2, 0.28)
    return surrogate * importance_weight(proximal, mb.behavior, mb.mask, cap=1.5)[0]


def train(weights: Array, algorithm: "Algorithm", seed: int) -> Array:
    source = np.random.default_rng(seed)
    current = torch.from_numpy(weights).clone().requires_grad_()
    for _ in range(NUM_STEPS):
        groups = make_batch(current.detach().numpy(), source)
        trajectories = [[response.trajectory for response in group] for group in groups]
        advantages = flat(algorithm.advantages(trajectories))
        responses = flat(groups)
        start = current.detach().clone()
        for part in (slice(0, None, 2), slice(1, None, 2)):
            chosen, mb = responses[part], Packed.of(responses[part])
            each = [
                torch.full((len(r.tokens),), a, dtype=torch.float64)
                for r, a in zip(chosen, advantages[part], strict=True)
            ]
            scale = torch.from_numpy(
                np.concatenate(token_weights_numpy(chosen, algorithm.aggregation))
            )
            objective = algorithm.objective(
                mb.logprobs(current), mb.logprobs(start), torch.cat(each), mb
            )
            [gradient] = torch.autograd.grad((scale * objective).sum(), current)
            current = (current + algorithm.learning_rate * gradient).detach().requires_grad_()
    return current.detach().numpy()


def over_tokens(groups: list[list[Trajectory]]) -> list[list[float]]:
    scaled = scaled_rewards(groups, right=5.0, wrong=-5.0)
    return batch_normalized(reward_advantages(scaled), scaled, over="tokens", sum_over_ranks=list)


def lite(groups: list[list[Trajectory]]) -> list[list[float]]:
    return batch_normalized(
        group_advantages(groups), groups, over="trajectories", sum_over_ranks=list
    )


def grpo(groups: list[list[Trajectory]]) -> list[list[float]]:
    return group_advantages(groups, divide_by_std=True)


@dataclass
class Algorithm:
    """Both sides of one."""

    advantages: Callable[[list[list[Trajectory]]], list[list[float]]]
    advantages_numpy: Callable[[list[list[Response]]], list[list[float]]]
    objective: Objective
    coefficients_numpy: Coefficients
    aggregation: str = "token"
    learning_rate: float = 1.5


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(grpo, grpo_numpy, ppo(0.2, 0.2), ppo_numpy(0.2, 0.2), "sequence"),
    "dapo": Algorithm(grpo, grpo_numpy, ppo(0.2, 0.28), ppo_numpy(0.2, 0.28)),
    "dr_grpo": Algorithm(
        group_advantages, dr_grpo_numpy, ppo(0.2, 0.2), ppo_numpy(0.2, 0.2), "constant", 8.0
    ),
    "rloo": Algorithm(leave_one_out_advantages, rloo_numpy, ppo(0.2, 0.2), ppo_numpy(0.2, 0.2)),
    "areal": Algorithm(over_tokens, areal_numpy, decoupled, decoupled_numpy),
    "lite_ppo": Algorithm(lite, lite_numpy, ppo(0.2, 0.28), ppo_numpy(0.2, 0.28)),
    "dual_clip": Algorithm(
        grpo,
        grpo_numpy,
        lambda now, proximal, a, mb: dual_clipped(
            clipped_surrogate(now, proximal, a, mb.mask, 0.2, 0.2)[0], a, cap=1.3
        )[0],
        dual_numpy,
    ),
    "gspo": Algorithm(
        grpo,
        grpo_numpy,
        lambda now, proximal, a, mb: sequence_surrogate(
            now, proximal, a, mb.mask, mb.ends, 0.03, 0.04
        )[0],
        gspo_numpy,
        "sequence",
    ),
    "cispo": Algorithm(
        grpo,
        grpo_numpy,
        lambda now, proximal, a, mb: cispo_surrogate(now, proximal, a, mb.mask, 1.0, 0.1)[0],
        cispo_numpy,
    ),
    "sapo": Algorithm(
        grpo,
        grpo_numpy,
        lambda now, proximal, a, mb: sapo_surrogate(now, proximal, a, mb.mask),
        sapo_numpy,
    ),
    "dppo": Algorithm(
        grpo,
        grpo_numpy,
        lambda now, proximal, a, mb: tv_surrogate(now, proximal, a, mb.mask, limit=0.02)[0],
        dppo_numpy,
    ),
}
WITHOUT_CLIP = ("cispo", "sapo")  # whose gradient never stops


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("seed", range(3))
def test_three_steps_are_those_of_the_paper(name: str, seed: int):
    weights = np.random.default_rng(100 + seed).normal(size=(NUM_TOKENS, NUM_FEATURES)) * 0.5
    expected, share_stopped = train_in_numpy(weights, ALGORITHMS[name], seed)
    assert np.abs(expected - weights).max() > 0.1
    assert name in WITHOUT_CLIP or share_stopped > 0.01
    np.testing.assert_allclose(train(weights, ALGORITHMS[name], seed), expected, atol=1e-8)


def test_no_two_algorithms_are_the_same():
    weights = np.random.default_rng(100).normal(size=(NUM_TOKENS, NUM_FEATURES)) * 0.5
    ends: dict[str, Any] = {name: train(weights, each, 0) for name, each in ALGORITHMS.items()}
    names = list(ends)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            assert np.abs(ends[name] - ends[other]).max() > 1e-4, (name, other)
