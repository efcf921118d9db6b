"""The other objectives of the family, beside slow ones in plain Python."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arealite.algo.losses import (
    cispo_surrogate,
    clipped_surrogate,
    dual_clipped,
    mean_of_sequence,
    sapo_surrogate,
    sequence_surrogate,
    sum_of_sequence,
    tv_surrogate,
)
from arealite.errors import ConfigError

# (current, proximal, advantage, is trained on) of a token; sequences of them.
Token = tuple[float, float, float, bool]
TOKENS = st.tuples(st.floats(-3, -0.01), st.floats(-3, -0.01), st.floats(-2, 2), st.booleans())
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=4)


Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def packed(sequences: list[list[Token]]) -> Packed:
    """Current with gradient, proximal, advantages and mask, all [T]."""
    current, proximal, advantages, mask = zip(*flat(sequences), strict=True)
    numbers = [torch.tensor(v, dtype=torch.float64) for v in (current, proximal, advantages)]
    return numbers[0].requires_grad_(), numbers[1], numbers[2], torch.tensor(mask)


def ends_of(sequences: list[list[Token]]) -> torch.Tensor:
    """[N + 1] cu_seqlens."""
    return torch.tensor([0, *map(len, sequences)]).cumsum(0).int()


def flat(sequences: list[list[Token]]) -> list[Token]:
    return [token for sequence in sequences for token in sequence]


def gradient_of(total: torch.Tensor, of: torch.Tensor) -> list[float]:
    return torch.autograd.grad(total, of)[0].tolist()


def by_difference(total: Callable[[list[float]], float], at: list[float]) -> list[float]:
    """Gradient by central differences."""
    found = []
    for place in range(len(at)):
        up, down = list(at), list(at)
        up[place] += 1e-6
        down[place] -= 1e-6
        found.append((total(up) - total(down)) / 2e-6)
    return found


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


@given(SEQUENCES)
def test_gspo_has_one_ratio_per_sequence(sequences: list[list[Token]]):
    tokens, ends = packed(sequences), ends_of(sequences)
    surrogate, clipped = sequence_surrogate(*tokens, ends, 0.2, 0.3)
    expected, is_clipped = [], []
    for sequence in sequences:
        gaps = [now - before for now, before, _, is_trained in sequence if is_trained]
        ratio = math.exp(sum(gaps) / len(gaps)) if gaps else 1.0
        for _, _, advantage, is_trained in sequence:
            each = ratio if is_trained else 1.0
            limited = clip(each, 0.8, 1.3) * advantage
            expected.append(min(each * advantage, limited))
            is_clipped.append(is_trained and limited < each * advantage)
    assert surrogate.tolist() == pytest.approx(expected, abs=1e-12)
    assert clipped.tolist() == is_clipped


def test_the_gradient_of_gspo_is_shared_by_the_tokens_of_a_sequence():
    sequences = [[(-1.0, -1.1, 2.0, True), (-0.5, -0.4, 2.0, True)], [(-2.0, -2.0, -1.0, True)]]
    tokens, ends = packed(sequences), ends_of(sequences)
    surrogate, _ = sequence_surrogate(*tokens, ends, 0.2, 0.2)
    # Ratio 1 twice: d ratio / d current is 1/2 for each of two tokens, and both carry A = 2.
    assert gradient_of(surrogate.sum(), tokens[0]) == pytest.approx([2.0, 2.0, -1.0])


@given(SEQUENCES)
def test_cispo_weighs_reinforce_with_a_clipped_ratio(sequences: list[list[Token]]):
    tokens = packed(sequences)
    surrogate, clipped = cispo_surrogate(*tokens, 0.5, 0.2)
    weights = [
        clip(math.exp(now - before), 0.5, 1.2) * advantage if is_trained else 0.0
        for now, before, advantage, is_trained in flat(sequences)
    ]
    assert gradient_of(surrogate.sum(), tokens[0]) == pytest.approx(weights, abs=1e-12)
    assert clipped.tolist() == [
        is_trained and not 0.5 <= math.exp(now - before) <= 1.2
        for now, before, _, is_trained in flat(sequences)
    ]


@given(SEQUENCES)
def test_sapo_closes_smoothly(sequences: list[list[Token]]):
    tokens = packed(sequences)

    def values(now: list[float]) -> list[float]:
        found = []
        for place, (_, before, advantage, is_trained) in enumerate(flat(sequences)):
            tau = 1.0 if advantage > 0 else 1.05
            ratio = math.exp(now[place] - before) if is_trained else 1.0
            found.append(4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage)
        return found

    surrogate = sapo_surrogate(*tokens)
    assert surrogate.tolist() == pytest.approx(values(tokens[0].tolist()), abs=1e-12)
    slope = by_difference(lambda now: sum(values(now)), tokens[0].tolist())
    assert gradient_of(surrogate.sum(), tokens[0]) == pytest.approx(slope, abs=1e-5)


def test_at_ratio_one_sapo_has_the_gradient_of_ppo():
    tokens = packed([[(-1.0, -1.0, 2.0, True), (-0.3, -0.3, -1.5, True)]])
    assert gradient_of(sapo_surrogate(*tokens).sum(), tokens[0]) == pytest.approx([2.0, -1.5])


@given(SEQUENCES)
def test_dppo_drops_what_moved_too_far_as_a_probability(sequences: list[list[Token]]):
    tokens = packed(sequences)
    surrogate, dropped = tv_surrogate(*tokens, limit=0.1)
    for place, (now, before, advantage, is_trained) in enumerate(flat(sequences)):
        moved = math.exp(now) - math.exp(before)
        is_too_far = moved > 0.1 if advantage > 0 else -moved > 0.1
        is_dropped = is_trained and advantage != 0 and is_too_far
        ratio = math.exp(now - before) if is_trained else 1.0
        assert dropped[place].item() == is_dropped
        expected = 0.0 if is_dropped else ratio * advantage
        assert surrogate[place].item() == pytest.approx(expected, abs=1e-12)


def test_a_rare_token_may_move_by_any_ratio_where_ppo_would_clip_it():
    tokens = packed([[(-5.0, -8.0, 1.0, True)]])
    assert tv_surrogate(*tokens)[1].tolist() == [False]
    assert clipped_surrogate(*tokens, 0.2, 0.2)[1].tolist() == [True]


def test_a_dual_clip_bounds_what_a_negative_advantage_can_do():
    advantages = torch.tensor([-1.0, -1.0, 1.0, -2.0], dtype=torch.float64)
    surrogate = torch.tensor([-9.0, -2.0, 1.2, -6.1], dtype=torch.float64, requires_grad=True)
    bounded, is_cut = dual_clipped(surrogate, advantages, cap=3.0)
    assert bounded.tolist() == [-3.0, -2.0, 1.2, -6.0]
    assert is_cut.tolist() == [True, False, False, True]
    assert gradient_of(bounded.sum(), surrogate) == [0.0, 1.0, 1.0, 0.0]


def test_sums_and_means_of_a_sequence_are_over_what_was_sampled():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    mask = torch.tensor([False, True, True, True, False])
    ends = torch.tensor([0, 3, 4, 5])
    assert sum_of_sequence(values, mask, ends).tolist() == [5.0, 5.0, 5.0, 4.0, 0.0]
    assert mean_of_sequence(values, mask, ends).tolist() == [2.5, 2.5, 2.5, 4.0, 0.0]


Objective = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]
OBJECTIVES: dict[str, Objective] = {
    "ppo": lambda now, before, a, mask, _: clipped_surrogate(now, before, a, mask, 0.2, 0.2)[0],
    "gspo": lambda now, before, a, mask, ends: sequence_surrogate(
        now, before, a, mask, ends, 3e-4, 4e-4
    )[0],
    "cispo": lambda now, before, a, mask, _: cispo_surrogate(now, before, a, mask, 1.0, 0.2)[0],
    "sapo": lambda now, before, a, mask, _: sapo_surrogate(now, before, a, mask),
    "dppo": lambda now, before, a, mask, _: tv_surrogate(now, before, a, mask)[0],
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("gap", [1e4, -1e4, 88.8, 0.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_gaps_give_finite_values_and_gradients(name: str, gap: float, advantage: float):
    current = torch.tensor([gap - 1e4, -1.0], requires_grad=True)
    proximal = torch.tensor([-1e4, -1.0])
    advantages, mask = torch.tensor([advantage, 1.0]), torch.tensor([True, True])
    total = OBJECTIVES[name](current, proximal, advantages, mask, torch.tensor([0, 2])).sum()
    assert total.isfinite()
    assert all(map(math.isfinite, gradient_of(total, current)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_masked_has_no_gradient_whatever_it_is(name: str):
    current = torch.tensor([math.inf, -math.inf, math.nan, -1.0], requires_grad=True)
    proximal, advantages = torch.zeros(4), torch.ones(4)
    nothing, ends = torch.zeros(4, dtype=torch.bool), torch.tensor([0, 2, 4])
    total = OBJECTIVES[name](current, proximal, advantages, nothing, ends).sum()
    assert gradient_of(total, current) == [0.0] * 4


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda t: dual_clipped(t, t, cap=1.0), r"dual clip is 1\.0; it must be above 1"),
        (lambda t: sapo_surrogate(t, t, t, t > 0, tau_negative=0.0), "both must be above 0"),
        (lambda t: sapo_surrogate(t, t[:1], t, t > 0), "proximal_logprobs has 1 values for 2"),
    ],
)
def test_bad_settings_say_what_they_must_be(call: Callable[[torch.Tensor], Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        call(torch.ones(2))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_says_what_was_not_attached(name: str):
    none, three = torch.empty(0), torch.zeros(3)
    with pytest.raises(ConfigError, match=r"^proximal_logprobs has 0 values for 3 tokens.*attach"):
        OBJECTIVES[name](three, none, three, three == 0, torch.tensor([0, 3]))


def test_cispo_is_a_weighted_log_prob_and_nothing_where_nothing_was_sampled():
    tokens = packed([[(-1.0, -2.0, 3.0, True), (-0.5, -0.5, -2.0, True), (-1.0, -1.0, 1.0, False)]])
    # e^1 is clipped to 1.2; the second has ratio 1.
    surrogate, _ = cispo_surrogate(*tokens, 0.5, 0.2)
    assert surrogate.tolist() == pytest.approx([1.2 * 3.0 * -1.0, -2.0 * -0.5, 0.0])


def test_at_its_bound_a_dual_clip_and_dppo_stop_nothing_yet():
    surrogate = torch.tensor([-3.0], requires_grad=True)
    bounded, is_cut = dual_clipped(surrogate, torch.tensor([-1.0]), cap=3.0)
    assert not is_cut.any()
    assert gradient_of(bounded.sum(), surrogate) == [1.0]
    # From impossible to certain: moved by exactly 1.
    assert tv_surrogate(*packed([[(0.0, -1e4, 1.0, True)]]), limit=1.0)[1].tolist() == [False]


def test_dppo_allows_a_fifth_where_nothing_is_said():
    before, nearer, farther = (math.log(chance) for chance in (0.5, 0.69, 0.71))
    tokens = packed([[(nearer, before, 1.0, True), (farther, before, 1.0, True)]])
    assert tv_surrogate(*tokens)[1].tolist() == [False, True]


def test_the_gates_of_sapo_close_as_they_are_set():
    tokens = packed([[(-0.5, -1.0, 2.0, True), (-0.5, -1.0, -2.0, True)]])
    ratio = math.exp(0.5)
    surrogate = sapo_surrogate(*tokens, tau_positive=0.5, tau_negative=0.25)
    assert surrogate.tolist() == pytest.approx(
        [
            8 / (1 + math.exp(-0.5 * (ratio - 1))) * 2,
            16 / (1 + math.exp(-0.25 * (ratio - 1))) * -2,
        ]
    )
    with pytest.raises(ConfigError, match="both must be above 0"):
        sapo_surrogate(*tokens, tau_positive=0.0)
