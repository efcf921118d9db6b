"""Ends this process when the one it depends on has ended.

What a killed process started lives on: no signal and no exit hook reaches it.
"""

import contextlib
import os
import select
import sys
import threading


def end_with(pid: int, reason: str) -> None:
    """End this process with exit code 1 as soon as process `pid` has ended.

    Does nothing where the operating system has no pidfd (it is Linux 5.3 and newer).

    Args:
        pid: the process to watch; one that has ended already counts as ended.
        reason: what is then written to stderr, as one line.
    """

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(pid)], [], [])
        try:
            print(reason, file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    if hasattr(os, "pidfd_open"):
        threading.Thread(target=watch, name="lifeline", daemon=True).start()
