"""Does the default recipe improve the steps of a model that already works everything out?

    python benchmarks/learn_hard.py                       # make learn-hard
    python benchmarks/learn_hard.py grpo:7 random_reward:7

Every run is `recipes/gsm8k_grpo.py` with other settings. It starts from `arealite/tiny-steps`,
which works every problem out and often gets a step wrong: it misreads, and it miscalculates. In the
control the reward in training is a coin. Before and after, plain transformers answer the same 1,000
problems, which no training has seen; the interval is that of the paired differences. Ends with one
line of JSON. Fails unless every run with the true reward gains at least .10, its whole interval
above zero, and no control climbs, or falls far. Expected figures: recipes/README.md#learn-hard.
"""

import json
import math
import operator
import random
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from statistics import NormalDist, fmean, stdev

sys.path.insert(0, str(Path(__file__).parents[1]))

from arealite.config import parse
from arealite.data import TINY_STEPS, load_tokenizer, resolve_model
from arealite.inference.server import ServerConfig, serve
from arealite.types import Row
from benchmarks.grade import answers, is_right, unseen_problems
from benchmarks.learning import changed
from recipes import gsm8k_grpo, tiny_sft

RESULTS = Path(__file__).parent / "results" / "learn_hard.json"
RUNS = ("grpo:1", "random_reward:1")
SETTINGS = (
    f"model={TINY_STEPS}",
    "steps=130",
    "rollout.prompts_per_step=64",
    "train.lr=4e-5",
    # The size of the larger gradients here: small ones are mostly noise, and AdamW would give them
    # steps of full size.
    "train.eps=1e-4",
    "train.schedule=linear",
    "train.total_steps=130",
    "eval_every_steps=65",
    "save_every_steps=130",
)
"""What differs from the defaults of the recipe."""
NUM_PROBLEMS = 1_000
MIN_GAIN = 0.10
"""What each run with the true reward has to gain in accuracy."""
MAX_CONTROL_LOSS, MAX_CONTROL_GAIN = 0.05, 0.03
"""What a control may lose or gain, and be flat; noise wears a model down, and never teaches it."""

_CALCULATION = re.compile(r"<<(\d+)([-+*])(\d+)=(\d+)>>")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """How one model answered the problems."""

    is_right: list[bool]
    """Per problem, whether the answer ends in the right number."""
    right_steps: float
    """Share of the steps of the solutions that the answers have, at the same place."""
    right_sums: float
    """Share of the calculations in the answers whose result is right, whatever they are about."""
    length: float
    """Mean number of tokens of an answer, the end token included."""

    @property
    def accuracy(self) -> float:
        return fmean(self.is_right)


def examine(folder: str, rows: list[Row]) -> Exam:
    """The exam of the model in this folder, by plain transformers."""
    texts = answers(folder, [row["question"] for row in rows])
    tokenizer = load_tokenizer(folder)
    return Exam(
        is_right=[is_right(text, row["answer"]) for text, row in zip(texts, rows, strict=True)],
        right_steps=share_of_right_steps(texts, [row["answer"] for row in rows]),
        right_sums=share_of_right_sums(texts),
        length=fmean(len(tokenizer.encode(text)) + 1 for text in texts),
    )


def share_of_right_steps(texts: list[str], golds: list[str]) -> float:
    """Share of the steps of the golds, which are all lines but the last, that the texts have."""
    steps = [
        (step, given)
        for text, gold in zip(texts, golds, strict=True)
        for step, given in zip_longest(gold.splitlines()[:-1], text.splitlines())
        if step is not None
    ]
    return fmean(step == given for step, given in steps)


def share_of_right_sums(texts: list[str]) -> float:
    """Share of the `<<3+4=7>>` in the texts whose result is right; nan if there is none."""
    sums = [found for text in texts for found in _CALCULATION.findall(text)]
    if not sums:
        return math.nan
    return fmean(_OPERATORS[sign](int(a), int(b)) == int(c) for a, sign, b, c in sums)


def paired_gain(before: list[bool], after: list[bool]) -> tuple[float, float, float]:
    """Gain in accuracy on the same problems, and its 95 % interval.

    The normal interval of the mean of the differences: problems that both models get right, or
    both wrong, count as differences of 0, and so narrow it.
    """
    differences = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    gain, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    spread = NormalDist().inv_cdf(0.975) * error
    return gain, gain - spread, gain + spread


def run(name: str, addresses: list[str], rows: list[Row]) -> tuple[Exam, float]:
    """The exam of the model that one run has made, and the minutes that the run took."""
    kind, seed = name.split(":")
    out_dir = Path(f"runs/learn_hard/{kind}-{seed}")
    shutil.rmtree(out_dir, ignore_errors=True)  # a run that finds a checkpoint would go on from it
    cfg = parse(gsm8k_grpo.Config, [*SETTINGS, f"seed={seed}", f"out_dir={out_dir}"])
    cfg = replace(cfg, server=ServerConfig(addresses=tuple(addresses)))
    random.seed(int(seed))
    began = time.monotonic()
    with changed(kind):
        gsm8k_grpo.main(cfg)
    minutes = (time.monotonic() - began) / 60
    return examine(str(out_dir / "model"), rows), minutes


def figures(before: Exam, after: Exam) -> dict[str, float]:
    """What the table shows of one run."""
    gain, low, high = paired_gain(before.is_right, after.is_right)
    found = {"gain": gain, "low": low, "high": high}
    for moment, exam in (("before", before), ("after", after)):
        found |= {
            f"accuracy_{moment}": exam.accuracy,
            f"right_steps_{moment}": exam.right_steps,
            f"right_sums_{moment}": exam.right_sums,
            f"length_{moment}": exam.length,
        }
    return {name: round(value, 4) for name, value in found.items()}


def verdict(runs: dict[str, dict[str, float]]) -> dict[str, float | bool]:
    """The worst run with the true reward, the control that moved most, and whether both pass."""
    learned = [found for name, found in runs.items() if name.startswith("grpo:")]
    controls = [found for name, found in runs.items() if not name.startswith("grpo:")]
    worst = min(learned, key=lambda found: found["gain"])
    moved = max(controls, key=lambda found: abs(found["gain"]))
    return {
        "before": worst["accuracy_before"],
        "after": worst["accuracy_after"],
        **{name: worst[name] for name in ("gain", "low", "high")},
        **{f"control_{name}": moved[name] for name in ("gain", "low", "high")},
        "passed": worst["gain"] >= MIN_GAIN and worst["low"] > 0 and all(map(is_flat, controls)),
    }


def is_flat(control: dict[str, float]) -> bool:
    return -MAX_CONTROL_LOSS <= control["gain"] <= MAX_CONTROL_GAIN


def table(runs: dict[str, dict[str, float]]) -> str:
    """The results in Markdown."""
    lines = [
        "| run | seed | accuracy before -> after | gain (95 %) | right steps | right sums "
        "| tokens | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        kind, seed = name.split(":")
        changes = [
            f"{found[f'{what}_before']:.{digits}f} -> {found[f'{what}_after']:.{digits}f}"
            for what, digits in (
                ("accuracy", 3),
                ("right_steps", 3),
                ("right_sums", 3),
                ("length", 1),
            )
        ]
        gain = f"{found['gain']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
        columns = [kind, seed, changes[0], gain, *changes[1:], f"{found['minutes']:.1f} min"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def check_names(names: Sequence[str]) -> None:
    """End the program unless the names are of runs, with the true reward and with the other."""
    kinds = {name.split(":")[0] for name in names if re.fullmatch(r"\w+:\d+", name)}
    if kinds != {"grpo", "random_reward"}:
        sys.exit(
            f"Name runs as in {' '.join(RUNS)}, at least one of each kind. Got {' '.join(names)}."
        )


def main(names: Sequence[str]) -> None:
    check_names(names)
    began = time.monotonic()
    taught = tiny_sft.training_rows(parse(tiny_sft.Config, tiny_sft.TINY_STEPS_SETTINGS))
    rows = unseen_problems(NUM_PROBLEMS, exclude={row["question"] for row in taught})
    before = examine(resolve_model(TINY_STEPS), rows)
    runs: dict[str, dict[str, float]] = {}
    with serve(TINY_STEPS, ServerConfig(), log_dir="runs/learn_hard") as servers:
        for name in names:
            after, minutes = run(name, servers.addresses, rows)
            runs[name] = figures(before, after) | {"minutes": round(minutes, 1)}
            print(json.dumps({name: runs[name]}), flush=True)
    found = verdict(runs) | {"minutes": round((time.monotonic() - began) / 60, 1)}
    RESULTS.write_text(json.dumps({"runs": runs, "verdict": found}, indent=1) + "\n")
    print(table(runs))
    print(json.dumps(found))
    if not found["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:] or RUNS)
