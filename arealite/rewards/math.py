"""Is the final answer of a response the right one? Plain numbers exactly, the rest by math-verify.

    reward = gsm8k_reward("17 + 17 = 34, so\n#### 34", {"answer": "...\n#### 34"})   # 1.0

Zero always means "no answer, or not shown to be equal". What is wrong with the data set or with the
installation raises instead, and what takes too long is killed by the `RewardPool` around the call:
math-verify's own time limits are off, because they need the main thread and turn errors into zeros.
"""

import logging
import re
from decimal import Decimal
from functools import cache, lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any

from math_verify import LatexExtractionConfig, parse, verify

from arealite.errors import RewardError

if TYPE_CHECKING:  # arealite.types imports torch, which a reward worker must not
    from arealite.types import Row

MAX_ANSWER_CHARS = 200
"""Longer answers are wrong without being parsed: a policy that degenerates would stop the run."""

_HASH_ANSWER = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox)\{([^{}]*)\}")
_NUMBER_WITH_UNIT = re.compile(
    r"(?P<sign>[+-]?)\s?(?:[$€£]\s?)?"
    r"(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?P<percent>\s?%|\spercent)?(?P<unit>(?:\s[A-Za-z]{3,})*)"
)
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9}


def gsm8k_reward(text: str, row: "Row") -> float:
    """1.0 if the final answer in `text` equals the one in `row["answer"]`, else 0.0.

    The final answer is the last `#### x` (to the end of its line) or the last closed `\\boxed{x}`,
    whichever of the two starts later. A response without either has no answer: 0.0.

    Plain numbers (`-1,234.50`, `$34`, `34%`, `34 dollars`, `2 million`) are compared exactly; `25%`
    equals both 25 and 0.25, because data sets write either. Everything else math-verify compares.

    Args:
        text: the model's response, without the prompt.
        row: `answer` is GSM8K's worked solution that ends with `#### x`, or x itself.

    Raises:
        RewardError: the row has no answer that can be read.
    """
    gold = _gold_answer(row)
    answer = final_answer(text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    return float(_is_equal(gold, answer))


def final_answer(text: str) -> str | None:
    """What follows the last `####`, or stands in the last `\\boxed{}`; None if there is neither."""
    found = list(_HASH_ANSWER.finditer(text))[-1:]
    candidates = [(match.start(), match[1].strip()) for match in found]
    if (box := _last_box(text)) is not None:
        candidates.append(box)
    return max(candidates)[1] if candidates else None


def _last_box(text: str) -> tuple[int, str] | None:
    """Start and content of the last `\\boxed{...}` that is closed and not empty.

    One pass over the text, whatever it holds: thousands of boxes inside each other are common in
    the output of a policy that degenerates.
    """
    last: tuple[int, str] | None = None
    open_braces: list[re.Match[str]] = []
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0] == "{" or token[0].startswith(r"\boxed"):
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening[0] != "{" and (last is None or opening.start() > last[0]):
                content = text[opening.end() : token.start()].strip()
                last = (opening.start(), content) if content else last
    return last


def _gold_answer(row: "Row") -> str:
    """The answer a row says is right; RewardError if it says none."""
    if "answer" not in row:
        raise RewardError(f"The row has no 'answer' to compare with; its keys are {sorted(row)}.")
    answer = row["answer"]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and isfinite(answer):
        answer = format(Decimal(str(answer)), "f")
    if not isinstance(answer, str):
        raise RewardError(
            f"The row's 'answer' is {answer!r} ({type(answer).__name__}). "
            "It has to be text that ends with '#### x', or x itself."
        )
    gold = final_answer(answer)
    if gold is None and answer.strip() and "####" not in answer and "\n" not in answer.strip():
        gold = answer.strip()
    if gold is None:
        raise RewardError(
            f"The row's 'answer' ends with {answer[-80:]!r}. It has to end with '#### x', "
            "or be x itself on one line."
        )
    return gold


def _is_equal(gold: str, answer: str) -> bool:
    gold_number, number = _plain_number(gold), _plain_number(answer)
    if gold_number is None or number is None:
        return _is_equal_by_math_verify(gold, answer)
    (gold_value, is_gold_percent), (value, is_percent) = gold_number, number
    if is_percent and not is_gold_percent and value == gold_value * 100:
        return True
    if is_gold_percent and not is_percent and gold_value == value * 100:
        return True
    return value == gold_value


def _plain_number(answer: str) -> tuple[Decimal, bool] | None:
    """The number, and whether it is a percentage; None if this is more than a number and a unit."""
    match = _NUMBER_WITH_UNIT.fullmatch(_without_markup(answer))
    if match is None:
        return None
    value = Decimal(match["sign"] + match["number"].replace(",", ""))
    for word in match["unit"].lower().split():
        value *= _SCALES.get(word, 1)
    return value, match["percent"] is not None


def _without_markup(answer: str) -> str:
    """The answer without Markdown stars, math delimiters, text commands and thin spaces."""
    answer = _TEXT_COMMAND.sub(r"\1", answer).replace("\u2212", "-").replace("{,}", ",")
    answer = re.sub(r"(?<=[0-9])\\,(?=[0-9]{3})", ",", answer)
    answer = re.sub(r"\\([$%])", r"\1", re.sub(r"\\[()!]", "", answer))
    return " ".join(answer.split()).lstrip("*`$ ").rstrip("*`$ .")


def _is_equal_by_math_verify(gold: str, answer: str) -> bool:
    _check_math_verify()
    return verify(
        list(_parsed_gold(gold)), _parsed(answer), timeout_seconds=None, raise_on_error=True
    )


@lru_cache(maxsize=4096)
def _parsed_gold(gold: str) -> tuple[Any, ...]:
    """What math-verify makes of the right answer; RewardError if that is nothing."""
    parsed = _parsed(gold)
    if not parsed or isinstance(parsed[0], str):
        raise RewardError(f"math-verify cannot read the right answer {gold!r} of this row.")
    return tuple(parsed)


def _parsed(answer: str) -> list[Any]:
    # Dollars are currency or math delimiters here, and neither changes the value.
    answer = " ".join(answer.replace(r"\$", "").replace("$", "").strip("*").split()).rstrip(".")
    return parse(f"${answer}$", [LatexExtractionConfig()], parsing_timeout=0, raise_on_error=True)


@cache
def _check_math_verify() -> None:
    """Raise unless math-verify works: with a broken LaTeX parser it finds every answer wrong."""
    # It would say once per process that its time limits are off. They are, on purpose.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if not verify(_parsed("0.5"), _parsed(r"\frac{1}{2}"), timeout_seconds=None):
        raise RewardError(
            r"math-verify does not see that 0.5 equals \frac{1}{2}, so its LaTeX parser is broken "
            "here. Install it as math-verify[antlr4_13_2]."
        )
