"""Replies that are late, broken or wrong, in the middle of training: no row is lost in silence.

What the client makes of each single reply is in tests/inference/test_vllm_replies.py.
"""

import json
import re
import time
from collections.abc import Callable

import pytest

from arealite.errors import RolloutError
from arealite.inference import connection, monitor
from arealite.inference.vllm import VLLMEngine
from arealite.testing import FaultProxy
from arealite.testing.fault_proxy import Fault, Request
from arealite.testing.faults import (
    BAD_GENERATE_REPLIES,
    Blackhole,
    CloseIdle,
    CutBody,
    Delay,
    Duplicate,
    Reset,
    SetValue,
    SlowBody,
    Status,
)
from tests.faults.training import GENERATE, ROWS, VOCAB_SIZE, asking, assert_as_sampled
from tests.oracle import Ledger, Oracle

Connect = Callable[..., VLLMEngine]


def break_some(proxy: FaultProxy, fault: Fault, on: range | list[int]) -> Callable[[], object]:
    """To be called in a step: these of the next requests to generate meet the fault."""
    return lambda: proxy.inject(fault, on=on, path=GENERATE)


def num_met(proxy: FaultProxy) -> int:
    return sum(exchange.fault is not None for exchange in proxy.exchanges_of(GENERATE))


def assert_all_arrived(ledger: Ledger) -> None:
    assert_as_sampled(ledger)
    assert ledger.lost == {}


# --- A server that fails for a moment -------------------------------------------------------------


@pytest.mark.fault(11, "a proxy answers 500 to three requests")
def test_a_burst_of_500_is_waited_out_and_counted(
    oracle: Oracle, proxy: FaultProxy, connect: Connect
):
    engine = connect(proxy)
    burst = break_some(proxy, Status(500), range(3))
    assert_all_arrived(oracle.train(engine, asking(), ROWS, at={0: burst}))
    assert engine.take_metrics()["server/retries"] == num_met(proxy) == 3


@pytest.mark.fault(12, "a proxy answers with Retry-After: 1")
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(
    oracle: Oracle, proxy: FaultProxy, connect: Connect, status: int
):
    asked_s: dict[str, list[float]] = {}

    def note(request: Request) -> bool:
        prompt = str(json.loads(request.body)["token_ids"])
        asked_s.setdefault(prompt, []).append(time.monotonic())
        return True

    fault = Status(status, retry_after_s=1)
    busy = lambda: proxy.inject(fault, on=[0], path=GENERATE, when=note)  # noqa: E731
    assert_all_arrived(oracle.train(connect(proxy), asking(), ROWS, at={0: busy}))
    # The first to be asked met the fault; its group's other request, then the second try.
    first, _, again = next(iter(asked_s.values()))[:3]
    assert again - first >= 0.99


@pytest.mark.fault(13, "a proxy answers 400 to one request")
def test_a_refused_request_is_not_repeated_and_its_row_recorded(
    oracle: Oracle, proxy: FaultProxy, connect: Connect
):
    refuse = break_some(proxy, Status(400), [0])
    ledger = oracle.train(connect(proxy), asking(), ROWS, at={0: refuse})
    assert_as_sampled(ledger)
    [reason] = ledger.reasons.values()
    assert reason.startswith("failed: ServerError: ")
    assert "answered 400" in reason
    assert num_met(proxy) == 1


# --- A reply that does not come -------------------------------------------------------------------


@pytest.mark.fault(14, "a proxy keeps one reply back for ever")
@pytest.mark.parametrize("fault", [Delay(1000), Blackhole(is_forwarded=True)], ids=repr)
def test_a_reply_much_slower_than_the_others_is_asked_for_again(
    oracle: Oracle, proxy: FaultProxy, connect: Connect, fault: Fault
):
    slow = break_some(proxy, fault, [0])
    engine = connect(proxy, patience_s=1.0)
    assert_all_arrived(oracle.train(engine, asking(), ROWS, steps=6, at={3: slow}))
    assert num_met(proxy) == 1


@pytest.mark.fault(14, "a proxy keeps the very first reply back, which its server has sent")
def test_a_reply_that_its_server_believes_to_be_sent_is_asked_for_again(
    oracle: Oracle, proxy: FaultProxy, connect: Connect, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(monitor, "COUNT_EVERY_S", 0.1)
    lost = break_some(proxy, Blackhole(is_forwarded=True), [0])
    engine = connect(proxy, progress_timeout_s=1.0)  # nobody knows yet how long a reply takes
    assert_all_arrived(oracle.train(engine, asking(), ROWS, at={0: lost}))
    assert num_met(proxy) == 1


@pytest.mark.fault(15, "a proxy sends one reply at 1 byte/s")
def test_a_reply_that_comes_byte_by_byte_is_asked_for_again(
    oracle: Oracle, proxy: FaultProxy, connect: Connect, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connection, "BODY_TIMEOUT_S", 1.0)
    slow = break_some(proxy, SlowBody(), [0])
    assert_all_arrived(oracle.train(connect(proxy), asking(), ROWS, at={0: slow}))
    assert num_met(proxy) == 1


# --- A reply that breaks on its way ---------------------------------------------------------------


@pytest.mark.fault(16, "a proxy cuts every third reply at another byte")
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_reply_that_is_cut_is_asked_for_again(
    oracle: Oracle, proxy: FaultProxy, connect: Connect, is_announced: bool
):
    def cut() -> None:
        for number, num_bytes in enumerate([0, 1, 100, 500, 900]):
            fault = CutBody(num_bytes, is_announced=is_announced)
            proxy.inject(fault, on=[3 * number], path=GENERATE)

    assert_all_arrived(oracle.train(connect(proxy), asking(), ROWS, steps=6, at={0: cut}))
    assert num_met(proxy) == 5


@pytest.mark.fault(17, "a proxy resets connections, or closes them once they are idle")
@pytest.mark.parametrize("fault", [Reset(), Reset(is_forwarded=True), CloseIdle()], ids=repr)
def test_a_connection_that_breaks_goes_unnoticed(
    oracle: Oracle, proxy: FaultProxy, connect: Connect, fault: Fault
):
    broken = break_some(proxy, fault, range(0, 1000, 3))
    assert_all_arrived(oracle.train(connect(proxy), asking(), ROWS, at={0: broken}))
    assert num_met(proxy) >= 3


@pytest.mark.fault(18, "a proxy sends every reply twice")
def test_a_reply_that_comes_twice_is_used_once(oracle: Oracle, proxy: FaultProxy, connect: Connect):
    twice = break_some(proxy, Duplicate(), range(1000))
    assert_all_arrived(oracle.train(connect(proxy), asking(), ROWS, steps=6, at={0: twice}))


@pytest.mark.fault(18, "a proxy sends some replies after they were asked for again")
def test_a_late_reply_is_used_by_nobody(oracle: Oracle, proxy: FaultProxy, connect: Connect):
    late = break_some(proxy, Delay(1.1), [0, 5, 10])
    engine = connect(proxy, request_timeout_s=1.0)
    assert_all_arrived(oracle.train(engine, asking(), ROWS, steps=6, at={0: late}))


# --- A reply that is wrong ------------------------------------------------------------------------

WRONG: dict[str, tuple[int, str]] = {
    "fewer log-probs than tokens": (19, "7 log-probs for 8 tokens"),
    "more log-probs than tokens": (19, "9 log-probs for 8 tokens"),
    "no log-probs": (19, "is not what vLLM's"),
    "log-prob is null": (20, "is not what vLLM's"),
    "log-prob is -9999": (20, "the log-prob -9999.0"),
    "log-prob is positive": (20, "the log-prob 0.5"),
    "token id beyond any vocabulary": (21, f"its model has {VOCAB_SIZE}"),
    "token id is negative": (21, "token ids from -1 to"),
    "spans are null": (22, "must partition the tokens"),
    "spans are missing": (22, "must partition the tokens"),
    "spans have a gap": (22, "must partition the tokens"),
    "spans end too early": (22, "must partition the tokens"),
    "span of a future version": (22, "version 1000000, but|must partition"),
    "unknown finish reason": (23, "is not what vLLM's"),
}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param(name, reason, marks=pytest.mark.fault(row, name))
        for name, (row, reason) in WRONG.items()
    ],
)
def test_a_wrong_reply_costs_its_row_and_nothing_else(
    oracle: Oracle, proxy: FaultProxy, connect: Connect, name: str, reason: str
):
    edit = break_some(proxy, BAD_GENERATE_REPLIES[name], [0])
    ledger = oracle.train(connect(proxy), asking(), ROWS, at={0: edit})
    assert_as_sampled(ledger)
    [recorded] = ledger.reasons.values()
    assert recorded.startswith("failed: TrajectoryError: ")
    assert re.search(reason, recorded)
    assert num_met(proxy) == 1


@pytest.mark.fault(21, "the first id behind the vocabulary")
def test_the_first_token_id_behind_the_vocabulary_is_refused(
    oracle: Oracle, proxy: FaultProxy, connect: Connect
):
    edit = break_some(proxy, SetValue("choices/0/token_ids/0", VOCAB_SIZE), [0])
    ledger = oracle.train(connect(proxy), asking(), ROWS, at={0: edit})
    assert_as_sampled(ledger)
    assert len(ledger.lost) == 1


@pytest.mark.fault(20, "log-prob is -9999, in every reply")
def test_weights_that_became_nan_end_the_run(oracle: Oracle, proxy: FaultProxy, connect: Connect):
    edit = break_some(proxy, BAD_GENERATE_REPLIES["log-prob is -9999"], range(1000))
    with oracle.ends_with(
        RolloutError, "TrajectoryError 7.*log-prob -9999.0.*its weights may hold nan"
    ):
        oracle.train(connect(proxy), asking(), ROWS, steps=20, at={0: edit})


@pytest.mark.fault(20, "a log-prob is NaN, which is no JSON")
def test_a_reply_with_a_nan_is_asked_for_again(oracle: Oracle, proxy: FaultProxy, connect: Connect):
    edit = break_some(proxy, BAD_GENERATE_REPLIES["log-prob is nan"], [0])
    assert_all_arrived(oracle.train(connect(proxy), asking(), ROWS, at={0: edit}))
    assert num_met(proxy) == 1


@pytest.mark.fault(22, "span of a version that is no number")
def test_a_reply_of_weights_that_nobody_pushed_is_asked_for_again(
    oracle: Oracle, proxy: FaultProxy, connect: Connect
):
    edit = break_some(proxy, BAD_GENERATE_REPLIES["span of a version that is no number"], [0])
    assert_all_arrived(oracle.train(connect(proxy), asking(), ROWS, at={0: edit}))


@pytest.mark.fault(23, "usage.completion_tokens is too large")
def test_a_count_of_tokens_that_does_not_fit_is_refused(
    oracle: Oracle, proxy: FaultProxy, connect: Connect
):
    edit = break_some(proxy, SetValue("usage/completion_tokens", 9), [0])
    ledger = oracle.train(connect(proxy), asking(), ROWS, at={0: edit})
    assert len(ledger.lost) == 1
