"""Mining as a stage: plays tasks with a policy, keeps the pairs that pass, writes them as JSONL with provenance."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lit_agentrl import distributed
from lit_agentrl.errors import UserError
from lit_agentrl.preferences.candidates import Candidate
from lit_agentrl.preferences.filters import REASONS, Filters, keep
from lit_agentrl.preferences.picture_files import image_records
from lit_agentrl.preferences.provenance import policy_origin, versions
from lit_agentrl.preferences.source import Miner, MiningSource
from lit_agentrl.preferences.store import Chunk, PairStore, Record
from lit_agentrl.rollouts.base import Prompt
from lit_agentrl.types import Split

FILE_NAME = "preferences.jsonl"


@dataclass(frozen=True)  # no slots: the command line reads defaults from `vars`
class Mining:
    """How pairs are mined.

    Args:
        miner: Finds the pairs.
        output: The preference file; None is `preferences.jsonl` in the run folder.
        filters: Which of them are kept.
        split: Whose tasks are played; never the one you evaluate on.
        num_tasks: The first so many tasks; None is all.
        batch_tasks: Tasks that are played side by side. A run that is stopped goes on after its last batch; the pairs
            do not depend on it.
    """

    miner: Miner
    output: str | None = None
    filters: Filters = Filters()  # noqa: RUF009  # frozen
    split: Split = "train"
    num_tasks: int | None = None
    batch_tasks: int = 8

    def __post_init__(self) -> None:
        if self.batch_tasks < 1 or (self.num_tasks is not None and self.num_tasks < 1):
            raise UserError(
                f"mine.batch_tasks={self.batch_tasks}, mine.num_tasks={self.num_tasks}: must be at least 1."
            )


class MiningRun(L.Callback):
    """Mines where a test would evaluate.

    Args:
        mining: How.
        options: All that decides the pairs beside the weights: the command's configuration, as plain values.
        ckpt_path: Where the policy's weights were taken from, if not from `model.pretrained`.
    """

    def __init__(self, mining: Mining, options: Mapping[str, Any], ckpt_path: str | None = None) -> None:
        self.mining, self.options, self.ckpt_path = mining, options, ckpt_path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be mined before a model is loaded."""
        source = _source(trainer)
        self.mining.miner.check(source)
        if not source.environment.tasks(self.mining.split):
            raise UserError(f"The {self.mining.split} split has no tasks to mine: check the environment's options.")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mine all tasks, or go on where an earlier run was stopped."""
        source, mining = _source(trainer), self.mining
        tasks = list(source.environment.tasks(mining.split))[: mining.num_tasks]
        origin = self._origin(source)
        output = Path(mining.output or Path(trainer.default_root_dir) / FILE_NAME)
        store = PairStore(output, _fingerprint(self.options, tasks, origin))
        if distributed.gather(store.finished())[0]:
            _say(trainer, f"{output} was mined already with these options; delete it to mine anew.")
            return
        chunks = distributed.gather(store.chunks() if trainer.is_global_zero else {})[0]
        with isolate_rng(), torch.no_grad():
            for number, start in enumerate(range(0, len(tasks), mining.batch_tasks)):
                if number not in chunks:
                    prompts = [Prompt(task, start + i) for i, task in enumerate(tasks[start:][: mining.batch_tasks])]
                    chunks[number] = self._mine(prompts, source, origin, output.parent)
                    if trainer.is_global_zero:
                        store.add(number, chunks[number])
        if trainer.is_global_zero:
            finish(store, [chunks[number] for number in sorted(chunks)], mining)

    def _origin(self, source: MiningSource) -> Record:
        """What is the same for all pairs."""
        return {
            "policy": policy_origin(source.pretrained, self.ckpt_path),
            "seed": source.seed,
            "versions": versions(),
        } | self.mining.miner.origin()

    def _mine(self, prompts: Sequence[Prompt], source: MiningSource, origin: Record, folder: Path) -> Chunk:
        """The pairs of a few tasks; ranks share them."""
        rank, size = distributed.share()
        mine = [self._records(found, origin, folder) for found in self._found(prompts[rank::size], source)]
        shares = distributed.gather(mine)
        chunk = Chunk()
        for i in range(len(prompts)):
            records, counts = shares[i % size][i // size]
            chunk.records += records
            chunk.counts += counts
        return chunk

    def _found(self, prompts: Sequence[Prompt], source: MiningSource) -> list[list[Candidate]]:
        return self.mining.miner.mine(prompts, source) if prompts else []

    def _records(self, found: list[Candidate], origin: Record, folder: Path) -> tuple[list[Record], Counter[str]]:
        """The pairs of a task as they are written."""
        kept, counts = keep(found, self.mining.filters)
        counts.update(tasks=1, candidates=len(found), tasks_without=not kept)
        return [record(candidate, origin, folder) for candidate in kept], counts


def _source(trainer: L.Trainer) -> MiningSource:
    source: object = trainer.datamodule  # type: ignore[attr-defined]  # a property that Lightning leaves unannotated
    if not isinstance(source, MiningSource):
        raise UserError(f"mine-preferences plays tasks, {type(source).__name__} has none: use RolloutDataModule.")
    return source


def record(candidate: Candidate, origin: Mapping[str, Any], folder: Path) -> Record:
    """A pair as a line of the file: TRL's conversational format, images and provenance."""
    made: Record = {
        "prompt": candidate.prompt,
        "chosen": [{"role": "assistant", "content": candidate.chosen}],
        "rejected": [{"role": "assistant", "content": candidate.rejected}],
        "images": image_records(candidate.images, folder),
        "provenance": {**candidate.provenance, "gap": candidate.gap, **origin},
    }
    return made


def finish(store: PairStore, chunks: Sequence[Chunk], mining: Mining) -> None:
    """Write the file and say what became of all candidates.

    Raises:
        UserError: No pair is left.
    """
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts += chunk.counts
    unique: dict[str, Record] = {}
    for made in (each for chunk in chunks for each in chunk.records):
        words = json.dumps([made["prompt"], made["chosen"], made["rejected"], made["images"]])
        counts["duplicate"] += words in unique
        unique.setdefault(words, made)
    records = list(unique.values())
    text = _summary(records, counts, mining.miner.mode)
    print(text, flush=True)
    if not records:
        store.discard()
        raise UserError(
            f"No pair passed the filters, so {store.output} was not written. The line above counts why; look at the "
            "policy's answers with `evaluate`, loosen --mine.filters, or mine more tasks."
        )
    store.finish(records, {"mode": mining.miner.mode, "pairs": len(records), "counts": dict(sorted(counts.items()))})
    print(f"wrote {store.output}", flush=True)


def _summary(records: Sequence[Record], counts: Counter[str], mode: str) -> str:
    left_out = [f"{reason} {counts[reason]}" for reason in REASONS if counts[reason]]
    line = (
        f"{mode}: {len(records)} pairs of {counts['candidates']} candidates from {counts['tasks']} tasks "
        f"({counts['tasks_without']} tasks gave none); left out: {', '.join(left_out) or 'none'}"
    )
    if not records:
        return line
    gap = fmean(made["provenance"]["gap"] for made in records)
    lengths = [fmean(len(made[side][0]["content"]) for made in records) for side in ("chosen", "rejected")]
    return f"{line}; mean gap {gap:.3g}, mean length chosen {lengths[0]:.0f}, rejected {lengths[1]:.0f} characters"


def _fingerprint(options: Mapping[str, Any], tasks: Sequence[str], origin: Record) -> str:
    what = json.dumps([options, list(tasks), origin], sort_keys=True, default=str)
    return hashlib.sha256(what.encode()).hexdigest()


def _say(trainer: L.Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(text, flush=True)
