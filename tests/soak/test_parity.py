"""Log-probs after a push: other model shapes, and without the repair that tied heads need."""

from pathlib import Path
from typing import Literal

import pytest

from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.testing import make_tiny_model
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


def test_the_agreement_is_lost_without_the_repair_of_tied_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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
    folder = make_tiny_model(tmp_path / "model", is_tied=True)
    with (
        serve(folder, ServerConfig(), log_dir=tmp_path) as servers,
        VLLMEngine(servers.addresses) as engine,
        pytest.raises(AssertionError),
    ):
        assert_agrees_after_each_of_three_pushes(engine, folder)


def test_weights_arrive_through_a_shared_folder(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model", is_tied=True)
    cfg = ServerConfig(weights_dir=str(tmp_path / "weights"))
    with serve(folder, cfg, log_dir=tmp_path) as servers, VLLMEngine(servers) as engine:
        assert_agrees_after_each_of_three_pushes(engine, folder)
