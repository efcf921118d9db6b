import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2ForCausalLM

from arealite.config import parse
from arealite.data import load_rows, load_tokenizer, resolve_model
from recipes.byte_bpe_model import Config, main

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def test_the_model_reads_any_text_and_every_loader_gives_the_same_ids(tmp_path: Path):
    rows = [
        {"question": f"What is {n} + 1?", "answer": f"It's {n + 1}.\n#### {n + 1}"}
        for n in range(50)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "model"
    main(parse(Config, [f"dataset={tmp_path}", f"out={out}", "vocab_size=320", "num_layers=1"]))

    tokenizer = load_tokenizer(resolve_model(str(out)))
    for text in ("What is 12 + 1?", "Zoë pays €3.50\r\n\tfor  naïve 日本 🦆s", "<|user|>x<|end|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert AutoTokenizer.from_pretrained(out).encode(text) == ids
    model = Qwen2ForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"the real GSM8K files are not in {GSM8K}")
def test_every_real_question_leaves_room_for_an_answer(tmp_path: Path):
    out = tmp_path / "model"
    main(parse(Config, [f"dataset={GSM8K}", f"out={out}", "num_layers=1"]))
    tokenizer = load_tokenizer(str(out))
    assert len(tokenizer) == 2_000
    lengths = [
        len(tokenizer.encode(row["question"])) for row in load_rows(str(GSM8K), split="test")
    ]
    assert max(lengths) < 512
