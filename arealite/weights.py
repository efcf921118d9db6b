"""New weights for the servers: the one function that knows both engines."""

from collections.abc import Iterator

import torch

from arealite import dist
from arealite.api import InferenceEngine, TrainEngine
from arealite.errors import ServerError


def push_weights(
    train_engine: TrainEngine, inference_engine: InferenceEngine, *, version: int
) -> None:
    """Serve the trainer's weights as `version`: gather, pause, transfer, resume. A collective.

    Running requests freeze in place and go on with the new weights. Call it once before the first
    rollout and at once after each step.

    Raises:
        ServerError: on every rank, if a server did not take the weights.
    """
    push_tensors(train_engine.named_weights(), inference_engine, version=version)


def push_tensors(
    weights: Iterator[tuple[str, torch.Tensor]], inference_engine: InferenceEngine, *, version: int
) -> None:
    """The same with tensors that every rank makes, one after the other."""
    failure = _push(weights, inference_engine, version) if dist.rank() == 0 else ""
    # Every tensor is gathered by all ranks together: no rank may leave early.
    for _ in weights:
        pass
    if failure := dist.broadcast(failure):
        raise ServerError(f"Weights of version {version} did not reach the servers: {failure}")
    inference_engine.version = version


def _push(
    weights: Iterator[tuple[str, torch.Tensor]], inference_engine: InferenceEngine, version: int
) -> str:
    """Why the push failed; empty if it did not."""
    try:
        inference_engine.receive_weights(weights, version=version)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
