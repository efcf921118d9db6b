import math
import random
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arealite import dist
from arealite.algo.advantages import group_advantages
from arealite.errors import ConfigError, TrajectoryError
from arealite.training.packing import (
    Aggregation,
    attach,
    balance,
    best_fit,
    deal,
    pack,
    training_work,
)
from arealite.types import MicroBatch, Trajectory
from tests.training.helpers import make_groups, make_trajectory

Packed = list[list[MicroBatch]]


Item = TypeVar("Item")


def joined(lists: list[list[Item]]) -> list[Item]:
    return list(chain.from_iterable(lists))


class Gathered(Exception):
    """Carries what a rank would send."""


def pack_on_ranks(
    groups: list[list[Trajectory]], num_ranks: int, **options: object
) -> list[Packed]:
    """What `pack` returns on each of num_ranks ranks that own groups rank, rank + num_ranks, ..."""

    def run(rank: int, gather: object) -> Packed:
        mine = groups[rank::num_ranks]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "rank", lambda: rank)
            patch.setattr(dist, "world_size", lambda: num_ranks)
            patch.setattr(dist, "gather", gather)
            return pack(mine, group_advantages(mine), **options)  # type: ignore[arg-type]

    def send(item: object) -> list[object]:
        raise Gathered(item)

    sent = []
    for rank in range(num_ranks):
        with pytest.raises(Gathered) as caught:
            run(rank, send)
        sent.append(caught.value.args[0])
    return [run(rank, lambda _: sent) for rank in range(num_ranks)]


def token_rows(mbs: list[MicroBatch]) -> list[tuple[float, ...]]:
    """Every token with all of its fields, sorted."""
    return sorted(
        row
        for mb in mbs
        for row in zip(
            mb.token_ids.tolist(),
            mb.loss_mask.tolist(),
            mb.behavior_logprobs.tolist(),
            mb.versions.tolist(),
            mb.temperature.tolist(),
            mb.advantages.tolist(),
            mb.loss_weight.tolist(),
            strict=True,
        )
    )


# ---- one micro-batch, by hand


def test_two_trajectories_are_laid_end_to_end():
    first, second = make_trajectory(1, 2, seed=1), make_trajectory(1, 1, seed=2, temperature=0.5)
    [[mb]] = pack(
        [[first, second]],
        [[2.0, -1.0]],
        num_minibatches=1,
        max_tokens=100,
        aggregation="token",
    )
    assert mb.token_ids.tolist() == first.token_ids + second.token_ids
    assert mb.cu_seqlens.tolist() == [0, 3, 5]
    assert mb.loss_mask.tolist() == [False, True, True, False, True]
    assert mb.versions.tolist() == [-1, 0, 0, -1, 0]
    assert mb.temperature.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert mb.advantages.tolist() == [0.0, 2.0, 2.0, 0.0, -1.0]
    expected = first.behavior_logprobs + second.behavior_logprobs
    assert mb.behavior_logprobs.tolist() == pytest.approx(expected)
    dtypes = (torch.int64, torch.int32, torch.bool, torch.float32)
    assert (mb.token_ids.dtype, mb.cu_seqlens.dtype, mb.loss_mask.dtype) == dtypes[:3]
    assert {mb.temperature.dtype, mb.advantages.dtype, mb.loss_weight.dtype} == {dtypes[3]}


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", [0, 1 / 3, 1 / 3, 0, 1 / 3]),  # 3 trainable tokens
        ("sequence", [0, 1 / 4, 1 / 4, 0, 1 / 2]),  # 2 sequences, of 2 tokens and of 1
        ("constant", [0, 1 / 16, 1 / 16, 0, 1 / 16]),  # 2 sequences times max_length
    ],
)
def test_loss_weight_is_the_chosen_mean_over_the_batch(
    aggregation: Aggregation, expected: list[float]
):
    [[mb]] = pack(
        [[make_trajectory(1, 2), make_trajectory(1, 1)]],
        [[1.0, 1.0]],
        num_minibatches=1,
        max_tokens=100,
        aggregation=aggregation,
        max_length=8,
    )
    assert mb.loss_weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_trajectory_without_a_sampled_token_changes_no_weight(aggregation: Aggregation):
    def weights(group: list[Trajectory]) -> list[float]:
        [[mb]] = pack(
            [group],
            [[1.0] * len(group)],
            num_minibatches=1,
            max_tokens=100,
            aggregation=aggregation,
            max_length=8,
        )
        return mb.loss_weight[mb.loss_mask].tolist()

    group = [make_trajectory(1, 2), make_trajectory(1, 1)]
    assert weights([*group, make_trajectory(3, 0)]) == weights(group)


def test_advantages_may_differ_from_token_to_token():
    [[mb]] = pack(
        [[make_trajectory(1, 3)]],
        [[[9.0, 1.0, 2.0, 3.0]]],
        num_minibatches=1,
        max_tokens=100,
        aggregation="token",
    )
    assert mb.advantages.tolist() == [0.0, 1.0, 2.0, 3.0]


# ---- over minibatches and ranks

groups_of_lengths = st.lists(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 12)), min_size=1, max_size=4),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(
    lengths=groups_of_lengths,
    num_ranks=st.integers(1, 4),
    max_tokens=st.integers(20, 60),
    num_minibatches=st.integers(1, 3),
    aggregation=st.sampled_from(["token", "sequence", "constant"]),
)
def test_any_number_of_ranks_and_any_cap_train_on_the_same_tokens_with_the_same_weights(
    lengths: list[list[tuple[int, int]]],
    num_ranks: int,
    max_tokens: int,
    num_minibatches: int,
    aggregation: str,
):
    groups = [
        [
            make_trajectory(*length, seed=31 * row + i, row_index=row, reward=i % 2)
            for i, length in enumerate(group)
        ]
        for row, group in enumerate(lengths)
    ]
    num_minibatches = min(num_minibatches, sum(map(len, groups)))
    options = {
        "num_minibatches": num_minibatches,
        "aggregation": aggregation,
        "max_length": 16,
    }
    [whole] = pack_on_ranks(groups, 1, max_tokens=10_000, **options)
    ranks = pack_on_ranks(groups, num_ranks, max_tokens=max_tokens, **options)
    for index in range(num_minibatches):
        parts = [rank[index] for rank in ranks]
        assert len({len(part) for part in parts}) == 1
        assert all(len(mb.token_ids) <= max_tokens for part in parts for mb in part)
        assert token_rows([mb for part in parts for mb in part]) == token_rows(whole[index])


def test_a_rank_without_work_gets_empty_micro_batches_so_that_ranks_stay_in_step():
    ranks = pack_on_ranks(
        [[make_trajectory(2, 8), make_trajectory(2, 8)]],
        3,
        num_minibatches=1,
        max_tokens=10,
        aggregation="token",
    )
    assert [[mb.num_sequences for mb in rank[0]] for rank in ranks] == [[1], [1], [0]]
    empty = ranks[2][0][0]
    assert empty.cu_seqlens.tolist() == [0]
    assert empty.token_ids.shape == empty.loss_weight.shape == (0,)
    assert empty.token_ids.dtype == torch.int64


def test_minibatches_follow_the_order_of_rows_and_differ_by_at_most_one_trajectory():
    groups = make_groups(num_groups=5, group_size=1)[::-1]
    minibatches = pack(
        groups,
        group_advantages(groups),
        num_minibatches=2,
        max_tokens=1000,
        aggregation="token",
    )
    by_row = [group[0].token_ids for group in groups[::-1]]
    assert [mb.num_sequences for [mb] in minibatches] == [2, 3]
    assert [mb.token_ids.tolist() for [mb] in minibatches] == [
        joined(by_row[:2]),
        joined(by_row[2:]),
    ]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9),
    num_ranks=st.integers(1, 3),
    num_minibatches=st.integers(1, 3),
)
def test_groups_that_are_kept_stand_side_by_side_in_their_order(
    sizes: list[int], num_ranks: int, num_minibatches: int
):
    groups = [
        [
            make_trajectory(2, 1 + (7 * row + 3 * place) % 9, row_index=row, seed=10 * row + place)
            for place in range(size)
        ]
        for row, size in enumerate(sizes)
    ]
    num_minibatches = min(num_minibatches, len(groups))
    ranks = pack_on_ranks(
        groups,
        num_ranks,
        num_minibatches=num_minibatches,
        max_tokens=44,
        aggregation="sequence",
        keep_groups=True,
    )
    texts = {row: [each.token_ids for each in group] for row, group in enumerate(groups)}
    found = []
    for micro_batch in joined(joined(ranks)):
        ends = micro_batch.cu_seqlens.tolist()
        sequences = [micro_batch.token_ids[a:b].tolist() for a, b in pairwise(ends)]
        while sequences:
            row = next(row for row, group in texts.items() if group[0] == sequences[0])
            assert sequences[: sizes[row]] == texts[row]
            del sequences[: sizes[row]]
            found.append(row)
    assert sorted(found) == list(range(len(groups)))


def test_a_kept_group_that_does_not_fit_is_refused():
    groups = [[make_trajectory(2, 4, row_index=0), make_trajectory(2, 4, row_index=0)]]
    options: Any = {"num_minibatches": 1, "aggregation": "token", "keep_groups": True}
    with pytest.raises(ConfigError, match=r"A group, which is kept together, has 12 tokens.* 11"):
        pack(groups, [[0.0, 0.0]], max_tokens=11, **options)


def test_groups_without_a_row_cannot_be_kept():
    groups = [[make_trajectory(2, 4)], [make_trajectory(2, 4)]]
    options: Any = {"num_minibatches": 1, "aggregation": "token", "keep_groups": True}
    with pytest.raises(TrajectoryError, match="no row_index"):
        pack(groups, [[0.0], [0.0]], max_tokens=100, **options)


def test_packing_the_same_groups_again_gives_the_same_tensors():
    options = {"num_minibatches": 2, "max_tokens": 64, "aggregation": "token"}
    [first], [second] = (pack_on_ranks(make_groups(), 1, **options) for _ in range(2))
    for mb, again in zip(joined(first), joined(second), strict=True):
        assert torch.equal(mb.token_ids, again.token_ids)
        assert torch.equal(mb.loss_weight, again.loss_weight)


# ---- the two rules


def test_one_long_sequence_is_balanced_by_all_the_short_ones():
    assert balance([8, 1, 1, 1, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5, 6, 7, 8]]


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 5))
def test_balance_gives_each_item_to_one_rank_and_keeps_the_bound_of_longest_first(
    work: list[int], num_ranks: int
):
    ranks = balance(work, num_ranks)
    assert sorted(joined(ranks)) == list(range(len(work)))
    largest = max(sum(work[i] for i in rank) for rank in ranks)
    # Graham: the last item put on the fullest rank went to the emptiest one.
    assert largest <= sum(work) / num_ranks + max(work, default=0) * (1 - 1 / num_ranks) + 1e-9


def test_many_items_over_many_ranks_are_balanced_to_a_thousandth():
    dice = random.Random(0)
    work = [dice.lognormvariate(0, 0.3) for _ in range(8_192)]
    loads = [sum(work[i] for i in rank) for rank in balance(work, 64)]
    assert max(loads) <= 1.001 * sum(work) / 64


@pytest.mark.parametrize("seed", range(4))
def test_eight_sequences_per_rank_are_enough_to_balance_them(seed: int):
    lengths = np.random.default_rng(seed).lognormal(6.5, 0.5, 512).astype(int).tolist()
    work = [training_work(length) for length in lengths]
    loads = [sum(work[index] for index in rank) for rank in balance(work, 64)]
    assert max(loads) <= 1.001 * sum(work) / 64


def test_items_are_swapped_where_longest_first_leaves_ranks_uneven():
    # Longest first gives 3 + 2 + 2 and 3 + 2, the swap of a 3 with a 2 gives 6 and 6.
    work = [3, 3, 2, 2, 2]
    loads = [sum(work[i] for i in rank) for rank in balance(work, 2)]
    assert sorted(loads) == [6, 6]


def fewest_bins(lengths: list[int], max_tokens: int) -> int:
    """By trying every bin for every item."""

    def place(index: int, rooms: tuple[int, ...]) -> int:
        if index == len(lengths):
            return len(rooms)
        found = place(index + 1, (*rooms, max_tokens - lengths[index]))
        for i, room in enumerate(rooms):
            if room >= lengths[index]:
                fuller = (*rooms[:i], room - lengths[index], *rooms[i + 1 :])
                found = min(found, place(index + 1, fuller))
        return found

    return place(0, ())


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=6), st.integers(40, 80))
@example([2, 2, 16, 17, 23, 24], 42)  # best: 24 + 16 + 2 and 23 + 17 + 2
def test_a_few_sequences_need_at_most_one_bin_more_than_the_best_packing(
    lengths: list[int], max_tokens: int
):
    assert len(best_fit(lengths, max_tokens)) <= fewest_bins(lengths, max_tokens) + 1


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40) | st.sampled_from([1, 20, 40]), max_size=200),
    st.integers(40, 300),
)
def test_bins_hold_each_sequence_once_below_the_cap_and_no_later_one_would_fit_into_an_earlier(
    lengths: list[int], max_tokens: int
):
    bins = best_fit(lengths, max_tokens)
    assert sorted(joined(bins)) == list(range(len(lengths)))
    rooms = [max_tokens - sum(lengths[i] for i in chosen) for chosen in bins]
    assert all(room >= 0 for room in rooms)
    for number, room in enumerate(rooms):
        assert all(lengths[i] > room for i in joined(bins[number + 1 :]))
    assert best_fit(lengths, max_tokens) == bins


@pytest.mark.parametrize(("mean", "sigma"), [(900, 1.0), (2_000, 0.5), (500, 0.3)])
def test_thousands_of_sequences_need_a_thousandth_more_bins_than_the_lower_bound(
    mean: int, sigma: float
):
    dice, cap = random.Random(mean), 8_192
    drawn = [dice.lognormvariate(math.log(mean) - sigma**2 / 2, sigma) for _ in range(20_000)]
    lengths = [min(cap, max(1, round(length))) for length in drawn]
    bound = math.ceil(sum(lengths) / cap)
    assert len(best_fit(lengths, cap)) <= bound + max(1, bound // 1_000)


def test_best_fit_refuses_a_sequence_longer_than_the_cap():
    with pytest.raises(ConfigError, match=r"has 11 tokens.*at most 10\b"):
        best_fit([3, 11, 10], 10)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 80), st.integers(1, 5))
def test_a_plan_gives_ranks_equal_numbers_of_micro_batches_below_the_cap(
    lengths: list[int], max_tokens: int, num_ranks: int
):
    ranks = deal(lengths, max_tokens, num_ranks)
    assert sorted(joined(joined(ranks))) == list(range(len(lengths)))
    assert len(ranks) == num_ranks
    assert len({len(bins) for bins in ranks}) == 1
    bins = joined(ranks)
    assert all(sum(lengths[i] for i in chosen) <= max_tokens for chosen in bins)
    assert all(chosen == sorted(chosen) for chosen in bins)


def test_a_plan_balances_tokens_of_one_long_sequence_and_eight_short_ones():
    ranks = deal([8, 1, 1, 1, 1, 1, 1, 1, 1], 8, 2)
    assert ranks == [[[0]], [[1, 2, 3, 4, 5, 6, 7, 8]]]


# ---- errors and attach


def test_a_sequence_longer_than_the_cap_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"30 tokens.*at most 20.*micro_batch_tokens to 30"):
        pack(
            [[make_trajectory(10, 15), make_trajectory(10, 20)]],
            [[1.0, 1.0]],
            num_minibatches=2,
            max_tokens=20,
            aggregation="token",
        )


def test_more_minibatches_than_trajectories_are_refused():
    with pytest.raises(ConfigError, match=r"1 trajectories cannot make num_minibatches=2"):
        pack(
            [[make_trajectory(1, 2)]],
            [[1.0]],
            num_minibatches=2,
            max_tokens=20,
            aggregation="token",
        )


@pytest.mark.parametrize(
    ("aggregation", "message"), [("constant", "max_length"), ("mean", "none of .*'token'")]
)
def test_an_aggregation_that_cannot_be_computed_is_refused(aggregation: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        pack(
            [[make_trajectory(1, 2)]],
            [[1.0]],
            num_minibatches=1,
            max_tokens=20,
            aggregation=aggregation,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": [True, True, True]}, "first token is trainable"),
        ({"loss_mask": [False, True]}, "2 loss_mask for 3 token_ids"),
        ({"versions": [0]}, "1 versions for 3 token_ids"),
        ({"behavior_logprobs": []}, "0 behavior_logprobs for 3 token_ids"),
    ],
)
def test_a_misaligned_trajectory_is_refused_with_what_is_wrong(
    change: dict[str, list[bool]], message: str
):
    broken = replace(make_trajectory(1, 2), **change)  # type: ignore[arg-type]
    with pytest.raises(TrajectoryError, match=message):
        pack([[broken]], [[1.0]], num_minibatches=1, max_tokens=20, aggregation="token")


def test_advantages_of_another_number_of_trajectories_are_refused():
    with pytest.raises(TrajectoryError, match="do not match"):
        pack(
            [[make_trajectory(1, 2)]],
            [[1.0, 2.0]],
            num_minibatches=1,
            max_tokens=20,
            aggregation="token",
        )


def test_attach_fills_only_the_named_field_and_keeps_no_gradient():
    [[mb]] = pack(
        [[make_trajectory(1, 2)]],
        [[1.0]],
        num_minibatches=1,
        max_tokens=20,
        aggregation="token",
    )
    values = torch.tensor([0.0, -1.0, -2.0], requires_grad=True)
    [attached] = attach([mb], proximal_logprobs=[values])
    assert attached.proximal_logprobs.tolist() == [0.0, -1.0, -2.0]
    assert not attached.proximal_logprobs.requires_grad
    assert attached.ref_logprobs.shape == mb.proximal_logprobs.shape == (0,)
    assert attached.token_ids is mb.token_ids


def test_attach_refuses_values_of_another_minibatch():
    [[mb]] = pack(
        [[make_trajectory(1, 2)]],
        [[1.0]],
        num_minibatches=1,
        max_tokens=20,
        aggregation="token",
    )
    with pytest.raises(ConfigError, match=r"ref_logprobs has shapes \[\[2\]\].*\[\[3\]\]"):
        attach([mb], ref_logprobs=[torch.zeros(2)])
    with pytest.raises(ConfigError, match="proximal_logprobs has shapes"):
        attach([mb], proximal_logprobs=[])
