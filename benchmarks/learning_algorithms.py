"""Do the recipes of other algorithms learn? Each as a user starts it, one table.

    python benchmarks/learning_algorithms.py                     # about two minutes a run
    python benchmarks/learning_algorithms.py gsm8k_ppo:2 dpo:1

Every run is `python recipes/NAME.py seed=SEED`, with a server of its own where the recipe has one.
Accuracy is greedy: of recipes with rollouts their own evaluation on the 200 test rows, of the
others that of `benchmarks/grade.py` on 500 new problems. A run that is in the results already is
not repeated. Ends with one line of JSON; the exit status is 1 if a goal is missed.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

from arealite.data import TINY_MATH, resolve_model
from arealite.observe.metrics import read_metrics
from arealite.observe.summary import column, summarize
from benchmarks.grade import grade

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "learning_algorithms.json"
RUNS = [
    *(f"{name}:{seed}" for name in ("math_ppo", "gsm8k_ppo", "gsm8k_dapo") for seed in (1, 2, 3)),
    *("gsm8k_gspo:1", "lengthen_context:1", "code_ppo:1", "sft:1", "dpo:1"),
]
LEAST_ACCURACY, LONGEST_S, LEAST_EXPLAINED = 0.75, 360, 0.3
LAST_STEPS = 10
"""Steps at the end over which what the critic explains is averaged."""

Figures = dict[str, float | None]


def run(name: str) -> Figures:
    """Figures of one run."""
    recipe, seed = name.split(":")
    out_dir = Path("runs/learning_algorithms") / f"{recipe}-{seed}"
    shutil.rmtree(REPOSITORY / out_dir, ignore_errors=True)  # or it would go on from a checkpoint
    began = time.monotonic()
    command = [sys.executable, f"recipes/{recipe}.py", f"seed={seed}", f"out_dir={out_dir}"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    wall_s = time.monotonic() - began
    steps = read_metrics(REPOSITORY / out_dir)
    found = figures(summarize(steps), REPOSITORY / out_dir / "model")
    explained = column(steps, "critic/explained_variance")[-LAST_STEPS:]
    found["explained_variance"] = fmean(explained) if explained else None
    return {
        **{key: None if value is None else round(value, 3) for key, value in found.items()},
        "wall_s": round(wall_s, 1),
    }


def figures(summary: dict[str, float], model: Path) -> Figures:
    """What the summary of a run says, or for a run without rollouts its model."""
    if "eval_reward_first" in summary:
        before, after = summary["eval_reward_first"], summary["eval_reward_last"]
    else:
        before, after = grade(resolve_model(TINY_MATH)), grade(str(model))
    return {
        "accuracy_before": before,
        "accuracy_after": after,
        "unequal_sampled": summary.get("unequal_share_sampled"),
        "unequal_trained": summary.get("unequal_share"),
    }


def missed(name: str, found: Figures) -> list[str]:
    """The goals that a run did not reach."""
    explained = found["explained_variance"]
    goals = {
        "accuracy": (found["accuracy_after"] or 0) >= LEAST_ACCURACY,
        "time": (found["wall_s"] or 0) <= LONGEST_S,
        "explained variance": explained is None or explained > LEAST_EXPLAINED,
    }
    return [f"{name}: {goal}" for goal, is_reached in goals.items() if not is_reached]


def table(results: dict[str, Figures]) -> str:
    """The results in Markdown."""
    lines = [
        "| recipe | seed | accuracy before -> after | critic explains | unequal groups | time |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        recipe, seed = name.split(":")
        accuracy = f"{found['accuracy_before']:.3f} -> {found['accuracy_after']:.3f}"
        explains = "-" if found["explained_variance"] is None else found["explained_variance"]
        sampled, trained = found["unequal_sampled"], found["unequal_trained"]
        shares = "-" if sampled is None else f"{sampled:.3f} -> {trained:.3f}"
        cells = (recipe, seed, accuracy, explains, shares, f"{found['wall_s']:.0f} s")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(names: list[str]) -> int:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        if name not in results:
            results[name] = run(name)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    chosen = {name: results[name] for name in names}
    failures = [each for name, found in chosen.items() for each in missed(name, found)]
    print(table(chosen))
    after = {name: found["accuracy_after"] for name, found in chosen.items()}
    print(json.dumps({"accuracy_after": after, "missed": failures}))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or RUNS))
