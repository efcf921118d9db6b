"""The limits of a process, of a configuration, and of what a stranger may do."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arealite.errors import ConfigError
from arealite.inference.vllm import VLLMEngine
from arealite.testing import ScriptedServer
from tests.faults.training import VOCAB_SIZE
from tests.oracle import Oracle

Connect = Callable[..., VLLMEngine]
REPOSITORY = Path(__file__).parents[2]


# --- Settings -------------------------------------------------------------------------------------

WRONG_SETTINGS = {
    "rollout.max_stalenes=1": "The nearest is rollout.max_staleness",
    "steps=many": "not a whole number",
    "group_size=-8": "must be at least 2",
    "train.lr=nan": "not a finite number",
    "sampling.top_p=0": "must be above 0",
    "rollout.order=fastest": "fifo",
    "server.addresses=[localhost:8000]": "must begin with http://",
}


@pytest.mark.fault(57, "seven wrong settings at once, on the command line and in a file")
@pytest.mark.parametrize("is_file", [False, True])
def test_all_wrong_settings_are_refused_at_once(
    oracle: Oracle, start_recipe: Callable[..., None], tmp_path: Path, is_file: bool
):
    settings = list(WRONG_SETTINGS)
    if is_file:
        file = tmp_path / "run.yaml"
        file.write_text("\n".join(setting.replace("=", ": ", 1) for setting in settings[2:]))
        settings = [*settings[:2], "--config", str(file)]
    with pytest.raises(ConfigError) as refused:
        start_recipe(*settings)
    for setting, reason in WRONG_SETTINGS.items():
        key = setting.partition("=")[0]
        assert [line for line in str(refused.value).splitlines() if key in line and reason in line]


# --- File descriptors -----------------------------------------------------------------------------

FEW_FILES = """
import json, resource, sys, time
from dataclasses import replace
from arealite.errors import ArealiteError
from arealite.inference.vllm import VLLMEngine
from tests.faults.training import ROWS, asking
from tests.oracle import SMALL, Oracle

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
began_s, cpu_s = time.monotonic(), time.process_time()
try:
    with Oracle() as oracle, VLLMEngine([sys.argv[1]]) as engine:
        oracle.train(engine, asking(), ROWS, cfg=replace(SMALL, prompts_per_step=50))
except ArealiteError as error:
    used_s = time.process_time() - cpu_s
    print(json.dumps([str(error), time.monotonic() - began_s, used_s]))
"""


@pytest.mark.fault(60, "200 requests at once under `ulimit -n 64`")
def test_a_run_out_of_file_descriptors_ends_with_an_error_that_says_so(
    oracle: Oracle, scripted_server: Callable[..., ScriptedServer]
):
    server = scripted_server(vocab_size=VOCAB_SIZE, tokens_per_s=10)
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, server.address],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stderr)
    message, took_s, cpu_s = json.loads(done.stdout.splitlines()[-1])
    print(message, took_s, cpu_s)
    assert 0
