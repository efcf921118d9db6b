"""Fixtures for pytest. Enable them with one line in your conftest.py:

pytest_plugins = ["arealite.testing.plugin"]

def test_my_agent_survives_a_restart(scripted_server, fault_proxy):
    server = scripted_server(tokens_per_s=1000)
    proxy = fault_proxy(server.address)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import ParamSpec, TypeVar

import pytest

from arealite.testing.fault_proxy import FaultProxy
from arealite.testing.http_server import ScriptedServer

Settings = ParamSpec("Settings")
Started = TypeVar("Started", bound=AbstractContextManager)


@pytest.fixture
def scripted_server() -> Iterator[Callable[..., ScriptedServer]]:
    """`ScriptedServer` itself, but what it starts is closed when the test ends."""
    with ExitStack() as stack:
        yield _closed_by(stack, ScriptedServer)


@pytest.fixture
def fault_proxy() -> Iterator[Callable[..., FaultProxy]]:
    """`FaultProxy` itself, but what it starts is closed when the test ends."""
    with ExitStack() as stack:
        yield _closed_by(stack, FaultProxy)


def _closed_by(stack: ExitStack, start: Callable[Settings, Started]) -> Callable[Settings, Started]:
    def started(*args: Settings.args, **settings: Settings.kwargs) -> Started:
        return stack.enter_context(start(*args, **settings))

    return started
