"""docs/algorithms.md is that of the code, and every algorithm has a source and a test."""

import pytest

from tests.algo.document import PAGE, entries, modules, page

REFRESH = "run python -m tests.algo.document"
WITHOUT_SOURCE = {"sum_of_sequence", "mean_of_sequence", "mean_and_std", "explained_variance"}


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), REFRESH


@pytest.mark.parametrize("module", modules(), ids=lambda path: path.stem)
def test_every_function_has_a_source_and_a_test(module):
    for entry in entries(module):
        assert entry.says and entry.tests, entry.name
        assert entry.source or entry.name in WITHOUT_SOURCE, entry.name
