"""What a loss function makes of a batch, computed as the engine does: summed over all parts.

T packed tokens of the whole batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from arealite import dist
from arealite.check_loss.batches import Batch
from arealite.check_loss.ranks import run_on_ranks
from arealite.errors import LossError
from arealite.types import LossFn, check_output

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
"""Greatest norm of a difference over the norm, by the precision of the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Loss and gradient of a batch, summed over micro-batches and ranks."""

    loss: float
    gradient: torch.Tensor  # [T] float64, of each log-prob, in the order of the whole batch
    tolerance: float  # of the least precise of these losses

    @property
    def is_finite(self) -> bool:
        """Whether neither the loss nor any gradient is nan or infinite."""
        return math.isfinite(self.loss) and bool(self.gradient.isfinite().all())


def measure_one(loss_fn: LossFn, batch: Batch, sequences: list[int]) -> Outcome:
    """One micro-batch of these sequences, in this order."""
    places = batch.tokens(sequences)
    logprobs = batch.logprobs[places].requires_grad_()
    output = loss_fn(logprobs, batch.micro_batch(sequences))
    check_output(output)
    if output.total.requires_grad:
        output.total.backward()
    if logprobs.grad is None:
        raise LossError(
            f"The loss of a micro-batch with {len(places)} tokens, "
            f"{int(batch.mb.loss_mask[places].sum())} of them trainable, has no gradient, which "
            "the engine refuses. Compute LossOutput.total from the function's first argument."
        )
    gradient = torch.zeros(len(batch.logprobs), dtype=torch.float64)
    gradient.index_add_(0, places, logprobs.grad.double())
    return Outcome(
        loss=output.total.item(),
        gradient=gradient,
        tolerance=TOLERANCE.get(output.total.dtype, TOLERANCE[torch.float32]),
    )


def measure(loss_fn: LossFn, batch: Batch, micro_batches: list[list[int]]) -> Outcome:
    """What `FSDPEngine.step` adds up on one rank; it calls no loss for an empty micro-batch."""
    parts = [measure_one(loss_fn, batch, sequences) for sequences in micro_batches if sequences]
    return add(batch, parts)


def measure_on_ranks(loss_fn: LossFn, batch: Batch, plan: list[list[list[int]]]) -> Outcome:
    """The same with the micro-batches of rank 0, 1, ..."""
    return add(batch, run_on_ranks(len(plan), lambda: measure(loss_fn, batch, plan[dist.rank()])))


def add(batch: Batch, parts: list[Outcome]) -> Outcome:
    """The sum of losses and gradients of parts of the batch."""
    nothing = torch.zeros(len(batch.logprobs), dtype=torch.float64)
    return Outcome(
        loss=sum(part.loss for part in parts),
        gradient=sum((part.gradient for part in parts), nothing),
        tolerance=max((part.tolerance for part in parts), default=0.0),
    )


Kind = Literal["repeat", "split", "order", "masked", "empty", "read", "huge", "touch", "ranks"]
"""masked: fully masked sequences join; read, huge, touch: values and gradient at masked tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What became of loss and gradient when one thing was done differently."""

    kind: Kind
    what: str  # such as "with 4 micro-batches instead of 1"
    expected: Outcome
    found: Outcome

    @property
    def loss(self) -> float:
        """Difference over the loss, or over what it would change by if each log-prob moved by 1.

        Over the greater of them: a loss of positive and negative terms may cancel to almost 0.
        """
        size = max(abs(self.expected.loss), float(self.expected.gradient.abs().sum()))
        return _share(abs(self.found.loss - self.expected.loss), size)

    @property
    def gradient(self) -> float:
        """Norm of the difference over the norm."""
        return gradient_change(self.found.gradient, self.expected.gradient)

    @property
    def factor(self) -> float:
        """The multiple of the expected gradient that is nearest to the one found."""
        square = float(self.expected.gradient.square().sum())
        return _share(float(self.found.gradient @ self.expected.gradient), square)

    @property
    def is_rounding(self) -> bool:
        """Whether loss and gradient are those expected."""
        tolerance = max(self.found.tolerance, self.expected.tolerance)
        return self.loss <= tolerance and self.gradient <= tolerance  # both False for nan

    def __str__(self) -> str:
        before, after = f"{self.expected.loss:.4g}", f"{self.found.loss:.4g}"
        if before == after:
            before, after = f"{self.expected.loss:.12g}", f"{self.found.loss:.12g}"
        has_stayed = self.loss <= self.found.tolerance
        loss = f"loss {before} {'stayed' if has_stayed else f'became {after}'}"
        return f"{self.what}, {loss} and the gradient {self._gradient_in_words()}"

    def _gradient_in_words(self) -> str:
        if not self.found.gradient.isfinite().all():
            return "is not finite"
        if self.gradient <= self.found.tolerance:
            return "stayed"
        if gradient_change(self.found.gradient, self.factor * self.expected.gradient) < 1e-6:
            return f"changed by the factor {self.factor:.4g}"
        return f"changed by {100 * self.gradient:.3g} % of its norm"


def gradient_change(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm; 0 if both are 0."""
    return _share(float((found - expected).norm()), float(expected.norm()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0 else math.inf)
