"""What users need to test their own workflows and losses without a GPU or a server."""

from arealite.testing import faults
from arealite.testing.clock import run_with_virtual_clock
from arealite.testing.fault_proxy import FaultProxy
from arealite.testing.http_server import ScriptedServer
from arealite.testing.models import byte_tokenizer, make_tiny_model
from arealite.testing.scripted import ScriptedEngine

__all__ = [
    "FaultProxy",
    "ScriptedEngine",
    "ScriptedServer",
    "byte_tokenizer",
    "faults",
    "make_tiny_model",
    "run_with_virtual_clock",
]
