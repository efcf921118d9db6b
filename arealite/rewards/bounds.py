"""Answers that would take too long to compute: known beforehand by their form, or stopped in time.

A policy that degenerates writes `10^{10^{10}}`. Computing it would keep a worker busy until it is
killed, and the row with all its answers would be lost; so it is not computed.
"""

import gc
import math
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LARGEST = 10_000
"""Exponents, and what factorials and binomials are taken of, are not computed with above this."""
_SATURATED = 10**12

_FACTORIAL = re.compile(r"(\d+)\s*!")
_POWER = re.compile(r"(\d+)\s*\^\s*(?:\{\s*(\d+)\s*\}|(\d+))(?!\s*[\d^])")
"""Of whole numbers, with no other power above it."""
_IN_PARENTHESES = re.compile(r"\(\s*(\d+)\s*\)")
_LARGE_EXPONENT = re.compile(r"\^\s*\{?\s*-?\s*(\d+)")
_BINOMIAL = re.compile(r"binom\s*\{\s*(\d+)\s*\}")


class TooLongError(BaseException):
    """Ends a computation; no `except Exception` on its way catches it."""


def is_too_large(answer: str) -> bool:
    """Whether LaTeX holds a power, factorial or binomial of whole numbers that nobody writes out.

    A power of a power is evaluated from the inside, up to where it is too large anyway.
    """
    while True:
        answer = _IN_PARENTHESES.sub(r" \1 ", answer)
        numbers = [*_FACTORIAL.findall(answer), *_LARGE_EXPONENT.findall(answer)]
        if any(_value(number) > LARGEST for number in numbers + _BINOMIAL.findall(answer)):
            return True
        if factorial := _FACTORIAL.search(answer):
            answer = _replaced(answer, factorial, math.factorial(_value(factorial[1])))
        elif powers := list(_POWER.finditer(answer)):
            base, braced, bare = powers[-1].groups()
            answer = _replaced(answer, powers[-1], _power(_value(base), _value(braced or bare)))
        else:
            return False


def _replaced(answer: str, part: re.Match[str], value: int) -> str:
    return f"{answer[: part.start()]} {min(value, _SATURATED)} {answer[part.end() :]}"


def _value(digits: str) -> int:
    return int(digits) if len(digits) <= len(str(_SATURATED)) else _SATURATED


def _power(base: int, exponent: int) -> int:
    is_small = base < 2 or exponent * math.log10(base) < math.log10(_SATURATED)
    return base**exponent if is_small else _SATURATED


@contextmanager
def time_limit(cpu_s: float) -> Iterator[None]:
    """Raise TooLongError once the block has computed for so long.

    It counts seconds of this process on a core, so other work on the machine does not shorten it.
    Only in the main thread, where rewards run in their workers; elsewhere there is no limit.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    previous = signal.signal(signal.SIGVTALRM, stop)
    # Exceptions in callbacks of the collector, and in destructors, are ignored. So there is no
    # collection, and the signal comes again and again.
    is_collecting = gc.isenabled()
    gc.disable()
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        if is_collecting:
            gc.enable()
