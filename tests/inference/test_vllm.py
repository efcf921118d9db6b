"""What the client adds to the contract of all engines; for that, see test_conformance.py."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from arealite.errors import ServerError
from arealite.inference.vllm import OUR_THRESHOLD, VLLMEngine
from arealite.testing import ScriptedServer

pytest_plugins = ["arealite.testing.plugin"]


def test_an_address_where_nobody_answers_is_named_with_what_to_do():
    with pytest.raises(ServerError, match=r"No vLLM server answered at http://127.0.0.1:9 .*serve"):
        VLLMEngine(["http://127.0.0.1:9"])


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_all_garbage_is_looked_for_while_weights_are_pushed_and_at_no_other_time(
    scripted_server: Callable[..., ScriptedServer],
):
    thresholds = gc.get_threshold()
    with VLLMEngine([scripted_server().address]) as engine:
        assert gc.get_threshold()[:2] == thresholds[:2]
        assert gc.get_threshold()[2] == OUR_THRESHOLD
        dropped = weakref.ref(_Cycle())
        engine.receive_weights([("weight", torch.zeros(2))], version=0)
        assert dropped() is None
        dropped = weakref.ref(_Cycle())
        engine.version = 1  # as on a rank that does not push
        assert dropped() is None
    assert gc.get_threshold() == thresholds
