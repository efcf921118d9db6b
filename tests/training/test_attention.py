import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arealite.errors import ConfigError
from arealite.training import attention
from arealite.training.attention import packed_attention, packed_layout

# T packed tokens, H heads, D head size.
CPU = torch.device("cpu")


def textbook(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Causal attention of one sequence, [1, H, L, D] to [1, L, H, D], by the formula."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    age = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    hidden = (age < 0) if window is None else (age < 0) | (age >= window)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def random_inputs(num_tokens: int) -> list[torch.Tensor]:
    """Query of 4 heads, key and value of 2."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, num_tokens, 8, requires_grad=True) for heads in (4, 2, 2)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    window=st.none() | st.integers(1, 8),
    padding=st.sampled_from([1.0, 1.1, 2.0, 100.0]),
)
def test_each_sequence_attends_as_if_it_were_alone(
    lengths: list[int], window: int | None, padding: float
):
    query, key, value = random_inputs(sum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PADDING", padding)
        layout = packed_layout(torch.tensor([0, *lengths]).cumsum(0), CPU)
    out, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, layout=layout, sliding_window=window
    )
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    expected = torch.cat([textbook(*part, window) for part in parts], dim=1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), upstream)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_layout_pads_a_little_and_no_more():
    layout = packed_layout(torch.tensor([0, 10, 21, 22]), CPU)
    assert layout.buckets == ((1, 1), (2, 11))
    assert layout.max_length == 11
    assert layout.position_ids.tolist() == [*range(10), *range(11), 0]


def test_a_nan_in_one_sequence_stays_in_its_own_attention():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    layout = packed_layout(torch.tensor([0, 4, 9]), CPU)
    with torch.no_grad():
        key[:, :, 0] = float("nan")
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, layout=layout)
    out[:, 4:].sum().backward()
    assert out[0, :4].isnan().any()
    assert out[0, 4:].isfinite().all()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad[:, :, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("mask", "option"),
    [
        (None, {"s_aux": torch.zeros(4)}),
        (None, {"softcap": 50.0}),
        (None, {"block_indices": torch.zeros(3)}),
        (torch.zeros(1, 1, 3, 3), {}),
    ],
)
def test_attention_with_a_feature_that_is_not_there_is_refused_by_name(
    mask: torch.Tensor | None, option: dict[str, torch.Tensor | float]
):
    with pytest.raises(ConfigError, match=next(iter(option), "attention_mask")):
        packed_attention(torch.nn.Module(), *random_inputs(3), mask, **option)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_attention_on_cuda_equals_the_textbook(window: int | None):
    lengths = [3, 17, 1, 30]
    inputs = [x.detach().cuda().bfloat16().requires_grad_() for x in random_inputs(sum(lengths))]
    layout = packed_layout(torch.tensor([0, *lengths]).cumsum(0), inputs[0].device)
    out, _ = packed_attention(
        torch.nn.Module(), *inputs, None, layout=layout, sliding_window=window
    )
    exact = [x.detach().float().cpu().requires_grad_() for x in inputs]
    parts = zip(*(x.split(lengths, dim=2) for x in exact), strict=True)
    expected = torch.cat([textbook(*part, window) for part in parts], dim=1)
    torch.testing.assert_close(out.float().cpu(), expected, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    expected.sum().backward()
    for narrow, wide in zip(inputs, exact, strict=True):
        assert narrow.grad is not None
        assert wide.grad is not None
        assert (narrow.grad.float().cpu() - wide.grad).norm() < 0.02 * wide.grad.norm()
