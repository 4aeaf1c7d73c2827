import json
import math
from dataclasses import asdict

import pytest
from rich.console import Console

from callback_parts import FakeModule, FakeRollouts, group, step, trainer, trajectory
from lit_agentrl.callbacks import Transcripts
from lit_agentrl.callbacks.records import (
    group_records,
    render_transcript,
    sample_records,
    trajectory_record,
    write_records,
)
from lit_agentrl.errors import UserError
from lit_agentrl.files import TEMPORARY_SUFFIX
from lit_agentrl.types import Ledger, StopReason


def rendered(record, width=200):
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(render_transcript(record))
    return capture.get()


def test_a_record_holds_what_happened():
    episode = trajectory(
        False,
        StopReason.MAX_STEPS,
        steps=[step("a", "b", 0.25, -1.0, valid=True), step("c", "dd", 0.0, -0.25)],
        tree_id=3,
        cost=Ledger(env_seconds=1.5),
        metrics={"score": 0.5},
    )
    assert trajectory_record("task-9", 4, episode) == {
        "prompt_id": "task-9",
        "trajectory": 4,
        "tree_id": 3,
        "steps": [
            {"observation": "a", "action": "b", "valid": True, "reward": 0.25, "context_tokens": 1, "action_tokens": 1,
             "mean_logprob": -1.0, "finish": "stop", "images": []},
            {"observation": "c", "action": "dd", "valid": None, "reward": 0.0, "context_tokens": 1,
             "action_tokens": 2, "mean_logprob": -0.25, "finish": "stop", "images": []},
        ],
        "rewards": {"solved": 0.0},
        "total_reward": 0.0,
        "success": False,
        "stop_reason": "max_steps",
        "error": "",
        "metrics": {"score": 0.5},
        "mean_logprob": -0.5,
        "cost": asdict(Ledger(env_seconds=1.5)),
    }  # fmt: skip


def test_records_are_valid_json_whatever_is_in_them(tmp_path):
    episode = trajectory(None, StopReason.ENV_ERROR, steps=[], rewards={"x": math.nan}, total_reward=math.inf)
    odd = trajectory(steps=[step('"\n\u2028 \udcff é [/red]', "")])
    records = [trajectory_record("a", 0, episode), trajectory_record("b", 0, odd)]
    write_records(tmp_path / "x.jsonl", records)
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines[:-1]] == records
    assert records[0]["total_reward"] is records[0]["rewards"]["x"] is records[0]["mean_logprob"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_records(tmp_path / "x.jsonl", [{"a": 1}])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_records(tmp_path / "x.jsonl", [{"a": object()}])
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"a": 1}\n']


def test_markup_and_control_characters_are_shown_and_not_obeyed():
    text = rendered(trajectory_record("t[bold]", 0, trajectory(steps=[step("[red]x[/red] [/] [link", "\x1b[2Jgo")])))
    assert "[red]x[/red] [/] [link" in text
    assert "t[bold] #0" in text
    assert "\x1b" not in text
    assert "\N{REPLACEMENT CHARACTER}[2Jgo" in text


def test_a_transcript_shows_steps_outcome_and_reward_components():
    episode = trajectory(True, steps=[step("look", "take key", 0.5), step("now", "open door")], total_reward=1.5)
    episode.rewards = {"solved": 1.0, "format": 0.25}
    episode.steps[1].finish = "length"
    text = rendered(trajectory_record("house-7", 2, episode))
    assert "house-7 #2: solved, reward 1.5, ended by done" in text
    assert "solved 1 | format 0.25 | mean logprob -0.50" in text
    rows = [line for line in text.splitlines() if "take key" in line or "open door" in line]
    assert "0.5" in rows[0]
    assert f"{len('open door')}+" in rows[1]


def test_long_texts_lose_their_middle():
    text = rendered(trajectory_record("t", 0, trajectory(steps=[step("A" * 900 + "B" * 900)])))
    assert (text.count("A"), text.count("B")) == (200, 200)
    assert "[…]" in text


def test_samples_span_the_rewards():
    episodes = [trajectory(total_reward=reward) for reward in (3.0, 0.0, 2.0, 1.0, 4.0)]
    records = [trajectory_record("t", index, episode) for index, episode in enumerate(episodes)]
    assert [record["total_reward"] for record in sample_records(records, 2)] == [0.0, 4.0]
    assert [record["total_reward"] for record in sample_records(records, 3)] == [0.0, 2.0, 4.0]
    assert [record["total_reward"] for record in sample_records(records, 1)] == [4.0]
    assert len(sample_records(records, 9)) == 5
    assert sample_records([], 2) == []


def test_writes_each_iteration_and_shows_samples_on_schedule(tmp_path, capsys):
    trainer(tmp_path, Transcripts(show=2, show_every=2), max_epochs=3).fit(FakeModule(), datamodule=FakeRollouts())
    folder = tmp_path / "transcripts"
    assert sorted(path.name for path in folder.iterdir()) == [f"iteration_00000{epoch}.jsonl" for epoch in range(3)]
    records = [json.loads(line) for line in (folder / "iteration_000001.jsonl").read_text().splitlines()]
    assert records == group_records([group(True, False, prompt_id="task-1")])
    out = capsys.readouterr().out
    for index, is_shown in enumerate([True, False, True]):
        assert all((f"task-{index} #{member}:" in out) == is_shown for member in range(2))


def test_the_file_is_there_when_the_update_fails(tmp_path):
    def explode(prediction, step):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, Transcripts(show=0)).fit(FakeModule(explode), datamodule=FakeRollouts())
    assert (tmp_path / "transcripts" / "iteration_000000.jsonl").exists()


def test_keeps_the_newest_files_and_leaves_others_alone(tmp_path, capsys):
    (tmp_path / "transcripts").mkdir()
    (tmp_path / "transcripts" / "eval_000000.jsonl").touch()
    (tmp_path / "transcripts" / "iteration_000000.rank1.jsonl").touch()
    callback = Transcripts(every_n_epochs=2, show=0, max_files=2)
    trainer(tmp_path, callback, max_epochs=7).fit(FakeModule(), datamodule=FakeRollouts(num_batches=1))
    assert sorted(path.name for path in (tmp_path / "transcripts").iterdir()) == [
        "eval_000000.jsonl",
        "iteration_000000.rank1.jsonl",
        "iteration_000004.jsonl",
        "iteration_000006.jsonl",
    ]
    assert not list(tmp_path.rglob(f"*{TEMPORARY_SUFFIX}"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [{"every_n_epochs": 0}, {"show": -1}, {"show_every": 0}, {"max_files": 0}])
def test_refuses_impossible_intervals(arguments):
    with pytest.raises(UserError, match="must be at least 1"):
        Transcripts(**arguments)
