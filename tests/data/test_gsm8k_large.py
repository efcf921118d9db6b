import hashlib
import re

from arealite.data import GSM8K_LARGE, load_rows, load_tokenizer
from tests.data.test_gsm8k_mini import retell


def test_the_last_line_is_what_the_question_tells():
    for row in load_rows(GSM8K_LARGE, split="train")[:2_000]:
        assert row["answer"].splitlines()[-1] == f"#### {retell(row['question'])}"


def test_every_number_that_is_told_has_three_digits_unless_it_is_given_away():
    for row in load_rows(GSM8K_LARGE, split="test"):
        for number in re.findall(r"(?:has|finds|buys|gives \w+) (\d+)", row["question"]):
            assert 100 <= int(number) <= 999


def test_the_test_split_is_never_trained_on_and_the_same_in_every_release():
    train = {row["question"] for row in load_rows(GSM8K_LARGE, split="train")}
    rows = load_rows(GSM8K_LARGE, split="test")
    assert len(train) == 8_000
    assert len(rows) == 200
    assert not train & {row["question"] for row in rows}
    assert rows[2]["question"] == (
        "Today Ann buys 582 books. Ann buys as many again. Then Ann finds 626 more. How many "
        "books does Ann have now?"
    )
    assert rows[2]["answer"] == "<<582*2=1164>>1164\n<<1164+626=1790>>1790\n#### 1790"
    text = "\n".join(row["question"] for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9b7c0bbe473d4e9f"


def test_the_embedded_agent_gives_every_text_back_as_it_was():
    tokenizer = load_tokenizer("arealite/tiny-agent")
    for row in load_rows(GSM8K_LARGE, split="test"):
        for text in (row["question"], row["answer"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text
