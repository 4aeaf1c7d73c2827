"""The datamodules: rollouts of a policy, supervised conversations, and preference pairs."""

from lit_agentrl.datamodules.conversation import ConversationDataModule, JSONLConversations, Walkthroughs
from lit_agentrl.datamodules.preference import PreferenceDataModule
from lit_agentrl.datamodules.rollout import RolloutDataModule

__all__ = ["ConversationDataModule", "JSONLConversations", "PreferenceDataModule", "RolloutDataModule", "Walkthroughs"]
