"""Rewards for logic puzzles of ZebraLogic: a grid filled in as JSON, or one of several choices.

    zebra_reward(text, row)        1.0 if each cell, or the choice, is right
    zebra_cell_share(text, row)    the share of cells that are right; less to learn a puzzle from

Source: ZebraLogic, arXiv:2502.01100 section 3, whose accuracies of puzzles and of cells these are.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arealite.errors import RewardError
from arealite.rewards.answers import final_answer

if TYPE_CHECKING:  # arealite.types imports torch, which a reward worker must not
    from arealite.types import Row

MAX_TABLES = 8
"""So many beginnings of a table are tried, from the last one on."""

_TABLE = re.compile(r'\{\s*"(?:solution|house 1)"\s*:', re.IGNORECASE)
_DECODER = json.JSONDecoder(strict=False)  # models break lines inside strings

Table = dict[tuple[str, str], str]  # (house, feature) to value, all in small letters


@dataclass(frozen=True, kw_only=True)
class ZebraReward:
    """A reward function for rows as `load_rows` makes them of ZebraLogic.

    Args:
        is_share: of a grid, give the share of cells that are right instead of 1.0 for all of them.
    """

    is_share: bool = False

    def __call__(self, text: str, row: "Row") -> float:
        """What a response is worth.

        Args:
            text: ends with JSON such as `{"solution": {"House 1": {"Name": "Bo"}}}`; or with the
                choice or its letter, in `\\boxed{}` or behind `####`.
            row: `answer` is the right table as JSON; or a text, which is one of its `choices`.

        Raises:
            RewardError: the row has neither.
        """
        if "choices" in row:
            return float(_is_right_choice(text, row))
        right = _right_table(row)
        said = _said_table(text)
        num_right = sum(said.get(cell) == value for cell, value in right.items())
        return num_right / len(right) if self.is_share else float(num_right == len(right))


zebra_reward = ZebraReward()
zebra_cell_share = ZebraReward(is_share=True)


def _is_right_choice(text: str, row: "Row") -> bool:
    choices = row["choices"]
    if row.get("answer") not in choices:
        raise RewardError(
            f"The row's 'answer' is {row.get('answer')!r:.80}, which is none of its 'choices': "
            f"{choices!r:.200}."
        )
    said = _plain(final_answer(text) or "")
    texts = [_plain(choice) for choice in choices]
    if said not in texts and re.fullmatch(r"\(?[a-z]\)?", said):
        place = ord(said.strip("()")) - ord("a")
        said = texts[place] if place < len(texts) else ""
    return said == _plain(row["answer"])


def _right_table(row: "Row") -> Table:
    try:
        table = _table(json.loads(row["answer"]))
    except (KeyError, TypeError, ValueError):
        table = {}
    if not table:
        raise RewardError(
            f"The row's 'answer' is {row.get('answer')!r:.80}. It has to be JSON such as "
            '{"House 1": {"Name": "Bo"}}, as load_rows makes it of a row of ZebraLogic.'
        )
    return table


def _said_table(text: str) -> Table:
    """The last table of a response that can be read; empty if there is none."""
    beginnings = [match.start() for match in _TABLE.finditer(text)]
    for beginning in beginnings[: -MAX_TABLES - 1 : -1]:
        try:
            table = _table(_DECODER.raw_decode(text, beginning)[0])
        except (ValueError, RecursionError):
            continue
        if table:
            return table
    return {}


def _table(value: Any) -> Table:
    """The cells of `{"House 1": {"Name": "Bo"}}`, which may stand under `solution`."""
    houses = value.get("solution", value) if isinstance(value, dict) else None
    if not isinstance(houses, dict):
        return {}
    return {
        (_plain(house), _plain(feature)): _plain(cell)
        for house, cells in houses.items()
        if isinstance(cells, dict)
        for feature, cell in cells.items()
        if isinstance(cell, str | int)
    }


def _plain(value: object) -> str:
    """In small letters, with single spaces and without markup around it."""
    text = re.sub(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}", r"\1", str(value))
    return " ".join(text.lower().split()).strip("*`$. ")
