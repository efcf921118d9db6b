"""One row in the schema of each published data set, made up here, with a right and a wrong reply.

Schemas: GSM8K, github.com/openai/grade-school-math; MATH, github.com/hendrycks/math; MATH-500,
huggingface.co/datasets/HuggingFaceH4/MATH-500; DeepScaleR, its Preview-Dataset of agentica-org;
Open-Reasoner-Zero, data/orz_math_57k_collected.json; DAPO, BytedTsinghua-SIA/DAPO-Math-17k, and as
open-r1 has processed it; AReaL, check_math_metadata_entries in math_code_dataset.py of v0.3, and
PromptAnswerDataset in prompt_answer_dataset.py of v0.2;
ZebraLogic, WildEval/ZebraLogic; DeepCoder, its Preview-Dataset of agentica-org.
"""

import json
from dataclasses import dataclass
from typing import Any

from arealite.rewards.code import code_reward
from arealite.rewards.math import gsm8k_reward, math_reward
from arealite.rewards.pool import RewardFn
from arealite.rewards.zebra import zebra_reward


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row, and what should come of it."""

    row: Any
    question: str
    answer: object
    reward: RewardFn = math_reward
    right: str = r"So it is \boxed{12}."
    wrong: str = r"So it is \boxed{13}."


ASKED = "A pen costs 3 coins. How many coins do 4 pens cost?"
SOLUTION = r"Each of 4 pens costs 3 coins, so all cost $4 \cdot 3 = \boxed{12}$."
DAPO_QUESTION = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    f'{ASKED}\n\nRemember to put your answer on its own line after "Answer:".'
)
BOBA_QUESTION = (
    rf"{ASKED}" + "\nPlease reason step by step, and put your final answer in \\boxed{}."
)
BOBA_ROW = {
    "prompt": f"<｜User｜>{BOBA_QUESTION}<｜Assistant｜><think>\n",  # noqa: RUF001
    "task": "math",
    "query_id": "pens-1",
    "solutions": [r"\boxed{12}"],
}
SFT_ANSWER = "<think>\n4 times 3 is 12.\n</think>\n\n" + SOLUTION
PUZZLE = (
    "Two houses stand side by side. Ada and Bo live there; Bo is left. Ada drinks tea, Bo milk."
)
GRID_ROW = {
    "id": "grid-2x2-0",
    "size": "2*2",
    "puzzle": PUZZLE,
    "solution": {
        "header": ["House", "Name", "Drink"],
        "rows": [["1", "Bo", "milk"], ["2", "Ada", "tea"]],
    },
    "created_at": "2024-07-03T21:21:29",
}
HOUSES = {"House 1": {"Name": "Bo", "Drink": "milk"}, "House 2": {"Name": "Ada", "Drink": "tea"}}
GRID_QUESTION = f"""{PUZZLE}

End your answer with JSON of this form, in which each ___ is replaced by what is right:

{{
    "solution": {{
        "House 1": {{
            "Name": "___",
            "Drink": "___"
        }},
        "House 2": {{
            "Name": "___",
            "Drink": "___"
        }}
    }}
}}"""
CHOICES_ROW = {
    "id": "mc-2x2-0#1",
    "puzzle": PUZZLE,
    "question": "What does the person in House 1 drink?",
    "choices": ["tea", "milk"],
    "answer": "milk",
    "created_at": "2024-07-11T16:39:08",
}
CHOICES_QUESTION = f"""{PUZZLE}

What does the person in House 1 drink?

(A) tea
(B) milk

End your answer with your choice, in its own words, in \\boxed{{}}."""
CODE = "Read a whole number and print three times as much."

PUBLISHED = {
    "GSM8K": Published(
        row={"question": ASKED, "answer": "4 pens cost 4*3=<<4*3=12>>12 coins.\n#### 12"},
        question=ASKED,
        answer="4 pens cost 4*3=<<4*3=12>>12 coins.\n#### 12",
        reward=gsm8k_reward,
        right="4 * 3\n#### 12",
        wrong="4 + 3\n#### 7",
    ),
    "MATH": Published(
        row={"problem": ASKED, "level": "Level 1", "type": "Prealgebra", "solution": SOLUTION},
        question=ASKED,
        answer="12",
    ),
    "MATH-500": Published(
        row={
            "problem": ASKED,
            "solution": SOLUTION,
            "answer": "12",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "test/prealgebra/1.json",
        },
        question=ASKED,
        answer="12",
    ),
    "DeepScaleR": Published(
        row={"problem": ASKED, "answer": "12", "solution": "4 pens cost 12."},
        question=ASKED,
        answer="12",
    ),
    "Open-Reasoner-Zero": Published(
        row=[
            {"from": "human", "value": ASKED},
            {"from": "assistant", "ground_truth": {"value": "12"}},
        ],
        question=ASKED,
        answer="12",
    ),
    "Open-Reasoner-Zero, by datasets": Published(
        row={
            "0": {"from": "human", "ground_truth": None, "value": ASKED},
            "1": {"from": "assistant", "ground_truth": {"value": "12"}, "value": None},
        },
        question=ASKED,
        answer="12",
    ),
    "Open-Reasoner-Zero, eval_data": Published(
        row={
            "prompt": [{"from": "user", "value": ASKED}],
            "final_answer": "12",
            "file_name": "pens",
        },
        question=ASKED,
        answer="12",
    ),
    "DAPO": Published(
        row={
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": DAPO_QUESTION}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "12", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "0a1b2c3d-0000-4000-8000-00000000000c"},
        },
        question=DAPO_QUESTION,
        answer="12",
        right="Four times three.\n\nAnswer: 12",
        wrong="Four times three.\n\nAnswer: 13",
    ),
    "DAPO, by open-r1": Published(
        row={
            "prompt": ASKED,
            "solution": "12",
            "data_source": "math_dapo",
            "source_prompt": [{"role": "user", "content": DAPO_QUESTION}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "12", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "0a1b2c3d-0000-4000-8000-00000000000c"},
        },
        question=ASKED,
        answer="12",
    ),
    "AReaL-boba-106k": Published(row=BOBA_ROW, question=BOBA_QUESTION, answer=r"\boxed{12}"),
    "AReaL-boba-106k, several right": Published(
        row=BOBA_ROW | {"solutions": [r"\boxed{12}", r"\boxed{12\text{ coins}}", r"\boxed{a}"]},
        question=BOBA_QUESTION,
        answer=[r"\boxed{12}", r"\boxed{12\text{ coins}}", r"\boxed{a}"],
        right=r"\boxed{a}",
    ),
    "AReaL-boba-SFT-200": Published(
        row={
            "id": "pens-1",
            "prompt": BOBA_ROW["prompt"].removesuffix("<think>\n"),
            "answer": SFT_ANSWER,
        },
        question=BOBA_QUESTION,
        answer=SFT_ANSWER,
    ),
    "ZebraLogic, grid_mode": Published(
        row=GRID_ROW,
        question=GRID_QUESTION,
        answer=json.dumps(HOUSES),
        reward=zebra_reward,
        right=json.dumps({"solution": HOUSES}),
        wrong=json.dumps({"solution": HOUSES | {"House 2": {"Name": "Ada", "Drink": "milk"}}}),
    ),
    "ZebraLogic, mc_mode": Published(
        row=CHOICES_ROW,
        question=CHOICES_QUESTION,
        answer="milk",
        reward=zebra_reward,
        right=r"\boxed{milk}",
        wrong=r"\boxed{tea}",
    ),
    "AReaL-boba-2-RL-Code": Published(
        row={
            "task": "code",
            "query_id": "triple-1",
            "prompt": f"<｜User｜>{CODE}<｜Assistant｜><think>\n",  # noqa: RUF001
            "solutions": ["print(int(input()) * 3)"],
            "input_output": json.dumps({"inputs": ["4\n", "0\n"], "outputs": ["12\n", "0\n"]}),
            "language": "PYTHON",
        },
        question=CODE,
        answer=None,
        reward=code_reward,
        right="```python\nprint(int(input()) * 3)\n```",
        wrong="```python\nprint(int(input()) * 4)\n```",
    ),
    "DeepCoder": Published(
        row={
            "problem": CODE,
            "solutions": ["print(int(input()) * 3)"],
            "tests": json.dumps([{"type": "stdin_stdout", "input": "4\n", "output": "12\n"}]),
        },
        question=CODE,
        answer=None,
        reward=code_reward,
        right="```python\nprint(int(input()) * 3)\n```",
        wrong="```python\nprint(int(input()) * 4)\n```",
    ),
}
