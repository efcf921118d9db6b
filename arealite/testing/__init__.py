"""What users need to test their own workflows and losses without a GPU or a server."""

from arealite.testing.models import byte_tokenizer, make_tiny_model
from arealite.testing.scripted import ScriptedEngine

__all__ = ["ScriptedEngine", "byte_tokenizer", "make_tiny_model"]
