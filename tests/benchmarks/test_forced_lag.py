"""The benchmark of old samples: weights are as old as it says, and naive PPO is PPO on behavior."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arealite import dist
from arealite.data import GSM8K_MINI, TINY_MATH, load_rows, load_tokenizer
from arealite.inference.hf import HFEngine
from arealite.rollout.executor import run_episodes
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import pack
from arealite.types import LossOutput, MicroBatch, SamplingParams
from arealite.weights import push_tensors
from benchmarks.forced_lag import (
    Objective,
    Run,
    Snapshots,
    centered,
    check_versions,
    distance,
    push_lagged,
    read_results,
    reward,
    table,
)
from recipes.gsm8k_grpo import Config, grpo_loss

DOCUMENT = Path(__file__).parents[2] / "docs" / "staleness.md"
CURRENT = [-1.0, -0.5, -2.0, -0.1]
PROXIMAL = [-1.1, -0.9, -1.8, -0.1]
BEHAVIOR = [-1.0, -1.2, -4.0, -0.1]
ADVANTAGES = [1.0, 1.0, -1.0, -0.5]


@pytest.fixture(scope="module")
def trainer() -> Iterator[FSDPEngine]:
    """Leaves the process group and the threads as they were."""
    num_threads = torch.get_num_threads()
    with FSDPEngine(TINY_MATH, FSDPConfig(lr=1e-3, cpu_threads=1)) as engine:
        yield engine
    torch.set_num_threads(num_threads)
    dist.close()


def raise_likelihood(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
    return LossOutput(total=-(mb.loss_weight * logprobs).sum())


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_sampler_has_the_weights_of_exactly_so_many_versions_ago(lag: int, trainer: FSDPEngine):
    workflow = SingleTurnWorkflow(
        load_tokenizer(TINY_MATH), reward, SamplingParams(temperature=0.0, max_new_tokens=4)
    )
    rows = load_rows(GSM8K_MINI, split="test")[:1]
    snapshots: Snapshots = deque(maxlen=lag + 1)
    fresh: list[list[float]] = []  # by version, what the weights say to the question
    with HFEngine(TINY_MATH) as sampler:
        for version in range(6):
            push_tensors(trainer.named_weights(), sampler, version=version)
            [[answer]] = run_episodes(sampler, workflow, rows)
            fresh.append(answer.behavior_logprobs)
            push_lagged(trainer, sampler, snapshots, version=version)
            groups = run_episodes(sampler, workflow, rows)
            expected = max(0, version - lag)
            check_versions(groups, expected)
            assert groups[0][0].behavior_logprobs == fresh[expected]
            [minibatch] = pack(
                groups, [[1.0]], num_minibatches=1, max_tokens=512, aggregation="token"
            )
            trainer.step(minibatch, raise_likelihood)
            with pytest.raises(RuntimeError, match=rf"versions \[{expected}\], not all of"):
                check_versions(groups, expected + 1)
    assert len(set(map(tuple, fresh))) == len(fresh)


def micro_batch() -> MicroBatch:
    """A masked token, and four behind it, each a quarter of the mean."""
    count = len(CURRENT) + 1
    return MicroBatch(
        token_ids=torch.arange(count),
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        loss_mask=torch.tensor([False] + [True] * 4),
        behavior_logprobs=torch.tensor([0.0, *BEHAVIOR]),
        versions=torch.tensor([-1, 0, 0, 0, 0]),
        temperature=torch.ones(count),
        advantages=torch.tensor([0.0, *ADVANTAGES]),
        loss_weight=torch.tensor([0.0] + [0.25] * 4),
    )


def surrogate(current: float, center: float, advantage: float) -> float:
    """PPO's, for one token, clipped at .2 on both sides."""
    ratio = math.exp(current - center)
    return min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)


def test_naive_is_ppo_on_what_sampled_and_decoupled_is_not():
    cfg = replace(Config(), clip_low=0.2, clip_high=0.2)
    tokens = list(zip(CURRENT, BEHAVIOR, ADVANTAGES, strict=True))
    naive = -sum(surrogate(*token) for token in tokens) / 4
    # -0.529957642 was computed outside of this project: clip around proximal, weight capped at 5.
    totals: dict[Objective, float] = {"naive": naive, "decoupled": -0.529957642}
    for objective, expected in totals.items():
        [mb] = centered([micro_batch()], [torch.tensor([0.0, *PROXIMAL])], objective)
        output = grpo_loss(torch.tensor([0.0, *CURRENT]), mb, cfg)
        assert output.total.item() == pytest.approx(expected, abs=1e-6)


def test_the_effective_share_falls_with_unequal_weights():
    mb = micro_batch()
    same = distance([[mb]], [[mb.behavior_logprobs]], cap=5.0)
    assert same == {"gap": 0.0, "effective": pytest.approx(1.0)}
    # Weights 1, 1, 3 and 9, of which the last is above the cap: 5^2 / (4 * 11).
    gaps = torch.tensor([0.0, 0.0, 0.0, math.log(3), math.log(9)])
    apart = distance([[mb]], [[mb.behavior_logprobs + gaps]], cap=5.0)
    assert apart["gap"] == pytest.approx(math.log(27) / 4)
    assert apart["effective"] == pytest.approx(25 / 44)


def test_a_run_is_what_its_name_says():
    run = Run.from_name("naive:4:2:0.0001")
    assert run == Run(objective="naive", lag=4, seed=2, lr=1e-4)
    assert Run.from_name(run.name) == run


def test_the_document_shows_the_table_of_the_results():
    assert table(read_results()) in DOCUMENT.read_text()
