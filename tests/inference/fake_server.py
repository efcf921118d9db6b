"""A stand-in for a vLLM server's process tree: answers the canary, has a stubborn grandchild."""

import http.server
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ANSWER = b'{"choices": [{"token_ids": [1, 2]}]}'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(ANSWER)

    def do_GET(self) -> None:
        self.answer(b'{"is_paused": false}')

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def main(port: int, mode: str) -> None:
    if mode == "fails":
        sys.exit("cannot find the model: nowhere")
    if mode == "silent":
        time.sleep(100)
    if mode == "port taken once" and not (marker := Path(os.environ["MARKER"])).exists():
        marker.touch()
        sys.exit("OSError: [Errno 98] Address already in use")
    if mode == "dies soon":
        threading.Timer(1.0, lambda: os.kill(os.getpid(), 6)).start()
    # Ignores SIGTERM and has left the session, as vLLM's workers may.
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)
    with open(f"/dev/shm/{os.environ['SEGMENT']}", "w+b") as segment:
        segment.truncate(4096)
        globals()["segment"] = mmap.mmap(segment.fileno(), 4096)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
