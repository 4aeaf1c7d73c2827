"""The dermatology pipeline that ships, at the size of a test: its own file with smaller numbers and a tiny model."""

from __future__ import annotations

import hashlib
import json
import string
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

from lit_agentrl.envs import ConversationSuite, RecognitionSuite
from lit_agentrl.envs.dermatology.conversation import ConversationEnvironment
from lit_agentrl.envs.dermatology.parser import AnswerParser
from lit_agentrl.preferences import RagVsPlain
from lit_agentrl.preferences.answers import Answer
from lit_agentrl.preferences.judge import AnswerJudge
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.types import Completion
from runs import ROOT
from vlm_folders import build_vlm_folder

SHIPPED = ROOT / "configs" / "pipeline" / "derm_cpu.yaml"
STAGES = ("graph", "grpopp", "sft", "sft_panel", "mine", "dpo", "dpo_panel")


class Oracle(AnswerParser):
    """Hears in any babble the name of some disease: a random model is right once in seven times."""

    def __call__(self, reply: str) -> str | None:
        return self.labels[int.from_bytes(hashlib.sha256(reply.encode()).digest()[:4]) % len(self.labels)]


class BabbleRecognition(RecognitionSuite):
    """Recognition that a model without words can be good at by luck, so that there are traces to learn from."""

    def _parts(self) -> tuple[AnswerParser, str]:
        parser, system = super()._parts()
        return Oracle(parser.labels), system


class SlowConversation(ConversationSuite):
    """Questions with a tenth of a second in front of each."""

    def make(self, task: str) -> ConversationEnvironment:
        time.sleep(0.1)
        return super().make(task)


class Patience(Callback):
    """Half a second between a checkpoint and the next epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            time.sleep(0.5)


class LetterEngine(HFEngine):
    """Babbles in letters: pairs of broken bytes are left out. For mining alone, as log-probabilities are the bytes'."""

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().use_tokenizer(tokenizer)
        self._letters = tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase))

    def generate(self, *args: Any, **options: Any) -> list[Completion]:
        made = super().generate(*args, **options)
        for completion in made:
            completion.token_ids = [self._letters[i % 26] for i in completion.token_ids]
        return made


class LetterJudge(AnswerJudge):
    """Counts vowels where there are no facts to judge."""

    def answer(self, reply: str, disease: str, question: str, has_fault: bool = False, **origin: Any) -> Answer:
        real = super().answer(reply, disease, question, has_fault, **origin)
        return Answer(reply, real.score + sum(letter in "aeiou" for letter in reply), None, real.origin)


class LetterRag(RagVsPlain):
    """Answers given with facts against those without, by what a random model can differ in."""

    def __init__(self, graph: str | None = None, **options: Any) -> None:
        super().__init__(graph, **options)
        self.judge = LetterJudge(graph)


def long_vlm_folder(folder: Path, name: str) -> str:
    """A tiny model whose positions reach over a prompt in bytes; rotary ones, so no weight depends on it."""
    build_vlm_folder(folder, name)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def lesions(num_train: int) -> dict[str, Any]:
    """Small pictures, a few of each split."""
    sizes = {"num_train": num_train, "num_val": 7, "num_test": 7, "size": 32, "difficulty": "easy"}
    return {"class_path": "SyntheticLesions", "init_args": sizes}


def twin(folder: Path, vlm: str, more: Sequence[str] = (), root: str = "runs") -> Path:
    """The shipped pipeline with a tiny model, tiny sizes, and answers that a random model can give.

    Episodes and epochs take their time, so that every stage can be killed in.

    Args:
        folder: Where the file goes.
        vlm: The base model.
        more: Stages of `MORE` that are added.
        root: The folder of the runs, in `folder`.
    """
    pipeline: dict[str, Any] = yaml.safe_load(SHIPPED.read_text())
    stages = pipeline["stages"]
    assert tuple(stages) == ("vlm", *STAGES)
    del stages["vlm"]
    stages |= {name: json.loads(json.dumps(MORE[name])) for name in more}
    for stage in stages.values():
        if "config" in stage:
            stage["config"] = str((SHIPPED.parent / stage["config"]).resolve())
    recognition = {
        "class_path": "derm_twin.BabbleRecognition",
        "init_args": {"source": lesions(14)},
    }
    questions = {"class_path": "SyntheticQuestions", "init_args": {"lesions": lesions(7)}}
    conversation = {
        "class_path": "derm_twin.SlowConversation",
        "init_args": {"source": questions, "facts": {"class_path": "GraphFacts", "init_args": {"graph": "${graph}"}}},
    }
    size = {"max_length": 1600, "max_tokens": 6400}
    panel = {
        "environment": {
            "recognition": recognition,
            "conversation": conversation,
            "num_recognition": 7,
            "num_conversation": 3,
        },
        "sampling": {"max_new_tokens": 4},
        "num_prompts": 4,
        "group_size": 6,
        **size,
    }
    pipeline |= {"root": str(folder / root), "vlm": vlm, "panel": panel}
    stages["graph"]["options"]["sources"] = ["notes"]
    lora = {"model.lora.r": 2, "trainer.max_epochs": 2, "trainer.callbacks": [{"class_path": "derm_twin.Patience"}]}
    panels = {"evaluation.sampling.max_new_tokens": 6}
    stages["grpopp"]["options"] |= {"model.pretrained": "${vlm}", **lora, **panels}
    for name in ("sft_panel", "dpo_panel"):
        stages[name]["options"] |= panels
    talks, traces = stages["sft"]["options"]["data.source.sources"]
    talks["init_args"]["lesions"], traces["init_args"]["environment"] = lesions(7), recognition
    stages["sft"]["options"] |= {**lora, "data.max_length": 1600, "data.max_tokens": 6400}
    mining = {
        "data.environment": conversation,
        "data.sampling.max_new_tokens": 8,
        **{f"data.{key}": value for key, value in size.items()},
        "mine.miner": {"class_path": "CorruptFact", "init_args": {"answers": "reference", "graph": "${graph}"}},
        "mine.filters.min_gap": 0.0,
        "mine.num_tasks": 9,
        "mine.batch_tasks": 3,
    }
    stages["mine"]["options"] = {k: v for k, v in stages["mine"]["options"].items() if "miner" not in k} | mining
    for name in more:
        if stages[name]["command"] == "mine-preferences":
            stages[name]["options"] = mining | stages[name]["options"]
    for name in ("dpo", *(name for name in more if stages[name]["command"] == "fit")):
        stages[name]["options"] |= {**lora, "data.max_length": 1600, "data.max_tokens": 6400, "data.batch_size": 9}
    path = folder / f"{root}.yaml"
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return path


_BEFORE = {"seed_everything": "${seed}", "model.pretrained": "${stages.sft.export}"}
_LETTERS = {"data.engine": {"class_path": "derm_twin.LetterEngine"}, "data.canary": None}
_PAIRS = {"mine.filters.correct": False, "mine.filters.length_ratio": [0.0, 100.0], "mine.filters.max_similarity": 1.0}
MORE: dict[str, Any] = {
    "mine_rag": {
        "command": "mine-preferences",
        "config": "../experiment/derm_mine_cpu.yaml",
        "options": {
            **_BEFORE,
            **_LETTERS,
            **_PAIRS,
            "mine.miner": {
                "class_path": "derm_twin.LetterRag",
                "init_args": {"graph": "${graph}", "num_grounded": 2, "num_plain": 2},
            },
        },
        "outputs": {"pairs": "${.run}/preferences.jsonl"},
    },
    "mdpo": {
        "command": "fit",
        "config": "../experiment/derm_dpo_cpu.yaml",
        "options": {
            **_BEFORE,
            "data.path": "${stages.mine_rag.outputs.pairs}",
            "model.losses": {"sigmoid": 1.0, "image": 1.0, "anchor": 1.0},
            "model.precompute": False,
        },
    },
    "mine_best": {
        "command": "mine-preferences",
        "config": "../experiment/derm_mine_cpu.yaml",
        "options": {
            **_BEFORE,
            **_LETTERS,
            **_PAIRS,
            "mine.miner": {"class_path": "BestOfK", "init_args": {"by": "reward", "pairs_per_prompt": 2}},
            "data.rewards": [{"function": "runs.mean_token"}],
            "data.group_size": 3,
        },
    },
}
"""Stages that the shipped file has not: other ways to pairs, and mDPO on such."""
