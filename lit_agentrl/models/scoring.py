"""Log-probabilities of rows under a policy: the padded forward, and the same with shared prefixes computed once.

Both modules own the language model as `.lm` and have one signature, so a loss never knows which of them it is fed by.
`PrefixGroupedModel` generalises Prefix Grouper (Liu et al., 2025) from one shared prompt to whole prefix trees: losses
sit on the tree's edges (one log-probability per unique target and context), and gathering them into rows makes autograd
sum what the rows have in common.

Legend: B rows, L row length, T unique tokens, N targets, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_agentrl.errors import UserError
from lit_agentrl.models import tree_attention
from lit_agentrl.models.lm_parts import (
    AttentionTraits,
    attention_traits,
    base_lm,
    decoder_of,
    head_of,
    logits_of,
    require_causal,
)
from lit_agentrl.models.offload import OffloadActivations
from lit_agentrl.models.prefix_tree import PackedTree
from lit_agentrl.models.self_check import check_head, why_sharing_is_wrong
from lit_agentrl.models.token_logprobs import token_logprobs
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.models.vision_families import why_images_are_unshareable
from lit_agentrl.models.vision_forward import VisionForward
from lit_agentrl.models.vision_parts import seeing_weights

Backend = Literal["tree_merge", "dense", "flex"]

MIN_REUSE = 1.2  # below, sharing saves about what it costs: measured 1.1x faster at 1.21
MIN_REUSE_DENSE = 2.0  # a dense mask computes all T^2 scores: measured 0.55x at 1.21
HEAD_CHUNK = 256  # tokens whose full logits exist at a time, for heads that are no plain matrix

log = logging.getLogger(__name__)


@dataclass
class TokenScores:
    """What a policy says about the tokens of rows."""

    logprobs: Tensor
    """[B, L] float32 (float64 for a float64 model): log p(token t | tokens < t); 0 at t = 0 and outside the targets."""
    entropy: Tensor | None = None
    """[B, L], nats of the distribution that token t came from; 0 where `logprobs` is. None unless asked for."""


class PaddedModel(nn.Module):
    """Scores right-padded rows by the plain forward of the language model it owns.

    Padding on the right needs no mask under causal attention: a real token never sees what comes after it. So the
    attention runs its fast causal path, and the head runs on target tokens only.

    To shard it with FSDP2, call `fully_shard` on this module, not on `lm` alone: the head is read in this forward.

    Args:
        lm: a transformers causal language model, or a PEFT model around one.
        check: before the first use, compare with the model's own logits on a short row.
    """

    def __init__(self, lm: nn.Module, *, check: bool = True) -> None:
        super().__init__()
        require_causal(lm)
        self.lm = lm
        self.is_checked = not check
        self.skeleton: tuple[nn.Module, ...] = ()  # of a sharded policy, for copies; no submodule, hence the tuple
        self.compute_dtype: torch.dtype | None = None
        """What a sharded policy's layers are gathered in; None: as the weights are held."""
        self._seeing: list[tuple[nn.Module, str]] | None = None  # trained weights that only rows with images need
        self.offload_activations = False
        """Whether what the backward pass needs is kept in the CPU's memory."""

    def forward(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        *,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        vision: VisionInputs | None = None,
    ) -> TokenScores:
        """Log-probabilities, and entropies on request, of the targets.

        Args:
            token_ids: [B, L], right-padded.
            lengths: [B], real tokens of each row.
            targets: [B, L] bool, which tokens to score; all real ones by default.
            temperature: the sampling temperature that logits are divided by.
            entropy: whether to compute entropies too.
            vision: the images that the rows show; None for rows of text.

        Raises:
            UserError: for a model whose logits or images are not understood, and for rows whose images do not fill
                their placeholders.
            ValueError: for shapes that do not fit.
        """
        if not self.is_checked:
            self.is_checked = True
            self.run_check()
        wanted = _wanted(token_ids, lengths, targets)
        images = None if vision is None or not any(vision.shown) else VisionForward(self.lm, vision, token_ids, lengths)
        offloading = (
            OffloadActivations(self.lm) if self.offload_activations and torch.is_grad_enabled() else nullcontext()
        )
        with offloading, self._reaching_all_that_sees():
            return self._score(token_ids, lengths, wanted, temperature, entropy, images)

    @contextmanager
    def _reaching_all_that_sees(self) -> Iterator[None]:
        """Let what the rows begin with depend, times 0, on every trained weight of vision tower and connector.

        Rows of text, and layers after the one that LLaVA takes, give these no gradient. DDP waits for one of each
        weight, and weight decay should not depend on the number of ranks. Ranks of FSDP2 reduce what each of them has,
        in the order in which gradients come: where only some see, what enters the first layer must want one on all.
        """
        if self._seeing is None:
            self._seeing = seeing_weights(self.lm)  # type: ignore[arg-type]
        if not self._seeing or not torch.is_grad_enabled():
            yield
            return
        first = [module.get_parameter(name).flatten()[:1].float() for module, name in self._seeing]
        nothing = 0.0 * torch.cat(first).sum()
        embeddings: nn.Module = base_lm(self.lm).get_input_embeddings()  # type: ignore[no-untyped-call]
        hook = embeddings.register_forward_hook(lambda _module, _given, output: output + nothing.to(output.dtype))
        try:
            yield
        finally:
            hook.remove()

    def run_check(self) -> None:
        """Compare with the model's own forward; called before the first use.

        Raises:
            UserError: if the model's logits are not those of its head.
        """
        check_head(self.lm)

    def _score(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        wanted: Tensor,
        temperature: float,
        entropy: bool,
        images: VisionForward | None,
    ) -> TokenScores:
        longest = int(lengths.max())
        if images is None:
            model, inputs = decoder_of(self.lm), {"input_ids": token_ids[:, :longest]}
        else:
            model, inputs = images.padded(longest)
        hidden = model(**inputs, use_cache=False).last_hidden_state
        before = hidden[:, :-1][wanted[:, 1:longest]]
        return _in_rows(wanted, *self._at_head(before, token_ids[wanted], temperature, entropy))

    def _at_head(
        self, hidden: Tensor, tokens: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and entropies [N] of `tokens` [N], predicted from `hidden` [N, D]."""
        head = head_of(self.lm)
        if head is not None:
            return token_logprobs(hidden, head, tokens, temperature=temperature, entropy=entropy)
        logp, entropies = _logprobs_by_module(lambda part: logits_of(self.lm, part), hidden, tokens, temperature)
        return logp, entropies if entropy else None


class PrefixGroupedModel(PaddedModel):
    """Scores rows like `PaddedModel`, with every shared prefix computed once.

    Exact, up to rounding: log-probabilities, entropies and gradients are those of the padded forward. Dropout is the
    one difference, as shared tokens get one draw. Batches that share too little, and models where sharing would be
    wrong (recurrent or convolutional layers, ALiBi, images whose tokens see one another), take the padded path, and the
    log says why.

    Args:
        lm: a transformers causal language model, or a PEFT model around one.
        backend: "auto", or the attention to use: "tree_merge" (CPU, plain causal attention), "dense" (all that the
            model's own sdpa or eager attention does) or "flex" (CUDA).
        min_reuse: row tokens per unique token from which on sharing is used; by default where it was measured to pay.
        check: before the first use, compare with the model's own forward on short rows.
    """

    def __init__(
        self,
        lm: nn.Module,
        backend: Literal["auto"] | Backend = "auto",
        *,
        min_reuse: float | None = None,
        check: bool = True,
    ) -> None:
        super().__init__(lm, check=check)
        if backend not in ("auto", "tree_merge", "dense", "flex"):
            raise UserError(f"backend={backend!r}: choose auto, tree_merge, dense or flex.")
        self.backend = backend
        self.min_reuse = min_reuse
        self._has_said_why = False
        self.refusal = attention_traits(decoder_of(lm)).unshareable
        """Why this model takes the padded path; empty where it shares."""
        self.image_refusal = why_images_are_unshareable(base_lm(lm).config)
        """Why this model takes the padded path for batches with images; empty where it shares."""
        self._has_refused_images = False
        if self.refusal:
            self._warn_refusal()

    def run_check(self) -> None:
        """Compare head and shared prefixes with the model's own forward; if they differ, use the padded path.

        Raises:
            UserError: if the model's logits are not those of its head.
        """
        super().run_check()
        if not self.refusal:
            self.refusal = why_sharing_is_wrong(self)
            if self.refusal:
                self._warn_refusal()

    def backend_for(self, tree: PackedTree) -> Backend:
        """The attention to run a tree with."""
        if self.backend != "auto":
            return self.backend
        return _auto_backend(tree, attention_traits(decoder_of(self.lm)))

    def _pays(self, tree: PackedTree, backend: Backend) -> bool:
        """Whether the rows share enough to be worth a tree."""
        by_default = MIN_REUSE_DENSE if backend == "dense" else MIN_REUSE
        return tree.reuse >= (by_default if self.min_reuse is None else self.min_reuse)

    def hidden_states(self, tree: PackedTree, backend: Backend, images: VisionForward | None = None) -> Tensor:
        """[T, D], the decoder's output at the tokens of a tree, whose placeholders show `images`."""
        decoder = decoder_of(self.lm)
        traits = attention_traits(decoder)
        if backend == "flex":
            tree = tree_attention.padded_to(tree, tree_attention.BLOCK)
        name, mask, options = _tree_inputs(tree, backend, traits, decoder.dtype)
        if images is None:
            model, inputs = decoder, {"input_ids": tree.tokens[None], "position_ids": tree.positions[None]}
        else:
            model, inputs = images.packed(tree)
        with tree_attention.attention_implementation(decoder, name):
            output = model(**inputs, attention_mask=mask, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _score(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        wanted: Tensor,
        temperature: float,
        entropy: bool,
        images: VisionForward | None,
    ) -> TokenScores:
        if self.refusal or self._refuses(images):
            return super()._score(token_ids, lengths, wanted, temperature, entropy, images)
        tree = PackedTree.build(token_ids, lengths, None if images is None else images.keys)
        backend = self.backend_for(tree)
        if not self._pays(tree, backend):
            self._say_once(tree, backend)
            return super()._score(token_ids, lengths, wanted, temperature, entropy, images)
        hidden = self.hidden_states(tree, backend, images)
        edges, inverse = tree.unique_targets(wanted)
        logp, entropies = self._at_head(hidden[tree.parent[edges]], tree.tokens[edges], temperature, entropy)
        return _in_rows(wanted, logp[inverse], None if entropies is None else entropies[inverse])

    def _say_once(self, tree: PackedTree, backend: Backend) -> None:
        """Why this batch is not shared; the first time only, as many alike may follow."""
        level = logging.DEBUG if self._has_said_why else logging.INFO
        self._has_said_why = True
        log.log(level, "Too little to share for %s: %.2f row tokens per unique token.", backend, tree.reuse)

    def _refuses(self, images: VisionForward | None) -> bool:
        """Whether these images rule out sharing; the first time, the log says why."""
        if images is None or not self.image_refusal:
            return False
        if not self._has_refused_images:
            self._has_refused_images = True
            name = type(base_lm(self.lm)).__name__
            message = "Shared prefixes are off for %s on rows with images: %s. These are computed in full instead."
            log.warning(message, name, self.image_refusal)
        return True

    def _warn_refusal(self) -> None:
        name = type(base_lm(self.lm)).__name__
        log.warning("Shared prefixes are off for %s: %s. Rows are computed in full instead.", name, self.refusal)


def _auto_backend(tree: PackedTree, traits: AttentionTraits) -> Backend:
    """The fastest attention that is right for this model and these rows."""
    on_cpu = tree.tokens.device.type == "cpu"
    window = traits.smallest_window
    if on_cpu and not traits.unmergeable and (window is None or window >= tree.depth):
        return "tree_merge"
    if tree.tokens.device.type == "cuda" and traits.supports_flex:
        return "flex"
    return "dense"


def _tree_inputs(
    tree: PackedTree, backend: Backend, traits: AttentionTraits, dtype: torch.dtype
) -> tuple[str, Any, dict[str, PackedTree]]:
    """What to call the attention, and the mask and the further arguments that the decoder gets.

    The mask is one per layer type where a sliding window tells them apart: a window at least as long as the rows hides
    nothing.
    """
    if backend == "tree_merge":
        if traits.unmergeable:
            raise UserError(f"backend='tree_merge' would be wrong for this model: {traits.unmergeable}. Use 'auto'.")
        return tree_attention.TREE_MERGE, tree_attention.refusing_mask(), {"prefix_tree": tree}
    make: Callable[[int | None], Any]
    if backend == "flex":
        name, make = tree_attention.TREE_FLEX, lambda window: tree_attention.block_mask(tree, window)
    else:
        name = "sdpa" if traits.supports_sdpa and traits.implementation != "eager" else "eager"
        added = dtype if name == "eager" else None
        make = lambda window: tree_attention.dense_mask(tree, window, added)  # noqa: E731
    depth = tree.depth
    windows = {kind: window if window and window < depth else None for kind, window in traits.windows.items()}
    masks = {window: make(window) for window in set(windows.values())}
    if len(masks) == 1:
        return name, next(iter(masks.values())), {}
    return name, {kind: masks[window] for kind, window in windows.items()}, {}


def _wanted(token_ids: Tensor, lengths: Tensor, targets: Tensor | None) -> Tensor:
    """[B, L] bool: the targets that are real tokens and have something before them."""
    if token_ids.ndim != 2 or lengths.shape != token_ids.shape[:1]:
        raise ValueError(
            f"token_ids {list(token_ids.shape)} and lengths {list(lengths.shape)}: expected [B, L] right-padded rows "
            "and [B] lengths."
        )
    place = torch.arange(token_ids.shape[1], device=token_ids.device)
    wanted = (place[None] < lengths[:, None]) & (place > 0)
    if targets is None:
        return wanted
    if targets.shape != token_ids.shape or targets.dtype != torch.bool:
        raise ValueError(
            f"targets {list(targets.shape)} {targets.dtype}: expected a bool mask of the shape of token_ids, "
            f"{list(token_ids.shape)}."
        )
    return wanted & targets


def _in_rows(wanted: Tensor, logp: Tensor, entropy: Tensor | None) -> TokenScores:
    """Values [N] back at their places in the rows, 0 elsewhere."""
    rows = [
        None if values is None else values.new_zeros(wanted.shape).masked_scatter(wanted, values)
        for values in (logp, entropy)
    ]
    assert rows[0] is not None
    return TokenScores(logprobs=rows[0], entropy=rows[1])


def _logprobs_by_module(
    logits_at: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` for a head that is no plain matrix (quantised, or with a LoRA adapter on it): by calling it.

    Full logits exist for `HEAD_CHUNK` tokens at a time, again in the backward pass.
    """

    def chunk(part: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_at(part)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        log_p = logits.log_softmax(-1)
        return log_p.gather(-1, chosen[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    pieces = zip(torch.split(hidden, HEAD_CHUNK), torch.split(tokens, HEAD_CHUNK), strict=True)
    parts = [checkpoint(chunk, part, chosen, use_reentrant=False) for part, chosen in pieces]
    logp, entropies = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(entropies)
