"""What comes all at once is spread over the turns of the event loop, and nothing is lost in it."""

import asyncio
import math
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite import background
from arealite.inference.turns import Spread


class TurnCounter:
    """Counts the turns of the running loop."""

    def __init__(self) -> None:
        self.turn = 0
        self._count()

    def _count(self) -> None:
        self.turn += 1
        asyncio.get_running_loop().call_soon(self._count)


def turns_of(per_turn: int, arrivals: list[int], cancelled: set[int]) -> list[int | None]:
    """The turn in which each task went on, None where it was cancelled before it could."""

    async def run() -> list[int | None]:
        spread, counter = Spread(per_turn=per_turn), TurnCounter()
        passed: list[int | None] = [None] * len(arrivals)

        async def arrive(number: int) -> None:
            for _ in range(arrivals[number]):
                await asyncio.sleep(0)
            await spread.wait()
            passed[number] = counter.turn

        tasks = [asyncio.create_task(arrive(number)) for number in range(len(arrivals))]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return passed

    return asyncio.run(asyncio.wait_for(run(), 10))


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 6), max_size=40),
    st.sets(st.integers(0, 39)),
)
def test_everybody_goes_on_in_order_and_never_too_many_in_a_turn(
    per_turn: int, arrivals: list[int], cancelled: set[int]
):
    cancelled = {number for number in cancelled if number < len(arrivals)}
    passed = turns_of(per_turn, arrivals, cancelled)
    turns = [turn for turn in passed if turn is not None]
    assert all(turns.count(turn) <= per_turn for turn in turns)
    if not cancelled and not any(arrivals):
        assert len({*turns}) == math.ceil(len(arrivals) / per_turn)
    for number, turn in enumerate(passed):
        assert turn is not None or number in cancelled
    by_arrival = [
        turn for _, turn in sorted(zip(arrivals, passed, strict=True), key=lambda pair: pair[0])
    ]
    in_order = [turn for turn in by_arrival if turn is not None]
    assert in_order == sorted(in_order)


def test_work_in_slices_lets_other_tasks_run_between_and_keeps_its_order():
    done: list[int] = []
    between = 0

    def work(number: int) -> int:
        time.sleep(0.002)
        done.append(number)
        return -number

    async def look_on() -> None:
        nonlocal between
        while True:
            await asyncio.sleep(0)
            between += 1

    async def run() -> list[int]:
        spread, onlooker = Spread(slice_s=0.001), asyncio.create_task(look_on())
        results = await asyncio.gather(*(spread.run(lambda n=n: work(n)) for n in range(20)))
        onlooker.cancel()
        return results

    assert asyncio.run(run()) == [-number for number in range(20)]
    assert done == list(range(20))
    assert between >= 20


def test_work_that_fails_or_is_not_wanted_any_more_concerns_nobody_else():
    def fail() -> None:
        raise ValueError("broken")

    async def run() -> list[object]:
        spread = Spread()
        tasks = [asyncio.create_task(spread.run(work)) for work in (fail, list, dict)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    failed, cancelled, made = asyncio.run(run())
    assert isinstance(failed, ValueError)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert made == {}


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Three times as many connections as the loop serves in a turn."""
    made = [socket.socketpair() for _ in range(3 * background.SOCKETS_PER_TURN)]
    for near, _ in made:
        near.setblocking(False)
    yield made
    for near, far in made:
        near.close()
        far.close()


def test_sockets_that_never_rest_starve_no_other(pairs: list[tuple[socket.socket, socket.socket]]):
    loop = background.loop()
    busy, quiet = pairs[:-1], pairs[-1]
    most_at_once, turns_waited = 0, 0

    async def run() -> None:
        nonlocal most_at_once, turns_waited
        served = 0
        heard = asyncio.Event()

        def serve_busy() -> None:
            nonlocal served
            served += 1  # and leaves the byte there, so that the socket is ready again

        for near, far in busy:
            far.send(b"x")
            loop.add_reader(near, serve_busy)
        loop.add_reader(quiet[0], heard.set)
        quiet[1].send(b"x")
        while not heard.is_set():
            before = served
            await asyncio.sleep(0)
            most_at_once = max(most_at_once, served - before)
            turns_waited += 1
        for near, _ in pairs:
            loop.remove_reader(near)

    background.run(run(), timeout_s=20, what="the quiet socket")
    assert 0 < most_at_once <= background.SOCKETS_PER_TURN
    assert turns_waited < 200  # one in three is told of: (2/3) ** 200 is nothing
