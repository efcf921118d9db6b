import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from arealite.data import (
    GSM8K_LARGE,
    GSM8K_MINI,
    TINY_AGENT,
    TINY_MATH,
    TINY_PROGRAMS,
    TINY_STEPS,
    load_rows,
    load_tokenizer,
    resolve_model,
)
from arealite.data.tiny_model import agent_tokenizer, tiny_tokenizer
from arealite.errors import DataError

TINY = Path(resolve_model("arealite/tiny-math"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", [TINY_MATH, TINY_STEPS, TINY_AGENT])
def test_an_embedded_model_is_a_complete_folder_of_at_most_2_mb(name: str):
    files = list(Path(resolve_model(name)).iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_a_folder_is_its_own_name_and_a_hub_id_stays_as_it_is(folder: Path):
    assert resolve_model(str(folder)) == str(folder)
    assert resolve_model("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "../no", "a/b/c", ""]
)
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(name: str):
    for function in (resolve_model, load_tokenizer):
        with pytest.raises(DataError, match="There is no model folder"):
            function(name)


def test_an_embedded_model_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(
        DataError,
        match=r"tiny-maths'.*'arealite/tiny-math', 'arealite/tiny-steps', 'arealite/tiny-agent'",
    ):
        resolve_model("arealite/tiny-maths")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused_with_the_missing_file(folder: Path, missing: str):
    (folder / missing).unlink()
    with pytest.raises(DataError, match=f"has no {missing}"):
        resolve_model(str(folder))


def test_a_missing_shard_of_the_weights_is_named(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(DataError, match=r"has no model-00002-of-00002.safetensors"):
        resolve_model(str(folder))
    index.write_text('{"weight_map": ')
    with pytest.raises(DataError, match="is not an index of weight files"):
        resolve_model(str(folder))


def test_a_file_is_not_a_model(folder: Path):
    with pytest.raises(DataError, match="is a file"):
        resolve_model(str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "made_by_code", "datasets"),
    [
        (TINY_MATH, tiny_tokenizer, [GSM8K_MINI]),
        (TINY_STEPS, tiny_tokenizer, [GSM8K_MINI]),
        (TINY_AGENT, agent_tokenizer, [GSM8K_MINI, GSM8K_LARGE, TINY_PROGRAMS]),
    ],
)
def test_trainer_workflow_and_server_read_the_same_ids_whatever_class_they_load(
    name: str, made_by_code: Callable[[], Qwen2Tokenizer], datasets: list[str]
):
    # transformers reads a folder of type qwen2 as Qwen2Tokenizer, whatever its files say.
    folder = resolve_model(name)
    tokenizers = [
        load_tokenizer(name),
        AutoTokenizer.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
        made_by_code(),
    ]
    assert {str(tokenizer.chat_template) for tokenizer in tokenizers} == {
        str(made_by_code().chat_template)
    }
    plain = Tokenizer.from_file(f"{folder}/tokenizer.json")
    texts = ["<|user|>Today Tom has 12 apples.<|end|><|assistant|>", "Wrong. Try again. \n\n 7+1"]
    texts += [
        row["question"] + row["answer"]
        for dataset in datasets
        for row in load_rows(dataset, split="test")
    ]
    for text in texts:
        expected = plain.encode(text).ids
        assert [tokenizer.encode(text) for tokenizer in tokenizers] == [expected] * 4


def test_the_embedded_tokenizer_has_55_tokens_and_single_digits():
    tokenizer = load_tokenizer("arealite/tiny-math")
    assert len(tokenizer) == 55
    assert [tokenizer.decode([token]) for token in tokenizer.encode("<<3*20=60>>60\n#### 60")] == [
        *("<<", "3", "*", "2", "0", "=", "6", "0", ">>", "6", "0", "\n", "####", " ", "6", "0")
    ]
    special = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    assert special == {"<|end|>", "<|pad|>", "<|unk|>"}


def test_a_conversation_only_grows_at_its_end():
    tokenizer = load_tokenizer("arealite/tiny-math")
    messages = [
        {"role": "user", "content": "Today Tom has 3 apples."},
        {"role": "assistant", "content": "#### 4"},
        {"role": "user", "content": "Wrong. Try again."},
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>Today Tom has 3 apples.<|end|><|assistant|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole == f"{prompt}#### 4<|end|><|user|>Wrong. Try again.<|end|><|assistant|>"


CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "12*(3+4)"}}\n</tool_call>'


def test_a_conversation_with_a_tool_reads_like_one_of_qwen():
    tokenizer = load_tokenizer(TINY_AGENT)
    messages = [
        {"role": "user", "content": "Today Tom has 12 apples."},
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "84"},
        {"role": "assistant", "content": "#### 84"},
    ]
    tools = [{"type": "function", "function": {"name": "calculate"}}]
    whole = (
        "<|system|>Tools: calculate<|end|><|user|>Today Tom has 12 apples.<|end|>"
        f"<|assistant|>{CALL}<|end|><|tool|>84<|end|><|assistant|>#### 84<|end|>"
    )
    rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)  # type: ignore[arg-type]
    assert rendered == whole
    assert tokenizer.decode(tokenizer.encode(whole)) == whole
    for arguments in ('{"expression": "12*(3+4)"}', {"expression": "12*(3+4)"}):
        call = {"type": "function", "function": {"name": "calculate", "arguments": arguments}}
        messages[1] = {"role": "assistant", "content": None, "tool_calls": [call]}
        rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)  # type: ignore[arg-type]
        assert rendered == whole


def test_the_fixed_parts_of_a_call_are_few_tokens():
    tokenizer = load_tokenizer(TINY_AGENT)
    assert [tokenizer.decode([token]) for token in tokenizer.encode(CALL)] == [
        *("<tool_call>", '\n{"name": "calculate", "arguments": {"expression": "'),
        *("1", "2", "*", "(", "3", "+", "4", ")"),
        *('"}}\n', "</tool_call>"),
    ]
    assert len(tokenizer) == 106


def test_a_folder_without_tokenizer_files_does_not_pass_with_an_empty_vocabulary(folder: Path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer.*tokenizer\.json"):
        load_tokenizer(str(folder))


def test_a_broken_tokenizer_file_gives_one_clear_error(folder: Path):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="gave no tokenizer"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_chat_template_is_refused_with_what_to_do(folder: Path):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"no chat template.*chat_template\.jinja"):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_end_token_is_refused_with_what_to_do(folder: Path):
    (folder / "config.json").unlink()  # else Qwen2Tokenizer brings an end token of its own
    edit(
        folder / "tokenizer_config.json", eos_token=None, tokenizer_class="PreTrainedTokenizerFast"
    )
    with pytest.raises(DataError, match=r"no end token.*tokenizer_config.json"):
        load_tokenizer(str(folder))


def test_a_tokenizer_of_another_model_is_refused(folder: Path):
    edit(folder / "config.json", vocab_size=54)
    with pytest.raises(DataError, match="token ids up to 54, its model knows only 54"):
        load_tokenizer(str(folder))
