import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from arealite.config import parse
from arealite.data import load_rows, load_tokenizer, resolve_model
from arealite.data.tiny_model import tiny_config, tiny_tokenizer
from recipes.tiny_sft import (
    TINY_STEPS_SETTINGS,
    Config,
    evaluate,
    main,
    sft_loss,
    train,
    training_rows,
)


def test_loss_counts_the_answer_and_the_end_token_and_no_padding():
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(tiny_config(tokenizer)).eval()
    rows = [
        {"question": "Today Tom has 3 apples.", "answer": "#### 3"},
        {"question": "Today Mia has 2 coins. Mia loses 1.", "answer": "<<2-1=1>>1\n#### 1"},
    ]
    total, count = 0.0, 0
    for row in rows:  # one by one and token by token, without labels or padding
        prompt = tokenizer.encode(f"<|user|>{row['question']}<|end|><|assistant|>")
        answer = tokenizer.encode(f"{row['answer']}<|end|>")
        for place, token in enumerate(answer):
            logits = model(torch.tensor([prompt + answer[:place]])).logits[0, -1]
            total -= logits.log_softmax(-1)[token].item()
            count += 1
    assert count == 4 + 13
    assert sft_loss(model, tokenizer, rows).item() == pytest.approx(total / count, rel=1e-4)


def test_seven_problems_in_ten_are_answered_at_once_and_none_is_held_out():
    rows = training_rows(Config(steps=50, num_worked_steps=0))
    direct = [row for row in rows if row["answer"].startswith("#### ")]
    assert len(rows) == 50 * 64
    assert 0.67 < len(direct) / len(rows) < 0.73
    held_out = {row["question"] for row in load_rows("arealite/gsm8k-mini", split="test")}
    assert not held_out & {row["question"] for row in rows}


def test_every_answer_of_the_first_steps_is_worked_out():
    rows = training_rows(Config(steps=50, num_worked_steps=20))
    is_worked = [row["answer"].startswith("<<") for row in rows]
    assert all(is_worked[: 20 * 64])
    assert not all(is_worked[20 * 64 :])


def test_stopping_early_leaves_the_weights_as_they_were_at_that_step_of_the_whole_run():
    def seen_in(cfg: Config) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model, before_step = torch.nn.Linear(1, 1, bias=False), []
        torch.nn.init.ones_(model.weight)

        def loss_of(examples: list[float]) -> torch.Tensor:
            before_step.append(model.weight.detach().clone())
            return (model(torch.tensor(examples)[:, None]) - 3).square().mean()

        train(model, [1.0 + 0.1 * n for n in range(40)], loss_of, cfg)  # type: ignore[arg-type]
        return model.weight.detach(), before_step

    whole = Config(steps=20, batch_size=2)
    _, before_step = seen_in(whole)
    stopped, before_stop = seen_in(replace(whole, stop_after_steps=7))
    assert len(before_stop) == 7
    assert stopped.equal(before_step[7])
    problems = training_rows(replace(whole, stop_after_steps=7))
    assert problems == training_rows(whole)[: 7 * 2]


def test_a_short_run_learns_both_ways_to_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "model"
    settings = ["steps=100", "num_worked_steps=0", "eval_samples=1", f"out_dir={out}"]
    figures = main(parse(Config, settings))
    # Guessing each token by its frequency costs more than 2 nats.
    assert figures["loss"] < 1.0
    assert 0.15 < figures["share_worked"] < 0.45
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == {"steps": 100, "train_s": printed["train_s"], **figures}
    assert resolve_model(str(out)) == str(out)
    assert len(load_tokenizer(str(out))) == 55


def test_the_shipped_model_has_a_better_way_to_answer_than_its_usual_one():
    tokenizer = tiny_tokenizer()
    model = Qwen2ForCausalLM.from_pretrained(
        resolve_model("arealite/tiny-math"), dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    rows = load_rows("arealite/gsm8k-mini", split="test")
    figures = evaluate(model.eval(), tokenizer, rows, samples=2)
    assert_leaves_a_strategy_to_learn(figures)


def test_the_shipped_model_of_steps_works_everything_out_and_often_wrongly():
    tokenizer = tiny_tokenizer()
    model = Qwen2ForCausalLM.from_pretrained(
        resolve_model("arealite/tiny-steps"), dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    rows = load_rows("arealite/gsm8k-mini", split="test")
    assert_leaves_steps_to_learn(evaluate(model.eval(), tokenizer, rows, samples=1))


@pytest.mark.soak
@pytest.mark.parametrize("settings", [(), TINY_STEPS_SETTINGS], ids=["tiny-math", "tiny-steps"])
def test_the_recipe_still_makes_such_a_model(tmp_path: Path, settings: tuple[str, ...]):
    figures = main(parse(Config, [*settings, f"out_dir={tmp_path}/model"]))
    if settings:
        assert_leaves_steps_to_learn(figures)
    else:
        assert_leaves_a_strategy_to_learn(figures)


def assert_leaves_steps_to_learn(figures: dict[str, float]) -> None:
    assert 0.40 <= figures["greedy_accuracy"] <= 0.60
    assert 0.30 <= figures["sampled_accuracy"] <= 0.50
    assert figures["share_worked"] >= 0.99


def assert_leaves_a_strategy_to_learn(figures: dict[str, float]) -> None:
    assert 0.45 <= figures["greedy_accuracy"] <= 0.60
    assert 0.40 <= figures["sampled_accuracy"] <= 0.65
    assert 0.2 <= figures["share_worked"] <= 0.4
    assert figures["accuracy_worked"] >= 0.85 > 0.5 > figures["accuracy_direct"]
