"""The reference is the model before training, whatever happens to the policy."""

from dataclasses import replace

import pytest
import torch

from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.reference import Reference
from tests.training.helpers import CFG, minibatch_of, train_step

LORA = replace(CFG, lora_rank=4, lora_alpha=8, lr=1e-2)
FULL = replace(CFG, lr=1e-2)


@pytest.mark.parametrize("cfg", [FULL, LORA], ids=["all weights", "adapters"])
def test_it_stays_what_the_policy_was_at_first(model_path: str, cfg: FSDPConfig):
    minibatch = minibatch_of()
    with FSDPEngine(model_path, cfg) as policy, Reference(model_path, policy) as reference:
        before = torch.cat(policy.logprobs(minibatch))
        assert torch.equal(torch.cat(reference.logprobs(minibatch)), before)
        train_step(policy, minibatch)
        assert not torch.equal(torch.cat(policy.logprobs(minibatch)), before)
        assert torch.equal(torch.cat(reference.logprobs(minibatch)), before)


def test_a_policy_that_continues_from_a_checkpoint_keeps_its_reference(model_path: str, tmp_path):
    minibatch = minibatch_of()
    with FSDPEngine(model_path, FULL) as policy:
        before = torch.cat(policy.logprobs(minibatch))
        train_step(policy, minibatch)
        policy.save(tmp_path)
    with FSDPEngine(model_path, FULL) as policy:
        policy.load(tmp_path)
        with Reference(model_path, policy) as reference:
            assert torch.equal(torch.cat(reference.logprobs(minibatch)), before)


def test_it_may_be_closed_twice_and_leaves_the_policy_open(model_path: str):
    with FSDPEngine(model_path, FULL) as policy:
        reference = Reference(model_path, policy)
        reference.close()
        reference.close()
        assert torch.isfinite(torch.cat(policy.logprobs(minibatch_of()))).all()
