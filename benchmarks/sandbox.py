"""What it costs to run a program in the sandbox, and how soon one that misbehaves is ended.

    python benchmarks/sandbox.py

Programs per second one after the other, and as many at a time as there are cores, beside a bare
`python -I -S` that does nothing; the last line is JSON with the figures.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from arealite.rewards.code import Case, CodeReward, run_cases
from arealite.rewards.sandbox import SandboxLimits, num_workers, protections, run_python

NUM_PROGRAMS = 100
LIMITS = SandboxLimits(timeout_s=2.0)
ATTACKS = {
    "infinite loop": "while True: pass",
    "fork bomb": "import os\nwhile True: os.fork()",
    "8 GB": "bytearray(8 * 2**30)",
    "1 GB of output": "for _ in range(2**10): print('x' * 2**20)",
    "write elsewhere": "open('/var/tmp/mine', 'w')",
    "environment of the parent": "import os; open(f'/proc/{os.getppid()}/environ').read()",
    "socket": "import socket; socket.socket()",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "os._exit": "import os; os._exit(0)",
    "loop in C": "sum(range(10**12))",
}


def milliseconds(run: Callable[[], object], count: int = 30) -> float:
    """Median of some runs."""

    def once() -> float:
        began_s = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began_s)

    return median(once() for _ in range(count))


def per_second(num_threads: int) -> float:
    with ThreadPoolExecutor(num_threads) as pool:
        began_s = time.perf_counter()
        results = list(pool.map(lambda n: run_python(f"print({n})"), range(NUM_PROGRAMS)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(NUM_PROGRAMS)]
    return NUM_PROGRAMS / (time.perf_counter() - began_s)


def cases_per_second() -> float:
    """Of one program that is graded on many cases."""
    cases = [Case(mode="program", stdin=str(n), expected=str(2 * n)) for n in range(NUM_PROGRAMS)]
    began_s = time.perf_counter()
    assert all(run_cases("print(2 * int(input()))", cases, CodeReward(total_s=120)))
    return NUM_PROGRAMS / (time.perf_counter() - began_s)


def main() -> None:
    print(f"{protections()}, gaps: {protections().gaps or 'none'}\n")
    bare_ms = milliseconds(
        lambda: subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
    )
    sandbox_ms = milliseconds(lambda: run_python("pass"))
    alone, together = per_second(1), per_second(num_workers())
    cases = cases_per_second()
    print(f"a program that does nothing      {sandbox_ms:6.1f} ms, bare Python {bare_ms:.1f} ms")
    print(f"programs one after the other     {alone:6.1f} per second")
    print(f"programs, {num_workers()} at a time          {together:6.1f} per second")
    print(f"cases of one program             {cases:6.1f} per second\n")
    print(f"{'attack':28}{'ended as':12}{'after':>8}   limit {LIMITS.timeout_s:g} s")
    worst_s = 0.0
    for name, code in ATTACKS.items():
        result = run_python(code, limits=LIMITS)
        worst_s = max(worst_s, result.seconds)
        print(f"{name:28}{result.status:12}{result.seconds:6.2f} s")
    figures = {
        "sandbox_ms": round(sandbox_ms, 1),
        "bare_ms": round(bare_ms, 1),
        "programs_per_s": round(together, 1),
        "programs_per_s_alone": round(alone, 1),
        "cases_per_s": round(cases, 1),
        "worst_attack_s": round(worst_s, 2),
        "limit_s": LIMITS.timeout_s,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
