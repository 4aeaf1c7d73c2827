"""Comparisons from end to end: what is refused before anything runs, real runs on the tiny model, a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_agentrl.callbacks import read_evaluations
from lit_agentrl.cli import main
from lit_agentrl.compare import load
from runs import ROOT

EXAMPLE = ROOT / "configs" / "compare" / "gigpo_vs_grpo_echo.yaml"
COUNTED = "{class_path: runs.CountedChain, init_args: {max_steps: 2}}"


def words(tiny_lm, folder: Path, *more: str) -> list[str]:
    """The example with the tiny model and caps of a few iterations; its chains count their tokens and steps."""
    small = {
        "model.pretrained": tiny_lm,
        "model.optimizer.lr": "1e-2",
        "data.num_prompts": 2,
        "data.rollout": COUNTED,
        "data.rewards": "[{function: runs.mean_token}]",
        "evaluation.num_tasks": 3,
        "evaluation.sampling": "{temperature: 1.0, max_new_tokens: 8}",
        "export.at_end": "false",
    }
    options = [f"options.{key}={value}" for key, value in small.items()]
    given = [f"output={folder}", "budget.generated_tokens=400", *options, *more]
    return ["compare", "--config", str(EXAMPLE), *given]


@pytest.fixture
def alone(monkeypatch):
    """Runs in processes of their own find the tests' classes, and this copy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


def tokens_axis(folder: Path) -> dict:
    """The report's numbers that no clock is in."""
    report = json.loads((folder / "report.json").read_text())
    (axis,) = [axis for axis in report["axes"] if axis["axis"] == "generated_tokens"]
    return axis


@pytest.mark.slow
def test_a_comparison_killed_in_the_middle_ends_with_the_same_report(tiny_lm, tmp_path, alone, capfd):
    """The whole thing: four runs to their cap, a report in four files; then once more with a kill in the third run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(words(tiny_lm, whole))
    out = capfd.readouterr().out
    assert "[4/4] gigpo seed 1" in out
    assert "minus grpo is" in out
    assert "not decided" in out
    for name in ("report.md", "report.json", "report.html", "report.png"):
        assert (whole / name).stat().st_size > 1000
    axis = tokens_axis(whole)
    assert axis["budget"] >= 400
    ends = []
    for arm in ("grpo", "gigpo"):
        for seed in (0, 1):
            records = read_evaluations(whole / arm / f"seed_{seed}")
            assert records[0]["budget"]["generated_tokens"] == 0
            ends.append(records[-1]["budget"]["generated_tokens"])
            points = [[r["budget"]["generated_tokens"], r["metrics"]["reward/mean"]] for r in records]
            assert axis["curves"][arm][seed] == [[x, pytest.approx(y)] for x, y in points]
    assert axis["budget"] == min(ends)
    values = {y for curves in axis["curves"].values() for curve in curves for _, y in curve}
    assert len(values) > 8  # the reward tells any two policies apart: the same numbers twice are no accident

    for arm in ("grpo", "gigpo"):  # the first pair, to kill in the second
        shutil.copytree(whole / arm / "seed_0", killed / arm / "seed_0")
    process = subprocess.Popen([sys.executable, "-m", "lit_agentrl", *words(tiny_lm, killed)], start_new_session=True)
    last = killed / "grpo" / "seed_1" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not last.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # its own session: the comparison and the run inside it
    process.wait()
    assert not (killed / "report.json").exists()
    capfd.readouterr()
    main(words(tiny_lm, killed))
    out = capfd.readouterr().out
    assert out.count("finished already") == 2
    assert "--ckpt_path" in next(line for line in out.splitlines() if line.startswith("[3/4] grpo seed 1"))
    assert tokens_axis(killed) == axis

    main([*words(tiny_lm, killed), "--report-only", "--no-plot"])
    assert tokens_axis(killed) == axis
    with pytest.raises(SystemExit):
        main([*words(tiny_lm, killed, "options.data.num_prompts=3")])
    assert "other options" in capfd.readouterr().err


def test_dry_run_prints_commands_and_runs_nothing(tiny_lm, tmp_path, capsys):
    main([*words(tiny_lm, tmp_path / "x", "seeds=[3,5]"), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["grpo seed 3", "gigpo seed 3", "grpo seed 5", "gigpo seed 5"]
    for part in ("--seed_everything 5", "--budget.generated_tokens 400", "--trainer.max_epochs -1"):
        assert part in lines[3]
    assert not (tmp_path / "x").exists()


def write(tmp_path, text: str) -> Path:
    (tmp_path / "a.yaml").write_text("trainer: {max_epochs: 1}\n")
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "c.yaml"


GOOD = "{budget: {seconds: 5}, baseline: a, arms: {a: {config: a.yaml}, b: {config: a.yaml}}}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("budget:", "budgets:"), "unknown keys ['budgets']"),
        (("seconds: 5", "token: 5"), "unknown keys ['token']"),
        (("seconds: 5", "seconds: 0"), "at least one of generated_tokens, tool_calls, seconds"),
        (("seconds: 5", ""), "at least one of"),
        (("baseline: a", "baseline: c"), "baseline 'c' is none of the arms a, b"),
        ((", b: {config: a.yaml}", ""), "1 arms"),
        (("b: {config: a.yaml}", "b: {config: no.yaml}"), "names the config 'no.yaml'"),
        (("b: {config: a.yaml}", "b: {}"), "arm 'b' has no `config`"),
        (("b: {config: a.yaml}", "b: {config: a.yaml, seed: 3}"), "unknown keys ['seed']"),
        (("b: {", "../b: {"), "names a folder"),
        (("b: {config: a.yaml}", "b: {config: a.yaml, options: {seed_everything: 3}}"), "sets seed_everything"),
        (("b: {config: a.yaml}", "b: {config: a.yaml, options: {budget.seconds: 3}}"), "sets budget.seconds"),
        (("{budget", "{seeds: [1, 1], budget"), "different numbers"),
        (("b: {config: a.yaml}", "b: {config: a.yaml, options: {data.prompt: 'Q: {q}'}}"), "would take the text"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, change, message):
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(SystemExit) as end:
        main(["compare", "--config", str(path), "--dry-run"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_arms_options_win_over_shared_ones_and_caps_over_both(tmp_path):
    text = GOOD.replace("b: {config: a.yaml", "b: {config: a.yaml, options: {data: {x: 2}, trainer.max_epochs: 7}")
    plan = load(write(tmp_path, text.replace("{budget", "{options: {data.x: 1}, budget")), ["budget.seconds=8"])
    assert plan.stages["a", 0].options == {
        "trainer.max_epochs": -1, "data.x": 1, "seed_everything": 0,
        "budget.generated_tokens": None, "budget.tool_calls": None, "budget.seconds": 8,
    }  # fmt: skip
    assert plan.stages["b", 2].options["data.x"] == 2
    assert plan.stages["b", 2].options["trainer.max_epochs"] == 7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("arms.gigpo.options.data.nope=3", "arm 'gigpo': Parser key"),
        ("arms.gigpo.options.evaluation.num_tasks=4", "arm 'gigpo' has evaluation.num_tasks=4, the baseline 3"),
        ("options.evaluation={every_n_epochs: 0, at_start: false}", "a curve needs two evaluations"),
        ("nothing=3", "overrides are key=value"),
    ],
)
def test_options_of_every_arm_are_checked_before_the_first_run(tiny_lm, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        main(words(tiny_lm, tmp_path / "x", more))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_missing_matplotlib_is_said_before_any_run(tiny_lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(words(tiny_lm, tmp_path / "x"))
    assert "lit-agentrl[plot]" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_failed_run_leaves_its_command(tiny_lm, tmp_path, alone, capfd):
    with pytest.raises(SystemExit) as end:
        main(words(tiny_lm, tmp_path / "x", "options.model.pretrained=no/where", "seeds=[4]"))
    assert end.value.code == 2
    assert "stage 'grpo seed 4' failed. Alone: lit-agentrl fit --config" in capfd.readouterr().err


def test_nothing_finished_is_no_report(tiny_lm, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*words(tiny_lm, tmp_path / "x"), "--report-only"])
    assert "no seed is finished in all arms" in capsys.readouterr().err
