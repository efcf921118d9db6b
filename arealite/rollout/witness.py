"""What an engine sampled in one episode, so that nothing else is trained on.

workflow --> Witness --> engine
                └─ remembers each request with its response
trajectory: does every token it calls sampled stand where the engine has sampled it?
"""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from arealite.api import InferenceEngine
from arealite.types import ModelRequest, ModelResponse, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sampled:
    """One response, as it was when it came; a list that is changed afterwards changes nothing."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]  # [L] and so are the following
    behavior_logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    temperature: float
    taken: list[tuple[int, int]] = field(default_factory=list)  # places that are trained on

    def take(self, start: int, end: int) -> bool:
        """Train on these tokens; False if some of them are trained on already."""
        if any(start < taken_end and taken_start < end for taken_start, taken_end in self.taken):
            return False
        self.taken.append((start, end))
        return True

    @property
    def end(self) -> int:
        """Place behind the last token, in a trajectory that begins with the prompt."""
        return len(self.prompt) + len(self.token_ids)

    def explains(self, trajectory: Trajectory, place: int, end: int) -> bool:
        """Whether these tokens, up to the end of the response, are of it."""
        begin, end = len(self.prompt), min(end, self.end)
        if not begin <= place < end:
            return False
        mine = slice(place - begin, end - begin)
        return (
            trajectory.temperature == self.temperature
            and tuple(trajectory.token_ids[begin:end]) == self.token_ids[: end - begin]
            and tuple(trajectory.behavior_logprobs[place:end]) == self.behavior_logprobs[mine]
            and tuple(trajectory.versions[place:end]) == self.versions[mine]
            and tuple(trajectory.token_ids[:begin]) == self.prompt
        )


class Witness:
    """The engine of one episode: the same to a workflow, and it can tell what was sampled."""

    _engine: InferenceEngine
    _sampled: list[_Sampled]

    def __init__(self, engine: InferenceEngine) -> None:
        self.__dict__.update(_engine=engine, _sampled=[])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._engine, name, value)

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        prompt = tuple(request.token_ids)
        response = await self._engine.agenerate(request)
        self._sampled.append(
            _Sampled(
                prompt=prompt,
                token_ids=tuple(response.token_ids),
                behavior_logprobs=tuple(response.behavior_logprobs),
                versions=tuple(response.versions),
                temperature=request.sampling.temperature,
            )
        )
        return response

    def problem_with(self, trajectory: Trajectory) -> str:
        """Which token it calls sampled that is not, or that was in a trajectory before.

        Empty if there is none; its tokens then count as trained on.
        """
        for place, end in _runs(trajectory.loss_mask):
            while place < end:
                found = [s for s in self._sampled if s.explains(trajectory, place, end)]
                fresh = next((s for s in found if s.take(place, min(end, s.end))), None)
                if fresh is None:
                    why = "was trained on before" if found else "the engine did not sample it"
                    return (
                        f"token {place} (id {trajectory.token_ids[place]}) as sampled, but {why}, "
                        "with this log-prob, version and temperature, behind the tokens before it"
                    )
                place = fresh.end
        return ""


def _runs(mask: list[bool]) -> list[tuple[int, int]]:
    """Start and end of each stretch of tokens that are called sampled."""
    runs: list[tuple[int, int]] = []
    place = 0
    for is_sampled, stretch in groupby(mask):
        length = sum(1 for _ in stretch)
        if is_sampled:
            runs.append((place, place + length))
        place += length
    return runs
