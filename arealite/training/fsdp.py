"""FSDPEngine: log-probs and optimizer steps of a model that is sharded over all ranks.

    MicroBatch --to device--> PolicyModel (root of FSDP2) --> log-probs [T] --> loss_fn --> backward
                                                      gradients summed, once, in the last backward

Micro-batches live on the CPU between calls, so a recipe never mentions a device.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch.distributed.tensor import DTensor

from arealite import dist, malloc
from arealite.config import check_at_least
from arealite.errors import ConfigError, OutOfMemoryError, TrajectoryError
from arealite.training import export, lora
from arealite.training.canary import check_model
from arealite.training.model import PolicyModel, make_critic, on_device
from arealite.training.optimizer import lr_at, make_optimizer, move_states
from arealite.training.sharding import load_from_rank_0, shard, sharded_modules
from arealite.types import Head, LossFn, MicroBatch, StepStats, check_output


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """The optimizer, its schedule, and how the model is laid out in memory."""

    lr: float = 1e-5
    """Learning rate after warm-up; 0 computes everything and changes nothing."""
    warmup_steps: int = 0
    """Optimizer steps over which lr rises in equal parts to its full value."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What lr does after warm-up; linear and cosine fall until total_steps."""
    total_steps: int | None = None
    """Optimizer steps of the whole run (steps times minibatches); linear and cosine need it."""
    min_lr_ratio: float = 0.0
    """Share of lr at which linear and cosine end."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay per step, times lr; not applied to biases and norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the mean gradient and of the mean squared gradient."""
    eps: float = 1e-8
    """AdamW's addend of the denominator; matters for gradients of about this size."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm, over all weights of all ranks, is scaled down to this."""
    micro_batch_tokens: int = 8192
    """Tokens in one forward pass of one rank; lower it when memory runs out, results stay."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the computation; weights and optimizer are float32. auto: bfloat16 on CUDA only. float64
    is for comparisons, and of weights and optimizer too."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    reshard_after_forward: bool = True
    """Free each block between forward and backward; False is faster and takes more memory."""
    lora_rank: int = 0
    """Rank of the LoRA adapters, which alone are trained; 0 trains all weights. They take about
    ten times the lr. Servers get the merged weights."""
    lora_alpha: int = 32
    """LoRA's product is scaled by lora_alpha / lora_rank."""
    lora_layers: tuple[str, ...] = ()
    """Last parts of the names of the layers that get adapters, such as `q_proj`; empty: all linear
    layers but the head."""
    cpu_threads: int = 0
    """Threads of one rank without CUDA; 0 is OMP_NUM_THREADS, or else half of the cores."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer in CPU memory between uses; no effect without CUDA."""
    optimizer_offload: bool = False
    """Keep AdamW's states in CPU memory but for the moment of an optimizer step, which takes longer
    by their way there and back; no effect without CUDA, or beside cpu_offload."""

    def __post_init__(self) -> None:
        check_at_least(self, "train")
        if isinstance(self.lora_layers, str):
            raise ConfigError(f"train.lora_layers={self.lora_layers!r} must be a list of names.")
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise ConfigError(f"train.betas={self.betas} must be two numbers in [0, 1).")
        beta_1, beta_2 = self.betas
        checks = {
            "lr": (self.lr, 0 <= self.lr < math.inf, "0 or more"),
            "warmup_steps": (self.warmup_steps, self.warmup_steps >= 0, "0 or more"),
            "min_lr_ratio": (self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1, "between 0 and 1"),
            "weight_decay": (self.weight_decay, self.weight_decay >= 0, "0 or more"),
            "betas": (self.betas, 0 <= beta_1 < 1 and 0 <= beta_2 < 1, "two numbers in [0, 1)"),
            "eps": (self.eps, self.eps > 0, "above 0"),
            "max_grad_norm": (self.max_grad_norm, self.max_grad_norm > 0, "above 0"),
            "micro_batch_tokens": (self.micro_batch_tokens, self.micro_batch_tokens > 0, "above 0"),
            "cpu_threads": (self.cpu_threads, self.cpu_threads >= 0, "0 or more"),
            "lora_rank": (self.lora_rank, self.lora_rank >= 0, "0 or more"),
            "lora_alpha": (self.lora_alpha, self.lora_alpha > 0, "above 0"),
        }
        for name, (value, is_valid, rule) in checks.items():
            if not is_valid:
                raise ConfigError(f"train.{name}={value} must be {rule}.")
        if self.schedule != "constant" and (self.total_steps or 0) <= self.warmup_steps:
            raise ConfigError(
                f'train.schedule="{self.schedule}" ends at train.total_steps={self.total_steps}, '
                f"which must exceed train.warmup_steps={self.warmup_steps}. Set it to the "
                "optimizer steps of the whole run."
            )


class FSDPEngine:
    """A `TrainEngine` on FSDP2: one process or many, CPU (gloo) or CUDA (NCCL).

    Every method is a collective. A step whose gradient is not finite is skipped: weights and
    optimizer state stay, but the call counts for the schedule, as it makes the next version.

    Args:
        model: Hugging Face id or folder.
        is_critic: give the model a head of one number per token, 0 at first, in place of its own:
            then it has `values`, and steps with `head="values"`.
    """

    def __init__(self, model: str, cfg: FSDPConfig, *, is_critic: bool = False) -> None:
        dist.init()
        self.cfg = cfg
        self._source = model
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _plan_threads(cfg.cpu_threads)
        # Rounded back to these dtypes on export: a server gets what it would load from disk.
        hf_model, self._dtypes = load_from_rank_0(model)
        if cfg.lora_rank:
            lora.add_adapters(hf_model, cfg)
        if is_critic:
            make_critic(hf_model)
        embedding: Any = hf_model.get_input_embeddings()
        self._vocab_size = int(embedding.weight.shape[0])
        self._policy = PolicyModel(hf_model)
        self._root = shard(self._policy, cfg, self._device)
        self._optimizer = make_optimizer(self._policy, cfg)
        self._offload_states()
        self._num_calls = 0
        self._num_skipped = 0
        check_model(self._policy, self._device)
        self._reshard()

    @torch.no_grad()
    def logprobs(self, minibatch: list[MicroBatch]) -> list[torch.Tensor]:
        """Per micro-batch, the log-prob [T] of each token at its temperature, on the CPU.

        float32 (or float64, if that is cfg.dtype); 0 for the first token of each sequence.
        """
        return self._forward(minibatch, "logprobs")

    @torch.no_grad()
    def values(self, minibatch: list[MicroBatch]) -> list[torch.Tensor]:
        """Per micro-batch, what a critic expects before each token [T], on the CPU.

        float32 (or float64, if that is cfg.dtype); 0 for the first token of each sequence.
        """
        return self._forward(minibatch, "values")

    def _forward(self, minibatch: list[MicroBatch], head: Head) -> list[torch.Tensor]:
        self._check_head(head)
        _check_minibatch(minibatch, self._vocab_size, least=0)
        with self._no_silent_shortage():
            found = [self._policy(on_device(mb, self._device), head)[0].cpu() for mb in minibatch]
        self._reshard()
        return found

    def _check_head(self, head: Head) -> None:
        if head not in get_args(Head):
            raise ConfigError(f"step() got head={head!r}; it is one of {get_args(Head)}.")
        if self._policy.is_critic and head != "values":
            raise ConfigError(
                f"This engine is a critic, so it has no {head}. It has values; step(..., "
                'head="values") trains them.'
            )
        if head == "values" and not self._policy.is_critic:
            raise ConfigError(
                "This engine is no critic, so it has no values. Make another one with "
                "FSDPEngine(model, cfg, is_critic=True)."
            )

    def reference_logprobs(self, minibatch: list[MicroBatch]) -> list[torch.Tensor]:
        """As `logprobs`, of the model before any training. Takes no memory, and needs LoRA."""
        if not self.cfg.lora_rank:
            raise ConfigError(
                "This engine trains all weights, so those of the reference are gone. Set "
                "train.lora_rank, or use training.reference.Reference, which keeps them."
            )
        with lora.without_adapters(self._policy.model):
            return self.logprobs(minibatch)

    def step(
        self, minibatch: list[MicroBatch], loss_fn: LossFn, *, head: Head = "logprobs"
    ) -> StepStats:
        """One optimizer step on the sum of the losses of all micro-batches of all ranks."""
        self._check_head(head)
        _check_minibatch(minibatch, self._vocab_size, least=1)
        self._optimizer.zero_grad(set_to_none=True)
        with self._no_silent_shortage():
            stats = self._step(minibatch, loss_fn, head)
        if self._device.type == "cpu":
            malloc.trim(self._num_calls)
        return stats

    def _step(self, minibatch: list[MicroBatch], loss_fn: LossFn, head: Head) -> StepStats:
        sums = []
        for index, mb in enumerate(minibatch):
            is_last = index == len(minibatch) - 1
            self._root.set_requires_gradient_sync(is_last)
            self._root.set_is_last_backward(is_last)
            sums.append(self._backward(on_device(mb, self._device), loss_fn, head))
        gradients = [_local(p.grad) for p in self._policy.parameters() if p.grad is not None]
        squared_norm = float(torch.nn.utils.get_total_norm(gradients).double() ** 2)
        sums.append({"squared_norm": squared_norm})
        # Summed by name: a rank with only empty micro-batches has no metrics of the loss function.
        return self._update(gradients, _total(dist.gather(_total(sums))))

    @contextmanager
    def _no_silent_shortage(self) -> Iterator[None]:
        """Say who has the GPU's memory when it runs out, and what to do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"The trainer's GPU is out of memory{_who_has_it(self._device)}. What helps, the "
                f"cheapest first: {'; '.join(_what_frees_memory(self.cfg))}."
            ) from error

    def _backward(self, mb: MicroBatch, loss_fn: LossFn, head: Head) -> dict[str, float]:
        """Adds the gradient of one micro-batch; its sums, the loss function's as `metrics/...`."""
        found, entropy = self._policy(mb, head)
        if mb.num_sequences == 0:
            found.sum().backward()
            return {}
        reached: list[bool] = []
        found.register_hook(lambda _: reached.append(True))
        output = loss_fn(found, mb)
        check_output(output)
        if output.total.requires_grad:
            output.total.backward()
        if not reached:
            raise ConfigError(
                "The loss does not depend on what it was given, so it has no gradient. "
                "Compute LossOutput.total from the function's first argument."
            )
        own = {} if head == "values" else {"entropy": entropy[mb.loss_mask].sum()}
        metrics = {**own, **output.metrics}
        return {
            "loss": output.total.item(),
            "num_tokens": mb.loss_mask.sum().item(),
            "num_sequences": mb.num_sequences,
            **{f"metrics/{name}": float(value) for name, value in metrics.items()},
        }

    def _update(self, gradients: list[torch.Tensor], sums: dict[str, float]) -> StepStats:
        """Clips, steps unless the gradient is not finite, and counts."""
        lr = lr_at(self._num_calls, self.cfg)
        norm = math.sqrt(sums["squared_norm"])
        is_finite = math.isfinite(norm)
        if is_finite:
            if norm > self.cfg.max_grad_norm:
                for gradient in gradients:
                    gradient.mul_(self.cfg.max_grad_norm / norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            if self._has_states_elsewhere:
                move_states(self._optimizer, self._device)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._offload_states()
        self._num_calls += 1
        self._num_skipped += not is_finite
        num_tokens = int(sums.get("num_tokens", 0))
        return StepStats(
            loss=sums.get("loss", 0.0),
            grad_norm=norm,
            lr=lr,
            num_tokens=num_tokens,
            num_sequences=int(sums.get("num_sequences", 0)),
            skipped=not is_finite,
            metrics={
                name.removeprefix("metrics/"): value / max(1, num_tokens)
                for name, value in sums.items()
                if name.startswith("metrics/")
            },
        )

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors under their Hugging Face names, in the checkpoint's dtype, on every rank.

        One after the other: the next is gathered when it is asked for, by all ranks. Each is a
        copy. A head that is tied to the embedding has no tensor of its own.
        """
        return export.checkpoint_tensors(self._policy.model, self._dtypes)

    def save(self, path: str | Path) -> None:
        """Write weights, optimizer and counters as one torch distributed checkpoint folder."""
        export.save_state(Path(path), self._policy, self._optimizer, self._counters())

    def load(self, path: str | Path) -> None:
        """Continue from `save`, also on another number of ranks.

        Settings stay those of this run's config. Raises CheckpointError if the folder is missing,
        damaged or of another model; the weights are then undefined until another load succeeds.
        """
        counters = export.load_state(Path(path), self._policy, self._optimizer, self._counters())
        self._offload_states()
        self._num_calls, self._num_skipped = counters["num_calls"], counters["num_skipped"]

    def _counters(self) -> dict[str, int]:
        return {"num_calls": self._num_calls, "num_skipped": self._num_skipped}

    def save_pretrained(self, path: str | Path) -> None:
        """Write a Hugging Face model folder, tokenizer included, that plain transformers loads."""
        export.save_pretrained(Path(path), self._policy.model, self._dtypes, self._source)

    def close(self) -> None:
        """Free weights and optimizer state; the process group stays. May be called again."""
        for name in ("_policy", "_root", "_optimizer"):
            self.__dict__.pop(name, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _has_states_elsewhere(self) -> bool:
        is_needed = self.cfg.optimizer_offload and not self.cfg.cpu_offload
        return is_needed and self._device.type == "cuda"

    def _offload_states(self) -> None:
        if self._has_states_elsewhere:
            move_states(self._optimizer, torch.device("cpu"))

    def _reshard(self) -> None:
        # After a forward without a backward some weights stay whole: memory that others need.
        for module in sharded_modules(self._root):
            module.reshard()


def _check_minibatch(minibatch: list[MicroBatch], vocab_size: int, *, least: int) -> None:
    """Raise ConfigError, on all ranks, unless each has as many micro-batches, and enough.

    TrajectoryError for a token that the model does not have.
    """
    is_right = isinstance(minibatch, list) and all(isinstance(mb, MicroBatch) for mb in minibatch)
    counts = dist.gather(len(minibatch) if is_right else -1)
    if -1 in counts:
        raise ConfigError("Pass a list of micro-batches: one of the minibatches that pack made.")
    if min(counts) < least or len(set(counts)) > 1:
        raise ConfigError(
            f"The ranks got {counts} micro-batches, where all need equally many, at least {least}. "
            "Pass one minibatch of those that pack made, whole: it fills up with empty ones."
        )
    largest = max((int(mb.token_ids.max()) for mb in minibatch if mb.num_sequences), default=0)
    if largest >= vocab_size:
        raise TrajectoryError(
            f"Token {largest} is not among the {vocab_size} of the model. Do tokenizer and model "
            "belong together?"
        )


def _plan_threads(cpu_threads: int) -> None:
    # A thread that waits for another one spins. Where servers share the cores, two threads on two
    # cores took 5-10 s for a step that takes one thread 0.6 s.
    if cpu_threads == 0 and "OMP_NUM_THREADS" not in os.environ:
        cpu_threads = max(1, len(os.sched_getaffinity(0)) // 2)
    if cpu_threads and not torch.cuda.is_available():
        torch.set_num_threads(cpu_threads)


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _what_frees_memory(cfg: FSDPConfig) -> list[str]:
    """Settings that this config does not make use of yet, the cheapest first."""
    remedies = {
        f"lower train.micro_batch_tokens={cfg.micro_batch_tokens}": True,
        "train.activation_checkpointing=true": not cfg.activation_checkpointing,
        "where a server shares this GPU, server.sleep=true or a lower server.memory_share": True,
        "train.optimizer_offload=true": not (cfg.optimizer_offload or cfg.cpu_offload),
        "train.lora_rank=32": not cfg.lora_rank,
        "train.cpu_offload=true": not cfg.cpu_offload,
        "more ranks": True,
    }
    return [remedy for remedy, is_open in remedies.items() if is_open]


def _who_has_it(device: torch.device) -> str:
    """Of the memory of a GPU."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    gib = 2**30
    return (
        f": of its {total / gib:.1f} GiB this process has {ours / gib:.1f} and others have "
        f"{(total - free - ours) / gib:.1f}"
    )


def _total(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Values added up by name."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
