"""The text of `--help`, taken from a config class and the strings below its fields."""

import ast
import functools
import inspect
import itertools
import operator
import sys
import textwrap
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from arealite.config_schema import Schema, branch, kind_text, value_text

WIDTH = 100


def help_text(schema: Schema) -> str:
    """What `--help` prints: the class, how to use it, and every knob by section."""
    tree: Any = OmegaConf.structured(schema.sections[""])
    off = {section for section in schema.optional if OmegaConf.select(tree, section) is None}
    for section in off:
        tree = OmegaConf.merge(tree, branch(section, {}))
    defaults: Any = OmegaConf.to_container(tree)
    blocks = [
        _class_doc(schema.sections[""]),
        f"Usage: {Path(sys.argv[0]).name} [--config FILE.yaml] [--explain] [key=value ...]\n"
        "Later ones win: defaults, files, arguments. --explain prints what follows from the knobs.",
    ]
    for section, section_class in schema.sections.items():
        docs = _field_docs(section_class)
        note = " Null by default; set one of its keys to turn it on." if section in off else ""
        about = " ".join(_class_doc(section_class).split())
        lines = [textwrap.fill(f"{section}: {about}{note}", WIDTH)] if section else []
        for key, kind in schema.knobs.items():
            owner, _, name = key.rpartition(".")
            if owner == section:
                default = functools.reduce(operator.getitem, key.split("."), defaults)
                lines.append(_knob_help(key, kind, default, docs.get(name, "")))
        blocks.append("\n".join(lines))
    return "\n\n".join(block for block in blocks if block)


def _knob_help(key: str, kind: object, default: object, doc: str) -> str:
    value = "(required)" if default == "???" else f"= {value_text(default)}".rstrip()
    head = f"{key}: {kind_text(kind)} {value}"
    lines = textwrap.wrap(head, WIDTH, initial_indent=" " * 2, subsequent_indent=" " * 4)
    lines += textwrap.wrap(doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _class_doc(config_class: type) -> str:
    """Its docstring; empty if there is only the signature that `dataclass` makes up."""
    doc = config_class.__dict__.get("__doc__") or ""
    return "" if doc.startswith(f"{config_class.__name__}(") else inspect.cleandoc(doc)


def _field_docs(config_class: type) -> dict[str, str]:
    """The string below each field, inherited ones included; empty where there is no source."""
    docs: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        try:
            source = inspect.getsource(owner)
            tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
        except (OSError, TypeError, SyntaxError):  # built-in, typed into an interpreter, ...
            continue
        body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
        for field, below in itertools.pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                    value=ast.Constant(value=str(doc))
                ):
                    docs[name] = " ".join(doc.split())
    return docs
