import math

import pytest
import torch

from arealite.algo.kl import KLEstimator, kl_estimate, kl_penalized
from arealite.errors import ConfigError

MASK = torch.tensor([True, True, False])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [0.5, -1.0]), ("k2", [0.125, 0.5]), ("k3", [math.exp(-0.5) - 0.5, math.e - 2])],
)
def test_estimates_at_sampled_tokens_by_hand(estimator: KLEstimator, expected: list[float]):
    current = torch.tensor([-0.5, -2.0, math.nan], dtype=torch.float64)
    reference = torch.tensor([-1.0, -1.0, 0.0], dtype=torch.float64)
    found = kl_estimate(current, reference, MASK, estimator)
    assert found.tolist() == pytest.approx([*expected, 0.0])


def exact(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (policy.softmax(0) * (policy.log_softmax(0) - reference.log_softmax(0))).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_the_divergence_on_average(estimator: KLEstimator):
    policy = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.0, 0.5, -0.1], dtype=torch.float64)
    each = kl_estimate(
        policy.log_softmax(0), reference.log_softmax(0), torch.ones(3).bool(), estimator
    )
    mean = (policy.softmax(0) * each).sum()
    assert mean.item() == pytest.approx(exact(policy, reference).item())


def test_the_gradient_of_k2_is_that_of_the_divergence_on_average():
    policy = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.5, -0.1], dtype=torch.float64)
    each = kl_estimate(policy.log_softmax(0), reference.log_softmax(0), torch.ones(3).bool(), "k2")
    [of_k2] = torch.autograd.grad((policy.softmax(0).detach() * each).sum(), policy)
    [of_kl] = torch.autograd.grad(exact(policy, reference), policy)
    assert of_k2.tolist() == pytest.approx(of_kl.tolist())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gap", [1e4, -1e4, math.inf, -math.inf])
def test_extreme_gaps_stay_finite(estimator: KLEstimator, gap: float):
    current = torch.tensor([gap, gap, gap], requires_grad=True)
    total = kl_estimate(current, torch.zeros(3), MASK, estimator).sum()
    [gradient] = torch.autograd.grad(total, current)
    assert total.isfinite()
    assert gradient.isfinite().all()


def test_without_a_reference_model_it_says_how_to_have_one():
    with pytest.raises(ConfigError, match=r"ref_logprobs has 0 values for 3 tokens. Attach them"):
        kl_estimate(torch.zeros(3), torch.empty(0), MASK, "k1")
    with pytest.raises(ConfigError, match="estimator='k4' must be k1, k2 or k3"):
        kl_estimate(torch.zeros(3), torch.zeros(3), MASK, "k4")  # type: ignore[arg-type]


def test_a_reward_pays_for_the_distance_of_its_token_from_the_reference():
    rewards = torch.tensor([0.0, 1.0, 0.25])
    proximal = torch.tensor([-0.5, -2.0, math.nan], requires_grad=True)
    reference = torch.tensor([-1.0, -1.0, 0.0])
    found = kl_penalized(rewards, proximal, reference, MASK, weight=0.1)
    assert found.tolist() == pytest.approx([-0.05, 1.1, 0.25])
    assert not found.requires_grad
    squared = kl_penalized(rewards, proximal, reference, MASK, weight=2.0, estimator="k2")
    assert squared.tolist() == pytest.approx([-0.25, 0.0, 0.25])
    assert kl_penalized(rewards, proximal, reference, MASK, weight=0.0).tolist() == rewards.tolist()


def test_a_penalty_needs_a_reference_model_and_no_negative_weight():
    zeros = torch.zeros(3)
    with pytest.raises(ConfigError, match="ref_logprobs has 0 values for 3 tokens"):
        kl_penalized(zeros, zeros, torch.empty(0), MASK, weight=0.1)
    for weight in (-0.1, math.nan):
        with pytest.raises(ConfigError, match=f"is {weight}; it must be 0 or more"):
            kl_penalized(zeros, zeros, zeros, MASK, weight=weight)
