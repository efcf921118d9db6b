import json
import logging
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arealite.data import load_rows
from arealite.errors import DataError

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
GOOD = '{"question": "1 + 1?", "answer": "#### 2"}'


def write(folder: Path, content: str | bytes, name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_rows_come_back_in_order_with_every_key_they_had(tmp_path: Path):
    rows = [
        {"question": "a?", "answer": "#### 1", "level": 3, "tags": ["x", None]},
        {"question": "b? \u2028 <|im_end|> \u202e", "answer": " 2\n"},
    ]
    write(tmp_path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert load_rows(str(tmp_path), split="train") == rows


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\n\n \n"])
def test_windows_line_ends_a_byte_order_mark_and_trailing_blank_lines_do_no_harm(
    tmp_path: Path, ending: str
):
    path = write(tmp_path, b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}{ending}".encode())
    assert load_rows(path, split="train") == [json.loads(GOOD)] * 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": "a?", "answer": "b",}', "not valid JSON"),
        ('{"question": "a?", "answer": "b"', "not valid JSON"),
        ("", "is empty"),
        ("[1, 2]", "is a list, not an object"),
        ('"text"', "is a str, not an object"),
        ("null", "is a NoneType, not an object"),
        ("{}", "has no 'question'"),
        ('{"question": "a?"}', "has no 'answer'. Its keys: 'question'"),
        ('{"question": null, "answer": "b"}', "'question' is of type NoneType"),
        ('{"question": "a?", "answer": 34}', "'answer' is of type int"),
        ('{"question": ["a?"], "answer": "b"}', "'question' is of type list"),
        ('{"question": " ", "answer": "b"}', "'question' is empty"),
        ('{"question": "a?", "answer": ""}', "'answer' is empty"),
        ('{"question": "a?", "answer": []}', "'answer' is empty"),
        ('{"question": "a?", "answer": ["b", ""]}', "'answer' has an element that is empty"),
        ('{"question": "a?", "answer": ["b", 5]}', "'answer' has an element that is of type int"),
        ('{"question": "a\\u0000", "answer": "b"}', "'question' contains a NUL"),
        ('{"question": "a\\ud83d", "answer": "b"}', "'question' contains half of a surrogate"),
        (b'{"question": "\xff", "answer": "b"}', "not UTF-8"),
        ('{"question": "a?", "answer": "b", "x": ' + "1" * 5_000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=range(21),
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, line: str | bytes, problem: str):
    middle = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, b"\n".join([GOOD.encode(), middle, GOOD.encode()]))
    with pytest.raises(DataError) as caught:
        load_rows(path, split="train")
    assert "train.jsonl, line 2" in str(caught.value)
    assert problem in str(caught.value)


def test_only_the_required_keys_have_to_be_there(tmp_path: Path):
    path = write(tmp_path, '{"text": "a", "answer": 5}')
    assert load_rows(path, split="train", required=("text",)) == [{"text": "a", "answer": 5}]
    with pytest.raises(DataError, match="has no 'question'"):
        load_rows(path, split="train")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=80)
    | st.lists(
        st.sampled_from([GOOD, "{}", "[", "]", ",", "\n", '"', "null", "\ufeff", "1e999", "NaN"])
    ).map(lambda parts: "".join(parts).encode())
)
def test_any_bytes_as_a_file_give_rows_or_a_data_error(tmp_path: Path, content: bytes):
    for name in ("any.jsonl", "any.json", "any.parquet"):
        path = write(tmp_path, content, name)
        try:
            rows = load_rows(path, split="train")
        except DataError as error:
            assert str(tmp_path) in str(error)
        else:
            assert rows and all(row["question"] and row["answer"] for row in rows)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def test_a_question_may_be_a_list_of_messages(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    calls = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": ""},
    ]
    rows = [{"question": each, "answer": "4"} for each in (MESSAGES, [*MESSAGES, *calls])]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_rows(str(path), split="train") == rows


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "'question' is empty"),
        (["2 + 2?"], "'question' is of type list and has no message with a role at place 0: '2 "),
        (
            [{"role": 5, "content": "a"}],
            "'question' is of type list and has no message with a role at place 0",
        ),
        ([{"role": "user"}], "'question' has a message at place 0 whose content is of type None"),
        (
            [*MESSAGES, {"role": "user", "content": MESSAGES}],
            "'question' has a message at place 2 whose content is of type list",
        ),
        (
            [*MESSAGES, {"role": "user", "content": " "}],
            "'question' has a message at place 2 whose content is empty",
        ),
    ],
)
def test_a_list_that_is_none_of_messages_is_named(tmp_path: Path, messages: list, problem: str):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"question": messages, "answer": "4"}))
    with pytest.raises(DataError, match=f"line 1: {problem}"):
        load_rows(str(path), split="train")


def test_a_json_file_with_one_list_counts_its_rows_from_1(tmp_path: Path):
    path = write(tmp_path, f"[{GOOD},\n {GOOD}]", "train.json")
    assert load_rows(path, split="train") == [json.loads(GOOD)] * 2
    path = write(tmp_path, f"[{GOOD},\n\n {{}}]", "train.json")
    with pytest.raises(DataError, match=r"train.json, row 2 has no 'question'"):
        load_rows(path, split="train")


def test_parquet_shards_are_read_one_after_the_other(tmp_path: Path):
    (tmp_path / "data").mkdir()
    for shard, question in enumerate(["a", "b"]):
        table = pyarrow.table({"question": [question], "answer": ["1"]})
        path = tmp_path / "data" / f"train-0000{shard}-of-00002.parquet"
        pyarrow.parquet.write_table(table, path)
    rows = load_rows(str(tmp_path), split="train")
    assert rows == [{"question": "a", "answer": "1"}, {"question": "b", "answer": "1"}]


def test_a_parquet_shard_with_another_schema_is_named(tmp_path: Path):
    table = pyarrow.table({"puzzle": ["a"], "answer": ["1"]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train.parquet, row 1 has no 'question'.*'puzzle'"):
        load_rows(str(tmp_path), split="train")


def test_an_empty_data_set_is_refused(tmp_path: Path):
    for content in ("", "\n \r\n", "[]"):
        with pytest.raises(DataError, match="has no rows"):
            load_rows(write(tmp_path, content), split="train")


def test_a_missing_split_is_answered_with_what_is_there(tmp_path: Path):
    write(tmp_path, GOOD, "train.jsonl")
    write(tmp_path, GOOD, "validation.json")
    with pytest.raises(
        DataError, match=r"no split 'test'. There are: train.jsonl, validation.json"
    ):
        load_rows(str(tmp_path), split="test")
    with pytest.raises(DataError, match=r"no split 'validation'. There are: train, test"):
        load_rows("arealite/gsm8k-mini", split="validation")


def test_one_file_serves_every_split_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write(tmp_path, GOOD, "rows.jsonl")
    with caplog.at_level(logging.WARNING):
        assert load_rows(path, split="train") == load_rows(path, split="test")
    [record] = caplog.records
    assert "its test rows are 1 of its train rows" in record.getMessage()


def test_one_file_of_many_rows_is_tested_with_some_of_them_unless_it_is_named_for_it(
    tmp_path: Path,
):
    rows = [{"question": f"{number}?", "answer": "1"} for number in range(1_000)]
    content = "\n".join(map(json.dumps, rows))
    assert load_rows(write(tmp_path, content, "rows.jsonl"), split="test") == rows[::2]
    assert load_rows(write(tmp_path, content, "rows.jsonl"), split="train") == rows
    assert load_rows(write(tmp_path, content, "test.jsonl"), split="test") == rows


def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path: Path):
    for name in (
        str(tmp_path / "nowhere"),
        "./nowhere",
        "a/b/c",
        "rows.jsonl",
        "",
        "~nobody/x",
        "x" * 5_000,
    ):
        with pytest.raises(DataError, match="There is no file or folder"):
            load_rows(name, split="train")


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"ends in none of .jsonl, .json, .parquet"):
        load_rows(write(tmp_path, "question,answer\na,b\n", "rows.csv"), split="train")


def test_a_hub_that_does_not_answer_gives_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    def fail(name: str) -> list[str]:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "get_dataset_config_names", fail)
    with pytest.raises(DataError, match=r"'openai/gsm8k'.*ConnectionError.*give a folder"):
        load_rows("openai/gsm8k", split="train")


@pytest.mark.parametrize(
    ("name", "configs", "taken"),
    [
        ("openai/gsm8k", ["main", "socratic"], "main"),
        ("openai/gsm8k:socratic", ["main", "socratic"], "socratic"),
        ("some/set", ["only"], "only"),
        ("some/set", ["default", "extra"], "default"),
    ],
)
def test_the_configuration_of_a_hub_set_is_found_or_named(
    monkeypatch: pytest.MonkeyPatch, name: str, configs: list[str], taken: str
):
    asked: list[tuple[str, str, str]] = []

    def load(name: str, config: str, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "a", "answer": "b"}])

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: configs)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["test", "extra"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows(name, split="test") == [{"question": "a", "answer": "b"}]
    assert asked == [(name.split(":")[0], taken, "test")]
    with pytest.raises(DataError, match=r"no split 'train'. There are: test, extra"):
        load_rows(name, split="train")


class Hub:
    """Stands in for the network: one data set with one split."""

    def __init__(self, patch: pytest.MonkeyPatch, rows: list[dict], split: str) -> None:
        patch.setattr(datasets, "get_dataset_config_names", lambda name: ["default"])
        patch.setattr(datasets, "get_dataset_split_names", lambda *_: [split])
        found = datasets.Dataset.from_list(rows)
        patch.setattr(datasets, "load_dataset", lambda *_, split: {split: found}[split])


def test_a_hub_set_of_one_split_serves_every_split_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    rows = [{"question": f"{number}?", "answer": str(number)} for number in range(2_000)]
    Hub(monkeypatch, rows, "train")
    assert load_rows("some/set", split="train") == rows
    assert not caplog.records
    assert load_rows("some/set", split="test") == rows[::4]  # so many as can be evaluated often
    assert "its test rows are 500 of its train rows" in caplog.text
    Hub(monkeypatch, rows, "test")
    assert load_rows("some/set", split="train") == rows


def test_rows_of_deepscaler_without_an_answer_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    name = "agentica-org/DeepScaleR-Preview-Dataset"
    good = {"problem": "1 + 1?", "answer": "2", "solution": ""}
    Hub(monkeypatch, [good] + [good | {"answer": ""}] * 6, "train")
    assert len(load_rows(name, split="train")) == 1
    assert "6 of 7 rows are left out" in caplog.text
    with pytest.raises(DataError, match="row 2, in the format of DeepScaleR, MATH-500, has no 'a"):
        load_rows("some/other", split="train")
    Hub(monkeypatch, [good] + [good | {"answer": ""}] * 7, "train")
    with pytest.raises(DataError, match="row 8, in the format of DeepScaleR"):
        load_rows(name, split="train")


def test_one_file_of_a_hub_set_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    write(tmp_path, GOOD, "some.jsonl")
    asked = []

    def download(name: str, file: str, *, repo_type: str) -> str:
        asked.append((name, repo_type))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_rows("some/set:some.jsonl", split="train") == [json.loads(GOOD)]
    assert asked == [("some/set", "dataset")]
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match=r"'some/set'.*ZeroDivisionError"):
        load_rows("some/set:some.jsonl", split="train")


def test_a_hub_set_with_many_configurations_asks_for_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["algebra", "geometry"])
    with pytest.raises(DataError, match="Name one: 'some/set:algebra'"):
        load_rows("some/set", split="train")


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"the real GSM8K files are not in {GSM8K}")
def test_the_real_gsm8k_files_load_whole():
    assert len(load_rows(str(GSM8K), split="train")) == 7_473
    assert len(load_rows(str(GSM8K), split="test")) == 1_319
