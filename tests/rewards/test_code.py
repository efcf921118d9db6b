"""Programs are graded on the tests of their row, whatever the row's format, and cannot cheat."""

import asyncio
import base64
import json
import os
import pickle
import time
import zlib

import pytest

from arealite.errors import ConfigError, DataError, RewardError
from arealite.rewards.code import (
    CodeReward,
    code_pass_share,
    code_reward,
    is_same_output,
    is_same_value,
    program_of,
    python_tool,
    read_cases,
)
from arealite.rewards.pool import RewardPool
from arealite.rewards.sandbox import SandboxLimits
from arealite.rollout.tools import Tools
from arealite.types import Row

ADD = "a, b = map(int, input().split())\nprint(a + b)"
CODEFORCES: Row = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6", "output": "11"}]}


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


# A row of each format, with a program that is right and one that is wrong.
FORMATS: dict[str, tuple[Row, str, str]] = {
    "codeforces": (CODEFORCES, ADD, "print(3)"),
    "codeforces as json": ({"tests": json.dumps(CODEFORCES["tests"])}, ADD, "print(3)"),
    "codeforces examples": ({"examples": CODEFORCES["tests"]}, ADD, "print(3)"),
    "code contests": (
        {
            "public_tests": {"input": ["1 2"], "output": ["3"]},
            "private_tests": {"input": ["5 6", "0 0"], "output": ["11", "0"]},
            "generated_tests": {"input": [], "output": []},
        },
        ADD,
        "print(3)",
    ),
    "livecodebench stdin": (
        {
            "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
            "private_test_cases": [{"input": "5 6", "output": "11", "testtype": "stdin"}],
            "metadata": "{}",
        },
        ADD,
        "print(3)",
    ),
    "livecodebench functional": (
        {
            "public_test_cases": json.dumps(
                [{"input": "[1, 2, 3]\n2", "output": "[2, 3]", "testtype": "functional"}]
            ),
            "metadata": json.dumps({"func_name": "tail"}),
        },
        "class Solution:\n    def tail(self, x, n):\n        print('here')\n        return x[-n:]",
        "class Solution:\n    def tail(self, x, n):\n        return x[:n]",
    ),
    "apps stdin": (
        {"input_output": json.dumps({"inputs": ["1 2", ["5 6"]], "outputs": ["3", ["11"]]})},
        ADD,
        "print(3)",
    ),
    "apps call": (
        {"input_output": {"inputs": [[1, 2], [3, 4]], "outputs": [[3], 7], "fn_name": "add"}},
        "def add(a, b): return a + b",
        "def add(a, b): return a - b",
    ),
    "mbpp": (
        {
            "test_list": ["assert add(1, 2) == 3", "assert isclose(add(.1, .2), .3)"],
            "test_setup_code": "from math import isclose",
        },
        "def add(a, b): return a + b",
        "def add(a, b): return 3",
    ),
    "humaneval": (
        {
            "prompt": "def half(x: float) -> float:\n    '''Half of x.'''\n",
            "entry_point": "half",
            "test": (
                "def check(candidate):\n    assert candidate(3) == 1.5\n    try:\n"
                "        candidate('a')\n    except TypeError:\n        return\n    assert False"
            ),
        },
        "    return x / 2",
        "    return x // 2",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_right_program_passes_and_a_wrong_one_does_not(name: str):
    row, right, wrong = FORMATS[name]
    assert code_reward(block(right), row) == 1.0
    assert code_reward(block(wrong), row) == 0.0


def test_the_share_of_cases_that_pass():
    assert code_pass_share(block("print(3)"), CODEFORCES) == 0.5
    assert code_pass_share(block("syntax error"), CODEFORCES) == 0.0


MBPP: Row = {"test_list": ["assert f(2) == 4", "assert abs(f(3) - 9) < 1e-9"]}
CHEATS = {
    "ends early": "import sys\nsys.exit(0)",
    "ends in the call": "import os\ndef f(x): os._exit(0)",
    "equal to everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n"
        "    def __sub__(self, other): return 0\ndef f(x): return Any(1)"
    ),
    "changes builtins": (
        "import builtins\nbuiltins.abs = lambda x: 0\ndef abs(x): return 0\ndef f(x): return 4"
    ),
    "reads descriptors": (
        "import os\nfor d in range(3, 64):\n    try: print(os.read(d, 10**6))\n"
        "    except OSError: pass\ndef f(x): return 0"
    ),
    "looks for the tests": (
        "import gc, re, sys\ndef f(x):\n    wanted = re.compile('asser[t] f.2.')\n"
        "    frame, places = sys._getframe(), gc.get_objects()\n    while frame:\n"
        "        places += [frame.f_locals, frame.f_globals]\n        frame = frame.f_back\n"
        "    return x * x if any(wanted.search(repr(p)) for p in places) else 0"
    ),
    "prints into the answer": "import os\nos.write(1, b'\\n' + b'0' * 32)\ndef f(x): return 0",
    "answers nonsense": (
        "import os\n[os.write(d, b'x' * 99) for d in (4, 5, 6, 7)]\ndef f(x): return 4"
    ),
    "forks": "import os\nos.fork()\ndef f(x): return 0",
}


@pytest.mark.parametrize("name", CHEATS)
def test_no_program_passes_unit_tests_by_anything_but_right_answers(name: str):
    assert code_reward(block(CHEATS[name]), MBPP) == 0.0


HELPERS: Row = {
    "prompt": "from typing import List\n\ndef twice(x):\n    return 2 * x\n\n"
    "def f(x: List[int]) -> List[int]:\n    '''Twice each.'''\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate([1]) == [2]",
}


@pytest.mark.parametrize(
    "code",
    [
        "    return [twice(each) for each in x]",
        "def f(x: List[int]):\n    return [twice(each) for each in x]",
        "from typing import List\ndef f(x: List[int]):\n    return [2 * each for each in x]",
        "f = lambda x: (twice(each) for each in x)",
    ],
)
def test_a_program_may_use_what_its_prompt_has(code: str):
    assert code_reward(block(code), HELPERS) == 1.0


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Write a function f.",
        "# f\n",
        "from typing import List\n",
        "def f(x):\n",
        'def f(x):\n    """Add."""\n',
    ],
)
def test_a_program_is_graded_whatever_the_prompt_of_its_row_is(prompt: str):
    test = "def check(candidate):\n    assert candidate(1) == 41\n"
    for entry_point in ("f", "Solution().f"):
        row: Row = {"prompt": prompt, "entry_point": entry_point, "test": test}
        assert code_reward(block("def f(x):\n    return 40 + x"), row) == 1.0
        assert code_reward(block("def f(x):\n    return 41 + x"), row) == 0.0


def test_a_program_may_be_a_method_of_solution_as_on_leetcode():
    test = "def check(candidate):\n    assert candidate(x=1) == 41\n"
    row: Row = {"prompt": "import math", "entry_point": "Solution().f", "test": test}
    program = "class Solution:\n    def f(self, x):\n        return 40 + math.floor(x)"
    assert code_reward(block(program), row) == 1.0


def test_a_program_may_use_what_platforms_import_for_it():
    row, _, _ = FORMATS["livecodebench functional"]
    code = (
        "class Solution:\n    def tail(self, x: List[int], n: int): return list(deque(x, maxlen=n))"
    )
    assert code_reward(block(code), row) == 1.0
    assert code_reward(block(f"{ADD}\nexit()"), CODEFORCES) == 1.0


def test_private_cases_of_livecodebench_are_read_and_nothing_else_of_a_pickle():
    cases = json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(cases))).decode()
    row = {"private_test_cases": packed, "metadata": "{}"}
    assert code_reward(block(ADD), row) == 1.0
    packed = base64.b64encode(zlib.compress(pickle.dumps(os.getcwd))).decode()
    with pytest.raises(DataError, match="is no plain value"):
        read_cases({"private_test_cases": packed})


@pytest.mark.parametrize(
    "result", ["10**400", "[float('nan')]", "eval('[' * 50 + ']' * 50)", "'\\ud800'"]
)
def test_no_result_of_a_program_is_an_error_of_the_reward(result: str):
    row: Row = {"input_output": {"inputs": [[1]], "outputs": [1.5], "fn_name": "f"}}
    assert code_reward(block(f"def f(x): return {result}"), row) == 0.0
    spoilt = "import json\njson.dumps = lambda value: '[' * 10**5\ndef f(x): return 1"
    assert code_reward(block(spoilt), row) == 0.0


def test_a_result_may_stand_in_a_list_of_its_own_or_be_one():
    row: Row = {"input_output": {"inputs": [[5]], "outputs": [[5]], "fn_name": "f"}}
    assert code_reward(block("def f(x): return [x]"), row) == 1.0
    assert code_reward(block("def f(x): return x"), row) == 1.0


def test_output_may_be_as_long_as_is_right():
    row: Row = {"tests": [{"input": "", "output": "x" * 3_000_000}]}
    assert code_reward(block("print('x' * 3_000_000)"), row) == 1.0


def test_tests_that_no_program_can_pass_are_an_error():
    with pytest.raises(DataError, match="No module named 'numpy'"):
        code_reward(block("f = 1"), {"test_list": ["import numpy\nassert f"]})
    with pytest.raises(DataError, match=r"must define check\(candidate\)"):
        read_cases({"test": "import unittest", "entry_point": "f"})


def test_a_program_that_ends_early_fails_in_every_format():
    for row, _, _ in FORMATS.values():
        assert code_reward(block("import os; os._exit(0)"), row) == 0.0


def test_values_of_their_own_types_count_as_what_they_derive_from():
    code = "from collections import OrderedDict\ndef f(x): return OrderedDict(a=[x, (1, {2})])"
    assert code_reward(block(code), {"test_list": ["assert f(0) == {'a': [0, (1, {2})]}"]}) == 1.0


CHECKER = """
import sys
given, correct, said = (open(path).read().split() for path in sys.argv[1:])
print(int(sum(map(int, said)) == int(given[0]) and len(said) == len(correct)))
"""


@pytest.mark.parametrize(
    ("code", "reward"),
    [
        ("n = int(input())\nprint(1, n - 1)", 1.0),
        ("n = int(input())\nprint(n)\nprint(0)", 1.0),
        ("n = int(input())\nprint(n, 1)", 0.0),
        ("print('a', 'b')", 0.0),
        ("raise SystemExit(1)", 0.0),
    ],
)
def test_where_several_outputs_are_right_the_checker_of_a_row_says_which(code: str, reward: float):
    """Split a number into two."""
    tests = [{"input": "5\n", "output": "2 3"}, {"input": "4\n", "output": "2 2"}]
    row: Row = {"official_tests": tests, "generated_checker": CHECKER}
    assert code_reward(block(code), row) == reward
    assert code_reward(block(code), row | {"generated_checker": None}) == 0.0


TALKS = "import sys\nprint(0)\nprint('got', open(sys.argv[3]).read())"


def test_no_output_can_forge_what_a_checker_says():
    row: Row = {"tests": [{"input": "", "output": "2"}], "generated_checker": TALKS}
    assert code_reward(block("print('9 1')"), row) == 0.0


def test_what_is_expected_needs_no_checker():
    row: Row = {"tests": [{"input": "", "output": "2"}], "generated_checker": "print(0)"}
    assert code_reward(block("print(2)"), row) == 1.0


def test_a_checker_that_accepts_no_output_at_all_is_an_error():
    row: Row = {"tests": [{"input": "", "output": "2"}], "generated_checker": "import numpy"}
    with pytest.raises(DataError, match=r"generated_checker of a row .* No module named 'numpy'"):
        code_reward(block("print(3)"), row)


def test_a_checker_has_the_time_that_its_program_left():
    tests = [{"input": "", "output": "2"}] * 4
    row: Row = {"tests": tests, "generated_checker": "import time; time.sleep(60)"}
    reward = CodeReward(limits=SandboxLimits(timeout_s=1.0), total_s=1.5)
    began_s = time.monotonic()
    assert reward(block("import time; time.sleep(0.8); print(3)"), row) == 0.0
    assert time.monotonic() - began_s < 3.5


def test_a_count_in_the_place_of_generated_tests_is_not_read_as_them():
    """As open-r1/codeforces has it."""
    tests = {"official_tests": [], "generated_tests": 3}
    row: Row = tests | {"examples": [{"input": "", "output": "2"}]}
    assert code_reward(block("print(2)"), row) == 1.0


def test_a_negative_number_of_cases_is_refused():
    with pytest.raises(ConfigError, match=r"max_cases=-1 must be 0 or more"):
        CodeReward(max_cases=-1)


def test_of_many_cases_a_few_may_be_run():
    row: Row = {"tests": [{"input": "", "output": str(number)} for number in range(10)]}
    passing = {
        number: CodeReward(max_cases=4, is_share=True)(block(f"print({number})"), row)
        for number in range(10)
    }
    assert [number for number, share in passing.items() if share == 0.25] == [0, 2, 5, 7]
    assert CodeReward(max_cases=99, is_share=True)(block("print(9)"), row) == 0.1


def test_all_cases_together_have_a_limit():
    row = {"tests": [{"input": "", "output": "1"}] * 50}
    reward = CodeReward(limits=SandboxLimits(timeout_s=0.5), total_s=1.0, is_share=True)
    began_s = time.monotonic()
    assert reward(block("import time; time.sleep(0.4); print(1)"), row) < 0.5
    assert time.monotonic() - began_s < 5


def test_the_reward_runs_in_a_worker_of_the_pool():
    async def score() -> list[float]:
        with RewardPool(num_workers=1) as pool:
            return [
                await pool.score(code_reward, block(code), CODEFORCES) for code in (ADD, "print(3)")
            ]

    assert asyncio.run(score()) == [1.0, 0.0]


def test_a_row_without_tests_ends_in_an_error_that_names_its_fields():
    with pytest.raises(DataError, match=r"it has question, and rewards\.code reads tests"):
        read_cases({"question": "?"})
    with pytest.raises(DataError, match=r"field 'tests' .* \(KeyError: 'output'\)"):
        read_cases({"tests": [{"input": "1"}]})
    with pytest.raises(DataError, match="a call needs the name of a function"):
        read_cases({"public_test_cases": [{"input": "1", "output": "1", "testtype": "functional"}]})
    with pytest.raises(RewardError, match="DataError"), RewardPool(num_workers=1) as pool:
        asyncio.run(pool.score(code_reward, block(ADD), {"question": "?"}))


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("a\n```python\nx = 1\n```\nor\n```py\ny = 2\n```", "y = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("print(1)", "print(1)"),
        ("```python\n\n```", None),
        ("  ", None),
        ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nRun it:\n```bash\npython x.py\n```\nDone.", "x = 1\n"),
        ("```cpp\nint x;\n```\nand\n```Python\nx = 1\n```", "x = 1\n"),
        ("```cpp\nint x;\n```", None),
        ("```python\r\nx = 1\r\n```", "x = 1\n"),
        ("~~~python\nx = '```'\n~~~", "x = '```'\n"),
    ],
)
def test_the_program_is_the_last_block_or_all_of_the_text(text: str, program: str | None):
    assert program_of(text) == program


@pytest.mark.parametrize(
    ("said", "expected", "is_same"),
    [
        ("3 \n\n", "3", True),
        ("1\n2", "1\n2\n", True),
        ("1 2", "1\n2", True),
        ("1\n\n2", "1\n2", True),
        ("1 2", "1 2 3", False),
        ("0.3333333", "0.333333333", True),
        ("0.334", "0.333", False),
        ("1e-7", "0.0", True),
        ("3.0", "3", False),
        ("3", "3.0", True),
        ("12345678901234567890", "12345678901234567891", False),
        ("YES", "yes", False),
        ("", "1", False),
        ("nan", "1.0", False),
    ],
)
def test_outputs_are_compared_word_by_word(said: str, expected: str, is_same: bool):
    assert is_same_output(said, expected) is is_same


@pytest.mark.parametrize(
    ("value", "expected", "is_same"),
    [
        ([1, 2.0000000001], [1, 2], True),
        ([1, 2], [2, 1], False),
        ({"a": [1.5]}, {"a": [1.5]}, True),
        (True, 1, False),
        (1, True, False),
        (None, None, True),
        ("1", 1, False),
        (10**20, 10**20 + 1, False),
    ],
)
def test_values_are_compared_with_their_types(value: object, expected: object, is_same: bool):
    assert is_same_value(value, expected) is is_same


def test_the_tool_tells_what_a_program_prints_or_what_was_wrong():
    assert asyncio.run(python_tool("print(6 * 7)")) == "42\n"
    assert asyncio.run(python_tool("x = 1")) == "(it printed nothing)"
    told = asyncio.run(python_tool("print(1)\n1 / 0"))
    assert told.startswith("1\n[error]\n") and told.endswith("ZeroDivisionError: division by zero")
    assert Tools([python_tool]).schemas[0]["function"]["name"] == "python_tool"
