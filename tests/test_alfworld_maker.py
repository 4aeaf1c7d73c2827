"""Games made in ALFWorld's format: all types, winnable, honest labels, disjoint splits, the same for the same seed."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from lit_agentrl.cli import main
from lit_agentrl.envs.alfworld import ALFWorldSuite
from lit_agentrl.envs.alfworld.files import GAME, KINDS
from lit_agentrl.envs.alfworld.floor_plans import UNSEEN_PLANS, floor_plans, read_tables
from lit_agentrl.envs.alfworld.maker import MARK, Counts, make_games
from lit_agentrl.errors import UserError
from tiny import build_tiny_lm

pytest.importorskip("alfworld", reason="needs the alfworld extra: pip install 'lit-agentrl[alfworld]'")

COUNTS = Counts(num_train=12, num_valid_seen=6, num_valid_unseen=6, seed=3)


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "games"
    assert make_games(folder, COUNTS) == 24
    return folder


@pytest.fixture(scope="module")
def suite(made) -> ALFWorldSuite:
    return ALFWorldSuite(str(made))


def test_every_split_has_every_type_and_every_game_is_won(suite):
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        tasks = suite.tasks(split)
        kinds = [suite.kind(task) for task in tasks]
        assert {kind: kinds.count(kind) for kind in KINDS.values()} == dict.fromkeys(KINDS.values(), count // 6)
        for task in tasks:
            environment = suite.make(task)
            environment.reset()
            assert not environment.success
            *_, last = (environment.step(reply) for _, reply in suite.walkthrough(task, held_out=True))
            assert last[1:] == (10.0, True)


def test_splits_are_disjoint(made):
    games = {path: json.loads(path.read_text()) for path in made.glob(f"*/*/*/{GAME}")}
    starts = {game["pddl_problem"].split("(:init")[1] for game in games.values()}
    assert len(starts) == len(games) == 24
    rooms = {
        split: {path.parent.name: int(path.parts[-3].split("-")[-1]) for path in made.glob(f"{split}/*/*/{GAME}")}
        for split in ("train", "valid_seen", "valid_unseen")
    }
    assert set(rooms["valid_unseen"].values()) <= set(UNSEEN_PLANS)
    assert not set(rooms["train"].values()) & set(UNSEEN_PLANS)
    assert rooms["valid_seen"].items() <= rooms["train"].items()


def test_games_say_what_they_are(made, suite, caplog):
    for path in made.glob(f"*/*/*/{GAME}"):
        for name in (GAME, "traj_data.json"):
            content = json.loads((path.parent / name).read_text())
            assert content["made_by"] == "lit-agentrl make-alfworld-games"
            assert "not one of the ALFWorld benchmark" in content["notice"]
    readme = (made / "README.md").read_text()
    assert "ALFWorld-format games, placements sampled" in readme
    assert "--num_train 12 --num_valid_seen 6 --num_valid_unseen 6 --seed 3" in readme
    caplog.set_level("INFO")
    ALFWorldSuite(str(made)).tasks("train")
    assert "12 ALFWorld-format games made by lit-agentrl make-alfworld-games, not the benchmark's" in caplog.text


def test_nothing_wanted_starts_where_it_belongs_and_nothing_lies_where_it_cannot(made):
    tables = read_tables()
    for path in made.glob(f"train/*/*/{GAME}"):
        _, target, _, goal, number = path.parts[-3].split("-")
        plan = floor_plans()[int(number)]
        kinds = {receptacle.id: receptacle.kind for receptacle in plan.receptacles}
        problem = json.loads(path.read_text())["pddl_problem"]
        for before, word in (("|", "_bar_"), ("+", "_plus_"), ("-", "_minus_"), (".", "_dot_")):
            problem = problem.replace(word, before)
        lies = [line.strip(" ()").split()[1:] for line in problem.splitlines() if "(inReceptacle" in line]
        lies = [(thing.split("|")[0], kinds[place]) for thing, place in lies if place in kinds]
        assert len(lies) > 5
        assert all(thing in tables.holds[place] for thing, place in lies)
        assert (target, goal) not in lies


def test_equal_seeds_make_equal_games(made, tmp_path):
    """And a game depends on seed, split and number alone, so asking for more adds to what is there."""
    make_games(tmp_path / "few", Counts(2, 1, 1, seed=3))
    few, all_of_them = contents(tmp_path / "few"), contents(made)
    assert len([name for name in few if name.endswith(GAME)]) == 4
    assert {name: text for name, text in few.items() if "/" in name}.items() <= all_of_them.items()
    assert make_games(tmp_path / "few", Counts(3, 1, 1, seed=3)) == 1
    assert {
        name: text for name, text in contents(tmp_path / "few").items() if "/" in name
    }.items() <= all_of_them.items()
    make_games(tmp_path / "other", Counts(2, 1, 1, seed=4))
    other = {text for name, text in contents(tmp_path / "other").items() if name.endswith(GAME)}
    assert not other & set(all_of_them.values())


def test_a_stopped_run_is_continued(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    lost = sorted(copy.glob(f"*/*/*/{GAME}"))[::5]
    for path in lost:
        path.unlink()
    assert make_games(copy, COUNTS) == len(lost) == 5
    assert contents(copy) == contents(made)
    assert make_games(copy, COUNTS) == 0


def test_folders_that_are_refused(made, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and lit-agentrl make-alfworld-games did not make it"):
        make_games(tmp_path, COUNTS)
    with pytest.raises(UserError, match="is not empty"):
        make_games(tmp_path / "file", COUNTS)
    assert contents(tmp_path) == {"file": "mine"}
    before = contents(made)
    with pytest.raises(UserError, match="was made with seed 3, not 0: games of both would mix"):
        make_games(made, Counts(12, 6, 6, seed=0))
    with pytest.raises(UserError, match="was made with num_train=12, more than the 6 asked for"):
        make_games(made, Counts(6, 6, 6, seed=3))
    assert contents(made) == before
    mark = tmp_path / "marked" / MARK
    mark.parent.mkdir()
    mark.write_text("[")
    with pytest.raises(UserError, match="is not readable"):
        make_games(mark.parent, COUNTS)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((-1, 0, 0), "num_train=-1"),
        ((1, 2, 0), "num_valid_seen=2 is more than num_train=1"),
        ((1, 0, 10**6), "num_valid_unseen"),
    ],
)
def test_numbers_out_of_range(counts, message):
    with pytest.raises(UserError, match=message):
        Counts(*counts)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-agentrl", "untouched"])
    counts = ["--num_train", "1", "--num_valid_seen", "0", "--num_valid_unseen", "0"]
    main(["make-alfworld-games", str(tmp_path / "games"), *counts])
    assert "1 games written, 1 in all" in capsys.readouterr().out
    assert sys.argv == ["lit-agentrl", "untouched"]
    with pytest.raises(SystemExit) as end:
        main(["make-alfworld-games", str(tmp_path), *counts])
    assert end.value.code == 2
    assert "give a new folder" in capsys.readouterr().err


def test_without_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "alfworld"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "alfworld", None)
    with pytest.raises(UserError, match=r"pip install 'lit-agentrl\[alfworld\]'"):
        read_tables.__wrapped__()


def test_the_documented_run_trains(made, tmp_path):
    """The YAML of docs/alfworld.md, with the tiny model on made games."""
    document = (Path(__file__).parent.parent / "docs" / "alfworld.md").read_text()
    config = tmp_path / "config.yaml"
    config.write_text(re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)[0])
    given = {
        "model.pretrained": build_tiny_lm(tmp_path / "lm", max_position_embeddings=4096),
        "data.environment.init_args.data": made,
        "data.rollout.init_args.max_steps": 2,
        "data.rollout.init_args.cut_actions": "continue",
        "data.sampling.max_new_tokens": 8,
        "data.max_length": 4096,
        "evaluation.num_tasks": 2,
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": tmp_path / "run",
    }
    main(["fit", "--config", str(config), *(word for k, v in given.items() for word in (f"--{k}", str(v)))])
    (transcripts,) = (tmp_path / "run" / "transcripts").glob("iteration_*.jsonl")
    assert transcripts.read_text().count("You are in the middle of a room") >= 8
    assert "Nothing happens." in transcripts.read_text()
