"""Is the final answer of a response the right one? Plain numbers exactly, the rest by math-verify.

    reward = gsm8k_reward("17 + 17 = 34, so\n#### 34", {"answer": "...\n#### 34"})   # 1.0
    reward = math_reward(r"so \boxed{\frac{1}{2}}", {"answer": "0.5"})                # 1.0

Zero always means "no answer, or not shown to be equal". What is wrong with the data set or with the
installation raises instead. math-verify's own time limits are off, because they turn errors into
zeros; instead `bounds` ends a comparison that computes for long, and the `RewardPool` around the
call kills what even so takes too long.
"""

import logging
import re
from collections.abc import Callable
from decimal import Decimal
from functools import cache, lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any

from math_verify import LatexExtractionConfig, parse, verify

from arealite.errors import RewardError
from arealite.rewards.answers import final_answer
from arealite.rewards.bounds import TooLongError, is_too_large, time_limit

if TYPE_CHECKING:  # arealite.types imports torch, which a reward worker must not
    from arealite.types import Row

MAX_CPU_S = 2.0
"""Seconds of computing for one comparison; what takes longer is not shown to be equal. The first
of a process, which fills the caches of the parser, takes a third of a second."""
MAX_ANSWER_CHARS = 200
"""Longer answers are wrong without being parsed: a policy that degenerates would stop the run."""

_ASKS_FOR_ANSWER_LINE = re.compile(r"of the form:? [\"'`]?answer: \$answer", re.IGNORECASE)
"""In the instructions of DAPO-Math-17k, and of others since."""

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
    whichever of the two starts later. A response without either has no answer: 0.0. Where the
    question asks for a line of the form `Answer: x`, as those of DAPO do, that counts as well.

    Plain numbers (`-1,234.50`, `$34`, `34%`, `34 dollars`, `2 million`) are compared exactly; `25%`
    equals both 25 and 0.25, because data sets write either. Everything else math-verify compares.

    Args:
        text: the model's response, without the prompt.
        row: `answer` is GSM8K's worked solution that ends with `#### x`, or x itself; or a list of
            such, of which each is right.

    Raises:
        RewardError: the row has no answer that can be read.
    """
    return _reward(text, row, _is_equal)


def math_reward(text: str, row: "Row") -> float:
    """`gsm8k_reward` for problems as those of MATH, whose answers may be more than expressions.

    Beside numbers and what math-verify compares: words (`\\text{east}` and East), choices (`(B)`
    and B), numbers in a base (`2516_8`), times of day, and inequalities for intervals.

    Args:
        text: the model's response, without the prompt.
        row: `answer` as `gsm8k_reward` takes it, or text with the answer in its last `\\boxed{}`;
            without it `solution`, likewise.

    Raises:
        RewardError: the row has no answer that can be read.
    """
    if "answer" not in row and "solution" in row:
        row = {**row, "answer": row["solution"]}
    return _reward(text, row, _is_same_answer)


def _reward(text: str, row: "Row", is_right: Callable[[str, str], bool]) -> float:
    """1.0 if the final answer of the text is one of those that the row says are right."""
    golds = _gold_answers(row)
    answer = final_answer(text, has_answer_line=_asks_for_answer_line(row))
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return 0.0
    return float(any(is_right(gold, answer) for gold in golds))


def _asks_for_answer_line(row: "Row") -> bool:
    """Whether the question tells the model to write `Answer: x`."""
    question = row.get("question")
    if isinstance(question, list) and question and isinstance(question[-1], dict):
        question = question[-1].get("content")
    return isinstance(question, str) and _ASKS_FOR_ANSWER_LINE.search(question) is not None


def _is_same_answer(gold: str, answer: str) -> bool:
    for read in (_words, _in_base, _time_of_day):
        known = read(gold)
        if known is not None:
            return known == read(answer)
    return _is_equal(_as_interval(gold), _as_interval(answer))


def _words(answer: str) -> str | None:
    """The answer in small letters without articles and markup; None if it is no text."""
    plain = _without_markup(answer)
    plain = re.sub(r"^\(\s*([A-Za-z])\s*\)$", r"\1", plain)
    is_choice = re.fullmatch("[A-J]", plain) is not None
    if not is_choice and not re.fullmatch(r"[A-Za-z]{2,}([ '-]+[A-Za-z0-9]+)*\.?", plain):
        return None
    return re.sub(r"^(the|an?) ", "", plain.lower().rstrip("."))


def _in_base(answer: str) -> tuple[str, str] | None:
    """Digits and base of a number that names one."""
    found = re.fullmatch(r"([0-9A-F]+)_\{?([0-9]+)\}?", _without_markup(answer))
    return (found[1].lstrip("0"), found[2]) if found else None


def _time_of_day(answer: str) -> str | None:
    plain = _without_markup(answer).replace("{:}", ":")
    found = re.fullmatch(r"0?([0-9]{1,2}:[0-9]{2}) ?([AaPp]\.?[Mm]\.?)?", plain)
    return found[1] if found else None


MINUS_INFINITY = r"-\infty"
_INEQUALITY = re.compile(
    r"(?:(?P<low>.+?)(?P<after_low>\\leq?|<)\s*)?[a-zA-Z]\s*"
    r"(?P<sign>\\leq?|\\geq?|<|>)\s*(?P<high>[^<>]+)"
)


def _as_interval(answer: str) -> str:
    """An inequality of one variable as the interval that it is; everything else as it stands."""
    found = _INEQUALITY.fullmatch(answer.strip().strip("$").strip())
    if found is None:
        return answer
    low, sign, high = found["low"], found["sign"], found["high"].strip()
    is_closed = "e" in sign
    if low is None and sign in (">", r"\ge", r"\geq"):
        return f"{'[' if is_closed else '('}{high},\\infty)"
    if sign not in ("<", r"\le", r"\leq"):
        return answer
    start = "[" if low is not None and "e" in found["after_low"] else "("
    end = "]" if is_closed else ")"
    return f"{start}{(low or MINUS_INFINITY).strip()},{high}{end}"


def _gold_answers(row: "Row") -> list[str]:
    """The answers a row says are right, at least one; RewardError if it says none."""
    if "answer" not in row:
        raise RewardError(f"The row has no 'answer' to compare with; its keys are {sorted(row)}.")
    answer = row["answer"]
    is_list = isinstance(answer, list) and answer
    return [_gold_answer(each) for each in (answer if is_list else [answer])]


def _gold_answer(answer: object) -> str:
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
    right = list(_parsed_gold(gold))
    if is_too_large(answer):
        return gold == answer
    try:
        with time_limit(MAX_CPU_S):
            return verify(right, _parsed(answer), timeout_seconds=None, raise_on_error=True)
    except TooLongError:
        return False


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
