"""ALFWorld: its games, read from files, played without its engine, and made where there is no download."""

from lit_agentrl.envs.alfworld.suite import ALFWorldSuite

__all__ = ["ALFWorldSuite"]
