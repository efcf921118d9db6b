import json
import logging
import threading
from decimal import Decimal
from pathlib import Path

import pytest

from arealite.errors import RewardError
from arealite.rewards import math
from arealite.rewards.answers import final_answer
from arealite.rewards.math import gsm8k_reward, math_reward

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def score(answer: str, gold: object = "34") -> float:
    return gsm8k_reward(f"So the answer is:\n#### {answer}", {"answer": gold})


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"the GSM8K files are not at {GSM8K}")
def test_every_gold_solution_of_gsm8k_is_right_and_plus_one_is_wrong():
    files = [(GSM8K / f"{name}.jsonl").read_text().strip() for name in ("train", "test")]
    rows = [json.loads(line) for file in files for line in file.split("\n")]
    assert len(rows) == 8_792
    for row in rows:
        reasoning, number = row["answer"].rsplit("#### ", 1)
        wrong = f"{reasoning}#### {Decimal(number.replace(',', '')) + 1}"
        assert gsm8k_reward(row["answer"], row) == 1.0, row
        assert gsm8k_reward(wrong, row) == 0.0, row


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("34", "34"),
        ("34.", "34"),
        ("34.00", "34"),
        ("+34", "34"),
        ("034", "34"),
        ("-34", "-34"),
        ("\u221234", "-34"),
        ("-$34", "-34"),
        ("$-34", "-34"),
        (".5", "0.5"),
        ("1,234,567", "1234567"),
        ("1234", "1,234"),
        ("1{,}234", "1234"),
        (r"1\,234", "1234"),
        ("$34", "34"),
        (r"\$34", "34"),
        ("$34$", "34"),
        ("£1,234.50", "1234.5"),
        ("**34**", "34"),
        ("**34**.", "34"),
        (r"\(34\)", "34"),
        (r"\text{34}", "34"),
        ("34 dollars", "34"),
        ("$34 per week.", "34"),
        (r"34\text{ apples}", "34"),
        ("2.5 million dollars", "2500000"),
        ("25%", "25"),
        (r"25\%", "25"),
        ("25 percent", "25"),
        ("25%", "0.25"),
        ("0.25", "25%"),
        ("25", "25%"),
        # From here on math-verify decides.
        (r"\frac{68}{2}", "34"),
        (r"\dfrac{1}{2}", "0.5"),
        ("0.5", "1/2"),
        ("1/2", "0.5"),
        ("0.333333", "1/3"),
        ("17*2", "34"),
        (r"2 \cdot 17", "34"),
        ("30 + 4", "34"),
        ("x = 34", "34"),
        (r"\sqrt{1156}", "34"),
        (r"34\ \text{cm}^2", "34"),
        ("34 cm", "34"),
        ("x^2 + 2x + 1", "(x+1)^2"),
    ],
)
def test_equivalent_forms_are_right(answer: str, gold: str):
    assert score(answer, gold) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("35", "34"),
        ("3", "34"),
        ("340", "34"),
        ("-34", "34"),
        ("34.1", "34"),
        ("34.0000000000000001", "34"),
        ("1,23", "123"),
        ("12,34", "1234"),
        ("34 million", "34"),
        (r"34\text{ million}", "34"),
        ("34%", "3400"),
        ("0.34", "34"),
        ("34 or 35", "34"),
        ("34, 35", "34"),
        ("34 and 35", "34"),
        ("34^2", "34"),
        ("34x", "34"),
        ("1/3", "34"),
        ("33.3", "100/3"),
        ("thirty-four", "34"),
        ("10:30", "1030"),
        ("x + 1", "x + 2"),
        ("∞", "34"),
        ("٣٥", "34"),
        ("nan", "34"),
        (r"\frac{34", "34"),
        (r"\frac{1}{0}", "34"),
    ],
)
def test_other_values_are_wrong(answer: str, gold: str):
    assert score(answer, gold) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 34", "34"),
        ("####34\n", "34"),
        ("so\n#### 33\nno,\n#### 34 \nDone.", "34"),
        (r"\boxed{33} and then \boxed{34}", "34"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {34}", "34"),
        (r"\boxed{\boxed{34}}", "34"),
        (r"\boxed{\{34\}}", r"\{34\}"),
        ("#### 33\n" + r"so \boxed{34}", "34"),
        (r"\boxed{33}" + "\n#### 34", "34"),
        (r"#### $\boxed{34}$", "34"),
        (r"\boxed{34} but \boxed{35", "34"),
        (r"\boxed{34} and \boxed{}", "34"),
        ("#### 34\n####\n", "34"),
        ("##### 35", None),
        ("The answer is 34.", None),
        (r"\boxed{34", None),
        ("}}}{{{", None),
        ("", None),
    ],
)
def test_the_last_answer_in_the_text_counts(text: str, answer: str | None):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 34", "34"),
        ("so\n**Answer:** 34\n", "34"),
        ("so\n**Answer**: 34", "34"),
        ("Answer: 33. No.\nanswer : $34$", "$34$"),
        (r"\boxed{33}" + "\nAnswer: 34", "34"),
        ("Answer: 33\n#### 34", "34"),
        (r"Answer: \boxed{34}", "34"),
        ("Answer:\n\n34\n\nThat is all.", "34"),
        ("Answer: ", None),
        ("I answer nothing", None),
    ],
)
def test_a_line_with_the_answer_counts_where_it_is_asked_for(text: str, answer: str | None):
    assert final_answer(text, has_answer_line=True) == answer
    if "oxed" not in text and "#" not in text:
        assert final_answer(text) is None


def test_a_question_of_dapo_asks_for_a_line_with_the_answer():
    asks = "The last line should be of the form Answer: $Answer (without quotes).\n\n17 + 17?"
    for question in (asks, [{"role": "system", "content": ""}, {"role": "user", "content": asks}]):
        row = {"question": question, "answer": "34"}
        for reward in (gsm8k_reward, math_reward):
            assert reward("17 + 17 = 34\nAnswer: 34", row) == 1.0
            assert reward("17 + 17 = 34\nAnswer: 35", row) == 0.0
            assert reward("Answer: 34", row | {"question": "17 + 17?"}) == 0.0


def test_each_of_several_accepted_answers_is_right():
    row = {"answer": [r"\boxed{0.5}", "half", "#### 2"]}
    assert [math_reward(f"#### {said}", row) for said in ("1/2", "Half", "2", "3")] == [1, 1, 1, 0]


def test_response_without_an_answer_is_wrong():
    assert gsm8k_reward("I think it is 34.", {"answer": "#### 34"}) == 0.0
    assert gsm8k_reward("", {"answer": "#### 34"}) == 0.0


@pytest.mark.parametrize(
    "gold",
    ["17+17=34\n#### 34", "34", " 34 ", r"it is \boxed{34}", "$34", 34, 34.0, "34.0", "68/2"],
)
def test_gold_may_be_a_solution_or_the_bare_answer(gold: object):
    assert score("34", gold) == 1.0
    assert score("35", gold) == 0.0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "?"}, "no 'answer'.*question"),
        ({"answer": None}, "None .NoneType"),
        ({"answer": []}, "list"),
        ({"answer": [["34"]]}, "list"),
        ({"answer": True}, "True .bool"),
        ({"answer": float("nan")}, "nan .float"),
        ({"answer": "  "}, "has to end with '#### x'"),
        ({"answer": "It is 34.\nReally."}, "Really"),
        ({"answer": "It is 34.\n#### "}, "has to end with '#### x'"),
        ({"answer": "#### \\frac{1"}, r"cannot read the right answer '\\\\frac{1'"),
    ],
)
def test_row_without_a_readable_answer_raises_instead_of_scoring_zero(row: dict, problem: str):
    with pytest.raises(RewardError, match=problem):
        gsm8k_reward("#### x+1", row)


def test_broken_math_verify_raises_instead_of_scoring_zero(monkeypatch: pytest.MonkeyPatch):
    math._check_math_verify.cache_clear()
    monkeypatch.setattr(math, "verify", lambda *args, **kwargs: False)
    with pytest.raises(RewardError, match="math-verify does not see"):
        score(r"\frac{68}{2}")


def test_error_inside_math_verify_surfaces(monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object, **kwargs: object) -> bool:
        raise ZeroDivisionError("inside sympy")

    assert score(r"\frac{68}{2}") == 1.0
    monkeypatch.setattr(math, "verify", broken)
    with pytest.raises(ZeroDivisionError, match="inside sympy"):
        score(r"\frac{68}{2}")


def test_math_verify_needs_no_signals_and_says_nothing(caplog: pytest.LogCaptureFixture):
    scores: list[float] = []
    with caplog.at_level(logging.DEBUG, logger="root"):
        thread = threading.Thread(target=lambda: scores.append(score(r"\frac{68}{2}")))
        thread.start()
        thread.join()
    assert scores == [1.0]
    assert not caplog.records


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 3_000 + "34" + "}" * 3_000,
        r"\boxed{" * 3_000,
        r"\boxed{1} " * 3_000 + "#### 34",
        "{" * 50_000 + r"\boxed{34}",
        "####  \n" * 20_000 + "#### 34",
        "#" * 100_000,
        "####" + " " * 100_000,
    ],
)
def test_finding_the_answer_takes_one_pass_over_the_text(text: str):
    assert final_answer(text) in ("34", None)


@pytest.mark.parametrize("answer", ["(" * 2_000 + "34" + ")" * 2_000, "1," * 20_000, "9" * 5_000])
def test_answer_longer_than_any_answer_is_wrong_without_being_parsed(answer: str):
    assert score(answer) == 0.0


def test_no_parser_is_needed_for_plain_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math, "parse", None)
    assert score("$1,234.50", "1234.5") == 1.0
    assert score("34 apples") == 1.0
    assert score("35") == 0.0
