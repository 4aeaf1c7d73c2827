"""Start-up checks on the user's own model: that its logits are understood, and that sharing prefixes changes nothing.

A language model can do something to its logits, or carry something from token to token, that its configuration does not
say. A few short rows through the model's own forward tell, in a fraction of a second.

Sliding windows of thousands of tokens are checked on short rows too: the window is shortened for the check, in the
configuration that both the model's own mask and that of the tree are made from. The rule of a mask does not depend on
the window's length, so what holds for a short one holds for the true one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_agentrl.errors import UserError
from lit_agentrl.models.lm_parts import attention_traits, base_lm, decoder_of, logits_of
from lit_agentrl.models.prefix_tree import PackedTree
from lit_agentrl.models.tree_attention import attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lit_agentrl.models.scoring import PrefixGroupedModel

TOLERANCE = 1e-3
"""Nats. Right models differ by 5e-7 in float32, wrong ones by 7e-3 to 0.5 (LFM2, Bloom, Qwen3.5, unscaled heads)."""
TOLERANCE_HALF = 0.2  # in 16-bit floats two right forwards differ by 3e-3 to 0.3 already
SHORT_WINDOW = 16  # tokens; what a longer sliding window is shortened to
PREFIX = SHORT_WINDOW + 8  # tokens that the rows of a check share, some of them past the window
MAX_PREFIX = 4096  # tokens; where a window cannot be shortened, rows up to this long reach past it
MAX_WORK = {"cpu": 2e11, "cuda": 2e14}  # FLOPs of that: a few seconds
COMPARED = 64  # last tokens of each row; the logits of all tokens of a long row would not fit into memory

log = logging.getLogger(__name__)


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
    """How far apart log-probabilities are, in nats, of short rows alone and of the same rows as a prefix tree.

    Where the model has sliding windows, rows that reach past them are compared too; the log says if they could not be.
    """
    with _undisturbed(model.lm):
        error = _difference(model, PREFIX)
        window = max(filter(None, attention_traits(decoder_of(model.lm)).windows.values()), default=0)
        return error if window <= SHORT_WINDOW else max(error, _difference_beyond(model, window))


def _difference_beyond(model: PrefixGroupedModel, window: int) -> float:
    """The difference for rows that reach past the sliding window: past a shortened one if the model heeds it."""
    token_ids, lengths = _check_rows(model.lm, PREFIX)
    as_it_is = _alone(model.lm, token_ids[0])
    with _sliding_window(decoder_of(model.lm), SHORT_WINDOW):
        if model.backend_for(PackedTree.build(token_ids, lengths)) == "tree_merge":
            return 0.0  # it has no window mask: rows longer than the window are an error there
        if (_alone(model.lm, token_ids[0]) - as_it_is).abs().max() > _tolerance(model.lm):
            return _difference(model, PREFIX)
    if window + 8 <= MAX_PREFIX and _work(model.lm, window) <= MAX_WORK.get(base_lm(model.lm).device.type, 0):
        return _difference(model, window + 8)
    name = type(base_lm(model.lm)).__name__
    log.warning("The start-up check of %s did not reach past its sliding window of %d tokens.", name, window)
    return 0.0


def _difference(model: PrefixGroupedModel, prefix: int) -> float:
    """Nats between rows alone and as a tree, at the last tokens of rows that share `prefix` tokens.

    The largest difference in float32. In 16-bit floats rounding sends single tokens to other experts of a mixture, a
    nat away; a wrong mask moves them all. So there it is the median over the tokens that are each row's own.
    """
    token_ids, lengths = _check_rows(model.lm, prefix)
    tree = PackedTree.build(token_ids, lengths)
    hidden = model.hidden_states(tree, model.backend_for(tree))
    differences, own = [], []
    for row, length, index in zip(token_ids, lengths.tolist(), tree.index, strict=True):
        shared = logits_of(model.lm, hidden[index[:length][-COMPARED:]]).float().log_softmax(-1)
        differences.append((_alone(model.lm, row[:length]) - shared).abs().amax(-1))
        own.append(differences[-1][prefix - length :])
    return float(torch.cat(own).median() if _is_half(model.lm) else torch.cat(differences).max())


def _alone(lm: nn.Module, row: Tensor) -> Tensor:
    """[at most COMPARED, V] log-probabilities after the last tokens of one row, by the model's usual attention."""
    hidden = decoder_of(lm)(input_ids=row[None], use_cache=False).last_hidden_state[0]
    return logits_of(lm, hidden[-COMPARED:]).float().log_softmax(-1)


def _work(lm: nn.Module, prefix: int) -> float:
    """FLOPs of three rows and their tree: 2 per weight and token, and the scores of all pairs of tokens."""
    config = base_lm(lm).config.get_text_config()
    weights = sum(parameter.numel() for parameter in decoder_of(lm).parameters())
    width: int = config.hidden_size * config.num_hidden_layers
    return 4.0 * prefix * (2.0 * weights + 4.0 * prefix * width)


@contextmanager
def _sliding_window(decoder: PreTrainedModel, length: int) -> Iterator[None]:
    """`decoder` with a sliding window of `length` tokens, in its configuration and in layers that keep a copy."""
    before = decoder.config.sliding_window
    layers = [module for module in decoder.modules() if vars(module).get("sliding_window") == before]
    try:
        decoder.config.sliding_window = length
        for layer in layers:
            vars(layer)["sliding_window"] = length
        yield
    finally:
        decoder.config.sliding_window = before
        for layer in layers:
            vars(layer)["sliding_window"] = before


def why_sharing_is_wrong(model: PrefixGroupedModel) -> str:
    """What the check found; empty where shared and separate rows agree."""
    try:
        error = verify_prefix_sharing(model)
    except Exception as failure:  # whatever a model does with a mask that it was not written for
        return f"the start-up check failed with {type(failure).__name__}: {failure}"
    if error <= _tolerance(model.lm) or (_is_half(model.lm) and error <= 2 * _rounding(model)):
        return ""
    return f"in the start-up check its log-probabilities moved by {error:.1e} nats"


def _rounding(model: PrefixGroupedModel) -> float:
    """Nats that rounding alone moves a 16-bit model by: its own forward with two attentions that are both right.

    Measured as `_difference` is. A pretrained 135M model in bfloat16 moves by 0.3, others by a hundredth of that.
    """
    decoder = decoder_of(model.lm)
    traits = attention_traits(decoder)
    if not traits.supports_sdpa:  # then there is no second one
        return 0.0
    token_ids, lengths = _check_rows(model.lm, PREFIX)
    moved = []
    with _undisturbed(model.lm):
        for row, length in zip(token_ids, lengths.tolist(), strict=True):
            with attention_implementation(decoder, "sdpa"):
                one = _alone(model.lm, row[:length])
            with attention_implementation(decoder, "eager"):
                other = _alone(model.lm, row[:length])
            moved.append((one - other).abs().amax(-1)[PREFIX - length :])
    return float(torch.cat(moved).median())


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


def _is_half(lm: nn.Module) -> bool:
    return base_lm(lm).dtype in (torch.float16, torch.bfloat16)


def _tolerance(lm: nn.Module) -> float:
    """Nats that two right forwards may differ by in the model's precision."""
    return TOLERANCE_HALF if _is_half(lm) else TOLERANCE
