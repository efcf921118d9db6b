"""Rows, their order, and the model and tokenizer they are for."""

from arealite.data.gsm8k_mini import generate_problems
from arealite.data.mixing import Part, mixed
from arealite.data.models import TINY_AGENT, TINY_MATH, TINY_STEPS, load_tokenizer, resolve_model
from arealite.data.order import RowOrder
from arealite.data.rows import (
    GSM8K_LARGE,
    GSM8K_MINI,
    MINI_PREFERENCES,
    TINY_PROGRAMS,
    load_rows,
)

__all__ = [
    "GSM8K_LARGE",
    "GSM8K_MINI",
    "MINI_PREFERENCES",
    "TINY_AGENT",
    "TINY_MATH",
    "TINY_PROGRAMS",
    "TINY_STEPS",
    "Part",
    "RowOrder",
    "generate_problems",
    "load_rows",
    "load_tokenizer",
    "mixed",
    "resolve_model",
]
