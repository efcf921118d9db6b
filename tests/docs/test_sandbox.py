"""The snippets of docs/sandbox.md run in their order, as they are printed."""

import re
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()


def test_every_snippet_runs_as_shown():
    names: dict[str, Any] = {}
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 2
