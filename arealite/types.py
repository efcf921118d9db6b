"""The values that pass between the parts, in the order in which a prompt meets them.

G trajectories in a group, L tokens in a trajectory, T packed tokens in a micro-batch, N sequences.
Alignment, everywhere: index t holds facts about token t. Only training/logprobs.py shifts by one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

import torch

from arealite.errors import ConfigError, LossError

Row = dict[str, Any]
"""One row of a data set, untouched: whatever keys it came with."""

FinishReason = Literal["stop", "length", "context", "abort"]
"""stop: end token; length: its own budget; context: the model's limit; abort: cut off."""

OWN_METRICS = (
    *("reward", "raw_reward", "response_length", "response_length_max", "tokens"),
    *("truncated_share", "context_share", "staleness_mean", "staleness_max"),
    *("staleness_share", "oldest_token_share"),
)
"""Names that every run logs as `rollout/NAME`, so that no `Trajectory.metrics` may have them; nor
those that begin as the last two do, with a share per age."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy. The trainer applies the same one to its log-probs."""
    top_p: float = 1.0
    """Nucleus mass; below 1 the sampler leaves the policy's support and the ratios are biased."""
    max_new_tokens: int = 256
    """Budget of one response in tokens."""
    stop: tuple[str, ...] = ()
    """A response also ends behind the first of these texts, whose tokens are part of it."""
    ignore_eos: bool = False
    """Go on behind the end token until the budget is used up; for measurements."""

    def __post_init__(self) -> None:
        checks = {
            "temperature": (_is_finite(self.temperature) and self.temperature >= 0, "0 or more"),
            "top_p": (_is_finite(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            "max_new_tokens": (
                isinstance(self.max_new_tokens, Integral) and self.max_new_tokens >= 1,
                "a whole number, at least 1",
            ),
            "stop": (
                not isinstance(self.stop, str)
                and all(isinstance(text, str) and text for text in self.stop),
                "texts that are not empty, as a list",
            ),
        }
        for name, (is_right, rule) in checks.items():
            if not is_right:
                raise ConfigError(f"sampling.{name}={getattr(self, name)!r} must be {rule}.")

    def greedy(self) -> "SamplingParams":
        """The same budget, always the most likely token."""
        return replace(self, temperature=0.0, top_p=1.0)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """What a workflow asks of an `InferenceEngine`: token ids in, never text."""

    token_ids: list[int]  # [L] the whole context so far
    sampling: SamplingParams
    conversation: int | None = None  # its requests share a beginning, which a server keeps


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelResponse:
    """What was sampled, and with which weights.

    Example: three tokens, new weights after the second one:
        ModelResponse(token_ids=[5, 9, 2], behavior_logprobs=[-.1, -1.2, -.3],
                      versions=[7, 7, 8], finish_reason="stop")
    """

    token_ids: list[int]  # [L] sampled ids, the end token included
    behavior_logprobs: list[float]  # [L] at the sampling temperature
    versions: list[int]  # [L] version of the weights that sampled each token
    finish_reason: FinishReason
    request: ModelRequest | None = None  # that an engine answers with it


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One finished episode as a token ledger; `Transcript` builds it and keeps it aligned."""

    token_ids: list[int]  # [L] prompt, responses and everything in between
    loss_mask: list[bool]  # [L] True where the policy sampled the token
    behavior_logprobs: list[float]  # [L] 0.0 where loss_mask is False
    versions: list[int]  # [L] -1 where loss_mask is False
    reward: float
    temperature: float  # the tokens were sampled at this one
    finish_reason: FinishReason  # of the last response
    row_index: int = -1  # place of its row in the run's order; the executor sets it
    raw_reward: float | None = None  # before any shaping, such as a discount; None: as `reward`
    step_rewards: tuple[tuple[int, float], ...] = ()  # last token of a step, and the step's reward
    metrics: dict[str, float] = field(default_factory=dict)  # such as turns; see rollout_metrics
    sample: int = -1  # of its group; parts of one conversation share it. -1: no other has its own
    thread: int = -1  # of its sample; parts of one follow each other, others stand beside them
    earlier: "tuple[Trajectory, ...]" = ()  # of its conversation, before the history was rewritten

    @property
    def response_length(self) -> int:
        """Number of tokens the policy sampled."""
        return sum(self.loss_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class LostRow:
    """A row that was started and will not be trained on."""

    place: int  # in the run's order
    reason: str  # "rejected", "too old", or "failed: " and the error
    response_length: float | None = None  # mean of its group, if that had finished
    reward: float | None = None  # the same


def _absent() -> torch.Tensor:
    return torch.empty(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences laid end to end, without padding: what one forward pass sees.

    Example: two sequences of 3 and 2 tokens have cu_seqlens [0, 3, 5] and T = 5.
    """

    token_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [N + 1] int32, starts at 0 and ends at T
    loss_mask: torch.Tensor  # [T] bool, True where the policy sampled the token
    behavior_logprobs: torch.Tensor  # [T] float32, 0.0 where loss_mask is False
    versions: torch.Tensor  # [T] int64, -1 where loss_mask is False
    temperature: torch.Tensor  # [T] float32, the one each token was sampled at; 1.0 elsewhere
    advantages: torch.Tensor  # [T] float32, 0.0 where loss_mask is False
    loss_weight: torch.Tensor  # [T] float32, divided by the global count: a token mean sums to 1
    proximal_logprobs: torch.Tensor = field(default_factory=_absent)  # [T]; empty until attach()
    ref_logprobs: torch.Tensor = field(default_factory=_absent)  # [T]; empty until attach()
    old_values: torch.Tensor = field(default_factory=_absent)  # [T]; empty until attach()
    returns: torch.Tensor = field(default_factory=_absent)  # [T]; empty until attach()

    @property
    def num_sequences(self) -> int:
        """N; 0 for the empty micro-batch that keeps ranks in step."""
        return len(self.cu_seqlens) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """What a loss function returns for one micro-batch."""

    total: torch.Tensor  # [] (loss_weight * loss of each token).sum(), with gradient
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)  # [] sums over its tokens


LossFn = Callable[[torch.Tensor, MicroBatch], LossOutput]
"""Takes the current log-probs [T] with gradient, logits [T, V] or values [T], and their
micro-batch."""


def check_output(output: object) -> None:
    """Raise LossError for what a loss function may not return."""
    if not isinstance(output, LossOutput):
        raise LossError(
            f"The loss function returned a {type(output).__name__}. "
            "Return LossOutput(total=...), with the sum over the tokens as total."
        )
    for name, value in {"total": output.total, **output.metrics}.items():
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise LossError(
                f"{name} of LossOutput is no tensor of one number. Add up the tokens: .sum()"
            )


Head = Literal["logprobs", "logits", "values"]
"""What a loss function is given: the log-prob of each token, or the logits it was drawn from; of a
critic, what it expects before each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """One optimizer step, summed over all micro-batches and ranks."""

    loss: float
    grad_norm: float  # before clipping
    lr: float  # that this step used
    num_tokens: int  # trainable tokens, before any filter
    num_sequences: int
    skipped: bool  # the gradient was not finite, so the weights stayed as they were
    metrics: dict[str, float]  # each sum of LossOutput.metrics divided by num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where a run stands: enough to continue it with every row used exactly once."""

    version: int = 0  # completed training steps
    next_row: int = 0  # first place in the order that no rank has started
    pending: tuple[int, ...] = ()  # earlier places that were started but not consumed
