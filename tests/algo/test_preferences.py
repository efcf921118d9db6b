import math

import pytest
import torch

from arealite.algo.preferences import dpo_loss, preference_loss


def test_a_policy_that_is_the_reference_has_the_loss_of_a_coin():
    chosen, rejected = torch.tensor([-3.0, -9.0]), torch.tensor([-4.0, -2.0])
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_by_hand():
    chosen = torch.tensor([-3.0], requires_grad=True)
    rejected = torch.tensor([-5.0], requires_grad=True)
    loss = dpo_loss(chosen, rejected, torch.tensor([-4.0]), torch.tensor([-4.5]), beta=0.5)
    # Margins 2 and .5: half of 1.5 is .75.
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.75)))
    of_chosen, of_rejected = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert of_chosen.item() == pytest.approx(-0.5 / (1 + math.exp(0.75)))
    assert of_rejected.item() == pytest.approx(-of_chosen.item())


def test_a_reward_model_learns_the_difference_of_two_scores():
    loss = preference_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])


def test_hopeless_pairs_stay_finite():
    far = torch.tensor([1e5], requires_grad=True)
    for loss in (
        preference_loss(-far, far),
        dpo_loss(-far, far, torch.zeros(1), torch.zeros(1), beta=1.0),
    ):
        [gradient] = torch.autograd.grad(loss.sum(), far)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
