"""Rewards for programs: run in a sandbox on the tests of their row, many at the same time.

    text --last fenced block--> program
    row  --its fields---------> cases    stdin and stdout, calls of a function, or unit tests
    program x cases --sandbox, one process each--> how many pass

A row is told by its fields:

| fields | as in | a case is |
|---|---|---|
| `tests`, `official_tests` or `examples`: [{"input", "output"}] | Codeforces | stdin, stdout |
| `public_tests`, `private_tests`, `generated_tests`: {"input": [], "output": []} | CodeContests | same |
| `public_test_cases`, `private_test_cases`: [{"input", "output", "testtype"}], `metadata` with `func_name` | LiveCodeBench | same, or a call |
| `input_output`: {"inputs": [], "outputs": [], "fn_name"} | APPS, TACO, AReaL | same, or a call |
| `test_list`: ["assert ..."], `test_setup_code` or `test_imports` | MBPP | one assert |
| `test` with `check(candidate)`, `entry_point`, `prompt` | HumanEval | all of it |

Lists and objects may also be JSON in a string, as data sets on the Hub have them. Where several
outputs are right, a Codeforces row has a `generated_checker`: a program that is asked instead.
"""  # noqa: E501 - a table

import ast
import base64
import io
import json
import math
import pickle
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from arealite.errors import ConfigError, DataError
from arealite.rewards.sandbox import (
    TESTS_LACK_A_MODULE,
    SandboxLimits,
    SandboxResult,
    arun_python,
    num_workers,
    run_child,
    run_python,
)

if TYPE_CHECKING:  # arealite.types imports torch, which is nothing to wait for here
    from arealite.types import Row

TOLERANCE = 1e-6
"""Relative and absolute, of numbers with a decimal point or exponent."""
MIN_S = 0.05
"""For a program, however little time is left."""
TOTAL_S = 12.0
"""For all cases of a program together; less than the limit of a reward, 15 s."""

UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, zlib.error, pickle.PickleError)
"""What reading a field of another form raises."""

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing that a program has to get right."""

    mode: str  # "program", "calls" or "tests" of the sandbox
    expected: Any = None  # text of stdout, or a value
    stdin: str = ""
    function: str = ""
    arguments: tuple[Any, ...] = ()
    tests: tuple[str, ...] = ()
    is_wrapped: bool = False  # the expected value may stand in a list of its own
    checker: str = ""  # a program that reads input, expected output and output, and prints 1 or 0


@dataclass(frozen=True, kw_only=True)
class CodeReward:
    """A reward function: 1.0 for a program that passes all tests of its row, else 0.0.

    Args:
        limits: of each case.
        total_s: seconds for all cases of a program; those that are left then have failed. Give the
            workflow a larger `reward_timeout_s` when this is above 12.
        is_share: give the share of cases that pass instead, for which all have to run.
        max_cases: of a row with more of them, run so many, evenly spread; 0: all.
    """

    limits: SandboxLimits = SandboxLimits()
    total_s: float = TOTAL_S
    is_share: bool = False
    max_cases: int = 0

    def __post_init__(self) -> None:
        if self.max_cases < 0:
            raise ConfigError(f"CodeReward.max_cases={self.max_cases} must be 0 or more.")

    def __call__(self, text: str, row: "Row") -> float:
        cases = _spread(read_cases(row), self.max_cases)
        code = program_of(text)
        if code is None:
            return 0.0
        passed = sum(run_cases(_completed(code, row), cases, self))
        return passed / len(cases) if self.is_share else float(passed == len(cases))


code_reward = CodeReward()
code_pass_share = CodeReward(is_share=True)


async def python_tool(code: str) -> str:
    """Run a Python program and return what it prints.

    Args:
        code: A whole program. It has the standard library, no network and no files.
    """
    result = await arun_python(code)
    problem = "" if result.status == "ok" else f"[{result.status}]\n{_last_lines(result.stderr)}"
    return f"{result.stdout}{problem}" or "(it printed nothing)"


python_tool.timeout_s = None  # type: ignore[attr-defined] - a program has a limit, its queue none


def program_of(text: str) -> str | None:
    """The program in a response: its last block of Python, or the last one without a language.

    A text without any fence is a program as a whole.
    """
    text = text.replace("\r\n", "\n")
    blocks = _blocks(text)
    found = [code for language, code in blocks if language in _PYTHON]
    found = found or [code for language, code in blocks if not language]
    code = found[-1] if found else "" if blocks else text
    return code if code.strip() else None


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block; the last may be open."""
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif not fence[2] and fence[1].startswith(opening[1]):
            blocks.append((opening[2].lower(), text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening is not None:
        blocks.append((opening[2].lower(), text[opening.end() + 1 :]))
    return blocks


def run_cases(code: str, cases: list[Case], reward: CodeReward) -> list[bool]:
    """Which cases pass, as many at a time as there are cores.

    Unless a share is asked for, the first that fails is the last that begins.
    """
    until_s = time.monotonic() + reward.total_s
    failed = False

    def passes(case: Case) -> bool:
        nonlocal failed
        if time.monotonic() >= until_s or (failed and not reward.is_share):
            return False
        is_right = run_case(code, case, reward.limits, until_s)
        failed = failed or not is_right
        return is_right

    with ThreadPoolExecutor(min(len(cases), num_workers())) as pool:
        return list(pool.map(passes, cases))


def run_case(code: str, case: Case, limits: SandboxLimits, until_s: float = math.inf) -> bool:
    """Whether a program passes one case.

    Args:
        until_s: when all has to be over, on the clock of `time.monotonic`.

    Raises:
        DataError: the tests import what the sandbox does not have, so that no program passes.
    """
    mark = secrets.token_hex(16)
    secret = {
        "mark": mark,
        "function": case.function,
        "arguments": case.arguments,
        "tests": case.tests,
        "entry_point": case.function,
    }
    limits = _until(until_s, limits)
    if isinstance(case.expected, str):
        output_bytes = max(limits.output_bytes, 2 * len(case.expected.encode()))
        limits = replace(limits, output_bytes=output_bytes)
    result = run_child({"mode": case.mode, "code": code}, secret, stdin=case.stdin, limits=limits)
    if case.mode == "tests" and result.exit_code == TESTS_LACK_A_MODULE:
        raise DataError(f"Tests cannot run in the sandbox: {result.stderr[-200:]}")
    if result.status != "ok":
        return False
    if case.mode == "program":
        is_same = is_same_output(result.stdout, case.expected)
        return is_same or bool(case.checker and _is_accepted(result.stdout, case, limits, until_s))
    told = _behind(mark, result)
    return told is not None and (case.mode == "tests" or _is_value(told, case))


_CHECK = """
import sys
for name, text in {files!r}.items():
    with open(name, "w") as file:
        file.write(text)
sys.argv = ["checker.py", *{files!r}]
exec(compile({checker!r}, "checker.py", "exec"), {{"__name__": "__main__"}})
"""


def _is_accepted(said: str, case: Case, limits: SandboxLimits, until_s: float) -> bool:
    """Whether the checker of a row prints 1, and nothing else, for this output.

    Raises:
        DataError: it fails on the expected output as well, so that it would accept no program.
    """
    result = _checked(said, case, _until(until_s, limits))
    if result.status == "error":  # it cannot read this output, or it cannot run at all
        alone = _checked(case.expected, case, _until(until_s, limits))
        if alone.status == "error":
            problem = _last_lines(alone.stderr, 1)
            raise DataError(f"The generated_checker of a row fails in the sandbox: {problem}")
    return result.status == "ok" and result.stdout.strip() in ("1", "1.0", "True")


def _checked(said: str, case: Case, limits: SandboxLimits) -> SandboxResult:
    """How the checker of a row takes an output."""
    files = {
        "input.txt": case.stdin,
        "correct_output.txt": case.expected,
        "solution_output.txt": said,
    }
    return run_python(_CHECK.format(files=files, checker=case.checker), limits=limits)


def _until(until_s: float, limits: SandboxLimits) -> SandboxLimits:
    """The limits, within the time that is left."""
    left_s = max(MIN_S, until_s - time.monotonic())
    return replace(limits, timeout_s=min(limits.timeout_s, left_s))


def _is_value(told: str, case: Case) -> bool:
    """Whether this is what a call should return; a program may have told anything."""
    try:
        value = json.loads(told)
        return is_same_value(value, case.expected) or (
            case.is_wrapped and is_same_value(value, case.expected[0])
        )
    except (ValueError, OverflowError, RecursionError):
        return False


def _behind(mark: str, result: SandboxResult) -> str | None:
    """What the sandbox has told behind a mark of its own; None if it did not come so far."""
    last_line = result.stdout.rstrip("\n").rpartition("\n")[2]
    return last_line.removeprefix(mark) if last_line.startswith(mark) else None


# --- Comparing ------------------------------------------------------------------------------------


def is_same_output(said: str, expected: str) -> bool:
    """Whether two outputs are the same words, whatever white space is between them.

    Numbers with a decimal point or exponent may differ by `TOLERANCE`; whole ones may not.
    """
    words, right = said.split(), expected.split()
    return len(words) == len(right) and all(map(_is_same_word, words, right))


def _is_same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    try:
        numbers = float(word), float(expected)
    except (ValueError, OverflowError):
        return False
    is_rounded = any(sign in expected.lower() for sign in (".", "e"))
    return is_rounded and _is_close(*numbers)


def is_same_value(value: Any, expected: Any) -> bool:
    """Whether two values of JSON are the same, numbers with a fraction up to `TOLERANCE`."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        is_whole = isinstance(value, int) and isinstance(expected, int)
        return value == expected if is_whole else _is_close(float(value), float(expected))
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(is_same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            is_same_value(value[key], expected[key]) for key in value
        )
    return type(value) is type(expected) and value == expected


def _is_close(number: float, expected: float) -> bool:
    return math.isclose(number, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


# --- Reading rows ---------------------------------------------------------------------------------


def read_cases(row: "Row") -> list[Case]:
    """The cases of a row, at least one.

    Raises:
        DataError: it has no tests in a format that is known.
    """
    readers: dict[str, Callable[[Row], Iterator[Case]]] = {
        "tests": _listed,
        "official_tests": _listed,
        "public_test_cases": _live_code_bench,
        "private_test_cases": _live_code_bench,
        "public_tests": _code_contests,
        "private_tests": _code_contests,
        "input_output": _inputs_and_outputs,
        "test_list": _asserts,
        "test": _check,
        "examples": _listed,
        "generated_tests": _code_contests,
    }
    present = [name for name in readers if row.get(name)]
    try:
        cases = list(readers[present[0]](row)) if present else []
    except UNREADABLE as error:
        raise DataError(
            f"The field {present[0]!r} of a row is not as rewards.code knows it "
            f"({type(error).__name__}: {error}): {row[present[0]]!r:.200}"
        ) from error
    if not cases:
        raise DataError(
            f"A row has no tests for its program: it has {', '.join(row)}, and rewards.code reads "
            f"{', '.join(readers)}."
        )
    return cases


def _spread(cases: list[Case], count: int) -> list[Case]:
    """At most so many of the cases, the first among them; 0: all."""
    chosen = min(count, len(cases)) or len(cases)
    return [cases[index * len(cases) // chosen] for index in range(chosen)]


def _listed(row: "Row") -> Iterator[Case]:
    for name in ("tests", "official_tests", "examples"):
        for test in _json(row.get(name) or []):
            if test.get("testtype", "stdin") != "stdin":
                raise ValueError("calls of functions belong into public_test_cases")
            case = _stdin_case(test["input"], test["output"])
            yield replace(case, checker=row.get("generated_checker") or "")


def _code_contests(row: "Row") -> Iterator[Case]:
    for name in ("public_tests", "private_tests", "generated_tests"):
        tests = _json(row.get(name) or {"input": [], "output": []})
        if isinstance(tests, int):  # how many there are, in rows of Codeforces
            continue
        for given, expected in zip(tests["input"], tests["output"], strict=True):
            yield _stdin_case(given, expected)


def _live_code_bench(row: "Row") -> Iterator[Case]:
    function = _json(row.get("metadata") or {}).get("func_name") or ""
    for name in ("public_test_cases", "private_test_cases"):
        for test in _packed(row.get(name) or []):
            if test.get("testtype", "stdin") == "stdin":
                yield _stdin_case(test["input"], test["output"])
            else:
                arguments = [json.loads(line) for line in test["input"].splitlines() if line]
                yield _call_case(function, arguments, json.loads(test["output"]))


def _inputs_and_outputs(row: "Row") -> Iterator[Case]:
    told = _json(row["input_output"])
    function = told.get("fn_name") or ""
    for given, expected in zip(told["inputs"], told["outputs"], strict=True):
        if not function:
            yield _stdin_case(_text(given), _text(expected))
            continue
        # Many of these data sets put a result into a list of its own.
        case = _call_case(function, given, expected)
        yield replace(case, is_wrapped=isinstance(expected, list) and len(expected) == 1)


def _asserts(row: "Row") -> Iterator[Case]:
    imports = _json(row.get("test_imports") or [])
    setup = "\n".join([*imports, row.get("test_setup_code") or ""])
    for test in _json(row["test_list"]):
        yield Case(mode="tests", tests=(setup, test))


def _check(row: "Row") -> Iterator[Case]:
    if "def check(" not in row["test"]:
        raise ValueError("the test must define check(candidate)")
    function = row["entry_point"].removeprefix("Solution().")  # as LeetCode's rows have it
    yield Case(mode="tests", tests=(row["test"],), function=function)


def _stdin_case(given: str, expected: str) -> Case:
    if not isinstance(given, str) or not isinstance(expected, str):
        raise TypeError("input and output must be text")
    return Case(mode="program", stdin=given, expected=expected)


def _call_case(function: str, arguments: list[Any], expected: Any) -> Case:
    if not function:
        raise ValueError("a call needs the name of a function")
    return Case(mode="calls", function=function, arguments=tuple(arguments), expected=expected)


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _packed(value: Any) -> Any:
    """JSON, also as LiveCodeBench has its private cases: pickled, compressed, in base64."""
    try:
        return _json(value)
    except ValueError:
        content = zlib.decompress(base64.b64decode(value, validate=True))
        return _json(_NoObjects(io.BytesIO(content)).load())


class _NoObjects(pickle.Unpickler):
    """Loads plain values alone: anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"{module}.{name} is no plain value")


def _text(value: Any) -> str:
    """Lines may come as a list."""
    return "\n".join(map(str, value)) if isinstance(value, list) else value


def _completed(code: str, row: "Row") -> str:
    """The program behind the beginning that a row has for it, with its imports and helpers.

    If it begins anew, its own function is the one that counts, since it comes later.
    """
    beginning = row.get("prompt")
    if not isinstance(beginning, str) or not row.get("entry_point"):
        return code
    if code[:1] in (" ", "\t"):
        return f"{beginning}{code}"
    # A prompt may end in the head of a function, be whole by itself, or be no program at all.
    bodies = [f"{beginning}\n    pass\n", f"{beginning}\n", ""]
    return next(body for body in bodies if _is_program(body)) + code


def _is_program(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _last_lines(text: str, count: int = 3) -> str:
    return "\n".join(text.rstrip().splitlines()[-count:])
