"""Environments: one file each, behind the protocols of `lit_agentrl.types`."""

from lit_agentrl.envs.textworld import TextWorldSuite
from lit_agentrl.envs.toy import EchoSuite

__all__ = ["EchoSuite", "TextWorldSuite"]
