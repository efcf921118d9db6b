"""What import-linter cannot say: where in a file an import stands, and parts of other packages."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import arealite

PACKAGE = Path(arealite.__file__).parent

IMPORTS_VLLM_AT_THE_TOP = (
    "arealite.inference.vllm_plugin",
    "arealite.inference.vllm_worker",
    "arealite.inference.vllm_transport",
)
"""The first two live in vLLM's own processes; `server.transport` ipc and nccl import the third."""
USES_TORCH_DISTRIBUTED = (
    "arealite.dist",
    "arealite.training",
    "arealite.checkpoint",
    "arealite.check_loss.ranks",
)
"""Everybody else meets the other ranks through `arealite.dist`."""

IMPORT_ALL = """
import json, importlib, logging, os, pkgutil, sys
environment = dict(os.environ)
import arealite
for module in pkgutil.walk_packages(arealite.__path__, "arealite."):
    if not module.name.endswith((".vllm_worker", ".vllm_transport", ".sandbox.child")):
        importlib.import_module(module.name)
import torch.distributed
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "environment": sorted(k for k, v in os.environ.items() if environment.get(k) != v),
    "log_handlers": len(logging.getLogger().handlers),
    "process_group": torch.distributed.is_initialized(),
}))
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported_names(node: ast.AST) -> list[str]:
    """Full names that an import statement asks for; none for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported, also those under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offenders(source: str, module: str) -> list[str]:
    """What `source`, as the file of `module`, imports against the rules."""
    tree = ast.parse(source)
    everywhere = [name for node in ast.walk(tree) for name in imported_names(node)]
    at_the_top = [name for node in outside_functions(tree) for name in imported_names(node)]
    found = [n for n in everywhere if is_within(n, ("recipes", "tests", "benchmarks"))]
    if not is_within(module, IMPORTS_VLLM_AT_THE_TOP):
        found += [n for n in at_the_top if is_within(n, ("vllm",))]
    if not is_within(module, USES_TORCH_DISTRIBUTED):
        found += [n for n in everywhere if is_within(n, ("torch.distributed",))]
    return found


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import vllm", "arealite.weights", ["vllm"]),
        (
            "try:\n    from vllm import LLM\nexcept ImportError: ...",
            "arealite.weights",
            ["vllm.LLM"],
        ),
        ("def f():\n    import vllm", "arealite.inference.nccl", []),
        ("import vllm", "arealite.inference.vllm_worker", []),
        ("import torch.distributed as d", "arealite.data.rows", ["torch.distributed"]),
        ("from torch import distributed", "arealite.data.rows", ["torch.distributed"]),
        ("from torch.distributed import fsdp", "arealite.training.fsdp", []),
        ("def f():\n    from recipes import x", "arealite.dist", ["recipes.x"]),
        ("import vllm_other, torch", "arealite.types", []),
    ],
)
def test_rules_find_what_they_are_for(source: str, module: str, expected: list[str]):
    assert offenders(source, module) == expected


def test_every_module_keeps_to_the_rules():
    found = {
        module_name(path): offenders(path.read_text(), module_name(path))
        for path in PACKAGE.rglob("*.py")
    }
    assert {module: names for module, names in found.items() if names} == {}


def test_importing_all_modules_has_no_side_effect_and_loads_nothing_optional():
    answer = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True
    )
    seen = json.loads(answer.stdout)
    assert {"vllm", "wandb", "tensorboard", "ipykernel"}.isdisjoint(seen["modules"])
    # torch itself sets this one.
    assert set(seen["environment"]) <= {"TORCHINDUCTOR_CACHE_DIR"}
    assert seen["log_handlers"] == 0
    assert seen["process_group"] is False
