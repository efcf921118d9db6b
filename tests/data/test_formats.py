import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from arealite.data import load_rows
from arealite.data.formats import CHOICES, FORMATS, format_of
from arealite.errors import DataError
from arealite.rewards.math import math_reward
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.testing import ScriptedEngine, byte_tokenizer
from arealite.types import SamplingParams
from tests.data.published import (
    BOBA_ROW,
    CHOICES_ROW,
    GRID_ROW,
    PUBLISHED,
    Published,
)

every_published = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)


def required_of(published: Published) -> tuple[str, ...]:
    return ("question",) if published.answer is None else ("question", "answer")


def load(tmp_path: Path, *rows: Any, **settings: Any) -> list[dict[str, Any]]:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return load_rows(str(path), split="train", **settings)


@every_published
def test_a_published_row_gets_question_and_answer_and_keeps_its_other_keys(
    tmp_path: Path, published: Published
):
    [row] = load(tmp_path, published.row, required=required_of(published))
    assert row["question"] == published.question
    assert row.get("answer") == published.answer
    kept = published.row
    if isinstance(kept, list):
        kept = {"0": kept[0], "1": kept[1]}
    made = {"question", "answer"}
    assert {key: row[key] for key in row.keys() - made} == {
        key: kept[key] for key in kept.keys() - made
    }


@every_published
def test_a_right_reply_to_a_published_row_is_worth_1_and_a_wrong_one_0(
    tmp_path: Path, published: Published
):
    [row] = load(tmp_path, published.row, required=required_of(published))
    assert published.reward(published.right, row) == 1.0
    assert published.reward(published.wrong, row) == 0.0


@every_published
def test_rows_that_were_written_out_again_are_read_as_they_are(
    tmp_path: Path, published: Published
):
    required = required_of(published)
    rows = load(tmp_path, published.row, required=required)
    assert load(tmp_path, *rows, required=required) == rows


@every_published
def test_a_published_row_is_read_from_parquet_and_from_the_hub(
    tmp_path: Path, published: Published, monkeypatch: pytest.MonkeyPatch
):
    required = required_of(published)
    [row] = load(tmp_path, published.row, required=required)
    raw = published.row
    raw = {"0": raw[0], "1": raw[1]} if isinstance(raw, list) else raw
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([raw]), tmp_path / "rows.parquet")
    path = str(tmp_path / "rows.parquet")
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    found = datasets.Dataset.from_list([raw])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    for dataset in (path, "some/set"):
        [read] = load_rows(dataset, split="train", required=required)
        assert (read["question"], read.get("answer")) == (row["question"], row.get("answer"))


def test_every_format_is_that_of_a_published_row():
    rows = [published.row for published in PUBLISHED.values()]
    pairs = [{"0": row[0], "1": row[1]} if isinstance(row, list) else row for row in rows]
    of_trl = {"conversations", "completions", "preferences", "preferences without a prompt"}
    found = {found.name for row in pairs if (found := format_of(row))}
    assert found == {each.name for each in FORMATS} - of_trl
    assert format_of(PUBLISHED["GSM8K"].row) is None
    assert format_of(CHOICES_ROW) is CHOICES


def test_a_row_with_a_question_is_taken_as_it_is(tmp_path: Path):
    row = {"question": "1 + 1?", "answer": "2", "problem": "5 + 5?", "solution": "10"}
    assert load(tmp_path, row) == [row]


def test_rows_are_read_only_for_what_is_required(tmp_path: Path):
    row = {"problem": "1 + 1?", "solution": "No box here.", "prompt": "p"}
    assert load(tmp_path, row, required=("prompt",)) == [row]
    assert load(tmp_path, row, required=("question",)) == [row | {"question": "1 + 1?"}]


DEEPSEEK = (
    "{% for message in messages %}{% if message.role == 'user' %}<｜User｜>{{ message.content }}"  # noqa: RUF001
    "{% else %}<｜Assistant｜>{{ message.content }}<end>{% endif %}{% endfor %}"  # noqa: RUF001
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"  # noqa: RUF001
)


def test_the_template_of_deepseek_makes_the_published_prompt_of_boba_again(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DEEPSEEK
    [row] = load(tmp_path, BOBA_ROW)
    engine = ScriptedEngine(replies=[r"\boxed{12}"], tokenizer=tokenizer)
    workflow = SingleTurnWorkflow(tokenizer, math_reward, SamplingParams())
    group = asyncio.run(workflow.arun_episode(engine, row))
    assert tokenizer.decode(engine.requests[0].token_ids) == BOBA_ROW["prompt"]
    assert group is not None and group[0].reward == 1.0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"problem": "1?"}, "row 2 has no 'question'. Its keys: 'problem'"),
        ({"problem": "1?", "solution": "It is 1."}, "MATH, has no 'answer', and no .*'solution'"),
        ({"problem": "1?", "answer": None, "solution": None}, "MATH-500, has no 'answer', and no"),
        ({"problem": 1, "answer": "1"}, r"'question' \(made of `problem`\) is of type int"),
        ({"problem": " ", "answer": "1"}, r"'question' \(made of `problem`\) is empty"),
        ({"problem": "1?", "answer": " "}, r"'answer' \(made of `answer`; .*\) is empty"),
        ({"prompt": [], "reward_model": {"ground_truth": "1"}}, "DAPO,: 'question'.* is empty"),
        ({"prompt": "1?", "reward_model": {}}, "DAPO, 'reward_model' is {}, and has no 'ground_"),
        ({"prompt": "1?", "reward_model": "1"}, "'reward_model' is '1', and has no 'ground_truth'"),
        ({"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "1"}}, "no 'content'"),
        ({"prompt": "1?", "reward_model": {"ground_truth": None}}, "'answer'.*type NoneType"),
        (BOBA_ROW | {"solutions": "1"}, "'solutions' is '1', not a list of accepted answers"),
        (BOBA_ROW | {"solutions": []}, r"'solutions' is \[\], not a list"),
        (BOBA_ROW | {"solutions": ["1", ""]}, "'answer'.* has an element that is empty"),
        (BOBA_ROW | {"prompt": 1}, r"'question' \(made of `prompt`, without .*\) is of type int"),
        ([{"from": "human", "value": "1?"}, {"from": "assistant"}], "Zero, '1' is .* no 'ground_t"),
        ([{"from": "human", "value": "1?"}] * 3, "row 2 is a list, not an object"),
        ({"prompt": [], "final_answer": "1"}, r"'prompt' is \[\], and has no 0"),
        (GRID_ROW | {"solution": {"header": ["House", "Name"]}}, "'solution' is .* no 'rows'"),
        (
            GRID_ROW | {"solution": {"header": ["House", "Name"], "rows": [["1"]]}},
            "'solution' is no table",
        ),
        (
            GRID_ROW | {"solution": {"header": ["House", "Name"], "rows": [["1", "___"]]}},
            "'solution' does not tell each cell",
        ),
        (GRID_ROW | {"puzzle": None}, "'puzzle' is None, not text"),
        (CHOICES_ROW | {"answer": "beer"}, "'answer' is 'beer', which is none of its 'choices'"),
        (CHOICES_ROW | {"choices": ["milk"]}, "'choices' is .*, not a list of 2 to 26 texts"),
        ({key: CHOICES_ROW[key] for key in ("puzzle", "question", "choices")}, "has no 'answer'"),
        (PUBLISHED["DeepCoder"].row, "DeepCoder, has no 'answer'. Its keys: 'problem'"),
    ],
    ids=range(26),
)
def test_a_broken_row_of_a_format_is_named_with_format_and_field(
    tmp_path: Path, row: Any, problem: str
):
    good = {"question": "?", "answer": "1"}
    with pytest.raises(DataError, match=problem) as caught:
        load(tmp_path, good, row)
    assert "rows.json, row 2" in str(caught.value)
    assert load(tmp_path, good, row, max_malformed=1) == [good]


def test_rows_that_repeat_an_index_and_its_content_are_taken_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    row = PUBLISHED["DAPO"].row
    other = row | {"extra_info": {"index": "another"}}
    same_index = row | {"reward_model": {"ground_truth": "13", "style": "rule"}}
    with caplog.at_level(logging.WARNING):
        rows = load(tmp_path, row, other, row, same_index, other, row)
    assert [row["answer"] for row in rows] == ["12", "12", "13"]
    assert "3 rows repeat the index and content of an earlier one; the 3 others" in caplog.text


def test_other_rows_may_be_there_twice(tmp_path: Path):
    for name in ("MATH", "DeepScaleR", "Open-Reasoner-Zero", "AReaL-boba-106k"):
        assert len(load(tmp_path, *[PUBLISHED[name].row] * 3)) == 3
    without_index = PUBLISHED["DAPO"].row | {"extra_info": {"split": "train"}}
    assert len(load(tmp_path, *[without_index] * 3)) == 3


def test_a_conversation_stays_one_where_it_has_more_than_a_message_of_the_user(tmp_path: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    row = PUBLISHED["DAPO"].row | {"prompt": messages}
    assert load(tmp_path, row)[0]["question"] == messages


def test_the_letter_of_a_choice_is_as_good_as_its_text(tmp_path: Path):
    assert load(tmp_path, CHOICES_ROW | {"answer": "B"})[0]["answer"] == "milk"


def test_numbers_and_line_breaks_in_a_bare_answer_do_no_harm(tmp_path: Path):
    rows = [{"problem": "?", "answer": answer} for answer in (12, 0.5, "a\n b")]
    assert [row["answer"] for row in load(tmp_path, *rows)] == ["12", "0.5", "a b"]


USER, SYSTEM = {"role": "user", "content": "1+1?"}, {"role": "system", "content": "Be brief."}
TWO, THREE = ({"role": "assistant", "content": text} for text in ("2", "3"))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"messages": [USER, TWO]}, {"question": "1+1?", "answer": "2"}),
        ({"messages": [SYSTEM, USER, TWO]}, {"question": [SYSTEM, USER], "answer": "2"}),
        ({"prompt": "1+1?", "completion": "2"}, {"question": "1+1?", "answer": "2"}),
        ({"prompt": [USER], "completion": [TWO]}, {"question": "1+1?", "answer": "2"}),
    ],
)
def test_conversations_and_completions_are_something_to_imitate(
    tmp_path: Path, raw: dict[str, Any], expected: dict[str, Any]
):
    assert load(tmp_path, raw) == [raw | expected]


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        {"prompt": [USER], "chosen": [TWO], "rejected": [THREE]},
        {"prompt": "1+1?", "chosen": [USER, TWO], "rejected": [USER, THREE]},
        {"chosen": [USER, TWO], "rejected": [USER, THREE]},
    ],
)
def test_preferences_are_a_question_and_two_texts(tmp_path: Path, raw: dict[str, Any]):
    required = ("question", "chosen", "rejected")
    expected = {"question": "1+1?", "chosen": "2", "rejected": "3"}
    [row] = load(tmp_path, raw, required=required)
    assert row == raw | expected
    assert load(tmp_path, row, required=required) == [row]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"messages": [USER]}, "'messages' does not end with a message of the assistant"),
        ({"messages": []}, r"'messages' is \[\], not a list of messages"),
        ({"messages": [TWO]}, "'question' .* is empty"),
        ({"prompt": "1+1?", "completion": [USER]}, "'completion' does not end with a message of"),
    ],
)
def test_a_conversation_that_nobody_answers_is_refused(
    tmp_path: Path, raw: dict[str, Any], message: str
):
    with pytest.raises(DataError, match=message):
        load(tmp_path, raw)
