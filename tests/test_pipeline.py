"""Pipelines without a model: what a file may say, what is stale and why, what is moved aside, and lineage."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml

from lit_agentrl.cli import OWN_COMMANDS, main
from lit_agentrl.errors import UserError
from lit_agentrl.pipeline import lineage, load
from lit_agentrl.pipeline.check import _ask
from lit_agentrl.pipeline.forms import FIT, FORMS, NO_STAGES, Form, form_of
from lit_agentrl.pipeline.hashing import content_hash
from lit_agentrl.pipeline.inputs import Input, find_inputs
from lit_agentrl.pipeline.lineage import render
from lit_agentrl.pipeline.plan import State, dependents, look, state_of
from lit_agentrl.pipeline.run import BEFORE
from runs import ECHO, ROOT

DEMO = "make-webshop-demo"  # a command of half a second that needs no extra


def write(folder: Path, stages: dict, **more: object) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"root": str(folder / "runs"), **more, "stages": stages}, sort_keys=False))
    return path


def chain(folder: Path, size: int = 20) -> Path:
    """Three stages in the working folder: the second reads what the first leaves, the third stands alone."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "raw.txt").write_text("raw")
    stages = {
        "one": {"command": DEMO, "options": {"num_products": "${size}"}, "inputs": ["data/raw.txt"]},
        "two": {"command": DEMO, "options": {"num_products": 30, "seed": 1}, "inputs": ["${stages.one.export}"]},
        "three": {"command": DEMO, "options": {"num_products": 10}},
    }
    return write(folder, stages, root="runs", size=size)


def states(path: Path, *overrides: str) -> dict[str, State]:
    _, stages = load(path, list(overrides))
    return {entry.stage.name: entry.state for entry in look(stages, find_inputs(stages))}


def refused(capfd, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["pipeline", *words])
    assert end.value.code == 2
    return capfd.readouterr().err


@pytest.fixture(scope="module")
def alone():
    """Stages in processes of their own run this copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, alone):
    """A folder where the chain was run to its end; all its paths are relative."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["pipeline", str(chain(folder))])
    return folder


@pytest.fixture
def done(made, tmp_path, monkeypatch, capfd):
    """A copy of it to play with, which is the working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pipeline.yaml"


def test_a_second_call_runs_nothing(done, capfd):
    main(["pipeline", str(done)])
    out = capfd.readouterr().out
    assert out.count("finished already") == 3
    assert "lit-agentrl make" not in out


def test_only_what_reads_a_changed_file_is_stale(done, tmp_path, capfd):
    """By content: the same bytes at another time change nothing."""
    raw = tmp_path / "data" / "raw.txt"
    os.utime(raw, (1, 1))
    assert set(states(done).values()) == {State.FINISHED}
    before = content_hash(raw)
    raw.write_text("other")
    assert states(done) == {"one": State.STALE, "two": State.FINISHED, "three": State.FINISHED}
    text = refused(capfd, str(done))
    assert f"data/raw.txt changed from {before[:12]} to {content_hash(raw)[:12]} since it ran" in text
    assert "--from one" in text
    assert (tmp_path / "runs" / "one" / "export").is_dir()
    raw.unlink()  # what is gone has not changed, but is asked for
    assert "its input data/raw.txt is not there, and no earlier stage leaves it" in refused(capfd, str(done))


def test_other_options_are_named_and_the_old_runs_kept(done, tmp_path, capfd):
    old = content_hash(tmp_path / "runs" / "one" / "export")
    text = refused(capfd, str(done), "size=25")
    assert "stage 'one' is stale" in text
    assert "--num_products: 20 then, 25 now" in text
    main(["pipeline", str(done), "size=25", "--from", "one"])
    out = capfd.readouterr().out
    runs = tmp_path / "runs"
    assert out.count("is now") == 2  # the third does not depend on it
    assert "[3/3] three: finished already" in out
    assert content_hash(runs / "one.old-1" / "export") == old != content_hash(runs / "one" / "export")
    assert (runs / "two.old-1" / "export").is_dir()


def test_a_rerun_with_the_same_result_leaves_the_rest_finished_another_result_does_not(done, tmp_path, capfd):
    main(["pipeline", str(done), "--rerun", "one"])
    assert capfd.readouterr().out.count("finished already") == 2
    text = refused(capfd, str(done), "size=25", "--rerun", "one")
    assert "stage 'two' is stale: its input" in text
    assert "(from stage 'one') changed" in text
    assert states(done, "size=25") == {"one": State.FINISHED, "two": State.STALE, "three": State.FINISHED}


def test_a_deleted_run_is_made_again_and_what_follows_stays(done, tmp_path, capfd):
    shutil.rmtree(tmp_path / "runs" / "one")
    assert states(done)["two"] is State.FINISHED
    main(["pipeline", str(done)])
    assert capfd.readouterr().out.count("finished already") == 2


def test_an_export_that_is_gone_is_said_before_anything_runs(done, tmp_path, capfd):
    shutil.rmtree(tmp_path / "runs" / "one" / "export")
    assert states(done)["two"] is State.FINISHED
    text = refused(capfd, str(done), "--rerun", "two")
    assert "although stage 'one', which should leave it, is finished" in text
    assert (tmp_path / "runs" / "two" / "export").is_dir()


def test_a_marker_of_an_earlier_version_counts_and_is_completed(done, tmp_path, capfd):
    """It held fingerprint, arguments and `finished`, or the fingerprint alone."""
    runs = tmp_path / "runs"
    for name, keys in (("one", ("fingerprint", "arguments", "finished")), ("two", ("fingerprint",))):
        written = json.loads((runs / name / "stage.json").read_text())
        (runs / name / "stage.json").write_text(json.dumps({key: written[key] for key in keys}))
        (runs / name / "lineage.json").unlink()
    assert set(states(done).values()) == {State.FINISHED}
    main(["pipeline", str(done)])
    assert capfd.readouterr().out.count(BEFORE) == 2
    assert json.loads((runs / "two" / "lineage.json").read_text())["note"] == BEFORE
    (tmp_path / "data" / "raw.txt").write_text("other")
    assert states(done)["one"] is State.STALE


def test_lineage_goes_back_to_the_data_and_sees_what_was_touched(done, tmp_path, capfd):
    runs = tmp_path / "runs"
    links = lineage(runs, "two")
    assert [(link.depth, Path(link.path).name, link.maker and link.maker["stage"]) for link in links] == [
        (0, "export", "two"),
        (1, "export", "one"),
        (2, "raw.txt", None),
    ]
    assert [link.condition() for link in links] == ["", "", ""]
    made = links[1].maker
    assert made["outputs"][0]["sha256"] == links[1].sha256 == content_hash(runs / "one" / "export")
    assert made["inputs"] == [{"path": links[2].path, "sha256": content_hash(links[2].path), "made_by": None}]
    assert {"torch", "transformers", "python", "lit-agentrl"} <= set(made["versions"])
    assert made["started"] <= made["ended"]
    assert json.loads((runs / "one" / "lineage.json").read_text()) == made
    (tmp_path / "data" / "raw.txt").write_text("touched")
    lines = list(render(links))
    assert "changed since" in lines[2]
    assert lines[2].startswith("      <- ")
    assert lineage(runs)[0].maker["stage"] == "three"  # the last that exports
    main(["pipeline", str(done), "--lineage"])
    assert "three: make-webshop-demo" in capfd.readouterr().out
    with pytest.raises(UserError, match="none of the finished stages"):
        lineage(runs, "four")
    with pytest.raises(UserError, match="run the pipeline first"):
        lineage(tmp_path)


def test_the_dry_run_prints_the_plan_and_touches_nothing(tmp_path, alone, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = chain(tmp_path)
    main(["pipeline", str(path), "--dry-run"])
    out = capfd.readouterr().out
    assert f"two: lit-agentrl {DEMO} runs/two/export --num_products 30 --seed 1" in out
    assert "reads    data/raw.txt (given)" in out
    assert "reads    runs/one/export (from one)" in out
    assert "leaves   runs/three/export (export)" in out
    assert out.count("state    to do") == 3
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_says_what_would_be_moved(done, tmp_path, capfd):
    main(["pipeline", str(done), "--dry-run", "--from", "one"])
    out = capfd.readouterr().out
    assert "aside    runs/one becomes runs/one.old-1" in out
    assert out.count("state    to do: again") == 2
    assert (tmp_path / "runs" / "one" / "export").is_dir()


A = {"command": DEMO}
BAD_FILES = [
    ({"a": {"command": "make-nothing"}}, "stage 'a': there is no command 'make-nothing'"),
    ({"a": {"command": DEMO, "options": {"num_product": 3}}}, "stage 'a': make-webshop-demo has no option num_product"),
    ({"a": {"command": "serve-retriever"}}, "can be no stage, because it never ends"),
    ({"a": {"command": "pipeline"}}, "pipelines do not nest"),
    ({"a": {"comand": DEMO}}, "stage 'a' has no `command`"),
    ({"a": {**A, "sed": 3}}, "stage 'a' has unknown keys ['sed']"),
    ({"../a": A}, "names a folder"),
    ({}, "`stages` is empty"),
    ([A], "must be a mapping"),
    ({"a": {**A, "inputs": ["no/where.txt"]}}, "its input no/where.txt is not there, and no earlier stage leaves it"),
    ({"a": {**A, "inputs": ["${stages.b.export}"]}, "b": A}, "stage 'b' leaves, which comes later"),
    ({"a": {**A, "inputs": ["${stages.a.export}"]}}, "which it leaves itself"),
    ({"a": {**A, "inputs": ["${stages.c.export}"]}}, "stages.c"),
    ({"a": A, "b": {**A, "run": "${stages.a.run}"}}, "both write to"),
    ({"a": A, "b": {**A, "export": "${stages.a.export}"}}, "both write to"),
    ({"a": {**A, "export": "${.run}"}}, "leaves its whole run folder"),
    ({"a": {**A, "inputs": "no/where"}}, "its input no/where is not there"),
    ({"a": {**A, "outputs": ["x"]}}, "`outputs` must be a mapping"),
    ({"a": {**A, "options": "seed=3"}}, "`options` must be a mapping"),
    ({"a": {"command": "evaluate", "config": ECHO, "export": "x"}}, "evaluate leaves no `export`"),
    ({"a": {"command": "fit", "config": "nowhere.yaml"}}, "names the config 'nowhere.yaml'"),
    ({"a": {"command": "fit", "config": ECHO, "options": {"data.nope": 3}}}, "stage 'a': Parser key \"data\""),
    ({"a": {"command": "fit"}}, "stage 'a': fit needs `model`"),
    (
        {
            "a": {"command": "fit", "config": ECHO, "options": {"export.at_end": False}},
            "b": {"command": "fit", "config": ECHO, "options": {"model.pretrained": "${stages.a.export}"}},
        },
        "with export.at_end=False and export.folder=export it writes none",
    ),
]


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("stages", "message"), BAD_FILES, ids=[message[:40] for _, message in BAD_FILES])
def test_what_is_wrong_with_a_file_is_said_before_the_first_stage(tmp_path, alone, capfd, stages, message, dry):
    text = refused(capfd, str(write(tmp_path, stages)), *(["--dry-run"] if dry else []))
    assert message in text
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"tabel": {}}, "unknown keys ['tabel']"),
        ({"table": {"metrics": ["success"], "stages": ["b"]}}, "stage 'b' is none of a"),
        ({"table": {"stages": ["a"]}}, "metrics is empty"),
        ({"table": {"metrics": ["success"], "stages": [{"stage": "a", "which": "best"}]}}, "first or last"),
        ({"table": {"metrics": ["success"], "stages": ["a", {"stage": "a"}]}}, "labels must differ"),
        ({"success": "a"}, "must be a list"),
        ({"transcripts": {"stage": "c"}}, "stage 'c' is none of a"),
        ({"export": "z"}, "stage 'z' is none of a"),
        (["table"], "must be a mapping"),
        (3, "must be a mapping"),
    ],
)
def test_a_report_that_cannot_be_drawn_is_refused_before_the_first_stage(tmp_path, alone, capfd, report, message):
    assert message in refused(capfd, str(write(tmp_path, {"a": A}, report=report)))
    assert not (tmp_path / "runs").exists()


def test_an_unknown_stage_to_run_again_is_refused(tmp_path, capfd):
    assert "stage 'four' is none of the stages" in refused(capfd, str(chain(tmp_path)), "--from", "four")


def test_options_are_typed_as_each_command_reads_them():
    assert Form().words("seeds", [1, 2]) == ["--seeds", "1", "2"]
    assert Form().words("overwrite", True) == ["--overwrite"]
    assert Form().words("overwrite", False) == Form().words("limit", None) == []
    assert Form().words("name", "a b") == ["--name", "a b"]
    assert FIT.words("data.ids", [1, "x"]) == ["--data.ids", '[1, "x"]']
    assert FIT.words("export.at_end", False) == ["--export.at_end", "false"]
    assert FIT.words("model.lora", None) == ["--model.lora", "null"]
    assert FORMS["compare"].words("seeds", [0]) == ["seeds=[0]"]


def test_where_outputs_go_and_how_others_refer_to_them(tmp_path):
    """One named output is what the command is told; with `export` given, outputs are parts of it."""
    stages = {
        "mine": {"command": "mine-preferences", "outputs": {"pairs": "${.run}/pairs.jsonl"}},
        "make": {"command": DEMO, "export": "data/shop", "outputs": {"items": "${.export}/items.json", "x": "y/x"}},
        "whole": {"command": DEMO, "outputs": {"items": "${.export}/items.json"}},
        "race": {"command": "compare", "config": ECHO},
        "dpo": {
            "command": "fit",
            "options": {"data": {"path": "${stages.mine.outputs.pairs}", "more": "${stages.mine.export}"}},
        },
    }
    _, (mine, make, whole, race, dpo) = load(write(tmp_path, stages), [])
    root = tmp_path / "runs"
    words = ["--trainer.default_root_dir", f"{root}/mine", "--mine.output", f"{root}/mine/pairs.jsonl"]
    assert mine.arguments() == ["mine-preferences", *words]
    assert make.arguments() == [DEMO, "data/shop"]
    assert make.outputs == {"items": Path("data/shop/items.json"), "x": Path("y/x")}
    assert whole.arguments() == [DEMO, f"{root}/whole/export"]
    assert race.arguments()[-1] == f"output={root}/race/export"
    assert dpo.options == {"data.path": f"{root}/mine/pairs.jsonl", "data.more": f"{root}/mine/pairs.jsonl"}
    found = find_inputs([mine, make, whole, race, dpo])
    assert found["dpo"] == (Input(f"{root}/mine/pairs.jsonl", "mine", False),)


def test_inputs_are_found_where_options_and_configurations_name_them(tmp_path, monkeypatch):
    """Options win over configuration files; words without a slash and the run's own folders are no inputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOMEWHERE", "data")
    for name in ("data/a.txt", "data/b.txt", "data/c.txt", "test/x", "runs/latest/x", "base/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    config = {
        "trainer": {"default_root_dir": "runs/latest"},
        "model": {"class_path": "SFTModule", "init_args": {"pretrained": "base/x"}},
        "data": {
            "init_args": {
                "split": "test",
                "url": "http://no/where",
                "files": [{"path": "data/a.txt"}],
                "other": "${oc.env:SOMEWHERE}/b.txt",
            }
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    stages = {
        "a": {"command": "fit", "config": "c.yaml", "options": {"model": {"init_args": {"pretrained": "data/c.txt"}}}}
    }
    _, loaded = load(write(tmp_path, stages), [])
    assert {item.path for item in find_inputs(loaded)["a"]} == {"data/a.txt", "data/b.txt", "data/c.txt"}
    monkeypatch.delenv("SOMEWHERE")  # the command itself says that it is missing
    assert {item.path for item in find_inputs(loaded)["a"]} == {"data/a.txt", "data/c.txt"}


def test_what_depends_on_a_stage(tmp_path):
    """Directly or not, and by any file in its run folder."""
    stages = {
        "a": A,
        "b": {**A, "inputs": ["${stages.a.run}/checkpoints/last.ckpt"]},
        "c": A,
        "d": {**A, "inputs": ["${stages.b.export}", "${stages.c.export}"]},
    }
    _, loaded = load(write(tmp_path, stages), [])
    found = find_inputs(loaded)
    assert dependents("a", found) == {"a", "b", "d"}
    assert dependents("c", found) == {"c", "d"}
    assert dependents("d", found) == {"d"}


def test_a_fit_does_not_go_on_from_a_checkpoint_of_another_model(tmp_path):
    """Its adapter would sit on weights that it never saw; without a checkpoint it simply begins anew."""
    (tmp_path / "base").write_text("one")
    stages = {"a": {"command": "fit", "config": ECHO, "options": {"model.pretrained": str(tmp_path / "base")}}}
    _, (stage,) = load(write(tmp_path, stages), [])
    inputs = find_inputs([stage])["a"]
    assert inputs == (Input(str(tmp_path / "base"), None, False),)
    stage.mark(finished=False, inputs={inputs[0].path: content_hash(inputs[0].path)})
    (tmp_path / "base").write_text("two")
    assert state_of(stage, inputs)[0] is State.INTERRUPTED
    stage.checkpoint.parent.mkdir(parents=True)
    stage.checkpoint.write_bytes(b"")
    state, reason = state_of(stage, inputs)
    assert state is State.STALE
    assert "since it began" in reason
    (tmp_path / "base").write_text("one")
    assert state_of(stage, inputs)[0] is State.INTERRUPTED


def test_hashes_are_of_names_and_bytes(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x").write_text("x")
    assert content_hash(a) == content_hash(b)
    (b / "sub" / "__pycache__").mkdir()
    (b / "sub" / "__pycache__" / "y").write_text("y")
    (b / "half.tmp").write_text("y")
    (b / "sub" / "round").symlink_to(b)
    assert content_hash(a) == content_hash(b)
    (b / "sub" / "x").rename(b / "x")
    assert content_hash(a) != content_hash(b)
    (b / "x").write_text("")
    assert content_hash(b / "x") != content_hash(a / "sub" / "x")
    assert content_hash(tmp_path / "nothing") is None


def test_a_large_folder_is_not_read_twice_and_a_change_is_seen(tmp_path, monkeypatch):
    """What is remembered counts only while no size and no time has changed."""
    monkeypatch.setattr("lit_agentrl.pipeline.hashing.REMEMBERED_BYTES", 1)
    monkeypatch.setattr("lit_agentrl.pipeline.hashing.SETTLED_SECONDS", -1.0)
    (tmp_path / "x").write_text("one")
    before = content_hash(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lit_agentrl.pipeline.hashing.content_digest", lambda path: pytest.fail("read again"))
        assert content_hash(tmp_path) == before
    time.sleep(0.02)
    (tmp_path / "x").write_text("two")  # of the same size
    assert content_hash(tmp_path) != before


def test_a_damaged_marker_is_no_traceback(done, tmp_path, capfd):
    (tmp_path / "runs" / "one" / "stage.json").write_text("{")
    assert "stage.json cannot be read" in refused(capfd, str(done))


def test_a_stage_that_leaves_less_than_it_names_is_not_finished(tmp_path, alone, capfd):
    path = write(tmp_path, {"a": {**A, "outputs": {"x": "${.export}/nothing.json"}}})
    assert "did not leave x:" in refused(capfd, str(path))
    assert states(path) == {"a": State.INTERRUPTED}


@pytest.mark.parametrize("command", sorted(set(OWN_COMMANDS) - set(NO_STAGES)))
def test_the_table_of_forms_fits_every_command(command):
    """A command's help shows its output as the table says; a new command is told OUTPUT first."""
    code, text, errors = _ask(command, str(ROOT))
    assert code == 0, errors
    output = form_of(command).output
    usage = text.split("\n\n")[0]
    if output == "OUTPUT":
        assert re.search(r"\bOUTPUT\b", usage), f"{command} takes no OUTPUT: say in pipeline/forms.py how it is told"
    elif output.startswith("--"):
        assert output in text
    else:
        assert "key=value" in usage


def test_forms_are_of_commands_that_exist():
    from lit_agentrl.cli import LIGHTNING_COMMANDS

    assert {*FORMS, *NO_STAGES} <= {*OWN_COMMANDS, *LIGHTNING_COMMANDS}
