"""Inputs that cannot work, and what the one message about each has to say."""

import json
from collections.abc import Callable
from pathlib import Path

Arguments = Callable[[Path], list[str]]


def _dataset(rows: list[dict[str, str]]) -> Arguments:
    def write(folder: Path) -> list[str]:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [f"dataset={path}"]

    return write


BEFORE_ANY_SERVER: dict[str, tuple[Arguments, str]] = {
    "unknown key": (lambda _: ["rollout.max_stalenes=1"], "nearest is rollout.max_staleness"),
    "wrong type": (lambda _: ["steps=many"], "steps=many"),
    "negative group size": (lambda _: ["group_size=-8"], "group_size=-8 must be at least 2"),
    "missing model folder": (lambda folder: [f"model={folder}/nowhere"], "nowhere"),
    "dataset without answer": (_dataset([{"question": "2+2?"}]), "rows.jsonl.*answer"),
    "empty dataset": (_dataset([]), "rows.jsonl.*(empty|no rows)"),
    "address where nobody answers": (
        lambda _: ["server.addresses=[http://127.0.0.1:9]"],
        "No vLLM server answered at http://127.0.0.1:9.*arealite serve",
    ),
}
WITH_TWO_RANKS: dict[str, tuple[Arguments, str]] = {
    "batch not divisible": (
        lambda _: ["rollout.prompts_per_step=15"],
        "prompts_per_step=15 does not divide by the 2 ranks.*Set it to 14 or 16",
    ),
}
WITH_A_SERVER: dict[str, tuple[Arguments, str]] = {
    "prompt longer than the context": (
        lambda _: ["server.max_model_len=16"],
        "leaves no room in a context of 16.*server.max_model_len",
    ),
    "server that cannot start": (
        lambda _: ["server.extra_args=[--no-such-flag]"],
        "vLLM server ended with exit code 2.*no-such-flag",
    ),
}
