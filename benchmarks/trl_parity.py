"""Does one optimizer step have the same gradient as in TRL? The real code of both, on one batch.

    python benchmarks/trl_parity.py                  # makes TRL's environment first: 1.2 GB
    python benchmarks/trl_parity.py --venv FOLDER    # where that is, or is to be
    python benchmarks/trl_parity.py --trl 1.16.0     # another release

Here: `pack`, `FSDPEngine` and the loss of `recipes/gsm8k_grpo.py`. There, in a process and a
virtual environment of its own (`trl_side.py`): `GRPOTrainer.train()`. Both get the same tiny model
in float32, tokens, masks, rewards and old log-probs. The responses are ragged, each has a tool's
answer in the middle that is not trained on, and the old log-probs are far enough from the current
ones for the clip to act. Proximal equals behavior, so the importance weight of the recipe is 1.

A difference is the norm of the difference of the gradients of all parameters over the norm of
TRL's. Some settings must differ, by a choice of TRL's or ours that stands below the table; where
that is a factor, it is taken out first. A minute once TRL is there. Ends with one line of JSON; the
exit status is 1 if a setting differs by more than 1e-5 that must not.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from arealite.algo import advantages
from arealite.testing.models import make_tiny_model
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import Aggregation, attach, pack
from arealite.types import StepStats, Trajectory
from recipes.gsm8k_grpo import Config, grpo_loss

TRL = "1.16.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's torch for Linux brings CUDA with it
LARGEST_DIFFERENCE = 1e-5
TRL_STD_EPS = 1e-4

NUM_GROUPS, GROUP_SIZE, MAX_RESPONSE = 4, 4, 48
NUM_TOKENS = 259  # of the byte tokenizer; the model has some more
ONE_MICRO_BATCH, SHORT_MICRO_BATCHES = 10_000, 120  # tokens

Gradient = dict[str, torch.Tensor]
Groups = list[list[Trajectory]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of the table: what each side is told."""

    name: str
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"]  # TRL's
    aggregation: Aggregation  # ours
    scale_rewards: Literal["none", "group", "batch"] = "none"
    std_eps: float = TRL_STD_EPS  # on our side; TRL's is what it is
    accumulation: int = 1  # TRL's micro-batches
    micro_batch_tokens: int = ONE_MICRO_BATCH  # ours
    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    is_on_policy: bool = False  # no old log-probs: each side takes its current ones
    has_masked_sequence: bool = False  # one sequence without any trainable token
    family: Literal["qwen2", "qwen3", "llama"] = "qwen2"
    factor: float | None = 1.0  # our gradient over TRL's; None: no factor says it all

    @property
    def options(self) -> dict[str, Any]:
        """Those of TRL's GRPOConfig."""
        return {
            "loss_type": self.loss_type,
            "scale_rewards": self.scale_rewards,
            "temperature": self.temperature,
            "epsilon": self.clip_low,
            "epsilon_high": self.clip_high,
            "max_completion_length": MAX_RESPONSE,
        }


grpo = partial(Setting, loss_type="grpo", aggregation="sequence")
dr_grpo = partial(Setting, loss_type="dr_grpo", aggregation="constant")
dapo = partial(Setting, loss_type="dapo", aggregation="token")
bnpo = partial(Setting, loss_type="bnpo", aggregation="token")
in_parts = {"accumulation": 4, "micro_batch_tokens": SHORT_MICRO_BATCHES}
COUNT = NUM_GROUPS * GROUP_SIZE

AGREEING = (
    grpo(name="GRPO", scale_rewards="group"),
    grpo(name="GRPO, micro-batches", scale_rewards="group", **in_parts),
    grpo(name="GRPO, clip .2 / .2", scale_rewards="group", clip_high=0.2),
    grpo(name="GRPO, rewards not scaled"),
    dr_grpo(name="Dr. GRPO"),
    dr_grpo(name="Dr. GRPO, micro-batches", **in_parts),
    dr_grpo(name="Dr. GRPO, temperature 0.7", temperature=0.7, **in_parts),
    dapo(name="DAPO", scale_rewards="group"),
    dapo(name="DAPO, micro-batches", scale_rewards="group", **in_parts),
    dapo(name="DAPO, rewards not scaled", **in_parts),
    dapo(name="DAPO, std of the batch", scale_rewards="batch", **in_parts),
    dapo(name="DAPO, temperature 0.7", scale_rewards="group", temperature=0.7, **in_parts),
    dapo(name="DAPO, temperature 1.3", scale_rewards="group", temperature=1.3, **in_parts),
    dapo(name="DAPO, on policy", scale_rewards="group", is_on_policy=True, **in_parts),
    dapo(name="DAPO, a masked sequence", has_masked_sequence=True, **in_parts),
    dapo(name="DAPO, Qwen3, head not tied", family="qwen3", **in_parts),
    dapo(name="DAPO, Llama, head not tied", family="llama", **in_parts),
    bnpo(name="BNPO, only we have micro-batches", micro_batch_tokens=SHORT_MICRO_BATCHES),
    # The mean over one sequence's tokens is its own, so TRL's BNPO must then be GRPO.
    grpo(name="GRPO, BNPO one by one", loss_type="bnpo", accumulation=COUNT),
)
DIFFERING = (
    grpo(name="GRPO, our eps", scale_rewards="group", std_eps=advantages.STD_EPS, factor=None),
    bnpo(name="BNPO, micro-batches", factor=None, **in_parts),
    grpo(
        name="GRPO, a masked sequence",
        has_masked_sequence=True,
        factor=COUNT / (COUNT - 1),
        **in_parts,
    ),
    dr_grpo(
        name="Dr. GRPO, a masked sequence",
        has_masked_sequence=True,
        factor=COUNT / (COUNT - 1),
        **in_parts,
    ),
)
WHY = f"""\
Lines of TRL {TRL} that make the last {len(DIFFERING)} differ:

- our eps: `advantages = advantages / (std_rewards + 1e-4)` (trl/trainer/grpo_trainer.py,
  `_generate_and_score_completions`); `group_advantages` adds {advantages.STD_EPS:g}. The settings
  above take TRL's.
- BNPO, micro-batches: "normalization is performed over the local batch only, so results may
  slightly vary depending on the local batch size" (trl/trainer/grpo_config.py, `loss_type`). `pack`
  divides by the count of the whole batch.
- a masked sequence: `((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()` and
  `/ (per_token_loss.size(0) * self.max_completion_length)` (trl/trainer/grpo_trainer.py,
  `_compute_loss`) count a sequence without a trainable token; `pack` does not. Their difference is
  that of the gradients after ours was divided by {COUNT} / {COUNT - 1}.

In parentheses: no factor explains all of it. TRL's share of clipped tokens is the mean over
micro-batches of their shares, ours that of all tokens."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What both sides found for a setting."""

    setting: str
    loss_ours: float
    loss_trl: float
    gradient_norm_trl: float
    clipped_ours: float
    clipped_trl: float
    micro_batches_ours: int
    micro_batches_trl: int
    gradient_difference: float
    must_agree: bool


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What this side found for a setting."""

    gradient: Gradient = field(repr=False)
    stats: StepStats
    num_micro_batches: int


# --- The batch ------------------------------------------------------------------------------------


def make_groups(temperature: float, *, has_masked_sequence: bool) -> Groups:
    """Ragged trajectories of two turns with a tool's answer between; the last group ties."""
    dice = random.Random(5)
    groups = []
    for row in range(NUM_GROUPS):
        prompt = [dice.randrange(NUM_TOKENS) for _ in range(dice.randint(3, 12))]
        group = [make_trajectory(prompt, row, temperature, dice) for _ in range(GROUP_SIZE)]
        groups.append(group)
    groups[-1] = [replace(trajectory, reward=0.3) for trajectory in groups[-1]]
    if has_masked_sequence:
        masked = groups[0][1]
        groups[0][1] = replace(masked, loss_mask=[False] * len(masked.token_ids))
    return groups


def make_trajectory(
    prompt: list[int], row: int, temperature: float, dice: random.Random
) -> Trajectory:
    """Random tokens behind the prompt, random rewards."""
    turns = [(True, dice.randint(1, 20)), (False, dice.randint(1, 8)), (True, dice.randint(1, 20))]
    mask = [False] * len(prompt) + [is_sampled for is_sampled, n in turns for _ in range(n)]
    response = [dice.randrange(NUM_TOKENS) for _ in range(len(mask) - len(prompt))]
    return Trajectory(
        token_ids=prompt + response,
        loss_mask=mask,
        behavior_logprobs=[0.0] * len(mask),
        versions=[0 if is_sampled else -1 for is_sampled in mask],
        reward=round(dice.random(), 2),
        temperature=temperature,
        finish_reason="stop",
        row_index=row,
    )


def with_old_logprobs(engine: FSDPEngine, groups: Groups, *, distance: float) -> Groups:
    """The same groups with the engine's log-probs, each moved by up to this distance, as behavior.

    A half makes ratios from 0.6 to 1.6.
    """
    dice = random.Random(6)

    def moved(trajectory: Trajectory) -> Trajectory:
        # Alone, so that its log-probs need no search in a micro-batch.
        [minibatch] = pack(
            [[trajectory]],
            [[0.0]],
            num_minibatches=1,
            max_tokens=ONE_MICRO_BATCH,
            aggregation="token",
        )
        [current] = engine.logprobs(minibatch)
        old = torch.tensor(
            [value + dice.uniform(-distance, distance) for value in current.tolist()]
        )
        mask = torch.tensor(trajectory.loss_mask)
        return replace(trajectory, behavior_logprobs=torch.where(mask, old, 0.0).tolist())

    return [[moved(trajectory) for trajectory in group] for group in groups]


def to_job(setting: Setting, model: str, groups: Groups) -> dict[str, Any]:
    """What `trl_side.py` is told."""

    def sample(trajectory: Trajectory, prompt_length: int) -> dict[str, Any]:
        return {
            "prompt_ids": trajectory.token_ids[:prompt_length],
            "completion_ids": trajectory.token_ids[prompt_length:],
            "is_sampled": [int(value) for value in trajectory.loss_mask[prompt_length:]],
            "old_logprobs": trajectory.behavior_logprobs[prompt_length:],
            "reward": trajectory.reward,
        }

    # A group has one prompt, and no masked sequence at its end.
    lengths = [group[-1].loss_mask.index(True) for group in groups]
    return {
        "model": model,
        "options": setting.options,
        "accumulation": setting.accumulation,
        "has_old_logprobs": not setting.is_on_policy,
        "groups": [
            [sample(trajectory, length) for trajectory in group]
            for group, length in zip(groups, lengths, strict=True)
        ],
    }


# --- Our side -------------------------------------------------------------------------------------


def scaled_advantages(groups: Groups, setting: Setting) -> list[list[float]]:
    """`group_advantages` with TRL's choice of what to divide by."""
    with patch.object(advantages, "STD_EPS", setting.std_eps):
        found = advantages.group_advantages(groups, divide_by_std=setting.scale_rewards == "group")
    if setting.scale_rewards != "batch":
        return found
    rewards = torch.tensor([trajectory.reward for group in groups for trajectory in group])
    scale = float(rewards.std()) + setting.std_eps
    return [[value / scale for value in group] for group in found]


@contextmanager
def kept_gradient(engine: FSDPEngine) -> Iterator[Gradient]:
    """Filled with what the optimizer sees in the step inside."""
    gradient: Gradient = {}

    def keep(*_: object) -> None:
        for name, parameter in engine._policy.model.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            gradient[name] = parameter.grad.full_tensor().cpu().clone()

    hook = engine._optimizer.register_step_pre_hook(keep)
    yield gradient
    hook.remove()


def our_step(engine: FSDPEngine, setting: Setting, groups: Groups) -> Ours:
    """One step as the recipe takes it."""
    [minibatch] = pack(
        groups,
        scaled_advantages(groups, setting),
        num_minibatches=1,
        max_tokens=setting.micro_batch_tokens,
        aggregation=setting.aggregation,
        max_length=MAX_RESPONSE,
    )
    old = [mb.behavior_logprobs for mb in minibatch]
    proximal = engine.logprobs(minibatch) if setting.is_on_policy else old
    cfg = Config(clip_low=setting.clip_low, clip_high=setting.clip_high)
    with kept_gradient(engine) as gradient:
        stats = engine.step(
            attach(minibatch, proximal_logprobs=proximal), partial(grpo_loss, cfg=cfg)
        )
    return Ours(gradient=gradient, stats=stats, num_micro_batches=len(minibatch))


def run_ours(setting: Setting, model: str) -> tuple[Ours, dict[str, Any]]:
    """Our figures for a setting, and the job for TRL that asks the same."""
    groups = make_groups(setting.temperature, has_masked_sequence=setting.has_masked_sequence)
    # A step that changes nothing and clips no gradient.
    train = FSDPConfig(lr=0.0, max_grad_norm=1e9, dtype="float32")
    with FSDPEngine(model, train) as engine:
        distance = 0.0 if setting.is_on_policy else 0.5
        groups = with_old_logprobs(engine, groups, distance=distance)
        return our_step(engine, setting, groups), to_job(setting, model, groups)


# --- TRL's side -----------------------------------------------------------------------------------


def trl_python(folder: Path, version: str) -> Path:
    """The Python of a virtual environment that has this TRL; made if it is not there."""
    python, stamp = folder / "bin" / "python", folder / "trl-version"
    if stamp.exists() and stamp.read_text() == version:
        return python
    print(f"Installing TRL {version} into {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    torch_version = torch.__version__.partition("+")[0]
    if sys.platform == "linux":
        torch_version += "+cpu"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--no-compile"]
    index = ["--extra-index-url", CPU_INDEX] if answers(CPU_INDEX) else []
    subprocess.run([*pip, *index, f"torch=={torch_version}"], check=True)
    subprocess.run([*pip, f"trl=={version}"], check=True)
    stamp.write_text(version)
    return python


def answers(url: str) -> bool:
    """Whether a page can be had; asked once, since pip would ask again and again."""
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=10):
            return True
    except OSError:
        return False


def run_trl(python: Path, jobs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Versions and figures of TRL; the gradients are in the folder, by number of the job."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("trl_side.py")
    with (folder / "trl.log").open("w") as log:
        done = subprocess.run(
            [python, script, folder],
            env={
                **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                "HF_HUB_OFFLINE": "1",
                "TRL_EXPERIMENTAL_SILENCE": "1",  # rollout_func is called experimental
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(f"TRL failed:\n{(folder / 'trl.log').read_text()[-4000:]}")
    return json.loads((folder / "figures.json").read_text())


# --- The comparison -------------------------------------------------------------------------------


def norm(gradient: Gradient) -> float:
    """Over all tensors together, in float64."""
    return sum(float(value.double().square().sum()) for value in gradient.values()) ** 0.5


def relative_difference(found: Gradient, expected: Gradient) -> float:
    """Norm of the difference over the norm."""
    if found.keys() != expected.keys():
        raise ValueError(f"One side has no gradient for {sorted(found.keys() ^ expected.keys())}.")
    difference = {name: found[name].double() - expected[name].double() for name in expected}
    return norm(difference) / norm(expected)


def compare(setting: Setting, ours: Ours, theirs: dict[str, float], gradient: Gradient) -> Result:
    """Both sides of a setting; a known factor is taken out of our gradient."""
    factor = setting.factor or 1.0
    scaled = {name: value.double() / factor for name, value in ours.gradient.items()}
    return Result(
        setting=setting.name,
        loss_ours=ours.stats.loss,
        loss_trl=theirs["loss"],
        gradient_norm_trl=norm(gradient),
        clipped_ours=ours.stats.metrics["clipped"],
        clipped_trl=theirs["clipped"],
        micro_batches_ours=ours.num_micro_batches,
        micro_batches_trl=setting.accumulation,
        gradient_difference=relative_difference(scaled, gradient),
        must_agree=setting.factor is not None,
    )


def table(results: list[Result]) -> str:
    """The results in Markdown."""
    lines = [
        "| setting | micro-batches ours / TRL | clipped ours / TRL | loss ours | loss TRL "
        "| gradient difference |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        difference = f"{result.gradient_difference:.1e}"
        lines.append(
            f"| {result.setting} | {result.micro_batches_ours} / {result.micro_batches_trl} "
            f"| {result.clipped_ours:.1%} / {result.clipped_trl:.1%} "
            f"| {result.loss_ours:+.7f} | {result.loss_trl:+.7f} "
            f"| {difference if result.must_agree else f'({difference})'} |"
        )
    return "\n".join(lines)


def make_models(folder: Path) -> dict[str, str]:
    """Path of a random float32 model by family; only the head of Qwen2 is tied."""
    return {
        family: make_tiny_model(
            folder / family, family=family, is_tied=family == "qwen2", dtype=torch.float32
        )
        for family in ("qwen2", "qwen3", "llama")
    }


def main(venv_folder: Path, version: str, out: Path | None) -> None:
    python = trl_python(venv_folder, version)
    settings = [*AGREEING, *DIFFERING]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(folder)
        ours = [run_ours(setting, models[setting.family]) for setting in settings]
        theirs = run_trl(python, [job for _, job in ours], folder)
        results = [
            compare(setting, found, figures, load_file(folder / f"{number}.safetensors"))
            for number, (setting, (found, _), figures) in enumerate(
                zip(settings, ours, theirs["jobs"], strict=True)
            )
        ]
    worst = max(result.gradient_difference for result in results if result.must_agree)
    summary = {"worst_gradient_difference": float(f"{worst:.2e}"), "settings": len(settings)}
    if out:
        command = {"command": f"python benchmarks/trl_parity.py --trl {version} --out {out}"}
        figures = {"versions": theirs["versions"], "results": [asdict(row) for row in results]}
        out.write_text(json.dumps(command | summary | figures, indent=1) + "\n")
    print(table(results))
    print(f"\n{WHY}\n")
    print(json.dumps(summary))
    sys.exit(worst > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arealite"
    parser = argparse.ArgumentParser()
    parser.add_argument("--venv", type=Path, help="environment with TRL; made if it is not there")
    parser.add_argument("--trl", default=TRL, metavar="VERSION", help="release to compare with")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    args = parser.parse_args()
    main(args.venv or cache / f"trl-{args.trl}", args.trl, args.out)
