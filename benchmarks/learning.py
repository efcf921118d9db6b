"""Does the default recipe learn, and only for the right reason? Seeds and controls, one table.

    python benchmarks/learning.py                       # everything: about two minutes a run
    python benchmarks/learning.py grpo:0 random_reward:1

Every run is `recipes/gsm8k_grpo.py` as it is, against one server that all runs share. A control
changes one thing: the learning rate, the reward in training, or which sample gets which advantage.
Evaluation always uses the true reward. A run that is in the results already is not repeated.
Ends with one line of JSON.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from arealite.inference.server import ServerConfig, serve
from arealite.observe.metrics import read_metrics
from arealite.observe.summary import final_figures, summarize
from arealite.rollout.workflows import ChatWorkflow, SingleTurnWorkflow
from arealite.types import Row, Trajectory
from recipes import gsm8k_grpo

RESULTS = Path(__file__).parent / "results" / "learning.json"
RUNS = [
    *(f"grpo:{seed}" for seed in range(5)),
    *(
        f"{control}:{seed}"
        for control in ("lr_0", "random_reward", "shuffled_advantages", "length_reward")
        for seed in range(3)
    ),
]


def random_reward(text: str, row: Row) -> float:
    """A coin, whatever the answer."""
    return float(random.random() < 0.5)


def length_reward(text: str, row: Row) -> float:
    """Longer is better, right or wrong; 1.0 at 64 characters."""
    return len(text) / 64


def shuffled_advantages(groups: list[list[Trajectory]]) -> list[list[float]]:
    """The true advantages of the group, each given to a random member of it."""
    return [random.sample(group, len(group)) for group in TRUE_ADVANTAGES(groups)]


TRUE_ADVANTAGES = gsm8k_grpo.group_advantages


@contextmanager
def changed(control: str) -> Iterator[None]:
    """The recipe with the one thing changed that the control is about."""
    rewards = {"random_reward": random_reward, "length_reward": length_reward}
    if control == "shuffled_advantages":
        with patch.object(gsm8k_grpo, "group_advantages", shuffled_advantages):
            yield
    elif control in rewards:
        workflow = rewarding(SingleTurnWorkflow, rewards[control])
        with patch.object(gsm8k_grpo, "SingleTurnWorkflow", workflow):
            yield
    else:
        yield


def rewarding(
    workflow: type[ChatWorkflow], reward: Callable[[str, Row], float]
) -> type[ChatWorkflow]:
    """The workflow, training on this reward and evaluating with the one it is given."""

    class Rewarding(workflow):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            if self.group_size > 1:
                self.reward = reward

    return Rewarding


def run(name: str, addresses: list[str]) -> dict[str, float | None]:
    """Figures of one run."""
    control, seed = name.split(":")
    cfg = gsm8k_grpo.Config(
        seed=int(seed),
        out_dir=f"runs/learning/{control}-{seed}",
        server=ServerConfig(addresses=tuple(addresses)),
    )
    if control == "lr_0":
        cfg = replace(cfg, train=replace(cfg.train, lr=0.0))
    random.seed(int(seed))
    with changed(control):
        gsm8k_grpo.main(cfg)
    summary = summarize(read_metrics(cfg.out_dir))
    return final_figures(summary) | {
        "logprob_gap": round(summary["logprob_gap_mean"], 5),
        "gate_share": round(summary["gate_share"], 4),
        "staleness_max": summary["staleness_max"],
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The results in Markdown."""
    lines = [
        "| run | seed | accuracy before -> after | length before -> after | training | gap |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in results.items():
        control, seed = name.split(":")
        lines.append(
            f"| {control} | {seed} "
            f"| {figures['accuracy_before']:.3f} -> {figures['accuracy_after']:.3f} "
            f"| {figures['length_before']:.1f} -> {figures['length_after']:.1f} "
            f"| {figures['train_s']:.0f} s | {figures['logprob_gap']:.5f} |"
        )
    return "\n".join(lines)


def main(names: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = [name for name in names if name not in results]
    if missing:
        with serve("arealite/tiny-math", ServerConfig(), log_dir="runs/learning") as servers:
            for name in missing:
                results[name] = run(name, servers.addresses)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    chosen = {name: results[name] for name in names}
    print(table(chosen))
    print(json.dumps({name: figures["accuracy_after"] for name, figures in chosen.items()}))


if __name__ == "__main__":
    main(sys.argv[1:] or RUNS)
