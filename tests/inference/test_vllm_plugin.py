"""What the plug-in changes in a process of vLLM."""

import os
import subprocess
import sys

from arealite.inference.vllm_plugin import SLEEP

WAIT_FOR_A_MESSAGE = """
import threading, time
from arealite.inference.vllm_plugin import register
register()
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

writer = MessageQueue(n_reader=1, n_local_reader=1, max_chunk_bytes=4096, max_chunks=2)
reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
ready = threading.Thread(target=writer.wait_until_ready)
ready.start()
reader.wait_until_ready()
ready.join()
writer.enqueue("one")
assert reader.dequeue() == "one"
began = time.thread_time()
try:
    reader.dequeue(timeout=0.5)
except TimeoutError:
    print("share of a core:", (time.thread_time() - began) / 0.5)
"""


def test_waiting_for_another_process_takes_no_core_where_waiting_sleeps():
    done = subprocess.run(
        [sys.executable, "-c", WAIT_FOR_A_MESSAGE],
        env=os.environ | {SLEEP: "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # A whole core where it spins, which is what vLLM does by default.
    assert float(done.stdout.rpartition("share of a core:")[2]) < 0.3
