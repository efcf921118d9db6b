"""What each function on log-probs and values does with huge gaps, and where nothing was sampled."""

import math
from collections.abc import Callable

import pytest
import torch

from arealite.algo import corrections, kl, losses, preferences, values
from arealite.algo.corrections import (
    banded_weight,
    interpolated_proximal,
    k3_dropped,
    second_moment_dropped,
    sequence_dropped,
    truncated_weight,
)
from arealite.algo.kl import kl_estimate, kl_penalized
from arealite.algo.losses import (
    cispo_surrogate,
    clipped_surrogate,
    dual_clipped,
    entropy,
    importance_weight,
    mean_of_sequence,
    sapo_surrogate,
    sequence_surrogate,
    sum_of_sequence,
    tv_surrogate,
)
from arealite.algo.preferences import dpo_loss, preference_loss
from arealite.algo.values import explained_variance, value_loss

Tensor = torch.Tensor
ENDS = torch.tensor([0, 2, 4])
ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 2.0])
VERSIONS = torch.tensor([0, 3, 1, 2])
ZEROS = torch.zeros(4)

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[T] from log-probs (or values) with gradient, those of another policy, and the mask [T]."""
CALLS: dict[str, Call] = {
    "clipped_surrogate": lambda x, y, m: clipped_surrogate(x, y, ADVANTAGES, m, 0.2, 0.2)[0],
    "dual_clipped": lambda x, y, m: dual_clipped(
        clipped_surrogate(x, y, ADVANTAGES, m, 0.2, 0.2)[0], ADVANTAGES, cap=3.0
    )[0],
    "sequence_surrogate": lambda x, y, m: sequence_surrogate(x, y, ADVANTAGES, m, ENDS, 3e-4, 4e-4)[
        0
    ],
    "cispo_surrogate": lambda x, y, m: cispo_surrogate(x, y, ADVANTAGES, m, 1.0, 0.2)[0],
    "sapo_surrogate": lambda x, y, m: sapo_surrogate(x, y, ADVANTAGES, m),
    "tv_surrogate": lambda x, y, m: tv_surrogate(x, y, ADVANTAGES, m)[0],
    "importance_weight": lambda x, y, m: importance_weight(x, y, m, cap=math.inf)[0],
    "entropy": lambda x, y, m: entropy(torch.stack([x, y, ZEROS], 1), m),
    "mean_of_sequence": lambda x, _, m: mean_of_sequence(x, m, ENDS),
    "sum_of_sequence": lambda x, _, m: sum_of_sequence(x, m, ENDS),
    "truncated_weight": lambda x, y, m: truncated_weight(x, y, m)[0],
    "banded_weight": lambda x, y, m: banded_weight(x, y, m)[0],
    "sequence_dropped": lambda x, y, m: sequence_dropped(
        x, y, m, ENDS, low=0.0, high=2.0, is_geometric=False
    ),
    "sequence_dropped by the geometric mean": lambda x, y, m: sequence_dropped(
        x, y, m, ENDS, low=0.99, high=1.01, is_geometric=True
    ),
    "k3_dropped": lambda x, y, m: k3_dropped(x, y, m, ENDS),
    "k3_dropped by tokens": lambda x, y, m: k3_dropped(x, y, m, ENDS, over="token"),
    "second_moment_dropped": lambda x, y, m: second_moment_dropped(
        [x], [y], [m], gather_over_ranks=lambda each: [each]
    )[0],
    "interpolated_proximal": lambda x, y, m: interpolated_proximal(x, y, VERSIONS, m, 3),
    "kl_estimate by k1": lambda x, y, m: kl_estimate(x, y, m, "k1"),
    "kl_estimate by k2": lambda x, y, m: kl_estimate(x, y, m, "k2"),
    "kl_estimate by k3": lambda x, y, m: kl_estimate(x, y, m, "k3"),
    "kl_penalized": lambda x, y, m: kl_penalized(ADVANTAGES, x, y, m, weight=0.1),
    "value_loss": lambda x, y, m: value_loss(x, y, ADVANTAGES, m, clip=0.5)[0],
    "value_loss without a clip": lambda x, y, m: value_loss(x, y, ADVANTAGES, m, clip=None)[0],
}
ON_PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo_loss": lambda x, y: dpo_loss(x, y, y, x.detach(), beta=0.1),
    "preference_loss": preference_loss,
}
MASK = torch.tensor([True, True, False, True])
NOTHING = torch.zeros(4, dtype=torch.bool)


def test_no_public_function_is_left_out():
    public = {
        name
        for module in (losses, corrections, kl, values, preferences)
        for name, each in vars(module).items()
        if callable(each)
        and not name.startswith("_")
        and getattr(each, "__module__", "") == module.__name__
    }
    here = {name.split(" ")[0] for name in (*CALLS, *ON_PAIRS)}
    assert public == here | {"explained_variance"}


def check_finite(result: Tensor, of: Tensor) -> None:
    assert result.float().isfinite().all()
    if result.requires_grad:
        [gradient] = torch.autograd.grad(result.sum(), of)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("gap", [1e4, -1e4, 200.0, 88.8, -88.8, 0.0])
@pytest.mark.parametrize("hidden", [0.0, math.nan, math.inf, -math.inf])
def test_huge_gaps_and_what_is_masked_leave_values_and_gradients_finite(
    name: str, gap: float, hidden: float
):
    ours = torch.tensor([gap, -1.0, hidden, -gap], requires_grad=True)
    theirs = torch.tensor([0.0, -1.5, 0.0, 0.0])
    check_finite(CALLS[name](ours, theirs, MASK)[MASK], ours)


@pytest.mark.parametrize("name", ON_PAIRS)
@pytest.mark.parametrize("gap", [1e4, -1e4, 200.0, 0.0])
def test_losses_on_hopeless_pairs_are_finite(name: str, gap: float):
    ours = torch.tensor([gap, -gap], requires_grad=True)
    check_finite(ON_PAIRS[name](ours, torch.zeros(2)), ours)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("hidden", [0.0, 1e4, math.nan, math.inf, -math.inf])
def test_where_nothing_was_sampled_nothing_is_dropped_and_nothing_learns(name: str, hidden: float):
    ours = torch.full((4,), hidden, requires_grad=True)
    result = CALLS[name](ours, torch.full((4,), -1.0), NOTHING)
    if result.dtype == torch.bool:
        assert not result.any()
    if result.requires_grad:
        [gradient] = torch.autograd.grad(result.sum(), ours)
        assert gradient.tolist() == [0.0] * 4
    if name.startswith(("value_loss", "kl_estimate", "entropy")):
        assert result.tolist() == [0.0] * 4


def test_a_critic_that_was_asked_nothing_explains_nothing():
    assert math.isnan(explained_variance(torch.full((4,), math.nan), ADVANTAGES, NOTHING))


@pytest.mark.parametrize("name", ["importance_weight", "truncated_weight", "banded_weight"])
def test_tokens_of_the_policy_at_the_start_of_the_step_weigh_one(name: str):
    ours = torch.tensor([-0.1, -3.0, -9.0, -1e4])
    assert CALLS[name](ours, ours.clone(), MASK).tolist() == [1.0] * 4


@pytest.mark.parametrize("name", [name for name in CALLS if "dropped" in name])
def test_tokens_of_the_policy_at_the_start_of_the_step_are_never_dropped(name: str):
    ours = torch.tensor([-0.1, -3.0, -9.0, -1e4])
    assert not CALLS[name](ours, ours.clone(), MASK).any()


@pytest.mark.parametrize(
    "weight_of",
    [
        lambda now, then: importance_weight(now, then, MASK, cap=5.0)[0],
        lambda now, then: truncated_weight(now, then, MASK)[0],
        lambda now, then: banded_weight(now, then, MASK)[0],
    ],
)
def test_where_behavior_is_proximal_the_decoupled_loss_is_that_of_ppo(
    weight_of: Callable[[Tensor, Tensor], Tensor],
):
    before = torch.tensor([-1.0, -0.5, -2.0, -0.3], dtype=torch.float64)
    now = (before + torch.tensor([0.3, -0.4, 0.0, 0.1])).requires_grad_()
    ratio = [math.exp(gap) for gap in (0.3, -0.4, 0.0, 0.1)]
    # Clipped at 1.2 for A = 1; at .8 for A = -1; within for A = 2.
    expected = [1.2, -0.8, 0.0, 2 * ratio[3]]
    found = clipped_surrogate(now, before, ADVANTAGES, MASK, 0.2, 0.2)[0] * weight_of(
        before, before.clone()
    )
    assert found.tolist() == pytest.approx(expected)
    [gradient] = torch.autograd.grad(found.sum(), now)
    assert gradient.tolist() == pytest.approx([0.0, 0.0, 0.0, 2 * ratio[3]])


def test_a_token_of_the_newest_weights_has_the_behavior_policy_as_its_proximal():
    behavior = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    current, versions = torch.full((4,), -9.0), torch.full((4,), 3)
    assert interpolated_proximal(current, behavior, versions, MASK, 3).tolist() == behavior.tolist()
