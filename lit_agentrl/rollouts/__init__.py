"""Rollouts: trajectories of a policy in an environment, as chains or as trees, and the engines that generate them."""

from lit_agentrl.rollouts.budget import Budget
from lit_agentrl.rollouts.canary import Canary
from lit_agentrl.rollouts.chain import ChainRollout
from lit_agentrl.rollouts.continuous import ContinuousBatchingEngine
from lit_agentrl.rollouts.expansion import (
    Entropy,
    Expansion,
    PerDepth,
    Uniform,
    ValueVariance,
    WithoutReplacement,
)
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.rollouts.memory import HistoryWindow
from lit_agentrl.rollouts.tree import TreeRollout
from lit_agentrl.rollouts.vllm import VLLMEngine, VLLMServer

__all__ = [
    "Budget",
    "Canary",
    "ChainRollout",
    "ContinuousBatchingEngine",
    "Entropy",
    "Expansion",
    "HFEngine",
    "HistoryWindow",
    "PerDepth",
    "TreeRollout",
    "Uniform",
    "VLLMEngine",
    "VLLMServer",
    "ValueVariance",
    "WithoutReplacement",
]
