"""Accuracy of an exported checkpoint by plain transformers, on problems nobody has seen.

    python benchmarks/grade.py runs/gsm8k_grpo/model

Nothing of the training or serving code takes part: the model is loaded and decoded greedily by
transformers, and graded by comparing the number behind `####`. Ends with one line of JSON.
"""

import json
import math
import sys
from collections.abc import Collection

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from arealite.data import GSM8K_MINI, generate_problems, load_rows
from arealite.types import Row

COUNT, BATCH, MAX_NEW_TOKENS = 500, 100, 64


def answers(folder: str, questions: list[str]) -> list[str]:
    """The greedy response to each question."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts: list[str] = []
    for start in range(0, len(questions), BATCH):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions[start : start + BATCH]
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        responses = output[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(responses, skip_special_tokens=True)
    return texts


def is_right(text: str, gold: str) -> bool:
    """Whether both end in the same number behind `####`."""
    return text.rpartition("####")[2].strip() == gold.rpartition("####")[2].strip()


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share. Source: Wilson, 1927, https://doi.org/10.2307/2276774."""
    z, share = 1.96, right / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half = z * spread / (1 + z * z / count)
    return round(center - half, 4), round(center + half, 4)


def unseen_problems(count: int, *, exclude: Collection[str] = ()) -> list[Row]:
    """Problems that are neither in the data set nor in `exclude`."""
    splits = ("train", "test")
    known = {row["question"] for split in splits for row in load_rows(GSM8K_MINI, split=split)}
    return generate_problems(count, seed=20_000, exclude=known.union(exclude))


def grade(folder: str) -> float:
    """Share of the problems whose greedy answer is right."""
    rows = unseen_problems(COUNT)
    texts = answers(folder, [row["question"] for row in rows])
    return sum(is_right(text, row["answer"]) for text, row in zip(texts, rows, strict=True)) / COUNT


def main(folder: str) -> None:
    accuracy = grade(folder)
    low, high = wilson_interval(round(accuracy * COUNT), COUNT)
    print(json.dumps({"accuracy": accuracy, "low": low, "high": high, "count": COUNT}))


if __name__ == "__main__":
    main(sys.argv[1])
