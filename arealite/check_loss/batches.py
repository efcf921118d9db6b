"""Random batches that look like those of training, to be cut into micro-batches in every way.

N sequences, T packed tokens.
"""

import random
from dataclasses import dataclass, fields, replace

import torch

from arealite.algo.advantages import group_advantages
from arealite.training.packing import Aggregation, attach, deal, pack, select, tokens_of
from arealite.types import MicroBatch, Trajectory

GROUP_SIZES = (4, 1, 3, 2, 4)
LONGEST = 64
# exp of it is inf, in float64 too; its square is harmless.
HUGE = 2_000.0
HIGHEST = -1e-3  # log-probs are negative, and a loss may rely on it


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One minibatch of all ranks, whole, and the log-probs a policy has for it."""

    mb: MicroBatch  # all N sequences
    logprobs: torch.Tensor  # [T] of the current policy, without gradient
    seed: int
    aggregation: Aggregation

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return self.mb.cu_seqlens.diff().tolist()

    def tokens(self, sequences: list[int]) -> torch.Tensor:
        """Places in [T] of the tokens of these sequences, one sequence after the other."""
        return tokens_of(self.mb, sequences)

    def micro_batch(self, sequences: list[int]) -> MicroBatch:
        """A new micro-batch of these sequences, in this order; one may come twice."""
        return select(self.mb, sequences)

    def trainable(self) -> list[int]:
        """Sequences with at least one trainable token."""
        return [i for i in range(len(self.lengths)) if self.num_trainable(i)]

    def fully_masked(self) -> list[int]:
        """All other sequences."""
        return [i for i in range(len(self.lengths)) if not self.num_trainable(i)]

    def num_trainable(self, sequence: int) -> int:
        """Trainable tokens of one sequence."""
        return int(self.mb.loss_mask[self.tokens([sequence])].sum())

    def with_noise(self, where: torch.Tensor) -> "Batch":
        """Other log-probs where the mask [T] says so, and other versions and advantages too."""
        generator = torch.Generator().manual_seed(self.seed)
        trainable = where & self.mb.loss_mask

        def noise() -> torch.Tensor:
            return _normal(len(where), generator).to(self.logprobs.dtype)

        def moved(logprobs: torch.Tensor) -> torch.Tensor:
            return torch.where(where, (logprobs + noise()).clamp(max=HIGHEST), logprobs)

        changed = replace(
            self.mb,
            behavior_logprobs=moved(self.mb.behavior_logprobs),
            proximal_logprobs=moved(self.mb.proximal_logprobs),
            ref_logprobs=moved(self.mb.ref_logprobs),
            advantages=self.mb.advantages + noise() * trainable,
            temperature=self.mb.temperature + 0.1 * trainable,
            versions=self.mb.versions + 3 * trainable,
        )
        return replace(self, mb=changed, logprobs=moved(self.logprobs))

    def with_huge_masked(self) -> "Batch":
        """Masked tokens whose log-probs differ so much, each from each, that exp overflows."""
        mask = self.mb.loss_mask

        def filled(values: torch.Tensor, bit: int) -> torch.Tensor:
            is_huge = (torch.arange(len(values)) >> bit) % 2 == 1
            return torch.where(mask, values, torch.where(is_huge, -HUGE, -1.0).to(values.dtype))

        changed = replace(
            self.mb,
            behavior_logprobs=filled(self.mb.behavior_logprobs, 0),
            proximal_logprobs=filled(self.mb.proximal_logprobs, 1),
            ref_logprobs=filled(self.mb.ref_logprobs, 2),
        )
        return replace(self, mb=changed, logprobs=filled(self.logprobs, 3))


def make_batch(seed: int, aggregation: Aggregation, dtype: torch.dtype) -> Batch:
    """Ragged groups of one or two turns, packed by `pack`. Must run where there is one rank.

    The greater the seed, the further current, proximal, behavior and reference policy are apart.
    """
    rng = random.Random(seed)
    groups = [
        [_trajectory(rng, row, is_masked=False) for _ in range(size)]
        for row, size in enumerate(GROUP_SIZES)
    ]
    groups[2].append(_trajectory(rng, 2, is_masked=True))
    groups.append([_trajectory(rng, len(groups), is_masked=True)])
    [[mb]] = pack(
        groups,
        _advantages(groups, rng, seed),
        num_minibatches=1,
        max_tokens=LONGEST * sum(len(group) for group in groups),
        aggregation=aggregation,
        max_length=LONGEST,
    )
    generator = torch.Generator().manual_seed(seed)

    def apart(values: torch.Tensor, gap: float) -> torch.Tensor:
        return (values + gap * _normal(len(values), generator)).clamp(max=HIGHEST)

    behavior = torch.where(mb.loss_mask, mb.behavior_logprobs, -3.0)
    proximal = apart(behavior, (0.05, 0.3, 1.5)[seed % 3])
    [mb] = attach([mb], proximal_logprobs=[proximal], ref_logprobs=[apart(proximal, 0.5)])
    # 0: the first optimizer step of a batch, where current and proximal are the same.
    current = apart(proximal, (0.0, 0.3, 1.5)[seed % 3])
    return Batch(
        mb=_cast(mb, dtype), logprobs=current.to(dtype), seed=seed, aggregation=aggregation
    )


def rank_plan(batch: Batch, *, num_ranks: int, is_fine: bool) -> list[list[list[int]]]:
    """Per rank, its micro-batches of trainable sequences as `pack` deals them out.

    Args:
        is_fine: several micro-batches per rank, and perhaps empty ones; else one each.
    """
    sequences = batch.trainable()
    lengths = [batch.lengths[i] for i in sequences]
    plan = deal(lengths, max(lengths) if is_fine else sum(lengths), num_ranks)
    return [[[sequences[i] for i in chosen] for chosen in bins] for bins in plan]


def _trajectory(rng: random.Random, row: int, *, is_masked: bool) -> Trajectory:
    """One or two turns; of a masked one no token is trainable, as if it had been filtered."""
    mask: list[bool] = []
    for _ in range(rng.randint(1, 2)):
        mask += [False] * rng.randint(2, 6) + [not is_masked] * rng.randint(1, 14)
    first_version = rng.randint(0, 3)
    return Trajectory(
        token_ids=[rng.randrange(1_000) for _ in mask],
        loss_mask=mask,
        behavior_logprobs=[-rng.expovariate(1.0) if sampled else 0.0 for sampled in mask],
        versions=[first_version + (i > 9) if sampled else -1 for i, sampled in enumerate(mask)],
        reward=rng.choice([0.0, 0.3, 1.0]),
        temperature=(1.0, 0.6, 1.2)[row % 3],
        finish_reason="stop",
        row_index=row,
    )


def _advantages(
    groups: list[list[Trajectory]], rng: random.Random, seed: int
) -> list[list[float]] | list[list[list[float]]]:
    """Per trajectory, or, for every second seed, per token as a critic would give them."""
    if seed % 2 == 0:
        return group_advantages(groups)
    return [[[rng.gauss(0.3, 1.0) for _ in t.token_ids] for t in group] for group in groups]


def _cast(mb: MicroBatch, dtype: torch.dtype) -> MicroBatch:
    """The micro-batch with its real numbers in another precision."""
    values = {field.name: getattr(mb, field.name) for field in fields(mb)}
    return replace(mb, **{k: v.to(dtype) for k, v in values.items() if v.is_floating_point()})


def _normal(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, generator=generator)
