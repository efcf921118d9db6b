"""What would take too long is known by its form or stopped."""

import gc
import threading
import time

import pytest

from arealite.rewards.bounds import TooLongError, is_too_large, time_limit

LARGE = [
    *(r"10^{10^{10}}", "10^10^10", "7 ^ { 7 ^ { 7 } }", r"2^{2^{2^{2^{2}}}}", "2^{-20000}"),
    *("x^{10^9}", r"\sum_{n=1}^{10^9} n", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{1000000}"),
    *("100000!", "((100!)!)!", "4!!!", "2^{100!}", "9" * 50 + "!"),
    *(r"\binom{10^9}{10^8}", r"\dbinom{99999}{5}"),
]
SMALL = [
    *("", "5", r"\frac{1}{2}", "1,000,000", "1234567890123456789", "!!", "^", "{", "^{^{"),
    *("2^{2007}", "10^{9}", "3^{3^3}", "x^{100}", "e^{x^2}", "x^{n}", r"2^{10}\cdot 3^{5}"),
    *("100!", "(5!)^2", r"\binom{10}{3}", "[0,10^{6}]"),
]


@pytest.mark.parametrize("answer", LARGE)
def test_what_nobody_writes_out_is_too_large(answer: str):
    assert is_too_large(answer)


@pytest.mark.parametrize("answer", SMALL)
def test_what_answers_hold_is_not(answer: str):
    assert not is_too_large(answer)


def test_a_long_computation_is_stopped_and_leaves_no_timer():
    with pytest.raises(TooLongError), time_limit(0.05):
        while True:
            try:
                sum(range(1_000))
            except Exception:  # which a library may have anywhere
                continue
    assert gc.isenabled()
    began_s = time.process_time()
    while time.process_time() - began_s < 0.15:
        sum(range(1_000))


def test_a_short_one_is_left_alone_and_limits_may_nest():
    with time_limit(5.0), time_limit(1e-9):
        total = sum(range(100_000))
    assert total == 4_999_950_000


def test_other_threads_have_no_limit():
    results: list[int] = []

    def compute() -> None:
        with time_limit(1e-9):
            results.append(sum(range(1_000_000)))

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert results == [499_999_500_000]
