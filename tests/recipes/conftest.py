"""Recipes join a process group; the tests that follow must not find one."""

from collections.abc import Iterator

import pytest

from arealite import dist


@pytest.fixture(autouse=True)
def leave_the_process_group() -> Iterator[None]:
    yield
    dist.close()
