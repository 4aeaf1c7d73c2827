"""Preference pairs mined from a policy's own answers: `lit-agentrl mine-preferences`. Start reading at `stage.py`."""

from lit_agentrl.preferences.answer_miners import BestOfK, CorruptFact, RagVsPlain
from lit_agentrl.preferences.candidates import Candidate
from lit_agentrl.preferences.filters import Filters
from lit_agentrl.preferences.rollout_miners import AnchorActions, TreeSiblings
from lit_agentrl.preferences.source import Miner, MiningSource
from lit_agentrl.preferences.stage import Mining

__all__ = [
    "AnchorActions",
    "BestOfK",
    "Candidate",
    "CorruptFact",
    "Filters",
    "Miner",
    "Mining",
    "MiningSource",
    "RagVsPlain",
    "TreeSiblings",
]
