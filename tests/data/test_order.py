import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.data import RowOrder
from arealite.errors import DataError


@given(num_rows=st.integers(1, 60), seed=st.integers(-5, 2**64), epoch=st.integers(0, 50))
def test_every_epoch_has_each_row_exactly_once(num_rows: int, seed: int, epoch: int):
    order = RowOrder(num_rows, seed=seed)
    places = range(epoch * num_rows, (epoch + 1) * num_rows)
    assert sorted(order[place] for place in places) == list(range(num_rows))


def test_epochs_differ_from_each_other_and_so_do_seeds():
    order = RowOrder(100, seed=1)
    epochs = [tuple(order[epoch * 100 + index] for index in range(100)) for epoch in range(3)]
    other_seed = tuple(RowOrder(100, seed=2)[index] for index in range(100))
    assert len({*epochs, other_seed}) == 4


@given(places=st.lists(st.integers(0, 500), max_size=30))
def test_a_place_has_the_same_row_whatever_was_asked_before(places: list[int]):
    used = RowOrder(7, seed=3)
    assert [used[place] for place in places] == [RowOrder(7, seed=3)[place] for place in places]


def test_the_order_is_the_same_on_every_machine_and_in_every_release():
    # Written down once: a run that is continued after an upgrade must not change its order.
    order = RowOrder(5, seed=1)
    assert [order[place] for place in range(10)] == [3, 2, 4, 1, 0, 2, 0, 3, 4, 1]


def test_a_data_set_of_one_row_repeats_it():
    order = RowOrder(1, seed=9)
    assert [order[place] for place in range(4)] == [0, 0, 0, 0]


def test_an_order_over_no_rows_is_refused():
    with pytest.raises(DataError, match="0 rows"):
        RowOrder(0, seed=1)


def test_a_place_before_the_start_is_refused():
    with pytest.raises(IndexError, match="-1"):
        RowOrder(5, seed=1)[-1]
