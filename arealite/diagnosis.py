"""Why server and trainer disagree: every known mistake is tried, and the one that fits is named.

    samples --plain transformers, one sequence at a time--> the log-probs that are right
                                                            and those that each mistake would give
    a side that is far from the right ones, and close to those of a mistake, made that mistake

Nothing is concluded from what merely looks alike: a mistake is named only if it leaves less than
`EXPLAINS` of the gap, and no more than rounding does; without one the cause is unknown. Slow, and
only for a run that has to stop anyway. L tokens in a sample, K of them compared, V vocabulary.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from arealite.data.models import load_tokenizer, resolve_model
from arealite.errors import ArealiteError

EXPLAINS = 0.25
"""Share of the gap that may be left over once its cause is known: rounding."""
TEMPERATURES = [n / 20 for n in range(2, 41)]
TOP_K = (1, 2, 3, 4, 5, 8, 10, 16, 20, 30, 32, 40, 50, 64, 100, 128, 200, 256, 512, 1000)
TOP_P = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98, 0.99)
MAX_OUTSIDE = 0.02
"""Share of tokens that rounding may put outside of the support that they were sampled from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One trajectory, and what both sides say about K of the tokens that the policy sampled."""

    token_ids: list[int]  # [L]
    places: list[int]  # [K] of these tokens; ascending, none is 0
    server: list[float]  # [K] behavior log-probs
    trainer: list[float] = field(default_factory=list)  # [K] as it computes them in a batch
    alone: list[float] = field(default_factory=list)  # [K] with this sequence alone in the batch
    temperature: float
    is_mixed: bool = False  # other weights have sampled tokens of it, too


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """How far what a mistake would give is from what a side says, in nats per token."""

    side: str  # server or trainer
    mistake: str  # its name
    detail: str  # which of its kind, and what to do
    distance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What was found out."""

    gap: float  # mean abs(server - trainer)
    server_gap: float  # mean abs(server - plain transformers)
    trainer_gap: float  # mean abs(trainer - plain transformers)
    causes: list[Finding]  # those that explain the sides that are wrong, the best first
    tried: list[Finding]  # all, the closest first

    @property
    def is_server_wrong(self) -> bool:
        """Whether the server does not compute what the trainer's weights give."""
        return self.server_gap > EXPLAINS * self.gap

    def __str__(self) -> str:
        if self.causes:
            best, *others = self.causes
            also = "".join(f" Another that fits: {other.mistake}." for other in others)
            return f"Cause: {best.mistake}. {best.detail}{also}"
        closest: dict[tuple[str, str], float] = {}
        for finding in self.tried:
            closest.setdefault((finding.mistake, finding.side), finding.distance)
        left_over = "; ".join(
            f"{mistake} {distance:.4f} ({side})"
            for (mistake, side), distance in closest.items()
            if math.isfinite(distance)
        )
        return (
            "Cause unknown: no known mistake explains it. Compared with plain transformers the "
            f"server is off by {self.server_gap:.4f}, the trainer by {self.trainer_gap:.4f}. What "
            f"would be left over after each mistake: {left_over}."
        )


class Reference:
    """A model as plain transformers computes it: float32, one sequence at a time, no packing.

    Args:
        model: folder or Hub id, as for the trainer.
        weights: the tensors to use instead of those of the model, by their names there.
    """

    def __init__(self, model: str, weights: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in weights}
        with tempfile.TemporaryDirectory(prefix="arealite-reference-") as folder:
            source = resolve_model(model)
            if tensors:
                AutoConfig.from_pretrained(source).save_pretrained(folder)
                save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
                source = folder
            self._model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self._model.eval()

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """Logits [K, V] from which the tokens at these places were drawn, temperature 1."""
        logits = self._model(torch.tensor([list(token_ids)])).logits[0]
        return logits[torch.tensor(places) - 1].float()

    def logprobs(self, samples: list[Sample]) -> torch.Tensor:
        """Of the tokens of all samples [K], each at the temperature of its sample."""
        return torch.cat(
            [_at(self.logits(s.token_ids, s.places), s, s.temperature) for s in samples]
        )

    def gap(self, samples: list[Sample]) -> float:
        """Mean abs(server - this) of them."""
        return _distance(_joined(samples, "server"), self.logprobs(samples))

    def with_head_of(self, other: "Reference") -> "Reference":
        """The same but for the head; the embedding stays, tied or not."""
        return self._changed(lambda model: model.set_output_embeddings(_head_of(other._model)))

    def with_layers_of(self, other: "Reference") -> "Reference":
        """The same embedding and head around the layers of another."""

        def change(model: Any) -> None:
            ends = {id(_weight(model, "input")), id(_weight(model, "output"))}
            theirs = dict(other._model.named_parameters())
            for name, tensor in model.named_parameters():
                if id(tensor) not in ends:
                    tensor.copy_(theirs[name])

        return self._changed(change)

    def rounded(self, through: Callable[[torch.Tensor], torch.Tensor]) -> "Reference":
        """The same with each tensor put through a conversion."""

        def convert(model: Any) -> None:
            for tensor in model.parameters():
                tensor.data = through(tensor.data).float()

        return self._changed(convert)

    def _changed(self, change: Callable[[Any], None]) -> "Reference":
        changed = copy.copy(self)
        changed._model = copy.deepcopy(self._model)
        with torch.no_grad():
            change(changed._model)
        return changed


def _weight(model: Any, end: str) -> torch.Tensor:
    return getattr(model, f"get_{end}_embeddings")().weight


def _head_of(model: Any) -> torch.nn.Module:
    head = model.get_output_embeddings()
    alone = torch.nn.Linear(head.in_features, head.out_features, bias=False)
    alone.weight = torch.nn.Parameter(head.weight.detach().clone())
    return alone


def diagnose(
    samples: list[Sample],
    model: str,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    limit: float,
) -> Diagnosis:
    """Find the mistake, if it is a known one.

    Args:
        samples: a few hundred tokens are enough; all of the version of `weights`.
        model: folder or Hub id that server and trainer began with.
        weights: what the trainer has now, as `TrainEngine.named_weights` gives it.
        limit: a cause may leave no larger gap than this, in nats per token.
    """
    server, trainer = _joined(samples, "server"), _joined(samples, "trainer")
    gap = _distance(server, trainer)
    now = Reference(model, weights)
    logits = [now.logits(sample.token_ids, sample.places) for sample in samples]
    right = torch.cat(
        [_at(each, s, s.temperature) for each, s in zip(logits, samples, strict=True)]
    )
    server_gap, trainer_gap = _distance(server, right), _distance(trainer, right)
    sides = {"server": (server, server_gap), "trainer": (trainer, trainer_gap)}
    wrong = {name: side for name, (side, off) in sides.items() if off > EXPLAINS * gap}
    tried = [
        Finding(side=name, mistake=mistake, detail=detail, distance=_distance(side, would_be))
        for mistake, detail, would_be in _mistakes(samples, logits, now, model)
        for name, side in wrong.items()
        if mistake != PACKING_LEAK
    ]
    if "trainer" in wrong:
        tried.append(
            Finding(
                side="trainer",
                mistake=PACKING_LEAK,
                detail="The trainer is right about a sequence that is alone in its batch: the "
                "model's attention sees past the ends of packed sequences. Train another model.",
                distance=_distance(right, _joined(samples, "alone")),
            )
        )
    tried.sort(key=lambda finding: finding.distance)
    found = [finding for finding in tried if finding.distance <= min(limit, EXPLAINS * gap)]
    # Each side that is wrong needs a reason of its own.
    is_explained = all(any(finding.side == side for finding in found) for side in wrong)
    return Diagnosis(
        gap=gap,
        server_gap=server_gap,
        trainer_gap=trainer_gap,
        causes=_best_of_each(found) if is_explained else [],
        tried=tried,
    )


TEMPERATURE = "temperature ignored"
OTHER_TEMPERATURE = "other temperature"
SUPPORT = "top-p or top-k support"
SHIFT = "shift by one"
STALE = "stale weights"
TIED_HEAD = "tied head not updated"
DTYPE = "wrong dtype"
TEMPLATE = "other tokenizer or template"
PACKING_LEAK = "packing leak"

_Mistake = tuple[str, str, torch.Tensor]  # its name, its detail, the log-probs [K of all samples]


def _mistakes(
    samples: list[Sample], logits: list[torch.Tensor], now: Reference, model: str
) -> Iterator[_Mistake]:
    yield from _of_sampling(samples, logits)
    yield from _of_alignment(samples, now)
    yield from _of_weights(samples, now, model)
    yield from _of_prompts(samples, now, model)


def _of_sampling(samples: list[Sample], logits: list[torch.Tensor]) -> Iterator[_Mistake]:
    pairs = list(zip(logits, samples, strict=True))
    if any(sample.temperature not in (0, 1) for sample in samples):
        yield (
            TEMPERATURE,
            "The log-probs are those at temperature 1. Start vLLM with --logprobs-mode "
            "processed_logprobs, as `arealite serve` does.",
            torch.cat([_at(each, sample, 1.0) for each, sample in pairs]),
        )
    for temperature in TEMPERATURES:
        if temperature != 1.0 or all(sample.temperature == 1 for sample in samples):
            yield (
                OTHER_TEMPERATURE,
                f"The log-probs are those at temperature {temperature:g}. Sample and train at the "
                "same one.",
                torch.cat([_at(each, sample, temperature) for each, sample in pairs]),
            )
    advice = "The log-probs are of what is left by {}. Sample from the whole vocabulary."
    for k in TOP_K:
        yield (
            SUPPORT,
            advice.format(f"top_k={k}"),
            torch.cat([_within(each, sample, _largest(k)) for each, sample in pairs]),
        )
    for p in TOP_P:
        yield (
            SUPPORT,
            advice.format(f"top_p={p:g}"),
            torch.cat([_within(each, sample, _nucleus(p)) for each, sample in pairs]),
        )


def _of_alignment(samples: list[Sample], now: Reference) -> Iterator[_Mistake]:
    for step, words in ((1, "after"), (-1, "before")):
        yield (
            SHIFT,
            f"Each log-prob belongs to the token {words} the one it is given for.",
            torch.cat([_neighbours(sample, now, step) for sample in samples]),
        )


def _of_weights(samples: list[Sample], now: Reference, model: str) -> Iterator[_Mistake]:
    first = Reference(model)
    yield (
        STALE,
        f"The weights are those of {model}: no update has arrived.",
        first.logprobs(samples),
    )
    yield (
        STALE,
        f"Embedding and head are up to date, the layers are those of {model}.",
        now.with_layers_of(first).logprobs(samples),
    )
    yield (
        TIED_HEAD,
        f"The head is that of {model}, the rest is up to date. vLLM packs the head apart from the "
        "embedding: start servers with `arealite serve`, which packs it again.",
        now.with_head_of(first).logprobs(samples),
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        yield (
            DTYPE,
            f"The weights are rounded to {str(dtype).removeprefix('torch.')}.",
            now.rounded(lambda tensor, to=dtype: tensor.to(to)).logprobs(samples),
        )
    for read, written in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        names = [str(dtype).removeprefix("torch.") for dtype in (written, read)]
        yield (
            DTYPE,
            f"The bytes of {names[0]} weights are read as {names[1]}.",
            now.rounded(lambda tensor, w=written, r=read: tensor.to(w).view(r)).logprobs(samples),
        )


def _of_prompts(samples: list[Sample], now: Reference, model: str) -> Iterator[_Mistake]:
    """The server has answered something else than what stands in the trajectory."""
    try:
        tokenizer: Any = load_tokenizer(model)
    except ArealiteError:
        return
    for words, change in _other_prompts(tokenizer):
        parts = []
        for sample in samples:
            cut = sample.places[0]
            prompt = change(sample.token_ids[:cut])
            if not prompt:
                break
            places = [place - cut + len(prompt) for place in sample.places]
            other = now.logits([*prompt, *sample.token_ids[cut:]], places)
            parts.append(_at(other, sample, sample.temperature))
        else:
            yield TEMPLATE, f"The answers are to {words}.", torch.cat(parts)


def _other_prompts(tokenizer: Any) -> Iterator[tuple[str, Callable[[list[int]], list[int]]]]:
    """In words, and from the ids of the prompt; no ids where it cannot be made."""

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    def encoded(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def question_of(ids: list[int]) -> str:
        """What the template was filled with."""
        before, _, after = _rendered(tokenizer, "\x00").partition("\x00")
        text = text_of(ids)
        fits = text.startswith(before) and text.endswith(after) and before + after
        return text[len(before) : len(text) - len(after)] if fits else ""

    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None:
        yield "the prompt with another begin token", lambda ids: [begin, *ids]
        yield (
            "the prompt without its begin token",
            lambda ids: ids[1:] if ids[0] == begin else [],
        )
    yield "the prompt with an end token behind it", lambda ids: [*ids, end]
    yield (
        "the prompt without its special tokens",
        lambda ids: [i for i in ids if i not in tokenizer.all_special_ids],
    )
    yield (
        "the prompt as its text is tokenized, with what the tokenizer adds",
        lambda ids: list(tokenizer.encode(text_of(ids))),
    )
    yield "the bare question, without the chat template", lambda ids: encoded(question_of(ids))
    yield (
        "the question in the chat template without its generation prompt",
        lambda ids: _or_nothing(
            question_of(ids),
            lambda text: encoded(_rendered(tokenizer, text, add_generation_prompt=False)),
        ),
    )
    yield (
        "the rendered prompt as the question of another chat template",
        lambda ids: encoded(_rendered(tokenizer, text_of(ids))),
    )
    yield "the prompt without its first token", lambda ids: ids[1:]
    yield "the prompt without its last token", lambda ids: ids[:-1]


def _or_nothing(text: str, make: Callable[[str], list[int]]) -> list[int]:
    return make(text) if text else []


def _rendered(tokenizer: Any, question: str, *, add_generation_prompt: bool = True) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )


# --- Log-probs [K] out of logits [K, V] -----------------------------------------------------------


def _at(logits: torch.Tensor, sample: Sample, temperature: float) -> torch.Tensor:
    """Of the sample's tokens; temperature 0 counts as 1."""
    return _chosen((logits / (temperature or 1.0)).log_softmax(-1), sample)


def _chosen(logprobs: torch.Tensor, sample: Sample) -> torch.Tensor:
    tokens = torch.tensor([sample.token_ids[place] for place in sample.places])
    return logprobs.gather(1, tokens[:, None])[:, 0]


def _within(
    logits: torch.Tensor, sample: Sample, support: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The same from a part of the vocabulary; -inf outside of it."""
    logprobs = (logits / (sample.temperature or 1.0)).log_softmax(-1)
    inside = logprobs.masked_fill(~support(logprobs), -torch.inf)
    return _chosen(inside.log_softmax(-1), sample)


def _largest(k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def support(logprobs: torch.Tensor) -> torch.Tensor:
        least = logprobs.topk(min(k, logprobs.shape[-1])).values[:, -1:]
        return logprobs >= least

    return support


def _nucleus(p: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def support(logprobs: torch.Tensor) -> torch.Tensor:
        ordered, order = logprobs.sort(descending=True)
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        return torch.zeros_like(logprobs, dtype=torch.bool).scatter(1, order, mass_before < p)

    return support


def _neighbours(sample: Sample, now: Reference, step: int) -> torch.Tensor:
    """The log-probs of the tokens one place further on, or back; nan where there is none."""
    places = [place + step for place in sample.places]
    inside = [min(max(place, 1), len(sample.token_ids) - 1) for place in places]
    logits = now.logits(sample.token_ids, inside)
    logprobs = _at(logits, replace(sample, places=inside), sample.temperature)
    # A neighbour that the policy did not sample has a log-prob, but no side has computed it.
    sampled = set(sample.places)
    is_known = torch.tensor([place in sampled for place in places])
    return logprobs.masked_fill(~is_known, torch.nan)


def _joined(samples: list[Sample], side: str) -> torch.Tensor:
    return torch.tensor([value for sample in samples for value in getattr(sample, side)])


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Mean absolute difference where both are known; infinite where too few are."""
    difference = (left - right).abs()
    difference = difference[~difference.isnan()]
    is_finite = difference.isfinite()
    if len(difference) < len(left) / 2 or (~is_finite).sum() > MAX_OUTSIDE * len(left):
        return float("inf")
    return float(difference[is_finite].double().mean())


def _best_of_each(found: list[Finding]) -> list[Finding]:
    """Of every mistake the closest; others only where they fit nearly as well as the best."""
    best: dict[tuple[str, str], Finding] = {}
    for finding in found:
        best.setdefault((finding.side, finding.mistake), finding)
    kept: list[Finding] = []
    for side in dict.fromkeys(finding.side for finding in found):
        first, *others = [finding for finding in best.values() if finding.side == side]
        kept += [first, *(other for other in others if other.distance < 1.5 * first.distance)]
    return kept
