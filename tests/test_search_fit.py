"""Search agents from a configuration: suite and retriever by name, rollouts, metrics, and the supervised warm-up."""

import json
from pathlib import Path

import pytest
import yaml

from lit_agentrl.cli import main
from retrieval_parts import serving, write_corpus
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


def searching(folder: Path, lm: str, url: str, engine: dict[str, object]) -> dict[str, object]:
    """A run of trees that ask a server: two searches and a last turn for each of 6 leaves of a question."""
    environment = suite(write_questions(folder), "SearchSuite")
    retriever = {"class_path": "HTTPRetriever", "init_args": {"url": url, "timeout": 5, "retries": 0, "cache_size": 0}}
    environment["init_args"] |= {"retriever": retriever, "max_turns": 2, "max_observation_chars": 60}
    return {
        "model": {"class_path": "TreeGRPOModule", "init_args": {"pretrained": lm}},
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "environment": environment,
                "engine": engine,
                "rollout": {"class_path": "TreeRollout", "init_args": {"max_steps": 3}},
                "chat": "inline",
                "canary": None,  # the engine says what is written down
                "sampling": {"max_new_tokens": 40},
                "num_prompts": 1,
                "max_length": 512,
            },
        },
        "evaluation": {"num_tasks": 1, "at_start": False, "sampling": {"max_new_tokens": 40}},
        "transcripts": {"show": 0},
    }


def test_a_run_survives_its_search_server(tiny_lm, tmp_path):
    """Killed before the second searches of the first chains: what is asked later is told so, and the fit ends well."""
    with serving(write_corpus(tmp_path / "corpus.jsonl")) as (server, url):
        engine = {"class_path": "search_parts.Asking", "init_args": {"pid": server.pid, "kill_before": 1}}
        folder = run(tmp_path, searching(tmp_path, tiny_lm, url, engine))
        assert server.wait(10) < 0
    (file,) = (folder / "transcripts").glob("iteration_*.jsonl")
    episodes = [json.loads(line) for line in file.read_text().splitlines()]
    shown = [[step["observation"] for step in episode["steps"]] for episode in episodes]
    assert len(episodes) == 6
    assert all(episode["stop_reason"] == "done" and not episode["error"] for episode in episodes)
    assert all("the search for" in observations[2] for observations in shown)
    assert any("Doc 1" in observations[1] for observations in shown)
    (row,) = [row for row in metrics(folder) if row.get("eval/environment/search_failures")]
    assert float(row["eval/environment/search_failures"]) == float(row["eval/environment/tool_calls"]) == 2


def test_a_server_that_was_never_there_ends_the_run_before_it_begins(tiny_lm, tmp_path, capsys):
    """One sentence, exit code 2, and nothing was generated."""
    config = searching(tmp_path, tiny_lm, "http://127.0.0.1:1", {"class_path": "search_parts.Asking"})
    with pytest.raises(SystemExit) as end:
        run(tmp_path, config)
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "search server does not answer" in line
    assert "http://127.0.0.1:1/retrieve" in line
    assert "serve-retriever" in line
    assert not list(tmp_path.glob("transcripts/*"))
