"""Do server and trainer compute the same log-probs? If not, the run stops and says why.

    before the first step   the push names every tensor of the model; new weights arrive, the head's
                            too; packed sequences do not see each other; fresh tokens agree
    in each step            tokens that the current weights sampled agree
    in each evaluation      the same, of some of its samples

On failure `diagnosis` tries every known mistake and names the one that fits.
"""

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from arealite import background, dist
from arealite.api import InferenceEngine, RolloutWorkflow, TrainEngine
from arealite.config import check_at_least
from arealite.diagnosis import (
    PACKING_LEAK,
    STALE,
    TIED_HEAD,
    Diagnosis,
    Reference,
    Sample,
    diagnose,
)
from arealite.errors import ArealiteError, GateError
from arealite.rollout.executor import RolloutConfig, run_episodes
from arealite.training.checkpoint_tensors import CheckpointTensors
from arealite.training.packing import attach, pack, select
from arealite.types import MicroBatch, ModelRequest, Row, SamplingParams, Trajectory
from arealite.weights import push_tensors

MAX_FRESH = 32
MAX_SAMPLES = 16
MAX_PLACES = 64
"""So many sequences, and sampled tokens of each, are evidence enough."""
CANARY = SamplingParams(temperature=0.0, max_new_tokens=8)
CANARY_PROMPTS = 4

Weights = Iterator[tuple[str, torch.Tensor]]
Answer = tuple[list[int], list[float]]  # token ids and log-probs
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a run stops because server and trainer disagree."""

    max_logprob_gap: float = 0.03
    """Mean |server - trainer| log-prob over tokens of the current weights, in nats. Rounding in
    bfloat16 makes .001 to .01. With server.kv=reuse it has to be larger: behind an update, servers
    go on with a cache of the old weights."""
    start_prompts: int = 4
    """Rows that each rank asks before the first step, to compare fresh tokens; 0 leaves out
    everything that is checked then."""

    def __post_init__(self) -> None:
        check_at_least(self, max_logprob_gap=0, start_prompts=0)


class LogprobGate:
    """Compares what the server says about its tokens with what the trainer computes for them.

    Every method is a collective, and raises GateError on every rank.

    Args:
        model: folder or Hub id that server and trainer began with.
        max_tokens: tokens in one forward pass of the trainer.
        out_dir: where `gate_failure.json` goes, the evidence of a run that was stopped.
    """

    def __init__(
        self,
        train_engine: TrainEngine,
        inference_engine: InferenceEngine,
        model: str,
        cfg: GateConfig,
        *,
        max_tokens: int,
        out_dir: str | Path,
    ) -> None:
        self._train_engine = train_engine
        self._inference_engine = inference_engine
        self._model = model
        self._cfg = cfg
        self._max_tokens = max_tokens
        self._out_dir = Path(out_dir)
        self._tensors = CheckpointTensors(model)
        self._spent_s = 0.0

    def check_start(
        self,
        workflow: RolloutWorkflow,
        rows: Sequence[Row],
        limits: RolloutConfig | type[RolloutConfig] = RolloutConfig,
    ) -> dict[str, float]:
        """All that can be checked before the first step, with weights that were just pushed.

        Args:
            workflow: the one to train with: its sampling parameters are what has to agree.
            rows: of the data set, the same on every rank; the first few are asked.
            limits: as in `run_episodes`.
        """
        if self._cfg.start_prompts == 0:
            return {}
        asked = dist.shard(rows[: self._cfg.start_prompts * dist.world_size()])
        ask = partial(run_episodes, self._inference_engine, workflow, asked, limits=limits)
        return self._timed(lambda: self._check_start(ask))

    def check(self, minibatches: list[list[MicroBatch]], version: int) -> dict[str, float]:
        """Compare tokens of a batch that the current weights sampled; metrics, see `observe`.

        Rollouts that wait until they are trained on are older than the weights they meet, so that
        a batch may have no token of its own version.

        Args:
            minibatches: with `proximal_logprobs` attached, computed with the weights of `version`.
        """
        return self._timed(lambda: self._compare(minibatches, version))

    def check_fresh(self, groups: list[list[Trajectory]]) -> dict[str, float]:
        """Compare trajectories that were just sampled, such as those of an evaluation.

        The first few of each rank are enough: a forward pass over all costs more than it shows.
        """
        version = self._inference_engine.version
        some = list(itertools.islice(itertools.chain(*groups), MAX_FRESH))
        return self._timed(lambda: self._compare(self._scored([some]), version))

    def _timed(self, check: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The metrics of a check, and how long all of them have taken so far."""
        began_s = time.monotonic()
        metrics = check()
        self._spent_s += time.monotonic() - began_s
        return metrics | {"gate/time_s": self._spent_s}

    def _check_start(self, ask: Callable[[], list[list[Trajectory]]]) -> dict[str, float]:
        self._check_names()
        groups = ask()
        version = self._inference_engine.version
        minibatches = self._scored(groups)
        samples = self._samples(minibatches, version)
        self._check_packing(samples)
        metrics = self._compare(minibatches, version)
        if samples and (trouble := self._what_does_not_arrive(samples)):
            raise GateError(f"New weights do not reach the servers as they should. {trouble}")
        return metrics

    # --- Tokens -----------------------------------------------------------------------------------

    def _scored(self, groups: list[list[Trajectory]]) -> list[list[MicroBatch]]:
        """Packed, with the trainer's log-probs; nothing if no rank has any trajectory."""
        if dist.sum([sum(map(len, groups))]) == [0]:
            return []
        minibatches = pack(
            groups,
            [[0.0] * len(group) for group in groups],
            num_minibatches=1,
            max_tokens=self._max_tokens,
            aggregation="token",
        )
        engine = self._train_engine
        return [attach(mbs, proximal_logprobs=engine.logprobs(mbs)) for mbs in minibatches]

    def _compare(self, minibatches: list[list[MicroBatch]], version: int) -> dict[str, float]:
        metrics = logprob_metrics(minibatches, version)
        # Written so that nan stops the run, too.
        if not metrics.get("gate/logprob_gap_mean", 0.0) <= self._cfg.max_logprob_gap:
            self._stop(minibatches, version, metrics)
        return metrics

    def _stop(
        self, minibatches: list[list[MicroBatch]], version: int, metrics: dict[str, float]
    ) -> None:
        if dist.rank() == 0:
            with contextlib.suppress(ArealiteError):  # the run stops for the gap, not for this
                self._inference_engine.resume()  # it may sleep while we train, and is to be asked
        samples = self._samples(minibatches, version)
        found = dist.broadcast(self._on_rank_0(lambda weights: self._diagnosed(samples, weights)))
        cause = str(found)
        if isinstance(found, Diagnosis) and found.is_server_wrong and not found.causes:
            cause = self._what_a_push_mends(samples) or self._what_does_not_arrive(samples) or cause
        raise GateError(
            f"Server and trainer disagree by {metrics['gate/logprob_gap_mean']:.4f} nats per token "
            f"about tokens that the current weights (version {version}) sampled; "
            f"gate.max_logprob_gap is {self._cfg.max_logprob_gap:g}. {cause} "
            f"Evidence: {self._write_evidence(samples, metrics, cause)}"
        )

    def _diagnosed(self, samples: list[Sample], weights: Weights) -> Diagnosis | str:
        try:
            return diagnose(samples, self._model, weights, limit=self._cfg.max_logprob_gap)
        except Exception as error:  # the run stops for the gap, not for this
            return f"Its cause could not be looked for: {type(error).__name__}: {error}"

    def _write_evidence(self, samples: list[Sample], metrics: dict[str, float], cause: str) -> Path:
        """Tokens and what both sides say about them, for whoever looks for the cause."""
        path = self._out_dir / "gate_failure.json"
        if dist.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            evidence = {"cause": cause, "metrics": metrics, "samples": list(map(asdict, samples))}
            path.write_text(json.dumps(evidence, indent=1))
        return path

    def _samples(self, minibatches: list[list[MicroBatch]], version: int) -> list[Sample]:
        """Some sequences of all ranks that have tokens of this version, the same on every rank."""
        mine = list(itertools.islice(_sequences(minibatches, version), MAX_SAMPLES))
        chosen = list(itertools.chain(*dist.gather(mine)))[:MAX_SAMPLES]
        alone = self._train_engine.logprobs([mb for mb, _ in chosen])
        return [
            Sample(
                token_ids=mb.token_ids.tolist(),
                places=places,
                server=mb.behavior_logprobs[places].tolist(),
                trainer=mb.proximal_logprobs[places].tolist(),
                alone=logprobs[places].tolist(),
                temperature=float(mb.temperature[places[0]]),
                is_mixed=bool((mb.versions[mb.loss_mask] != version).any()),
            )
            for (mb, places), logprobs in zip(chosen, alone, strict=True)
        ]

    def _check_packing(self, samples: list[Sample]) -> None:
        gaps = [abs(a - b) for s in samples for a, b in zip(s.trainer, s.alone, strict=True)]
        gap = sum(gaps) / max(1, len(gaps))
        if not gap <= self._cfg.max_logprob_gap:
            raise GateError(
                f"The trainer's log-probs of packed sequences are {gap:.4f} nats per token off "
                f"those of the same sequences alone. Cause: {PACKING_LEAK}. The model's attention "
                "sees past the ends of packed sequences: train another model, such as Qwen2."
            )

    # --- Weights ----------------------------------------------------------------------------------

    def _check_names(self) -> None:
        """Every tensor of the model folder is in the push, with its shape and dtype."""
        pushed = {
            name: (tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._train_engine.named_weights()
        }
        problems = self._tensors.unaccounted(pushed) if dist.rank() == 0 else []
        if problems := dist.broadcast(problems):
            raise GateError(
                f"What is pushed to the servers is not the model in {self._model}: "
                f"{'; '.join(problems[:5])}{'; and more' if problems[5:] else ''}."
            )

    def _what_does_not_arrive(self, samples: list[Sample]) -> str:
        """Push weights that must change the answers in a known way; the cause if they do not.

        The vocabulary in reverse order, in embedding and head, is the same model with other ids
        for its tokens: a prompt in these has the same answer in these, token by token. A server
        that kept its old head answers in the old ids; one that took nothing, as before. Afterwards
        it has the true weights again.
        """
        prompts = [sample.token_ids[: sample.places[0]] for sample in samples[:CANARY_PROMPTS]]
        turned = [self._tensors.reversed_ids(prompt) for prompt in prompts]
        before = self._ask(prompts)
        self._push(self._tensors.reversed_vocabulary)
        untouched, renamed = self._ask(prompts), self._ask(turned)
        self._push(self._tensors.louder_layers)
        louder = self._ask(prompts)
        self._push(lambda weights: weights)
        after = self._ask(prompts)
        if self._agree(untouched, before):
            return f"Cause: {STALE}. The server answers as before after a push of other weights."
        if self._agree(renamed, before):
            return (
                f"Cause: {TIED_HEAD}. The pushed embedding arrives, the head does not. vLLM packs "
                "the head apart: start servers with `arealite serve`, which packs it again."
            )
        if not self._agree([(self._tensors.reversed_ids(ids), lp) for ids, lp in renamed], before):
            return f"Cause: {STALE}. A pushed embedding and head do not arrive whole."
        if not self._agree(after, before):
            return f"Cause: {STALE}. The server does not come back to weights that it had before."
        if self._agree(louder, before) and self._layers_stayed(prompts, louder):
            return f"Cause: {STALE}. The layers that are pushed do not arrive."
        return ""

    def _layers_stayed(self, prompts: list[list[int]], answers: list[Answer]) -> bool:
        """Whether answers after a push of louder layers are those of the true ones.

        Loudness may change little; then only a model that is computed here can tell.
        """
        samples = [
            Sample(
                token_ids=prompt + token_ids,
                places=[len(prompt) + i for i in range(len(token_ids))],
                server=logprobs,
                temperature=CANARY.temperature,
            )
            for prompt, (token_ids, logprobs) in zip(prompts, answers, strict=True)
        ]
        true = self._reference(lambda weights: weights)
        louder = self._reference(self._tensors.louder_layers)
        if true is None or louder is None:
            return dist.broadcast(False)
        gap = true.gap(samples)
        return dist.broadcast(gap < louder.gap(samples) and gap <= self._cfg.max_logprob_gap)

    def _reference(self, change: Callable[[Weights], Weights]) -> Reference | None:
        """The trainer's weights, changed, in plain transformers; only rank 0 has it."""
        return self._on_rank_0(lambda weights: Reference(self._model, change(weights)))

    def _on_rank_0(self, work: Callable[[Weights], Result]) -> Result | None:
        """What rank 0 makes of the trainer's weights, which all ranks gather together."""
        weights = self._train_engine.named_weights()
        result = work(weights) if dist.rank() == 0 else None
        for _ in weights:
            pass
        return result

    def _what_a_push_mends(self, samples: list[Sample]) -> str:
        """The cause, if new samples agree once the same weights are pushed again."""
        if any(sample.is_mixed for sample in samples):
            return ""  # these may differ because the cache of older weights was kept
        self._push(lambda weights: weights)
        groups = [self._sampled_again(samples)] if dist.rank() == 0 else []
        metrics = logprob_metrics(self._scored(groups), self._inference_engine.version)
        if not metrics.get("gate/logprob_gap_mean", math.inf) <= self._cfg.max_logprob_gap:
            return ""
        return (
            f"Cause: {STALE}. After another push of the same weights new samples agree: the push "
            "before did not reach the server, or not whole."
        )

    def _sampled_again(self, samples: list[Sample]) -> list[Trajectory]:
        """Other responses to the same prompts."""

        async def ask(sample: Sample) -> Trajectory:
            prompt = sample.token_ids[: sample.places[0]]
            sampling = SamplingParams(temperature=sample.temperature, max_new_tokens=MAX_PLACES)
            request = ModelRequest(token_ids=prompt, sampling=sampling)
            response = await self._inference_engine.agenerate(request)
            return Trajectory(
                token_ids=prompt + response.token_ids,
                loss_mask=[False] * len(prompt) + [True] * len(response.token_ids),
                behavior_logprobs=[0.0] * len(prompt) + response.behavior_logprobs,
                versions=[-1] * len(prompt) + response.versions,
                reward=0.0,
                temperature=sample.temperature,
                finish_reason=response.finish_reason,
            )

        async def ask_all() -> list[Trajectory]:
            return list(await asyncio.gather(*map(ask, samples)))

        return background.run(ask_all(), timeout_s=600, what="new samples")

    def _push(self, change: Callable[[Weights], Weights]) -> None:
        weights = change(self._train_engine.named_weights())
        engine = self._inference_engine
        push_tensors(weights, engine, version=engine.version)

    def _ask(self, prompts: list[list[int]]) -> list[Answer]:
        """The server's greedy answers, on every rank."""

        async def ask_all() -> list[Answer]:
            requests = [ModelRequest(token_ids=prompt, sampling=CANARY) for prompt in prompts]
            responses = await asyncio.gather(*map(self._inference_engine.agenerate, requests))
            return [(response.token_ids, response.behavior_logprobs) for response in responses]

        if dist.rank() > 0:
            return dist.broadcast([])
        return dist.broadcast(background.run(ask_all(), timeout_s=600, what="canary answers"))

    def _agree(self, some: list[Answer], others: list[Answer]) -> bool:
        """Whether most answers begin alike; where two tokens are equally likely they may part."""
        limit = self._cfg.max_logprob_gap
        alike = [_begin_alike(a, b, limit) for a, b in zip(some, others, strict=True)]
        return 2 * sum(alike) > len(alike)


def _begin_alike(one: Answer, other: Answer, limit: float) -> bool:
    pairs = zip(*one, *other, strict=False)  # one may have ended earlier
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[2], pairs))
    gaps = [abs(pair[1] - pair[3]) for pair in same]
    return bool(gaps) and sum(gaps) / len(gaps) <= limit


def logprob_metrics(minibatches: list[list[MicroBatch]], version: int) -> dict[str, float]:
    """How far server and trainer are apart; see the table in `observe.metrics`. A collective.

    Both sides used the same weights for tokens of `version`, so only rounding may differ. What is
    about them is absent where no token is that young.

    Args:
        minibatches: with `proximal_logprobs` attached, computed with the weights of `version`.
    """
    mbs = [mb for minibatch in minibatches for mb in minibatch]
    ratio = torch.cat([_log_ratio(mb)[mb.loss_mask] for mb in mbs] or [torch.empty(0)]).double()
    fresh = torch.cat([_log_ratio(mb)[mb.versions == version] for mb in mbs] or [torch.empty(0)])
    fresh = fresh.double()
    weight = ratio.exp()
    k3 = fresh.exp() - 1 - fresh
    sums = dist.sum(
        [
            *(float(weight.sum()), float(weight.square().sum()), ratio.numel()),
            *(float(fresh.abs().sum()), float(k3.sum()), fresh.numel()),
        ]
    )
    total, squares, num_tokens, gap, divergence, num_fresh = sums
    metrics = {"gate/effective_sample_size": total**2 / (squares * num_tokens)} if squares else {}
    if not num_fresh:
        return metrics
    # The largest hundredth of all ranks together holds the quantile.
    count = math.ceil(0.01 * num_fresh)
    largest = fresh.abs().topk(min(count, fresh.numel())).values.tolist()
    top = sorted(itertools.chain(*dist.gather(largest)), reverse=True)[:count]
    return metrics | {
        "gate/logprob_gap_mean": gap / num_fresh,
        "gate/logprob_gap_p99": top[-1],
        "gate/logprob_gap_max": top[0],
        "gate/logprob_k3": divergence / num_fresh,
    }


def _log_ratio(mb: MicroBatch) -> torch.Tensor:
    return mb.proximal_logprobs - mb.behavior_logprobs


def _sequences(
    minibatches: list[list[MicroBatch]], version: int
) -> Iterator[tuple[MicroBatch, list[int]]]:
    """Each sequence alone in a micro-batch, and the places of its tokens of this version."""
    for mb in itertools.chain(*minibatches):
        for index in range(mb.num_sequences):
            alone = select(mb, [index])
            if places := (alone.versions == version).nonzero()[:MAX_PLACES, 0].tolist():
                yield alone, places
