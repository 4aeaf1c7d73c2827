"""The datamodules: rollouts of a policy, supervised conversations, and preference pairs."""

from lit_agentrl.datamodules.conversation import ConversationDataModule, JSONLConversations, Walkthroughs
from lit_agentrl.datamodules.lesion_conversations import LesionConversations
from lit_agentrl.datamodules.llava import LlavaConversations
from lit_agentrl.datamodules.mixture import Mixture
from lit_agentrl.datamodules.preference import PreferenceDataModule
from lit_agentrl.datamodules.rollout import RolloutDataModule
from lit_agentrl.datamodules.traces import CorrectTraces

__all__ = [
    "ConversationDataModule",
    "CorrectTraces",
    "JSONLConversations",
    "LesionConversations",
    "LlavaConversations",
    "Mixture",
    "PreferenceDataModule",
    "RolloutDataModule",
    "Walkthroughs",
]
