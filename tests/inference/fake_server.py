"""A stand-in for a vLLM server's process tree: answers the canary, has a stubborn grandchild."""

import http.server
import mmap
import os
import subprocess
import sys

ANSWER = b'{"choices": [{"token_ids": [1, 2]}]}'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *_: object) -> None: ...


def main(port: int, mode: str) -> None:
    if mode == "fails":
        sys.exit("cannot find the model: nowhere")
    if mode == "silent":
        import time

        time.sleep(100)
    # Ignores SIGTERM and has left the session, as vLLM's workers may.
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)
    with open(f"/dev/shm/{os.environ['SEGMENT']}", "w+b") as segment:
        segment.truncate(4096)
        globals()["segment"] = mmap.mmap(segment.fileno(), 4096)
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
