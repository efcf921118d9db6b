import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arealite.training import logprobs as module
from arealite.training.logprobs import packed_logprobs

# T packed tokens, H hidden size, V vocabulary.
T, H, V = 13, 8, 29


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, token ids and a temperature for each token."""
    torch.manual_seed(seed)
    hidden = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    temperature = torch.empty(T, dtype=torch.float64).uniform_(0.5, 2)
    return hidden, head, torch.randint(V, (T,)), temperature


def is_first(*starts: int) -> torch.Tensor:
    mask = torch.zeros(T, dtype=torch.bool)
    mask[list(starts)] = True
    return mask


def naive(
    hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """Token t from hidden state t - 1, one at a time; the first gets 0."""
    values = [hidden.new_zeros(())]
    for t in range(1, T):
        logits = head @ hidden[t - 1] / temperature[t]
        values.append(logits[token_ids[t]] - logits.exp().sum().log())
    return torch.stack(values)


@pytest.fixture(params=[1, 4, 10, V, 1000])
def any_tile_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_WIDTH", request.param)


@pytest.mark.usefixtures("any_tile_width")
def test_values_and_both_gradients_equal_the_naive_ones_for_any_upstream_gradient():
    hidden, head, token_ids, temperature = inputs()
    upstream = torch.randn(T)
    found, _ = packed_logprobs(hidden, head, token_ids, temperature, is_first(0))
    found_gradients = torch.autograd.grad((found * upstream).sum(), (hidden, head))
    expected = naive(hidden, head, token_ids, temperature)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, head))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_tokens_without_upstream_gradient_do_not_change_the_gradient_of_the_others():
    hidden, head, token_ids, temperature = inputs()
    upstream = torch.zeros(T)
    upstream[[3, 7]] = torch.tensor([1.0, -2.0])
    found, _ = packed_logprobs(hidden, head, token_ids, temperature, is_first(0))
    found.backward(upstream)
    expected = naive(hidden, head, token_ids, temperature)
    [reference] = torch.autograd.grad(expected, hidden, upstream.double())
    assert hidden.grad is not None
    assert hidden.grad.abs().sum(-1).nonzero()[:, 0].tolist() == [2, 6]
    torch.testing.assert_close(hidden.grad, reference, rtol=1e-4, atol=1e-5)


def test_no_upstream_gradient_at_all_gives_gradients_of_zero():
    hidden, head, token_ids, temperature = inputs()
    found, _ = packed_logprobs(hidden, head, token_ids, temperature, is_first(0))
    gradients = torch.autograd.grad(found, (hidden, head), torch.zeros(T))
    assert [gradient.abs().sum().item() for gradient in gradients] == [0, 0]


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_larger_than_the_head_is_made_forward_or_backward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TILE_WIDTH", 4)
    hidden, head, token_ids, temperature = inputs()
    with LargestTensor() as largest:
        found, _ = packed_logprobs(hidden, head, token_ids, temperature, is_first(0))
        found.sum().backward()
    assert largest.elements == V * H < T * V


def test_first_token_of_each_sequence_has_log_prob_zero_and_no_gradient_across_the_boundary():
    hidden, head, token_ids, temperature = inputs()
    found, entropy = packed_logprobs(hidden, head, token_ids, temperature, is_first(0, 5))
    found.sum().backward()
    assert found[[0, 5]].tolist() == [0.0, 0.0]
    assert entropy[[0, 5]].tolist() == [0.0, 0.0]
    assert hidden.grad is not None
    assert hidden.grad[[4, T - 1]].abs().sum() == 0  # the last token of each sequence


def test_temperature_zero_counts_as_one():
    hidden, head, token_ids, temperature = inputs()
    greedy, _ = packed_logprobs(hidden, head, token_ids, temperature * 0, is_first(0))
    plain, _ = packed_logprobs(hidden, head, token_ids, temperature * 0 + 1, is_first(0))
    assert torch.equal(greedy, plain)


@pytest.mark.usefixtures("any_tile_width")
def test_entropy_is_that_of_the_distribution_each_token_was_drawn_from():
    hidden, head, token_ids, temperature = inputs()
    _, entropy = packed_logprobs(hidden, head, token_ids, temperature, is_first(0))
    probs = torch.stack([(head @ hidden[t - 1] / temperature[t]).softmax(-1) for t in range(1, T)])
    expected = torch.distributions.Categorical(probs=probs).entropy().float()
    torch.testing.assert_close(entropy[1:], expected.detach(), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad


@pytest.mark.usefixtures("any_tile_width")
def test_uniform_logits_have_the_log_of_the_vocabulary_as_entropy_and_huge_ones_stay_finite():
    head = torch.zeros(V, H)
    hidden = torch.ones(T, H)
    token_ids = torch.zeros(T, dtype=torch.int64)
    logprobs, entropy = packed_logprobs(hidden, head, token_ids, torch.ones(T), is_first(0))
    assert entropy[1].item() == pytest.approx(torch.tensor(float(V)).log().item())
    assert logprobs[1].item() == pytest.approx(-entropy[1].item())
    head[0] = 1e30
    logprobs, entropy = packed_logprobs(hidden, head, token_ids, torch.ones(T), is_first(0))
    assert logprobs[1].item() == 0
    assert entropy[1].item() == 0


@pytest.mark.usefixtures("any_tile_width")
def test_half_precision_head_gets_a_gradient_summed_in_float32():
    torch.manual_seed(0)
    hidden = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)
    token_ids = torch.randint(V, (T,))
    found, _ = packed_logprobs(hidden, head, token_ids, torch.ones(T), is_first(0))
    found.sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    naive(wide[0], wide[1], token_ids, torch.ones(T)).sum().backward()
    assert found.dtype == torch.float32
    for narrow, reference in zip((hidden, head), wide, strict=True):
        assert narrow.grad is not None
        assert narrow.grad.dtype == torch.bfloat16
        assert reference.grad is not None
        assert (narrow.grad - reference.grad).norm() < 0.02 * reference.grad.norm()
