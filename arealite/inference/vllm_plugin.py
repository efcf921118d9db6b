"""What arealite adds to every process of a vLLM server, through vLLM's plug-in entry point.

It registers the weight-transfer backend, and it ends the process when the supervisor is gone: a
killed API server would otherwise leave its engine and workers running.
"""

import contextlib
import os
import select
import signal
import threading

BACKEND = "arealite"
LIFELINE = "AREALITE_SUPERVISOR_PID"
"""Environment variable that names the process whose end is also the server's."""

_registered = False


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process, sometimes twice."""
    global _registered
    if _registered:
        return
    _registered = True
    if LIFELINE in os.environ:
        _end_with(int(os.environ[LIFELINE]))

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(
        BACKEND, "arealite.inference.vllm_worker", "WeightReceiver"
    )


def _end_with(pid: int) -> None:
    """Kill this process as soon as process `pid` has ended."""

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(pid)], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    if hasattr(os, "pidfd_open"):
        threading.Thread(target=watch, name="arealite-lifeline", daemon=True).start()
