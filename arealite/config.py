"""Dataclass defaults <- `--config file.yaml` <- `key=value`: one frozen Config, or every problem.

    cfg = parse(Config)                                  # a recipe's command line
    cfg = parse(Config, ["rollout.max_staleness=0"])     # a notebook or a test: errors raise

    text -> YAML nodes -> settings (key, value of the field's type, file and line)
         -> OmegaConf structured tree (checks again, resolves ${...}) -> Config (checks ranges)

How text is read, where that differs from plain YAML or OmegaConf:

- The field's type decides, not YAML's guess: `model=1e3` and `model=0010` stay those texts, and an
  int takes digits only. `steps=1e3` is an error, as in OmegaConf; the message says to write 1000.
- nan, inf, whole numbers beyond 64 bits, keys given twice and unknown keys are errors.
- On the command line, `key=` is the empty text for a `str` and null for an `X | None`.
- A file is at most `MAX_FILE_BYTES` of UTF-8, with or without byte-order mark; `rollout.a: 1` is
  the same as `rollout: {a: 1}`; anchors and merge keys work; YAML tags other than those of plain
  values are errors. Several files: later ones win.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
import typing
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from arealite import dist
from arealite.config_help import help_text
from arealite.config_reading import Problem, Setting, read_arguments, read_file
from arealite.config_schema import Schema, branch, schema_of
from arealite.errors import ArealiteError, ConfigError

ConfigT = TypeVar("ConfigT")

# Ranks mostly fail alike, and torchrun ends the others once rank 0 has printed and exited.
RANK_0_PRINTS_FIRST_S = 5.0

_UNUSABLE = (OmegaConfBaseException, ValueError, RecursionError)


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """The config that the defaults, the files and the arguments describe; later ones win.

    Args:
        config_class: frozen dataclass, possibly nested, that validates in `__post_init__`.
        argv: arguments without the program's name. None is the real command line: errors are
            printed as `error: ...` and end the process with code 2, and later errors of ours are
            printed without a traceback.

    Raises:
        ConfigError: one line per problem, all problems of the whole input at once.
        SystemExit: 0 after `--help` or `--explain`.
    """
    if argv is not None:
        return _parse(config_class, argv)
    install_excepthook()
    try:
        return _parse(config_class, sys.argv[1:])
    except ConfigError as error:
        _print_error(error)
    sys.exit(2)


def install_excepthook() -> None:
    """Print an uncaught error of ours, or Ctrl-C, without a traceback; other errors as before.

    Exit codes: 1 after an `ArealiteError`, 130 after Ctrl-C.
    """
    previous = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ArealiteError):
            _print_error(error)
        elif isinstance(error, KeyboardInterrupt):
            if dist.rank() == 0:
                print("interrupted", file=sys.stderr)
            sys.exit(130)
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook


def save_config(cfg: object, path: Path) -> None:
    """Write every knob as YAML, all or nothing; `--config` reads it back to an equal config."""
    # In ASCII, with escapes: as Unicode, PyYAML would turn a NEL into a space.
    text = yaml.safe_dump(_escaped(dataclasses.asdict(cast(Any, cfg))), sort_keys=False)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise ConfigError(
            f"{path} could not be written: {error}. Choose another folder."
        ) from error


def to_dict(cfg: object) -> dict[str, Any]:
    """Plain values by dotted key, as on the command line: `{"rollout.max_staleness": 2}`."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, cfg)):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{key}": inner for key, inner in to_dict(value).items()}
        else:
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def check_at_least(cfg: object, section: str = "", **least: float) -> None:
    """Raise one ConfigError that names every field below its least value; for `__post_init__`.

    Numbers, words and switches of another type than their field says are named first.

    Args:
        section: the field that holds `cfg` in a recipe's Config, for the message.
    """
    prefix = f"{section}." if section else ""
    types = typing.get_type_hints(type(cfg))
    problems = [
        f"{prefix}{name}={value!r} {rule}."
        for name, type_ in types.items()
        if (rule := _broken_rule(type_, value := getattr(cfg, name)))
    ]
    problems = problems or [
        f"{prefix}{name}={getattr(cfg, name)} must be at least {minimum}."
        for name, minimum in least.items()
        if not getattr(cfg, name) >= minimum
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _broken_rule(type_: object, value: object) -> str:
    """What a value must be to have the type of its field; empty if it has."""
    if typing.get_origin(type_) is typing.Literal:
        allowed = typing.get_args(type_)
        return "" if value in allowed else f"is none of {allowed}"
    rules = {int: (Integral, "a whole number"), float: (Real, "a number")}
    rules |= {bool: (bool, "true or false"), str: (str, "text")}
    if type_ not in rules:
        return ""
    kind, name = rules[type_]
    is_right = isinstance(value, kind) and (type_ is bool or not isinstance(value, bool))
    return "" if is_right else f"must be {name}"


def _parse(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    schema = schema_of(config_class)
    arguments = read_arguments(argv, schema)
    if "--help" in arguments.flags:
        _print_and_exit(help_text(schema))
    found = [one for file in arguments.files for one in read_file(file, schema)]
    cfg = _build(schema, found + arguments.found)
    if "--explain" in arguments.flags:
        from arealite.explain import explain  # here, as it needs what most runs do not

        _print_and_exit(explain(cfg))
    return cast(ConfigT, cfg)


def _print_and_exit(text: str) -> typing.NoReturn:
    try:
        if dist.rank() == 0:
            print(text, flush=True)
    except BrokenPipeError:  # `--help | head`: what is left would be written again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _print_error(error: ArealiteError) -> None:
    label = "error: "
    if dist.rank() > 0:
        time.sleep(RANK_0_PRINTS_FIRST_S)
        label = f"[rank {dist.rank()}] error: "
    text = str(error).replace("\n", "\n" + " " * len(label))
    print(label + text, file=sys.stderr, flush=True)


def _escaped(value: object) -> object:
    """`value` with its texts written so that OmegaConf reads them as they are."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_escaped(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\\*\?\?\?", value):
        return "\\" + value
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


def _build(schema: Schema, found: list[Setting | Problem]) -> object:
    """The config, or a ConfigError with everything that is wrong.

    A check stops at its first complaint. So what was at fault is set back to its default and
    everything is checked again, until no new complaint comes.
    """
    settings = [one for one in found if isinstance(one, Setting)]
    problems = [one for one in found if isinstance(one, Problem)]
    lines = [problem.line for problem in problems]
    faulty = {key for problem in problems for key in problem.keys}
    while True:
        outcome = _attempt(schema, settings)
        if not isinstance(outcome, list):
            break
        # A complaint about a key that was set back is about a value that nobody asked for.
        reset = faulty - {setting.key for setting in settings}
        lines += [one.line for one in outcome if not _is_consequence(one, reset)]
        faulty |= {key for problem in outcome for key in problem.keys}
        remaining = [setting for setting in settings if setting.key not in faulty]
        if len(remaining) == len(settings):
            break  # a default is at fault
        settings = remaining
    if lines or isinstance(outcome, list):
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return outcome


def _attempt(schema: Schema, settings: list[Setting]) -> object:
    """The config, or a list of what is wrong with these settings as far as one look shows."""
    tree: Any = OmegaConf.structured(schema.sections[""])
    given = {setting.key: setting for setting in settings}
    problems: list[Problem] = []
    try:
        tree = OmegaConf.merge(tree, *[branch(one.key, one.value) for one in settings])
    except _UNUSABLE:
        for one in settings:  # each alone, to see which it was
            try:
                OmegaConf.merge(tree, branch(one.key, one.value))
            except _UNUSABLE as error:
                problems.append(_unusable(one.key, one, error))
        return problems
    for key in schema.knobs:
        try:
            value = OmegaConf.select(tree, key, throw_on_missing=True)
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
            if key in given and isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"it becomes {value}")
        except _UNUSABLE as error:
            problems.append(_unusable(key, given.get(key), error))
    return problems or _instantiate(tree, schema, settings)


def _unusable(key: str, setting: Setting | None, error: Exception) -> Problem:
    if setting is None and isinstance(error, MissingMandatoryValue):
        return Problem(line=f"{key} has no default. Set {key}=value.")
    shown = f"={setting.shown}{setting.where}" if setting else ""
    reason = str(error).partition("\n")[0][:200].rstrip(".")
    line = f"{key}{shown} cannot be used: {reason}. Write \\${{ where no reference is meant."
    return Problem(line=line, keys=frozenset({key}), section=key.rpartition(".")[0])


def _instantiate(tree: DictConfig, schema: Schema, settings: list[Setting]) -> object:
    """The config, or a list with the complaints of its sections; outer ones check after inner."""
    problems: list[Problem] = []
    cfg: object = None
    for section in schema.inner_first:
        node = OmegaConf.select(tree, section) if section else tree
        if node is None or any(_is_within(problem.section, section) for problem in problems):
            continue
        try:
            cfg = OmegaConf.to_object(node)
        except ValueError as error:
            problems.append(_complaint(str(error), section, schema, settings))
    return problems or cfg


def _complaint(message: str, section: str, schema: Schema, settings: list[Setting]) -> Problem:
    """The problem in what a `__post_init__` raised; at fault are the settings that it names.

    If it names none, all that the class has got are.
    """
    text = " ".join(message.split())
    inside = [setting for setting in settings if _is_within(setting.key, section)]
    last_names = {word.rpartition(".")[2] for word in _words(text)}
    named = [one for one in inside if _is_named(one.key, text)] or [
        one for one in inside if one.key.rpartition(".")[2] in last_names
    ]
    if section and named and not any(one.key in text for one in named):
        text = f"{section}: {text}"  # a class in two sections names one of them in its messages
    elif not named and not any(_is_named(key, text) for key in schema.knobs):
        values = ", ".join(f"{one.key}={one.shown}" for one in inside)
        text = f"{values or section or 'The defaults'}: {text}"
    where = "".join(dict.fromkeys(one.where for one in named))
    keys = frozenset(one.key for one in named or inside)
    return Problem(line=text + where, keys=keys, section=section)


def _is_consequence(problem: Problem, reset: set[str]) -> bool:
    """Whether it is about a key that has been set back to its default."""
    return any(_is_within(key, problem.section) and _is_named(key, problem.line) for key in reset)


def _is_within(key: str, section: str) -> bool:
    return not section or key == section or key.startswith(section + ".")


def _is_named(key: str, text: str) -> bool:
    """Whether `text` has the dotted key, or a part of it that ends like it."""
    return any(key == word or key.endswith("." + word) for word in _words(text))


def _words(text: str) -> set[str]:
    return {word.rstrip(".") for word in re.findall(r"[A-Za-z_][\w.]*", text)}
