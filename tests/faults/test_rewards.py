"""Reward functions that raise, hang, eat the machine or answer nonsense: one row each, no more.

What the pool makes of each single call is in tests/rewards/test_pool.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from arealite.data import RowOrder
from arealite.errors import RolloutError
from arealite.rewards.pool import RewardFn, RewardPool
from arealite.testing import ScriptedEngine
from arealite.types import Row
from tests.faults.training import ROWS, asking, wait_until
from tests.oracle import Ledger, Oracle, is_alive

Pool = Callable[..., RewardPool]
VICTIM = 3  # the row whose reward goes wrong


def id_but(expression: str) -> RewardFn:
    """Gives each row its id as its reward, but for the victim this Python expression."""

    # Defined here: what a worker imports by name would bring pytest along.
    def reward(text: str, row: Row) -> float:
        modules = {"os": os, "sys": sys, "time": time, "subprocess": subprocess, "path": Path}
        return eval(expression, modules) if row["id"] == VICTIM else float(row["id"])

    return reward


def train(oracle: Oracle, reward: RewardFn) -> Ledger:
    """A whole epoch and more, in which every row but the victim gets its own reward."""
    ledger = oracle.train(ScriptedEngine(replies=["fine"]), asking(reward), ROWS)
    order = RowOrder(len(ROWS), seed=0)
    for group in ledger.groups:
        assert {sample.reward for sample in group} == {float(order[group[0].row_index])}
    assert {order[place] for place in ledger.lost} <= {VICTIM}
    return ledger


def assert_victim_is_recorded(ledger: Ledger, *parts: str) -> None:
    """It was lost, and each time the reason has all these parts."""
    assert ledger.reasons
    for reason in ledger.reasons.values():
        assert reason.startswith("failed: RewardError: Reward reward")
        for part in parts:
            assert part in reason


@pytest.mark.fault(40, "a reward raises for one row")
def test_a_reward_that_raises_costs_its_row(oracle: Oracle, reward_pool: Pool):
    reward_pool(num_workers=1)
    ledger = train(oracle, id_but("{}['gold']"))
    assert_victim_is_recorded(ledger, "raised KeyError: 'gold'")


@pytest.mark.fault(40, "a reward raises for every row")
def test_a_reward_that_always_raises_ends_the_run(oracle: Oracle, reward_pool: Pool):
    reward_pool(num_workers=1)

    def misspelt(text: str, row: Row) -> float:
        return row["anwser"]

    with oracle.ends_with(
        RolloutError, r"RewardError 7.*Reward misspelt raised KeyError: 'anwser'"
    ):
        oracle.train(ScriptedEngine(replies=["fine"]), asking(misspelt), ROWS)


@pytest.mark.parametrize(
    "expression",
    [
        pytest.param("sum(iter(int, 1))", marks=pytest.mark.fault(41, "a loop of Python calls")),
        pytest.param("9**9**9**9", marks=pytest.mark.fault(41, "a loop in C")),
        pytest.param("time.sleep(1000)", marks=pytest.mark.fault(41, "a sleep")),
    ],
)
def test_a_reward_that_hangs_is_killed_at_its_deadline(
    oracle: Oracle, reward_pool: Pool, expression: str
):
    reward_pool(num_workers=2, timeout_s=1.0)
    ledger = train(oracle, id_but(expression))
    assert_victim_is_recorded(ledger, "took longer than 1 s", "its worker was killed")


@pytest.mark.fault(42, "a reward allocates 8 GiB")
def test_a_reward_that_eats_memory_dies_at_its_limit(oracle: Oracle, reward_pool: Pool):
    reward_pool(num_workers=1, memory_bytes=2**28)
    ledger = train(oracle, id_but("len(bytearray(8 * 2**30))"))
    assert_victim_is_recorded(ledger, "ran out of memory", "0.25 GiB", "twice")


@pytest.mark.fault(42, "a reward forks without end")
def test_a_reward_that_forks_without_end_is_stopped(oracle: Oracle, reward_pool: Pool):
    reward_pool(num_workers=1, timeout_s=10)
    ledger = train(oracle, id_but("[os.fork() or time.sleep(100) for _ in iter(int, 1)]"))
    assert_victim_is_recorded(ledger, "started more than 256 processes", "its worker was killed")


START_20 = "[subprocess.Popen(['sleep', '100']) for _ in range(20)]"


@pytest.mark.fault(42, "a reward starts 20 processes and returns")
def test_processes_that_a_reward_left_end_with_its_worker(oracle: Oracle, reward_pool: Pool):
    reward_pool(num_workers=1)
    assert train(oracle, id_but(f"{START_20} and 3.0")).lost == {}


@pytest.mark.fault(42, "a reward starts 20 processes and hangs")
def test_processes_of_a_reward_that_hangs_are_killed_with_it(oracle: Oracle, reward_pool: Pool):
    reward_pool(num_workers=1, timeout_s=1.0)
    ledger = train(oracle, id_but(f"{START_20} and time.sleep(1000)"))
    assert_victim_is_recorded(ledger, "took longer than 1 s")


@pytest.mark.fault(42, "a reward starts a process in a session of its own")
def test_a_process_that_left_the_workers_session_ends_with_it(
    oracle: Oracle, reward_pool: Pool, tmp_path: Path
):
    pool = reward_pool(num_workers=1)
    start = "subprocess.Popen(['sleep', '100'], start_new_session=True).pid"
    train(oracle, id_but(f"path({str(tmp_path)!r}, str({start})).touch() or 3.0"))
    processes = [psutil.Process(int(file.name)) for file in tmp_path.iterdir()]
    pool.close()
    try:
        wait_until(lambda: not any(map(is_alive, processes)), within_s=1)
    finally:
        for process in filter(is_alive, processes):
            process.kill()


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        pytest.param(expression, shown, marks=pytest.mark.fault(43, f"`{expression}`"))
        for expression, shown in {
            "None": "NoneType None",
            "float('nan')": "float nan",
            "-float('inf')": "float -inf",
            "'1.0'": "str '1.0'",
            "[1.0, 2.0]": "list [1.0, 2.0]",
            "{'reward': 1.0}": "dict {'reward': 1.0}",
            "10**400": "int 1000",
        }.items()
    ],
)
def test_a_reward_that_returns_no_number_costs_its_row(
    oracle: Oracle, reward_pool: Pool, expression: str, shown: str
):
    reward_pool(num_workers=1)
    ledger = train(oracle, id_but(expression))
    assert_victim_is_recorded(ledger, f"returned {shown}", "not a finite int or float")


@pytest.mark.fault(43, "`torch.tensor(1.0)`")
def test_a_reward_that_returns_a_tensor_costs_its_row(oracle: Oracle):
    async def reward(text: str, row: Row) -> object:
        return torch.tensor(1.0) if row["id"] == VICTIM else float(row["id"])

    ledger = train(oracle, reward)  # type: ignore[arg-type]
    assert_victim_is_recorded(ledger, "returned Tensor tensor(1.)")


@pytest.mark.fault(44, "kill -9 of a worker in the middle of its call, once")
def test_a_call_whose_worker_is_killed_is_tried_again(
    oracle: Oracle, reward_pool: Pool, tmp_path: Path
):
    reward_pool(num_workers=1)
    trace = tmp_path / "trace"
    once = f"os.kill(os.getpid(), 9) if not path({str(trace)!r}).exists() and not "
    ledger = train(oracle, id_but(once + f"path({str(trace)!r}).touch() else 3.0"))
    assert trace.exists()
    assert ledger.lost == {}


@pytest.mark.fault(44, "kill -9 of a worker in the middle of its call, each time")
def test_a_call_that_costs_two_workers_is_given_up(oracle: Oracle, reward_pool: Pool):
    reward_pool(num_workers=1)
    ledger = train(oracle, id_but("os.kill(os.getpid(), 9)"))
    assert_victim_is_recorded(ledger, "its worker was killed by SIGKILL, twice")


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        pytest.param(expression, reason, marks=pytest.mark.fault(45, f"`{expression}`"))
        for expression, reason in {
            "sys.exit('bye')": "raised SystemExit: bye",
            "os._exit(3)": "its worker ended with exit code 3, twice",
            "os.abort()": "its worker was killed by SIGABRT, twice",
            "input()": "raised EOFError",
        }.items()
    ],
)
def test_a_reward_that_exits_or_asks_costs_its_row(
    oracle: Oracle, reward_pool: Pool, expression: str, reason: str
):
    reward_pool(num_workers=1)
    assert_victim_is_recorded(train(oracle, id_but(expression)), reason)


@pytest.mark.fault(45, "a reward prints to stdout and through a shell")
def test_what_a_reward_prints_stays_out_of_the_runs_output(
    oracle: Oracle, reward_pool: Pool, capfd: pytest.CaptureFixture[str]
):
    reward_pool(num_workers=1)
    ledger = train(oracle, id_but("print('a') or os.system('echo b') or 3.0"))
    assert ledger.lost == {}
    out, err = capfd.readouterr()
    assert out == ""
    assert {"a", "b"} <= set(err.splitlines())
