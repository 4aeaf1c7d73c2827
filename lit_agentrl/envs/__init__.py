"""Environments: one file each, behind the protocols of `lit_agentrl.types`."""

from lit_agentrl.envs.gymnasium import GymnasiumSuite
from lit_agentrl.envs.minigrid import MiniGridSuite
from lit_agentrl.envs.miniwob import MiniWoBSuite
from lit_agentrl.envs.openenv import OpenEnvSuite
from lit_agentrl.envs.scienceworld import ScienceWorldSuite
from lit_agentrl.envs.sokoban import SokobanSuite
from lit_agentrl.envs.textworld import TextWorldSuite
from lit_agentrl.envs.toy import EchoSuite
from lit_agentrl.envs.webshop import WebShopSuite

__all__ = [
    "EchoSuite",
    "GymnasiumSuite",
    "MiniGridSuite",
    "MiniWoBSuite",
    "OpenEnvSuite",
    "ScienceWorldSuite",
    "SokobanSuite",
    "TextWorldSuite",
    "WebShopSuite",
]
