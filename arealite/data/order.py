"""The order in which a run meets its rows: a pure function, so a killed run can continue it."""

from functools import lru_cache

import numpy as np

from arealite.errors import DataError


class RowOrder:
    """Endless order over the rows of a data set, shuffled anew for every epoch.

    `order[place]` is the row at that place of the run: places 0 to n - 1 are epoch 0, and every
    epoch has each row exactly once. It depends on nothing but `num_rows`, `seed` and `place`.
    """

    def __init__(self, num_rows: int, *, seed: int) -> None:
        if num_rows < 1:
            raise DataError(f"An order over {num_rows} rows has no first row. Check the data set.")
        self.num_rows = num_rows
        self.seed = seed

    def __getitem__(self, place: int) -> int:
        if place < 0:
            raise IndexError(f"Place {place} is before the start of the run.")
        epoch, index = divmod(place, self.num_rows)
        return int(_permutation(self.num_rows, self.seed, epoch)[index])


# Two, because episodes around the end of an epoch take turns between it and the next one.
@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, not default_rng: NumPy promises never to change its stream (NEP 19).
    words = [seed >> shift & 0xFFFF_FFFF for shift in (0, 32)] + [epoch]
    return np.random.RandomState(words).permutation(num_rows)
