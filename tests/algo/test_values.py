import math

import pytest
import torch

from arealite.algo.values import explained_variance, value_loss

MASK = torch.tensor([True, True, True, False])


def test_a_clipped_value_loss_by_hand():
    values = torch.tensor([1.0, 2.0, 0.1, math.nan], requires_grad=True)
    old, returns = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 2.0, 0.0])
    loss, stopped = value_loss(values, old, returns, MASK, clip=0.5)
    # The second moved by 1 and may move by .5: from 1.5 it is farther from 3.
    assert loss.tolist() == pytest.approx([0.5, 1.5**2 / 2, 1.9**2 / 2, 0.0])
    assert stopped.tolist() == [False, True, False, False]
    [gradient] = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == pytest.approx([1.0, 0.0, -1.9, 0.0])


def test_a_critic_that_went_too_far_may_come_back():
    values = torch.tensor([3.0], requires_grad=True)
    loss, stopped = value_loss(values, torch.tensor([0.0]), torch.tensor([1.0]), MASK[:1])
    assert loss.tolist() == [2.0]  # (3 - 1)^2 / 2 is more than (.5 - 1)^2 / 2
    assert not stopped.any()


def test_without_a_clip_it_is_half_the_squared_error():
    values, returns = torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0])
    loss, stopped = value_loss(values, values * 0, returns, MASK[:2], clip=None)
    assert loss.tolist() == [0.5, 4.5]
    assert not stopped.any()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 2.0, 4.0, 99.0], 1.0),
        ([2.0, 2.0, 2.0, 99.0], 0.0),
        ([5.0, 7.0, 9.0, 99.0], 1.0),  # a constant error is not seen
        ([4.0, 2.0, 0.0, 99.0], -3.0),
    ],
)
def test_explained_variance_by_hand(values: list[float], expected: float):
    returns = torch.tensor([0.0, 2.0, 4.0, -50.0])
    assert explained_variance(torch.tensor(values), returns, MASK) == pytest.approx(expected)


def test_equal_returns_have_nothing_to_explain():
    assert math.isnan(explained_variance(torch.zeros(4), torch.ones(4), MASK))
    assert math.isnan(explained_variance(torch.zeros(4), torch.ones(4), ~MASK[:1].expand(4)))


def test_a_critic_that_fell_too_far_in_one_step_has_no_gradient_either():
    values = torch.tensor([-1.0], requires_grad=True)
    loss, stopped = value_loss(values, torch.tensor([1.0]), torch.tensor([-3.0]), MASK[:1])
    # From 1 it may fall to .5 where nothing is said, which is 3.5 from the return.
    assert loss.tolist() == [3.5**2 / 2]
    assert stopped.tolist() == [True]
    [gradient] = torch.autograd.grad(loss.sum(), values)
    assert gradient.tolist() == [0.0]
