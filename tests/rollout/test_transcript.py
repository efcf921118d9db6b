"""The token ledger of a conversation."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arealite.data import GSM8K_MINI, TINY_MATH, load_rows, load_tokenizer
from arealite.errors import DataError, TrajectoryError
from arealite.rollout.transcript import Transcript
from arealite.testing import byte_tokenizer
from arealite.types import ModelResponse, SamplingParams, Trajectory

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def response(text: str, *, ended: bool = True) -> ModelResponse:
    ids = encode(text) + ([END] if ended else [])
    return ModelResponse(
        token_ids=ids,
        behavior_logprobs=[-1.0] * len(ids),
        versions=[3] * len(ids),
        finish_reason="stop" if ended else "length",
    )


def finish(chat: Transcript) -> Trajectory:
    async def no_reward(text: str, row: dict) -> float:
        return 0.5

    return asyncio.run(chat.finish(no_reward, {}))


def conversation(*texts: str, ended: bool = True) -> Transcript:
    chat = Transcript(TOKENIZER, [{"role": "user", "content": texts[0]}])
    for index, text in enumerate(texts[1:]):
        if index % 2:
            chat.add_message("user", text)
        else:
            chat.request(SamplingParams())
            chat.add_response(response(text, ended=ended))
    return chat


def test_only_what_the_policy_sampled_is_trained_on():
    trajectory = finish(conversation("2+2?", "4", "sure?", "yes"))
    sampled = [t for t, m in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if m]
    assert sampled == [*encode("4"), END, *encode("yes"), END]
    assert [v for v in trajectory.versions if v >= 0] == [3] * len(sampled)


def test_the_whole_reads_as_the_template_would_render_it():
    trajectory = finish(conversation("2+2?", "4", "sure?", "yes"))
    assert TOKENIZER.decode(trajectory.token_ids) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


def test_an_end_token_that_the_policy_did_not_sample_is_added_but_not_trained_on():
    trajectory = finish(conversation("2+2?", "4", "sure?", "yes", ended=False))
    ends = [m for t, m in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if t == END]
    assert ends == [False, False, False]


def test_the_reward_sees_the_last_response_without_special_tokens():
    seen = []

    async def reward(text: str, row: dict) -> float:
        seen.append((text, row))
        return 1.0

    chat = conversation("2+2?", "4", "sure?", "yes")
    assert asyncio.run(chat.finish(reward, {"answer": "4"})).reward == 1.0
    assert seen == [("yes", {"answer": "4"})]


def test_rows_that_the_tokenizer_cannot_read_are_refused():
    tokenizer = load_tokenizer(TINY_MATH)
    question = "Natalia sold clips to 48 of her friends in April. How many did she sell?"
    with pytest.raises(DataError, match=r"drops \d+ of the \d+ words .*'sold', 'clips'"):
        Transcript(tokenizer, [{"role": "user", "content": question}])


def test_rows_that_the_tokenizer_was_made_for_are_read():
    tokenizer = load_tokenizer(TINY_MATH)
    for row in load_rows(GSM8K_MINI, split="test"):
        Transcript(tokenizer, [{"role": "user", "content": row["question"]}])


def test_two_temperatures_in_one_conversation_are_refused():
    chat = conversation("2+2?", "4", "sure?")
    with pytest.raises(TrajectoryError, match="temperature"):
        chat.request(SamplingParams(temperature=0.5))


def test_a_response_with_fewer_log_probs_than_tokens_is_refused():
    chat = Transcript(TOKENIZER, [{"role": "user", "content": "hi"}])
    crooked = ModelResponse(
        token_ids=[5, 6], behavior_logprobs=[-1.0], versions=[0, 0], finish_reason="stop"
    )
    with pytest.raises(TrajectoryError, match="2 tokens, 1 log-probs"):
        chat.add_response(crooked)


def test_a_response_that_was_not_awaited_is_refused_with_what_to_write():
    async def agenerate() -> ModelResponse:
        return response("4")

    coroutine = agenerate()
    with pytest.raises(TrajectoryError, match=r"Put `await` before engine.agenerate"):
        conversation("2+2?").add_response(coroutine)  # type: ignore[arg-type]
    coroutine.close()


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.length }}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    )
    chat = Transcript(tokenizer, [{"role": "user", "content": "hi"}])
    chat.request(SamplingParams())
    chat.add_response(response("hello"))
    with pytest.raises(TrajectoryError, match="only appends"):
        chat.add_message("user", "again")


@given(st.lists(st.text(max_size=12), min_size=2, max_size=6))
def test_what_was_sampled_survives_any_conversation(texts: list[str]):
    texts = texts[: len(texts) // 2 * 2]
    trajectory = finish(conversation(*texts))
    expected = [token for text in texts[1::2] for token in [*encode(text), END]]
    mask, ids = trajectory.loss_mask, trajectory.token_ids
    assert [token for token, is_sampled in zip(ids, mask, strict=True) if is_sampled] == expected
    assert len(ids) == len(mask) == len(trajectory.behavior_logprobs) == len(trajectory.versions)
