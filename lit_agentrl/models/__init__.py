"""Language models as policies: scoring rows, with shared prefixes computed once."""

from lit_agentrl.models.prefix_tree import PackedTree, plan_packs
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel, TokenScores
from lit_agentrl.models.self_check import verify_prefix_sharing
from lit_agentrl.models.token_logprobs import Head, token_logprobs
from lit_agentrl.models.vision import VisionInputs, content_id

__all__ = [
    "Head",
    "PackedTree",
    "PaddedModel",
    "PrefixGroupedModel",
    "TokenScores",
    "VisionInputs",
    "content_id",
    "plan_packs",
    "token_logprobs",
    "verify_prefix_sharing",
]
