"""Rollouts by vLLM, in this process or behind servers."""

from lit_agentrl.rollouts.vllm.errors import EngineError
from lit_agentrl.rollouts.vllm.in_process import VLLMEngine
from lit_agentrl.rollouts.vllm.server import VLLMServer

__all__ = ["EngineError", "VLLMEngine", "VLLMServer"]
