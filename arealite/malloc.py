"""Freed memory goes back to the system, now and then."""

import ctypes
from contextlib import suppress

TURNS = 10
"""Each costs a tiny model's step about a tenth: what was given back is mapped and zeroed again."""


def trim(turn: int) -> None:
    """In each tenth turn, let go of what glibc keeps of freed memory; nothing elsewhere.

    It keeps all that lies between blocks in use, and the longer a process lives with tensors of
    ever other sizes, the more there is of it.
    """
    if turn % TURNS == 0:
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
