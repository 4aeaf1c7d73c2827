"""Log-probabilities and entropies of target tokens from hidden states, without ever holding a full [N, V] of logits.

The vocabulary is visited in chunks with an online softmax, as flash attention visits keys (hidden states are the
queries, the head's rows are keys and values). That gives, in the same pass, the log-sum-exp, the entropy, and per token
the gradient of its log-probability with respect to its hidden state; the backward pass then only scales a [N, D] array
and computes no logits again, unless the head itself is trained or the entropy is differentiated.

Legend: N tokens, D hidden size, V vocabulary, C a chunk of it. For logits z = h W^T + b, the model's own scaling gives
l = scale * z, or softcap * tanh(scale * z / softcap), and then l / temperature; log p(y) = l_y - logsumexp(l).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKEN_CHUNK = 1024
VOCAB_CHUNK = 4096  # on a CPU: 16 MB of float32 logits at a time
CUDA_LOGITS = 2**26  # logits of a chunk on a GPU, 256 MB: 4096 words at a time spent 48 ms on launches for 11 of work


@dataclass(frozen=True)
class Head:
    """A language-model head and what the model does to its logits."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    """Logits are multiplied by it (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Logits are squashed into (-softcap, softcap) by tanh (Gemma 2's `final_logit_softcapping`)."""


def scale_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Raw logits [..., V] the way the model returns them."""
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `targets` and entropies of the distributions they come from; both differentiable.

    The matmuls run in the weight's dtype (under autocast: in autocast's), everything after them in float32 (float64 for
    float64 weights). A frozen head costs no gradient buffer.

    Args:
        hidden: [N, D], the decoder's output at the tokens that predict the targets.
        head: the head.
        targets: [N] int64.
        temperature: logits are divided by it.
        entropy: whether to compute entropies.

    Returns:
        Log-probabilities [N], and entropies [N] in nats or None.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: log-probabilities need a temperature above 0.")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(device, enabled=False):
        logp, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), head.weight.to(dtype), bias, targets, head.scale, head.softcap, temperature, entropy
        )
    return logp, entropies if entropy else None


@dataclass(frozen=True)
class _Logits:
    """The scaled logits of a chunk and what the chain rule needs of them."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float

    def __call__(self, hidden: Tensor, vocab: slice) -> tuple[Tensor, Tensor | float]:
        """Scaled logits l [N, C], and their derivative dl/dz: [N, C], or a number where it is constant."""
        raw = F.linear(hidden, self.weight[vocab], None if self.bias is None else self.bias[vocab])
        logits = raw.to(_accumulator(raw.dtype))
        if self.softcap is None:
            slope = self.scale / self.temperature
            return logits.mul_(slope) if slope != 1.0 else logits, slope
        squashed = logits.mul_(self.scale / self.softcap).tanh_()
        slope_of_tanh = (1 - squashed.square()).mul_(self.scale / self.temperature)
        return squashed.mul_(self.softcap / self.temperature), slope_of_tanh

    def vocab_chunks(self, num_tokens: int) -> Iterator[slice]:
        """Slices of the vocabulary, for so many tokens at a time."""
        size, step = len(self.weight), VOCAB_CHUNK
        if self.weight.device.type == "cuda":
            step = max(step, CUDA_LOGITS // max(1, min(num_tokens, TOKEN_CHUNK)))
        return (slice(v, min(v + step, size)) for v in range(0, size, step))


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies [N]; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logits = _Logits(weight, bias, scale, softcap, temperature)
        with_gradient = bool(ctx.needs_input_grad[0])
        chunks = [slice(n, n + TOKEN_CHUNK) for n in range(0, max(len(hidden), 1), TOKEN_CHUNK)]
        parts = [_online_softmax(logits, hidden[n], targets[n], with_entropy, with_gradient) for n in chunks]
        logp, lse, entropies, gradient = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropies, gradient)
        ctx.options = (scale, softcap, temperature)
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropies, gradient = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if grad_logp is None and grad_entropy is None:
            return (None,) * 8
        again = (needs_hidden and grad_entropy is not None, needs_weight, needs_bias)
        grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if any(again):
            logits = _Logits(weight, bias, *ctx.options)
            grads = _recomputed_gradients(logits, hidden, targets, lse, entropies, grad_logp, grad_entropy, again)
        if needs_hidden and grad_entropy is None and grad_logp is not None:
            grads = ((gradient * grad_logp[:, None]).to(hidden.dtype), *grads[1:])
        return *grads, None, None, None, None, None


def _online_softmax(
    logits: _Logits, hidden: Tensor, targets: Tensor, with_entropy: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one chunk of tokens: log-probabilities, log-sum-exp, entropies [N], and d log-probability / d hidden [N, D].

    The running sums are kept relative to the running maximum and rescaled when it moves (Milakov and Gimelshein, 2018).
    """
    weight, dtype = logits.weight, _accumulator(hidden.dtype)
    maximum = hidden.new_full((len(hidden), 1), -torch.inf, dtype=dtype)
    total, weighted, target_logit, target_slope = (torch.zeros_like(maximum) for _ in range(4))
    mean_row = hidden.new_zeros((len(hidden), hidden.shape[1] if with_gradient else 0), dtype=dtype)
    for vocab in logits.vocab_chunks(len(hidden)):
        chunk, slope = logits(hidden, vocab)
        local, inside = _within(targets, vocab)
        target_logit = torch.where(inside, chunk.gather(1, local), target_logit)
        if isinstance(slope, Tensor):
            target_slope = torch.where(inside, slope.gather(1, local), target_slope)
        new_maximum = torch.maximum(maximum, chunk.amax(1, keepdim=True))
        shift = (maximum - new_maximum).clamp_(min=torch.finfo(dtype).min)  # -inf times a total of 0 would be NaN
        rescale, maximum = shift.exp(), new_maximum
        exponential = chunk.sub_(maximum).exp()
        if with_entropy:  # the sum of e^(l - m) (l - m), whose second factor moves with m too
            weighted = (weighted + total * shift) * rescale + chunk.mul_(exponential).sum(1, keepdim=True)
        total = total * rescale + exponential.sum(1, keepdim=True)
        if with_gradient:
            derivative = exponential if isinstance(slope, float) and slope == 1.0 else exponential.mul_(slope)
            mean_row = mean_row.mul_(rescale).add_(derivative.to(weight.dtype) @ weight[vocab])
    log_total = total.log()
    if with_gradient:  # d log p(y) / dh = l'(z_y) w_y - sum_v p_v l'(z_v) w_v
        own_slope = target_slope if logits.softcap is not None else logits.scale / logits.temperature
        mean_row = (weight[targets].to(dtype) * own_slope).sub_(mean_row.div_(total))
    entropies = log_total - weighted / total
    return (target_logit - maximum - log_total)[:, 0], (maximum + log_total)[:, 0], entropies[:, 0], mean_row


def _recomputed_gradients(
    logits: _Logits,
    hidden: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropies: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias from logits computed again, one vocabulary chunk at a time.

    dL/dz_v = l'(z_v) (g (1[v = y] - p_v) - g_H p_v (log p_v + H)), g and g_H the incoming gradients of a token.
    """
    weight, dtype = logits.weight, lse.dtype
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
    grad_weight = torch.zeros_like(weight) if needs[1] else None
    grad_bias = torch.zeros_like(weight[:, 0]) if needs[2] else None
    for vocab in logits.vocab_chunks(len(hidden)):
        weight_sum = torch.zeros_like(weight[vocab], dtype=dtype) if needs[1] else None
        bias_sum = torch.zeros_like(weight[vocab, 0], dtype=dtype) if needs[2] else None
        for start in range(0, len(hidden), TOKEN_CHUNK):
            tokens = slice(start, start + TOKEN_CHUNK)
            chunk, slope = logits(hidden[tokens], vocab)
            log_p = chunk.sub_(lse[tokens, None])
            grad = torch.zeros_like(log_p)
            if grad_logp is not None:
                local, inside = _within(targets[tokens], vocab)
                grad.addcmul_(log_p.exp(), grad_logp[tokens, None], value=-1)
                grad.scatter_add_(1, local, grad_logp[tokens, None] * inside)
            if grad_entropy is not None:
                grad.addcmul_(log_p.exp() * (log_p + entropies[tokens, None]), grad_entropy[tokens, None], value=-1)
            if isinstance(slope, Tensor) or slope != 1.0:
                grad = grad.mul_(slope)
            low = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[tokens] += low @ weight[vocab]
            if weight_sum is not None:
                weight_sum += low.T @ hidden[tokens]
            if bias_sum is not None:
                bias_sum += grad.sum(0)
        if grad_weight is not None and weight_sum is not None:
            grad_weight[vocab] = weight_sum.to(weight.dtype)
        if grad_bias is not None and bias_sum is not None:
            grad_bias[vocab] = bias_sum.to(weight.dtype)
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _within(targets: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Targets counted from the chunk's first token, clamped into the chunk, and whether they lie in it; both [N, 1]."""
    local = (targets - vocab.start)[:, None]
    inside = (local >= 0) & (local < vocab.stop - vocab.start)
    return local.clamp(0, vocab.stop - vocab.start - 1), inside


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything after a matmul."""
    return torch.float64 if dtype == torch.float64 else torch.float32
