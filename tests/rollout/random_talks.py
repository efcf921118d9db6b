"""One random conversation with a transcript, or one random agent with an episode, judged."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from arealite.agents.episode import Episode
from arealite.agents.replies import Completion, whole
from arealite.agents.requests import RequestError, read_call
from arealite.rollout.chat_template import ChatTemplate
from arealite.rollout.tools import parse_answer
from arealite.rollout.transcript import Transcript
from arealite.types import ModelResponse, SamplingParams, Trajectory
from tests.rollout.conversations import (
    Dice,
    DiceEngine,
    Exchange,
    Message,
    Recorder,
    check_ledgers,
    check_prompt,
    continued,
    rendered,
    shown,
    squeezed,
)

SAMPLING = SamplingParams(temperature=0.75, max_new_tokens=64)
REFUSED_BY_ALTERNATION = "in turn"
TOO_LONG = "leaves no room in a context"
SHOWS_THOUGHTS = ("qwen3", "qwen3_without_thinking", "glm4_moe")
"""Templates that know `reasoning_content`."""


# A transcript.


def run_transcript(name: str, seed: str) -> Counter[str]:
    """Talk, judge, and count why ledgers were begun anew."""
    talk = _TranscriptTalk(Dice(name, f"transcript {seed}"))
    asyncio.run(talk.run())
    return Counter(talk.chat.forks)


class _TranscriptTalk:
    def __init__(self, dice: Dice) -> None:
        self.dice, self.engine = dice, Recorder(DiceEngine(dice))
        self.messages = dice.opening()  # as the template is given them
        self.tools = dice.schemas()
        self.is_read = dice.chance(0.5)  # answers are parsed, and not left as the text they are
        template = ChatTemplate(dice.tokenizer, tools=self.tools, kwargs=dict(dice.facts.keywords))
        self.chat = Transcript(template, self.messages)

    async def run(self) -> None:
        for _ in range(self.dice.numbers.randint(1, 5)):
            response = await self.engine.agenerate(self.chat.request(SAMPLING))
            self.check_prompt()
            answer = self.answer(response)
            self.follow(answer)
        trajectory = await self.chat.finish(0.5)
        check_ledgers([*trajectory.earlier, trajectory], self.engine.exchanges)
        assert trajectory.metrics["turns"] == len(self.engine.exchanges)

    def check_prompt(self) -> None:
        name, exchanges = self.dice.name, self.engine.exchanges
        exchange = exchanges[-1]
        check_prompt(name, exchange, exchanges, self.messages, self.tools, is_rendered=True)
        is_begun_anew = len(exchanges) > 1 and not continued(exchange, exchanges)
        assert not is_begun_anew or self.chat.forks or not exchanges[-2].answered
        if all(self.reads_as_written(message) for message in self.messages):
            text = squeezed(shown(name, exchange, exchanges))
            assert text == squeezed(rendered(name, self.messages, self.tools))

    def reads_as_written(self, message: Message) -> bool:
        """Whether it is no call, which the policy spells, and nothing that Qwen3 takes for one."""
        content = message["content"].strip()
        return "tool_calls" not in message and not content.startswith("<tool_response>")

    def answer(self, response: ModelResponse) -> Message:
        text = self.dice.tokenizer.decode(response.token_ids, skip_special_tokens=True)
        written: Message = {"role": "assistant", "content": text}
        if not self.is_read:
            self.chat.add_response(response)
            self.messages.append(written)
            return written
        read = parse_answer(
            text,
            self.dice.tokenizer,
            schemas=self.tools or (),
            prompt=self.chat.prompt_text,
            num_calls=len(self.engine.exchanges) * 10,
        )
        self.chat.add_response(response, read)
        knows_all = self.dice.name in SHOWS_THOUGHTS or "reasoning_content" not in read
        self.messages.append(read if knows_all else written)
        return self.messages[-1]

    def follow(self, answer: Message) -> None:
        """What is told, together or one after the other."""
        told = [self.dice.result(call) for call in answer.get("tool_calls", [])]
        if not told or not (self.dice.facts.must_alternate or self.dice.chance(0.8)):
            told += [self.dice.message("user")]
        if self.dice.chance(0.5):
            self.chat.add_messages(told)
        else:
            for message in told:
                self.chat.add_messages([message])
        self.messages += told


# An episode.


@dataclass(kw_only=True, slots=True)
class _Call:
    """What an agent has asked, and what it got."""

    messages: list[Message]
    tools: list[Message] | None
    is_told: bool  # no message of it was sampled
    answers: list[Message] = field(default_factory=list)


class Refused(Exception):
    """A call that was answered with an error of the API."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


Ask = Callable[[Message], Awaitable[Message]]
"""Sends a body to `/v1/chat/completions`, and returns what comes back."""


class InProcess:
    """The endpoint without HTTP."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode
        self._completions: dict[str, Completion] = {}

    async def ask(self, body: Message) -> Message:
        try:
            completion = await self._episode.complete(read_call(json.dumps(body).encode()))
        except RequestError as error:
            raise Refused(error.status, str(error)) from error
        self._completions[completion.id] = completion
        return json.loads(msgspec.json.encode(whole(completion)))

    def forget(self, completion_id: str) -> None:
        """As if the agent had gone away before the answer came."""
        self._episode.forget(self._completions[completion_id])


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a random agent."""

    trajectories: list[Trajectory]
    counts: Counter[str]


def make_episode(dice: Dice, engine: Any, sampling: SamplingParams = SAMPLING) -> Episode:
    kwargs = dict(dice.facts.keywords)
    return Episode(engine, dice.tokenizer, sampling, chat_template_kwargs=kwargs)


async def run_episode(name: str, seed: str) -> Outcome:
    """Let a random agent run in this process, against an engine that says what the dice say."""
    dice = Dice(name, f"episode {seed}")
    recorder = Recorder(DiceEngine(dice, failing=0.04))
    episode = make_episode(dice, recorder)
    process = InProcess(episode)
    agent = RandomAgent(dice, episode, recorder, process.ask, forget=process.forget)
    return await agent.run()


class RandomAgent:
    """Calls an episode in all the ways that agents do, and judges what comes of it."""

    def __init__(
        self,
        dice: Dice,
        episode: Episode,
        engine: Recorder,
        ask: Ask,
        *,
        forget: Callable[[str], None] | None = None,
    ) -> None:
        self.dice, self.episode, self.engine = dice, episode, engine
        self.ask, self.forget = ask, forget
        self.done: list[_Call] = []
        self.kept: list[Exchange] = []
        self.counts: Counter[str] = Counter()

    async def run(self) -> Outcome:
        for _ in range(self.dice.numbers.randint(1, 6)):
            calls = [self.next_call() for _ in range(self.dice.numbers.choice([1, 1, 1, 2, 3]))]
            for call, answer in await asyncio.gather(*map(self.make, calls)):
                if answer is not None:
                    self.take(call, answer)
        if not self.episode.has_answers:
            return Outcome(trajectories=[], counts=self.counts)
        trajectories = await self.episode.trajectories(0.5)
        check_ledgers(trajectories, self.kept)
        assert trajectories[-1].metrics["forks"] == len(trajectories) - 1
        assert trajectories[-1].metrics["turns"] == len(self.kept)
        self.counts["forks"] += len(trajectories) - 1
        return Outcome(trajectories=trajectories, counts=self.counts)

    def next_call(self) -> _Call:
        """A new conversation, or one of before: once more, with more, or with another past."""
        kinds = ["anew", "more", "more", "more", "again", "edit"] if self.done else ["anew"]
        kind = self.dice.numbers.choice(kinds)
        if kind == "anew":
            return _Call(messages=self.dice.opening(), tools=self.dice.schemas(), is_told=True)
        call = self.dice.numbers.choice(self.done[-3:])
        if kind == "again":
            return _Call(messages=call.messages, tools=call.tools, is_told=call.is_told)
        more = _Call(messages=self.continued(call), tools=call.tools, is_told=False)
        return self.edited(more) if kind == "edit" else more

    def continued(self, call: _Call) -> list[Message]:
        answer = dict(self.dice.numbers.choice(call.answers))
        told = [self.dice.result(call) for call in answer.get("tool_calls", [])]
        if not told or not (self.dice.facts.must_alternate or self.dice.chance(0.8)):
            told.append(self.dice.message("user"))
        if self.dice.chance(0.5):
            answer.pop("reasoning_content", None)
        return [*call.messages, answer, *told]

    def edited(self, call: _Call) -> _Call:
        if self.dice.chance(0.2):
            return _Call(messages=call.messages, tools=self.dice.schemas(), is_told=False)
        index = self.dice.numbers.randrange(len(call.messages))
        messages = [dict(message) for message in call.messages]
        messages[index]["content"] = self.dice.content(messages[index]["role"])
        return _Call(messages=messages, tools=call.tools, is_told=False)

    async def make(self, call: _Call) -> tuple[_Call, Message | None]:
        body = {
            "model": "any",
            "messages": [self.written(message) for message in call.messages],
            "tools": call.tools,
            "tool_choice": self.dice.numbers.choice([None, None, "auto", "none"]),
            "parallel_tool_calls": self.dice.numbers.choice([None, None, False]),
            "n": self.dice.numbers.choice([None, None, 1, 2, 3]),
            "stop": self.dice.numbers.choice([None, None, "3", ["make", "é"]]),
            "temperature": 2.0,
            "logprobs": True,
        }
        try:
            return call, await self.ask(body)
        except Refused as error:
            self.counts[f"refused with {error.status}"] += 1
            known = (REFUSED_BY_ALTERNATION, TOO_LONG)
            assert error.status == 500 or any(part in str(error) for part in known), error
            return call, None

    def written(self, message: Message) -> Message:
        """As a client may write it."""
        content: Any = message["content"]
        if content and self.dice.chance(0.2):
            content = [{"type": "text", "text": content}]
        return message | {"content": content or self.dice.numbers.choice(["", None])}

    def take(self, call: _Call, completion: Message) -> None:
        if self.forget is not None and self.dice.chance(0.05):
            self.forget(completion["id"])
            return
        for choice in completion["choices"]:
            message = choice["message"]
            call.answers.append(message | {"content": message.get("content") or ""})
            logprobs = tuple(each["logprob"] for each in choice["logprobs"]["content"])
            found = [each for each in self.engine.exchanges if each.logprobs == logprobs]
            exchange = next(each for each in found if all(each is not k for k in self.kept))
            self.kept.append(exchange)
            if len(found) == 1:  # empty answers are not to be told apart
                self.check_prompt(call, exchange)
        self.done.append(call)

    def check_prompt(self, call: _Call, exchange: Exchange) -> None:
        check_prompt(
            self.dice.name,
            exchange,
            self.engine.exchanges,
            call.messages,
            call.tools,
            is_rendered=call.is_told,
        )
