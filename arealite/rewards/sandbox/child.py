"""What `arealite.rewards.sandbox` starts to run a program in; it imports nothing of arealite.

    program   runs it
    calls     runs it, calls one of its functions, prints what that returned
    tests     runs tests that call its functions, in another process than the program:

              tests: this process <--plain values, through pipes--> program: its child

Expected results are nowhere where the program could find them: those of `program` and `calls` are
compared outside, and the tests are read after the program's process was forked. Values are sent by
marshal, which knows none but plain ones, so that nothing of the program's runs among the tests.
"""

from __future__ import annotations

import builtins
import marshal
import os
import sys
import types

from confine import confine

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would take longer to import than all else together
    from collections.abc import Callable
    from typing import IO, Any

PROGRAM = "program.py"
PRELUDE = """
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
import bisect, collections, functools, heapq, itertools, math, random, re, string, sys
"""
"""What programs that only define functions may rely on, as where such tasks come from."""
TESTS_LACK_A_MODULE = 98
"""Exit code when the tests import what the sandbox does not have."""
LENGTH_BYTES = 8
MAX_VALUE_BYTES = 64 * 2**20


def main(told: int, secret: int) -> None:
    """Do as one descriptor tells, with what may be read from the other."""
    settings = read(told)
    os.environ.clear()  # in a C locale, Python adds LC_CTYPE
    sys.argv, sys.excepthook = [PROGRAM], shown_by(settings["code"])
    match settings["mode"]:
        case "program":
            os.close(secret)
            confine(settings)
            run(settings["code"], "__main__")
        case "calls":
            call(settings, read(secret))
        case "tests":
            run_tests(settings, secret)


def run(code: str, name: str) -> dict[str, Any]:
    """Run a program as a module of this name; what it defines comes back."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    builtins.exit = builtins.quit = sys.exit  # which Python leaves out with its site-packages
    if name != "__main__":
        exec(PRELUDE, module.__dict__)
    exec(compile(code, PROGRAM, "exec"), module.__dict__)
    return module.__dict__


def shown_by(
    code: str,
) -> Callable[[type[BaseException], BaseException, types.TracebackType | None], None]:
    """Prints an exception of a program with its lines, and without those of this file."""

    def show(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        import linecache  # which most programs do not need, and take a while
        import traceback

        while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, "<string>"):
            trace = trace.tb_next
        linecache.cache[PROGRAM] = (len(code), None, code.splitlines(keepends=True), PROGRAM)
        traceback.print_exception(kind, error, trace)

    return show


def functions_of(names: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """What a program lets others call: its functions, and the methods of its `Solution`."""
    given: dict[str, Any] = {}
    exec(PRELUDE, given)
    found = {
        name: value
        for name, value in names.items()
        if callable(value) and given.get(name) is not value
    }
    if "Solution" in found:
        solution = found["Solution"]()
        methods = {name: getattr(solution, name) for name in dir(solution) if name[:1] != "_"}
        found = {name: method for name, method in methods.items() if callable(method)} | found
    return found


def call(settings: dict[str, Any], told: dict[str, Any]) -> None:
    """Print what a function of the program returns, behind a mark of our own."""
    import json

    confine(settings)
    function = functions_of(run(settings["code"], "program"))[told["function"]]
    value = json.dumps(function(*told["arguments"]))
    print(f"\n{told['mark']}{value}", flush=True)


# --- Tests and program, each in its process -------------------------------------------------------


def run_tests(settings: dict[str, Any], secret: int) -> None:
    """Print the mark if the tests pass."""
    calls, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        for descriptor in (secret, calls[1], answers[0]):
            os.close(descriptor)
        serve(settings, os.fdopen(calls[0], "rb"), os.fdopen(answers[1], "wb"))
        return
    os.close(calls[0])
    os.close(answers[1])
    told = read(secret)
    confine(settings)
    program = Program(os.fdopen(calls[1], "wb"), os.fdopen(answers[0], "rb"))
    # Not under names that tests rely on: a program must not decide what `abs` or `all` means there.
    named = [name for name in program.answer() if not hasattr(builtins, str(name))]
    names: dict[str, Any] = {name: program.function(name) for name in named}
    try:
        for source in told["tests"]:
            exec(compile(source, "tests.py", "exec"), names)
    except ImportError as error:
        sys.stderr.write(str(error))
        sys.exit(TESTS_LACK_A_MODULE)
    if told["entry_point"]:
        names["check"](names[told["entry_point"]])
    print(f"\n{told['mark']}", flush=True)


def serve(settings: dict[str, Any], calls: IO[bytes], answers: IO[bytes]) -> None:
    """Run the program, tell what can be called, and answer calls until the tests end."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    confine(settings)
    functions = functions_of(run(settings["code"], "program"))
    send(answers, list(functions))
    while True:
        name, arguments, keywords = receive(calls)
        try:
            answer = ("value", plain(functions[name](*arguments, **keywords)))
        except Exception as error:
            answer = ("raised", type(error).__name__, str(error))
        send(answers, answer)


class Program:
    """The program as the tests see it."""

    def __init__(self, calls: IO[bytes], answers: IO[bytes]) -> None:
        self._calls, self._answers = calls, answers

    def function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            send(self._calls, (name, arguments, keywords))
            match self.answer():
                case ("value", value):
                    return value
                case ("raised", kind, text):
                    raise exception_of(kind)(text)
                case other:
                    raise AssertionError(f"no answer: {other!r:.80}")

        return call

    def answer(self) -> Any:
        return receive(self._answers)


def exception_of(name: str) -> type[Exception]:
    kind = getattr(builtins, str(name), None)
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError


def plain(value: Any) -> Any:
    """The value of plain types alone, where its own derive from them."""
    match value:
        case bool() | None | str() | bytes() | complex():
            return value
        case int():
            return int(value)
        case float():
            return float(value)
        case dict():
            return {plain(key): plain(each) for key, each in value.items()}
        case range() | map() | filter() | zip() | types.GeneratorType():
            return list(map(plain, value))
        case list() | tuple() | set() | frozenset():
            kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
            return kind(map(plain, value))
    raise TypeError(f"a {type(value).__name__} is no plain value")


def send(stream: IO[bytes], value: Any) -> None:
    content = marshal.dumps(value)
    stream.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    length = int.from_bytes(stream.read(LENGTH_BYTES), "big")
    if not 0 < length <= MAX_VALUE_BYTES:
        sys.exit("the other process has ended")
    return marshal.loads(stream.read(length))


def read(descriptor: int) -> dict[str, Any]:
    with open(descriptor, "rb") as file:
        return marshal.load(file)
