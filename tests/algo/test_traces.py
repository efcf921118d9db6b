"""Three training steps of each algorithm on a linear policy, beside numpy written from the papers.

A policy of six tokens whose logits are a matrix times the features of a place. Responses were
sampled by the weights of two and of three steps ago, groups are ragged, a step takes two
minibatches, and the learning rate is large enough that clips act. Both sides begin with the same
weights and must end with the same; so must the critics, where there are some.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from arealite.algo.advantages import (
    batch_normalized,
    group_advantages,
    leave_one_out_advantages,
    reward_advantages,
    token_rewards,
)
from arealite.algo.corrections import (
    banded_weight,
    interpolated_proximal,
    k3_dropped,
    second_moment_dropped,
    sequence_dropped,
    truncated_weight,
)
from arealite.algo.gae import gae, normalized
from arealite.algo.kl import KLEstimator, kl_estimate, kl_penalized
from arealite.algo.losses import (
    cispo_surrogate,
    clipped_surrogate,
    dual_clipped,
    importance_weight,
    sapo_surrogate,
    sequence_surrogate,
    sum_of_sequence,
    tv_surrogate,
)
from arealite.algo.preferences import dpo_loss
from arealite.algo.shaping import scaled_rewards
from arealite.algo.values import value_loss
from arealite.types import Trajectory

NUM_TOKENS, NUM_FEATURES, LONGEST = 6, 4, 7
NUM_STEPS = 3
AGES = (2, 3)
"""How many steps ago the weights were made that sampled a response, by turns."""
FIRST = max(AGES)
"""Version of the weights at which training begins; the older ones are given."""
KL_WEIGHT, GAMMA, LAMBDA, VALUE_CLIP = 0.05, 0.95, 0.9, 0.1
Array = np.ndarray


@dataclass
class Response:
    """A prompt token, then `len(tokens) - 1` sampled ones."""

    features: Array  # [L, F]
    tokens: Array  # [L]
    mask: Array  # [L] bool
    behavior: Array  # [L] log-probs of the weights that sampled each token
    reference: Array  # [L] log-probs of the weights before any training
    version: int  # of the weights that sampled it
    reward: float
    proximal: Array  # [L] log-probs at the start of the step

    @property
    def trajectory(self) -> Trajectory:
        return Trajectory(
            token_ids=self.tokens.tolist(),
            loss_mask=self.mask.tolist(),
            behavior_logprobs=self.behavior.tolist(),
            versions=[self.version if is_sampled else -1 for is_sampled in self.mask],
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


History = dict[int, Array]
"""Weights by version."""


def made_history(weights: Array, seed: int) -> History:
    """What came before the first step, so that it too has responses of older weights."""
    source = np.random.default_rng(1000 + seed)
    history = {FIRST: weights}
    for version in reversed(range(FIRST)):
        history[version] = history[version + 1] + source.normal(size=weights.shape) * 0.15
    return history


def make_batch(history: History, version: int, source: np.random.Generator) -> list[list[Response]]:
    """Three groups that the weights of two and of three steps ago sampled."""
    return [
        [sampled(history, version - AGES[number % 2], number, source) for number in range(size)]
        for size in (4, 3, 5)
    ]


def sampled(history: History, version: int, number: int, source: np.random.Generator) -> Response:
    length = int(source.integers(3, LONGEST + 1))
    features = source.normal(size=(length, NUM_FEATURES))
    logits = features @ history[version].T
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    tokens = np.array([source.choice(NUM_TOKENS, p=each) for each in likely])
    mask = np.arange(length) > 0
    behavior, reference, proximal = (
        np.where(mask, logprobs_of(history[at], features, tokens), 0.0)
        for at in (version, 0, max(history))
    )
    reward = float(number % 2 == 0) if number else float(source.random() < 0.5)
    return Response(features, tokens, mask, behavior, reference, version, reward, proximal)


# --- In numpy, from the papers --------------------------------------------------------------------

Coefficients = Callable[[Array, Response, Array], Array]
"""d objective / d log-prob of each token [L], from current, the response and A [L]."""


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


def reinforce_plus_numpy(groups: list[list[Response]]) -> list[list[Array]]:
    """Equation 8 of arXiv:2501.03262: r - beta * the KL to come, then less mean over std."""
    returns = []
    for response in flat(groups):
        kl = KL_WEIGHT * (response.proximal - response.reference)
        to_come = [kl[place:][response.mask[place:]].sum() for place in range(len(kl))]
        returns.append(response.reward - np.array(to_come))
    return regrouped(over_all_tokens_numpy(returns, flat(groups)), groups)


def baseline_plus_numpy(groups: list[list[Response]]) -> list[list[float]]:
    return normalized_numpy(
        dr_grpo_numpy(groups), [[int(r.mask.sum()) for r in group] for group in groups]
    )


def gae_numpy(groups: list[list[Response]], values: list[Array]) -> tuple[list[Array], list[Array]]:
    """Advantages, normalized, and returns action by action, arXiv:1506.02438."""
    advantages, returns = [], []
    for response, value in zip(flat(groups), values, strict=True):
        found = np.zeros(len(value))
        later = next_value = 0.0
        for place in reversed(np.flatnonzero(response.mask)):
            reward = response.reward if place == len(value) - 1 else 0.0
            delta = reward + GAMMA * next_value - value[place]
            found[place] = later = delta + GAMMA * LAMBDA * later
            next_value = value[place]
        advantages.append(found)
        returns.append(found + value)
    return over_all_tokens_numpy(advantages, flat(groups)), returns


def over_all_tokens_numpy(values: list[Array], responses: list[Response]) -> list[Array]:
    every = np.concatenate([v[r.mask] for v, r in zip(values, responses, strict=True)])
    return [(v - every.mean()) / (every.std(ddof=1) + 1e-6) for v in values]


def regrouped(values: list[Any], groups: list[list[Response]]) -> list[list[Any]]:
    rest = iter(values)
    return [[next(rest) for _ in group] for group in groups]


def ppo_numpy(low: float, high: float) -> Coefficients:
    def coefficients(now: Array, response: Response, a: Array) -> Array:
        return clipped_numpy(np.exp(now - response.proximal), a, low, high)

    return coefficients


def clipped_numpy(ratio: Array, a: Array, low: float, high: float) -> Array:
    is_clipped = np.where(a > 0, ratio > 1 + high, ratio < 1 - low)
    return np.where(is_clipped, 0.0, ratio * a)


def weighted_numpy(weight_of: Callable[[Array, Array], Array]) -> Coefficients:
    """PPO with a weight from proximal / behavior [L] and what was sampled [L]."""

    def coefficients(now: Array, response: Response, a: Array) -> Array:
        ratio = np.exp(response.proximal - response.behavior)
        return weight_of(ratio, response.mask) * ppo_numpy(0.2, 0.28)(now, response, a)

    return coefficients


def dual_numpy(now: Array, response: Response, a: Array) -> Array:
    found = ppo_numpy(0.2, 0.2)(now, response, a)
    return np.where((a < 0) & (np.exp(now - response.proximal) > 1.3), 0.0, found)


def gspo_numpy(now: Array, response: Response, a: Array) -> Array:
    length = response.mask.sum()
    ratio = math.exp((now - response.proximal)[response.mask].sum() / length)
    # Of the sum over its tokens, each of which has the ratio of the whole.
    return clipped_numpy(np.full(len(now), ratio), a, 3e-4, 4e-4)


def cispo_numpy(now: Array, response: Response, a: Array) -> Array:
    return np.clip(np.exp(now - response.proximal), 0.0, 1.1) * a


def sapo_numpy(now: Array, response: Response, a: Array) -> Array:
    tau = np.where(a > 0, 1.0, 1.05)
    ratio = np.exp(now - response.proximal)
    gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
    return 4 * gate * (1 - gate) * ratio * a


def dppo_numpy(now: Array, response: Response, a: Array) -> Array:
    moved = np.exp(now) - np.exp(response.proximal)
    is_dropped = np.where(a > 0, moved > 0.02, moved < -0.02)
    return np.where(is_dropped, 0.0, np.exp(now - response.proximal) * a)


def a3po_numpy(now: Array, response: Response, a: Array, version: int) -> Array:
    age = version - response.version
    proximal = response.behavior + (age - 1) / age * (now - response.behavior)
    weight = np.exp(proximal - response.behavior)
    return weight * clipped_numpy(np.exp(now - proximal), a, 0.2, 0.28)


def m2po_dropped_numpy(responses: list[Response], limit: float) -> list[Array]:
    """The largest leave, one by one, until the mean of the rest is below the limit."""
    squares = [np.where(r.mask, (r.behavior - r.proximal) ** 2, -1.0) for r in responses]
    left = sorted(float(x) for square in squares for x in square if x >= 0)
    while left and sum(left) / len(left) >= limit:
        left.pop()
    largest = left[-1] if left else -1.0
    return [square > largest for square in squares]


def token_weights_numpy(responses: list[Response], aggregation: str) -> list[Array]:
    """What multiplies the loss of each token."""
    num_tokens = sum(int(r.mask.sum()) for r in responses)
    weights = {
        "token": lambda r: 1 / num_tokens,
        "sequence": lambda r: 1 / (len(responses) * r.mask.sum()),
        "constant": lambda r: 1 / (len(responses) * LONGEST),
    }
    return [np.where(r.mask, weights[aggregation](r), 0.0) for r in responses]


def train_in_numpy(start: Array, algorithm: "Algorithm", seed: int) -> "Trained":
    source = np.random.default_rng(seed)
    history, critic = made_history(start, seed), np.zeros(NUM_FEATURES)
    num_stopped = num_sampled = 0
    ages: set[int] = set()
    for version in range(FIRST, FIRST + NUM_STEPS):
        groups = make_batch(history, version, source)
        responses, weights = flat(groups), history[version]
        ages |= {version - response.version for response in responses}
        values = [response.features @ critic for response in responses]
        returns = values
        if algorithm.has_critic:
            advantages, returns = gae_numpy(groups, values)
        else:
            advantages = [
                np.broadcast_to(a, len(r.tokens))
                for a, r in zip(flat(algorithm.advantages_numpy(groups)), responses, strict=True)
            ]
        rows = list(zip(responses, advantages, values, returns, strict=True))
        for part in (slice(0, None, 2), slice(1, None, 2)):
            chosen = [response for response, *_ in rows[part]]
            scales = token_weights_numpy(chosen, algorithm.aggregation)
            dropped = algorithm.dropped_numpy(chosen)
            slope, critic_slope = np.zeros_like(weights), np.zeros_like(critic)
            for row, scale, drop in zip(rows[part], scales, dropped, strict=True):
                response, a, old, target = row
                now = logprobs_of(weights, response.features, response.tokens)
                each = np.where(drop, 0.0, algorithm.slope_numpy(now, response, a, version))
                num_stopped += int(((each == 0) & response.mask & (a != 0)).sum())
                num_sampled += int(response.mask.sum())
                each = each - algorithm.kl_slope_numpy(now - response.reference)
                slope += policy_slope(weights, response, scale * each)
                value = response.features @ critic
                critic_slope += (scale * value_slope(value, old, target)) @ response.features
            weights = weights + algorithm.learning_rate * slope  # to be maximized
            if algorithm.has_critic:
                critic = critic - critic_slope
        history[version + 1] = weights
    return Trained(history[FIRST + NUM_STEPS], critic, num_stopped / num_sampled, ages)


def policy_slope(weights: Array, response: Response, each: Array) -> Array:
    """d sum(each * log-prob) / d weights."""
    total = np.zeros_like(weights)
    for place in np.flatnonzero(response.mask):
        logits = weights @ response.features[place]
        likely = np.exp(logits - logits.max())
        slope = -likely / likely.sum()
        slope[response.tokens[place]] += 1  # d log-prob / d logits
        total += each[place] * np.outer(slope, response.features[place])
    return total


def value_slope(value: Array, old: Array, target: Array) -> Array:
    """d max((v - R)^2, (clipped - R)^2) / 2 / d v."""
    limited = np.clip(value, old - VALUE_CLIP, old + VALUE_CLIP)
    is_stopped = (limited - target) ** 2 > (value - target) ** 2
    return np.where(is_stopped, 0.0, value - target)


# --- With the functions of arealite.algo ----------------------------------------------------------


@dataclass
class Packed:
    """One minibatch, end to end."""

    features: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    behavior: torch.Tensor
    reference: torch.Tensor
    proximal: torch.Tensor
    ends: torch.Tensor
    versions: torch.Tensor
    version: int

    @classmethod
    def of(cls, responses: list[Response], version: int) -> "Packed":
        fields = ("features", "tokens", "mask", "behavior", "reference", "proximal")
        joined = [np.concatenate([getattr(r, field) for r in responses]) for field in fields]
        ends = torch.tensor([0, *(len(r.tokens) for r in responses)]).cumsum(0)
        versions = torch.tensor(flat([r.trajectory.versions for r in responses]))
        return cls(*map(torch.from_numpy, joined), ends, versions, version)

    def logprobs(self, weights: torch.Tensor) -> torch.Tensor:
        every = (self.features @ weights.T).log_softmax(-1)
        return every.gather(-1, self.tokens[:, None])[:, 0]


Groups = list[list[Trajectory]]
Objective = Callable[[torch.Tensor, torch.Tensor, Packed], torch.Tensor]
"""[T] to be maximized, from current, advantages and the minibatch."""


def ppo(low: float, high: float) -> Objective:
    return lambda now, a, mb: clipped_surrogate(now, mb.proximal, a, mb.mask, low, high)[0]


def weighted(weight: Callable[[Packed], torch.Tensor]) -> Objective:
    return lambda now, a, mb: ppo(0.2, 0.28)(now, a, mb) * weight(mb)


def without(dropped: Callable[[Packed], torch.Tensor]) -> Objective:
    return lambda now, a, mb: ppo(0.2, 0.28)(now, a, mb).masked_fill(dropped(mb), 0.0)


def m2po(now: torch.Tensor, a: torch.Tensor, mb: Packed) -> torch.Tensor:
    unclipped, _ = clipped_surrogate(now, mb.proximal, a, mb.mask, 1.0, math.inf)
    weight, _ = importance_weight(mb.proximal, mb.behavior, mb.mask, cap=math.inf)
    [dropped] = second_moment_dropped(
        [mb.proximal], [mb.behavior], [mb.mask], gather_over_ranks=lambda each: [each]
    )
    return (unclipped * weight).masked_fill(dropped, 0.0)


def a3po(now: torch.Tensor, a: torch.Tensor, mb: Packed) -> torch.Tensor:
    proximal = interpolated_proximal(now, mb.behavior, mb.versions, mb.mask, mb.version)
    surrogate, _ = clipped_surrogate(now, proximal, a, mb.mask, 0.2, 0.28)
    return surrogate * importance_weight(proximal, mb.behavior, mb.mask, cap=math.inf)[0]


def with_kl(objective: Objective, estimator: KLEstimator) -> Objective:
    def penalized(now: torch.Tensor, a: torch.Tensor, mb: Packed) -> torch.Tensor:
        kl = kl_estimate(now, mb.reference, mb.mask, estimator)
        return objective(now, a, mb) - KL_WEIGHT * kl

    return penalized


def train(start: Array, algorithm: "Algorithm", seed: int) -> "Trained":
    source, history = np.random.default_rng(seed), made_history(start, seed)
    current = torch.from_numpy(start).clone().requires_grad_()
    critic = torch.zeros(NUM_FEATURES, dtype=torch.float64, requires_grad=True)
    for version in range(FIRST, FIRST + NUM_STEPS):
        groups = make_batch(history, version, source)
        trajectories = [[response.trajectory for response in group] for group in groups]
        whole, responses = Packed.of(flat(groups), version), flat(groups)
        old = (whole.features @ critic).detach()
        advantages, returns = estimated(algorithm, trajectories, whole, old)
        lengths = [len(response.tokens) for response in responses]
        columns = [column.split(lengths) for column in (advantages, old, returns)]
        for part in (slice(0, None, 2), slice(1, None, 2)):
            mb = Packed.of(responses[part], version)
            a, before, target = (torch.cat(column[part]) for column in columns)
            scale = torch.from_numpy(
                np.concatenate(token_weights_numpy(responses[part], algorithm.aggregation))
            )
            objective = algorithm.objective(mb.logprobs(current), a, mb)
            [slope] = torch.autograd.grad((scale * objective).sum(), current)
            current = (current + algorithm.learning_rate * slope).detach().requires_grad_()
            if algorithm.has_critic:
                value = mb.features @ critic
                loss, _ = value_loss(value, before, target, mb.mask, clip=VALUE_CLIP)
                [slope] = torch.autograd.grad((scale * loss).sum(), critic)
                critic = (critic - slope).detach().requires_grad_()
        history[version + 1] = current.detach().numpy()
    return Trained(current.detach().numpy(), critic.detach().numpy())


def estimated(
    algorithm: "Algorithm", groups: Groups, whole: Packed, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [T] of the whole batch."""
    if algorithm.has_critic:
        rewards = torch.tensor(flat(flat(token_rewards(groups))), dtype=torch.float64)
        advantages, returns = gae(
            rewards, values, whole.mask, whole.ends, gamma=GAMMA, gae_lambda=LAMBDA
        )
        return normalized([advantages], [whole.mask], sum_over_ranks=list)[0], returns
    return algorithm.advantages(groups, whole), values


def by_trajectory(advantages: Callable[[Groups], list[list[float]]]) -> "Advantages":
    def of_tokens(groups: Groups, whole: Packed) -> torch.Tensor:
        each = torch.tensor(flat(advantages(groups)), dtype=torch.float64)
        return each.repeat_interleave(whole.ends.diff())

    return of_tokens


def over_tokens(groups: Groups) -> list[list[float]]:
    scaled = scaled_rewards(groups, right=5.0, wrong=-5.0)
    return batch_normalized(reward_advantages(scaled), scaled, over="tokens", sum_over_ranks=list)


def lite(groups: Groups) -> list[list[float]]:
    return batch_normalized(
        group_advantages(groups), groups, over="trajectories", sum_over_ranks=list
    )


def baseline_plus(groups: Groups) -> list[list[float]]:
    return batch_normalized(group_advantages(groups), groups, over="tokens", sum_over_ranks=list)


def reinforce_plus(groups: Groups, whole: Packed) -> torch.Tensor:
    rewards = torch.tensor(flat(flat(token_rewards(groups))), dtype=torch.float64)
    rewards = kl_penalized(rewards, whole.proximal, whole.reference, whole.mask, weight=KL_WEIGHT)
    returns, _ = gae(rewards, torch.zeros_like(rewards), whole.mask, whole.ends)
    return normalized([returns], [whole.mask], sum_over_ranks=list)[0]


def grpo(groups: Groups) -> list[list[float]]:
    return group_advantages(groups, divide_by_std=True)


@dataclass
class Trained:
    """What three steps lead to; of numpy, also what happened in them."""

    weights: Array
    critic: Array
    share_stopped: float = 0.0
    ages: set[int] = field(default_factory=set)


Advantages = Callable[[Groups, Packed], torch.Tensor]
AdvantagesNumpy = Callable[[list[list[Response]]], list[list[Any]]]


def none_dropped(responses: list[Response]) -> list[Array]:
    return [np.zeros(len(response.tokens), dtype=bool) for response in responses]


@dataclass
class Algorithm:
    """Both sides of one."""

    advantages: Advantages
    advantages_numpy: AdvantagesNumpy
    objective: Objective
    coefficients_numpy: Coefficients | None  # None: A-3PO, which also needs the version
    aggregation: str = "token"
    learning_rate: float = 1.5
    dropped_numpy: Callable[[list[Response]], list[Array]] = none_dropped
    kl_slope_numpy: Callable[[Array], Array] = np.zeros_like  # d weight * KL / d log-prob
    has_critic: bool = False

    def slope_numpy(self, now: Array, response: Response, a: Array, version: int) -> Array:
        if self.coefficients_numpy is None:
            return a3po_numpy(now, response, a, version)
        return self.coefficients_numpy(now, response, a)


GRPO = (by_trajectory(grpo), grpo_numpy)


def k2_slope_numpy(gap: Array) -> Array:
    return KL_WEIGHT * gap


def k3_numpy(ratio: Array, mask: Array) -> Array:
    return np.full(len(ratio), float((ratio - 1 - np.log(ratio))[mask].mean() <= 0.02))


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        *GRPO,
        with_kl(ppo(0.2, 0.2), "k3"),
        ppo_numpy(0.2, 0.2),
        "sequence",
        kl_slope_numpy=lambda gap: KL_WEIGHT * (1 - np.exp(-gap)),
    ),
    "dapo": Algorithm(*GRPO, ppo(0.2, 0.28), ppo_numpy(0.2, 0.28)),
    "dr_grpo": Algorithm(
        by_trajectory(group_advantages),
        dr_grpo_numpy,
        ppo(0.2, 0.2),
        ppo_numpy(0.2, 0.2),
        "constant",
        8.0,
    ),
    "rloo": Algorithm(
        by_trajectory(leave_one_out_advantages),
        rloo_numpy,
        ppo(0.2, 0.2),
        ppo_numpy(0.2, 0.2),
        "constant",
        8.0,
    ),
    "ppo": Algorithm(
        *GRPO, ppo(0.2, 0.2), ppo_numpy(0.2, 0.2), has_critic=True
    ),  # whose advantages come from the critic
    "reinforce_plus": Algorithm(
        reinforce_plus, reinforce_plus_numpy, ppo(0.2, 0.2), ppo_numpy(0.2, 0.2)
    ),
    "reinforce_plus_baseline": Algorithm(
        by_trajectory(baseline_plus),
        baseline_plus_numpy,
        with_kl(ppo(0.2, 0.2), "k2"),
        ppo_numpy(0.2, 0.2),
        kl_slope_numpy=k2_slope_numpy,
    ),
    "areal": Algorithm(
        by_trajectory(over_tokens),
        areal_numpy,
        weighted(lambda mb: importance_weight(mb.proximal, mb.behavior, mb.mask, cap=1.5)[0]),
        weighted_numpy(lambda ratio, _: np.where(ratio > 1.5, 0.0, ratio)),
    ),
    "decoupled": Algorithm(
        *GRPO,
        weighted(lambda mb: importance_weight(mb.proximal, mb.behavior, mb.mask, cap=2.0)[0]),
        weighted_numpy(lambda ratio, _: np.where(ratio > 2.0, 0.0, ratio)),
    ),
    "lite_ppo": Algorithm(by_trajectory(lite), lite_numpy, ppo(0.2, 0.28), ppo_numpy(0.2, 0.28)),
    "dual_clip": Algorithm(
        *GRPO,
        lambda now, a, mb: dual_clipped(ppo(0.2, 0.2)(now, a, mb), a, cap=1.3)[0],
        dual_numpy,
    ),
    "gspo": Algorithm(
        *GRPO,
        lambda now, a, mb: sequence_surrogate(now, mb.proximal, a, mb.mask, mb.ends, 3e-4, 4e-4)[0],
        gspo_numpy,
        "sequence",
    ),
    "cispo": Algorithm(
        *GRPO,
        lambda now, a, mb: cispo_surrogate(now, mb.proximal, a, mb.mask, 1.0, 0.1)[0],
        cispo_numpy,
    ),
    "sapo": Algorithm(
        *GRPO, lambda now, a, mb: sapo_surrogate(now, mb.proximal, a, mb.mask), sapo_numpy
    ),
    "dppo": Algorithm(
        *GRPO,
        with_kl(lambda now, a, mb: tv_surrogate(now, mb.proximal, a, mb.mask, limit=0.02)[0], "k2"),
        dppo_numpy,
        kl_slope_numpy=k2_slope_numpy,
    ),
    "m2po": Algorithm(
        *GRPO,
        m2po,
        lambda now, response, a: np.exp(now - response.behavior) * a,
        dropped_numpy=lambda responses: m2po_dropped_numpy(responses, 0.04),
    ),
    "a3po": Algorithm(*GRPO, a3po, None),
    "tis": Algorithm(
        *GRPO,
        weighted(lambda mb: truncated_weight(mb.proximal, mb.behavior, mb.mask, cap=1.2)[0]),
        weighted_numpy(lambda ratio, _: np.minimum(ratio, 1.2)),
    ),
    "icepop": Algorithm(
        *GRPO,
        weighted(lambda mb: banded_weight(mb.proximal, mb.behavior, mb.mask, low=0.5, high=1.8)[0]),
        weighted_numpy(lambda ratio, _: np.where((ratio < 0.5) | (ratio > 1.8), 0.0, ratio)),
    ),
    "mis": Algorithm(
        *GRPO,
        without(
            lambda mb: sequence_dropped(
                mb.proximal, mb.behavior, mb.mask, mb.ends, low=0.0, high=2.0, is_geometric=False
            )
        ),
        weighted_numpy(lambda ratio, mask: np.full(len(ratio), float(ratio[mask].prod() <= 2))),
    ),
    "geometric": Algorithm(
        *GRPO,
        without(
            lambda mb: sequence_dropped(
                mb.proximal, mb.behavior, mb.mask, mb.ends, low=0.7, high=1.2, is_geometric=True
            )
        ),
        weighted_numpy(
            lambda ratio, mask: np.full(
                len(ratio), float(0.7 <= ratio[mask].prod() ** (1 / mask.sum()) <= 1.2)
            )
        ),
    ),
    "k3": Algorithm(
        *GRPO,
        without(lambda mb: k3_dropped(mb.proximal, mb.behavior, mb.mask, mb.ends, limit=0.02)),
        weighted_numpy(k3_numpy),
    ),
}
WITHOUT_CLIP = ("cispo", "sapo")  # whose gradient never stops


def first_weights(seed: int) -> Array:
    return np.random.default_rng(100 + seed).normal(size=(NUM_TOKENS, NUM_FEATURES)) * 0.5


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("seed", range(3))
def test_three_steps_are_those_of_the_paper(name: str, seed: int):
    start, algorithm = first_weights(seed), ALGORITHMS[name]
    expected = train_in_numpy(start, algorithm, seed)
    assert np.abs(expected.weights - start).max() > 0.1
    assert name in WITHOUT_CLIP or expected.share_stopped > 0.01
    assert expected.ages == set(AGES)
    assert expected.critic.any() == algorithm.has_critic
    found = train(start, algorithm, seed)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.critic, expected.critic, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_every_response_was_sampled_by_weights_that_are_two_updates_old_or_older(seed: int):
    start = first_weights(seed)
    history, source = made_history(start, seed), np.random.default_rng(seed)
    history[FIRST + 1] = start + 1.0
    for version in (FIRST, FIRST + 1):
        now = {at: history[at] for at in range(version + 1)}
        for response in flat(make_batch(now, version, source)):
            assert version - response.version >= 2
            sampled_by = [
                np.allclose(
                    logprobs_of(history[at], response.features, response.tokens)[response.mask],
                    response.behavior[response.mask],
                )
                for at in range(version + 1)
            ]
            assert [at for at, is_this in enumerate(sampled_by) if is_this] == [response.version]


def test_no_two_algorithms_are_the_same():
    ends = {name: train(first_weights(0), each, 0).weights for name, each in ALGORITHMS.items()}
    names = list(ends)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            assert np.abs(ends[name] - ends[other]).max() > 1e-4, (name, other)


# --- DPO, which has pairs and no rewards ----------------------------------------------------------

BETA = 0.5


def pairs_of(history: History, version: int, source: np.random.Generator) -> list[list[Response]]:
    """Of each group the first two responses; the first is the one that was preferred."""
    return [group[:2] for group in make_batch(history, version, source)]


def dpo_in_numpy(start: Array, seed: int) -> Array:
    """Equation 7 of arXiv:2305.18290, and its gradient below it."""
    source, history = np.random.default_rng(seed), made_history(start, seed)
    for version in range(FIRST, FIRST + NUM_STEPS):
        weights, pairs = history[version], pairs_of(history, version, source)
        for part in (pairs[0::2], pairs[1::2]):
            slope = np.zeros_like(weights)
            for chosen, rejected in part:
                margin = 0.0
                for response, sign in ((chosen, 1), (rejected, -1)):
                    now = logprobs_of(weights, response.features, response.tokens)
                    margin += sign * (now - response.reference)[response.mask].sum()
                push = BETA / (1 + np.exp(BETA * margin)) / len(part)
                slope += push * policy_slope(weights, chosen, np.ones(len(chosen.tokens)))
                slope -= push * policy_slope(weights, rejected, np.ones(len(rejected.tokens)))
            weights = weights + slope
        history[version + 1] = weights
    return weights


def train_by_dpo(start: Array, seed: int) -> Array:
    source, history = np.random.default_rng(seed), made_history(start, seed)
    current = torch.from_numpy(start).clone().requires_grad_()
    for version in range(FIRST, FIRST + NUM_STEPS):
        pairs = pairs_of(history, version, source)
        for part in (pairs[0::2], pairs[1::2]):
            mb = Packed.of(flat(part), version)
            now, reference = (
                sum_of_sequence(each, mb.mask, mb.ends)[mb.ends[:-1]]
                for each in (mb.logprobs(current), mb.reference)
            )
            losses = dpo_loss(now[::2], now[1::2], reference[::2], reference[1::2], beta=BETA)
            [slope] = torch.autograd.grad(losses.mean(), current)
            current = (current - slope).detach().requires_grad_()
        history[version + 1] = current.detach().numpy()
    return current.detach().numpy()


@pytest.mark.parametrize("seed", range(3))
def test_three_steps_of_dpo_are_those_of_the_paper(seed: int):
    start = first_weights(seed)
    expected = dpo_in_numpy(start, seed)
    assert np.abs(expected - start).max() > 0.1
    np.testing.assert_allclose(train_by_dpo(start, seed), expected, rtol=0, atol=1e-8)
