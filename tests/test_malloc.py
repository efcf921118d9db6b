"""What glibc keeps of freed memory goes back in each tenth turn, and nothing is asked of others."""

import ctypes
import platform
from pathlib import Path

import pytest

from arealite import malloc


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_freed_memory_below_a_block_in_use_goes_back_in_the_tenth_turn():
    blocks = [bytearray(b"x" * 60_000) for _ in range(3_000)]  # 180 MB, each from the heap
    del blocks[:-1]
    kept = resident_mb()
    malloc.trim(9)
    assert resident_mb() > kept - 20
    malloc.trim(10)
    assert resident_mb() < kept - 100


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    malloc.trim(10)
