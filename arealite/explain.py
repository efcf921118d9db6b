"""What follows from an experiment's knobs: counts, ages and memory, before anything runs.

    prompts x group_size -> sequences -> tokens -> micro-batches -> optimizer steps -> version lag

Works on any config by the names of its fields, as in recipes/gsm8k_grpo.py. A line whose knobs are
missing is left out.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from arealite import dist
from arealite.gpu_plan import plan_gpus

_LABEL_WIDTH = 33
_VALUE_WIDTH = 15
_WIDTH = 100

# Numbers that training keeps per token, layer and hidden unit, without attention scores; the input
# alone if the layer is computed again. Source: arXiv:2205.05198 sections 4.1 and 5 (bytes / 2).
_KEPT = 17
_KEPT_WHEN_RECOMPUTED = 1
_COLUMNS = 4096
"""Of logits that exist at the same time: two tiles of training/logprobs.py."""

_BATCHES = {
    "prompts": "rollout.prompts_per_step",
    "rows": "rows_per_step",
    "pairs": "pairs_per_step",
}
"""What a step has so many of, and the knob that says it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One line of the table."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelShape:
    """What memory depends on."""

    name: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocabulary_size: int
    context_tokens: int | None
    linear_sizes: dict[str, int]
    """Rows and columns of all linear layers but the head, added up by the last part of the name."""

    def num_adapted(self, rank: int, layers: Sequence[str]) -> int:
        """Parameters of LoRA adapters of this rank beside these layers; beside all if empty."""
        sizes = self.linear_sizes
        return rank * sum(size for name, size in sizes.items() if not layers or name in layers)


def explain(cfg: object) -> str:
    """The derived numbers of `cfg` as a plain-text table of at most 100 columns.

    Counts are exact, or the label says that they are an upper bound. Memory is an estimate, for a
    model whose config can be read; else it is "unknown", which is no error here.
    """
    ranks, model = dist.world_size(), getattr(cfg, "model", None)
    shape = _model_shape(model) if isinstance(model, str) else None
    sections = {
        f"One training step on {_count(ranks, 'rank')}": _step_rows(cfg, ranks),
        "Age of the weights that sampled, counted from those in training": _age_rows(cfg),
        "The whole run": _run_rows(cfg),
        "Memory of the trainer (an estimate)": _memory_rows(cfg, shape, ranks),
        "A GPU that trainer and server share (an estimate)": _shared_gpu_rows(cfg, shape, ranks),
    }
    tables = ["\n".join([title, *map(_line, rows)]) for title, rows in sections.items() if rows]
    return "\n\n".join(tables) or "This config has no knobs that other numbers follow from."


def _step_rows(cfg: object, ranks: int) -> list[_Row]:
    prompts, group_size = _knob(cfg, "rollout.prompts_per_step"), _knob(cfg, "group_size")
    max_new_tokens, minibatches = _knob(cfg, "sampling.max_new_tokens"), _knob(cfg, "minibatches")
    rows: list[_Row] = []
    for label, knob in _BATCHES.items():
        if size := _knob(cfg, knob):
            share = f"{size // ranks:,} per rank"
            if size % ranks:
                share = f"DOES NOT DIVIDE by {_count(ranks, 'rank')}"
            rows.append(_row(label, size, f"{knob}; {share}"))
    if prompts and group_size:
        sequences = prompts * group_size
        rows.append(_row("sequences", sequences, f"{prompts} prompts x group_size {group_size}"))
        if max_new_tokens:
            note = f"x sampling.max_new_tokens {max_new_tokens:,}"
            rows.append(_row("response tokens, at most", sequences * max_new_tokens, note))
            note = "on top; not known before the rows are tokenized"
            rows.append(_Row(label="prompt tokens", value="unknown", note=note))
        if minibatches:
            rows += _minibatch_rows(cfg, -(-sequences // minibatches), ranks)
    if minibatches:
        rows.append(_row("optimizer steps", minibatches, "one per minibatch"))
    return rows


def _minibatch_rows(cfg: object, sequences: int, ranks: int) -> list[_Row]:
    """How one minibatch is cut; `sequences` is the size of the largest one."""
    share = -(-sequences // ranks)
    rows = [_row("sequences per minibatch", sequences, f"at most {share} on one rank")]
    length, capacity = _knob(cfg, "sampling.max_new_tokens"), _knob(cfg, "train.micro_batch_tokens")
    if not length or not capacity:
        return rows
    if length >= capacity:
        note = f"DOES NOT FIT, with its prompt, into train.micro_batch_tokens {capacity:,}"
        return [*rows, _row("longest response", length, note)]
    fitting = capacity // length
    note = (
        f"per rank and minibatch: {fitting:,} responses of full length fill "
        f"train.micro_batch_tokens {capacity:,}; prompts take more"
    )
    return [*rows, _row("micro-batches, without prompts", -(-share // fitting), note)]


def _age_rows(cfg: object) -> list[_Row]:
    staleness, minibatches = _knob(cfg, "rollout.max_staleness"), _knob(cfg, "minibatches")
    prompts, group_size = _knob(cfg, "rollout.prompts_per_step"), _knob(cfg, "group_size")
    if staleness is None:
        return []
    note = "rollout.max_staleness; 0 is synchronous"
    rows = [_row("versions behind, at most", staleness, note)]
    if minibatches:
        note = f"({staleness} + 1) x minibatches {minibatches} - 1, in the last minibatch"
        lag = (staleness + 1) * minibatches - 1
        rows.append(_row("optimizer steps behind, at most", lag, note))
    if prompts and group_size:
        limit = (staleness + 1) * prompts
        started = min(limit, _knob(cfg, "rollout.max_running_prompts") or limit)
        note = f"{started:,} prompts x group_size {group_size}"
        rows.append(_row("sequences in flight, at most", started * group_size, note))
    return rows


def _run_rows(cfg: object) -> list[_Row]:
    steps, minibatches = _knob(cfg, "steps"), _knob(cfg, "minibatches")
    prompts, group_size = _knob(cfg, "rollout.prompts_per_step"), _knob(cfg, "group_size")
    if not steps:
        return []
    rows = [_row("training steps", steps, "each makes one weight version")]
    if minibatches:
        note = f"x minibatches {minibatches}"
        rows.append(_row("optimizer steps", steps * minibatches, note))
    for label, knob in _BATCHES.items():
        if size := _knob(cfg, knob):
            rows.append(_row(label, steps * size, "the data set is repeated if it has fewer"))
    if prompts and group_size:
        sequences = prompts * group_size
        rows.append(_row("sequences", steps * sequences, "evaluations not counted"))
        rows += _generated_rows(cfg, steps, sequences)
    return rows


def _generated_rows(cfg: object, steps: int, sequences: int) -> list[_Row]:
    """Tokens of all steps, of so many sequences each; with `stages` some have smaller budgets."""
    budget = _knob(cfg, "sampling.max_new_tokens")
    if not budget:
        return []
    stages = (*getattr(cfg, "stages", ()), (steps, budget))
    lengths = [(until - since, most) for (since, _), (until, most) in pairwise([(0, 0), *stages])]
    total = sum(length * most for length, most in lengths)
    note = f"x sampling.max_new_tokens {budget:,}"
    if len(lengths) > 1:
        note = "stages: " + ", ".join(f"{length} steps x {most:,}" for length, most in lengths)
    return [_row("generated tokens, at most", sequences * total, note)]


def _memory_rows(cfg: object, shape: _ModelShape | str | None, ranks: int) -> list[_Row]:
    if shape is None:
        return []
    if isinstance(shape, str):
        return [_Row(label="parameters", value="unknown", note=shape)]
    need = _trainer_bytes(cfg, shape, ranks)
    rows = [_row("parameters", shape.num_parameters, shape.name)]
    if rank := _knob(cfg, "train.lora_rank"):
        note = f"adapters of train.lora_rank {rank}"
        rows.append(_row("trained parameters", need.gradients // 4, note))
    is_frozen = bool(_knob(cfg, "train.lora_rank")) and _is_half(cfg)
    weights_note = "as in the files, of all ranks" if is_frozen else "float32, of all ranks"
    rows += [
        _Row(label="weights", value=_bytes(need.weights), note=weights_note),
        _Row(label="gradients", value=_bytes(need.gradients), note="float32, of all ranks"),
        _Row(label="AdamW states", value=_bytes(need.states), note="2 x float32, of all ranks"),
        _Row(
            label="sum per rank",
            value=_bytes(need.per_rank),
            note=f"FSDP over {_count(ranks, 'rank')}; one gathered block comes on top",
        ),
    ]
    if critic := getattr(cfg, "critic", None):
        its_need = _trainer_bytes(SimpleNamespace(train=critic), shape, ranks)
        note = "weights, gradients and AdamW states of a second model of this size, on top"
        rows.append(_Row(label="critic, per rank", value=_bytes(its_need.per_rank), note=note))
    return rows + _micro_batch_memory_rows(cfg, shape, need) + _context_rows(cfg, shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TrainerBytes:
    """What training takes, of all ranks together but for the micro-batch."""

    weights: int
    gradients: int
    states: int
    is_offloaded: bool  # the states, but for the optimizer step
    ranks: int
    activations: int
    logits: int

    @property
    def per_rank(self) -> int:
        """Without what a micro-batch takes."""
        return (self.weights + self.gradients + self.states) // self.ranks

    @property
    def kept_per_rank(self) -> int:
        """Also while nobody trains."""
        return (self.weights + (0 if self.is_offloaded else self.states)) // self.ranks

    @property
    def most_per_rank(self) -> int:
        """In the middle of a step, or with states from elsewhere maybe at its end."""
        step = self.gradients // self.ranks
        brought = self.states // self.ranks if self.is_offloaded else 0
        return self.kept_per_rank + step + max(brought, self.activations + self.logits)


def _trainer_bytes(cfg: object, shape: _ModelShape, ranks: int) -> _TrainerBytes:
    is_half = _is_half(cfg)
    num_trained, weights = shape.num_parameters, 4 * shape.num_parameters
    if rank := _knob(cfg, "train.lora_rank"):
        layers = getattr(getattr(cfg, "train", None), "lora_layers", ())
        num_trained = shape.num_adapted(rank, layers)
        weights = (2 if is_half else 4) * shape.num_parameters + 4 * num_trained
    num_tokens = _knob(cfg, "train.micro_batch_tokens") or 0
    is_recomputed = _knob(cfg, "train.activation_checkpointing")
    kept = shape.num_layers * (_KEPT_WHEN_RECOMPUTED if is_recomputed else _KEPT)
    kept += _KEPT if is_recomputed else 0  # the one layer that is being computed again
    return _TrainerBytes(
        weights=weights,
        gradients=4 * num_trained,
        states=8 * num_trained,
        is_offloaded=bool(_knob(cfg, "train.optimizer_offload")),
        ranks=ranks,
        activations=kept * num_tokens * shape.hidden_size * (2 if is_half else 4),
        logits=4 * num_tokens * min(shape.vocabulary_size, _COLUMNS),
    )


def _micro_batch_memory_rows(cfg: object, shape: _ModelShape, need: _TrainerBytes) -> list[_Row]:
    num_tokens = _knob(cfg, "train.micro_batch_tokens")
    if not num_tokens:
        return []
    dtype = "bfloat16" if _is_half(cfg) else "float32"
    how = ", with checkpointing" if _knob(cfg, "train.activation_checkpointing") else ""
    note = f"roughly; {num_tokens:,} tokens in {dtype}{how}"
    width = min(shape.vocabulary_size, _COLUMNS)
    logits_note = f"float32, {width:,} of {shape.vocabulary_size:,} columns at a time"
    return [
        _Row(label="activations of a micro-batch", value=_bytes(need.activations), note=note),
        _Row(label="logits of a micro-batch", value=_bytes(need.logits), note=logits_note),
    ]


def _shared_gpu_rows(cfg: object, shape: _ModelShape | str | None, ranks: int) -> list[_Row]:
    """What is left of a GPU that trainer and server share; nothing where they do not."""
    server: Any = getattr(cfg, "server", None)
    knobs = ("addresses", "gpus", "memory_share", "sleep")
    total = _gpu_bytes()
    if (
        total is None
        or not isinstance(shape, _ModelShape)
        or not all(hasattr(server, knob) for knob in knobs)
    ):
        return []
    plan = plan_gpus(server.gpus, server.memory_share)
    if server.addresses or not plan.is_shared:
        return []
    need, served = _trainer_bytes(cfg, shape, ranks), int(plan.memory_share * total)
    if _knob(cfg, "train.cpu_offload"):
        need = replace(need, weights=0, gradients=0, states=0)
    beside = 0 if server.sleep else served
    copied = 2 * shape.num_parameters if getattr(server, "transport", "") == "ipc" else 0
    copy_note = "roughly; server.transport=ipc keeps them on the GPU"
    return [
        _Row(label="memory of the GPU", value=_bytes(total), note="as CUDA reports it"),
        _Row(
            label="server",
            value=_bytes(served),
            note=f"server.memory_share {plan.memory_share:g}"
            + (", which sleeps while the trainer works" if server.sleep else ""),
        ),
        *([_Row(label="weights for it", value=_bytes(copied), note=copy_note)] if copied else []),
        _left("left while servers generate", total - copied - served - need.kept_per_rank),
        _left("left while the trainer works", total - copied - beside - need.most_per_rank),
    ]


def _left(label: str, number: int) -> _Row:
    if number >= 0:
        return _Row(label=label, value=_bytes(number), note="before what CUDA itself takes")
    note = (
        f"TOO LITTLE, by {_bytes(-number)}: lower train.micro_batch_tokens or server.memory_share, "
        "set train.activation_checkpointing, server.sleep, train.optimizer_offload or lora_rank"
    )
    return _Row(label=label, value="none", note=note)


def _gpu_bytes() -> int | None:
    """Memory of the first GPU, if there is one."""
    return torch.cuda.mem_get_info(0)[1] if torch.cuda.is_available() else None


def _is_half(cfg: object) -> bool:
    """Whether the trainer computes in half precision."""
    dtype = getattr(getattr(cfg, "train", None), "dtype", "auto")
    return dtype == "bfloat16" or (dtype == "auto" and torch.cuda.is_available())


def _context_rows(cfg: object, shape: _ModelShape) -> list[_Row]:
    length, context = _knob(cfg, "sampling.max_new_tokens"), shape.context_tokens
    if not length or not context or length < context:
        return []
    note = f"TOO SHORT for a prompt and sampling.max_new_tokens {length:,}"
    return [_row("context of the model", context, note)]


def _model_shape(name: str) -> _ModelShape | str:
    """Sizes of a model from its config alone, or why they are unknown."""
    try:
        return _read_model_shape(name)
    except Exception as error:  # a folder of any sort or a network: neither may end an explanation
        return f"{name} cannot be read: " + textwrap.shorten(str(error), 300, placeholder=" ...")


def _read_model_shape(name: str) -> _ModelShape:
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds to import

    from arealite.data import resolve_model

    folder = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        config = AutoConfig.from_pretrained(folder)  # not downloaded yet
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text_config = config.get_text_config()
    linear_sizes = Counter[str]()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            linear_sizes[path.rpartition(".")[2]] += module.in_features + module.out_features
    return _ModelShape(
        name=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=text_config.num_hidden_layers,
        hidden_size=text_config.hidden_size,
        vocabulary_size=text_config.vocab_size,
        context_tokens=getattr(text_config, "max_position_embeddings", None),
        linear_sizes=linear_sizes,
    )


def _knob(cfg: object, key: str) -> int | None:
    """The whole number or switch at a dotted key; None if this config has no such thing."""
    value = cfg
    for name in key.split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, int) else None


def _row(label: str, value: int, note: str) -> _Row:
    return _Row(label=label, value=f"{value:,}", note=note)


def _line(row: _Row) -> str:
    start = f"  {row.label:<{_LABEL_WIDTH}}{row.value:>{_VALUE_WIDTH}}  "
    return "\n".join(
        textwrap.wrap(row.note, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
    )


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def _bytes(number: int) -> str:
    unit, name = (2**30, "GiB") if number >= 2**30 else (2**20, "MiB")
    return f"{number / unit:,.1f} {name}"
