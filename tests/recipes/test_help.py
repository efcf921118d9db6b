"""`--help` of every recipe says what each knob is, and in which unit."""

import importlib
import pkgutil
import re
from typing import get_type_hints

import pytest

import recipes
from arealite.config import parse

MODULES = [
    importlib.import_module(f"recipes.{each.name}")
    for each in pkgutil.iter_modules(recipes.__path__)
]
WITH_KNOBS = [module for module in MODULES if hasattr(module, "Config")]

_KNOB = re.compile(r"^  ([\w.]+): (.+?)$((?:\n {4} *.+$)*)", re.MULTILINE)
_ENDINGS = {"_s": r"\bseconds\b", "_gib": r"\bGiB\b", "_bytes": r"\b[Bb]ytes\b"}
"""What a name ends in, and the unit that its text must name."""
_UNITS = (
    r"\b(?:tokens?|steps?|prompts?|rows?|pairs?|problems?|answers?|responses?|completions|sequences?"
    r"|servers?|gpus?|layers|cores?|threads|times|deaths|rank|turns?|samples|versions"
    r"|seconds|bytes?|gib|share|norm|nats?|reward|rewards|ratio|derive|rate|logits|mass|factor"
    r"|decay|lr|addend|discount|clip|cap|product|critic)\b"
)


def knobs(module: object, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """Kind and default of every knob, and its text."""
    with pytest.raises(SystemExit):
        parse(module.Config, ["--help"])  # type: ignore[attr-defined]
    found = _KNOB.findall(capsys.readouterr().out)
    return {key: (head, " ".join(text.split())) for key, head, text in found}


@pytest.mark.parametrize("module", WITH_KNOBS, ids=lambda module: module.__name__)
def test_every_knob_is_explained_with_its_unit(module: object, capsys: pytest.CaptureFixture[str]):
    found = knobs(module, capsys)
    assert {key for key in found if "." not in key} >= {
        name
        for name, kind in get_type_hints(module.Config).items()  # type: ignore[attr-defined]
        if kind in (int, float, str, bool)
    }
    for key, (head, text) in found.items():
        assert text.endswith(".") and len(text) > 10, key
        for ending, unit in _ENDINGS.items():
            assert not key.endswith(ending) or re.search(unit, text), (key, text)
        if head.startswith(("int", "float")):
            assert re.search(_UNITS, text, re.IGNORECASE), (key, text)
