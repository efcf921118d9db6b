import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arealite import config
from arealite.config import install_excepthook, parse, save_config, to_dict
from arealite.errors import ConfigError, DataError, ServerError
from arealite.inference.server import ServerConfig
from arealite.inference.vllm import VLLMEngine
from arealite.rollout.executor import RolloutConfig
from arealite.training.fsdp import FSDPConfig
from arealite.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters."""

    rank: int = 8
    """Rank of the update."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimizer."""

    lr: float = 1e-4
    """Learning rate after
    warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear"] = "constant"
    fused: bool = False
    warmup: int | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ConfigError(f"train.lr={self.lr} must be 0 or more.")
        if (self.warmup or 0) > 100:
            raise ConfigError(f"train.warmup={self.warmup} must be at most 100.")


@dataclass(frozen=True, kw_only=True)
class Common:
    """Not shown: the child has its own docstring."""

    seed: int = 1
    """Inherited by every recipe."""


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Every knob of this test."""

    model: str = "tiny"
    """Folder or id."""
    steps: int = 80
    """Training steps."""
    note: str | None = None
    addresses: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams(temperature=1.0, max_new_tokens=64)
    eval_sampling: SamplingParams = SamplingParams(temperature=0.0)
    train: Train = Train(lr=1e-3)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1.")
        if (self.train.warmup or 0) > self.steps:
            raise ConfigError(f"train.warmup={self.train.warmup} exceeds steps={self.steps}.")


def problems(*argv: str) -> list[str]:
    """The lines of the error that these arguments make."""
    with pytest.raises(ConfigError) as raised:
        parse(Config, argv)
    return str(raised.value).split("\n")


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# -- What arrives --------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults():
    assert parse(Config, []) == Config()


def test_arguments_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = yaml_file(tmp_path, "steps: 7\ntrain:\n  lr: 1e-5\n  fused: true\n")
    cfg = parse(Config, ["train.lr=0.5", "--config", file])
    assert cfg == Config(steps=7, train=Train(lr=0.5, fused=True))


def test_a_section_keeps_the_defaults_of_the_recipe_and_not_those_of_its_class():
    assert parse(Config, ["sampling.top_p=0.5"]).sampling.max_new_tokens == 64


def test_later_files_win_over_earlier_ones(tmp_path):
    (tmp_path / "model.yaml").write_text("model: a\nsteps: 5\n")
    (tmp_path / "cluster.yaml").write_text("model: b\n")
    argv = ["--config", str(tmp_path / "model.yaml"), f"--config={tmp_path / 'cluster.yaml'}"]
    assert parse(Config, argv) == Config(model="b", steps=5)


def test_lists_arrive_as_tuples():
    cfg = parse(Config, ["addresses=[http://10.0.0.7:8000, b]", "train.betas=[0.5, 1]"])
    assert cfg.addresses == ("http://10.0.0.7:8000", "b")
    assert cfg.train.betas == (0.5, 1.0)
    assert [type(beta) for beta in cfg.train.betas] == [float, float]


@pytest.mark.parametrize(
    "text", ["1e3", "0010", "12:30", "true", "a: b", "x #1", "[1", "", "a=b", "2020-01-01", "*x"]
)
def test_a_text_on_the_command_line_stays_as_it_was_typed(text):
    assert parse(Config, [f"model={text}"]).model == text


def test_a_number_like_text_in_a_file_stays_as_it_was_typed(tmp_path):
    assert parse(Config, ["--config", yaml_file(tmp_path, "model: 0010\n")]).model == "0010"
    assert parse(Config, ["--config", yaml_file(tmp_path, "model: on\n")]).model == "on"


def test_null_and_nothing_unset_an_optional_value_and_quotes_make_them_texts():
    assert parse(Config, ["note=null"]).note is None
    assert parse(Config, ["note="]).note is None
    assert parse(Config, ["note='null'"]).note == "null"


def test_a_number_may_be_written_in_the_ways_of_yaml():
    cfg = parse(Config, ["steps=1_000", "train.lr=1e-4", "train.fused=yes", "train.warmup=+3"])
    assert cfg == Config(steps=1000, train=Train(lr=0.0001, fused=True, warmup=3))


def test_references_to_other_keys_and_to_the_environment_are_resolved(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/fast")
    cfg = parse(Config, ["model=${oc.env:SCRATCH}/m-${steps}", "train.warmup=${steps}"])
    assert (cfg.model, cfg.train.warmup) == ("/fast/m-80", 80)


def test_a_section_that_is_off_is_turned_on_by_one_of_its_keys_and_off_by_null(tmp_path):
    assert parse(Config, []).train.lora is None
    assert parse(Config, ["train.lora.rank=4"]).train.lora == Lora(rank=4)
    assert parse(Config, ["train.lora={}"]).train.lora == Lora(rank=8)
    file = yaml_file(tmp_path, "train: {lora: {rank: 4}}\n")
    assert parse(Config, ["--config", file, "train.lora=null"]).train.lora is None


def test_a_file_may_use_dotted_keys_anchors_and_merge_keys(tmp_path):
    text = (
        "train.lr: 0.5\n"
        "sampling: &base {temperature: 0.5, top_p: 0.25}\n"
        "eval_sampling: {<<: *base, top_p: 0.75}\n"
    )
    cfg = parse(Config, ["--config", yaml_file(tmp_path, text)])
    assert cfg.train.lr == 0.5
    assert (cfg.sampling.temperature, cfg.sampling.top_p) == (0.5, 0.25)
    assert (cfg.eval_sampling.temperature, cfg.eval_sampling.top_p) == (0.5, 0.75)


def test_a_file_with_a_byte_order_mark_or_only_comments_is_read(tmp_path):
    assert parse(Config, ["--config", yaml_file(tmp_path, "\ufeffsteps: 3\n")]).steps == 3
    assert parse(Config, ["--config", yaml_file(tmp_path, "# steps: 3\n")]) == Config()


# -- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("train.lrr=1", "train.lr"),
        ("lr=1", "train.lr"),
        ("sampling.lr=1", "train.lr"),
        ("model_=x", "model"),
        ("trian.betas=[1, 1]", "train.betas"),
        ("trian={}", "train"),
        ("steps.x=1", "steps"),
        ("addresses.0=a", "addresses"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(argument, nearest):
    [problem] = problems(argument)
    assert problem.startswith(argument.replace("[1, 1]", "[1, 1]") + " is not a key.")
    assert f"The nearest is {nearest};" in problem


def test_an_unknown_key_that_is_like_none_names_none():
    assert problems("qqq=3") == ["qqq=3 is not a key. --help lists all."]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("steps=1e3", "not a whole number. Write 1000."),
        ("steps=1.0", "not a whole number. Write 1."),
        ("steps=1.5", "not a whole number"),
        ("steps=true", "not a whole number"),
        ("steps=010", "not a whole number. Write 10."),
        ("steps=nan", "not a whole number"),
        ("steps=-inf", "not a whole number"),
        ("steps=9223372036854775808", "does not fit into 64 bits"),
        ("steps=" + "9" * 5000, "Write"),
        ("steps=null", "is empty"),
        ("steps=", "is empty"),
        ("steps=[1]", "not a single value"),
        ("steps={a: 1}", "not a single value"),
        ("steps=0", "must be at least 1"),
        ("steps=-3", "must be at least 1"),
        ("train.warmup=3.5", "not a whole number"),
        ("train.lr=nan", "not a finite number"),
        ("train.lr=.inf", "is not a number"),
        ("train.lr=-Infinity", "not a finite number"),
        ("train.lr=1e400", "not a finite number"),
        ("train.lr=true", "not a number"),
        ("train.lr=", "is empty"),
        ("train.lr=-1", "must be 0 or more"),
        ("train.fused=2", "neither true nor false"),
        ("train.fused=", "is empty"),
        ("train.schedule=cosine", "Write one of constant | linear"),
        ("train.betas=[0.5]", "has 1 values. Write 2"),
        ("train.betas=[0.5, nan]", "not a finite number"),
        ("train.betas=0.5", "is not a list"),
        ("addresses=a", "Write [a, b], or [a]"),
        ("addresses=[[a]]", "not a single value"),
        ("addresses=[a, null]", "is empty"),
        ("model=null", "is empty"),
        ("model=???", "mark for a missing value"),
        ("model=${nope}", "'nope' not found"),
        ("model=${oc.env:AREALITE_NOPE}", "'AREALITE_NOPE' not found"),
        ("model=${", "Write \\${ where no reference is meant"),
        ("model=${model}", "Recursive interpolation"),
        ("model=${train}", "Cannot convert"),
        ("train.warmup=${train.lr}", "could not be converted to Integer"),
        ("train.lr=${oc.decode:'1e400'}", "becomes inf"),
        ("train.schedule=${model}", "cannot be used"),
        ("model=\udcff", "cannot be read"),
        ("train=3", "train has keys of its own. Set those, such as train.lr=value"),
        ("train=null", "train has keys of its own"),
        ("addresses=[http://[::1]:8000]", "Quote what has special characters"),
        ("steps=!!python/object/apply:os.getcwd []", "YAML tag python/object/apply:os.getcwd"),
        ("steps=!mine 3", "YAML tag !mine"),
        ("steps=" + "[" * 600, "nested too deeply"),
        ("steps", "is not key=value"),
        ("=3", "is not key=value"),
        ("--steps=3", "Write keys without dashes: steps=value"),
        ("--lr", "train.lr=value"),
        ("-x", "is not an option"),
        ("--config", "no such file"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_reason(argument, reason):
    [problem] = problems(argument)
    key = argument.partition("=")[0]
    assert key in problem or "\\u" in problem
    assert reason in problem
    assert len(problem) < 400


def test_a_key_given_twice_is_refused():
    [problem] = problems("steps=3", "steps=4")
    assert problem == "steps=4 comes after another value for steps. Keep one of them."
    assert len(problems("train={lr: 1}", "train.lr=2")) == 1


def test_a_key_given_twice_in_a_file_is_refused_with_its_line(tmp_path):
    file = yaml_file(tmp_path, "steps: 1\nsteps: 1\ntrain.lr: 1\ntrain: {lr: 1}\ntrain: {}\n")
    assert problems("--config", file) == [
        f"steps=1 ({file}:2) comes after another value for steps. Keep one of them.",
        f"train.lr=1 ({file}:4) comes after another value for train.lr. Keep one of them.",
        f"train={{}} ({file}:5) comes after another value for train. Keep one of them.",
    ]


def test_every_problem_of_the_file_and_of_the_arguments_is_reported_at_once(tmp_path):
    file = yaml_file(tmp_path, "modle: x\nsteps: many\nsampling: {top_p: 2, temperature: -1}\n")
    argv = ["train.lr=-1", "train.warmup=200", "noet=1", "train.fused=maybe"]
    assert problems("--config", file, *argv) == [
        f"modle=x ({file}:1) is not a key. The nearest is model; --help lists all.",
        f"steps=many ({file}:2) is not a whole number. Write digits, such as 1000.",
        "noet=1 is not a key. The nearest is note; --help lists all.",
        "train.fused=maybe is neither true nor false. Write one of the two.",
        f"sampling.temperature=-1.0 must be 0 or more. ({file}:3)",
        "train.lr=-1.0 must be 0 or more.",
        f"sampling.top_p=2.0 must be above 0 and at most 1. ({file}:3)",
        "train.warmup=200 must be at most 100.",
    ]


def test_a_check_of_two_sections_together_is_reported():
    assert problems("steps=5", "train.warmup=7") == ["train.warmup=7 exceeds steps=5."]


def test_a_complaint_about_a_value_that_nobody_asked_for_is_not_reported():
    # steps goes back to 80, which warmup exceeds: a consequence, not a second problem.
    assert problems("steps=0", "train.warmup=90") == ["steps=0 must be at least 1."]


def test_a_class_used_for_two_sections_reports_which_of_them_is_wrong():
    assert problems("sampling.top_p=2", "eval_sampling.top_p=3") == [
        "sampling.top_p=2.0 must be above 0 and at most 1.",
        "eval_sampling: sampling.top_p=3.0 must be above 0 and at most 1.",
    ]


def test_a_check_that_names_no_key_is_reported_with_the_values_it_saw():
    @dataclass(frozen=True, kw_only=True)
    class Vague:
        width: int = 1
        height: int = 1

        def __post_init__(self) -> None:
            if self.width != self.height:
                raise ValueError("This\nis no square.")

    with pytest.raises(ConfigError, match=r"^width=2, height=3: This is no square\.$"):
        parse(Vague, ["width=2", "height=3"])


def test_a_check_that_names_a_key_without_its_section_is_reported_with_the_section():
    @dataclass(frozen=True, kw_only=True)
    class Shape:
        width: int = 1

        def __post_init__(self) -> None:
            if self.width < 1:
                raise ConfigError(f"width={self.width} must be above 0.")

    @dataclass(frozen=True, kw_only=True)
    class Room:
        floor: Shape = Shape()
        limit: int = 9

        def __post_init__(self) -> None:
            if self.floor.width > self.limit:
                raise ConfigError(f"limit={self.limit} is less than width={self.floor.width}.")

    with pytest.raises(ConfigError, match=r"^floor: width=0 must be above 0\.$"):
        parse(Room, ["floor.width=0"])
    with pytest.raises(ConfigError, match=r"^limit=9 is less than width=10\.$"):
        parse(Room, ["floor.width=10"])


def test_defaults_that_fail_their_own_check_are_reported():
    @dataclass(frozen=True, kw_only=True)
    class Impossible:
        width: int = 1
        height: int = 1

        def __post_init__(self) -> None:
            raise ConfigError(f"width={self.width} needs 3 ranks.")

    for argv in ([], ["height=2"]):
        with pytest.raises(ConfigError, match=r"^width=1 needs 3 ranks\.$"):
            parse(Impossible, argv)


def test_a_key_without_a_default_has_to_be_given():
    @dataclass(frozen=True, kw_only=True)
    class Strict:
        model: str
        steps: int = 1

    with pytest.raises(ConfigError, match=r"^model has no default\. Set model=value\.$"):
        parse(Strict, ["steps=2"])
    assert parse(Strict, ["model=x"]) == Strict(model="x")


def test_a_type_that_no_text_can_be_is_the_authors_error():
    @dataclass(frozen=True, kw_only=True)
    class Wrong:
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match="table has the type"):
        parse(Wrong, [])


# -- Files that are not what they should be ------------------------------------------------------

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{previous}'] * 9)}]\n"
    for previous, name in itertools.pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n- b\n", r"it holds \[a, b\] instead of lines such as `key: value`"),
        ("just words\n", "it holds just words instead"),
        ("train:\n\tlr: 1\n", r"line 2: .*indent with spaces, not tabs"),
        ("a: 'x\n", "line 2: found unexpected end of stream"),
        ("steps: 1\n---\nsteps: 2\n", "but found another document|expected a single document"),
        ("steps: \x00\n", "special characters are not allowed"),
        ("steps: *nowhere\n", "line 1: found undefined alias"),
        ("train: &a {lr: *a}\n", "an alias contains itself"),
        (BOMB, "more than 5,000 values, aliases written out"),
        ("- " * 900 + "a", "nested too deeply"),
        ("[" * 900, "nested too deeply"),
        ("note: " + "x" * 100_000, "more than 100,000 bytes"),
        ("train: !!python/object:os.system {}\n", "train has keys of its own"),
        ("note: !!python/name:os.system\n", "YAML tag python/name:os.system"),
        ("<<: 3\n", "<<=3 .* is not a key"),
        ("? [a, b]\n: 3\n", r"\[a, b\]=3 .* is not a key"),
        ("1: 2\n", "1=2 .* is not a key"),
        ("'': 2\n", "''=2 .* is not a key"),
        ("train: 5\n", "train=5 .*:1. cannot be: train has keys"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=reason) as raised:
        parse(Config, ["--config", yaml_file(tmp_path, text)])
    assert "run.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "loop", "x" * 5000, "a\0b", ""):
        [problem] = problems("--config", str(path))
        assert problem.startswith("--config ")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes("model: ä".encode("utf-16"))
    [problem] = problems("--config", str(tmp_path / "run.yaml"))
    assert "is not UTF-8 text" in problem


# -- Properties ----------------------------------------------------------------------------------

KEYS = [*to_dict(Config()), "train", "train.lora", "train.lora.rank", "sampling", "nope", ""]
TEXTS = st.text(max_size=12) | st.text("[]{}:,'\"&*!$\\#.?%-_ \n0123456789abtruenl", max_size=16)
arguments = st.lists(
    st.builds("{}={}".format, st.sampled_from(KEYS), TEXTS) | TEXTS.map(lambda text: f"x{text}"),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(arguments)
@example(["model=${a:" * 200])
def test_any_arguments_give_a_config_or_a_config_error(argv):
    try:
        cfg = parse(Config, argv)
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(cfg, Config)


@settings(max_examples=100, deadline=None)
@given(st.text("steplranino:-[]{}&*!|>'\"#%@?\n\t ,.0123~<", max_size=60))
def test_any_file_gives_a_config_or_a_config_error(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("any", numbered=True)
    try:
        assert isinstance(parse(Config, ["--config", yaml_file(folder, text)]), Config)
    except ConfigError as error:
        assert str(error)


@settings(max_examples=100, deadline=None)
@given(
    model=TEXTS,
    note=st.none() | TEXTS,
    addresses=st.lists(TEXTS, max_size=3).map(tuple),
    lr=st.floats(min_value=0, allow_infinity=False),
    steps=st.integers(1, 2**63 - 1),
)
@example(model="\\${steps}", note="???", addresses=("\\???", "\\\\${x"), lr=1e-300, steps=1)
def test_a_saved_config_reads_back_as_it_was(tmp_path_factory, model, note, addresses, lr, steps):
    cfg = Config(model=model, note=note, addresses=addresses, steps=steps, train=Train(lr=lr))
    path = tmp_path_factory.mktemp("saved", numbered=True) / "config.yaml"
    save_config(cfg, path)
    assert parse(Config, ["--config", str(path)]) == cfg


# -- Saving and logging --------------------------------------------------------------------------


def test_a_config_is_saved_in_a_new_folder_and_leaves_nothing_else_there(tmp_path):
    path = tmp_path / "runs" / "a" / "config.yaml"
    save_config(Config(steps=5), path)
    save_config(Config(steps=6, train=Train(lora=Lora())), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    cfg = parse(Config, ["--config", str(path)])
    assert cfg == Config(steps=6, train=Train(lora=Lora()))


def test_a_config_that_cannot_be_written_names_the_path_and_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="taken could not be written"):
        save_config(Config(), tmp_path / "taken")
    with pytest.raises(ConfigError, match="could not be written"):
        save_config(Config(), Path("/dev/null/config.yaml"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_a_config_is_logged_as_plain_values_by_dotted_key():
    cfg = Config(addresses=("a",), train=Train(lora=Lora(rank=2)))
    assert to_dict(cfg) == {
        "seed": 1,
        "model": "tiny",
        "steps": 80,
        "note": None,
        "addresses": ["a"],
        "sampling.temperature": 1.0,
        "sampling.top_p": 1.0,
        "sampling.max_new_tokens": 64,
        "sampling.stop": [],
        "sampling.ignore_eos": False,
        "eval_sampling.temperature": 0.0,
        "eval_sampling.top_p": 1.0,
        "eval_sampling.max_new_tokens": 256,
        "eval_sampling.stop": [],
        "eval_sampling.ignore_eos": False,
        "train.lr": 1e-4,
        "train.betas": [0.9, 0.999],
        "train.schedule": "constant",
        "train.fused": False,
        "train.warmup": None,
        "train.lora.rank": 2,
    }


# -- Help ----------------------------------------------------------------------------------------


def test_help_lists_every_knob_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(Config, ["steps=oops", "--help"])
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Every knob of this test."
    assert max(map(len, lines)) <= 100
    for expected in (
        ["  seed: int = 1", "      Inherited by every recipe."],
        ["  model: str = tiny", "      Folder or id."],
        ["  addresses: [str, ...] = []"],
        ["  note: str | null = null"],
        ["train: The optimizer.", "  train.lr: float = 0.001"],
        ["      Learning rate after warm-up.", "  train.betas: [float, float] = [0.9, 0.999]"],
        ["  train.schedule: constant | linear = constant", "  train.fused: bool = false"],
        ["train.lora: Low-rank adapters. Null by default; set one of its keys to turn it on."],
        ["  train.lora.rank: int = 8", "      Rank of the update."],
        ["eval_sampling: How tokens are sampled.", "  eval_sampling.temperature: float = 0.0"],
    ):
        start = lines.index(expected[0])
        assert lines[start : start + len(expected)] == expected
    assert sum(line.startswith("  ") and line[2] != " " for line in lines) == 21


def test_help_works_for_a_class_without_source_or_docstring(capsys):
    namespace: dict[str, type] = {}
    exec(
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Typed:\n    steps: int = 1\n",
        namespace,
    )
    with pytest.raises(SystemExit):
        parse(namespace["Typed"], ["-h"])
    assert "  steps: int = 1\n" in capsys.readouterr().out


def test_explain_prints_the_derived_numbers_and_ends(capsys):
    @dataclass(frozen=True, kw_only=True)
    class Small:
        steps: int = 3
        group_size: int = 4

    with pytest.raises(SystemExit) as exit_:
        parse(Small, ["--explain", "steps=1234"])
    assert exit_.value.code == 0
    assert "1,234" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        parse(Small, ["--explain", "steps=x"])


# -- The command line ----------------------------------------------------------------------------


@pytest.fixture
def hook(monkeypatch):
    """Restores the hook that a test installs."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.usefixtures("hook")
def test_a_bad_command_line_prints_the_problems_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "steps=0", "lr=1"])
    with pytest.raises(SystemExit) as exit_:
        parse(Config)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "error: lr=1 is not a key. The nearest is train.lr; --help lists all.\n"
        "       steps=0 must be at least 1.\n"
    )


@pytest.mark.usefixtures("hook")
def test_other_ranks_let_rank_0_print_first(monkeypatch, capsys):
    waits: list[float] = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(sys, "argv", ["recipe.py", "steps=0"])
    with pytest.raises(SystemExit):
        parse(Config)
    assert waits == [config.RANK_0_PRINTS_FIRST_S]
    assert capsys.readouterr().err == "[rank 3] error: steps=0 must be at least 1.\n"


@pytest.mark.usefixtures("hook")
def test_only_rank_0_prints_the_help(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        parse(Config)
    assert exit_.value.code == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("hook")
def test_after_the_hook_our_errors_print_one_message_and_others_their_traceback(capsys):
    seen: list[BaseException] = []
    sys.excepthook = lambda kind, error, traceback: seen.append(error)
    install_excepthook()
    install_excepthook()
    sys.excepthook(DataError, DataError("No rows.\nAdd some."), None)
    assert capsys.readouterr().err == "error: No rows.\n       Add some.\n"
    bug = KeyError("x")
    sys.excepthook(KeyError, bug, None)
    assert seen == [bug]
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as exit_:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.usefixtures("hook")
def test_given_arguments_leave_the_hook_alone():
    before = sys.excepthook
    parse(Config, [])
    assert sys.excepthook is before


SCRIPT = '''
from dataclasses import dataclass
from arealite.config import parse
from arealite.errors import DataError

@dataclass(frozen=True, kw_only=True)
class Config:
    """A recipe's own class."""

    fail: str = "no"
    """How to
    fail."""

cfg = parse(Config)
raise KeyboardInterrupt if cfg.fail == "interrupt" else DataError(f"fail={cfg.fail}")
'''


@pytest.mark.parametrize(
    ("argument", "code", "out", "err"),
    [
        ("--help", 0, "  fail: str = no\n      How to fail.\n", ""),
        ("fail=null", 2, "", "error: fail=null is empty, and this key needs a value. "),
        ("fail=late", 1, "", "error: fail=late\n"),
        ("fail=interrupt", 130, "", "interrupted\n"),
    ],
)
def test_a_script_ends_with_the_exit_code_and_without_a_traceback(
    tmp_path, argument, code, out, err
):
    script = tmp_path / "recipe.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), argument], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code
    assert done.stderr.startswith(err) and done.stderr.count("\n") == (code != 0)
    assert done.stdout.endswith(out) and ("A recipe's own class." in done.stdout) == (code == 0)


# --- Values that come from Python, not from a command line ----------------------------------------


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: ServerConfig(kv="recomptue"), r"server.kv='recomptue' is none of \('recompute', "),  # type: ignore[arg-type]
        (lambda: ServerConfig(interrupt="drian"), r"server.interrupt='drian' is none of"),  # type: ignore[arg-type]
        (lambda: ServerConfig(max_num_seqs="8"), r"server.max_num_seqs='8' must be a whole number"),  # type: ignore[arg-type]
        (lambda: ServerConfig(max_num_seqs=True), "server.max_num_seqs=True must be a whole numb"),
        (lambda: ServerConfig(patience_s="1"), r"server.patience_s='1' must be a number"),  # type: ignore[arg-type]
        (lambda: ServerConfig(transport="rdma"), r"server.transport='rdma' is none of"),  # type: ignore[arg-type]
        (lambda: ServerConfig(transport="disk"), "server.transport=disk needs server.weights_dir"),
        (lambda: ServerConfig(sleep="no"), r"server.sleep='no' must be true or false"),  # type: ignore[arg-type]
        (lambda: RolloutConfig(prompts_per_step=2.5), "prompts_per_step=2.5 must be a whole"),  # type: ignore[arg-type]
        (lambda: FSDPConfig(dtype="half"), "train.dtype='half' is none of"),  # type: ignore[arg-type]
        (lambda: FSDPConfig(lr="1e-5"), "train.lr='1e-5' must be a number"),  # type: ignore[arg-type]
        (lambda: SamplingParams(temperature="1"), "sampling.temperature='1' must be"),  # type: ignore[arg-type]
        (lambda: SamplingParams(temperature=math.inf), "sampling.temperature=inf must be"),
        (lambda: SamplingParams(top_p=math.nan), "sampling.top_p=nan must be"),
        (lambda: SamplingParams(max_new_tokens=2.5), "sampling.max_new_tokens=2.5 must be"),  # type: ignore[arg-type]
        (lambda: ServerConfig(addresses=("127.0.0.1:9",)), "'127.0.0.1:9' is not the address"),
        (lambda: ServerConfig(addresses=("http://a:99999",)), "'http://a:99999' is not the addr"),
        (lambda: ServerConfig(addresses="http://a:1"), r"must be a list: \['http://a:1'\]"),  # type: ignore[arg-type]
        (lambda: VLLMEngine("http://a:1"), r"must be a list: \['http://a:1'\]"),
        (lambda: VLLMEngine([]), r"No address of a server was given\. Start one"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(make: Callable[[], object], complaint: str):
    with pytest.raises((ConfigError, ServerError), match=complaint):
        make()


def test_every_setting_of_the_wrong_type_is_named_at_once():
    with pytest.raises(ConfigError) as raised:
        ServerConfig(kv="x", max_num_seqs=1.5)  # type: ignore[arg-type]
    assert len(str(raised.value).splitlines()) == 2
