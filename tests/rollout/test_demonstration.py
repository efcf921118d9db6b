"""Answers that somebody else wrote: what is trained on, over the templates of well-known models."""

from itertools import compress

import pytest

from arealite.errors import TrajectoryError
from arealite.rollout.chat_template import ChatTemplate
from arealite.rollout.demonstration import demonstration
from arealite.types import Trajectory
from tests.rollout.chat_templates import FACTS, NAMES, template_tokenizer

QUESTION = [{"role": "user", "content": "1+2?"}]
OPEN_THOUGHTS = "deepseek_r1"  # whose prompt ends with <think>


def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(template_tokenizer(name), kwargs=dict(FACTS[name].keywords))


def learned(trajectory: Trajectory) -> list[int]:
    return list(compress(trajectory.token_ids, trajectory.loss_mask))


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_and_the_end_of_the_turn_are_learned_and_nothing_else(name: str):
    template, facts = template_of(name), FACTS[name]
    found = demonstration(template, QUESTION, "It is 3.", row_index=7)
    *answer, end = learned(found)
    assert template.tokenizer.decode(answer) == "It is 3."
    assert template.tokenizer.decode([end]) == (facts.end_of_turn or facts.eos)
    context = found.token_ids[: found.loss_mask.index(True)]
    assert context == template.encode(template.render(QUESTION))
    assert found.loss_mask == [False] * len(context) + [True] * (len(answer) + 1)
    assert found.row_index == 7
    assert found.versions == [0 if is_learned else -1 for is_learned in found.loss_mask]


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_an_answer_are_text(name: str):
    template, facts = template_of(name), FACTS[name]
    written = f"3{facts.end_of_turn or facts.eos}4"
    *answer, _ = learned(demonstration(template, QUESTION, written))
    control = {template.tokenizer.convert_tokens_to_ids(each) for each in facts.control_tokens}
    assert not control & set(answer)
    assert template.tokenizer.decode(answer) == written


def test_thoughts_stay_where_a_template_would_drop_them():
    template = template_of("qwen3")
    answer = "<think>\n1 and 2\n</think>\n\n3"
    *tokens, _ = learned(demonstration(template, QUESTION, answer))
    assert template.tokenizer.decode(tokens) == answer


def test_thoughts_that_the_prompt_opens_are_opened_once():
    template = template_of(OPEN_THOUGHTS)
    assert template.render(QUESTION).endswith("<think>\n")
    for answer in ("<think>\n1 and 2</think>3", "1 and 2</think>3"):
        *tokens, _ = learned(demonstration(template, QUESTION, answer))
        assert template.tokenizer.decode(tokens) == "1 and 2</think>3"


def test_an_empty_answer_is_refused():
    with pytest.raises(TrajectoryError, match="no answer"):
        demonstration(template_of("chatml"), QUESTION, " \n")
