"""A folder with a random policy in Qwen3's shape and a byte-level tokenizer, and a task with long prompts, offline."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from prefix import model_config
from prefix_gpu import qwen3
from transformers import AutoModelForCausalLM

from lit_agentrl.envs.toy import WORDS, EchoEnvironment, EchoSuite
from lit_agentrl.types import Environment, Observation, Trajectory

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from tiny import byte_tokenizer

RULES = "Rule {}: read the word with care, say it, and nothing but it. "


def build(folder: Path, size: str, quick: bool, dtype: torch.dtype) -> str:
    """The folder, with the weights of `size` (a tiny model where quick)."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 32_768
    config = model_config(quick=True) if quick else qwen3(size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def even_share(trajectory: Trajectory) -> float:
    """The reward: the share of even ids among the sampled tokens."""
    ids = [token for step in trajectory.steps for token in step.action_ids]
    return sum(token % 2 == 0 for token in ids) / max(1, len(ids))


class LongEchoSuite(EchoSuite):
    """The echo task under long rules, over several turns with long observations; a byte is a token.

    Args:
        prompt: Bytes of the task's text.
        observation: Bytes of every later observation.
        turns: Of an episode.
    """

    def __init__(self, prompt: int = 1400, observation: int = 128, turns: int = 3) -> None:
        self.prompt, self.observation, self.turns = prompt, observation, turns

    def make(self, task: str) -> Environment:
        """An episode about one word."""
        assert task in WORDS
        return LongEcho(task, self)


class LongEcho(EchoEnvironment):
    """An episode of `LongEchoSuite`."""

    def __init__(self, word: str, suite: LongEchoSuite) -> None:
        super().__init__(word)
        self._suite = suite

    def reset(self) -> Observation:
        """The rules and the word."""
        return Observation(self._task, state="Say it now.", task=self._task)

    def step(self, action: str) -> tuple[Observation, float, bool]:
        """The next request."""
        _, reward, _ = super().step(action)
        text = filled(f"Turn {len(self.replies)}: say it again. ", self._suite.observation)
        observation = Observation(text, state=text, task=self._task, valid=bool(action.strip()))
        return observation, reward, len(self.replies) == self._suite.turns

    @property
    def _task(self) -> str:
        return f"{filled('', self._suite.prompt)} Say the word: {self.word}"


def filled(text: str, length: int) -> str:
    """`text` with rules behind it, `length` characters in all."""
    rules = "".join(RULES.format(number) for number in range(length // 40 + 1))
    return (text + rules)[:length]
