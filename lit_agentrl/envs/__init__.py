"""Environments: one file each, behind the protocols of `lit_agentrl.types`."""

from lit_agentrl.envs.gymnasium import GymnasiumSuite
from lit_agentrl.envs.minigrid import MiniGridSuite
from lit_agentrl.envs.openenv import OpenEnvSuite
from lit_agentrl.envs.scienceworld import ScienceWorldSuite
from lit_agentrl.envs.sokoban import SokobanSuite
from lit_agentrl.envs.textworld import TextWorldSuite
from lit_agentrl.envs.toy import EchoSuite

__all__ = [
    "EchoSuite",
    "GymnasiumSuite",
    "MiniGridSuite",
    "OpenEnvSuite",
    "ScienceWorldSuite",
    "SokobanSuite",
    "TextWorldSuite",
]
