"""TRL's half of `trl_parity.py`: runs in TRL's own environment and knows nothing of arealite.

    python trl_side.py FOLDER    # jobs.json in it -> <number>.safetensors and figures.json

Each job is one optimizer step of TRL's `GRPOTrainer.train()`. Its rewards, advantages, masks,
normalizers, loss, accumulation and backward are TRL's own. Only two things are handed in: the
tokens, through its `rollout_func`, and the old log-probs, which TRL would have from an earlier
state of its model.
"""

import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PACKAGES = ("trl", "transformers", "torch", "accelerate")

Sample = dict[str, Any]
"""prompt_ids, completion_ids, is_sampled and old_logprobs of the completion, and its reward."""


class GivenTrainer(GRPOTrainer):
    """A trainer whose old log-probs are given, and which adds up the loss of a step."""

    old_logprobs: list[list[float]] | None = None
    loss = 0.0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.old_logprobs is not None:
            given = [torch.tensor(values) for values in self.old_logprobs]
            output["old_per_token_logps"] = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.loss += loss.item()
        return loss


class KeepGradient(TrainerCallback):
    """Copies what the optimizer is about to see."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            self.gradient[name] = parameter.grad.detach().clone()


def in_order_of(prompts: list[str], groups: list[list[Sample]]) -> list[Sample]:
    """A sample per prompt; a prompt is the place of its group, once per sample of it."""
    seen: Counter[str] = Counter()
    samples = []
    for prompt in prompts:
        samples.append(groups[int(prompt)][seen[prompt]])
        seen[prompt] += 1
    return samples


def make_config(job: dict[str, Any], folder: Path) -> GRPOConfig:
    """The job's options on top of what makes a plain float32 step on the CPU."""
    groups = job["groups"]
    num_samples = sum(len(group) for group in groups)
    return GRPOConfig(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        bf16=False,  # TRL's default is True
        gradient_checkpointing=False,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,  # no clipping of the gradient
        per_device_train_batch_size=num_samples // job["accumulation"],
        gradient_accumulation_steps=job["accumulation"],
        num_generations=len(groups[0]),
        shuffle_dataset=False,
        beta=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **job["options"],
    )


def run(job: dict[str, Any], folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of one step by parameter name, and the loss and share of clipped tokens."""
    groups, keeper = job["groups"], KeepGradient()

    def rollout(prompts: list[str], trainer: GivenTrainer) -> dict[str, Any]:
        samples = in_order_of(prompts, groups)
        if job["has_old_logprobs"]:
            trainer.old_logprobs = [sample["old_logprobs"] for sample in samples]
        return {
            "prompt_ids": [sample["prompt_ids"] for sample in samples],
            "completion_ids": [sample["completion_ids"] for sample in samples],
            "env_mask": [sample["is_sampled"] for sample in samples],
            "logprobs": None,  # of a sampler that differs from the trainer, such as vLLM
        }

    def reward(prompts: list[str], **_: Any) -> list[float]:
        return [sample["reward"] for sample in in_order_of(prompts, groups)]

    trainer = GivenTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
        reward_funcs=reward,
        rollout_func=rollout,
        args=make_config(job, folder),
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(groups))]),
        callbacks=[keeper],
    )
    trainer.train()
    clipped = [row for row in trainer.state.log_history if "clip_ratio/region_mean" in row]
    return keeper.gradient, {
        "loss": trainer.loss,
        "clipped": float(clipped[0]["clip_ratio/region_mean"]),
    }


def main(folder: Path) -> None:
    figures = []
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        gradient, found = run(job, folder)
        save_file(gradient, folder / f"{number}.safetensors")
        figures.append(found)
    versions = {name: version(name) for name in PACKAGES}
    (folder / "figures.json").write_text(json.dumps({"versions": versions, "jobs": figures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
