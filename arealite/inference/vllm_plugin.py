"""What arealite adds to every process of a vLLM server, through vLLM's plug-in entry point.

It registers the weight-transfer backend, and it ends the process when the supervisor is gone: a
killed API server would otherwise leave its engine and workers running.
"""

import os

from arealite.lifeline import end_with

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
        end_with(int(os.environ[LIFELINE]), "The supervisor is gone, so this server ends too.")

    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(
        BACKEND, "arealite.inference.vllm_worker", "WeightReceiver"
    )
