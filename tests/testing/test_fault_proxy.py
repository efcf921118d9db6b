"""Each fault puts on the wire what it says: seen by raw sockets and by plain HTTP clients."""

import asyncio
import email.utils
import gzip
import http.client
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import pytest

from arealite.errors import ConfigError
from arealite.inference.reply_formats import COMPACT
from arealite.testing import FaultProxy, ScriptedServer
from arealite.testing.fault_proxy import Exchange, Fault, Reply
from arealite.testing.faults import (
    BAD_CHUNK,
    BAD_GENERATE_REPLIES,
    BYTE_ORDER_MARK,
    GZIP_LIE,
    HTML_PAGE,
    Blackhole,
    CloseIdle,
    CutBody,
    Delay,
    DeleteValue,
    Duplicate,
    Oversized,
    Raw,
    Redirect,
    RepeatValue,
    ReplaceBody,
    Reset,
    SetHeader,
    SetValue,
    SlowBody,
    Status,
)

pytest_plugins = ["arealite.testing.plugin"]

GENERATE = "/inference/v1/generate"
VERSION = b'{"version":"0.32.0"}'
"""What the server answers to GET /version."""


@pytest.fixture
def server(scripted_server: Callable[..., ScriptedServer]) -> ScriptedServer:
    return scripted_server(max_model_len=64)


@pytest.fixture
def proxy(server: ScriptedServer, fault_proxy: Callable[..., FaultProxy]) -> FaultProxy:
    return fault_proxy(server.address)


@dataclass(frozen=True)
class Wire:
    """What came over a connection, and how it ended: "closed", "reset", or "open" for a moment."""

    content: bytes
    end: str

    @property
    def head(self) -> bytes:
        return self.content.partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        return self.content.partition(b"\r\n\r\n")[2]


class Client:
    """A connection that shows everything, and asks for /version."""

    def __init__(self, proxy: FaultProxy) -> None:
        host, port = proxy.address.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)))

    def send(self, content: bytes = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n") -> None:
        self._socket.sendall(content)

    def read(self, *, quiet_s: float = 0.1) -> Wire:
        """What comes until the end, or until nothing has come for a moment."""
        self._socket.settimeout(quiet_s)
        content = b""
        while True:
            try:
                part = self._socket.recv(2**16)
            except TimeoutError:
                return Wire(content, "open")
            except ConnectionResetError:
                return Wire(content, "reset")
            if not part:
                return Wire(content, "closed")
            content += part

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[Client]:
    with closing(Client(proxy)) as client:
        yield client


@pytest.fixture
def wire_of(proxy: FaultProxy, client: Client) -> Callable[..., Wire]:
    """What one request brings when this fault is injected."""

    def ask(fault: Fault, *, quiet_s: float = 0.1) -> Wire:
        proxy.inject(fault, on=[0])
        client.send()
        return client.read(quiet_s=quiet_s)

    return ask


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def get(address: str, path: str = "/version", **headers: str) -> tuple[int, bytes]:
    """Status and body over a connection of its own."""
    with closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)) as link:
        link.request("GET", path, headers=headers)
        reply = link.getresponse()
        return reply.status, reply.read()


def post_generate(address: str, *, max_tokens: int = 4) -> bytes:
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": max_tokens, "logprobs": 0}}
    with closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)) as link:
        link.request("POST", GENERATE, json.dumps(body), {"Content-Type": "application/json"})
        return link.getresponse().read()


# --- Without faults -------------------------------------------------------------------------------


def test_a_proxy_without_faults_changes_nothing(server: ScriptedServer, proxy: FaultProxy):
    for path in ("/version", "/health", "/metrics", "/v1/models", "/nowhere", "/is_paused?a=b"):
        assert get(proxy.address, path) == get(server.address, path)
    direct, proxied = (json.loads(post_generate(x)) for x in (server.address, proxy.address))
    assert proxied["choices"] == direct["choices"]


def test_headers_and_body_reach_the_server(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    server = scripted_server(token="secret")
    proxy = fault_proxy(server.address)
    assert get(proxy.address, "/is_paused")[0] == 401
    assert get(proxy.address, "/is_paused", Authorization="Bearer secret")[0] == 200
    post_generate(proxy.address)
    assert json.loads(server.bodies(GENERATE)[0])["token_ids"] == [1, 2, 3]


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers that it was asked with."""

    def do_GET(self) -> None:
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_a_server_is_not_told_of_other_formats_than_json(fault_proxy: Callable[..., FaultProxy]):
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever).start()
        proxy = fault_proxy(f"http://127.0.0.1:{server.server_port}")
        _, body = get(proxy.address, "/", **{"Accept": COMPACT, "X-Of-The-Client": "1"})
        server.shutdown()
    headers = json.loads(body)
    assert "accept" not in headers
    assert headers["x-of-the-client"] == "1"


def test_a_body_in_chunks_reaches_the_server(server: ScriptedServer, proxy: FaultProxy):
    with closing(http.client.HTTPConnection(proxy.address.removeprefix("http://"))) as link:
        link.request("POST", "/resume", iter([b"abc", b"de"]), encode_chunked=True)
        assert link.getresponse().status == 200
    assert server.bodies("/resume") == [b"abcde"]


def test_a_connection_is_kept_for_many_requests(proxy: FaultProxy, client: Client):
    for _ in range(3):
        client.send()
        wire = client.read(quiet_s=0.05)
        assert (wire.body, wire.end) == (VERSION, "open")
    client.send(b"GET /version HTTP/1.1\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
    assert client.read().content.count(b"HTTP/1.1 200 OK") == 2
    assert len(proxy.exchanges) == 5


@pytest.mark.parametrize(
    "content", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
def test_what_is_no_http_ends_the_connection(client: Client, content: bytes):
    client.send(content)
    assert client.read().end in ("closed", "reset")


def test_a_client_that_leaves_takes_its_request_from_the_server(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    server = scripted_server(tokens_per_s=100)
    proxy = fault_proxy(server.address)
    body = json.dumps({"token_ids": [1], "sampling_params": {"max_tokens": 400}}).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nContent-Type: application/json\r\n"
    with closing(Client(proxy)) as client:
        client.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: num_running(server) == 1)
    wait_until(lambda: num_running(server) == 0)


def num_running(server: ScriptedServer) -> float:
    """Requests that the server works on, as it says itself."""
    lines = get(server.address, "/metrics")[1].decode().splitlines()
    [line] = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    return float(line.rpartition(" ")[2])


def test_a_server_that_refuses_or_dies_shows_as_a_reset(
    server: ScriptedServer, proxy: FaultProxy, client: Client
):
    server.hang()
    client.send(b"GET /is_paused HTTP/1.1\r\n\r\n")
    server.wait_for("/is_paused")
    server.die()
    assert client.read().end == "reset"
    with closing(Client(proxy)) as second:
        second.send()
        assert second.read().end == "reset"
    server.restart()
    assert get(proxy.address) == (200, VERSION)


# --- Which requests -------------------------------------------------------------------------------


def statuses(proxy: FaultProxy, paths: list[str]) -> list[int]:
    return [get(proxy.address, path)[0] for path in paths]


def test_a_fault_without_a_place_is_for_all(proxy: FaultProxy):
    proxy.inject(Status(500))
    assert statuses(proxy, ["/version", "/health"]) == [500, 500]
    proxy.clear()
    assert statuses(proxy, ["/version", "/health"]) == [200, 200]


def test_a_burst_ends(proxy: FaultProxy):
    proxy.inject(Status(500), on=range(3))
    assert statuses(proxy, ["/version"] * 5) == [500, 500, 500, 200, 200]


def test_requests_are_counted_from_the_injection_and_for_the_path(proxy: FaultProxy):
    get(proxy.address)
    proxy.inject(Status(418), on=[1], path="/version")
    paths = ["/health", "/version", "/health", "/version", "/version"]
    assert statuses(proxy, paths) == [200, 200, 200, 418, 200]


def test_a_predicate_chooses_among_requests(proxy: FaultProxy):
    proxy.inject(Status(418), when=lambda request: "x=1" in request.target, on=[0, 2])
    paths = ["/version?x=1", "/version", "/version?x=1", "/version?x=1"]
    assert statuses(proxy, paths) == [418, 200, 200, 418]


def test_the_fault_that_was_injected_first_wins(proxy: FaultProxy):
    proxy.inject(Status(501), on=[0])
    proxy.inject(Status(502), on=[0, 1])
    assert statuses(proxy, ["/version"] * 3) == [501, 502, 200]


def test_the_proxy_records_what_it_did(server: ScriptedServer, proxy: FaultProxy):
    proxy.inject(Status(500), on=[0], path="/version")
    proxy.inject(Reset(), on=[1], path="/version")
    get(proxy.address)
    with pytest.raises(ConnectionResetError):
        get(proxy.address)
    get(proxy.address)
    get(proxy.address, "/health")
    seen = [
        (exchange.fault, exchange.status, exchange.is_forwarded, exchange.is_reset)
        for exchange in proxy.exchanges_of("/version")
    ]
    assert seen == [
        (Status(500), 500, False, False),
        (Reset(), None, False, True),
        (None, 200, True, False),
    ]
    assert len(proxy.exchanges) == 4
    assert server.count("/version") == 1


# --- Instead of the server ------------------------------------------------------------------------


def test_status(wire_of: Callable[..., Wire], server: ScriptedServer):
    wire = wire_of(Status(503))
    assert wire.head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"Retry-After" not in wire.head
    assert json.loads(wire.body)["error"]["code"] == 503
    assert server.received == []


def test_a_status_that_nobody_has_heard_of(wire_of: Callable[..., Wire]):
    assert wire_of(Status(599)).head.startswith(b"HTTP/1.1 599 \r\n")


def test_status_without_content(wire_of: Callable[..., Wire]):
    wire = wire_of(Status(204))
    assert wire.head.startswith(b"HTTP/1.1 204 No Content")
    assert b"Content-Length" not in wire.head
    assert (wire.body, wire.end) == (b"", "open")


@pytest.mark.parametrize(("seconds", "text"), [(3, b"3"), (0.5, b"0.5"), (120.0, b"120")])
def test_retry_after_as_a_number(wire_of: Callable[..., Wire], seconds: float, text: bytes):
    assert b"\r\nRetry-After: " + text in wire_of(Status(429, retry_after_s=seconds)).head


def test_retry_after_as_a_date(wire_of: Callable[..., Wire]):
    now_s = time.time()
    head = wire_of(Status(503, retry_after_s=5, is_date=True)).head.decode()
    [text] = [line[13:] for line in head.split("\r\n") if line.startswith("Retry-After: ")]
    assert text.endswith(" GMT")
    assert now_s + 5 <= email.utils.parsedate_to_datetime(text).timestamp() <= now_s + 7


def test_redirect(wire_of: Callable[..., Wire]):
    head = wire_of(Redirect("http://elsewhere/x")).head
    assert head.startswith(b"HTTP/1.1 307 ")
    assert b"\r\nLocation: http://elsewhere/x" in head


def test_raw(wire_of: Callable[..., Wire]):
    assert wire_of(Raw(b"\x00 no http")) == Wire(b"\x00 no http", "closed")


@pytest.mark.parametrize("is_forwarded", [False, True])
def test_blackhole(wire_of: Callable[..., Wire], server: ScriptedServer, is_forwarded: bool):
    assert wire_of(Blackhole(is_forwarded)) == Wire(b"", "open")
    assert server.count("/version") == is_forwarded


@pytest.mark.parametrize("is_forwarded", [False, True])
def test_reset(wire_of: Callable[..., Wire], server: ScriptedServer, is_forwarded: bool):
    assert wire_of(Reset(is_forwarded)) == Wire(b"", "reset")
    assert server.count("/version") == is_forwarded


# --- The server's reply, badly sent ---------------------------------------------------------------


def test_delay(wire_of: Callable[..., Wire], proxy: FaultProxy):
    began = time.monotonic()
    wire = wire_of(Delay(0.2), quiet_s=0.6)
    assert wire.body == VERSION
    assert time.monotonic() - began >= 0.2


def test_a_delay_is_over_when_the_client_leaves(proxy: FaultProxy):
    proxy.inject(Delay(1000), on=[0])
    with closing(Client(proxy)) as client:
        client.send()
        assert client.read() == Wire(b"", "open")
    assert get(proxy.address) == (200, VERSION)
    assert proxy.exchanges[0].status is None


def test_slow_body(wire_of: Callable[..., Wire]):
    began = time.monotonic()
    wire = wire_of(SlowBody(bytes_per_s=200))
    assert (wire.body, wire.end) == (VERSION, "open")
    assert b"Content-Length: 20" in wire.head
    assert time.monotonic() - began >= 20 / 200


def test_a_slow_body_of_one_byte_a_second_does_not_come(wire_of: Callable[..., Wire]):
    assert wire_of(SlowBody()).content.endswith(b"\r\n\r\n")


def test_cut_body_that_is_proper_http(wire_of: Callable[..., Wire]):
    wire = wire_of(CutBody(7))
    assert b"Content-Length: 7" in wire.head
    assert (wire.body, wire.end) == (VERSION[:7], "open")


def test_cut_body_that_ends_before_it_was_announced(wire_of: Callable[..., Wire]):
    wire = wire_of(CutBody(7, is_announced=False))
    assert b"Content-Length: 20" in wire.head
    assert (wire.body, wire.end) == (VERSION[:7], "closed")


def test_cut_bodies_as_a_client_sees_them(proxy: FaultProxy):
    proxy.inject(CutBody(7), on=[0])
    proxy.inject(CutBody(7, is_announced=False), on=[1])
    assert get(proxy.address) == (200, VERSION[:7])
    with pytest.raises(http.client.IncompleteRead):
        get(proxy.address)


def test_close_idle(wire_of: Callable[..., Wire]):
    wire = wire_of(CloseIdle())
    assert (wire.body, wire.end) == (VERSION, "closed")
    assert b"close" not in wire.head.lower()


def test_an_idle_connection_is_closed_only_after_a_while(
    wire_of: Callable[..., Wire], client: Client
):
    assert wire_of(CloseIdle(after_s=0.3), quiet_s=0.05).end == "open"
    client.send()
    assert client.read(quiet_s=0.05).body == VERSION
    assert client.read(quiet_s=2).end == "closed"


def test_duplicate(wire_of: Callable[..., Wire], client: Client):
    wire = wire_of(Duplicate())
    once = wire.content[: len(wire.content) // 2]
    assert wire == Wire(once + once, "open")
    assert once.endswith(VERSION)
    client.send()
    assert client.read().body == VERSION


def test_a_late_duplicate_comes_on_an_idle_connection(wire_of: Callable[..., Wire], client: Client):
    first = wire_of(Duplicate(after_s=0.2), quiet_s=0.05)
    assert first.body == VERSION
    assert client.read(quiet_s=0.6) == first


def test_oversized(wire_of: Callable[..., Wire]):
    wire = wire_of(Oversized(3 * 2**16 + 5))
    assert b"Transfer-Encoding: chunked" in wire.head
    assert b"Content-Length" not in wire.head
    assert wire.body.startswith(b"10000\r\n" + b" " * 2**16 + b"\r\n10000\r\n")
    assert wire.body.endswith(b"\r\n14\r\n" + VERSION + b"\r\n0\r\n\r\n")


def test_an_oversized_reply_is_right_in_all_but_its_size(proxy: FaultProxy):
    proxy.inject(Oversized(2**21))
    status, body = get(proxy.address)
    assert (status, len(body)) == (200, 2**21 + len(VERSION))
    assert json.loads(body) == json.loads(VERSION)


# --- The server's reply, with an edit -------------------------------------------------------------


def test_set_header_replaces_the_true_one(wire_of: Callable[..., Wire]):
    wire = wire_of(SetHeader("content-type", "text/html"))
    assert wire.head.lower().count(b"content-type") == 1
    assert b"content-type: text/html" in wire.head
    assert wire.body == VERSION


@pytest.mark.parametrize("length", [5, 1000])
def test_a_content_length_may_lie(wire_of: Callable[..., Wire], length: int):
    wire = wire_of(SetHeader("Content-Length", str(length)))
    assert wire.head.count(b"Content-Length") == 1
    assert b"Content-Length: %d" % length in wire.head
    assert (wire.body, wire.end) == (VERSION, "open")


def test_gzip_lie(wire_of: Callable[..., Wire]):
    wire = wire_of(GZIP_LIE)
    assert b"Content-Encoding: gzip" in wire.head
    with pytest.raises(gzip.BadGzipFile):
        gzip.decompress(wire.body)


def test_replace_body(wire_of: Callable[..., Wire]):
    wire = wire_of(ReplaceBody(b"null"))
    assert wire.head.startswith(b"HTTP/1.1 200 OK")
    assert b"Content-Type: application/json" in wire.head
    assert wire.body == b"null"


def test_html_page(wire_of: Callable[..., Wire]):
    wire = wire_of(HTML_PAGE)
    assert wire.head.startswith(b"HTTP/1.1 200 OK")
    assert b"Content-Type: text/html" in wire.head
    assert wire.body.startswith(b"<!DOCTYPE html>")


def test_byte_order_mark(wire_of: Callable[..., Wire]):
    wire = wire_of(BYTE_ORDER_MARK)
    assert wire.body == b"\xef\xbb\xbf" + VERSION
    assert b"Content-Length: 23" in wire.head


def test_bad_chunk(proxy: FaultProxy):
    proxy.inject(BAD_CHUNK)

    async def ask() -> bytes:
        async with aiohttp.ClientSession() as session, session.get(proxy.address) as reply:
            return await reply.read()

    with pytest.raises(aiohttp.ClientError):
        asyncio.run(ask())


def test_values_are_set_deleted_and_repeated(proxy: FaultProxy):
    proxy.inject(SetValue("data/0/max_model_len", 2**63), on=[0])
    proxy.inject(DeleteValue("data/0/id"), on=[1])
    proxy.inject(RepeatValue("data/0"), on=[2])
    models = [json.loads(get(proxy.address, "/v1/models")[1])["data"] for _ in range(4)]
    assert [len(cards) for cards in models] == [1, 1, 2, 1]
    [true] = models[3]
    assert models[0] == [true | {"max_model_len": 2**63}]
    assert models[1] == [{name: value for name, value in true.items() if name != "id"}]
    assert models[2] == [true, true]


def test_an_edit_of_a_place_that_a_reply_has_not_says_so_at_once_and_when_the_proxy_is_closed(
    server: ScriptedServer,
):
    message = r"There is no 'choices\.0' in the reply .* A place is written with slashes"
    with pytest.raises(ConfigError, match=message), FaultProxy(server.address) as proxy:
        proxy.inject(DeleteValue("choices.0"))
        answer = get(proxy.address)
        assert answer[0] == 400
        assert re.search(message, str(answer[1]))


def test_a_predicate_that_raises_is_heard_of_when_the_proxy_is_closed(server: ScriptedServer):
    with pytest.raises(ZeroDivisionError), FaultProxy(server.address) as proxy:
        proxy.inject(Status(500), when=lambda request: bool(1 // len(request.body)))
        assert get(proxy.address)[0] == 400


CHOICE_CHANGES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "fewer log-probs than tokens": lambda c: len(c["logprobs"]["content"]) == 3,
    "more log-probs than tokens": lambda c: len(c["logprobs"]["content"]) == 5,
    "no log-probs": lambda c: c["logprobs"] is None,
    "log-prob is nan": lambda c: math.isnan(c["logprobs"]["content"][0]["logprob"]),
    "log-prob is infinite": lambda c: c["logprobs"]["content"][0]["logprob"] == -math.inf,
    "log-prob is null": lambda c: c["logprobs"]["content"][0]["logprob"] is None,
    "log-prob is -9999": lambda c: c["logprobs"]["content"][0]["logprob"] == -9999,
    "log-prob is positive": lambda c: c["logprobs"]["content"][0]["logprob"] > 0,
    "token id beyond any vocabulary": lambda c: c["token_ids"][0] == 2**31,
    "token id beyond 63 bits": lambda c: c["token_ids"][0] == 2**63,
    "token id is negative": lambda c: c["token_ids"][0] == -1,
    "token id is not whole": lambda c: c["token_ids"][0] == 1.5,
    "spans are null": lambda c: c["weight_versions"] is None,
    "spans are missing": lambda c: "weight_versions" not in c,
    "spans have a gap": lambda c: c["weight_versions"][0]["start"] == 1,
    "spans overlap": lambda c: (
        [(s["start"], s["end"]) for s in c["weight_versions"]] == [(0, 4)] * 2
    ),
    "spans end too early": lambda c: c["weight_versions"][0]["end"] == 0,
    "span of a future version": lambda c: c["weight_versions"][0]["version"] == "1000000",
    "span of a version that is no number": lambda c: c["weight_versions"][0]["version"] == "seven",
    "unknown finish reason": lambda c: c["finish_reason"] == "tired",
    "no finish reason": lambda c: c["finish_reason"] is None,
}
"""What is wrong in the choice of each named reply, of four tokens; the rest is as it was."""


@pytest.mark.parametrize("name", BAD_GENERATE_REPLIES)
def test_a_named_bad_reply_has_the_one_flaw_of_its_name(
    server: ScriptedServer, proxy: FaultProxy, name: str
):
    proxy.inject(BAD_GENERATE_REPLIES[name], path=GENERATE)
    true = json.loads(post_generate(server.address))["choices"]
    choices = json.loads(post_generate(proxy.address))["choices"]
    if name == "no choices":
        assert choices == []
    elif name == "two choices":
        assert choices == true * 2
    else:
        [choice] = choices
        assert CHOICE_CHANGES[name](choice)
        assert not CHOICE_CHANGES[name](true[0])
        changed = {key for key in true[0] if choice.get(key, "gone") != true[0][key]}
        assert len(changed) == 1


@pytest.mark.parametrize("name", BAD_GENERATE_REPLIES)
def test_a_named_bad_reply_is_bad_where_the_weights_changed_after_the_first_token(
    proxy: FaultProxy, name: str
):
    spans = [{"start": 0, "end": 1, "version": "0"}, {"start": 1, "end": 4, "version": "1"}]
    proxy.inject(SetValue("choices/0/weight_versions", spans), path=GENERATE)
    true = json.loads(post_generate(proxy.address))["choices"]
    with FaultProxy(proxy.address) as second:
        second.inject(BAD_GENERATE_REPLIES[name], path=GENERATE)
        assert json.loads(post_generate(second.address))["choices"] != true


def test_a_fault_of_ones_own(proxy: FaultProxy):
    @dataclass(frozen=True)
    class Shout:
        async def apply(self, exchange: Exchange) -> None:
            reply = await exchange.forward()
            await exchange.send(Reply(status=200, body=reply.body.upper()))

    proxy.inject(Shout())
    assert get(proxy.address) == (200, VERSION.upper())
    assert proxy.exchanges[0].fault == Shout()


# --- The end --------------------------------------------------------------------------------------


def test_closing_leaves_no_thread_no_port_and_no_connection(server: ScriptedServer):
    before = threading.active_count()
    with FaultProxy(server.address) as proxy:
        proxy.inject(Blackhole(), on=[0])
        proxy.inject(SlowBody(), on=[1])
        with closing(Client(proxy)) as first, closing(Client(proxy)) as second:
            for client in (first, second):
                client.send()
                client.read()
            proxy.close()
            assert first.read().end in ("closed", "reset")
            assert second.read().end in ("closed", "reset")
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        get(proxy.address)


def test_what_is_no_fault_is_refused_when_it_is_injected(
    scripted_server: Callable[..., ScriptedServer], fault_proxy: Callable[..., FaultProxy]
):
    proxy = fault_proxy(scripted_server().address)
    with pytest.raises(TypeError, match=r"inject got 500, which is no fault: see testing.faults"):
        proxy.inject(500)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"inject got on=0: write on=\[0\]"):
        proxy.inject(Status(500), on=0)  # type: ignore[arg-type]
