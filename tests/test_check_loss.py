"""Good losses pass, and each known mistake is caught and named, in several spellings."""

import math
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

from arealite import dist
from arealite.algo.losses import clipped_surrogate, importance_weight
from arealite.check_loss import check_loss, ranks
from arealite.check_loss.batches import make_batch
from arealite.errors import LossError, RankError
from arealite.types import LossFn, LossOutput, MicroBatch
from recipes.gsm8k_grpo import Config, grpo_loss

PerToken = Callable[[torch.Tensor, MicroBatch], torch.Tensor]


def ratio_of(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    return torch.where(mb.loss_mask, logprobs - mb.proximal_logprobs, 0.0).exp()


def per_token(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    """What the losses below reduce, [T]."""
    return -ratio_of(logprobs, mb) * mb.advantages


def borders(mb: MicroBatch) -> list[tuple[int, int]]:
    return list(pairwise(mb.cu_seqlens.tolist()))


def sequence_of(mb: MicroBatch) -> torch.Tensor:
    """Index of its sequence for each token, [T]."""
    return torch.arange(mb.num_sequences).repeat_interleave(mb.cu_seqlens.diff())


def sequence_means(logprobs: torch.Tensor, mb: MicroBatch) -> list[torch.Tensor]:
    values = per_token(logprobs, mb)
    return [values[a:b][mb.loss_mask[a:b]].mean() for a, b in borders(mb)]


# ---- good losses


def good(reduce: PerToken) -> LossFn:
    return lambda logprobs, mb: LossOutput(total=reduce(logprobs, mb))


def uncapped_surrogate(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    surrogate, _ = clipped_surrogate(
        logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask, 0.2, 0.2
    )
    weight, _ = importance_weight(
        mb.proximal_logprobs, mb.behavior_logprobs, mb.loss_mask, cap=math.inf
    )
    return -(mb.loss_weight * weight * surrogate).sum()


def k3(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    gap = torch.where(mb.loss_mask, mb.ref_logprobs - logprobs, 0.0)
    return (mb.loss_weight * (gap.exp() - 1 - gap)).sum()


def gspo(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    """The ratio of each sequence: its sums are of float32, whatever the log-probs are."""
    gap = torch.where(mb.loss_mask, logprobs - mb.proximal_logprobs, 0.0)
    zeros = torch.zeros(mb.num_sequences)
    total = zeros.index_add(0, sequence_of(mb), gap)
    count = zeros.index_add(0, sequence_of(mb), mb.loss_mask.float())
    ratio = (total / count.clamp(min=1)).exp()[sequence_of(mb)]
    return -(mb.loss_weight * ratio * mb.advantages).sum()


def in_float32(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    return (mb.loss_weight.float() * per_token(logprobs.float(), mb).float()).sum()


def means_of_sequences_in_a_loop(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    """Cannot take an empty micro-batch, which the engine does not pass either."""
    values = per_token(logprobs, mb) * mb.loss_mask
    return torch.stack(
        [values[a:b].sum() / mb.loss_mask[a:b].sum().clamp(min=1) for a, b in borders(mb)]
    ).sum()


def centered_in_each_sequence(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    """Its terms cancel to 0 where current and proximal policy are the same."""
    parts = [logprobs.sum() * 0]
    for a, b in borders(mb):
        mask = mb.loss_mask[a:b]
        values = mb.advantages[a:b]
        centered = values - values.sum() / mask.sum().clamp(min=1)
        parts.append((mask * centered * ratio_of(logprobs, mb)[a:b]).sum())
    return torch.stack(parts).sum()


def clamped_before_exp(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    ratio = (logprobs - mb.proximal_logprobs).clamp(-9, 9).exp()
    return -(mb.loss_weight * mb.advantages * ratio).sum()


def young_tokens_only(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    return (mb.loss_weight * per_token(logprobs, mb) * (mb.versions >= 2)).sum()


def test_the_loss_of_the_recipe_is_good_to_the_last_digits():
    report = check_loss(partial(grpo_loss, cfg=Config()))
    assert report.num_comparisons > 200
    assert report.max_loss_change < 1e-6
    assert report.max_gradient_change < 1e-6


@pytest.mark.parametrize(
    "reduce",
    [
        uncapped_surrogate,
        k3,
        gspo,
        in_float32,
        means_of_sequences_in_a_loop,
        centered_in_each_sequence,
        clamped_before_exp,
        young_tokens_only,
        pytest.param(lambda logp, mb: per_token(logp, mb).sum(), id="sum"),
        pytest.param(lambda logp, mb: per_token(logp, mb)[mb.loss_mask].sum() / 9, id="constant"),
        pytest.param(lambda logp, mb: -(mb.loss_weight * mb.advantages * logp).sum(), id="pure"),
    ],
)
def test_a_loss_with_its_own_reduction_is_good_if_it_is_a_sum(reduce: PerToken):
    check_loss(good(reduce))


def test_all_advantages_zero_is_no_mistake():
    check_loss(lambda logprobs, mb: LossOutput(total=(logprobs * 0 * mb.loss_weight).sum()))


def test_a_loss_with_a_gradient_of_something_else_is_named():
    with pytest.raises(LossError, match="has no gradient, which the engine refuses"):
        check_loss(lambda logprobs, mb: LossOutput(total=torch.zeros((), requires_grad=True)))


# ---- the known mistakes


def message_of(reduce: PerToken) -> str:
    with pytest.raises(LossError) as caught:
        check_loss(good(reduce))
    return str(caught.value)


def sampled_advantages(mb: MicroBatch) -> torch.Tensor:
    return mb.advantages[mb.loss_mask]


MEANS_PER_MICRO_BATCH: dict[str, PerToken] = {
    "over a mask": lambda logp, mb: per_token(logp, mb)[mb.loss_mask].mean(),
    "sum over count": lambda logp, mb: per_token(logp, mb).sum() / mb.loss_mask.sum().clamp(min=1),
    "a small number added": lambda logp, mb: (
        per_token(logp, mb).sum() / (mb.loss_mask.sum() + 1e-8)
    ),
    "over all tokens": lambda logp, mb: per_token(logp, mb).mean(),
    "of what is weighted": lambda logp, mb: (mb.loss_weight * per_token(logp, mb)).mean(),
    "weights made to sum to 1": lambda logp, mb: (
        (mb.loss_weight * per_token(logp, mb)).sum() / mb.loss_weight.sum().clamp(min=1e-9)
    ),
    "over the tokens of all ranks": lambda logp, mb: (
        per_token(logp, mb).sum() / max(1.0, dist.sum([float(mb.loss_mask.sum())])[0])
    ),
}


@pytest.mark.parametrize("spelling", MEANS_PER_MICRO_BATCH)
def test_a_mean_per_micro_batch_is_named(spelling: str):
    message = message_of(MEANS_PER_MICRO_BATCH[spelling])
    assert "This is a mean per micro-batch" in message
    assert "with 2 micro-batches instead of 1" in message
    assert "with 2 ranks instead of 1" in message or "with 3 ranks instead of 1" in message
    assert "return (mb.loss_weight * per_token).sum()" in message
    assert "another order" not in message


def safe_means(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    values = per_token(logprobs, mb)
    zeros = torch.zeros(mb.num_sequences, dtype=values.dtype)
    total = zeros.index_add(0, sequence_of(mb), values * mb.loss_mask)
    count = zeros.index_add(0, sequence_of(mb), mb.loss_mask.to(values.dtype))
    return total / count.clamp(min=1)


MEANS_PER_SEQUENCE: dict[str, PerToken] = {
    "stacked": lambda logp, mb: torch.stack(sequence_means(logp, mb)).mean(),
    "sum over N": lambda logp, mb: sum(sequence_means(logp, mb)) / mb.num_sequences,  # type: ignore[return-value]
    "index_add": lambda logp, mb: safe_means(logp, mb).mean(),
    "sums of tokens over N": lambda logp, mb: per_token(logp, mb).sum() / mb.num_sequences,
}


@pytest.mark.parametrize("spelling", MEANS_PER_SEQUENCE)
def test_a_mean_per_sequence_after_the_cut_is_named(spelling: str):
    message = message_of(MEANS_PER_SEQUENCE[spelling])
    assert "This is a mean per sequence after the cut" in message
    assert "with 2 micro-batches instead of 1" in message
    assert "changed by the factor 2" in message
    assert 'aggregation="sequence"' in message


def weighted_sum(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    return (mb.loss_weight * per_token(logprobs, mb)).sum()


def averaged_by_all_reduce(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    ranks = torch.ones(())
    torch_dist.all_reduce(ranks)
    return weighted_sum(logprobs, mb) / ranks


MEANS_PER_RANK: dict[str, PerToken] = {
    "arealite": lambda logp, mb: weighted_sum(logp, mb) / dist.world_size(),
    "torch": lambda logp, mb: weighted_sum(logp, mb) / torch_dist.get_world_size(),
    "if initialized": lambda logp, mb: (
        weighted_sum(logp, mb) / (torch_dist.get_world_size() if torch_dist.is_initialized() else 1)
    ),
    "environment": lambda logp, mb: weighted_sum(logp, mb) / int(os.environ.get("WORLD_SIZE", "1")),
    "all_reduce": averaged_by_all_reduce,
    "dist.sum": lambda logp, mb: weighted_sum(logp, mb) / dist.sum([1.0])[0],
    "gather": lambda logp, mb: weighted_sum(logp, mb) / len(dist.gather(None)),
}


@pytest.mark.parametrize("spelling", MEANS_PER_RANK)
def test_a_mean_per_rank_is_named(spelling: str):
    message = message_of(MEANS_PER_RANK[spelling])
    assert "with 2 ranks instead of 1" in message
    assert "changed by the factor 0.5" in message
    assert "This is a mean per rank" in message
    assert "micro-batches instead" not in message


def test_a_factor_that_would_undo_a_mean_over_ranks_is_named():
    message = message_of(lambda logp, mb: weighted_sum(logp, mb) * dist.world_size())
    assert "undoes a mean over ranks" in message
    assert "changed by the factor 2" in message


def test_a_loss_that_waits_for_other_ranks_only_for_its_metrics_is_refused():
    def waits(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
        [tokens] = dist.sum([float(mb.loss_mask.sum())])
        return LossOutput(
            total=weighted_sum(logprobs, mb), metrics={"tokens": torch.tensor(tokens)}
        )

    with pytest.raises(
        LossError, match="empty micro-batch on the second of 2 ranks it raised"
    ) as e:
        check_loss(waits)
    assert "A loss must not meet other ranks" in str(e.value)


def ratio_masked_late(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    return -(mb.loss_weight * (logprobs - mb.proximal_logprobs).exp() * mb.advantages).sum()


def ratio_hidden_by_where(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    ratio = (logprobs - mb.proximal_logprobs).exp()
    return -(mb.loss_weight * mb.advantages * torch.where(mb.loss_mask, ratio, 0.0)).sum()


def ratio_clipped_then_masked(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    ratio = torch.exp(logprobs - mb.proximal_logprobs)
    objective = torch.minimum(ratio * mb.advantages, ratio.clamp(0.8, 1.2) * mb.advantages)
    return -(mb.loss_weight * objective * mb.loss_mask).sum()


def ratio_masked_fill(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    ratio = (logprobs - mb.proximal_logprobs).exp().masked_fill(~mb.loss_mask, 0.0)
    return -(mb.loss_weight * mb.advantages * ratio).sum()


def weight_masked_late(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    weight = (mb.proximal_logprobs - mb.behavior_logprobs).exp().detach()
    return (mb.loss_weight * weight * per_token(logprobs, mb)).sum()


def k3_masked_late(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    gap = mb.ref_logprobs - logprobs
    return (mb.loss_weight * mb.loss_mask * (gap.exp() - 1 - gap)).sum()


@pytest.mark.parametrize(
    "reduce",
    [
        ratio_masked_late,
        ratio_hidden_by_where,
        ratio_clipped_then_masked,
        ratio_masked_fill,
        weight_masked_late,
        k3_masked_late,
    ],
)
def test_a_mask_applied_after_exp_is_named(reduce: PerToken):
    message = message_of(reduce)
    assert "with log-probs far apart at masked tokens" in message
    assert "became nan" in message or "gradient is not finite" in message
    assert "This is a mask applied after exp" in message
    assert "torch.where(mb.loss_mask, logprobs - mb.proximal_logprobs, 0.0).exp()" in message
    assert "micro-batches instead" not in message


def with_advantages(logprobs: torch.Tensor, mb: MicroBatch, values: torch.Tensor) -> torch.Tensor:
    return -(mb.loss_weight * ratio_of(logprobs, mb) * values).sum()


def self_normalized(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
    gap = torch.where(mb.loss_mask, mb.proximal_logprobs - mb.behavior_logprobs, 0.0)
    weight = gap.exp() * mb.loss_mask
    weight = weight / weight.sum().clamp(min=1e-9) * mb.loss_mask.sum()
    return (mb.loss_weight * weight * per_token(logprobs, mb)).sum()


STATISTICS: dict[str, PerToken] = {
    "normalized advantages": lambda logp, mb: with_advantages(
        logp,
        mb,
        (mb.advantages - sampled_advantages(mb).mean()) / (sampled_advantages(mb).std() + 1e-6),
    ),
    "normalized over all tokens": lambda logp, mb: with_advantages(
        logp, mb, (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-6)
    ),
    "deviation only": lambda logp, mb: with_advantages(
        logp, mb, mb.advantages / (sampled_advantages(mb).std(correction=0) + 1e-6)
    ),
    "mean only": lambda logp, mb: with_advantages(
        logp, mb, mb.advantages - sampled_advantages(mb).sum() / mb.loss_mask.sum().clamp(min=1)
    ),
    "greatest": lambda logp, mb: with_advantages(
        logp, mb, mb.advantages / mb.advantages.abs().max().clamp(min=1e-6)
    ),
    "self-normalized weights": self_normalized,
    "newest version": lambda logp, mb: (
        mb.loss_weight * per_token(logp, mb) * 0.9 ** (mb.versions.max() - mb.versions)
    ).sum(),
}


@pytest.mark.parametrize("spelling", STATISTICS)
def test_a_statistic_over_a_micro_batch_is_named(spelling: str):
    message = message_of(STATISTICS[spelling])
    assert "This is a statistic over a micro-batch" in message
    assert "micro-batches instead of 1" in message
    assert "mean per micro-batch" not in message


# ---- other ways to go wrong


def test_a_sum_across_the_borders_of_sequences_is_named():
    message = message_of(
        lambda logp, mb: (mb.loss_weight * mb.advantages * (logp * mb.loss_mask).cumsum(0)).sum()
    )
    assert "depends on the tokens of its neighbors" in message
    assert "with the sequences in another order" in message


def test_a_gradient_at_masked_tokens_is_named():
    message = message_of(lambda logp, mb: -(logp * mb.advantages.abs().clamp(min=1.0)).sum())
    assert "without the gradient at masked tokens, loss" in message
    assert "with other log-probs at masked tokens, loss" in message
    assert "The loss counts masked tokens" in message


def test_a_nan_from_a_fully_masked_or_an_empty_micro_batch_is_shown():
    def fragile(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
        count = mb.loss_mask.sum()
        return weighted_sum(logprobs, mb) * count / count

    message = message_of(fragile)
    assert "with a fully masked micro-batch, loss" in message
    assert "with an empty micro-batch, loss" in message
    assert "became nan" in message
    assert "micro-batches instead" not in message


def test_a_fully_masked_sequence_must_not_make_nan_either():
    message = message_of(lambda logp, mb: torch.stack(sequence_means(logp, mb)).sum())
    assert "with fully masked sequences among them, loss" in message


def test_a_loss_that_draws_random_numbers_is_refused():
    message = message_of(lambda logp, mb: weighted_sum(logp, mb) * torch.rand(()))
    assert "when called again, loss" in message
    assert "draws random numbers" in message


def test_a_constant_for_each_micro_batch_changes_only_the_loss():
    message = message_of(lambda logp, mb: weighted_sum(logp, mb) + 1)
    assert "and the gradient stayed" in message
    assert "This is" not in message  # nothing that is known


def test_a_loss_that_is_never_finite_is_refused():
    assert "An ordinary micro-batch has loss nan" in message_of(
        lambda logp, mb: logp.sum() * math.nan
    )


def test_a_loss_without_a_gradient_is_refused():
    message = message_of(lambda logp, mb: mb.advantages.sum())
    assert "has no gradient, which the engine refuses" in message


def test_a_loss_that_raises_for_a_fully_masked_micro_batch_is_refused():
    def picky(logprobs: torch.Tensor, mb: MicroBatch) -> torch.Tensor:
        if mb.num_sequences and not mb.loss_mask.any():
            raise IndexError("no token")
        return weighted_sum(logprobs, mb)

    assert "with a fully masked micro-batch it raised IndexError: no token" in message_of(picky)


def test_what_a_broken_loss_raises_reaches_the_caller_as_it_is():
    def broken(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        check_loss(broken)


def test_a_tensor_instead_of_a_loss_output_is_refused():
    with pytest.raises(LossError, match="returned a Tensor"):
        check_loss(weighted_sum)  # type: ignore[arg-type]


def test_the_message_gives_both_numbers_and_the_factor():
    # 1 for each micro-batch, and a gradient of 1 / N: of one and of two micro-batches.
    message = message_of(
        lambda logp, mb: 1 + (logp - logp.detach())[mb.loss_mask].sum() / max(1, mb.num_sequences)
    )
    assert "instead of 1, loss 1 became 2 and the gradient changed by" in message


# ---- what it leaves behind, and what it runs on


def test_the_process_group_and_the_environment_of_the_caller_stay(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init()
    try:
        group = torch_dist.group.WORLD
        threads = threading.active_count()
        seen: set[int] = set()

        def counts(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
            seen.add(dist.world_size())
            return LossOutput(total=weighted_sum(logprobs, mb))

        check_loss(counts)
        assert seen == {1, 2, 3}
        assert torch_dist.group.WORLD is group
        assert dist.gather(7) == [7]
        assert threading.active_count() <= threads + 1  # the watchdog of waits
        assert os.environ["WORLD_SIZE"] == "1"
    finally:
        dist.close()


def test_batches_look_like_those_of_training():
    batch = make_batch(1, "sequence", torch.float32)
    mb = batch.mb
    assert len(set(batch.lengths)) > 5
    assert set(batch.fully_masked()) | set(batch.trainable()) == set(range(mb.num_sequences))
    assert len(batch.fully_masked()) == 2
    assert (mb.loss_weight.sum() - 1).abs() < 1e-6
    assert not mb.loss_mask[mb.cu_seqlens[:-1].long()].any()  # a prompt comes first
    assert (mb.versions[mb.loss_mask] >= 0).all() and (mb.versions[~mb.loss_mask] == -1).all()
    assert len(mb.temperature.unique()) > 1
    again = make_batch(1, "sequence", torch.float32)
    assert torch.equal(again.logprobs, batch.logprobs)


def test_a_micro_batch_holds_the_fields_of_its_sequences():
    batch = make_batch(0, "token", torch.float64)
    start, end = batch.mb.cu_seqlens[3:5].tolist()
    mb = batch.micro_batch([3, 3])
    assert mb.cu_seqlens.tolist() == [0, end - start, 2 * (end - start)]
    assert mb.token_ids.tolist() == 2 * batch.mb.token_ids[start:end].tolist()
    assert mb.ref_logprobs.tolist() == 2 * batch.mb.ref_logprobs[start:end].tolist()
    empty = batch.micro_batch([])
    assert (empty.num_sequences, len(empty.token_ids)) == (0, 0)
    assert empty.advantages.dtype == torch.float64


def test_ranks_that_do_not_connect_at_once_try_again(monkeypatch: pytest.MonkeyPatch):
    connect, num_failures = ranks._gloo, iter([True, False, False])

    def flaky(*args: Any) -> Any:
        if next(num_failures, False):
            raise RuntimeError("Gloo connectFullMesh failed with Connection closed by peer")
        return connect(*args)

    monkeypatch.setattr(ranks, "_gloo", flaky)
    monkeypatch.setattr(ranks, "TIMEOUT", timedelta(seconds=1))  # of the rank that waits
    assert ranks.run_on_ranks(2, lambda: 7) == [7, 7]


def test_ranks_that_never_connect_are_no_fault_of_the_loss(monkeypatch: pytest.MonkeyPatch):
    connect = ranks._gloo

    def alone(store: Any, rank: int, num_ranks: int) -> Any:
        if num_ranks > 1:
            raise RuntimeError("Connection closed by peer")
        return connect(store, rank, num_ranks)

    monkeypatch.setattr(ranks, "_gloo", alone)
    with pytest.raises(RankError, match="2 ranks in this process could not connect"):
        check_loss(partial(grpo_loss, cfg=Config()))
