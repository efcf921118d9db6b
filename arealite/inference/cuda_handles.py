"""CUDA IPC handles as JSON: what vLLM would pickle, so that no server unpickles what a client sent.

A handle is the tuple of arguments from which `torch.multiprocessing` makes a tensor that lies in
the memory of another process; its fields are plain values and bytes but for three types, which are
always the same here: buffers of uint8.
"""

import base64
from typing import Any

import torch

_TYPES = {0: torch.Tensor, 4: torch.storage.TypedStorage, 5: torch.uint8}
"""Fields that are types, by their place in the tuple."""
_NUM_FIELDS = 15
_BYTES = "base64"


def handles_to_json(update_info: dict[str, Any]) -> dict[str, Any]:
    """vLLM's message about an update, with `ipc_handles`, if it has any, in plain values.

    Raises:
        ValueError: handles of something else than one buffer of uint8 for each GPU.
    """
    if update_info.get("ipc_handles") is None:
        return update_info
    handles = {gpu: _packed(fields) for gpu, fields in update_info["ipc_handles"].items()}
    left = {key: value for key, value in update_info.items() if value is not None}
    return left | {"ipc_handles": handles}


def handles_from_json(update_info: dict[str, Any]) -> dict[str, Any]:
    """The message as vLLM's receiver takes it.

    Raises:
        ValueError: it holds no such handles.
    """
    if update_info.get("ipc_handles") is None:
        return update_info
    try:
        handles = {gpu: _unpacked(fields) for gpu, fields in update_info["ipc_handles"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"ipc_handles are not those of an arealite trainer: {error}") from error
    return update_info | {"ipc_handles": handles}


def _packed(fields: tuple[Any, ...]) -> list[Any]:
    found = {place: value for place, value in enumerate(fields) if place in _TYPES}
    if len(fields) != _NUM_FIELDS or found != _TYPES:
        raise ValueError(f"not the handle of a buffer of uint8: {found} in {len(fields)} fields")
    return [None if place in _TYPES else _plain(value) for place, value in enumerate(fields)]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    return list(value) if isinstance(value, tuple) else value


def _unpacked(fields: list[Any]) -> tuple[Any, ...]:
    if len(fields) != _NUM_FIELDS:
        raise ValueError(f"a handle of {len(fields)} fields instead of {_NUM_FIELDS}")
    return tuple(_TYPES.get(place, _value(field)) for place, field in enumerate(fields))


def _value(field: Any) -> Any:
    if isinstance(field, dict):
        return base64.b64decode(field[_BYTES], validate=True)
    return tuple(field) if isinstance(field, list) else field
