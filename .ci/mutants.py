"""Changes the code in every small way, one change at a time: does a test notice each?

    python .ci/mutants.py              # arealite/algo; five minutes on one core
    python .ci/mutants.py admission    # the state machine of rollouts

mutmut makes the changed versions, called mutants, and runs the tests that reach each. One that a
test notices is killed; so is one with which the tests come to no end, and are stopped in time.
Left out are texts of errors (do_not_mutate_patterns in pyproject.toml) and mutants that nobody can
tell from the code, each with its reason (equivalent_mutants.toml).

A run that was stopped, however hard, goes on where it was, unless code or tests are others now.
Prints what survived; the last line is JSON. Exit status 0 means that at least 90 % were killed.
"""

import argparse
import ast
import hashlib
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mutmut.__main__ import cli
from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import get_module_from_key, orig_function_and_class_names_from_key

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = ROOT / ".ci" / "equivalent_mutants.toml"
RESULTS = Path("mutants")  # Where mutmut keeps them, under the root.
STAMP = RESULTS / "begun-with"

LEAST_SHARE = 0.9
KILLED = ("killed", "timeout")
DECIDED = (*KILLED, "survived", "no tests")

OTHERS = {
    "admission": (
        ["arealite/rollout/admission.py"],
        ["tests/rollout/test_admission.py", "tests/rollout/test_admission_exhaustively.py"],
    )
}
"""Files to change and tests of what is not `algo`, which has them in pyproject.toml."""


@dataclass(frozen=True)
class Mutant:
    """One change of a function, and what came of it."""

    name: str  # mutmut's
    function: str  # algo.gae.gae
    change: str  # its lines as they read after it, in one; empty if killed
    status: str  # mutmut's word
    difference: str  # a diff; empty if killed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", nargs="?", default="algo", choices=["algo", *OTHERS])
    parser.add_argument("--max-children", type=int, default=1, help="mutants tested at a time")
    args = parser.parse_args()
    os.chdir(ROOT)
    # Each is tested in a fork of a process that has used torch: a fork has none of its threads.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if args.target in OTHERS:
        config().only_mutate, config().pytest_add_cli_args_test_selection = OTHERS[args.target]
    begin_or_go_on(digest(args.target))
    cli.main(["run", "--max-children", str(args.max_children)], standalone_mode=False)
    entries = tomllib.loads(EQUIVALENT.read_text())[args.target]
    return report(list(mutants()), {(e["function"], c) for e in entries for c in e["changes"]})


# --- A run that was stopped -----------------------------------------------------------------------


def digest(target: str) -> str:
    """Of all that a result depends on."""
    found = hashlib.sha256(f"{target} {version('mutmut')}".encode())
    code = sorted(path for folder in ("arealite", "tests") for path in Path(folder).rglob("*.py"))
    for path in [Path("pyproject.toml"), *code]:
        found.update(str(path).encode() + path.read_bytes())
    return found.hexdigest()


def begin_or_go_on(key: str) -> None:
    """Keep what an earlier run found with the same code, but nothing that it left half written."""
    if not STAMP.exists() or STAMP.read_text() != key:
        shutil.rmtree(RESULTS, ignore_errors=True)
        RESULTS.mkdir()
        STAMP.write_text(key)
    for path in walk_mutatable_files():
        mend(SourceFileMutationData(path=path))


def mend(results: SourceFileMutationData) -> None:
    """Have what is known of a file whole or not at all, and ask again what was not decided."""
    try:
        results.load()
    except ValueError:  # Killed while it was written.
        results.meta_path.unlink()
    if not results.meta_path.exists():
        # Changed already, but without results: mutmut would find no mutants in it.
        (RESULTS / results.path).unlink(missing_ok=True)
        return
    for name, exit_code in results.exit_code_by_key.items():
        if status_by_exit_code[exit_code] not in DECIDED:
            results.exit_code_by_key[name] = None
    results.save()


# --- What came of it ------------------------------------------------------------------------------


def mutants() -> Iterator[Mutant]:
    for path in sorted(walk_mutatable_files()):
        results = SourceFileMutationData(path=path)
        results.load()
        for name, exit_code in results.exit_code_by_key.items():
            status = status_by_exit_code[exit_code]
            function, owner = orig_function_and_class_names_from_key(name)
            difference = "" if status in KILLED else get_diff_for_mutant(name, path=path)
            yield Mutant(
                name=name,
                function=".".join(filter(None, (get_module_from_key(name), owner, function))),
                change=changed_lines(difference),
                status=status,
                difference=difference,
            )


def changed_lines(difference: str) -> str:
    """What a diff adds, in one line."""
    lines = difference.splitlines()[2:]  # Without the two of the files' names.
    return " ".join(line[1:].strip() for line in lines if line.startswith("+"))


def report(found: list[Mutant], equivalent: set[tuple[str, str]]) -> int:
    """Print what survived and the figures; the exit status.

    Args:
        equivalent: function and change of those that nobody can tell from the code.
    """
    num_open = sum(mutant.status == "not checked" for mutant in found)
    if num_open:
        print(f"Stopped with {num_open} of {len(found)} mutants to go. The same command goes on.")
        return 1
    left = [m for m in found if m.status not in KILLED]
    left_out = [m for m in left if (m.function, m.change) in equivalent]
    survived = [m for m in left if m not in left_out]
    for mutant in survived:
        print(f"\n{mutant.name}: {mutant.status}\n{mutant.difference}")
    stale = equivalent - {(m.function, m.change) for m in left_out}
    for function, change in sorted(stale):
        print(f"\n{EQUIVALENT.name} has what is killed, or is not there: {function}: {change}")
    num_mutants, num_killed = len(found) - len(left_out), len(found) - len(left)
    figures: dict[str, Any] = {
        "mutants": num_mutants,
        "killed": num_killed,
        "of_these_stopped_in_time": sum(mutant.status == "timeout" for mutant in found),
        "survived": len(survived),
        "left_out": len(left_out),
        "passed_over": passed_over(),
    }
    print("\n" + json.dumps(figures))
    return int(num_killed < LEAST_SHARE * num_mutants or bool(stale))


def passed_over() -> list[str]:
    """Functions that mutmut does not change since they are decorated."""
    return [
        f"{path}:{node.name}"
        for path in sorted(walk_mutatable_files())
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]


if __name__ == "__main__":
    sys.exit(main())
