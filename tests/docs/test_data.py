"""The table of docs/data.md is that of the code, and its snippet runs as it is printed."""

import re
from collections import Counter
from typing import Any

from recipes.gsm8k_grpo import Config
from tests.data.document import PAGE, page


def test_the_table_of_formats_is_up_to_date():
    assert PAGE.read_text() == page(), "run python -m tests.data.document"


def test_two_data_sets_are_mixed_as_shown():
    [snippet] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"cfg": Config()}
    exec(snippet, names)
    for rows in (names["train_rows"], names["test_rows"]):
        counts = Counter(row["reward"] for row in rows)
        assert abs(counts["math"] - 4 * counts["code"]) <= 4
    problem, program = (
        next(row for row in names["train_rows"] if row["reward"] == name)
        for name in ("math", "code")
    )
    assert names["reward"](problem["answer"], problem) == 1.0
    assert names["reward"]("print('nothing')", program) == 0.0
