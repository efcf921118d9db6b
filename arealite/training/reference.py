"""The model before any training, which a KL or a preference loss compares the policy with.

with FSDPEngine(cfg.model, cfg.train) as policy, Reference(cfg.model, policy) as reference:
    minibatch = attach(minibatch, ref_logprobs=reference.logprobs(minibatch))
"""

from typing import Self

import torch

from arealite.training.fsdp import FSDPEngine
from arealite.types import MicroBatch


class Reference:
    """Log-probs of the model as it was before any training.

    Where the policy trains LoRA adapters, it is the policy without them and takes no memory. Else
    it is a second engine of the same model, sharded and offloaded like the policy, that is never
    trained: it has weights, but neither gradients nor states of an optimizer.

    Args:
        model: what the policy began with: Hugging Face id or folder.
        policy: stays open for as long as this is used.
    """

    def __init__(self, model: str, policy: FSDPEngine) -> None:
        self._policy = policy
        self._own = None if policy.cfg.lora_rank else FSDPEngine(model, policy.cfg)

    def logprobs(self, minibatch: list[MicroBatch]) -> list[torch.Tensor]:
        """Per micro-batch, the log-prob [T] of each token, as of `FSDPEngine.logprobs`."""
        if self._own:
            return self._own.logprobs(minibatch)
        return self._policy.reference_logprobs(minibatch)

    def close(self) -> None:
        """Free what it has of its own. May be called again."""
        if self._own:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
