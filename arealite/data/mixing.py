"""Several data sets as one, each row with the name of its reward."""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from arealite.data.order import RowOrder
from arealite.errors import ConfigError, DataError
from arealite.types import Row

MAX_ROWS = 10_000_000
"""Of a mixture whose length follows from its shares."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One data set of a mixture."""

    rows: list[Row]
    """As `load_rows` gives them; they stay as they are."""
    reward: str
    """Name of what grades them, for `RewardByRow`."""
    share: float | None = None
    """Of all rows, relative to the other parts; None, then of each part: each row once."""


def mixed(
    *parts: Part, rewards: Collection[str], seed: int, num_rows: int | None = None
) -> list[Row]:
    """The rows of all parts by their shares, in an order that depends on nothing but the seed.

        train_rows = mixed(
            Part(rows=load_rows("some/math", split="train"), reward="math", share=0.7),
            Part(rows=load_rows("some/puzzles", split="train"), reward="zebra", share=0.3),
            rewards=reward.rewards,
            seed=cfg.seed,
        )

    Every row is a copy with the name of its reward as `reward`. Of one part, a row is there as
    often as any other, or once more. Shares hold over all rows; those of a batch vary by chance.

    Args:
        rewards: the names that there are, such as `RewardByRow.rewards`.
        seed: chooses which rows of a part are there once more, and the order.
        num_rows: length of the mixture; None: as short as it can be with each row at least once.

    Raises:
        ConfigError: a name is not among `rewards`, or shares and length do not fit together.
        DataError: a part has no rows, or a row that names another reward already.
    """
    _check_parts(parts, rewards)
    counts = _counts(parts, num_rows)
    rows = [
        row
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
        for row in _repeated(part, count, seed + number)
    ]
    for part, count in zip(parts, counts, strict=True):
        share = count / len(rows)
        _log.info("%.1f %% %s: %d from %d rows", 100 * share, part.reward, count, len(part.rows))
    order = RowOrder(len(rows), seed=seed)
    return [rows[order[place]] for place in range(len(rows))]


def _check_parts(parts: tuple[Part, ...], rewards: Collection[str]) -> None:
    if not parts:
        raise ConfigError("mixed() was given no part. Give it at least one Part(rows=..., ...).")
    for number, part in enumerate(parts, start=1):
        if part.reward not in rewards:
            raise ConfigError(
                f"Part {number} of the mixture has the reward {part.reward!r}, and there are "
                f"{', '.join(rewards)}. Add it to RewardByRow, or name one of these."
            )
        if not part.rows:
            raise DataError(f"Part {number} of the mixture ({part.reward}) has no rows.")
        if part.share is not None and not (math.isfinite(part.share) and part.share > 0):
            raise ConfigError(
                f"Part {number} of the mixture ({part.reward}) has share={part.share}; it must be "
                "above 0. Leave out a part that should not be there."
            )
    if len({part.share is None for part in parts}) > 1:
        raise ConfigError("Some parts of the mixture have a share. Give one to each, or to none.")


def _counts(parts: tuple[Part, ...], num_rows: int | None) -> list[int]:
    """How many rows each part has in the mixture: by the largest remainder, exactly."""
    lengths = [len(part.rows) for part in parts]
    weights = [
        Fraction(length if part.share is None else str(part.share))
        for part, length in zip(parts, lengths, strict=True)
    ]
    shares = [weight / sum(weights) for weight in weights]
    fewest = math.ceil(max(n / share for n, share in zip(lengths, shares, strict=True)))
    if num_rows is None and fewest > MAX_ROWS:
        raise ConfigError(
            f"With these shares it takes {fewest:,} rows until each is there once. Give mixed() "
            "num_rows, or the largest part a larger share."
        )
    total = fewest if num_rows is None else num_rows
    if total < len(parts):
        raise ConfigError(f"mixed(num_rows={total}) is less than a row for each part.")
    counts = [int(total * share) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - total * shares[i])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _repeated(part: Part, count: int, seed: int) -> list[Row]:
    named = [_named(row, part.reward) for row in part.rows]
    order = RowOrder(len(named), seed=seed)
    return [named[order[place]] for place in range(count)]


def _named(row: Row, reward: str) -> Row:
    if row.get("reward", reward) != reward:
        raise DataError(
            f"A row has the 'reward' {row['reward']!r:.60} already, and its part {reward!r}: "
            f"{row.get('question')!r:.80}. Take the key away from it, or give it a part of its own."
        )
    return row | {"reward": reward}
