"""A recipe with a server whose policy is a function, from a conversation to what it says next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from arealite.config import parse
from arealite.data import TINY_AGENT, load_rows, load_tokenizer
from arealite.observe.metrics import read_metrics
from arealite.testing import ScriptedServer
from arealite.types import Row
from tests.oracle import NO_WEIGHTS

NUM_ROWS = 20


def first_rows(*args: Any, **kwargs: Any) -> list[Row]:
    return load_rows(*args, **kwargs)[:NUM_ROWS]


def run_with_policy(
    recipe: Any,
    policy: Callable[[str], str],
    out_dir: Path,
    *changes: str,
    loop: Any = None,
) -> dict[str, float]:
    """Two steps of the recipe with `NUM_ROWS` rows; the metrics of the last version.

    Args:
        loop: the recipe whose loop it runs, if that is another one.
    """

    def script(prompt: list[int]) -> list[int]:
        return tokenizer.encode(f"{policy(str(tokenizer.decode(prompt)))}{tokenizer.eos_token}")

    defaults = ["steps=2", "group_size=2", "rollout.prompts_per_step=2", f"model={TINY_AGENT}"]
    settings = dict(each.split("=", 1) for each in [f"out_dir={out_dir}", *defaults, *changes])
    tokenizer = load_tokenizer(settings["model"])
    size = {"vocab_size": len(tokenizer), "max_model_len": 1_024}
    with ScriptedServer(script, **size) as server:
        addresses = f"server.addresses=[{server.address}]"
        with patch.object(loop or recipe, "load_rows", first_rows):
            given = map("=".join, settings.items())
            recipe.main(parse(recipe.Config, [*given, addresses, *NO_WEIGHTS]))
    return read_metrics(out_dir)[2]
