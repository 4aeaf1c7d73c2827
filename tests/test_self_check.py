"""The start-up check: it passes right models, leaves no trace, and finds what would be wrong."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from lit_agentrl.errors import UserError
from lit_agentrl.models import PaddedModel, PrefixGroupedModel, verify_prefix_sharing
from prefix_cases import CONFIGS, SHAPES, build_lm


@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_passes_right_models_and_leaves_no_trace(name: str) -> None:
    lm = build_lm(CONFIGS[name](), torch.float32)
    next(lm.children()).eval()
    modes = [module.training for module in lm.modules()]
    before, generator_state = lm.config.to_dict(), torch.get_rng_state()
    model = PrefixGroupedModel(lm, min_reuse=0)
    assert verify_prefix_sharing(model) < 1e-5
    token_ids, lengths, targets = SHAPES["tree"]()
    model(token_ids, lengths, targets=targets)
    assert model.refusal == ""
    assert [module.training for module in lm.modules()] == modes
    assert lm.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), generator_state)


def test_unknown_scaling_of_logits_is_refused() -> None:
    """A model that does to its logits what no option of its configuration says."""

    class Louder(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    lm = Louder(CONFIGS["llama"]()).double()
    token_ids, lengths, _ = SHAPES["tree"]()
    with pytest.raises(UserError, match="Louder"):
        PaddedModel(lm)(token_ids, lengths)
