"""The scripted server keeps vLLM's contract, as plain HTTP clients see it."""

import asyncio
import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import aiohttp
import pytest

from arealite.errors import DeadlineError
from arealite.testing import ScriptedServer

pytest_plugins = ["arealite.testing.plugin"]

GENERATE = "/inference/v1/generate"
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
Start = Callable[..., ScriptedServer]


def ask(
    address: str, path: str, body: Any = None, *, method: str = "", token: str = ""
) -> tuple[int, Any]:
    """Status and decoded body; a body makes it a POST."""
    content = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
    request = urllib.request.Request(
        address + path,
        data=content.encode() if isinstance(content, str) else content,
        method=method or ("GET" if body is None else "POST"),
        headers={"Content-Type": "application/json"} | _authorization(token),
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            status, text = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            status, text = error.code, error.read()
    return status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()


def _authorization(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def generate_body(prompt: list[int] = PROMPT, **params: Any) -> dict[str, Any]:
    return {"token_ids": prompt, "sampling_params": {"max_tokens": 4, "logprobs": 0} | params}


def generate(server: ScriptedServer, prompt: list[int] = PROMPT, **params: Any) -> dict[str, Any]:
    """The one choice of a reply of status 200."""
    status, reply = ask(server.address, GENERATE, generate_body(prompt, **params))
    assert status == 200, reply
    [choice] = reply["choices"]
    return choice


def metrics(server: ScriptedServer) -> dict[str, float]:
    _, text = ask(server.address, "/metrics")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all('{engine="0",model_name="scripted"}' in line for line in lines)
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.fixture
def server(scripted_server: Start) -> ScriptedServer:
    return scripted_server()


@pytest.fixture
def start_generating() -> Any:
    """Asks in a thread, so that the test can do something meanwhile."""
    with ThreadPoolExecutor(8) as threads:

        def start(server: ScriptedServer, **params: Any) -> Future[dict[str, Any]]:
            return threads.submit(generate, server, **params)

        yield start


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_tokens(server: ScriptedServer, count: int) -> None:
    """Return when so many more tokens than now have been sampled."""
    before = metrics(server)["vllm:generation_tokens_total"]
    wait_until(lambda: metrics(server)["vllm:generation_tokens_total"] >= before + count)


# --- What a server says of itself -----------------------------------------------------------------


def test_health_is_empty(server: ScriptedServer):
    assert ask(server.address, "/health") == (200, "")


def test_version_is_the_one_the_contract_was_read_from(server: ScriptedServer):
    assert ask(server.address, "/version") == (200, {"version": "0.32.0"})


def test_models_names_the_model_and_its_context(scripted_server: Start):
    _, models = ask(scripted_server(model="m", max_model_len=99).address, "/v1/models")
    assert models["object"] == "list"
    assert [(card["id"], card["max_model_len"]) for card in models["data"]] == [("m", 99)]


def test_arealites_own_route_gives_the_vocabulary_and_the_room(scripted_server: Start):
    server = scripted_server(vocab_size=7, max_num_seqs=5)
    limits = {"vocab_size": 7, "max_num_seqs": 5}
    assert ask(server.address, "/arealite/model") == (200, limits)


def test_no_more_requests_are_sampled_at_once_than_the_server_has_room_for(
    scripted_server: Start, start_generating: Any
):
    server = scripted_server(max_num_seqs=2, tokens_per_s=100)
    replies = [start_generating(server, max_tokens=20) for _ in range(5)]
    wait_until(lambda: metrics(server)["vllm:num_requests_waiting"] == 3)
    assert metrics(server)["vllm:num_requests_running"] == 2
    assert [len(reply.result()["token_ids"]) for reply in replies] == [20] * 5


def test_metrics_count_tokens_and_cache_hits(server: ScriptedServer):
    generate(server, list(range(40)), max_tokens=3)
    generate(server, list(range(40)), max_tokens=5)
    assert metrics(server) == {
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:prefix_cache_queries_total": 80,
        "vllm:prefix_cache_hits_total": 32,  # two full blocks of 16, the second time
        "vllm:prompt_tokens_total": 80,
        "vllm:generation_tokens_total": 8,
    }


def test_an_unknown_path_and_a_wrong_method_are_refused_as_by_fastapi(server: ScriptedServer):
    assert ask(server.address, "/nowhere") == (404, {"detail": "Not Found"})
    assert ask(server.address, "/pause") == (405, {"detail": "Method Not Allowed"})


# --- Generating -----------------------------------------------------------------------------------


def test_a_reply_has_a_log_prob_for_each_token_and_spans_over_all(server: ScriptedServer):
    choice = generate(server, max_tokens=6)
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == 6
    assert [entry["token_id"] for entry in choice["logprobs"]["content"]] == choice["token_ids"]
    assert all(-2 <= entry["logprob"] < 0 for entry in choice["logprobs"]["content"])
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": 6}]


def test_a_reply_has_the_fields_of_vllms_reply(server: ScriptedServer):
    _, reply = ask(server.address, GENERATE, generate_body() | {"request_id": "abc"})
    assert reply["request_id"] == "generate-tokens-abc"
    assert reply["output_mode"] == "tokens"
    usage = {name: reply["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    assert usage == {"prompt_tokens": 8, "completion_tokens": 4}
    assert set(reply) == {
        *("request_id", "model", "created", "usage", "output_mode", "choices"),
        *("prompt_logprobs", "prompt_token_id_logprobs", "prompt_token_ids", "mm_placeholders"),
        *("metrics", "kv_transfer_params", "ec_transfer_params"),
    }
    assert set(reply["choices"][0]) == {
        *("index", "finish_reason", "stop_reason", "token_ids", "logprobs", "routed_experts"),
        *("sampling_mask", "weight_versions"),
    }


def test_a_reply_names_the_request_it_answers(server: ScriptedServer):
    def request_id(body: dict[str, Any], headers: dict[str, str]) -> str:
        content = json.dumps(generate_body() | body).encode()
        headers = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(server.address + GENERATE, data=content, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.loads(reply.read())["request_id"].removeprefix("generate-tokens-")

    assert request_id({"request_id": "a"}, {}) == "a"
    assert request_id({"request_id": "a"}, {"X-Request-Id": "b"}) == "b"
    assert request_id({}, {}) != request_id({}, {}) != ""


def test_log_probs_come_only_when_asked_for(server: ScriptedServer):
    assert generate(server, logprobs=None)["logprobs"] is None


def test_tokens_depend_on_seed_and_prompt_only(scripted_server: Start):
    first, second, other = (scripted_server(seed=seed) for seed in (1, 1, 2))
    tokens = generate(first, max_tokens=20)["token_ids"]
    assert generate(first, max_tokens=20)["token_ids"] == tokens
    assert generate(second, max_tokens=20)["token_ids"] == tokens
    assert generate(second, max_tokens=7)["token_ids"] == tokens[:7]
    assert generate(other, max_tokens=20)["token_ids"] != tokens
    assert generate(first, PROMPT[::-1], max_tokens=20)["token_ids"] != tokens


def test_a_script_says_what_is_sampled(scripted_server: Start):
    server = scripted_server(lambda prompt: [prompt[0], 1, 2])
    whole, cut = generate(server, max_tokens=3), generate(server, max_tokens=2)
    assert (whole["token_ids"], whole["finish_reason"]) == ([5, 1, 2], "stop")
    assert (cut["token_ids"], cut["finish_reason"]) == ([5, 1], "length")


def test_a_stop_token_ends_the_response_and_is_named(scripted_server: Start):
    choice = generate(scripted_server(lambda _: [1, 2, 3]), stop_token_ids=[2])
    assert (choice["token_ids"], choice["finish_reason"]) == ([1, 2], "stop")
    assert choice["stop_reason"] == 2


def test_a_budget_beyond_the_context_is_silently_cut(scripted_server: Start):
    choice = generate(scripted_server(max_model_len=10), max_tokens=64)
    assert (len(choice["token_ids"]), choice["finish_reason"]) == (2, "length")


def test_without_a_budget_the_context_is_filled(scripted_server: Start):
    server = scripted_server(max_model_len=10)
    _, reply = ask(server.address, GENERATE, {"token_ids": PROMPT, "sampling_params": {}})
    assert len(reply["choices"][0]["token_ids"]) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "1 validation error"),
        (b"[]", "1 validation error"),
        ({"sampling_params": {}}, "token_ids"),
        ({"token_ids": PROMPT}, "sampling_params"),
        (generate_body([]), "1 validation error"),
        (generate_body([1, -1]), "1 validation error"),
        (generate_body([1, 320]), "Token id 320 is out of vocabulary"),
        (
            generate_body([1] * 512),
            r"The decoder prompt \(length 512\) plus the number of requeste",
        ),
        (generate_body([1] * 600), "maximum context length is 512 tokens. However, your prompt"),
        (generate_body(max_tokens=0), "1 validation error"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(server: ScriptedServer, body: Any, message: str):
    status, reply = ask(server.address, GENERATE, body)
    assert status == 400
    assert reply["error"].keys() == {"message", "type", "param", "code"}
    assert reply["error"]["code"] == 400
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply["error"]["message"])


def test_another_content_type_is_refused(server: ScriptedServer):
    request = urllib.request.Request(server.address + GENERATE, data=b"{}")
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request)
    with refusal.value as reply:
        assert reply.code == 400
        assert b"Unsupported Media Type" in reply.read()


def test_tokens_per_s_gives_a_response_its_duration(scripted_server: Start):
    server = scripted_server(tokens_per_s=100)
    began = time.monotonic()
    generate(server, max_tokens=5)
    assert 0.05 <= time.monotonic() - began < 2


def test_a_client_that_leaves_aborts_its_request(scripted_server: Start):
    server = scripted_server(tokens_per_s=100)
    client = http.client.HTTPConnection(server.address.removeprefix("http://"))
    body = json.dumps(generate_body(max_tokens=400))
    client.request("POST", GENERATE, body, {"Content-Type": "application/json"})
    wait_until(lambda: metrics(server)["vllm:num_requests_running"] == 1)
    client.close()
    wait_until(lambda: metrics(server)["vllm:num_requests_running"] == 0)
    assert metrics(server)["vllm:generation_tokens_total"] < 400


def test_many_requests_at_once_are_all_answered(scripted_server: Start):
    server = scripted_server(tokens_per_s=200)

    async def ask_all() -> list[int]:
        async with aiohttp.ClientSession() as session:

            async def one(index: int) -> int:
                body = generate_body([index, *PROMPT])
                async with session.post(server.address + GENERATE, json=body) as reply:
                    return len((await reply.json())["choices"][0]["token_ids"])

            return await asyncio.gather(*map(one, range(64)))

    assert asyncio.run(ask_all()) == [4] * 64
    assert server.count(GENERATE) == 64
    assert metrics(server)["vllm:generation_tokens_total"] == 256


# --- Pausing --------------------------------------------------------------------------------------


def pause(server: ScriptedServer, mode: str, *, clear_cache: str = "true") -> None:
    answer = ask(server.address, f"/pause?mode={mode}&clear_cache={clear_cache}", b"")
    assert answer == (200, {"status": "paused"})


def resume(server: ScriptedServer) -> None:
    assert ask(server.address, "/resume", b"") == (200, {"status": "resumed"})


def is_paused(server: ScriptedServer) -> bool:
    status, answer = ask(server.address, "/is_paused")
    assert (status, set(answer)) == (200, {"is_paused"})
    return answer["is_paused"]


def test_pause_and_resume_show_in_is_paused(server: ScriptedServer):
    for mode in ("keep", "wait", "abort"):
        assert not is_paused(server)
        pause(server, mode)
        assert is_paused(server)
        resume(server)
    ask(server.address, "/pause", b"")
    assert is_paused(server)


@pytest.mark.parametrize("query", ["mode=freeze", "clear_cache=perhaps"])
def test_a_pause_that_vllm_does_not_know_is_refused(server: ScriptedServer, query: str):
    assert ask(server.address, f"/pause?{query}", b"")[0] == 400


def test_keep_freezes_running_requests_and_queues_new_ones(
    scripted_server: Start, start_generating: Any
):
    server = scripted_server(tokens_per_s=500)
    running = start_generating(server, max_tokens=150)
    wait_for_tokens(server, 3)
    pause(server, "keep")
    queued = start_generating(server, max_tokens=2)
    wait_until(lambda: metrics(server)["vllm:num_requests_waiting"] == 1)
    tokens_so_far = metrics(server)["vllm:generation_tokens_total"]
    time.sleep(0.02)
    assert metrics(server)["vllm:generation_tokens_total"] == tokens_so_far < 150
    assert not running.done() and not queued.done()
    resume(server)
    assert len(running.result()["token_ids"]) == 150
    assert len(queued.result()["token_ids"]) == 2


def test_wait_lets_running_requests_end(scripted_server: Start, start_generating: Any):
    server = scripted_server(tokens_per_s=500)
    running = start_generating(server, max_tokens=150)
    wait_until(lambda: metrics(server)["vllm:num_requests_running"] == 1)
    pause(server, "wait")
    assert running.result(1)["finish_reason"] == "length"


def test_abort_ends_running_requests_with_what_they_have(
    scripted_server: Start, start_generating: Any
):
    server = scripted_server(tokens_per_s=500)
    running = start_generating(server, max_tokens=400)
    wait_for_tokens(server, 3)
    pause(server, "abort")
    choice = running.result(1)
    length = len(choice["token_ids"])
    assert choice["finish_reason"] == "abort"
    assert 3 <= length < 400
    assert len(choice["logprobs"]["content"]) == length
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": length}]


def test_abort_ends_a_queued_request_without_a_token(server: ScriptedServer, start_generating: Any):
    pause(server, "keep")
    queued = start_generating(server)
    wait_until(lambda: metrics(server)["vllm:num_requests_waiting"] == 1)
    pause(server, "abort")
    choice = queued.result(1)
    assert (choice["token_ids"], choice["weight_versions"]) == ([], [])
    assert choice["finish_reason"] == "abort"


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_new_requests_are_refused_while_paused_in(mode: str, server: ScriptedServer):
    pause(server, mode)
    status, reply = ask(server.address, GENERATE, generate_body())
    assert (status, reply["error"]["type"]) == (503, "ServiceUnavailableError")
    resume(server)
    assert generate(server)


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_new_requests_queue_if_the_server_is_of_that_kind(
    mode: str, scripted_server: Start, start_generating: Any
):
    server = scripted_server(refuses_while_paused=False)
    pause(server, mode)
    queued = start_generating(server)
    wait_until(lambda: metrics(server)["vllm:num_requests_waiting"] == 1)
    resume(server)
    assert queued.result(1)["finish_reason"] == "length"


def test_the_cache_is_cleared_only_if_asked_for(server: ScriptedServer):
    hits: list[float] = []
    for clear_cache in ("false", "true"):
        generate(server, list(range(40)))
        pause(server, "keep", clear_cache=clear_cache)
        resume(server)
        generate(server, list(range(40)))
        hits.append(metrics(server)["vllm:prefix_cache_hits_total"])
    assert hits == [32, 64]  # the third is a hit as well, the fourth comes after the clearing


# --- Weights --------------------------------------------------------------------------------------


def weight_version(server: ScriptedServer) -> str:
    status, answer = ask(server.address, "/weight_info")
    assert (status, set(answer)) == (200, {"weight_version"})
    return answer["weight_version"]


def update(server: ScriptedServer, version: str) -> None:
    """A whole update, each step as vLLM answers it."""
    answers = [
        ask(server.address, "/init_weight_transfer_engine", {"init_info": {}}),
        ask(server.address, "/start_weight_update", b""),
        ask(server.address, "/update_weights", {"update_info": {"tensors": []}}),
        ask(server.address, "/finish_weight_update", {"weight_version": version}),
    ]
    assert answers == [
        (200, {"message": "Weight transfer initialized"}),
        (200, {"message": "Weight update started"}),
        (200, {"message": "Weights updated"}),
        (200, {"message": "Weight update finished"}),
    ]


def test_an_update_changes_the_version_when_it_is_finished(server: ScriptedServer):
    assert weight_version(server) == "default"
    update(server, "7")
    assert weight_version(server) == server.version == "7"
    assert generate(server)["weight_versions"] == [{"version": "7", "start": 0, "end": 4}]


def test_the_version_can_be_set_without_weights(server: ScriptedServer):
    answer = ask(server.address, "/update_weight_version", {"new_version": "9"})
    assert answer == (200, {"success": True, "new_version": "9"})
    assert weight_version(server) == "9"


def test_an_update_without_a_version_keeps_the_old_one(server: ScriptedServer):
    ask(server.address, "/start_weight_update", b"")
    assert ask(server.address, "/finish_weight_update", b"")[0] == 200
    assert weight_version(server) == "default"


def test_tokens_before_and_after_an_update_have_spans_of_their_own(
    scripted_server: Start, start_generating: Any
):
    server = scripted_server(tokens_per_s=500)
    running = start_generating(server, max_tokens=200)
    for version in ("1", "2"):
        wait_for_tokens(server, 3)
        pause(server, "keep")
        update(server, version)
        resume(server)
    spans = running.result(5)["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "1", "2"]
    assert [span["start"] for span in spans] == [0, spans[0]["end"], spans[1]["end"]]
    assert spans[2]["end"] == 200


def start_update(server: ScriptedServer) -> tuple[int, Any]:
    return ask(server.address, "/start_weight_update", b"")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/update_weights", {"update_info": {}}, "start_weight_update must be called before upd"),
        ("/finish_weight_update", {}, "finish_weight_update called without a matching start_we"),
    ],
)
def test_a_step_before_the_start_fails_with_500(
    server: ScriptedServer, path: str, body: Any, message: str
):
    status, answer = ask(server.address, path, body)
    assert (status, answer["error"]["type"]) == (500, "InternalServerError")
    assert message in answer["error"]["message"]


def test_an_open_update_is_in_the_way_until_it_is_finished_or_fails(server: ScriptedServer):
    assert start_update(server)[0] == 200
    status, answer = start_update(server)
    assert status == 500
    assert answer["error"]["message"] == (
        "Call to collective_rpc method failed: Worker failed with error 'start_weight_update "
        "called while a weight update is already active. Call finish_weight_update first.', "
        "please check the stack trace above for the root cause"
    )
    abandon = {"update_info": {"is_abandoned": True}}
    assert ask(server.address, "/update_weights", abandon)[0] == 500
    assert start_update(server)[0] == 200
    assert ask(server.address, "/finish_weight_update", {})[0] == 200
    assert start_update(server)[0] == 200


def test_weights_from_a_trainer_that_was_not_introduced_fail(server: ScriptedServer):
    start_update(server)
    assert ask(server.address, "/update_weights", {"update_info": {}})[0] == 500
    assert start_update(server)[0] == 200  # the failure has closed the update


@pytest.mark.parametrize(
    "path", ["/init_weight_transfer_engine", "/update_weights", "/update_weight_version"]
)
def test_a_missing_field_is_refused(server: ScriptedServer, path: str):
    assert ask(server.address, path, {})[0] == 400


# --- Token ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "guess"])
def test_every_path_but_health_asks_for_the_token(scripted_server: Start, token: str):
    server = scripted_server(token="secret")
    refusal = (401, {"error": "This server asks for a token."})
    assert ask(server.address, "/health", token=token)[0] == 200
    for path in ("/v1/models", "/metrics", "/is_paused", "/weight_info", "/version", "/nowhere"):
        assert ask(server.address, path, token=token) == refusal
        assert ask(server.address, path, token="secret") != refusal
    for path in (GENERATE, "/pause", "/resume", "/start_weight_update", "/update_weights"):
        assert ask(server.address, path, b"{}", token=token) == refusal
    assert not ask(server.address, "/is_paused", token="secret")[1]["is_paused"]


# --- Hanging and dying ----------------------------------------------------------------------------

ENGINE_ROUND_TRIPS = ("/is_paused", "/weight_info")


def answers(server: ScriptedServer, path: str) -> bool:
    """Whether an answer comes within a moment."""
    try:
        with urllib.request.urlopen(server.address + path, timeout=0.1) as reply:
            return reply.status == 200
    except TimeoutError:
        return False


def test_a_hung_server_is_healthy_but_its_engine_does_not_answer(server: ScriptedServer):
    server.hang()
    for path in ("/health", "/version", "/metrics", "/v1/models"):
        assert answers(server, path)
    for path in ENGINE_ROUND_TRIPS:
        assert not answers(server, path)
    server.unhang()
    for path in ENGINE_ROUND_TRIPS:
        assert answers(server, path)


def test_a_hung_server_generates_no_token_until_it_goes_on(
    scripted_server: Start, start_generating: Any
):
    server = scripted_server(tokens_per_s=500)
    running = start_generating(server, max_tokens=150)
    wait_for_tokens(server, 3)
    server.hang()
    late = start_generating(server, max_tokens=2)
    server.wait_for(GENERATE, 2)
    tokens_so_far = metrics(server)["vllm:generation_tokens_total"]
    time.sleep(0.02)
    assert metrics(server)["vllm:generation_tokens_total"] == tokens_so_far < 150
    server.unhang()
    assert len(running.result(5)["token_ids"]) == 150
    assert len(late.result(5)["token_ids"]) == 2


def test_a_dead_server_breaks_connections_and_refuses_new_ones(
    scripted_server: Start, start_generating: Any
):
    server = scripted_server(tokens_per_s=10)
    running = start_generating(server, max_tokens=400)
    wait_until(lambda: metrics(server)["vllm:num_requests_running"] == 1)
    server.die()
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        running.result(1)
    with pytest.raises(urllib.error.URLError, match="refused"):
        ask(server.address, "/health")
    assert server.version == ""


def test_a_server_that_restarts_has_its_address_and_the_weights_of_the_folder(
    server: ScriptedServer,
):
    address = server.address
    update(server, "3")
    pause(server, "keep")
    server.restart()
    assert server.address == address
    assert weight_version(server) == "default"
    assert not is_paused(server)
    assert metrics(server)["vllm:generation_tokens_total"] == 0
    start_update(server)
    assert ask(server.address, "/update_weights", {"update_info": {}})[0] == 500  # not introduced
    server.die()
    server.restart()
    assert generate(server)


def test_nobody_else_gets_the_port_of_a_dead_server(server: ScriptedServer):
    server.die()
    port = int(server.address.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_requests_are_remembered_over_the_lives_of_a_server(server: ScriptedServer):
    generate(server)
    server.restart()
    pause(server, "wait", clear_cache="false")
    assert server.count(GENERATE) == 1
    assert json.loads(server.bodies(GENERATE)[0]) == generate_body()
    last = server.received[-1]
    assert (last.method, last.path) == ("POST", "/pause")
    assert last.query == {"mode": "wait", "clear_cache": "false"}


def test_waiting_for_a_request_that_does_not_come_ends(server: ScriptedServer):
    with pytest.raises(DeadlineError, match=r"0 of 1 requests for /pause came .* 0.01 s"):
        server.wait_for("/pause", timeout_s=0.01)


def test_closing_leaves_no_thread_and_no_port_even_with_requests_in_it(start_generating: Any):
    before = threading.active_count()
    with ScriptedServer(tokens_per_s=10) as server:
        server.hang()
        running = start_generating(server, max_tokens=400)
        server.wait_for(GENERATE)
    server.close()
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        running.result(1)
    assert threading.active_count() <= before + 1  # the test's own thread
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", int(server.address.rpartition(":")[2])))


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (lambda prompt: "#### 24", "a script gives token ids, not '#'"),
        (lambda prompt: [1, 2, None], "a script gives token ids, not None"),
        (lambda prompt: {}["missing"], "The script raised KeyError: 'missing'"),
    ],
)
def test_a_mistake_in_the_script_is_told_to_who_asks(
    script: Callable[[list[int]], Any], complaint: str, capfd: pytest.CaptureFixture[str]
):
    with ScriptedServer(script) as server:
        body = {"token_ids": [1] * 8, "sampling_params": {"max_tokens": 4}}
        status, answer = ask(server.address, "/inference/v1/generate", body)
    assert status == 500
    assert complaint in answer["error"]["message"]
    assert "Traceback" in capfd.readouterr().err
