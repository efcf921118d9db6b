import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arealite.errors import ConfigError, RewardError
from arealite.rewards.math import gsm8k_reward
from arealite.rewards.pool import RewardPool, default_pool, score
from arealite.rewards.worker import NotANumberError, as_reward

# The rewards are defined inside the tests: what a worker imports by name would bring pytest along.

NO_ROW: dict[str, Any] = {}


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(num_workers=2, timeout_s=20.0) as pool:
        yield pool


def run(pool: RewardPool, reward: Any, text: str = "", **options: Any) -> float:
    return asyncio.run(pool.score(reward, text, NO_ROW, **options))


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def pid_in(file: Path) -> int:
    assert eventually(lambda: file.exists() and file.read_text().endswith("\n"))
    return int(file.read_text())


# What comes back


def test_reward_may_be_a_function_a_lambda_a_closure_a_partial_or_an_object(pool: RewardPool):
    bonus = 0.25

    def closure(text: str, row: dict) -> float:
        return len(text) + row["bonus"] + bonus

    class Reward:
        def __call__(self, text: str, row: dict) -> float:
            return 2.0 * len(text)

    async def main() -> list[float]:
        return [
            await pool.score(closure, "abc", {"bonus": 0.5}),
            await pool.score(lambda text, row: len(text), "abc", {}),
            await pool.score(functools.partial(lambda text, row, by: by, by=7), "abc", {}),
            await pool.score(Reward(), "abc", {}),
            await pool.score(gsm8k_reward, "#### 34", {"answer": "#### 34"}),
        ]

    assert asyncio.run(main()) == [3.75, 3.0, 7.0, 6.0, 1.0]


@pytest.mark.parametrize(
    ("value", "reward"),
    [(1, 1.0), (True, 1.0), (-0.5, -0.5)]
    + [(kind(1), 1.0) for kind in (np.float64, np.float32, np.float16, np.int64, np.bool_)],
)
def test_every_python_and_numpy_number_is_a_reward(value: object, reward: float):
    assert as_reward(value) == reward
    assert type(as_reward(value)) is float


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "NoneType None"),
        ("1.0", "str '1.0'"),
        (float("nan"), "float nan"),
        (float("inf"), "float inf"),
        (np.float32("nan"), "float32"),
        ([1.0], r"list \[1.0\]"),
        (torch.tensor(1.0), r"Tensor tensor\(1\.\)"),
        (np.array(1.0), "ndarray array"),
        (1j, "complex 1j"),
        (10**400, "int 1000"),
    ],
)
def test_anything_else_is_an_error_that_says_what_came_back(value: object, shown: str):
    with pytest.raises(NotANumberError, match=f"returned {shown}.*not a finite int or float"):
        as_reward(value)


def test_pool_says_which_reward_returned_what(pool: RewardPool):
    def forgetful(text: str, row: dict) -> None:
        pass

    async def later(text: str, row: dict) -> float:
        return 1.0

    with pytest.raises(RewardError, match="forgetful returned NoneType None"):
        run(pool, forgetful)
    with pytest.raises(RewardError, match=r"coroutine.*with `async def`"):
        run(pool, lambda text, row: later(text, row))


def test_error_has_type_message_and_line_of_the_users_code(pool: RewardPool):
    def helper(row: dict) -> float:
        return row["anwser"]

    def misspelt(text: str, row: dict) -> float:
        return helper(row)

    with pytest.raises(RewardError) as caught:
        run(pool, misspelt)
    message = str(caught.value)
    assert message.startswith("Reward misspelt raised KeyError: 'anwser'\n")
    assert 'return row["anwser"]' in message
    assert "test_pool.py" in message
    assert "worker.py" not in message


def test_reward_that_cannot_be_pickled_is_named(pool: RewardPool):
    lock = threading.Lock()

    def locked(text: str, row: dict) -> float:
        with lock:
            return 1.0

    with pytest.raises(RewardError, match=r"locked cannot be sent.*lock.*async def"):
        run(pool, locked)
    with pytest.raises(RewardError, match=r"row for reward .*cannot be sent.*'gate'"):
        asyncio.run(pool.score(lambda text, row: 1.0, "", {"gate": lock}))


def test_reward_that_cannot_be_imported_in_the_worker_is_named(pool: RewardPool):
    module = type(sys)("only_in_this_process")
    exec("def reward(text, row): return 1.0", module.__dict__)
    sys.modules["only_in_this_process"] = module
    try:
        with pytest.raises(RewardError, match=r"cannot be loaded.*ModuleNotFoundError.*only_in"):
            run(pool, module.reward)
    finally:
        del sys.modules["only_in_this_process"]


def test_helper_that_a_notebook_cell_redefines_is_seen(pool: RewardPool):
    cells: dict[str, Any] = {"__name__": "__main__"}
    exec("def helper(): return 1.0\ndef reward(text, row): return helper()", cells)
    assert run(pool, cells["reward"]) == 1.0
    exec("def helper(): return 2.0", cells)
    assert run(pool, cells["reward"]) == 2.0


def test_large_closure_is_pickled_once(pool: RewardPool):
    times_pickled = []

    class Table:
        def __reduce__(self) -> tuple:
            times_pickled.append(1)
            return bytes, (bytes(200_000),)

    table = Table()

    def lookup(text: str, row: dict) -> float:
        return float(len(table))  # type: ignore[arg-type]

    assert [run(pool, lookup) for _ in range(3)] == [200_000.0] * 3
    assert len(times_pickled) == 1


# What must not hurt anyone else


def test_hostile_answers_end_in_time_and_good_answers_beside_them_get_their_value():
    hostile = [
        "#### 9^{9^{9^9}}",
        r"\boxed{100000000!}",
        r"\boxed{" + "(" * 2_000 + "34" + ")" * 2_000 + "}",
        r"\boxed{" + "(" * 90 + "34" + ")" * 90 + "}",
        r"\boxed{" * 3_000,
        r"\boxed{(1+x)^{100000}}",
        "#### " + "1," * 20_000,
    ]
    good = [(f"#### {n}", 1.0) if n % 2 else (rf"\boxed{{{2 * n}/2 + 1}}", 0.0) for n in range(50)]

    async def main(pool: RewardPool) -> tuple[list, list]:
        def outcome(text: str, gold: str) -> Any:
            return pool.score(gsm8k_reward, text, {"answer": gold})

        return await asyncio.gather(
            asyncio.gather(*(outcome(text, "34") for text in hostile), return_exceptions=True),
            asyncio.gather(*(outcome(text, str(n)) for n, (text, _) in enumerate(good))),
        )

    with RewardPool(num_workers=2, timeout_s=2.0) as pool:
        started = time.monotonic()
        ends, values = asyncio.run(main(pool))
    assert time.monotonic() - started < 30
    assert values == [value for _, value in good]
    for end in ends:
        assert end == 0.0 or (isinstance(end, RewardError) and "longer than 2 s" in str(end))


def test_call_that_hangs_is_killed_at_its_deadline_and_the_next_one_works():
    def python_loop(text: str, row: dict) -> float:
        while True:
            pass

    def c_loop(text: str, row: dict) -> float:
        return float(9**9**9**9)

    with RewardPool(num_workers=1, timeout_s=0.5) as pool:
        for hang in (python_loop, c_loop):
            started = time.monotonic()
            with pytest.raises(RewardError, match=r"loop took longer than 0\.5 s .*'the end'"):
                run(pool, hang, text="the end")
            assert time.monotonic() - started < 2.0
        assert run(pool, lambda text, row: 1.0) == 1.0
        with pytest.raises(RewardError, match=r"longer than 0\.2 s"):
            run(pool, python_loop, timeout_s=0.2)


def test_waiting_for_a_worker_does_not_count_against_the_deadline():
    def slow(text: str, row: dict) -> float:
        time.sleep(0.25)
        return 1.0

    async def main(pool: RewardPool) -> list[float]:
        return await asyncio.gather(*(pool.score(slow, "", {}) for _ in range(4)))

    with RewardPool(num_workers=1, timeout_s=0.8) as pool:
        assert asyncio.run(main(pool)) == [1.0] * 4


@pytest.mark.parametrize(
    ("last_words", "ending"),
    [
        ("os._exit(3)", "ended with exit code 3, twice"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL, twice"),
        ("__import__('ctypes').string_at(0)", "was killed by SIGSEGV, twice"),
        ("os.closerange(3, 100)", "(was killed by SIGKILL|ended with exit code 0), twice"),
    ],
)
def test_worker_that_dies_twice_is_an_error_that_says_how(
    pool: RewardPool, last_words: str, ending: str
):
    def deadly(text: str, row: dict) -> float:
        exec(last_words, {"os": os, "signal": signal})
        return 1.0

    with pytest.raises(RewardError, match=f"deadly: its worker {ending}, on the response"):
        run(pool, deadly)
    assert run(pool, lambda text, row: 1.0) == 1.0


def test_worker_that_dies_once_is_tried_again(pool: RewardPool, tmp_path: Path):
    trace = tmp_path / "trace"

    def unlucky(text: str, row: dict) -> float:
        if not trace.exists():
            trace.touch()
            os._exit(1)
        return 1.0

    assert run(pool, unlucky) == 1.0


def test_pool_survives_kill_9_of_an_idle_worker():
    with RewardPool(num_workers=1) as pool:
        pid = int(run(pool, lambda text, row: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        assert int(run(pool, lambda text, row: os.getpid())) != pid


def test_memory_hog_is_contained():
    def hog(text: str, row: dict) -> float:
        return float(len(bytearray(8 * 2**30)))

    with RewardPool(num_workers=1, memory_bytes=2**28) as pool:
        with pytest.raises(RewardError, match=r"hog.*out of memory.*0\.25 GiB") as caught:
            run(pool, hog)
        assert "bytearray(8 * 2**30)" in str(caught.value)
        assert run(pool, lambda text, row: 1.0) == 1.0


def test_exit_stdin_and_prints_are_contained(pool: RewardPool, capfd: pytest.CaptureFixture[str]):
    def exits(text: str, row: dict) -> float:
        sys.exit("bye")

    def reads(text: str, row: dict) -> float:
        return float(sys.stdin.read() == "")

    with pytest.raises(RewardError, match="exits raised SystemExit: bye"):
        run(pool, exits)
    assert run(pool, reads) == 1.0

    def prints(text: str, row: dict) -> float:
        print("seen by the user")
        os.system("echo from a shell")
        return 1.0

    with RewardPool(num_workers=1) as fresh:  # its worker starts with the captured stderr
        assert run(fresh, prints) == 1.0
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "seen by the user\nfrom a shell\n"


def test_processes_that_a_killed_reward_started_die_with_it(tmp_path: Path):
    file = tmp_path / "pid"

    def leaks(text: str, row: dict) -> float:
        child = subprocess.Popen(["sleep", "1000"])
        file.write_text(f"{child.pid}\n")
        return float(child.wait())

    with RewardPool(num_workers=1, timeout_s=0.5) as pool:
        with pytest.raises(RewardError, match=r"longer than 0\.5 s"):
            run(pool, leaks)
        assert eventually(lambda: is_gone(pid_in(file)))


def test_reward_that_forks_answers_once(pool: RewardPool):
    def forks(text: str, row: dict) -> float:
        if os.fork() == 0:
            return 13.0
        os.wait()
        return float(text)

    assert [run(pool, forks, text=str(n)) for n in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_dead_worker_is_noticed_though_its_child_holds_the_socket(pool: RewardPool):
    def forks_and_dies(text: str, row: dict) -> float:
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(5)

    with pytest.raises(RewardError, match="ended with exit code 5, twice"):
        run(pool, forks_and_dies)


def test_cancelling_the_task_kills_the_call_and_only_that(tmp_path: Path):
    file = tmp_path / "pid"

    def hangs(text: str, row: dict) -> float:
        file.write_text(f"{os.getpid()}\n")
        return float(9**9**9**9)

    def slow(text: str, row: dict) -> float:
        time.sleep(0.5)
        return 1.0

    async def main(pool: RewardPool) -> float:
        beside = asyncio.create_task(pool.score(slow, "", {}))
        task = asyncio.create_task(pool.score(hangs, "", {}))
        await asyncio.to_thread(pid_in, file)
        waiting = [asyncio.create_task(pool.score(hangs, "", {})) for _ in range(20)]
        await asyncio.sleep(0)
        for cancelled in [task, *waiting]:
            cancelled.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await cancelled
        assert await asyncio.to_thread(eventually, lambda: is_gone(pid_in(file)), 2.0)
        assert await pool.score(lambda text, row: 2.0, "", {}) == 2.0
        return await beside

    with RewardPool(num_workers=2, timeout_s=60) as pool:
        assert asyncio.run(main(pool)) == 1.0


# Loops, threads, and the life of the pool


def test_async_reward_runs_on_the_calling_loop(pool: RewardPool):
    not_picklable = threading.Lock()

    async def judge(text: str, row: dict, scale: float = 1.0) -> float:
        assert not_picklable
        return scale * float(asyncio.get_running_loop() is loops[-1])

    class Judge:
        async def __call__(self, text: str, row: dict) -> float:
            return await judge(text, row)

    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> list[float]:
        loops.append(asyncio.get_running_loop())
        rewards = [judge, Judge(), functools.partial(judge, scale=2.0)]
        return [await pool.score(reward, "", {}) for reward in rewards]

    assert asyncio.run(main()) == [1.0, 1.0, 2.0]


def test_async_reward_that_hangs_raises_or_returns_nothing_is_labelled(pool: RewardPool):
    async def hangs(text: str, row: dict) -> float:
        await asyncio.Event().wait()
        return 1.0

    async def raises(text: str, row: dict) -> float:
        raise TimeoutError("the judge's own")

    async def cancels(text: str, row: dict) -> float:
        raise asyncio.CancelledError

    async def exits(text: str, row: dict) -> float:
        sys.exit(1)

    async def forgets(text: str, row: dict) -> None:
        pass

    with pytest.raises(RewardError, match=r"hangs took longer than 0\.1 s"):
        run(pool, hangs, timeout_s=0.1)
    with pytest.raises(RewardError, match=r"raises raised TimeoutError: the judge's own\n.*line"):
        run(pool, raises)
    with pytest.raises(RewardError, match="cancels was cancelled from within"):
        run(pool, cancels)
    with pytest.raises(RewardError, match="exits raised SystemExit"):
        run(pool, exits)
    with pytest.raises(RewardError, match="forgets returned NoneType"):
        run(pool, forgets)


def test_two_event_loops_use_one_pool_at_the_same_time(pool: RewardPool):
    both_run = threading.Barrier(2)
    values: list[list[float]] = []

    def thread() -> None:
        async def main() -> list[float]:
            both_run.wait(timeout=10)
            calls = (pool.score(lambda text, row: float(text), str(n), {}) for n in range(50))
            return await asyncio.gather(*calls)

        values.append(asyncio.run(main()))

    threads = [threading.Thread(target=thread) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert values == [[float(n) for n in range(50)]] * 2


def test_workers_start_with_the_first_call_and_only_as_many_as_are_needed():
    pool = RewardPool(num_workers=4)
    assert not pool._threads
    run(pool, lambda text, row: 1.0)
    run(pool, lambda text, row: 1.0)
    assert len(pool._threads) == 1
    pool.close()


def test_close_ends_busy_workers_and_waiting_calls_within_two_seconds(tmp_path: Path):
    def hangs(text: str, row: dict) -> float:
        Path(row["file"]).write_text(f"{os.getpid()}\n")
        return float(9**9**9**9)

    files = [tmp_path / str(n) for n in range(2)]

    async def main(pool: RewardPool) -> list[Any]:
        calls = [pool.score(hangs, "", {"file": str(files[n % 2])}) for n in range(4)]
        running = asyncio.gather(*calls, return_exceptions=True)
        for file in files:
            await asyncio.to_thread(pid_in, file)
        started = time.monotonic()
        await asyncio.to_thread(pool.close)
        assert time.monotonic() - started < 2.0
        return await running

    pool = RewardPool(num_workers=2, timeout_s=60)
    ends = asyncio.run(main(pool))
    assert all(isinstance(end, RewardError) and "was closed" in str(end) for end in ends)
    assert all(is_gone(pid_in(file)) for file in files)
    with pytest.raises(RewardError, match="closed"):
        run(pool, hangs)
    pool.close()


def test_settings_that_cannot_work_are_rejected():
    with pytest.raises(ConfigError, match="num_workers=0"):
        RewardPool(num_workers=0)
    with pytest.raises(ConfigError, match="timeout_s=0"):
        RewardPool(timeout_s=0)


def test_worker_keeps_out_of_the_way_of_the_run(pool: RewardPool):
    def checks(text: str, row: dict) -> float:
        from arealite.rewards.math import gsm8k_reward

        assert gsm8k_reward(r"\boxed{\frac{1}{2}}", {"answer": "0.5"}) == 1.0
        assert not {"torch", "transformers", "pytest"} & set(sys.modules)
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.getpgid(0) == os.getsid(0) == os.getpid()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        return 1.0

    assert run(pool, checks) == 1.0


SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from arealite.rewards.pool import score

print("the script runs")
bonus = 0.5

def reward(text, row):
    assert "heavy" not in sys.modules
    return len(text) + bonus

def hangs(text, row):
    Path(text).write_text(f"{os.getpid()}\\n")
    return 9**9**9**9

sys.modules["heavy"] = os
"""


def test_script_without_a_main_guard_runs_once_and_exits_cleanly(tmp_path: Path):
    script = tmp_path / "recipe.py"
    script.write_text(SCRIPT + 'print(asyncio.run(score(reward, "abc", {})))')
    for start in ([str(script)], ["-W", "error", "-m", "recipe"]):
        done = subprocess.run(
            [sys.executable, *start], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "the script runs\n3.5\n"
        assert done.stderr == ""


def test_killed_run_leaves_no_worker_behind(tmp_path: Path):
    file = tmp_path / "pid"
    code = SCRIPT + f"asyncio.run(score(hangs, {str(file)!r}, {{}}))"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    pid = pid_in(file)
    parent.kill()
    parent.wait()
    assert eventually(lambda: is_gone(pid), within_s=5.0)


HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
"""What a shell starts in the background ignores it, and so do these tests there."""


def test_ctrl_c_ends_the_run_without_a_word_from_the_workers(tmp_path: Path):
    file = tmp_path / "pid"
    code = HEARS_CTRL_C + SCRIPT + f"asyncio.run(score(hangs, {str(file)!r}, {{}}))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    pid = pid_in(file)
    os.killpg(parent.pid, signal.SIGINT)
    _, err = parent.communicate(timeout=10)
    assert "KeyboardInterrupt" in err
    assert "worker.py" not in err
    assert eventually(lambda: is_gone(pid), within_s=5.0)


def test_default_pool_is_made_once_and_again_after_close():
    first = default_pool()
    assert default_pool() is first
    assert asyncio.run(score(lambda text, row: 1.0, "", {})) == 1.0
    first.close()
    assert default_pool() is not first
    default_pool().close()
