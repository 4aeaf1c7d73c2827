"""Generation for any model: the whole sequence is computed anew for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lit_agentrl.rollouts.image_columns import whole_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from lit_agentrl.rollouts.image_tokens import ImageTokens
    from lit_agentrl.rollouts.sampling import Actions


def generate_plain(
    lm: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    actions: Actions,
    sequences: Sequence[int],
    images: ImageTokens | None = None,
) -> None:
    """Extend the actions of `sequences` until each is complete.

    Only sequences of equal length share a forward: without padding, the model needs no mask and no positions from us.

    Args:
        lm: Called with token ids alone, and with what contexts show.
        contexts: The tokens before each action.
        actions: Samples the tokens and records them.
        sequences: What `actions` calls each context.
        images: Pictures that the contexts show; None where they are text.
    """
    by_length: dict[int, list[int]] = {}
    for index, context in enumerate(contexts):
        by_length.setdefault(len(context), []).append(index)
    for running in by_length.values():
        while running:
            rows = [[*contexts[index], *actions.token_ids[sequences[index]]] for index in running]
            inputs: dict[str, Any] = (
                {"input_ids": torch.tensor(rows, device=lm.device)} if images is None else whole_rows(images, rows)
            )
            logits = lm(**inputs, use_cache=False).logits[:, -1]
            _, is_complete = actions.extend(logits, [sequences[index] for index in running])
            running = [index for index, done in zip(running, is_complete, strict=True) if not done]
