"""Chains stages from one file: each is a command one can type, and hands what it leaves to the next."""

from lit_agentrl.pipeline.command import main
from lit_agentrl.pipeline.file import load
from lit_agentrl.pipeline.lineage import lineage

__all__ = ["lineage", "load", "main"]
