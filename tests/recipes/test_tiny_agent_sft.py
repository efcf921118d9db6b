import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from arealite.config import parse
from arealite.data import TINY_AGENT, load_tokenizer, resolve_model
from arealite.data.tiny_model import agent_tokenizer, tiny_config
from recipes import tiny_agent_sft
from recipes.tiny_agent_lessons import Lesson, calculation, correction
from recipes.tiny_agent_sft import Config, evaluate, lesson_loss, main
from tests.recipes.scripted import first_rows

LARGE = {
    "question": "Today Tom has 300 apples. Tom buys 100 more.",
    "answer": "<<300+100=400>>400\n#### 400",
}
SMALL = {"question": "Today Mia has 2 coins. Mia loses 1.", "answer": "<<2-1=1>>1\n#### 1"}
CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "300+100"}}\n</tool_call>'


def nats(model: Qwen2ForCausalLM, context: str, answer: str) -> tuple[float, int]:
    """What an answer costs, token by token, and how many tokens it has."""
    tokenizer = agent_tokenizer()
    given, tokens = tokenizer.encode(context), tokenizer.encode(answer)
    total = 0.0
    for place, token in enumerate(tokens):
        logits = model(torch.tensor([given + tokens[:place]])).logits[0, -1]
        total -= logits.log_softmax(-1)[token].item()
    return total, len(tokens)


def test_loss_counts_what_the_assistant_says_and_no_mistake_that_it_is_given():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(agent_tokenizer())).eval()
    asked = f"<|system|>Tools: calculate<|end|><|user|>{LARGE['question']}<|end|><|assistant|>"
    called = f"{CALL}<|end|>"
    told = f"{asked}{called}<|tool|>400<|end|><|assistant|>"
    wrong = f"<|user|>{SMALL['question']}<|end|><|assistant|>#### 3<|end|>"
    corrected = f"{wrong}<|user|>Wrong. Try again.<|end|><|assistant|>"
    parts = [
        nats(model, asked, called),
        nats(model, told, "#### 400<|end|>"),
        nats(model, corrected, f"{SMALL['answer']}<|end|>"),
    ]
    expected = sum(total for total, _ in parts) / sum(count for _, count in parts)
    batch: list[Lesson] = [
        calculation(LARGE, is_hasty=False),
        correction(SMALL, 2, is_hasty=False),
    ]
    loss = lesson_loss(model, agent_tokenizer(), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_short_run_learns_and_leaves_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiny_agent_sft, "load_rows", first_rows)
    out = tmp_path / "model"
    settings = ["steps=30", "num_worked_steps=20", "batch_size=16", "eval_samples=1"]
    figures = main(parse(Config, [*settings, f"out_dir={out}"]))
    assert figures["loss"] < 3.5  # of ln 106 = 4.7 at first
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == {"steps": 30, "train_s": printed["train_s"], **figures}
    assert resolve_model(str(out)) == str(out)
    assert len(load_tokenizer(str(out))) == 106


def test_the_shipped_model_has_a_better_way_for_each_task_than_its_usual_one():
    assert_leaves_strategies_to_learn(evaluate(resolve_model(TINY_AGENT), samples=1))


@pytest.mark.soak
def test_the_recipe_still_makes_such_a_model(tmp_path: Path):
    assert_leaves_strategies_to_learn(main(Config(out_dir=str(tmp_path / "model"))))


def assert_leaves_strategies_to_learn(figures: dict[str, float]) -> None:
    assert 0.12 <= figures["share_with_calls"] <= 0.4
    assert figures["accuracy_with_calls"] >= 0.7
    assert figures["accuracy_large"] <= 0.35
    assert 0.1 <= figures["accuracy_turn_1"] <= 0.45
    assert 0.1 <= figures["accuracy_turn_2"] <= 0.4
    assert 0.15 <= figures["pass_rate"] <= 0.45
