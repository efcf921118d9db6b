"""docs/faults.md says what the tests do, and there is a test for every fault."""

import pytest

from tests.faults.document import HEAD, MARKED, NOT_YET, PAGE, read, table
from tests.faults.rows import ROWS

REFRESH = "docs/faults.md is not up to date: run `python -m tests.faults.document`"


def test_the_page_is_what_the_marked_tests_make_of_it(request: pytest.FixtureRequest):
    if any("::" in argument for argument in request.config.args) or request.config.option.lf:
        pytest.skip("knows only some tests of a file")
    marked = request.config.stash[MARKED]
    files = {shown.test.partition("::")[0] for shown in marked}  # maybe not all that there are

    def lines_of(cells: list[list[str]]) -> list[list[str]]:
        """Number, injection, test and place, for the tests of these files."""
        lines = [[number, *rest] for number, _, _, *rest in cells]
        return [line for line in lines if line[2].strip("`").partition("::")[0] in files]

    assert lines_of(read()) == lines_of(table(marked)), REFRESH
    assert PAGE.read_text().startswith(HEAD), REFRESH


def test_the_page_has_a_test_for_every_fault():
    cells = read()
    assert [line for line in cells if NOT_YET in line] == []
    named = {int(number): (fault, promise) for number, fault, promise, *_ in cells if fault}
    assert named == {number: (row.fault, row.promise) for number, row in ROWS.items()}, REFRESH


def test_the_faults_are_those_that_were_planned():
    servers, replies, updates = range(1, 11), range(11, 24), (36, 37, 66, 67, 68)
    rewards, rows, limits = range(40, 46), range(46, 55), (57, 60, 61, 63, 64, 65)
    agents = range(69, 74)
    assert set(ROWS) == {*servers, *replies, *updates, *rewards, *rows, *limits, *agents}
