"""A run whose server and trainer disagree stops, and says why; one in which they agree goes on."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from arealite import dist
from arealite.data import load_tokenizer
from arealite.errors import ConfigError, GateError
from arealite.gates import GateConfig, LogprobGate, logprob_metrics
from arealite.inference.hf import HFEngine
from arealite.inference.vllm import VLLMEngine
from arealite.rollout.executor import run_episodes
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.testing import make_tiny_model
from arealite.training import attention
from arealite.training.fsdp import FSDPConfig, FSDPEngine
from arealite.training.packing import attach, pack
from arealite.types import (
    LossOutput,
    MicroBatch,
    ModelRequest,
    ModelResponse,
    SamplingParams,
    Trajectory,
)
from arealite.weights import push_weights
from tests.real_server import RealServer

Weights = Iterable[tuple[str, torch.Tensor]]
ROWS = [{"question": f"What is {n} + {3 * n}? Think first."} for n in range(4)]
SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=32)


@dataclass
class Planted:
    """An engine with a mistake: in what it is asked, in what it answers, or in what it takes."""

    engine: Any
    ask: Callable[[ModelRequest], ModelRequest] = lambda request: request
    answer: Callable[[ModelResponse], ModelResponse] = lambda response: response
    take: Callable[[Weights], Weights] = lambda weights: weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        response = self.answer(await self.engine.agenerate(self.ask(request)))
        return replace(response, request=request)

    def receive_weights(self, weights: Weights, *, version: int) -> None:
        self.engine.receive_weights(self.take(weights), version=version)


@dataclass
class PlantedTrainer:
    """A trainer with a mistake in the micro-batches that it computes log-probs of."""

    engine: FSDPEngine
    change: Callable[[MicroBatch], MicroBatch]

    def logprobs(self, minibatch: list[MicroBatch]) -> list[torch.Tensor]:
        return self.engine.logprobs(list(map(self.change, minibatch)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """What runs next may be a test that has no ranks."""
    yield
    dist.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a head of its own, which can stay behind its embedding."""
    return make_tiny_model(tmp_path_factory.mktemp("untied"), is_tied=False)


@pytest.fixture
def server(folder: str) -> Iterator[HFEngine]:
    with HFEngine(folder) as engine:
        yield engine


@pytest.fixture
def trainer(folder: str) -> Iterator[FSDPEngine]:
    with FSDPEngine(folder, FSDPConfig(lr=1e-2)) as engine:
        yield engine


@dataclass
class Run:
    """What a recipe has when it makes its gate."""

    trainer: Any
    server: Any
    folder: str
    out_dir: Path
    cfg: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        push_weights(self.trainer, self.server, version=0)
        self.workflow = SingleTurnWorkflow(
            load_tokenizer(self.folder), lambda text, row: 0.0, SAMPLING, group_size=4
        )
        self.gate = LogprobGate(
            self.trainer,
            self.server,
            self.folder,
            self.cfg,
            max_tokens=4096,
            out_dir=self.out_dir,
        )

    def check_start(self) -> dict[str, float]:
        return self.gate.check_start(self.workflow, ROWS)

    def check_fresh(self) -> dict[str, float]:
        return self.gate.check_fresh(run_episodes(self.server, self.workflow, ROWS))

    def train(self, version: int) -> None:
        """A step that moves every weight; the server does not hear of it."""
        groups = run_episodes(self.server, self.workflow, ROWS)
        advantages = [[1.0] * len(group) for group in groups]
        [minibatch] = pack(
            groups, advantages, num_minibatches=1, max_tokens=4096, aggregation="token"
        )
        self.trainer.step(minibatch, log_likelihood)
        self.server.version = version


def log_likelihood(logprobs: torch.Tensor, mb: MicroBatch) -> LossOutput:
    return LossOutput(total=-(mb.loss_weight * logprobs).sum())


# --- No false alarm -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_exact_engines_pass_and_the_metrics_say_so(
    family: Literal["qwen2", "qwen3", "llama"], is_tied: bool, tmp_path: Path
):
    folder = make_tiny_model(tmp_path / "model", family=family, is_tied=is_tied)
    with HFEngine(folder) as server, FSDPEngine(folder, FSDPConfig()) as trainer:
        run = Run(trainer, server, folder, tmp_path)
        for metrics in (run.check_start(), run.check_fresh()):
            assert metrics["gate/logprob_gap_mean"] <= metrics["gate/logprob_gap_p99"] < 1e-5
            assert metrics["gate/logprob_gap_max"] < 1e-5
            assert metrics["gate/logprob_k3"] < 1e-9
            assert metrics["gate/effective_sample_size"] == pytest.approx(1, abs=1e-6)
        assert metrics["gate/time_s"] > 0


def test_a_real_server_passes_before_and_after_a_step(
    engine: VLLMEngine, vllm_server: RealServer, tmp_path: Path
):
    with FSDPEngine(vllm_server.model, FSDPConfig(lr=1e-2)) as trainer:
        run = Run(trainer, engine, vllm_server.model, tmp_path)
        assert run.check_start()["gate/logprob_gap_mean"] < 0.01
        run.train(1)
        push_weights(trainer, engine, version=1)
        assert run.check_fresh()["gate/logprob_gap_mean"] < 0.01


def test_the_server_has_the_true_weights_after_the_canary(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    run = Run(trainer, server, folder, tmp_path)
    greedy = SingleTurnWorkflow(
        load_tokenizer(folder), lambda text, row: 0.0, SAMPLING.greedy(), group_size=1
    )

    def answers() -> list[list[int]]:
        return [sample.token_ids for [sample] in run_episodes(server, greedy, ROWS)]

    before = answers()
    run.check_start()
    assert answers() == before
    assert server.version == 0


def test_a_batch_without_a_token_of_its_version_passes(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    run = Run(trainer, server, folder, tmp_path)
    groups = run_episodes(server, run.workflow, ROWS)
    [mbs] = run.gate._scored(groups)
    wrong = [replace(mb, behavior_logprobs=mb.behavior_logprobs - 1) for mb in mbs]
    assert "gate/logprob_gap_mean" not in run.gate.check([wrong], version=3)
    with pytest.raises(GateError):
        run.gate.check([wrong], version=0)


def test_rows_that_are_all_rejected_are_nothing_to_compare(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    class Picky:
        async def arun_episode(self, engine: Any, row: Any) -> None:
            return None

    run = Run(trainer, server, folder, tmp_path)
    assert run.gate.check_start(Picky(), ROWS).keys() == {"gate/time_s"}
    assert run.gate.check_fresh([]).keys() == {"gate/time_s"}


def test_no_start_prompts_leaves_the_start_out(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    deaf = Planted(server, take=lambda weights: ())
    server.version = 0
    gate = LogprobGate(
        trainer, deaf, folder, GateConfig(start_prompts=0), max_tokens=4096, out_dir=tmp_path
    )
    workflow = SingleTurnWorkflow(load_tokenizer(folder), lambda text, row: 0.0, SAMPLING)
    assert gate.check_start(workflow, ROWS) == {}


# --- Planted mistakes of the server ---------------------------------------------------------------


def sampled_at(**changes: Any) -> Callable[[ModelRequest], ModelRequest]:
    """Ask for other sampling than the trainer knows of; greedy requests stay."""

    def change(request: ModelRequest) -> ModelRequest:
        if request.sampling.temperature == 0:
            return request
        return replace(request, sampling=replace(request.sampling, **changes))

    return change


def shifted(step: int) -> Callable[[ModelResponse], ModelResponse]:
    def shift(response: ModelResponse) -> ModelResponse:
        logprobs = response.behavior_logprobs
        moved = [*logprobs[1:], -1.0] if step > 0 else [-1.0, *logprobs[:-1]]
        return replace(response, behavior_logprobs=moved)

    return shift


def other_prompt(
    change: Callable[[list[int]], list[int]],
) -> Callable[[ModelRequest], ModelRequest]:
    return lambda request: replace(request, token_ids=change(request.token_ids))


def rounded(dtype: torch.dtype) -> Callable[[Weights], Weights]:
    return lambda weights: ((name, t.to(dtype).to(t.dtype)) for name, t in weights)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "temperature ignored": (
        {"ask": sampled_at(temperature=1.0)},
        "Cause: temperature ignored. .*processed_logprobs",
    ),
    "another temperature": (
        {"ask": sampled_at(temperature=0.5)},
        "Cause: other temperature. .*at temperature 0.5",
    ),
    "top_p": (
        {"ask": sampled_at(top_p=0.8)},
        "Cause: top-p or top-k support. .*top_p=0.8",
    ),
    "log-probs of the next token": (
        {"answer": shifted(1)},
        "Cause: shift by one. .*token after",
    ),
    "log-probs of the token before": (
        {"answer": shifted(-1)},
        "Cause: shift by one. .*token before",
    ),
    "weights in 8 bits": (
        {"take": rounded(torch.float8_e5m2)},
        "Cause: wrong dtype. .*float8_e5m2",
    ),
    "prompt without its first token": (
        {"ask": other_prompt(lambda ids: ids[1:])},
        "Cause: other tokenizer or template. .*without its first token",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_the_server_stops_the_run_and_is_named(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path, name: str
):
    planted, message = MISTAKES[name]
    run = Run(trainer, Planted(server, **planted), folder, tmp_path)
    with pytest.raises(GateError, match=message) as stopped:
        run.check_start()
    assert "Another that fits" not in str(stopped.value)
    evidence = json.loads((tmp_path / "gate_failure.json").read_text())
    assert evidence["cause"] in str(stopped.value)
    assert len(evidence["samples"][0]["server"]) == len(evidence["samples"][0]["places"])


def test_what_no_known_mistake_explains_is_not_explained(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    def muddled(response: ModelResponse) -> ModelResponse:
        values = [v - 0.3 * (i % 3) for i, v in enumerate(response.behavior_logprobs)]
        return replace(response, behavior_logprobs=values)

    run = Run(trainer, Planted(server, answer=muddled), folder, tmp_path)
    with pytest.raises(GateError, match=r"Cause unknown: .*server is off by 0\.\d+, the trainer"):
        run.check_start()


def test_two_mistakes_at_once_are_not_mistaken_for_one(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    both = Planted(server, ask=sampled_at(temperature=1.0), answer=shifted(1))
    with pytest.raises(GateError, match="Cause unknown"):
        Run(trainer, both, folder, tmp_path).check_start()


# --- Weights that do not arrive -------------------------------------------------------------------


def frozen(is_kept: Callable[[str], bool]) -> Callable[[Weights], Weights]:
    """Takes the first of each tensor of these names, and nothing new later on."""
    kept: dict[str, torch.Tensor] = {}

    def take(weights: Weights) -> Weights:
        for name, tensor in weights:
            yield name, kept.setdefault(name, tensor.clone()) if is_kept(name) else tensor

    return take


@pytest.mark.parametrize(
    ("is_kept", "message"),
    [
        (lambda name: True, "Cause: stale weights. The server answers as before"),
        (lambda name: ".layers." in name, "Cause: stale weights. The layers"),
    ],
    ids=["all", "layers"],
)
def test_a_server_that_does_not_take_new_weights_is_found_before_the_first_step(
    trainer: FSDPEngine,
    server: HFEngine,
    folder: str,
    tmp_path: Path,
    is_kept: Callable[[str], bool],
    message: str,
):
    run = Run(trainer, Planted(server, take=frozen(is_kept)), folder, tmp_path)
    with pytest.raises(GateError, match=message):
        run.check_start()


def test_a_head_that_stays_is_found_before_the_first_step_and_later(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    """As the copy that vLLM makes of a tied head does."""
    head_stays = frozen(lambda name: name == "lm_head.weight")
    run = Run(trainer, Planted(server, take=head_stays), folder, tmp_path)
    with pytest.raises(GateError, match="Cause: tied head not updated"):
        run.check_start()
    for _ in range(4):
        run.train(1)
    push_weights(trainer, run.server, version=1)
    with pytest.raises(GateError, match="Cause: tied head not updated"):
        run.check_fresh()


def test_weights_that_never_arrived_are_named(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    run = Run(trainer, server, folder, tmp_path)
    run.train(1)
    with pytest.raises(
        GateError, match=r"Cause: stale weights\. The weights are those of .*no upd"
    ):
        run.check_fresh()


def test_servers_that_stand_still_are_asked_for_the_cause(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    run = Run(trainer, server, folder, tmp_path)
    run.train(1)
    push_weights(trainer, server, version=1)
    run.train(2)
    groups = run_episodes(server, run.workflow, ROWS)
    server.pause()  # as for the memory of a GPU
    with pytest.raises(GateError, match=r"Cause: stale weights\. After another push"):
        run.gate.check_fresh(groups)


def test_one_update_that_did_not_arrive_is_named(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    run = Run(trainer, server, folder, tmp_path)
    run.train(1)
    push_weights(trainer, server, version=1)
    run.check_fresh()
    run.train(2)
    with pytest.raises(GateError, match=r"Cause: stale weights\. After another push"):
        run.check_fresh()


def test_a_push_that_lacks_a_tensor_is_refused(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    run = Run(trainer, server, folder, tmp_path)
    lost = "model.layers.1.mlp.down_proj.weight"

    class Forgetful:
        def __getattr__(self, name: str) -> Any:
            return getattr(trainer, name)

        def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in trainer.named_weights():
                if name != lost:
                    yield name, tensor.float() if name == "model.norm.weight" else tensor

    gate = LogprobGate(
        Forgetful(),  # type: ignore[arg-type]
        server,
        folder,
        GateConfig(),
        max_tokens=4096,
        out_dir=tmp_path,
    )
    with pytest.raises(
        GateError, match=rf"{lost} is not pushed; model\.norm\.weight is pushed as float32"
    ):
        gate.check_start(run.workflow, ROWS)


# --- Mistakes of the trainer ----------------------------------------------------------------------


def test_packed_sequences_that_see_each_other_are_found(
    trainer: FSDPEngine,
    server: HFEngine,
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def leaking(query: Any, key: Any, value: Any, layout: Any, *others: Any) -> torch.Tensor:
        one = attention.packed_layout(torch.tensor([0, len(query)]), query.device)
        return bucketed(query, key, value, one, *others)

    bucketed = attention._bucketed
    run = Run(trainer, server, folder, tmp_path)
    monkeypatch.setattr(attention, "_bucketed", leaking)
    with pytest.raises(GateError, match="Cause: packing leak"):
        run.check_start()
    with pytest.raises(GateError, match="Cause: packing leak"):
        run.check_fresh()


def test_a_trainer_that_ignores_the_temperature_is_found(
    trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path
):
    def forget(mb: MicroBatch) -> MicroBatch:
        return replace(mb, temperature=torch.ones_like(mb.temperature))

    run = Run(PlantedTrainer(trainer, forget), server, folder, tmp_path)
    with pytest.raises(GateError, match="Cause: temperature ignored"):
        run.check_start()


# --- Numbers --------------------------------------------------------------------------------------


def test_the_metrics_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(300, generator=generator) / 10  # noqa: E731
    proximal, behavior = draw() - 1, draw() - 1
    versions = torch.arange(300) % 3
    mask = torch.arange(300) % 2 == 0
    mb = MicroBatch(
        token_ids=torch.zeros(300, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 300], dtype=torch.int32),
        loss_mask=mask,
        behavior_logprobs=behavior,
        versions=torch.where(mask, versions, -1),
        temperature=torch.ones(300),
        advantages=torch.zeros(300),
        loss_weight=torch.zeros(300),
        proximal_logprobs=proximal,
    )
    differences = (proximal - behavior).tolist()
    fresh = [d for d, v in zip(differences, mb.versions.tolist(), strict=True) if v == 2]
    ratios = [math.exp(d) for d, m in zip(differences, mask.tolist(), strict=True) if m]
    gaps = sorted(map(abs, fresh))
    assert logprob_metrics([[mb]], version=2) == pytest.approx(
        {
            "gate/logprob_gap_mean": sum(gaps) / 50,
            "gate/logprob_gap_p99": gaps[-1],
            "gate/logprob_gap_max": gaps[-1],
            "gate/logprob_k3": sum(math.exp(d) - 1 - d for d in fresh) / 50,
            "gate/effective_sample_size": sum(ratios) ** 2 / (150 * sum(r**2 for r in ratios)),
        },
        rel=1e-4,
    )


def test_nan_is_no_agreement(trainer: FSDPEngine, server: HFEngine, folder: str, tmp_path: Path):
    run = Run(trainer, server, folder, tmp_path)
    groups: list[list[Trajectory]] = run_episodes(server, run.workflow, ROWS)
    [mbs] = run.gate._scored(groups)
    scored = attach(mbs, proximal_logprobs=[mb.proximal_logprobs * torch.nan for mb in mbs])
    with pytest.raises(GateError):
        run.gate.check([scored], version=0)


@pytest.mark.parametrize("field", ["max_logprob_gap", "start_prompts"])
def test_a_setting_below_zero_is_refused(field: str):
    with pytest.raises(ConfigError, match=field):
        GateConfig(**{field: -1})
