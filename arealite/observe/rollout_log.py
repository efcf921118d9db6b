"""What was sampled: one line per trajectory that a training step consumed, and per row it lost.

Each rank writes the trajectories it owns: rank 0 `rollouts.jsonl`, rank 1 `rollouts.rank1.jsonl`,
and so on; `read_rollouts` reads them all. One line, for a two-token answer to a three-token prompt:

    {"version": 7, "row_index": 96, "token_ids": [4, 9, 3, 5, 2], "loss_mask": [0, 0, 0, 1, 1],
     "behavior_logprobs": [0.0, 0.0, 0.0, -0.10536, -1.20397], "versions": [-1, -1, -1, 6, 6],
     "reward": 1.0, "finish_reason": "stop", "temperature": 1.0, "text": "34<end>"}

An episode with more to tell also has `raw_reward`, `step_rewards` as pairs of a place in the list
of tokens and a reward, `metrics`, and `sample`, which the parts of one conversation share.
`version` is the training step that consumed it, counted as in metrics.jsonl. Rows whose episode
was rejected, failed or given up as too old are in `lost.jsonl`, `lost.rank1.jsonl`, ..., each with
its reason, so that every row of the order is either in a step or explained. A group that had
finished before it got too old also has its mean `response_length` and `reward`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from arealite import dist
from arealite.observe.json_lines import JsonLines, read_json_lines
from arealite.types import LostRow, Trajectory


class Decoder(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], /) -> Any: ...


class RolloutLine(msgspec.Struct, omit_defaults=True):
    """One trajectory as it is written; index t of each list holds facts about token t."""

    version: int
    row_index: int
    token_ids: list[int]
    loss_mask: list[int]
    behavior_logprobs: list[float]
    versions: list[int]
    reward: float
    finish_reason: str
    temperature: float
    text: str | None
    raw_reward: float | None = None
    step_rewards: tuple[tuple[int, float], ...] = ()
    metrics: dict[str, float] = {}
    sample: int = -1


class LostLine(msgspec.Struct, omit_defaults=True):
    """One row that was started and is not trained on."""

    version: int
    row_index: int
    reason: str
    response_length: float | None = None
    reward: float | None = None


class RolloutLog:
    """Appends trajectories to this rank's file; a disk error is reported once, never raised.

        log = RolloutLog(cfg.out_dir, tokenizer)
        log.write(version + 1, groups, rollouts.take_lost())

    About 15 bytes per token: 128 trajectories of 80 tokens make 0.2 MB a step.

    Args:
        out_dir: folder of the run; made if it is not there.
        tokenizer: decodes the sampled tokens into `text`, special tokens included.
    """

    def __init__(self, out_dir: str | Path, tokenizer: Decoder | None = None) -> None:
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self._tokenizer = tokenizer
        self._lines = JsonLines(self.out_dir / _file_name("rollouts", dist.rank()))
        self._lost_lines = JsonLines(self.out_dir / _file_name("lost", dist.rank()))
        self._is_resumed = False

    def resume(self, version: int) -> None:
        """Continue after `version` training steps: remove the trajectories of later ones.

        Without this call the first `write(version, ...)` does it as `resume(version - 1)`.
        """
        self._is_resumed = True
        self._lines.drop_from(version + 1)
        self._lost_lines.drop_from(version + 1)
        if dist.rank() == 0:  # a run that had more ranks left files that nobody else looks after
            for kind in ("rollouts", "lost"):
                for path in self.out_dir.glob(f"{kind}.rank*.jsonl"):
                    if path.name not in {_file_name(kind, rank) for rank in _ranks()}:
                        JsonLines(path).drop_from(version + 1)

    def write(
        self, version: int, groups: list[list[Trajectory]], lost: Sequence[LostRow] = ()
    ) -> None:
        """Append this rank's share of the batch that training step `version` consumed.

        Args:
            lost: rows given up since the step before, from `RolloutExecutor.take_lost`.
        """
        if not self._is_resumed:
            self.resume(version - 1)
        self._lines.append(
            [self._line(version, trajectory) for group in groups for trajectory in group]
        )
        if lost:
            self._lost_lines.append([_lost_line(version, row) for row in lost])

    def _line(self, version: int, trajectory: Trajectory) -> RolloutLine:
        return RolloutLine(
            version=version,
            row_index=trajectory.row_index,
            token_ids=trajectory.token_ids,
            loss_mask=list(map(int, trajectory.loss_mask)),
            behavior_logprobs=np.round(trajectory.behavior_logprobs, 5).tolist(),
            versions=trajectory.versions,
            reward=trajectory.reward,
            finish_reason=trajectory.finish_reason,
            temperature=trajectory.temperature,
            text=self._text(trajectory),
            raw_reward=trajectory.raw_reward,
            step_rewards=trajectory.step_rewards,
            metrics=trajectory.metrics,
            sample=trajectory.sample,
        )

    def _text(self, trajectory: Trajectory) -> str | None:
        if self._tokenizer is None:
            return None
        pairs = zip(trajectory.token_ids, trajectory.loss_mask, strict=True)
        return self._tokenizer.decode([token_id for token_id, is_sampled in pairs if is_sampled])


def read_rollouts(out_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of all ranks, rank by rank, each in the order of its steps; none if not logged."""
    return _read_all(out_dir, "rollouts")


def read_lost(out_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The rows that were rejected, failed or got too old, of all ranks; `reason` says which."""
    return _read_all(out_dir, "lost")


def _lost_line(version: int, row: LostRow) -> LostLine:
    return LostLine(
        version=version,
        row_index=row.place,
        reason=row.reason,
        response_length=row.response_length,
        reward=row.reward,
    )


def _read_all(out_dir: str | Path, kind: str) -> Iterator[dict[str, Any]]:
    paths = [path for path in Path(out_dir).glob(f"{kind}*.jsonl") if path.stat().st_size]
    for path in sorted(paths, key=lambda path: (len(path.name), path.name)):
        yield from read_json_lines(path)


def _file_name(kind: str, rank: int) -> str:
    return f"{kind}.jsonl" if rank == 0 else f"{kind}.rank{rank}.jsonl"


def _ranks() -> range:
    return range(dist.world_size())
