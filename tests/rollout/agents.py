"""The agent that README shows, and one that talks for longer."""

import re

from arealite.api import InferenceEngine
from arealite.rollout.workflows import ChatWorkflow
from arealite.types import Row, Trajectory


def calculate(expression: str) -> str:
    """Value of an arithmetic expression without names."""
    return str(eval(expression, {"__builtins__": {}}))


class CalculatorAgent(ChatWorkflow):
    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        chat = self.start(row["question"])
        for _ in range(4):
            chat.add_response(await engine.agenerate(chat.request(self.sampling)))
            call = re.search(r"<calc>(.+?)</calc>", chat.last_text)
            if call is None:
                break
            chat.add_message("user", f"<result>{calculate(call[1])}</result>")
        return await chat.finish(self.reward, row)


class TalkativeAgent(ChatWorkflow):
    """Three turns, whatever the model says."""

    async def arun_sample(self, engine: InferenceEngine, row: Row) -> Trajectory:
        chat = self.start(row["question"])
        chat.add_response(await engine.agenerate(chat.request(self.sampling)))
        for turn in range(2):
            chat.add_message("user", f"Are you sure? {turn}")
            chat.add_response(await engine.agenerate(chat.request(self.sampling)))
        return await chat.finish(self.reward, row)
