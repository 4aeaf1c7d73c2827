"""Preference files and small runs on them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from lit_agentrl.cli import main
from lit_agentrl.types import Completion, Conversation, Engine, Observation, SamplingParams, WalkthroughSuite
from runs import ROOT, checkpoint

DPO = str(ROOT / "configs" / "experiment" / "dpo_echo.yaml")
WORDS = ("bade", "figo", "kula", "meni", "poru", "dego", "lafi")


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    """One line of a preference file."""
    return {
        "prompt": [{"role": "system", "content": "Answer with one word."}, {"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **more,
    }


def echo_pairs(number: int = 7) -> list[dict[str, Any]]:
    """The word that was asked for, against longer and shorter ones."""
    words = [WORDS[i % 7] + "x" * (i // 7) for i in range(number)]
    return [pair(f"Say the word: {word}", word, word[::-1] + "?" * (i % 4)) for i, word in enumerate(words)]


def write_pairs(path: Path, pairs: Sequence[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(each) + "\n" for each in pairs))
    return path


def dpo_options(lm: str, run: Path, data: Path, *more: str) -> list[str]:
    """`fit` on the file with the tiny model: two epochs of two optimiser steps."""
    small = {
        "trainer.max_epochs": "2",
        "trainer.default_root_dir": str(run),
        "trainer.accelerator": "cpu",
        "model.pretrained": lm,
        "model.optimizer.lr": "3e-3",
        "data.path": str(data),
        "data.batch_size": "4",
    }
    return ["fit", "--config", DPO, *(w for k, v in small.items() for w in (f"--{k}", v)), *more]


def fit_pairs(lm: str, run: Path, data: Path, *more: str) -> dict[str, Any]:
    """Fit in this process; gives the last checkpoint."""
    main(dpo_options(lm, run, data, *more))
    return checkpoint(run)


class Speaker(Engine):
    """Says a word that the action's seed decides; asked with facts, it repeats them.

    Args:
        slow: Seconds in front of every call: time to be killed in.
    """

    def __init__(self, slow: float = 0.0) -> None:
        self.slow = slow
        self.tokenizer: Any = None

    def use_tokenizer(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def sync(self, policy: nn.Module) -> None:
        pass

    def generate(
        self, contexts: list[list[int]], params: SamplingParams, seeds: Any = None, images: Any = None
    ) -> list[Completion]:
        time.sleep(self.slow)
        said = [self.say(self.tokenizer.decode(c), seed) for c, seed in zip(contexts, seeds, strict=True)]
        end = self.tokenizer.eos_token_id
        ids = [[*self.tokenizer.encode(text, add_special_tokens=False), end] for text in said]
        return [Completion(each, [-0.5] * len(each), "stop") for each in ids]

    def say(self, context: str, seed: int) -> str:
        if "What is known about" in context:
            facts = [line[2:] for line in context.splitlines() if line.startswith("- ")]
            return f"This is {context.split('name of the disease is ')[1].split('.')[0]}. {'. '.join(facts)}."
        if "lesion" in context:
            guesses = ("It is a melanoma with red colour.", "It is a dermatofibroma. It is black.", "I do not know.")
            return guesses[seed % 3]
        return WORDS[seed % 7]


DISEASES = ("melanoma", "dermatofibroma", "basal cell carcinoma")
QUESTIONS = ("Which colours does the lesion have?", "How is the lesion treated?")


class TalkSuite(WalkthroughSuite):
    """Questions about diseases, without pictures.

    Args:
        diseases: What they are about.
    """

    def __init__(self, diseases: Sequence[str] = DISEASES) -> None:
        self.diseases = diseases

    def tasks(self, split: str) -> list[str]:
        return [f"{split}/{disease}/{k}" for k in range(len(QUESTIONS)) for disease in self.diseases]

    def sample(self, task: str) -> SimpleNamespace:
        return SimpleNamespace(label=task.split("/")[1])

    def make(self, task: str) -> "Talk":
        return Talk(QUESTIONS[int(task.split("/")[2])])

    def walkthrough(self, task: str) -> Conversation:
        disease = self.sample(task).label
        return [(self.make(task).reset(), f"This is {disease}. {disease} may be black. It is treated with excision.")]


class Talk:
    """One question, one answer; nothing is paid."""

    success = None
    anchor = None

    def __init__(self, question: str) -> None:
        self.question = question

    def reset(self) -> Observation:
        return Observation(self.question, "Answer in a sentence.")

    def step(self, action: str) -> tuple[Observation, float, bool]:
        return Observation(""), float(len(action)), True

    def close(self) -> None:
        pass


MINE = str(ROOT / "configs" / "preferences" / "echo.yaml")


def mining_options(lm: str, run: Path, *more: str) -> list[str]:
    """`mine-preferences` on the echo task, with words that a tiny random model would never say."""
    small = {
        "trainer.default_root_dir": str(run),
        "trainer.accelerator": "cpu",
        "model.pretrained": lm,
        "data.engine": "preference_parts.Speaker",
        "data.canary": "null",  # what it says is written down, not the policy's
        "mine.num_tasks": "6",
        "mine.batch_tasks": "2",
        "mine.filters.min_gap": "0.01",
    }
    words = [w for k, v in small.items() for w in (f"--{k}", v)]
    return ["mine-preferences", "--config", MINE, *words, *more]


def talk_options(miner: str, lm: str, run: Path, *more: str) -> list[str]:
    """The same on questions about diseases, with a miner by name."""
    talk = ("--data.environment", "preference_parts.TalkSuite", "--data.rollout", "ChainRollout")
    wide = ("--data.max_length", "2000", "--data.max_tokens", "2000", "--data.group_size", "4")
    wide += ("--mine.filters.length_ratio", "[0, 100]")
    return mining_options(lm, run, *talk, *wide, "--mine.miner", miner, *more)


def mined(run: Path) -> list[dict[str, Any]]:
    """The pairs of a run."""
    return [json.loads(line) for line in (run / "preferences.jsonl").read_text().splitlines()]
