import pytest
import torch

from arealite.training.fsdp import FSDPConfig
from arealite.training.optimizer import lr_at, make_optimizer, move_states


def rates(num_steps: int, cfg: FSDPConfig) -> list[float]:
    return [lr_at(step, cfg) for step in range(num_steps)]


def test_warm_up_rises_in_equal_parts_to_the_full_rate():
    cfg = FSDPConfig(lr=1.0, warmup_steps=4)
    assert rates(6, cfg) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert rates(3, FSDPConfig(lr=0.5)) == [0.5, 0.5, 0.5]


def test_linear_falls_on_a_line_that_would_be_zero_after_the_last_step():
    cfg = FSDPConfig(lr=1.0, warmup_steps=2, schedule="linear", total_steps=6)
    assert rates(8, cfg) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_cosine_is_halfway_down_in_the_middle_and_ends_at_the_chosen_share():
    cfg = FSDPConfig(lr=2.0, schedule="cosine", total_steps=4, min_lr_ratio=0.1)
    assert lr_at(0, cfg) == pytest.approx(2.0)
    assert lr_at(2, cfg) == pytest.approx(1.1)
    assert lr_at(4, cfg) == lr_at(100, cfg) == pytest.approx(0.2)


def test_weight_decay_leaves_out_biases_and_norms():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimizer = make_optimizer(module, FSDPConfig(lr=0.1, weight_decay=0.5))
    before = [p.detach().clone() for p in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weight, *others = module.parameters()
    torch.testing.assert_close(weight.detach(), before[0] * 0.95)
    for parameter, expected in zip(others, before[1:], strict=True):
        assert torch.equal(parameter, expected)


def test_two_steps_follow_the_published_formula_of_adamw():
    weight = torch.nn.Parameter(torch.tensor([[2.0]]))
    module = torch.nn.Module()
    module.register_parameter("weight", weight)
    optimizer = make_optimizer(module, FSDPConfig(lr=0.1, betas=(0.9, 0.99), eps=1e-8))
    value, mean, square = 2.0, 0.0, 0.0
    for step, gradient in enumerate([3.0, -1.0], start=1):
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        value -= 0.1 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)) ** 0.5 + 1e-8)
        assert weight.item() == pytest.approx(value, rel=1e-5)


def test_every_state_of_every_parameter_is_moved():
    layer = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(layer, FSDPConfig())
    move_states(optimizer, torch.device("meta"))
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert len(states) == 2 * 3
    assert {value.device.type for value in states} == {"meta"}
