"""What the log-probs of training cost beside the usual ways to get them: time, memory, exactness.

    python benchmarks/logprobs.py                 # some twenty minutes on one core, 10 GiB
    python benchmarks/logprobs.py --rounds 1      # half of it

Log-probs of T tokens over a vocabulary of 151,936 with a head of hidden size H, and the gradients
of hidden states and head for a random upstream gradient of each token, in float32:

- `naive`: log_softmax of the logits [T, V], then the targets.
- `gather`: the targets' logits less logsumexp.
- `checkpoint`: `gather` on chunks of 256 tokens under torch.utils.checkpoint, which makes the
  logits of a chunk again in the backward pass. Each chunk adds a gradient of the head's size.
- `ours`: `packed_logprobs`, which also gives the entropy.

Each measurement is a process of its own with one thread, after a warm-up on a few tokens. The four
ways take turns within a cell, for several rounds; a time is the median over rounds, a ratio the
median of the ratios within a round.

- Memory is the peak of the resident set (VmHWM of /proc/self/status, so this needs Linux; writing 5
  to /proc/self/clear_refs sets it to the present) less the resident set before the forward pass.
- `working` is this memory less what stays: the two gradients, which every way returns, and which
  at H = 896 are 519 MiB. Ratios are of the working memory; with the gradients, they are in JSON as
  `memory_ratio_with_gradients`, which at 1,024 tokens and H = 896 cannot fall below .29: there the
  gradients alone are that much of what naive takes at its peak, before it has them.
- The error of a gradient is |ours - reference| / |reference|, the reference being a float64 one
  made for the same inputs in closed form, chunk by chunk; the larger one of both gradients.

A way that does not fit into the free memory is left out with a line that says so, and without
`naive` there are no ratios. The last line is JSON, about `ours`, the worst of the cells:
`memory_ratio` and `time_ratio` (at H = 64) and `time_ratio_h896` to naive,
`time_ratio_h896_checkpoint` to checkpoint, `grad_error`.
"""

import argparse
import ctypes
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch.utils.checkpoint import checkpoint

from arealite.training.logprobs import packed_logprobs

# T tokens, H hidden size, V vocabulary.
VOCABULARY = 151_936
TOKENS, HIDDEN = (1_024, 4_096), (64, 896)
ROUNDS = 2
CHECKPOINT_TOKENS, REFERENCE_TOKENS = 256, 128
MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A batch of one sequence; `hidden` and `head` have gradients."""

    hidden: torch.Tensor  # [T, H]
    head: torch.Tensor  # [V, H]
    token_ids: torch.Tensor  # [T]
    temperature: torch.Tensor  # [T]
    upstream: torch.Tensor  # [T]


def make_inputs(tokens: int, hidden: int, vocabulary: int) -> Inputs:
    """Random ones, the same for each way; logits have variance 1."""
    dice = torch.Generator().manual_seed(tokens + hidden)
    head = torch.randn(vocabulary, hidden, generator=dice).mul_(hidden**-0.5)
    return Inputs(
        hidden=torch.randn(tokens, hidden, generator=dice).requires_grad_(),
        head=head.requires_grad_(),
        token_ids=torch.randint(vocabulary, (tokens,), generator=dice),
        temperature=torch.empty(tokens).uniform_(0.7, 1.3, generator=dice),
        upstream=torch.randn(tokens, generator=dice),
    )


# --- The four ways: log-probs [T], 0 for the first token ------------------------------------------


def ours(inputs: Inputs) -> torch.Tensor:
    """The function that training calls."""
    is_first = torch.arange(len(inputs.token_ids)) == 0
    logprobs, _ = packed_logprobs(
        inputs.hidden, inputs.head, inputs.token_ids, inputs.temperature, is_first
    )
    return logprobs


def naive(inputs: Inputs) -> torch.Tensor:
    """log_softmax, and the targets of it."""
    logits = (inputs.hidden[:-1] @ inputs.head.T).div_(inputs.temperature[1:, None])
    return after_first(logits.log_softmax(-1).gather(1, inputs.token_ids[1:, None])[:, 0])


def gather(inputs: Inputs) -> torch.Tensor:
    """The targets' logits less logsumexp."""
    return after_first(
        of_chunk(
            inputs.hidden[:-1], inputs.head, inputs.token_ids[1:], inputs.temperature[1:, None]
        )
    )


def checkpointed(inputs: Inputs) -> torch.Tensor:
    """The same on chunks of tokens, with recomputation."""
    parts = (inputs.hidden[:-1], inputs.token_ids[1:], inputs.temperature[1:, None])
    chunks = zip(*(part.split(CHECKPOINT_TOKENS) for part in parts), strict=True)
    logprobs = [
        checkpoint(of_chunk, before, inputs.head, targets, divisor, use_reentrant=False)
        for before, targets, divisor in chunks
    ]
    return after_first(torch.cat(logprobs))  # type: ignore[arg-type]


def of_chunk(
    before: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, divisor: torch.Tensor
) -> torch.Tensor:
    logits = (before @ head.T).div_(divisor)
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def after_first(logprobs: torch.Tensor) -> torch.Tensor:
    return torch.cat([logprobs.new_zeros(1), logprobs])


WAYS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    "naive": naive,
    "gather": gather,
    "checkpoint": checkpointed,
    "ours": ours,
}


def memory_needed(way: str, tokens: int, hidden: int) -> int:
    """Bytes, from above: copies of the logits, the head and its gradients, torch itself."""
    copies = {"naive": 4 * tokens, "gather": 4 * tokens, "checkpoint": 4 * CHECKPOINT_TOKENS}
    return 4 * VOCABULARY * (copies.get(way, tokens // 10) + 4 * hidden) + 1024 * MIB


# --- One measurement, in a process of its own -----------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Forward and backward pass of one way."""

    seconds: float
    extra_mib: float
    gradients_mib: float
    grad_error: float | None

    @property
    def working_mib(self) -> float:
        return max(0.0, self.extra_mib - self.gradients_mib)


def measure(way: str, tokens: int, hidden: int, *, should_check: bool) -> Measured:
    torch.set_num_threads(1)
    warm_up = make_inputs(32, hidden, 1_000)
    WAYS[way](warm_up).backward(warm_up.upstream)
    inputs = make_inputs(tokens, hidden, VOCABULARY)
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would not be counted
    Path("/proc/self/clear_refs").write_text("5")
    before_mib, began_s = resident_mib("VmRSS"), time.perf_counter()
    logprobs = WAYS[way](inputs)
    gradients = torch.autograd.grad(logprobs, (inputs.hidden, inputs.head), inputs.upstream)
    seconds, extra_mib = time.perf_counter() - began_s, resident_mib("VmHWM") - before_mib
    return Measured(
        seconds=seconds,
        extra_mib=extra_mib,
        gradients_mib=sum(gradient.nbytes for gradient in gradients) / MIB,
        grad_error=error(gradients, reference(inputs)) if should_check else None,
    )


def resident_mib(name: str) -> float:
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    ]
    return int(line.split()[1]) / 1024


@torch.no_grad()
def reference(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden states and head in float64: onehot - softmax, times upstream."""
    head = inputs.head.double()
    grad_hidden = torch.zeros_like(inputs.hidden, dtype=torch.float64)
    grad_head = torch.zeros_like(head)
    for start in range(0, len(inputs.hidden) - 1, REFERENCE_TOKENS):
        rows = slice(start, min(start + REFERENCE_TOKENS, len(inputs.hidden) - 1))
        following = slice(rows.start + 1, rows.stop + 1)
        divisor = inputs.temperature[following, None].double()
        hidden = inputs.hidden[rows].double()
        grad = -(hidden @ head.T / divisor).softmax(-1)
        grad[torch.arange(len(grad)), inputs.token_ids[following]] += 1
        grad *= inputs.upstream[following, None] / divisor
        grad_hidden[rows] = grad @ head
        grad_head.addmm_(grad.T, hidden)
    return grad_hidden, grad_head


def error(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The larger of the relative errors, in the norm."""
    pairs = zip(found, expected, strict=True)
    return max(float((ours - right).norm() / right.norm()) for ours, right in pairs)


# --- All of them ----------------------------------------------------------------------------------

Cell = dict[str, list[Measured]]
"""The measurements of each way, one a round; none of a way that was left out."""


def in_a_process(way: str, tokens: int, hidden: int, *, should_check: bool) -> Measured | str:
    """The measurement, or why there is none."""
    needed, free = memory_needed(way, tokens, hidden), psutil.virtual_memory().available
    if needed > free:
        return f"needs up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    command = [sys.executable, __file__, "--way", way, str(tokens), str(hidden)]
    child = subprocess.run(
        [*command, *(["--check"] if should_check else [])], stdout=subprocess.PIPE, text=True
    )
    if child.returncode:
        return f"ended with {child.returncode}; -9 is what a process killed for memory ends with"
    return Measured(**json.loads(child.stdout))


def run_cell(tokens: int, hidden: int, rounds: int) -> Cell:
    cell: Cell = {way: [] for way in WAYS}
    left_out: set[str] = set()
    for turn, way in itertools.product(range(rounds), WAYS):
        if way in left_out:
            continue
        should_check = way == "ours" and turn == 0
        found = in_a_process(way, tokens, hidden, should_check=should_check)
        if isinstance(found, str):
            left_out.add(way)
            cell[way].clear()
            print(f"left out: {way} at {tokens:,} tokens, H = {hidden}: {found}", flush=True)
        else:
            cell[way].append(found)
    return cell


def ratio(cell: Cell, way: str, base: str, figure: Callable[[Measured], float]) -> float | None:
    """Median over the rounds of `way` to `base`; None if one of them was left out."""
    pairs = zip(cell[way], cell[base], strict=False)
    ratios = [figure(mine) / figure(other) for mine, other in pairs]
    return statistics.median(ratios) if ratios else None


def rows(cell: Cell, tokens: int, hidden: int) -> list[str]:
    """The lines of one cell in Markdown."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return [
        f"| {tokens:,} | {hidden} | {way} "
        f"| {statistics.median(one.seconds for one in measured):.2f} "
        f"| {shown(ratio(cell, way, 'naive', lambda one: one.seconds))} "
        f"| {statistics.median(one.extra_mib for one in measured):,.0f} "
        f"| {statistics.median(one.working_mib for one in measured):,.0f} "
        f"| {shown(ratio(cell, way, 'naive', lambda one: one.working_mib))} "
        f"| {'' if measured[0].grad_error is None else f'{measured[0].grad_error:.1e}'} |"
        for way, measured in cell.items()
        if measured
    ]


def summary(cells: dict[tuple[int, int], Cell]) -> dict[str, float | None]:
    """The worst of the cells for `ours`; None where the other way was left out everywhere."""

    def worst(
        base: str, figure: Callable[[Measured], float], sizes: tuple[int, ...] = HIDDEN
    ) -> float | None:
        found = [ratio(cell, "ours", base, figure) for (_, h), cell in cells.items() if h in sizes]
        known = [value for value in found if value is not None]
        return round(max(known), 3) if known else None

    errors = [one.grad_error for cell in cells.values() for one in cell["ours"] if one.grad_error]
    return {
        "memory_ratio": worst("naive", lambda one: one.working_mib),
        "memory_ratio_with_gradients": worst("naive", lambda one: one.extra_mib),
        "time_ratio": worst("naive", lambda one: one.seconds, HIDDEN[:1]),
        "time_ratio_h896": worst("naive", lambda one: one.seconds, HIDDEN[1:]),
        "time_ratio_h896_checkpoint": worst("checkpoint", lambda one: one.seconds, HIDDEN[1:]),
        "grad_error": float(f"{max(errors):.1e}") if errors else None,
    }


def main(rounds: int) -> None:
    print("| T | H | way | s | to naive | extra MiB | working MiB | to naive | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    cells: dict[tuple[int, int], Cell] = {}
    for tokens, hidden in itertools.product(TOKENS, HIDDEN):
        cells[tokens, hidden] = run_cell(tokens, hidden, rounds)
        print(*rows(cells[tokens, hidden], tokens, hidden), sep="\n", flush=True)
    print(json.dumps(summary(cells)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        name, num_tokens, hidden_size = arguments.way
        found = measure(name, int(num_tokens), int(hidden_size), should_check=arguments.check)
        print(json.dumps(asdict(found)))
    else:
        main(arguments.rounds)
