"""What arealite adds to every process of a vLLM server, through vLLM's plug-in entry point.

It registers the weight-transfer backend; it ends the process when the supervisor is gone, where a
killed API server would leave its engine and workers running; and on CPUs it lets waiting processes
sleep.
"""

import functools
import os
import time

from arealite.lifeline import end_with

BACKEND = "arealite"
LIFELINE = "AREALITE_SUPERVISOR_PID"
"""Environment variable that names the process whose end is also the server's."""
SLEEP = "AREALITE_WAITING_SLEEPS"
"""Environment variable; with any value, no process of the server waits for another by spinning."""
NAP_S, RECHECK_MS = 0.0005, 20

_registered = False


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process, sometimes twice."""
    global _registered
    if _registered:
        return
    _registered = True
    if LIFELINE in os.environ:
        end_with(int(os.environ[LIFELINE]), "The supervisor is gone, so this server ends too.")

    if SLEEP in os.environ:
        _wait_without_spinning()

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(
        BACKEND, "arealite.inference.vllm_worker", "WeightReceiver"
    )


def _wait_without_spinning() -> None:
    """Let vLLM's processes take naps while they wait for each other; by default they spin for 1 s.

    Spinning takes a core from the trainer. Worse, the engine spins with Python's lock in hand, so
    that its thread for requests gets through a few in a second, and a pause behind them is late.
    After 1 s they wait for a notification, which may get lost; then they look again only after 5 s.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    nap = functools.partial(time.sleep, NAP_S)
    shm_broadcast.sched_yield = nap  # pyright: ignore[reportPrivateImportUsage]
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = RECHECK_MS
