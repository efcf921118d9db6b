"""The three interfaces. Everything else in arealite is a mechanism behind one of them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from arealite.types import (
    Head,
    LossFn,
    MicroBatch,
    ModelRequest,
    ModelResponse,
    Row,
    StepStats,
    Trajectory,
)


class InferenceEngine(Protocol):
    """Samples tokens, takes new weights in mid-sentence, and knows which weights sampled what.

    Called by workflows and by `push_weights`, never by hand in a recipe:

        response = await engine.agenerate(request)          # many at once, on the rollout thread

        engine.receive_weights(named_weights, version=8)    # main thread: requests freeze in place
                                                            # and go on with the new weights
    """

    @property
    def version(self) -> int:
        """Version of the weights that new requests are served with; -1 before the first push."""
        ...

    @version.setter
    def version(self, version: int) -> None: ...

    @property
    def room(self) -> int | None:
        """Requests more that would be worked on at once, rather than wait; None: any number."""
        ...

    async def agenerate(self, request: ModelRequest) -> ModelResponse: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def sleep(self) -> None:
        """A batch is there: give up what the trainer needs now, until the next weights.

        On one GPU that is its memory; most engines do nothing. `resume` wakes it without weights.
        """
        ...

    def receive_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Load full tensors under their Hugging Face names; afterwards `version` is the new one.

        Nothing is sampled meanwhile, whether `pause` was called or not.
        """
        ...

    def close(self) -> None: ...


class TrainEngine(Protocol):
    """Computes log-probs and takes optimizer steps. Every method is a collective of all ranks.

    minibatches = pack(groups, advantages, num_minibatches=4, max_tokens=8192)
    minibatches = [attach(mbs, proximal_logprobs=engine.logprobs(mbs)) for mbs in minibatches]
    stats = [engine.step(mbs, loss_fn) for mbs in minibatches]
    """

    def logprobs(self, minibatch: list[MicroBatch]) -> list[torch.Tensor]:
        """Per micro-batch, each token's log-prob [T] at its temperature; 0 for first tokens."""
        ...

    def step(
        self, minibatch: list[MicroBatch], loss_fn: LossFn, *, head: Head = "logprobs"
    ) -> StepStats:
        """One optimizer step on the sum of the losses of all micro-batches of all ranks.

        Args:
            head: `logits` gives the loss [T, V], row t divided by the temperature of token t and
                made from the tokens before it, in place of log-probs [T]; all in memory at once.
        """
        ...

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors under their Hugging Face names, one after the other, on every rank."""
        ...

    def save(self, path: Path) -> None: ...

    def load(self, path: Path) -> None: ...

    def close(self) -> None: ...


class RolloutWorkflow(Protocol):
    """Turns one row into a group of finished episodes: the one method an agent has to write.

        groups = [await workflow.arun_episode(engine, row) for row in rows]   # at the same time

    None rejects the row: it is recorded, and the next row takes its place.
    """

    async def arun_episode(self, engine: InferenceEngine, row: Row) -> list[Trajectory] | None: ...
