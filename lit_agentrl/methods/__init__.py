"""The methods: one LightningModule a file."""

from lit_agentrl.methods.base import PolicyModule
from lit_agentrl.methods.dpo import DPOModule
from lit_agentrl.methods.gigpo import GiGPOModule
from lit_agentrl.methods.grpo_pp import GRPOPlusPlusModule
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.methods.sft import SFTModule
from lit_agentrl.methods.tree_grpo import TreeGRPOModule

__all__ = [
    "DPOModule",
    "GRPOPlusPlusModule",
    "GiGPOModule",
    "LanguageModule",
    "PolicyModule",
    "SFTModule",
    "TreeGRPOModule",
]
