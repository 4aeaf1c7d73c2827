"""`lit-agentrl make-lesions`: the drawn lesions as files that the project's own loaders and others read."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_agentrl.cli import main
from lit_agentrl.datamodules import LesionConversations, LlavaConversations
from lit_agentrl.envs.dermatology import HAM10000, ISIC, SyntheticLesions, synthetic_command
from lit_agentrl.envs.dermatology.labels import DISEASES
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.images import ImageRef

COUNTS = {"num_train": 28, "num_val": 7, "num_test": 14}
OPTIONS = [*(f"--{name}={count}" for name, count in COUNTS.items()), "--size=48", "--difficulty=hard", "--seed=3"]
SOURCE = SyntheticLesions(**COUNTS, size=48, difficulty="hard", seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lesions") / "made"
    main(["make-lesions", str(folder), *OPTIONS])
    return folder


def test_files_hold_the_pixels_that_are_drawn(folder):
    for split in SPLITS:
        for sample in SOURCE.samples(split):
            with Image.open(folder / "images" / f"{sample.id}.png") as image:
                assert (np.asarray(image) == sample.shown()).all()
    assert len(list((folder / "images").iterdir())) == sum(COUNTS.values())


def test_the_projects_loaders_read_them(folder):
    tables = {f"{split}_metadata": str(folder / f"{split}.csv") for split in ("val", "test")}
    isic = ISIC(str(folder / "train.csv"), str(folder / "images"), **tables)
    assert set(isic.labels) == set(DISEASES)
    for split in SPLITS:
        read = {sample.id: sample.label for sample in isic.samples(split)}
        assert read == {sample.id: sample.label for sample in SOURCE.samples(split)}
    ham = HAM10000(str(folder / "train.csv"), str(folder / "images"), test_metadata=str(folder / "test.csv"))
    assert len(ham.samples("test")) == 14


def test_tables_say_that_they_are_synthetic_and_what_is_shown(folder):
    for split in SPLITS:
        with (folder / f"{split}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row, lesion in zip(rows, SOURCE.lesions(split), strict=True):
            assert row["source"] == row["dx_type"] == "synthetic"
            assert (row["age"], row["sex"], row["localization"]) == ("", "", "")
            assert row["disease"] == lesion.label
            assert tuple(row["structures"].split(", ")) == lesion.attributes.structures
            assert tuple(row["colours"].split(", ")) == lesion.attributes.colours
            assert int(row["skin_tone"]) == lesion.attributes.skin_tone
    notice = (folder / "SYNTHETIC.txt").read_text()
    assert "no patient was photographed" in notice
    assert '"seed": 3' in notice


def test_conversations_are_those_that_are_made_in_memory(folder):
    read = list(LlavaConversations(str(folder / "conversations.json")).conversations())
    made = list(LesionConversations(SOURCE).conversations())
    assert [[(o.text, o.system, answer) for o, answer in turns] for turns in read] == [
        [(o.text, o.system, answer) for o, answer in turns] for turns in made
    ]
    assert all(isinstance(turns[0][0].images[0], ImageRef) for turns in read)
    written = json.loads((folder / "conversations.json").read_text())
    assert [record["provenance"] for record in written] == [
        json.loads(json.dumps(record.provenance())) for record in LesionConversations(SOURCE).records
    ]


def test_equal_options_make_equal_files(folder, tmp_path):
    main(["make-lesions", str(tmp_path / "again"), *OPTIONS])
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (folder, tmp_path / "again")
    )
    assert first == second


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["make-lesions", str(tmp_path), *OPTIONS])
    assert end.value.code == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path, capsys):
    main(["make-lesions", str(tmp_path), "--num_train=1", "--num_val=0", "--num_test=0", "--size=32"])
    assert "1 drawn lesions" in capsys.readouterr().out
    assert (tmp_path / "images" / "synthetic-train-0.png").is_file()


def test_a_full_disk_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic_command, "write_text", full)
    with pytest.raises(SystemExit) as end:
        main(["make-lesions", str(tmp_path / "made"), *OPTIONS])
    assert end.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [("--size=8", "32 to 1024"), ("--error_rate=2", "error_rate=2.0"), ("--num_test=-1", "num_test=-1")],
)
def test_wrong_numbers_are_refused_before_anything_is_written(tmp_path, capsys, option, message):
    with pytest.raises(SystemExit) as end:
        main(["make-lesions", str(tmp_path / "made"), option])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
