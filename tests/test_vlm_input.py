"""What users have on their disks, through the commands: broken, odd and huge images, labels, pairs and graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from derm_parts import write_csv
from knowledge_parts import small_graph
from lit_agentrl.cli import main
from preference_parts import dpo_options, pair, write_pairs
from runs import metrics, start
from vlm_fits import noise
from vlm_folders import build_vlm_folder

Options = dict[str, Any]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_vlm_folder(tmp_path_factory.mktemp("vlm"), "llava")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of each of two classes, and two more held out."""
    root = tmp_path_factory.mktemp("images")
    for label in ("melanoma", "nevus"):
        for split, count in (("train", 3), ("test", 2)):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(noise((label, split, number))).save(root / split / label / f"{number}.png")
    return root


@pytest.fixture
def images(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "images"))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens, it happens before a model is loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("lit_agentrl.methods.language.load_policy", load)


Refused = Callable[[list[str]], str]


@pytest.fixture
def refused(no_model: None, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must end with exit code 2 before a model is loaded; gives what it said, one line."""

    def run(words: list[str]) -> str:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return run


def folders(root: Path, **select: Any) -> Options:
    return {"class_path": "ClassFolders", "init_args": {"root": str(root), "select": {"val_share": 0.0, **select}}}


def recognition(source: Options) -> Options:
    return {
        "class_path": "RecognitionSuite",
        "init_args": {"source": source, "prompt": "Name it: {labels}. <{answer}>"},
    }


def command(folder: Path, vlm: str, environment: Options, name: str = "fit", **more: Any) -> list[str]:
    """A command that plays; a fit of one iteration with a short evaluation."""
    config: Options = {
        "model": {"class_path": "GRPOPlusPlusModule", "init_args": {"pretrained": vlm}},
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "environment": environment,
                "rollout": {"class_path": "ChainRollout", "init_args": {"max_steps": 1, "cut_actions": "continue"}},
                "rewards": [{"function": "runs.mean_token"}],
                "sampling": {"max_new_tokens": 3},
                **{"num_prompts": 6, "group_size": 2, "max_length": 256},
            },
        },
        "trainer": {"accelerator": "cpu", "default_root_dir": str(folder / "run")},
    }
    if name == "fit":
        config["trainer"]["max_epochs"] = 1
    if name != "mine-preferences":
        config |= {"evaluation": {"sampling": {"max_new_tokens": 3}}, "transcripts": {"show": 0}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | more))
    return [name, "--config", str(path)]


def supervised(folder: Path, vlm: str, source: Options) -> list[str]:
    """A fit on conversations."""
    config = {
        "model": {"class_path": "SFTModule", "init_args": {"pretrained": vlm}},
        "data": {"class_path": "ConversationDataModule", "init_args": {"source": source}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(folder / "run")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(folder / "config.yaml")]


def episodes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "transcripts" / "iteration_000000.jsonl").open()]


def logged(folder: Path, name: str) -> float:
    return next(float(row[name]) for row in metrics(folder / "run") if row.get(name))


# --- images -----------------------------------------------------------------------------------------------------------


def spoil(images: Path) -> tuple[Path, Path]:
    """One file cut, as an interrupted download leaves it, and one of 0 bytes."""
    cut, empty = images / "train" / "melanoma" / "0.png", images / "train" / "nevus" / "2.png"
    cut.write_bytes(cut.read_bytes()[:300])
    empty.write_bytes(b"")
    return cut, empty


def test_a_broken_image_fails_its_episodes_and_training_goes_on(vlm, images, tmp_path, caplog):
    """Six tasks, two of them broken: their episodes are counted, named and not trained, the others are."""
    broken = spoil(images)
    main(command(tmp_path, vlm, recognition(folders(images))))
    failed = [episode for episode in episodes(tmp_path) if episode["stop_reason"] == "env_error"]
    assert len(episodes(tmp_path)) == 12
    assert len(failed) == logged(tmp_path, "failed") == logged(tmp_path, "stop/env_error") == 4
    assert logged(tmp_path, "rows") == 8
    for path, fault in zip(broken, ("is damaged", "is empty (0 bytes)"), strict=True):
        named = [episode for episode in failed if f"{path} {fault}" in episode["error"]]
        assert len(named) == 2
        assert all(episode["steps"] == [] for episode in named)
        assert len([r for r in caplog.records if str(path) in r.getMessage()]) == 1  # once, not once an episode
    evaluated = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").open()]
    assert [record["metrics"]["failed"] for record in evaluated] == [0.0, 0.0]


def test_a_broken_image_of_the_panel_is_counted_there(vlm, images, tmp_path):
    (images / "test" / "nevus" / "1.png").write_text("<html>404 Not Found</html>")
    main(command(tmp_path, vlm, recognition(folders(images)), "evaluate"))
    (record,) = (json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").open())
    assert (record["metrics"]["failed"], record["metrics"]["num_recognised"]) == (1.0, 3.0)


@pytest.mark.parametrize("name", ["fit", "evaluate", "mine-preferences"])
def test_broken_images_are_found_at_the_start_where_asked_for(name, vlm, images, tmp_path, refused):
    cut, empty = spoil(images)
    mine = {"mine": {"miner": {"class_path": "BestOfK", "init_args": {"by": "reward"}}}} if name[0] == "m" else {}
    text = refused(command(tmp_path, vlm, recognition(folders(images, unreadable="refuse")), name, **mine))
    assert f"2 of 10 images cannot be read: {cut}, {empty}." in text
    assert "is damaged (PNG, 20 x 20)" in text
    assert "unreadable=drop" in text


def test_broken_images_are_left_out_where_asked_for(vlm, images, tmp_path, caplog):
    cut, empty = spoil(images)
    main(command(tmp_path, vlm, recognition(folders(images, unreadable="drop"))))
    assert logged(tmp_path, "failed") == 0
    shown = {step["images"][0]["path"] for episode in episodes(tmp_path) for step in episode["steps"]}
    assert len(shown) == 4
    assert not {str(cut), str(empty)} & shown
    assert "left out: 2 that cannot be read" in caplog.text
    assert str(cut) in caplog.text


def ham(root: Path) -> Options:
    """HAM10000 with two of its classes, as its csv writes them."""
    rows = []
    for code in ("mel", "nv"):
        for number in range(4):
            name = f"ISIC_{code}_{number}"
            Image.fromarray(noise(name)).save(root / f"{name}.jpg")
            rows.append({"lesion_id": f"HAM_{code}_{number}", "image_id": name, "dx": code})
    return {"metadata": write_csv(root / "metadata.csv", rows), "images": str(root)}


def test_broken_images_of_a_table(vlm, tmp_path, refused):
    options = ham(tmp_path)
    (tmp_path / "ISIC_nv_3.jpg").write_bytes(b"")
    select = {"labels": ["melanoma", "melanocytic nevus"], "test_share": 0.25, "unreadable": "refuse"}
    source = {"class_path": "HAM10000", "init_args": {**options, "select": select}}
    text = refused(command(tmp_path, vlm, recognition(source)))
    assert (
        f"1 of 8 images cannot be read: {tmp_path}/ISIC_nv_3.jpg. The image {tmp_path}/ISIC_nv_3.jpg is empty" in text
    )


def test_all_images_broken(vlm, tmp_path, refused):
    """Nothing is left to leave out."""
    for label in ("melanoma", "nevus"):
        (tmp_path / "images" / label).mkdir(parents=True)
        (tmp_path / "images" / label / "0.png").write_bytes(b"")
    for choice in ("refuse", "drop"):
        text = refused(command(tmp_path, vlm, recognition(folders(tmp_path / "images", unreadable=choice))))
        assert "2 of 2 images cannot be read" in text


def test_all_images_broken_and_nobody_looked(vlm, tmp_path, capfd):
    """As large-file storage leaves files that were not asked for: training that trains nothing ends at once."""
    for label in ("melanoma", "nevus"):
        for number in range(3):
            file = tmp_path / "images" / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(SystemExit) as end:
        main(command(tmp_path, vlm, recognition(folders(tmp_path / "images", test_share=0.3))))
    assert end.value.code == 2
    text = capfd.readouterr().err
    assert "All 12 episodes of the first iteration failed" in text
    assert "is no image that can be read: it starts with b'version '" in text


def test_supervised_training_names_a_broken_image_before_a_model_is_loaded(vlm, images, tmp_path, refused):
    cut, empty = spoil(images)
    empty.unlink()
    source = {"class_path": "Walkthroughs", "init_args": {"environment": recognition(folders(images))}}
    assert f"The image {cut} is damaged" in refused(supervised(tmp_path, vlm, source))


def odd_images(root: Path) -> None:
    """Four pictures as they come from scanners, printers, web pages and phones."""
    pixels = Image.fromarray(noise("odd"))
    (root / "train" / "odd").mkdir()
    pixels.convert("CMYK").save(root / "train" / "odd" / "cmyk.jpg")
    deep = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    Image.fromarray(deep).save(root / "train" / "odd" / "deep.png")
    glass = pixels.convert("RGBA")
    glass.putalpha(100)
    glass.save(root / "train" / "odd" / "glass.png")
    more = [Image.fromarray(noise(number)) for number in range(2)]
    pixels.save(root / "train" / "odd" / "moving.gif", save_all=True, append_images=more)


def test_odd_images_are_trained_on(vlm, images, tmp_path, caplog):
    """CMYK, 16 bits, alpha, several frames: none fails, and what was put right is said once."""
    odd_images(images)
    for label in ("melanoma", "nevus"):
        shutil.rmtree(images / "train" / label)
        (images / "train" / label).mkdir()
        Image.fromarray(noise(label)).save(images / "train" / label / "0.png")
    main(command(tmp_path, vlm, recognition(folders(images, unreadable="refuse"))))
    shown = {Path(step["images"][0]["path"]).name for episode in episodes(tmp_path) for step in episode["steps"]}
    assert shown == {"cmyk.jpg", "deep.png", "glass.png", "moving.gif", "0.png"}
    assert logged(tmp_path, "failed") == 0
    assert logged(tmp_path, "rows") == 12
    assert "moving.gif has several frames: the first is taken" in caplog.text


def enlarge(images: Path) -> Path:
    """A real file of 200 million pixels, 25 kB small."""
    huge = images / "train" / "nevus" / "0.png"
    Image.new("1", (20_000, 10_000)).save(huge)
    return huge


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_200_million_pixels(vlm, images, tmp_path, refused):
    huge = enlarge(images)
    text = refused(command(tmp_path, vlm, recognition(folders(images, unreadable="refuse"))))
    assert f"1 of 10 images cannot be read: {huge}." in text
    assert "200000000 pixels" in text or "200.0 million pixels" in text
    assert "Shrink it" in text


@pytest.mark.slow
def test_an_image_of_200_million_pixels_takes_no_memory(vlm, images, tmp_path):
    """Real runs with it and without: the largest process of the first is no larger, 600 MB would be seen."""
    found = []
    for name in ("with", "without"):
        if name == "with":
            huge = enlarge(images)
        else:
            Image.fromarray(noise(0)).save(huge)
        (tmp_path / name).mkdir()
        process = start(command(tmp_path / name, vlm, recognition(folders(images))))
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        assert ("Shrink it" in output) == (name == "with")
        found.append(
            max(float(row["memory/peak_gib"]) for row in metrics(tmp_path / name / "run") if row["memory/peak_gib"])
        )
    assert found[0] < found[1] + 0.1


# --- labels and pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fit", "evaluate"])
def test_a_label_that_is_not_in_the_list(name, vlm, images, tmp_path, refused):
    select = {"labels": ["melanoma", "psoriasis"]}
    text = refused(command(tmp_path, vlm, recognition(folders(images, **select)), name))
    assert "labels that are not among melanoma, psoriasis: nevus (5)" in text
    assert "other_labels=drop" in text


@pytest.mark.parametrize("name", ["fit", "evaluate"])
def test_a_class_without_images(name, vlm, images, tmp_path, refused):
    (images / "train" / "psoriasis").mkdir()
    text = refused(command(tmp_path, vlm, recognition(folders(images)), name))
    assert "there is no image of psoriasis" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "pairs.jsonl:2: the field 'rejected' is missing"),
        ({"rejected": [{"role": "assistant", "content": "figo "}]}, "pairs.jsonl:2: chosen and rejected are the same"),
        ({"images": ["lost.png"]}, "pairs.jsonl:2: there is no image"),
        ({"images": ["empty.png"]}, "pairs.jsonl:2: The image"),
    ],
)
def test_a_pair_that_is_none(change, message, vlm, tmp_path, refused):
    (tmp_path / "empty.png").write_bytes(b"")
    second = {k: v for k, v in (pair("Say: figo", "figo", "ogif") | change).items() if v is not None}
    data = write_pairs(tmp_path / "pairs.jsonl", [pair("Say: bade", "bade", "edab"), second])
    assert message in refused(dpo_options(vlm, tmp_path / "run", data))


def test_a_pair_whose_image_is_damaged(vlm, images, tmp_path, refused):
    """Found when rows are made, before a model is loaded."""
    cut, _ = spoil(images)
    pairs = [pair("Say: bade", "bade", "edab", images=[str(cut)])]
    assert f"The image {cut} is damaged" in refused(
        dpo_options(vlm, tmp_path / "run", write_pairs(tmp_path / "p", pairs))
    )


# --- knowledge --------------------------------------------------------------------------------------------------------


def poor_graph(folder: Path) -> str:
    """A graph that knows no disease of the skin."""
    small_graph().save(str(folder / "kg.graphml"))
    return str(folder / "kg.graphml")


@pytest.mark.parametrize("name", ["fit", "evaluate"])
def test_a_graph_without_the_disease_for_the_panel(name, vlm, images, tmp_path, refused):
    small_graph().save(str(tmp_path / "kg.graphml"))
    talk = {
        "source": folders(images),
        "facts": {"class_path": "GraphFacts", "init_args": {"graph": str(tmp_path / "kg.graphml")}},
    }
    panel = {
        "recognition": recognition(folders(images)),
        "conversation": {"class_path": "ConversationSuite", "init_args": talk},
    }
    text = refused(command(tmp_path, vlm, {"class_path": "DermatologyPanel", "init_args": panel}, name))
    assert "has no facts about melanoma, nevus" in text


@pytest.mark.parametrize("miner", ["RagVsPlain", "CorruptFact", "BestOfK"])
def test_a_graph_without_the_disease_for_mining(miner, vlm, images, tmp_path, refused):
    mine = {"mine": {"miner": {"class_path": miner, "init_args": {"graph": poor_graph(tmp_path)}}}}
    talk = {"class_path": "ConversationSuite", "init_args": {"source": folders(images)}}
    text = refused(command(tmp_path, vlm, talk, "mine-preferences", **mine))
    assert f"({tmp_path}/kg.graphml) has no facts about melanoma, nevus" in text
    assert "build-kg" in text


def test_a_graph_without_the_disease_for_conversations(vlm, tmp_path, refused):
    small_graph().save(str(tmp_path / "kg.graphml"))
    lesions = {"class_path": "SyntheticLesions", "init_args": {"num_train": 7}}
    talks = {
        "class_path": "LesionConversations",
        "init_args": {"lesions": lesions, "graph": str(tmp_path / "kg.graphml")},
    }
    config = {
        "model": {"class_path": "SFTModule", "init_args": {"pretrained": vlm}},
        "data": {"class_path": "ConversationDataModule", "init_args": {"source": talks}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "actinic keratosis" in refused(["fit", "--config", str(tmp_path / "config.yaml")])
