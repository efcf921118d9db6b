"""Log-probs after a push: other model shapes, and without the repair that tied heads need."""

from pathlib import Path
from typing import Literal

import pytest

from arealite.data import load_tokenizer
from arealite.errors import GateError
from arealite.gates import GateConfig, LogprobGate
from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.testing import make_tiny_model
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.types import SamplingParams
from arealite.weights import push_weights
from tests.inference.parity import assert_agrees_after_each_of_three_pushes

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_server_and_trainer_agree_after_each_push(
    family: Literal["qwen3", "llama"], is_tied: bool, tmp_path: Path
):
    folder = make_tiny_model(tmp_path / "model", family=family, is_tied=is_tied)
    with (
        serve(folder, ServerConfig(), log_dir=tmp_path) as servers,
        VLLMEngine(servers.addresses) as engine,
    ):
        assert_agrees_after_each_of_three_pushes(engine, folder)


@pytest.fixture
def unrepaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that do not pack a tied head again after an update."""
    # Python imports sitecustomize in every process of the server, before vLLM loads the plug-in.
    (tmp_path / "sitecustomize.py").write_text(
        "import arealite.inference.vllm_plugin as plugin\n"
        "register = plugin.register\n"
        "def register_without_repair():\n"
        "    register()\n"
        "    import arealite.inference.vllm_worker as worker\n"
        "    worker.repack_heads = lambda model: None\n"
        "plugin.register = register_without_repair\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("unrepaired")
def test_the_agreement_is_lost_without_the_repair_of_tied_heads_and_the_gate_says_so(
    tmp_path: Path,
):
    folder = make_tiny_model(tmp_path / "model", is_tied=True)
    with (
        serve(folder, ServerConfig(), log_dir=tmp_path) as servers,
        VLLMEngine(servers.addresses) as engine,
    ):
        with pytest.raises(GateError, match="Cause: tied head not updated"):
            check_start(engine, folder, tmp_path)
        with pytest.raises(AssertionError):
            assert_agrees_after_each_of_three_pushes(engine, folder)


def test_a_server_that_reports_log_probs_before_temperature_is_named(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model", is_tied=True)
    cfg = ServerConfig(extra_args=("--logprobs-mode", "raw_logprobs"))
    with (
        serve(folder, cfg, log_dir=tmp_path) as servers,
        VLLMEngine(servers) as engine,
        pytest.raises(GateError, match="Cause: temperature ignored"),
    ):
        check_start(engine, folder, tmp_path)


def check_start(engine: VLLMEngine, folder: str, out_dir: Path) -> None:
    """What a recipe does before its first step, at temperature 0.7."""
    workflow = SingleTurnWorkflow(
        load_tokenizer(folder), lambda text, row: 0.0, SamplingParams(temperature=0.7)
    )
    rows = [{"question": f"What is {n} + {n}?"} for n in range(8)]
    with FSDPEngine(folder, FSDPConfig()) as trainer:
        push_weights(trainer, engine, version=0)
        gate = LogprobGate(
            trainer, engine, folder, GateConfig(start_prompts=8), max_tokens=4096, out_dir=out_dir
        )
        gate.check_start(workflow, rows)


def test_weights_arrive_through_a_shared_folder(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model", is_tied=True)
    cfg = ServerConfig(weights_dir=str(tmp_path / "weights"))
    with serve(folder, cfg, log_dir=tmp_path) as servers, VLLMEngine(servers) as engine:
        assert_agrees_after_each_of_three_pushes(engine, folder)
