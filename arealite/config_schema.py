"""What may be set in a config class: its keys with their types, and how both are written."""

import dataclasses
import typing
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, cast

_SCALARS = (int, float, bool, str, NoneType)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """Every dotted key, in the order of the fields.

    Example: knobs {"steps": int, "train.lr": float}, sections {"": Config, "train": FSDPConfig}.
    """

    knobs: dict[str, object]  # type of each value
    sections: dict[str, type]  # nested classes; "" is the whole config
    optional: frozenset[str]  # sections that may be null

    @property
    def inner_first(self) -> list[str]:
        """The sections, each after those inside it."""
        return sorted(self.sections, key=lambda key: key.count(".") + bool(key), reverse=True)


def schema_of(config_class: type, prefix: str = "", instance: object = None) -> Schema:
    """Every key of a config class; `instance` is the section's default, if it has one."""
    knobs: dict[str, object] = {}
    sections: dict[str, type] = {prefix.removesuffix("."): config_class}
    optional: set[str] = set()
    kinds = typing.get_type_hints(config_class)
    for field in dataclasses.fields(cast(Any, config_class)):
        key, kind = prefix + field.name, kinds[field.name]
        nested = [cast(type, one) for one in alternatives(kind) if dataclasses.is_dataclass(one)]
        if not nested:
            _check_kind(key, kind)
            knobs[key] = kind
            continue
        default = getattr(instance, field.name, None) or _default(field)
        is_given = dataclasses.is_dataclass(default)
        inner = schema_of(
            type(default) if is_given else nested[0], f"{key}.", default if is_given else None
        )
        knobs |= inner.knobs
        sections |= inner.sections
        optional |= inner.optional | ({key} if NoneType in alternatives(kind) else set())
    return Schema(knobs=knobs, sections=sections, optional=frozenset(optional))


def alternatives(kind: object) -> tuple[Any, ...]:
    """The members of `X | Y`; any other type is its own only member."""
    is_union = typing.get_origin(kind) in (UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def kind_text(kind: object) -> str:
    """A type as a user reads it: `int`, `str | null`, `[str, ...]`, `keep | wait`."""
    if typing.get_origin(kind) is Literal:
        return " | ".join(value_text(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        items = ("..." if item is ... else kind_text(item) for item in typing.get_args(kind))
        return f"[{', '.join(items)}]"
    if kind is NoneType:
        return "null"
    return (
        kind.__name__ if isinstance(kind, type) else " | ".join(map(kind_text, alternatives(kind)))
    )


def value_text(value: object) -> str:
    """A value as a user writes it: `true`, `null`, `[a, b]`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def branch(key: str, value: object) -> dict[str, Any]:
    """`{"a": {"b": value}}` for the key `a.b`."""
    name, _, rest = key.partition(".")
    return {name: branch(rest, value) if rest else value}


def _default(field: dataclasses.Field[Any]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_kind(key: str, kind: object) -> None:
    for one in alternatives(kind):
        if typing.get_origin(one) is tuple:
            for item in typing.get_args(one):
                _check_kind(key, item)
        elif one not in (*_SCALARS, ...) and typing.get_origin(one) is not Literal:
            raise TypeError(
                f"{key} has the type {kind}. A knob is an int, float, bool, str, Literal or tuple "
                "of these, or None; a section is a dataclass."
            )
