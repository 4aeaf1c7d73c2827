"""Search agents from a configuration: suite and retriever by name, rollouts, metrics, and the supervised warm-up."""

from pathlib import Path

import pytest
import yaml

from lit_agentrl.cli import main
from runs import metrics
from search_parts import write_questions


def suite(path: str, name: str) -> dict[str, object]:
    retriever = {"class_path": "search_parts.Library"}
    arguments = {"questions": path, "retriever": retriever, "test_questions": [path], "val_share": 0.0, "max_turns": 1}
    return {"class_path": name, "init_args": arguments | {"prompt": "Question: {question}"}}


def run(folder: Path, config: dict[str, object]) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    trainer = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)]
    main(["fit", "--config", str(folder / "run.yaml"), *trainer])
    return folder


@pytest.mark.parametrize("name", ["SearchSuite", "WebSuite"])
def test_a_run_plays_episodes_and_logs_their_numbers(tiny_lm, tmp_path, name):
    """A random model finds no action: one correction, then the turn that only may answer."""
    config = {
        "model": {"class_path": "GRPOPlusPlusModule", "init_args": {"pretrained": tiny_lm}},
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "environment": suite(write_questions(tmp_path), name),
                "rollout": {"class_path": "ChainRollout", "init_args": {"max_steps": 2, "cut_actions": "continue"}},
                "sampling": {"max_new_tokens": 6},
                "num_prompts": 2,
                "group_size": 2,
                "max_length": 480,
            },
        },
        "evaluation": {"num_tasks": 2, "sampling": {"max_new_tokens": 6}},
    }
    rows = metrics(run(tmp_path, config))
    logged = {key: float(row[key]) for row in rows for key in row if "environment/" in key and row[key]}
    number = {key.rpartition("/")[2]: value for key, value in logged.items()}
    assert number["invalid_actions"] == 2
    assert number["tool_calls"] == number["em"] == number["format"] == 0
    assert ("open_calls" in number) is (name == "WebSuite")


def test_walkthroughs_are_supervised_examples(tiny_lm, tmp_path):
    config = {
        "model": {"class_path": "SFTModule", "init_args": {"pretrained": tiny_lm}},
        "data": {
            "class_path": "ConversationDataModule",
            "init_args": {
                "source": {
                    "class_path": "Walkthroughs",
                    "init_args": {"environment": suite(write_questions(tmp_path), "SearchSuite")},
                },
                "batch_size": 1,
                "max_length": 512,
            },
        },
    }
    rows = metrics(run(tmp_path, config))
    assert any(float(row["train/loss"]) > 0 for row in rows if row.get("train/loss"))
