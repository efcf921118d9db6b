"""Row formats of published data sets: each is told by its keys, and gives `question` and `answer`.

A row that has a `question` of its own is taken as it is, apart from the choices of ZebraLogic.

A question is what the user says to the model, to which the model's chat template is applied, once.
So the special tokens around the prompts of AReaL-boba go, as they do in AReaL's own training. What
a prompt says about the form of the answer stays, because it is part of what was published.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from arealite.errors import DataError
from arealite.rewards.answers import final_answer
from arealite.types import Row

HIDDEN = "___"
"""Stands in a puzzle's solution for what is not told."""

_SPECIAL_TOKENS = re.compile(r"<｜(?:begin▁of▁sentence|User|Assistant)｜>|<think>")  # noqa: RUF001


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How the rows of a data set are told from others, and read."""

    name: str
    """Of the data set whose format it is."""
    keys: tuple[str, ...]
    """A row of this format has all of them, and no other format earlier in `FORMATS` fits."""
    question_from: str
    """The fields that `question` is made of, in words."""
    answer_from: str
    """The fields that `answer` is made of, in words; empty if a row is graded by other fields."""
    question: Callable[[Row], object]
    """Text, or a list of messages; DataError that names the field if there is none."""
    answer: Callable[[Row], object] | None
    """Text, or a list of accepted texts; DataError as above."""
    reward: str
    """What grades it, in `arealite.rewards`; for recipes without a reward, the recipe."""
    others: Mapping[str, Callable[[Row], object]] = field(default_factory=dict)
    """What is made of other fields that may be wanted, by their names."""

    def read(self, row: Row, wanted: tuple[str, ...]) -> Row:
        """The row with those of `question` and `answer` that are wanted, and all other keys."""
        found = {key: make(row) for key, make in self.others.items() if key in wanted}
        if "question" in wanted:
            found["question"] = self.question(row)
        if "answer" in wanted and self.answer is not None:
            found["answer"] = self.answer(row)
        return row | found

    def made_of(self, key: str) -> str:
        """In parentheses, for a message about this key; empty if it is not of the format."""
        source = {"question": self.question_from, "answer": self.answer_from}.get(key)
        return f" (made of {source})" if source else ""


def format_of(row: Row) -> RowFormat | None:
    """The format of a row that has to be read first; None for one to be taken as it is."""
    if "question" in row:
        return CHOICES if all(key in row for key in CHOICES.keys) else None
    return next((each for each in FORMATS if all(key in row for key in each.keys)), None)


def as_object(row: object) -> object:
    """A pair of messages as Open-Reasoner-Zero has it, with keys as `datasets` gives them to it."""
    if isinstance(row, list) and len(row) == 2:
        first, second = row
        if all(isinstance(side, dict) and "from" in side for side in (first, second)):
            return {"0": first, "1": second}
    return row


def identity_of(row: object) -> bytes | None:
    """The same for two rows that are one and the same problem; None where rows have no index.

    DAPO-Math-17k has each of its rows a hundred times.
    """
    if not isinstance(row, dict) or not isinstance(row.get("extra_info"), dict):
        return None
    index = row["extra_info"].get("index")
    if index is None or "reward_model" not in row:
        return None
    # Not the index alone: in a set that was put together of several, each counts from 0.
    content = repr((index, row.get("data_source"), row.get("prompt"), row["reward_model"]))
    return hashlib.blake2b(content.encode("utf-8", "replace"), digest_size=16).digest()


def _field(row: Row, *path: str | int) -> Any:
    """The value at the end of the path; DataError that says where the path ends."""
    value: Any = row
    for depth, key in enumerate(path):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            place = f"{'.'.join(map(str, path[:depth]))!r} is {value!r:.60}, and " if depth else ""
            raise DataError(f"{place}has no {key!r}") from None
    return value


def _one_line(answer: object) -> object:
    """A bare answer on one line, as rewards take it; numbers as text."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    return " ".join(answer.split()) if isinstance(answer, str) else answer


# --- MATH, DeepScaleR -----------------------------------------------------------------------------


def _problem(row: Row) -> object:
    return row["problem"]


def _answer_or_last_box(row: Row) -> object:
    answer = row.get("answer")
    if answer is not None and answer != "":
        return _one_line(answer)
    solution = row.get("solution")
    found = final_answer(solution) if isinstance(solution, str) else None
    if found is None:
        raise DataError("has no 'answer', and no '\\boxed{}' in its 'solution'")
    return _one_line(found)


# --- DAPO and others in the form of verl ----------------------------------------------------------


def _message_or_conversation(row: Row) -> object:
    """The prompt; as text if it is a single message of the user."""
    return _text_of_single(row["prompt"])


def _text_of_single(messages: object) -> object:
    match messages:
        case [{"role": "user"} as message]:
            return _field(message, "content")
    return messages


def _ground_truth(row: Row) -> object:
    return _one_line(_field(row, "reward_model", "ground_truth"))


# --- AReaL-boba -----------------------------------------------------------------------------------


def _without_special_tokens(row: Row) -> object:
    prompt = row["prompt"]
    return _SPECIAL_TOKENS.sub("", prompt).strip() if isinstance(prompt, str) else prompt


def _solutions(row: Row) -> object:
    """The only accepted solution as text, or all as a list."""
    solutions = row["solutions"]
    if not isinstance(solutions, list) or not solutions:
        raise DataError(f"'solutions' is {solutions!r:.60}, not a list of accepted answers")
    return solutions[0] if len(solutions) == 1 else solutions


# --- ZebraLogic -----------------------------------------------------------------------------------


def _houses(row: Row) -> dict[str, dict[str, str]]:
    """What is right for each house, by name of the feature."""
    header, rows = _field(row, "solution", "header"), _field(row, "solution", "rows")
    try:
        houses = {
            f"House {number}": dict(zip(header[1:], cells[1:], strict=True))
            for number, cells in enumerate(rows, start=1)
        }
    except (TypeError, ValueError):
        houses = {}
    if not houses or len(header) < 2:
        raise DataError(
            f"'solution' is no table with a cell for each name of its header: {rows!r:.80}"
        )
    cells = [cell for house in houses.values() for cell in house.values()]
    if not all(isinstance(cell, str) and cell.strip(" _") for cell in cells):
        raise DataError(f"'solution' does not tell each cell: {rows!r:.80}")
    return houses


def _puzzle_and_form(row: Row) -> object:
    form = {house: dict.fromkeys(cells, HIDDEN) for house, cells in _houses(row).items()}
    return (
        f"{_puzzle(row)}\n\nEnd your answer with JSON of this form, in which each {HIDDEN} is "
        f"replaced by what is right:\n\n{json.dumps({'solution': form}, indent=4)}"
    )


def _puzzle(row: Row) -> str:
    if not isinstance(row["puzzle"], str):
        raise DataError(f"'puzzle' is {row['puzzle']!r:.60}, not text")
    return row["puzzle"].strip()


def _right_houses(row: Row) -> object:
    return json.dumps(_houses(row), ensure_ascii=False)


def _puzzle_and_choices(row: Row) -> object:
    puzzle, question = _puzzle(row), row["question"]
    if not isinstance(question, str) or question.startswith(puzzle):
        return question  # the second time that it is read
    lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, _choices(row), strict=False)]
    return (
        f"{puzzle}\n\n{question.strip()}\n\n{chr(10).join(lines)}\n\n"
        "End your answer with your choice, in its own words, in \\boxed{}."
    )


# --- Conversations and preferences, in the form of TRL --------------------------------------------


def _all_but_the_last(name: str) -> Callable[[Row], object]:
    """What the last of these messages answers."""
    return lambda row: _text_of_single(_messages(row, name)[:-1])


def _last_text(name: str) -> Callable[[Row], object]:
    """Text, or that of the last of these messages, which is the assistant's."""

    def read(row: Row) -> object:
        if isinstance(row[name], str):
            return row[name]
        message = _messages(row, name)[-1]
        if not isinstance(message, dict) or message.get("role") != "assistant":
            raise DataError(f"{name!r} does not end with a message of the assistant")
        return message.get("content")

    return read


def _messages(row: Row, name: str) -> list[Any]:
    messages = row[name]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{name!r} is {messages!r:.60}, not a list of messages")
    return messages


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _choices(row: Row) -> list[str]:
    choices = row["choices"]
    is_list = isinstance(choices, list) and 2 <= len(choices) <= len(LETTERS)
    if not is_list or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"'choices' is {choices!r:.60}, not a list of 2 to {len(LETTERS)} texts")
    return choices


def _right_choice(row: Row) -> object:
    """Its text, also where the row tells its letter."""
    choices, answer = _choices(row), _field(row, "answer")
    if answer in choices:
        return answer
    letters = dict(zip(LETTERS, choices, strict=False))
    if answer not in letters:
        raise DataError(f"'answer' is {answer!r:.60}, which is none of its 'choices'")
    return letters[answer]


CHOICES = RowFormat(
    name="ZebraLogic, mc_mode",
    keys=("puzzle", "choices"),
    question_from="`puzzle`, `question`, `choices`",
    answer_from="`answer`",
    question=_puzzle_and_choices,
    answer=_right_choice,
    reward="`zebra_reward`",
)

FORMATS = (
    CHOICES,
    RowFormat(
        name="ZebraLogic, grid_mode",
        keys=("puzzle", "solution"),
        question_from="`puzzle`, and the form of `solution`",
        answer_from="`solution`",
        question=_puzzle_and_form,
        answer=_right_houses,
        reward="`zebra_reward`",
    ),
    RowFormat(
        name="AReaL-boba-2-RL-Code",
        keys=("prompt", "input_output"),
        question_from="`prompt`, without special tokens",
        answer_from="",
        question=_without_special_tokens,
        answer=None,
        reward="`code_reward`",
    ),
    RowFormat(
        name="DeepCoder",
        keys=("problem", "tests"),
        question_from="`problem`",
        answer_from="",
        question=_problem,
        answer=None,
        reward="`code_reward`",
    ),
    RowFormat(
        name="AReaL-boba-106k",
        keys=("prompt", "solutions"),
        question_from="`prompt`, without special tokens",
        answer_from="`solutions`; each of several is right",
        question=_without_special_tokens,
        answer=_solutions,
        reward="`math_reward`",
    ),
    RowFormat(
        name="AReaL-boba-SFT-200",
        keys=("prompt", "answer"),
        question_from="`prompt`, without special tokens",
        answer_from="`answer`",
        question=_without_special_tokens,
        answer=lambda row: row["answer"],
        reward="none; `sft.py` imitates it",
    ),
    RowFormat(
        name="DAPO",
        keys=("prompt", "reward_model"),
        question_from="`prompt`",
        answer_from="`reward_model.ground_truth`",
        question=_message_or_conversation,
        answer=_ground_truth,
        reward="`math_reward`",
    ),
    RowFormat(
        name="Open-Reasoner-Zero",
        keys=("0", "1"),
        question_from="`value` of the first",
        answer_from="`ground_truth.value` of the second",
        question=lambda row: _field(row, "0", "value"),
        answer=lambda row: _one_line(_field(row, "1", "ground_truth", "value")),
        reward="`math_reward`",
    ),
    RowFormat(
        name="Open-Reasoner-Zero, eval_data",
        keys=("prompt", "final_answer"),
        question_from="`value` of the first of `prompt`",
        answer_from="`final_answer`",
        question=lambda row: _field(row, "prompt", 0, "value"),
        answer=lambda row: _one_line(row["final_answer"]),
        reward="`math_reward`",
    ),
    RowFormat(
        name="DeepScaleR, MATH-500",
        keys=("problem", "answer"),
        question_from="`problem`",
        answer_from="`answer`; where it is empty, the last `\\boxed{}` of `solution`",
        question=_problem,
        answer=_answer_or_last_box,
        reward="`math_reward`",
    ),
    RowFormat(
        name="MATH",
        keys=("problem", "solution"),
        question_from="`problem`",
        answer_from="the last `\\boxed{}` of `solution`",
        question=_problem,
        answer=_answer_or_last_box,
        reward="`math_reward`",
    ),
    RowFormat(
        name="preferences",
        keys=("prompt", "chosen", "rejected"),
        question_from="`prompt`",
        answer_from="",
        question=_message_or_conversation,
        answer=None,
        others={"chosen": _last_text("chosen"), "rejected": _last_text("rejected")},
        reward="`dpo.py`",
    ),
    RowFormat(
        name="preferences without a prompt",
        keys=("chosen", "rejected"),
        question_from="`chosen` but for the last message",
        answer_from="",
        question=_all_but_the_last("chosen"),
        answer=None,
        others={"chosen": _last_text("chosen"), "rejected": _last_text("rejected")},
        reward="`dpo.py`",
    ),
    RowFormat(
        name="completions",
        keys=("prompt", "completion"),
        question_from="`prompt`",
        answer_from="`completion`, or its last message",
        question=_message_or_conversation,
        answer=_last_text("completion"),
        reward="`sft.py`",
    ),
    RowFormat(
        name="conversations",
        keys=("messages",),
        question_from="`messages` but for the last",
        answer_from="the last of `messages`",
        question=_all_but_the_last("messages"),
        answer=_last_text("messages"),
        reward="`sft.py`",
    ),
)
"""The first whose keys a row has is its format."""
