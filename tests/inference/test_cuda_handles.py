"""Handles of CUDA memory as JSON: every field comes back, and nothing but fields."""

import inspect
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from arealite.inference.cuda_handles import (
    _NUM_FIELDS,
    _TYPES,
    handles_from_json,
    handles_to_json,
)

SIZES = st.integers(0, 2**48)


@st.composite
def handles(draw: st.DrawFn) -> tuple[Any, ...]:
    """What `torch.multiprocessing.reductions.reduce_tensor` tells of a buffer of uint8."""
    size, raw = draw(SIZES), st.binary(min_size=1, max_size=80)
    return (
        torch.Tensor,
        torch.Size([size]),
        (1,),
        draw(SIZES),
        torch.storage.TypedStorage,
        torch.uint8,
        draw(st.integers(0, 15)),
        draw(raw),
        size,
        draw(SIZES),
        False,
        draw(raw),
        draw(SIZES),
        draw(raw),
        draw(st.booleans()),
    )


@given(by_gpu=st.dictionaries(st.text(), handles(), max_size=3))
def test_handles_come_back_as_they_were(by_gpu: dict[str, tuple[Any, ...]]):
    update = {"names": ["a"], "shapes": [[2, 3]], "tensor_sizes": [24], "ipc_handles": by_gpu}
    whole = update | {"ipc_handles_pickled": None}
    again = handles_from_json(json.loads(json.dumps(handles_to_json(whole))))
    assert again == update
    for gpu, fields in by_gpu.items():
        assert [type(value) for value in again["ipc_handles"][gpu]] == [
            tuple if isinstance(value, torch.Size) else type(value) for value in fields
        ]


def test_a_handle_has_the_fields_that_torch_makes_a_tensor_of():
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert len(names) == _NUM_FIELDS
    assert {place: names[place] for place in _TYPES} == {
        0: "tensor_cls",
        4: "storage_cls",
        5: "dtype",
    }


def test_a_message_without_handles_stays_as_it_is():
    message = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}
    assert handles_to_json(message) == message
    assert handles_from_json(message) == message


def test_a_handle_of_another_kind_is_not_sent():
    fields = [None] * 15
    fields[0], fields[4], fields[5] = torch.Tensor, torch.storage.TypedStorage, torch.float32
    for wrong in (tuple(fields), (torch.Tensor,) * 7):
        with pytest.raises(ValueError, match="not the handle of a buffer of uint8"):
            handles_to_json({"ipc_handles": {"GPU-0": wrong}})


@pytest.mark.fault(64, "handles of CUDA memory that are none")
@pytest.mark.parametrize(
    "sent", [{"GPU-0": [1, 2]}, {"GPU-0": [{"base64": "%"}] * 15}, {"GPU-0": [{}] * 15}, [1], "x"]
)
def test_what_is_no_handle_is_refused(sent: Any):
    with pytest.raises(ValueError, match=r"handle|base64|[Aa]lphabet"):
        handles_from_json({"ipc_handles": sent})
