"""Environments: one file each, behind the protocols of `lit_agentrl.types`."""

from lit_agentrl.envs.alfworld import ALFWorldSuite
from lit_agentrl.envs.blackjack import BlackjackSuite
from lit_agentrl.envs.dermatology import ConversationSuite, DermatologyPanel, RecognitionSuite
from lit_agentrl.envs.gymnasium import GymnasiumSuite
from lit_agentrl.envs.minigrid import MiniGridSuite
from lit_agentrl.envs.miniwob import MiniWoBSuite
from lit_agentrl.envs.number_line import NumberLineSuite
from lit_agentrl.envs.openenv import OpenEnvSuite
from lit_agentrl.envs.points import EZPointsSuite, Points24Suite
from lit_agentrl.envs.program import ProgramResult, ProgramSuite
from lit_agentrl.envs.scienceworld import ScienceWorldSuite
from lit_agentrl.envs.search import CorpusPages, SearchSuite, WebSuite
from lit_agentrl.envs.sokoban import SokobanSuite
from lit_agentrl.envs.textworld import TextWorldSuite
from lit_agentrl.envs.toy import EchoSuite
from lit_agentrl.envs.verifiers import VerifiersSuite
from lit_agentrl.envs.webshop import WebShopSuite

__all__ = [
    "ALFWorldSuite",
    "BlackjackSuite",
    "ConversationSuite",
    "CorpusPages",
    "DermatologyPanel",
    "EZPointsSuite",
    "EchoSuite",
    "GymnasiumSuite",
    "MiniGridSuite",
    "MiniWoBSuite",
    "NumberLineSuite",
    "OpenEnvSuite",
    "Points24Suite",
    "ProgramResult",
    "ProgramSuite",
    "RecognitionSuite",
    "ScienceWorldSuite",
    "SearchSuite",
    "SokobanSuite",
    "TextWorldSuite",
    "VerifiersSuite",
    "WebShopSuite",
    "WebSuite",
]
