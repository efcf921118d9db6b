import math

import pytest
import torch

from arealite.algo.losses import clipped_surrogate, entropy, importance_weight
from arealite.errors import ConfigError

CURRENT = torch.tensor([-1.0, -0.5, -2.0, -0.1])
PROXIMAL = torch.tensor([-1.1, -0.9, -1.8, -0.1])
BEHAVIOR = torch.tensor([-1.0, -1.2, -4.0, -0.1])
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, -0.5])
ALL = torch.ones(4, dtype=torch.bool)


def mean_loss(cap: float) -> float:
    surrogate, _ = clipped_surrogate(CURRENT, PROXIMAL, ADVANTAGES, ALL, 0.2, 0.2)
    weight, _ = importance_weight(PROXIMAL, BEHAVIOR, ALL, cap=cap)
    return -(weight * surrogate).mean().item()


def test_decoupled_loss_matches_the_value_computed_outside_of_this_project():
    assert mean_loss(cap=5.0) == pytest.approx(-0.529957642, abs=1e-7)
    assert mean_loss(cap=math.inf) == pytest.approx(1.317306382, abs=1e-6)


def test_the_token_over_the_cap_is_dropped_and_the_others_keep_their_weight():
    weight, dropped = importance_weight(PROXIMAL, BEHAVIOR, ALL, cap=5.0)
    assert dropped.tolist() == [False, False, True, False]  # exp(2.2) = 9.03
    expected = [math.exp(-0.1), math.exp(0.3), 0.0, 1.0]
    assert weight.tolist() == pytest.approx(expected)


def test_a_policy_on_its_own_samples_has_weight_one():
    weight, dropped = importance_weight(BEHAVIOR, BEHAVIOR, ALL, cap=5.0)
    assert weight.tolist() == [1.0] * 4
    assert not dropped.any()


def test_at_the_start_of_a_step_the_gradient_is_that_of_reinforce():
    logprobs = PROXIMAL.clone().requires_grad_()
    surrogate, clipped = clipped_surrogate(logprobs, PROXIMAL, ADVANTAGES, ALL, 0.2, 0.28)
    surrogate.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == ADVANTAGES.tolist()
    assert not clipped.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_clipped"),
    [
        (1.27, 1.0, False),
        (1.29, 1.0, True),
        (1.29, -1.0, False),  # moving back is always allowed
        (0.81, -1.0, False),
        (0.79, -1.0, True),
        (0.79, 1.0, False),
    ],
)
def test_gradient_stops_only_where_the_ratio_left_the_clip_in_the_direction_of_the_advantage(
    ratio: float, advantage: float, is_clipped: bool
):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    surrogate, clipped = clipped_surrogate(
        logprobs, torch.zeros(1), torch.tensor([advantage]), ALL[:1], 0.2, 0.28
    )
    surrogate.sum().backward()
    assert clipped.tolist() == [is_clipped]
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0.0 if is_clipped else ratio * advantage)


@pytest.mark.parametrize("gap", [1e4, -1e4, 200.0, 88.8, math.inf, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("is_trainable", [True, False])
def test_extreme_gaps_give_finite_values_and_gradients(
    gap: float, advantage: float, is_trainable: bool
):
    logprobs = torch.tensor([gap], requires_grad=True)
    mask = torch.tensor([is_trainable])
    surrogate, _ = clipped_surrogate(
        logprobs, torch.zeros(1), torch.tensor([advantage]), mask, 0.2, 0.28
    )
    surrogate.sum().backward()
    weight, _ = importance_weight(logprobs.detach(), torch.zeros(1), mask, cap=math.inf)
    assert logprobs.grad is not None
    assert surrogate.isfinite().all()
    assert logprobs.grad.isfinite().all()
    assert weight.isfinite().all()


def test_masked_tokens_have_no_gradient_are_never_clipped_and_never_dropped():
    logprobs = torch.tensor([5.0, 5.0], requires_grad=True)
    mask = torch.tensor([False, True])
    surrogate, clipped = clipped_surrogate(
        logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), mask, 0.2, 0.28
    )
    surrogate.sum().backward()
    weight, dropped = importance_weight(logprobs, torch.zeros(2), mask, cap=5.0)
    assert logprobs.grad is not None
    assert logprobs.grad[0] == 0
    assert clipped.tolist() == [False, False]
    assert dropped.tolist() == [False, True]
    assert weight.tolist() == [1.0, 0.0]
    assert not weight.requires_grad


def test_log_probs_that_were_not_attached_are_named_with_the_remedy():
    with pytest.raises(ConfigError, match=r"proximal_logprobs has 0 values for 4.*attach"):
        clipped_surrogate(CURRENT, torch.empty(0), ADVANTAGES, ALL, 0.2, 0.2)
    with pytest.raises(ConfigError, match=r"^proximal_logprobs has 0 values for 4"):
        importance_weight(torch.empty(0), BEHAVIOR, ALL, cap=5.0)


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_a_cap_that_would_drop_everything_is_refused(cap: float):
    with pytest.raises(ConfigError, match="cap"):
        importance_weight(PROXIMAL, BEHAVIOR, ALL, cap=cap)


def test_the_entropy_of_equal_certain_and_uneven_choices():
    uneven = [math.log(0.5), math.log(0.25), math.log(0.25)]
    logits = torch.tensor([[7.0] * 3, [1e4, 0.0, 0.0], uneven, [math.nan] * 3])
    found = entropy(logits, torch.tensor([True, True, True, False]))
    assert found.tolist() == pytest.approx([math.log(3), 0.0, 1.5 * math.log(2), 0.0])


def test_the_gradient_of_the_entropy_by_its_closed_form():
    logits = torch.tensor([[0.3, -0.2, 1.0], [2.0, 0.0, -1.0]], dtype=torch.float64)
    logits.requires_grad_()
    [gradient] = torch.autograd.grad(entropy(logits, torch.tensor([True, False])).sum(), logits)
    p = [math.exp(x) for x in (0.3, -0.2, 1.0)]
    p = [each / sum(p) for each in p]
    whole = -sum(each * math.log(each) for each in p)
    # d H / d logit = -p (log p + H)
    assert gradient[0].tolist() == pytest.approx([-q * (math.log(q) + whole) for q in p])
    assert gradient[1].tolist() == [0.0] * 3


def test_what_can_not_be_drawn_has_no_entropy_and_no_gradient():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    found = entropy(logits, ALL[:1])
    [gradient] = torch.autograd.grad(found.sum(), logits)
    assert found.tolist() == pytest.approx([math.log(2)])
    assert gradient.tolist() == [[0.0, 0.0, 0.0]]


def test_a_weight_at_the_cap_is_kept_and_the_cap_may_be_below_one():
    weight, dropped = importance_weight(BEHAVIOR, BEHAVIOR, ALL, cap=1.0)
    assert weight.tolist() == [1.0] * 4
    assert not dropped.any()
    weight, dropped = importance_weight(PROXIMAL, BEHAVIOR, ALL, cap=0.95)
    assert weight.tolist() == pytest.approx([math.exp(-0.1), 0.0, 0.0, 0.0])
    assert dropped.tolist() == [False, True, True, True]
