"""Programs that nobody has read run, and do no harm, with bubblewrap and without."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arealite.errors import ConfigError
from arealite.rewards import sandbox
from arealite.rewards.sandbox import (
    Protections,
    SandboxLimits,
    SandboxResult,
    arun_python,
    protections,
    run_python,
)

LIMITS = SandboxLimits(timeout_s=2.0, memory_bytes=256 * 2**20, output_bytes=10_000)
HAS_BUBBLEWRAP = protections().bubblewrap


@pytest.fixture(params=["bubblewrap", "plain"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A machine that has bubblewrap, or has not."""
    if request.param == "bubblewrap" and not HAS_BUBBLEWRAP:
        pytest.skip("bwrap is not installed, or may make no namespaces here")
    candidates = [m for m in sandbox._candidates() if m.bubblewrap == (request.param != "plain")]
    monkeypatch.setattr(sandbox, "_candidates", lambda: iter(candidates))
    protections.cache_clear()
    yield request.param
    protections.cache_clear()


def run(code: str, *, stdin: str = "") -> SandboxResult:
    return run_python(code, stdin=stdin, limits=LIMITS)


def test_a_program_reads_its_input_and_prints(machine: str):
    result = run("import math\nprint(int(input()) * 2, math.gcd(12, 18))", stdin="21\nmore")
    assert (result.status, result.stdout, result.stderr) == ("ok", "42 6\n", "")


def test_a_program_has_a_folder_of_its_own_that_is_gone_afterwards(machine: str, tmp_path: Path):
    before = set(Path(sandbox.tempfile.gettempdir()).glob("arealite-sandbox-*"))
    code = "open('a', 'w').write('b'); print(open('a').read()); import os; print(os.listdir('.'))"
    assert run(code).stdout == "b\n['a']\n"
    hostile = (
        "import os\nfor _ in range(2000): os.mkdir('d', 0o700); os.chdir('d')\nos.chmod('.', 0)"
    )
    run(hostile)
    assert set(Path(sandbox.tempfile.gettempdir()).glob("arealite-sandbox-*")) == before


def test_text_of_any_language_passes(machine: str):
    assert run("print(input()[::-1])", stdin="añ😀").stdout == "😀ña\n"


def test_threads_run(machine: str):
    code = "import threading as t\na = t.Thread(target=print, args=(1,)); a.start(); a.join()"
    assert run(code).stdout == "1\n"


def test_an_error_is_told_without_lines_of_ours(machine: str):
    result = run("def f():\n    return {}['key']\nf()")
    assert (result.status, result.exit_code) == ("error", 1)
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("KeyError: 'key'\n")
    assert 'File "program.py", line 2, in f\n    return {}[' in result.stderr
    assert "child.py" not in result.stderr


# What it does, and how it ends.
ATTACKS = {
    "infinite loop": ("while True: pass", "timeout"),
    "loop that swallows exceptions": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timeout",
    ),
    "loop at exit": ("import atexit\n@atexit.register\ndef f():\n    while True: pass", "timeout"),
    "loop in C": ("sum(range(10**12))", "timeout"),
    "huge power": ("10**10**8", "timeout"),
    "regular expression": ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", "timeout"),
    "sleep": ("import time; time.sleep(100)", "timeout"),
    "closed output": ("import os, time; os.close(1); os.close(2); time.sleep(100)", "timeout"),
    "ignored signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "timeout",
    ),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "error"),
    "fork bomb that goes on": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timeout",
    ),
    "another program": ("import subprocess; subprocess.run(['true'])", "error"),
    "exec": ("import os; os.execv('/bin/true', ['true'])", "error"),
    "8 GB": ("x = bytearray(8 * 2**30)", "memory"),
    "8 GB in pieces": ("x = []\nwhile True: x.append(bytearray(2**20))", "memory"),
    "threads without end": (
        "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=(99,)).start()",
        "timeout",  # Python waits for those that have started
    ),
    "1 GB of output": ("for _ in range(2**10): print('x' * 2**20)", "output"),
    "1 GB of errors": (
        "import sys\nfor _ in range(2**10): sys.stderr.write('x' * 2**20)",
        "output",
    ),
    "large file": ("f = open('f', 'wb')\nwhile True: f.write(bytes(2**20))", "error"),
    "os._exit": ("import os; os._exit(3)", "error"),
    "abort": ("import os; os.abort()", "killed"),
    "null pointer": ("import ctypes; ctypes.string_at(0)", "killed"),
    "deep recursion": ("def f(): f()\nf()", "error"),
}


@pytest.fixture
def secret_file() -> Iterator[Path]:
    """A file that everybody on this machine may read and write."""
    path = Path("/var/tmp" if os.access("/var/tmp", os.W_OK) else "/tmp") / f"secret-{os.getpid()}"
    path.write_text("secret")
    path.chmod(0o666)
    yield path
    path.unlink(missing_ok=True)


def test_no_file_but_its_own_can_be_read_or_written(machine: str, secret_file: Path):
    attempts = {
        "read": f"print(open({str(secret_file)!r}).read())",
        "write": f"open({str(secret_file)!r}, 'w').write('mine')",
        "create": f"open({str(secret_file) + '2'!r}, 'w').write('mine')",
        "delete": f"import os; os.remove({str(secret_file)!r})",
        "link": f"import os; os.symlink({str(secret_file)!r}, 'l'); print(open('l').read())",
        "hard link": f"import os; os.link({str(secret_file)!r}, 'h'); print(open('h').read())",
        "shared memory": "open('/dev/shm/mine', 'w').write('mine')",
        "list": "import os; print(os.listdir('/var/tmp'))",
        "users": "print(open('/etc/passwd').read())",
        "memory": "open('/proc/self/mem', 'r+b').seek(0)",
        "open to all": f"import os; os.chmod({str(secret_file)!r}, 0o777)",
        "cut": f"import os; os.truncate({str(secret_file)!r}, 0)",
        "date": f"import os; os.utime({str(secret_file)!r}, (0, 0))",
        "hidden memory": "import os; os.memfd_create('m')",
    }
    for name, code in attempts.items():
        result = run(code)
        assert (result.status, result.stdout) == ("error", ""), name
    assert secret_file.read_text() == "secret"
    assert not Path(f"{secret_file}2").exists() and not Path("/dev/shm/mine").exists()


def test_the_environment_is_empty_and_that_of_the_parent_is_hidden(
    machine: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AREALITE_TOKEN", "secret")
    assert run("import os; print(dict(os.environ))").stdout == "{}\n"
    look = (
        "import os\nfor pid in [*range(1, 50), os.getppid(), {pid}]:\n"
        "    try: print(open(f'/proc/{{pid}}/environ').read())\n    except OSError: pass"
    )
    assert "secret" not in run(look.format(pid=os.getpid())).stdout


def test_no_socket_can_be_opened(machine: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for kind in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"):
            result = run(f"import socket; socket.socket(socket.{kind})")
            assert "PermissionError" in result.stderr
        result = run(f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}', timeout=1)")
        assert result.status == "error"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_other_process_can_be_signalled_traced_or_limited(machine: str):
    attempts = {
        "kill the parent": "import os; os.kill(os.getppid(), 9)",
        "kill the group": "import os; os.killpg(0, 9)",
        "kill all": "import os; os.kill(-1, 9)",
        "kill us": f"import os; os.kill({os.getpid()}, 9)",
        "limit us": f"import resource as r; r.prlimit({os.getpid()}, r.RLIMIT_CPU, (1, 1))",
        "leave the group": "import os; os.setsid()",
        "signals of descriptors": (
            "import fcntl, os\nr, w = os.pipe()\n"
            "fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid()); fcntl.fcntl(r, 10, 9)\n"
            "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b'x')"
        ),
        "outlive the parent": "import ctypes\nif ctypes.CDLL(None).prctl(1, 0): 1 / 0",
        "trace": f"import ctypes, os\nif ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0): 1 / 0",
    }
    for name, code in attempts.items():
        assert run(code).status == "error", name


def test_limits_cannot_be_raised(machine: str):
    raise_it = (
        "import resource as r\nfor kind in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE):\n"
        "    try: r.setrlimit(kind, (r.RLIM_INFINITY, r.RLIM_INFINITY)); print('raised')\n"
        "    except (ValueError, OSError): pass"
    )
    assert run(raise_it).stdout == ""


@pytest.mark.fault(73, "22 programs that take too much or attack, beside 50 good ones")
def test_what_takes_too_much_is_ended_while_fifty_good_programs_pass(machine: str):
    good = SandboxLimits(timeout_s=60.0)
    with ThreadPoolExecutor(8) as attackers, ThreadPoolExecutor(2) as workers:
        attacks = {name: attackers.submit(run, code) for name, (code, _) in ATTACKS.items()}
        answers = list(
            workers.map(
                lambda n: run_python(f"print(sum(range({n})))", limits=good).stdout, range(50)
            )
        )
    assert answers == [f"{n * (n - 1) // 2}\n" for n in range(50)]
    ended = {name: attack.result() for name, attack in attacks.items()}
    assert {name: result.status for name, result in ended.items()} == {
        name: status for name, (_, status) in ATTACKS.items()
    }
    assert max(result.seconds for result in ended.values()) < LIMITS.timeout_s + 1
    said = max(len(text) for result in ended.values() for text in (result.stdout, result.stderr))
    assert said <= LIMITS.output_bytes


def test_an_event_loop_goes_on_beside_a_program():
    async def both() -> tuple[SandboxResult, int]:
        task = asyncio.ensure_future(arun_python("import time; time.sleep(0.2); print(1)"))
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return task.result(), turns

    result, turns = asyncio.run(both())
    assert result.stdout == "1\n" and turns > 10


def test_nothing_runs_on_after_a_program_has_ended():
    threads = threading.active_count()
    children = set(sandbox_children())
    run("while True: pass")
    assert set(sandbox_children()) == children
    assert threading.active_count() == threads


def sandbox_children() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "rewards/sandbox/child.py" in command:
            yield command


@pytest.mark.parametrize("field", ["timeout_s", "memory_bytes", "output_bytes", "file_bytes"])
def test_limits_are_above_zero(field: str):
    with pytest.raises(ConfigError, match=f"{field}=0 must be above 0"):
        SandboxLimits(**{field: 0})


def test_gaps_of_a_machine_are_named():
    bare = Protections(bubblewrap=False, seccomp=False, landlock=False, user=False)
    assert bare.gaps == [
        "open sockets",
        "start processes that outlive it",
        "signal processes of this user",
        "read and write files that this user may",
    ]
    assert Protections(bubblewrap=True, seccomp=False, landlock=False, user=False).gaps == []
    assert Protections(bubblewrap=False, seccomp=True, landlock=True, user=False).gaps == []


def test_what_is_promised_and_does_not_hold_is_an_error(monkeypatch: pytest.MonkeyPatch):
    broken = Protections(bubblewrap=False, seccomp=True, landlock=True, user=False)
    result = sandbox.run_child({"mode": "program", "code": "print(1)"}, {}, machine=broken)
    assert result.stdout == "1\n"
    monkeypatch.setattr(
        sandbox,
        "START",
        sandbox.START.replace(
            "child.main",
            "child.confine.__globals__.update(close_system_calls=lambda: False); child.main",
        ),
    )
    with pytest.raises(ConfigError, match="seccomp does not hold"):
        sandbox.run_child({"mode": "program", "code": "print(1)"}, {}, machine=broken)


def test_memory_is_limited_whichever_way_it_is_asked_for(machine: str):
    code = "import mmap\nm = mmap.mmap(-1, 2**30)"
    assert run(code).status in ("error", "memory")
