"""Rows, tokenizers and responses that do not fit: refused at the start, or recorded one by one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arealite.algo.advantages import group_advantages
from arealite.data import RowOrder, load_rows, load_tokenizer, resolve_model
from arealite.errors import DataError, RolloutError
from arealite.inference.vllm import VLLMEngine
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.testing import ScriptedEngine, ScriptedServer, byte_tokenizer, make_tiny_model
from arealite.training.packing import attach, pack
from arealite.types import Row, SamplingParams, Trajectory
from recipes.gsm8k_grpo import Config, grpo_loss
from tests.faults.training import BUDGET, ROWS, VOCAB_SIZE, asking, id_as_reward
from tests.oracle import SMALL, Oracle

Connect = Callable[..., VLLMEngine]
Start = Callable[..., ScriptedServer]
PROMPT_LENGTH = 25  # of each row, in tokens


def scripted_engine() -> ScriptedEngine:
    return ScriptedEngine(replies=["fine"])


# --- Data sets ------------------------------------------------------------------------------------

GOOD = b'{"question": "1 + 1?", "answer": "2"}'
MALFORMED = {
    b'{"question": "1 + 1?"': "is not valid JSON",
    b'{"question": "1 + 1?"}': "has no 'answer'",
    b'{"question": ["1 + 1?"], "answer": "2"}': "'question' is of type list",
    b'{"question": "1 + 1?", "answer": 2}': "'answer' is of type int",
    b'{"question": "1 + 1?", "answer": ""}': "'answer' is empty",
    b'{"question": "1 + \\u0000?", "answer": "2"}': "'question' contains a NUL character",
    b'{"question": "\xff", "answer": "2"}': "is not UTF-8",
    b'["1 + 1?", "2"]': "is a list, not an object",
    b"": "is empty. Remove it",
}


@pytest.mark.fault(46, "the second of three lines of a JSONL file is malformed")
@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_row_is_refused_before_anything_starts(
    oracle: Oracle, start_recipe: Callable[..., None], tmp_path: Path, line: bytes
):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, line, GOOD]))
    with oracle.ends_with(DataError, f"rows.jsonl, line 2:? {MALFORMED[line]}"):
        start_recipe(f"dataset={file}")


@pytest.mark.fault(46, "one of three lines is malformed, and as many are allowed, or fewer")
@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_rows_are_left_out_up_to_a_quota(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, line, GOOD]))
    assert load_rows(str(file), split="train", max_malformed=1) == [json.loads(GOOD)] * 2
    assert re.search(f"1 of 3 rows are left out: .*line 2:? {MALFORMED[line]}", caplog.text)
    file.write_bytes(b"\n".join([GOOD, line, line, GOOD]))
    with pytest.raises(DataError, match=f"line 3:? {MALFORMED[line]}"):
        load_rows(str(file), split="train", max_malformed=1)


@pytest.mark.fault(47, "a file without a row")
def test_a_data_set_without_rows_is_refused_before_anything_starts(
    oracle: Oracle, start_recipe: Callable[..., None], tmp_path: Path
):
    file = tmp_path / "rows.jsonl"
    file.touch()
    with oracle.ends_with(DataError, "rows.jsonl has no rows"):
        start_recipe(f"dataset={file}")


@pytest.mark.fault(47, "1 row, one less than a batch, a batch, and one more")
@pytest.mark.parametrize("num_rows", [1, 3, 4, 5])
def test_a_small_data_set_is_used_again_and_again(oracle: Oracle, num_rows: int):
    ledger = oracle.train(scripted_engine(), asking(id_as_reward), ROWS[:num_rows], steps=5)
    order = RowOrder(num_rows, seed=0)
    assert sorted(ledger.trained) == list(range(5 * SMALL.prompts_per_step))
    for group in ledger.groups:
        assert group[0].reward == order[group[0].row_index]


# --- Tokenizers -----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(resolve_model("arealite/tiny-math"), tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(model: Path, special_token: str) -> str:
    """The tokenizer alone, as transformers would make up this token for the model's own class."""
    (model / "config.json").unlink()
    missing: dict[str, object] = {special_token: None}
    edit(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **missing)
    return str(model)


@pytest.mark.fault(48, "a model folder without a chat template")
def test_a_tokenizer_without_a_chat_template_is_refused_before_anything_starts(
    oracle: Oracle, start_recipe: Callable[..., None], model: Path
):
    (model / "chat_template.jinja").unlink()
    with oracle.ends_with(DataError, r"no chat template.*Use the instruct variant"):
        start_recipe(f"model={model}")


@pytest.mark.fault(48, "a tokenizer without an end token")
def test_a_tokenizer_without_an_end_token_is_refused(oracle: Oracle, model: Path):
    with oracle.ends_with(DataError, r"no end token.*Set `eos_token` in its tokenizer_config.json"):
        load_tokenizer(without(model, "eos_token"))


@pytest.mark.fault(48, "a tokenizer without a padding token")
def test_a_tokenizer_without_a_padding_token_will_do(oracle: Oracle, model: Path):
    tokenizer = load_tokenizer(without(model, "pad_token"))
    assert tokenizer.pad_token is None
    workflow = SingleTurnWorkflow(tokenizer, id_as_reward, SamplingParams(), group_size=2)
    rows: list[Row] = [{"question": "Today Tom has 3 apples.", "id": 0}]
    ledger = oracle.train(ScriptedEngine(["#### 4"], tokenizer), workflow, rows)
    assert ledger.lost == {}


@pytest.mark.fault(49, "a model folder whose tokenizer has a token more than the model")
def test_a_tokenizer_of_a_larger_model_is_refused_before_anything_starts(
    oracle: Oracle, start_recipe: Callable[..., None], model: Path
):
    edit(model / "config.json", vocab_size=54)
    with oracle.ends_with(DataError, r"token ids up to 54, its model knows only 54.*one folder"):
        start_recipe(f"model={model}")


@pytest.mark.fault(49, "a model folder with the tokenizer of a model that has fewer tokens")
def test_a_tokenizer_of_a_smaller_model_is_refused(oracle: Oracle, model: Path, tmp_path: Path):
    other = Path(make_tiny_model(tmp_path / "other"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / name, other / name)
    with oracle.ends_with(DataError, "belong to different models"):
        load_tokenizer(str(other))


@pytest.mark.fault(49, "a server whose model has fewer tokens than the tokenizer")
def test_a_server_of_another_model_ends_the_run_before_anything_is_trained(
    oracle: Oracle, scripted_server: Start, connect: Connect
):
    engine = connect(scripted_server(vocab_size=100))
    with oracle.ends_with(RolloutError, r"7 of the latest 7.*400: .*is out of vocabulary"):
        oracle.train(engine, asking(), ROWS, at={0: lambda: pytest.fail("it trained")})


# --- The model's context --------------------------------------------------------------------------


@pytest.mark.fault(50, "a context of as many tokens as the prompt")
def test_a_prompt_that_fills_the_context_ends_the_run_with_what_to_change(
    oracle: Oracle, scripted_server: Start, connect: Connect
):
    engine = connect(scripted_server(vocab_size=VOCAB_SIZE, max_model_len=PROMPT_LENGTH))
    with oracle.ends_with(
        RolloutError,
        "PromptTooLongError 7.*A prompt of 25 tokens leaves no room.*raise server.max_model_len",
    ):
        oracle.train(engine, asking(), ROWS)


@pytest.mark.fault(50, "a context with room for 1, all but 1, and all tokens of the budget")
@pytest.mark.parametrize(
    ("room", "reason"), [(1, "context"), (BUDGET - 1, "context"), (BUDGET, "length")]
)
def test_a_response_says_whether_its_budget_or_the_context_ended_it(
    oracle: Oracle, scripted_server: Start, connect: Connect, room: int, reason: str
):
    server = scripted_server(vocab_size=VOCAB_SIZE, max_model_len=PROMPT_LENGTH + room)
    ledger = oracle.train(connect(server), asking(), ROWS)
    samples = [sample for group in ledger.groups for sample in group]
    assert {sample.response_length for sample in samples} == {room}
    assert {sample.finish_reason for sample in samples} == {reason}


# --- Responses and rewards ------------------------------------------------------------------------


def loss_of(groups: list[list[Trajectory]]) -> torch.Tensor:
    """The recipe's loss of a batch, on the policy that sampled it."""
    [minibatch] = pack(
        groups, group_advantages(groups), num_minibatches=1, max_tokens=512, aggregation="token"
    )
    minibatch = attach(minibatch, proximal_logprobs=[mb.behavior_logprobs for mb in minibatch])
    losses = [grpo_loss(mb.behavior_logprobs, mb, Config()).total for mb in minibatch]
    return torch.stack(losses).sum()


@pytest.mark.fault(51, "a server answers one row with no token, others with only the end token")
def test_an_empty_response_is_recorded_and_an_end_token_alone_is_trained_on(
    oracle: Oracle, scripted_server: Start, connect: Connect
):
    end_token = byte_tokenizer().eos_token_id
    victim = byte_tokenizer().encode("3")[0]

    def script(prompt: list[int]) -> list[int]:
        return [] if victim in prompt else [end_token]

    engine = connect(scripted_server(script, vocab_size=VOCAB_SIZE))
    ledger = oracle.train(engine, asking(id_as_reward), ROWS)
    assert {sample.response_length for group in ledger.groups for sample in group} == {1}
    assert torch.isfinite(loss_of(ledger.groups))
    order = RowOrder(len(ROWS), seed=0)
    assert {order[place] for place in ledger.lost} == {3}
    assert all(reason.startswith("failed: TrajectoryError") for reason in ledger.reasons.values())


@pytest.mark.fault(52, "the same reward for every response")
def test_equal_rewards_give_no_gradient_and_no_deadlock(oracle: Oracle):
    ledger = oracle.train(scripted_engine(), asking(id_as_reward), ROWS)
    for divide_by_std in (False, True):
        advantages = group_advantages(ledger.groups, divide_by_std=divide_by_std)
        assert advantages == [[0.0, 0.0]] * len(ledger.groups)
    assert loss_of(ledger.groups) == 0


class Rejecting:
    """A workflow that wants no row."""

    async def arun_episode(self, engine: ScriptedEngine, row: Row) -> None:
        return None


@pytest.mark.fault(53, "a workflow that rejects every row")
def test_a_run_in_which_every_row_is_rejected_ends_with_a_diagnosis(oracle: Oracle):
    with oracle.ends_with(
        RolloutError,
        r"\d+ rows in a row gave no group \(rejected \d+\).*Check what Rejecting.arun_episode rej",
    ):
        oracle.train(scripted_engine(), Rejecting(), ROWS)
