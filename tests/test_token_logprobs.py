"""Chunked log-probabilities and entropies against full logits and log_softmax."""

import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_agentrl.models import Head, token_logprobs
from lit_agentrl.models.token_logprobs import scale_logits

SCALINGS = {"plain": (1.0, None), "scaled": (0.3, None), "softcap": (1.0, 2.0), "scaled softcap": (2.5, 1.5)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that divide neither the 10 tokens nor the 23 words."""
    module = sys.modules[token_logprobs.__module__]  # the package exports the function under the module's name
    monkeypatch.setattr(module, "TOKEN_CHUNK", 4)
    monkeypatch.setattr(module, "VOCAB_CHUNK", 5)


def leaves(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [10, 6], weight [23, 6], bias [23] with gradients, and targets [10] that reach both ends."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((10, 6), (23, 6), (23,))
    )
    targets = torch.randint(23, (10,), generator=generator)
    targets[0], targets[1] = 0, 22
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def by_log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float | None, t: float
) -> tuple[Tensor, Tensor]:
    """The slow obvious twin."""
    logits = scale_logits(torch.nn.functional.linear(hidden, weight, bias), scale, softcap)
    log_p = (logits / t).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("use", ["logprobs", "entropy", "both"])
def test_values_and_gradients_equal_log_softmax(scaling: str, with_bias: bool, use: str) -> None:
    hidden, weight, bias, targets = leaves()
    used_bias = bias if with_bias else None
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    upstream = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream = upstream * torch.tensor([use != "entropy", use != "logprobs"])[:, None]

    head = Head(weight, used_bias, *SCALINGS[scaling])
    logp, entropy = token_logprobs(hidden, head, targets, temperature=0.7, entropy=True)
    assert entropy is not None
    slow_logp, slow_entropy = by_log_softmax(hidden, weight, used_bias, targets, *SCALINGS[scaling], 0.7)
    torch.testing.assert_close((logp, entropy), (slow_logp, slow_entropy), rtol=0, atol=1e-13)

    fast: list[Tensor] = [logp] if use == "logprobs" else [entropy] if use == "entropy" else [logp, entropy]
    weights = [upstream[0]] if use == "logprobs" else [upstream[1]] if use == "entropy" else list(upstream)
    fast_grads = torch.autograd.grad(fast, inputs, weights)
    slow_grads = torch.autograd.grad([slow_logp, slow_entropy], inputs, list(upstream))
    torch.testing.assert_close(fast_grads, slow_grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_frozen_head_gives_the_same_gradient_of_hidden_states(scaling: str) -> None:
    """The path of LoRA: no weight gradient, and no logits in the backward pass."""
    hidden, weight, bias, targets = leaves()
    trained, _ = token_logprobs(hidden, Head(weight, bias, *SCALINGS[scaling]), targets)
    frozen, _ = token_logprobs(hidden, Head(weight.detach(), bias.detach(), *SCALINGS[scaling]), targets)
    (expected,) = torch.autograd.grad(trained.square().sum(), hidden)
    (gradient,) = torch.autograd.grad(frozen.square().sum(), hidden)
    slow, _ = by_log_softmax(hidden, weight, bias, targets, *SCALINGS[scaling], 1.0)
    (slow_gradient,) = torch.autograd.grad(slow.square().sum(), hidden)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, slow_gradient, rtol=0, atol=1e-12)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("is_trained", "elements"), [(False, 40 * 3), (True, 500 * 3)])
def test_nothing_is_as_large_as_the_logits(is_trained: bool, elements: int) -> None:
    """Logits would have 20 000 elements. A trained head costs its gradient, a frozen one nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 3, generator=generator).requires_grad_()
    weight = torch.randn(500, 3, generator=generator).requires_grad_(is_trained)
    targets = torch.randint(500, (40,), generator=generator)
    with _Largest() as largest:
        logp, entropy = token_logprobs(hidden, Head(weight), targets, entropy=True)
        assert entropy is not None
        (logp.sum() + entropy.sum()).backward()
    assert largest.elements == elements


def test_extreme_logits_stay_finite() -> None:
    """Later chunks raise the maximum by far more than exp can hold."""
    weight = torch.linspace(-4000, 4000, 23, dtype=torch.float64)[:, None].requires_grad_()
    hidden = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([22, 22, 3])
    logp, entropy = token_logprobs(hidden, Head(weight), targets, entropy=True)
    expected, expected_entropy = by_log_softmax(hidden, weight, None, targets, 1.0, None, 1.0)
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(entropy, expected_entropy.nan_to_num())
    for gradient in torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("entropy", [False, True])
def test_no_targets_at_all(entropy: bool) -> None:
    hidden, weight, _, _ = leaves()
    none = torch.zeros(0, dtype=torch.long)
    logp, entropies = token_logprobs(hidden[:0], Head(weight), none, entropy=entropy)
    assert logp.shape == (0,)
    assert (entropies is not None) == entropy
    gradients = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert all(not gradient.any() for gradient in gradients)


def test_half_precision_matmuls_accumulate_in_float32() -> None:
    hidden, weight, _, targets = leaves()
    low_hidden, low_weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    logp, _ = token_logprobs(low_hidden, Head(low_weight), targets)
    assert logp.dtype == torch.float32
    exact, _ = by_log_softmax(low_hidden.double(), low_weight.double(), None, targets, 1.0, None, 1.0)
    torch.testing.assert_close(logp.double(), exact, rtol=0, atol=0.03)
    logp.sum().backward()
    slow_grads = torch.autograd.grad(exact.sum(), (low_hidden, low_weight))
    for low, exact_gradient in zip((low_hidden, low_weight), slow_grads, strict=True):
        assert low.grad is not None
        assert low.grad.dtype == torch.bfloat16
        torch.testing.assert_close(low.grad.float(), exact_gradient.float(), rtol=0.05, atol=0.05)


def test_autocast_decides_the_dtype_of_the_matmuls() -> None:
    """Mixed precision: float32 weights, matmuls in bfloat16, gradients back in float32."""
    hidden, weight, _, targets = leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = token_logprobs(hidden, Head(weight), targets)
    logp.sum().backward()
    rounded, _ = token_logprobs(hidden.detach().bfloat16(), Head(weight.detach().bfloat16()), targets)
    assert logp.dtype == torch.float32
    assert torch.equal(logp, rounded)
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    hidden, weight, _, targets = leaves()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, Head(weight), targets, temperature=temperature)
