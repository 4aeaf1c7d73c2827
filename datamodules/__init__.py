"""The datamodules: rollouts of a policy, and supervised conversations."""

from lit_agentrl.datamodules.conversation import ConversationDataModule, JSONLConversations, Walkthroughs
from lit_agentrl.datamodules.rollout import RolloutDataModule

__all__ = ["ConversationDataModule", "JSONLConversations", "RolloutDataModule", "Walkthroughs"]
