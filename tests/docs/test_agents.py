"""The snippets of docs/agents.md run in their order, as they are printed."""

import re
from pathlib import Path
from typing import Any

import pytest

from arealite import dist

PAGE = (Path(__file__).parents[2] / "docs" / "agents.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_snippet_runs_as_shown(capsys: pytest.CaptureFixture[str]):
    names: dict[str, Any] = {"__name__": "docs"}
    for snippet in SNIPPETS:
        exec(snippet, names)
    dist.close()
    steps = [line for line in capsys.readouterr().out.splitlines() if "gradient norm" in line]
    assert [line.split()[0] for line in steps] == ["1", "2", "3"]
