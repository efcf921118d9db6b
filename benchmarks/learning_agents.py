"""Do the recipes of agents learn, and only for the right reason? Seeds and controls, one table.

    python benchmarks/learning_agents.py                     # everything: about two minutes a run
    python benchmarks/learning_agents.py code_grpo:0 code_grpo/random_reward:0

Every run is a recipe as it is, against one server that all runs share. In the control, the reward
in training is a coin. Evaluation is greedy, on 200 held-out rows, and always with the true reward.
A run that is in the results already is not repeated. Ends with one line of JSON.
"""

import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import ModuleType
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from arealite.data import TINY_AGENT
from arealite.inference.server import ServerConfig, serve
from arealite.observe.metrics import read_metrics
from arealite.observe.summary import Steps, column
from benchmarks.learning import random_reward, rewarding
from recipes import code_grpo, gsm8k_agent, multi_turn_math

RESULTS = Path(__file__).parent / "results" / "learning_agents.json"
NUM_STEPS = 5
"""Steps at the start and at the end over which figures of training are averaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A recipe and what it is about."""

    recipe: ModuleType
    workflow: str
    """Name in the recipe of the workflow whose reward the control replaces."""
    accuracy: str
    """Metric of which is asked whether it climbs; as `eval/NAME`."""
    sampled: str
    """The same while training; as `rollout/NAME`."""
    behavior: str
    """What the policy does more or less of while it learns; as `rollout/NAME`."""


SUBJECTS = {
    "gsm8k_agent": Subject(
        recipe=gsm8k_agent,
        workflow="ToolWorkflow",
        accuracy="reward",
        sampled="raw_reward",
        behavior="tool_calls",
    ),
    "multi_turn_math": Subject(
        recipe=multi_turn_math,
        workflow="MultiTurnWorkflow",
        accuracy="reward_turn_2",
        sampled="reward_turn_2",
        behavior="response_length",
    ),
    "code_grpo": Subject(
        recipe=code_grpo,
        workflow="SingleTurnWorkflow",
        accuracy="reward",
        sampled="raw_reward",
        behavior="response_length",
    ),
}
RUNS = [
    f"{name}{control}:{seed}"
    for name in SUBJECTS
    for control in ("", "/random_reward")
    for seed in range(3)
]


@contextmanager
def changed(subject: Subject, control: str) -> Iterator[None]:
    """The recipe as it is, or trained with a coin for a reward."""
    if not control:
        yield
        return
    workflow = rewarding(getattr(subject.recipe, subject.workflow), random_reward)
    with patch.object(subject.recipe, subject.workflow, workflow):
        yield


def run(name: str, addresses: tuple[str, ...]) -> dict[str, float | None]:
    """Figures of one run."""
    label, seed = name.split(":")
    recipe, _, control = label.partition("/")
    subject = SUBJECTS[recipe]
    cfg = subject.recipe.Config(
        seed=int(seed),
        out_dir=f"runs/learning_agents/{name}",
        server=ServerConfig(addresses=addresses),
    )
    random.seed(int(seed))
    began = time.monotonic()
    with changed(subject, control):
        subject.recipe.main(cfg)
    steps = read_metrics(cfg.out_dir)
    return figures(subject, steps, is_control=bool(control)) | {
        "wall_s": round(time.monotonic() - began, 1)
    }


def figures(subject: Subject, steps: Steps, *, is_control: bool) -> dict[str, float | None]:
    """What the table shows; a control's reward in training says nothing about its accuracy."""
    accuracy = column(steps, f"eval/{subject.accuracy}")
    behavior = column(steps, f"rollout/{subject.behavior}")
    sampled = [] if is_control else column(steps, f"rollout/{subject.sampled}")
    return {
        "accuracy_before": round(accuracy[0], 3),
        "accuracy_after": round(accuracy[-1], 3),
        "sampled_before": _mean(sampled[:NUM_STEPS]),
        "sampled_after": _mean(sampled[-NUM_STEPS:]),
        "behavior_before": _mean(behavior[:NUM_STEPS]),
        "behavior_after": _mean(behavior[-NUM_STEPS:]),
    }


def _mean(values: list[float]) -> float | None:
    return round(fmean(values), 3) if values else None


def table(results: dict[str, dict[str, float | None]]) -> str:
    """The results in Markdown."""
    lines = [
        "| run | seed | accuracy before -> after | sampled in training | calls or tokens | time |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        label, seed = name.split(":")
        changes = [
            "-" if found[f"{what}_before"] is None else _change(found, what)
            for what in ("accuracy", "sampled", "behavior")
        ]
        lines.append(f"| {label} | {seed} | {' | '.join(changes)} | {found['wall_s']:.0f} s |")
    return "\n".join(lines)


def _change(found: dict[str, float | None], what: str) -> str:
    return f"{found[f'{what}_before']:.3f} -> {found[f'{what}_after']:.3f}"


def main(names: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = [name for name in names if name not in results]
    if missing:
        with serve(TINY_AGENT, ServerConfig(), log_dir="runs/learning_agents") as servers:
            for name in missing:
                results[name] = run(name, servers.addresses)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    chosen = {name: results[name] for name in names}
    print(table(chosen))
    print(json.dumps({name: found["accuracy_after"] for name, found in chosen.items()}))


if __name__ == "__main__":
    main(sys.argv[1:] or RUNS)
