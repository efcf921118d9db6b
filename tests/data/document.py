"""Writes the table of formats into docs/data.md:

python -m tests.data.document
"""

from pathlib import Path

from arealite.data.formats import FORMATS

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BEGIN, END = "<!-- formats -->\n", "<!-- end of formats -->\n"
HEAD = "| format | keys | `question` is | `answer` is | reward |\n|---|---|---|---|---|\n"


def page() -> str:
    """The page as it is, with the table of the code."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    lines = [
        f"| {each.name} | {', '.join(f'`{key}`' for key in each.keys)} | {each.question_from} "
        f"| {each.answer_from or 'not needed'} | {each.reward} |\n"
        for each in FORMATS
    ]
    return "".join([before, BEGIN, HEAD, *lines, END, rest.partition(END)[2]])


if __name__ == "__main__":
    PAGE.write_text(page())
