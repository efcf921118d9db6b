import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arealite.algo.corrections import (
    banded_weight,
    interpolated_proximal,
    k3_dropped,
    second_moment_dropped,
    sequence_dropped,
    truncated_weight,
)
from arealite.errors import ConfigError

PROXIMAL = torch.tensor([0.1, -1.0, 2.0, 0.0, 9.0], dtype=torch.float64)
BEHAVIOR = torch.zeros(5, dtype=torch.float64)
MASK = torch.tensor([True, True, True, True, False])


def test_a_truncated_weight_keeps_every_token():
    weight, is_cut = truncated_weight(PROXIMAL, BEHAVIOR, MASK, cap=2.0)
    assert weight.tolist() == pytest.approx([math.exp(0.1), math.exp(-1), 2.0, 1.0, 1.0])
    assert is_cut.tolist() == [False, False, True, False, False]


def test_a_banded_weight_drops_what_is_too_large_or_too_small():
    weight, dropped = banded_weight(PROXIMAL, BEHAVIOR, MASK, low=0.5, high=5.0)
    assert weight.tolist() == pytest.approx([math.exp(0.1), 0.0, 0.0, 1.0, 1.0])
    assert dropped.tolist() == [False, True, True, False, False]


def test_sequences_leave_whole_by_the_product_or_the_geometric_mean_of_their_ratios():
    proximal = torch.tensor([0.5, 0.5, 0.004, 0.006, 7.0], dtype=torch.float64)
    mask, ends = torch.tensor([True, True, True, True, False]), torch.tensor([0, 2, 5])
    product = sequence_dropped(
        proximal, BEHAVIOR, mask, ends, low=0.0, high=2.0, is_geometric=False
    )
    assert product.tolist() == [True, True, False, False, False]  # e, and exp(.01)
    mean = sequence_dropped(proximal, BEHAVIOR, mask, ends, low=0.99, high=1.004, is_geometric=True)
    assert mean.tolist() == [True, True, True, True, False]  # exp(.5), and exp(.005)


GAPS = st.lists(st.tuples(st.floats(-2, 2), st.booleans()), max_size=12)


def alone(item: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """What a run of one rank gathers."""
    return [item]


def by_trying(squares: list[float], limit: float) -> int:
    """How many of the smallest may stay so that their mean is below the limit."""
    ordered = sorted(squares)
    for count in range(len(ordered), 0, -1):
        if sum(ordered[:count]) / count < limit:
            return count
    return 0


@given(GAPS, GAPS, st.floats(0.01, 2))
def test_the_second_moment_of_what_stays_is_below_the_limit(
    first: list[tuple[float, bool]], second: list[tuple[float, bool]], limit: float
):
    batches = [batch for batch in (first, second) if batch]
    gaps = [torch.tensor([gap for gap, _ in batch], dtype=torch.float64) for batch in batches]
    masks = [torch.tensor([is_sampled for _, is_sampled in batch]) for batch in batches]
    zeros = [torch.zeros_like(gap) for gap in gaps]
    dropped = second_moment_dropped(gaps, zeros, masks, limit=limit, gather_over_ranks=alone)
    squares = [gap**2 for batch in batches for gap, is_sampled in batch if is_sampled]
    kept = [
        float(gap[at] ** 2)
        for gap, mask, drop in zip(gaps, masks, dropped, strict=True)
        for at in range(len(gap))
        if mask[at] and not drop[at]
    ]
    count = by_trying(squares, limit)
    assert len(kept) <= count  # equal ones leave together
    assert len(kept) == count or sorted(squares)[count - 1] == sorted(squares)[count]
    assert kept == [] or sum(kept) / len(kept) < limit
    assert not any((drop & ~mask).any() for drop, mask in zip(dropped, masks, strict=True))


def test_the_same_tokens_leave_on_one_rank_and_on_two():
    gaps = [torch.tensor([0.1, 0.5, 0.3]), torch.tensor([0.6, 0.05])]
    zeros, masks = (
        [gap * 0 for gap in gaps],
        [torch.ones(len(gap), dtype=torch.bool) for gap in gaps],
    )
    whole = second_moment_dropped(gaps, zeros, masks, gather_over_ranks=alone)
    squares = [[gap.double() ** 2] for gap in gaps]
    for rank in range(2):
        [found] = second_moment_dropped(
            [gaps[rank]], [zeros[rank]], [masks[rank]], gather_over_ranks=lambda _: squares
        )
        assert torch.equal(found, whole[rank])
    # (.01 + .09 + .0025) / 3 = .034; with .25 it would be .088.
    assert [drop.tolist() for drop in whole] == [[False, True, False], [True, False]]


@pytest.mark.parametrize(
    ("age_of_token", "alpha"),
    [((3, 4), 0.0), ((2, 4), 0.5), ((0, 4), 0.75), ((4, 4), 0.0), ((5, 4), 0.0), ((-1, 4), 0.0)],
)
def test_an_interpolated_proximal_is_nearer_to_current_the_older_a_token_is(
    age_of_token: tuple[int, int], alpha: float
):
    sampled_by, version = age_of_token
    current = torch.tensor([-1.0, -1.0], requires_grad=True)
    behavior, mask = torch.tensor([-3.0, 0.0]), torch.tensor([True, False])
    versions = torch.tensor([sampled_by, -1])
    found = interpolated_proximal(current, behavior, versions, mask, version)
    assert found.tolist() == [-3.0 + 2 * alpha, 0.0]
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: truncated_weight(PROXIMAL, BEHAVIOR, MASK, cap=0.0), "cap=0.0 must be above 0"),
        (lambda: banded_weight(PROXIMAL, BEHAVIOR, MASK, low=2, high=1), "high=1 must be above 2"),
        (
            lambda: second_moment_dropped([], [], [], limit=0, gather_over_ranks=alone),
            "limit=0 must be above 0",
        ),
    ],
)
def test_bad_limits_say_what_they_must_be(call: Callable[[], Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        call()


@pytest.mark.parametrize("gap", [1e4, -1e4, math.inf, math.nan])
def test_what_is_masked_never_counts(gap: float):
    proximal, behavior = torch.tensor([gap, 0.0]), torch.zeros(2)
    mask, ends = torch.tensor([False, True]), torch.tensor([0, 2])
    assert truncated_weight(proximal, behavior, mask)[0].tolist() == [1.0, 1.0]
    assert banded_weight(proximal, behavior, mask)[0].tolist() == [1.0, 1.0]
    assert (
        second_moment_dropped([proximal], [behavior], [mask], gather_over_ranks=alone)[0].tolist()
        == [False] * 2
    )
    for is_geometric in (True, False):
        assert not sequence_dropped(
            proximal, behavior, mask, ends, low=0.9, high=1.1, is_geometric=is_geometric
        ).any()


def test_tokens_leave_whose_k3_is_above_the_limit():
    proximal = torch.tensor([0.1, -0.1, 0.5, -0.5, 9.0], dtype=torch.float64)
    ends = torch.tensor([0, 2, 5])
    each = [math.exp(gap) - 1 - gap for gap in (0.1, -0.1, 0.5, -0.5)]
    assert each == pytest.approx([0.00517, 0.00484, 0.14872, 0.10653], abs=1e-5)

    def dropped(limit: float, over: Literal["token", "sequence"]) -> list[bool]:
        return k3_dropped(proximal, BEHAVIOR, MASK, ends, limit=limit, over=over).tolist()

    assert dropped(0.005, "token") == [True, False, True, True, False]
    assert dropped(0.12, "token") == [False, False, True, False, False]
    # Means .005004 and .127626: the ratios themselves would have a geometric mean of 1.
    assert dropped(0.005, "sequence") == [True, True, True, True, False]
    assert dropped(0.00501, "sequence") == [False, False, True, True, False]
    assert dropped(0.128, "sequence") == [False] * 5


def test_the_mean_of_k3_over_what_behavior_samples_is_its_divergence_from_proximal():
    behavior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    proximal = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    divergence = float((behavior * (behavior / proximal).log()).sum())
    # Ten tokens in the shares of the behavior policy are a sequence with that mean.
    drawn = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    now, then = proximal.log()[drawn], behavior.log()[drawn]
    everything, ends = torch.ones(10, dtype=torch.bool), torch.tensor([0, 10])
    assert not k3_dropped(now, then, everything, ends, limit=divergence + 1e-9).any()
    assert k3_dropped(now, then, everything, ends, limit=divergence - 1e-9).all()


def test_what_a_k3_is_taken_over_is_named():
    with pytest.raises(ConfigError, match=r"over='batch' must be 'token' or 'sequence'"):
        k3_dropped(PROXIMAL, BEHAVIOR, MASK, torch.tensor([0, 5]), over="batch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="limit=0 must be above 0"):
        k3_dropped(PROXIMAL, BEHAVIOR, MASK, torch.tensor([0, 5]), limit=0)


def test_a_ratio_at_a_limit_is_still_within_it():
    same, mask, ends = torch.zeros(2), torch.ones(2).bool(), torch.tensor([0, 2])  # of ratio 1
    assert not truncated_weight(same, same, mask, cap=1.0)[1].any()
    for low, high in ((1.0, 2.0), (0.5, 1.0)):
        assert not banded_weight(same, same, mask, low=low, high=high)[1].any()
        for is_geometric in (True, False):
            assert not sequence_dropped(
                same, same, mask, ends, low=low, high=high, is_geometric=is_geometric
            ).any()


def test_what_is_not_said_is_as_in_the_papers():
    mask = torch.ones(2).bool()
    proximal, behavior = torch.tensor([2.3, 5.5]).log(), torch.zeros(2)
    assert truncated_weight(proximal, behavior, mask)[0].tolist() == [2.0, 2.0]
    assert banded_weight(proximal, behavior, mask)[1].tolist() == [False, True]  # high is 5
    assert banded_weight(-proximal, behavior, mask)[1].tolist() == [True, True]  # low is .5
    gaps = torch.tensor([0.1, 0.3])  # squares .01 and .09, whose mean is .05
    [dropped] = second_moment_dropped([gaps], [behavior], [mask], gather_over_ranks=alone)
    assert dropped.tolist() == [False, True]


# Of two sequences, with ratios of e^.5 and e^-.5, and of e^.002 and 1.
BOTH_MOVED = torch.tensor([-1.0, -2.5, -0.498, -3.0], dtype=torch.float64)
BOTH_BEHAVIOR = torch.tensor([-1.5, -2.0, -0.5, -3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("is_geometric", "band", "dropped"),
    [
        (True, (0.9995, 1.0015), [False, False]),  # 1 and e^.001
        (True, (0.9995, 1.0005), [False, True]),
        (False, (0.9995, 1.0015), [False, True]),  # 1 and e^.002
        (False, (1.0005, 1.0025), [True, False]),
    ],
)
def test_the_ratio_of_a_sequence_is_of_proximal_to_behavior(
    is_geometric: bool, band: tuple[float, float], dropped: list[bool]
):
    found = sequence_dropped(
        BOTH_MOVED,
        BOTH_BEHAVIOR,
        torch.ones(4).bool(),
        torch.tensor([0, 2, 4]),
        low=band[0],
        high=band[1],
        is_geometric=is_geometric,
    )
    assert found.tolist() == [dropped[0]] * 2 + [dropped[1]] * 2


def test_a_band_of_sequences_that_holds_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"^high=1 must be above 2"):
        sequence_dropped(
            PROXIMAL, BEHAVIOR, MASK, torch.tensor([0, 5]), low=2, high=1, is_geometric=True
        )


def test_the_second_moment_is_of_the_gap_and_stays_below_its_limit():
    proximal, behavior = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.25, -2.5, -3.25])
    mask = torch.ones(3).bool()
    # Squares of 1/16, 1/4 and 1/16: the mean of all is 1/8, which is not below 1/8.
    [dropped] = second_moment_dropped(
        [proximal], [behavior], [mask], limit=1 / 8, gather_over_ranks=alone
    )
    assert dropped.tolist() == [False, True, False]
    assert second_moment_dropped([], [], [], gather_over_ranks=alone) == []


def test_no_micro_batch_is_lost_where_one_list_is_shorter():
    one, mask = torch.zeros(1), torch.ones(1).bool()
    for short in ([one], [one, one], [mask]), ([one, one], [one, one], [mask]):
        with pytest.raises(ValueError, match="zip"):
            second_moment_dropped(*short, gather_over_ranks=alone)


def test_an_interpolated_proximal_is_as_exact_as_the_log_probs():
    current, behavior = torch.tensor([[-1.0], [-4.0]], dtype=torch.float64)
    found = interpolated_proximal(current, behavior, torch.tensor([0]), MASK[:1], 3)
    assert found.item() == pytest.approx(-2.0, abs=1e-15)  # alpha 2/3
    assert found.dtype == torch.float64


def test_a_k3_at_the_limit_is_still_within_it_and_the_limit_is_a_hundredth_if_not_said():
    gone, mask, ends = torch.tensor([-100.0, 0.0]), torch.ones(2).bool(), torch.tensor([0, 1, 2])
    # exp(-100) - 1 + 100 is 99 in any float.
    assert not k3_dropped(gone, torch.zeros(2), mask, ends, limit=99.0).any()
    near = torch.tensor([0.13, 0.15])  # k3 of .0088 and .0118
    assert k3_dropped(near, torch.zeros(2), mask, ends).tolist() == [False, True]
