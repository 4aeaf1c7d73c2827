"""All callbacks together under 2 gloo ranks: what ranks must decide and write alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_agentrl.callbacks import read_evaluations

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from callback_parts import FakeModule, FakeRollouts, trainer
from lit_agentrl.callbacks import *

class Module(FakeModule):
    def training_step(self, batch, batch_idx):
        is_broken = self.global_step == 1 and self.global_rank == 1
        return super().training_step(batch, batch_idx) + (float("nan") if is_broken else 0.0)

    def on_train_epoch_end(self):
        skipped = float(self.trainer.callback_metrics["skipped_updates"])
        weight = self.policy.lm.weight.sum().item()
        with open({run!r} + f".rank{{self.global_rank}}", "a") as file:  # the ranks share a pipe and tear its lines
            print(skipped, weight.hex(), file=file)

callbacks = [
    NonFiniteGuard(), Evaluation(num_tasks=4, every_n_epochs=1), Transcripts(show=0), Throughput(), IterationProgress(),
    IterationCheckpoint(),
]
options = dict(plugins=[AtomicCheckpointIO()], enable_checkpointing=True, strategy="ddp", devices=2)
trainer({run!r}, *callbacks, max_epochs=2, **options).fit(Module(), datamodule=FakeRollouts())
"""


@pytest.mark.slow
def test_two_ranks_agree(tmp_path):
    """The loss is NaN on rank 1 alone, and in no gradient: rank 0 can know it from rank 1 only."""
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), run=str(run)))
    process = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.returncode == 0, process.stderr
    ends = [(tmp_path / f"run.rank{rank}").read_text() for rank in range(2)]
    assert ends[0] == ends[1]
    assert [line.split()[0] for line in ends[0].splitlines()] == ["1.0", "0.0"]
    assert process.stdout.count(" 2/2 ") == 1  # one rank prints
    assert [(r["when"], r["epoch"]) for r in read_evaluations(run)] == [("start", 0), ("schedule", 1), ("schedule", 2)]
    assert len((run / "evaluation.jsonl").read_text().splitlines()) == 3  # one rank writes
    for rank in range(2):
        lines = (run / "transcripts" / f"iteration_000001.rank{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt_id"] for line in lines] == ["task-1", "task-1"]
    folder = run / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "iteration_000000.ckpt",
        "iteration_000001.ckpt",
        "last.ckpt",
    ]
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 1
