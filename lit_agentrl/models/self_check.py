"""Start-up checks on the user's own model: that its logits are understood, and that sharing prefixes changes nothing.

A language model can do something to its logits, or carry something from token to token, that its configuration does not
say. A few short rows through the model's own forward tell, in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import attention_traits, base_lm, decoder_of, logits_of
from lit_agentrl.models.prefix_tree import PackedTree

if TYPE_CHECKING:
    from lit_agentrl.models.scoring import PrefixGroupedModel

TOLERANCE = 1e-3
"""Nats. Right models differ by 5e-7 in float32, wrong ones by 7e-3 to 0.5 (LFM2, Bloom, Qwen3.5, unscaled heads)."""
TOLERANCE_HALF = 0.2  # in 16-bit floats two right forwards differ by 3e-3 to 5e-2 already
MAX_PREFIX = 96  # tokens; longer sliding windows are not reached by the check, only by their mask's own tests


def check_head(lm: nn.Module) -> None:
    """Compare the model's logits with those of its head and the scaling in its configuration.

    Raises:
        UserError: if they differ.
    """
    token_ids = _check_rows(lm, prefix=8)[0][:1]
    with _undisturbed(lm):
        expected = _full_logits(lm, token_ids).log_softmax(-1)
        hidden = decoder_of(lm)(input_ids=token_ids, use_cache=False).last_hidden_state
        error = float((logits_of(lm, hidden).to(expected.dtype).log_softmax(-1) - expected).abs().max())
    if not error <= _tolerance(lm):  # also for NaN
        raise UserError(
            f"{type(base_lm(lm)).__name__}: its logits are not its head's, scaled as its configuration says "
            f"(log-probabilities differ by {error:.1e}). Models that change logits in their own way are not supported."
        )


def verify_prefix_sharing(model: PrefixGroupedModel) -> float:
    """Largest difference of log-probabilities, in nats, between short rows alone and the same rows as a prefix tree.

    The rows share a prefix longer than the sliding window, where the window is short enough to try.
    """
    windows = [window for window in attention_traits(decoder_of(model.lm)).windows.values() if window]
    token_ids, lengths = _check_rows(model.lm, prefix=min(max(windows, default=16) + 8, MAX_PREFIX))
    tree = PackedTree.build(token_ids, lengths)
    with _undisturbed(model.lm):
        hidden = model.hidden_states(tree, model.backend_for(tree))
        shared = logits_of(model.lm, hidden).float().log_softmax(-1)
        differences = []
        for row, length, index in zip(token_ids, lengths.tolist(), tree.index, strict=True):
            alone = _full_logits(model.lm, row[None, :length])[0].float().log_softmax(-1)
            differences.append((alone - shared[index[:length]]).abs().max())
    return float(torch.stack(differences).max())


def why_sharing_is_wrong(model: PrefixGroupedModel) -> str:
    """What the check found; empty where shared and separate rows agree."""
    try:
        error = verify_prefix_sharing(model)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as failure:
        return f"the start-up check failed with {type(failure).__name__}: {failure}"
    if error <= _tolerance(model.lm):
        return ""
    return f"in the start-up check its log-probabilities moved by {error:.1e} nats"


def _check_rows(lm: nn.Module, prefix: int) -> tuple[Tensor, Tensor]:
    """Three rows [3, prefix + 8] of random tokens with a common prefix, and their lengths [3]."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = base_lm(lm).config.get_text_config().vocab_size
    token_ids = torch.randint(vocabulary, (3, prefix + 8), generator=generator)
    token_ids[:, :prefix] = token_ids[0, :prefix]
    lengths = torch.tensor([prefix + 8, prefix + 5, prefix + 8])
    device = next(base_lm(lm).parameters()).device
    return token_ids.to(device), lengths.to(device)


@contextmanager
def _undisturbed(lm: nn.Module) -> Iterator[None]:
    """No gradients, dropout or mixed precision (its rounding would hide mistakes); afterwards all modes as before."""
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        with torch.no_grad(), torch.autocast(base_lm(lm).device.type, enabled=False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _full_logits(lm: nn.Module, token_ids: Tensor) -> Tensor:
    """[B, L, V] logits by the model's own forward, at least float32."""
    logits: Tensor = base_lm(lm)(input_ids=token_ids, use_cache=False).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def _tolerance(lm: nn.Module) -> float:
    """Nats that two right forwards may differ by in the model's precision."""
    return TOLERANCE_HALF if base_lm(lm).dtype in (torch.float16, torch.bfloat16) else TOLERANCE
