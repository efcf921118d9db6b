"""Whether a long run stays as large as it is: memory and open files of each of its processes.

    python benchmarks/memory.py                 # 300 steps of the demo: eight minutes on two cores
    python benchmarks/memory.py steps=600 train.lora_rank=16

Every second it notes the resident memory and the open files of the trainer, of its reward workers,
of the supervisor, and of the server's processes together, with the step that the trainer has
finished. Slopes are least squares over the steps behind the warm-up, in MB per 10 steps; the goal
is below 1 for each. The medians of five equal parts of that time show what a slope is made of: a
trainer goes up and down with the length of the responses in a step, by so much that two runs differ
by 1 MB in ten steps; a server takes some 20 MB more, in jumps, until it has seen its largest batch.
Files are those of the first and the last part; most are connections of requests in flight, which
come and go. The last line is JSON.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import linear_regression, median

import numpy as np
import psutil

from arealite.observe.json_lines import read_json_lines

REPOSITORY = Path(__file__).parents[1]
WARM_UP_STEPS = 60
PARTS = {
    "rewards": "rewards/worker.py",
    "trainer": "gsm8k_grpo.py",
    "supervisor": "inference.supervisor",
    "server": "vllm",
}
"""What is in the command line, or the name, of their processes."""
Sample = tuple[int, float, int]
"""Step, MB resident, open files."""


def part_of(process: psutil.Process) -> str:
    text = " ".join([process.name(), *process.cmdline()]).lower()
    if "torchrun" in text or "torch.distributed.run" in text:
        return ""  # the agent, whose arguments name the recipe
    return next((part for part, word in PARTS.items() if word in text), "")


def steps_done(out_dir: Path) -> int:
    path = out_dir / "metrics.jsonl"
    lines = read_json_lines(path) if path.is_file() else ()
    return max((line["version"] for line in lines), default=0)


def sample(agent: psutil.Process, step: int, samples: dict[str, list[Sample]]) -> None:
    """Add up memory and files of each part."""
    megabytes: dict[str, float] = defaultdict(float)
    files: dict[str, int] = defaultdict(int)
    for process in agent.children(recursive=True):
        with suppress(psutil.Error):
            part = part_of(process)
            megabytes[part] += process.memory_info().rss / 1e6
            files[part] += process.num_fds()
    for part in PARTS:
        if part in megabytes:
            samples[part].append((step, megabytes[part], files[part]))


def watch(settings: list[str], out_dir: Path) -> dict[str, list[Sample]]:
    """Samples of a whole run of the recipe, by part."""
    samples: dict[str, list[Sample]] = {part: [] for part in PARTS}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["recipes/gsm8k_grpo.py", f"out_dir={out_dir}", *settings]
    with psutil.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as agent:
        while agent.poll() is None:
            step = steps_done(out_dir)
            if step > WARM_UP_STEPS:
                sample(agent, step, samples)
            time.sleep(1)
    if agent.returncode:
        sys.exit(f"the run ended with code {agent.returncode}")
    return samples


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        samples = watch(["steps=300", *sys.argv[1:]], Path(folder) / "run")
    figures: dict[str, float] = {}
    print(f"{'':12}{'MB in five parts of the time':>40}{'MB/10 steps':>13}{'files':>12}")
    for part, rows in samples.items():
        if len({step for step, *_ in rows}) < 2:
            sys.exit(f"No two steps of the {part} behind the first {WARM_UP_STEPS}: raise steps.")
        steps, megabytes, files = zip(*rows, strict=True)
        slope = 10 * linear_regression(steps, megabytes).slope
        fifths = [part for part in np.array_split(megabytes, 5) if part.size]
        levels = "".join(f"{np.median(part):8.1f}" for part in fifths)
        few = max(1, len(rows) // 5)
        begin, end = median(files[:few]), median(files[-few:])
        print(f"{part:12}{levels}{slope:13.3f}{begin:6.0f} ->{end:4.0f}")
        figures[f"{part}_mb_per_10_steps"] = round(slope, 3)
        figures[f"{part}_files_more"] = end - begin
    print(json.dumps(figures | {"steps": max(row[0] for row in samples["trainer"])}))


if __name__ == "__main__":
    main()
