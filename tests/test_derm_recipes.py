"""The dermatology recipes run as shipped, but for the model and the sizes; the pipelines' stages are these recipes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_agentrl.cli import main
from lit_agentrl.images import image_ref
from runs import checkpoint
from vlm_folders import build_vlm_folder

EXPERIMENTS = Path(__file__).parent.parent / "configs" / "experiment"
RECIPES = sorted(path.stem for path in EXPERIMENTS.glob("derm*.yaml"))
ROOM = {"data.max_length": 2000, "data.max_tokens": 8000}  # the tiny model's tokens are bytes
# Recipes of a GPU: one process on the CPU, small pictures, whole weights below the adapter.
ON_CPU = {"trainer.precision": "32-true", "model.dtype": "float32", "model.quantize": "none"}
PLAYED = {"data.num_prompts": 2, "data.group_size": 2, "data.sampling.max_new_tokens": 8}
PANEL = {
    "data.environment.num_recognition": 2,
    "data.environment.num_conversation": 1,
    "evaluation.sampling.max_new_tokens": 8,
}
MINED = {"mine.num_tasks": 2, "data.sampling.max_new_tokens": 8, **ROOM}
SMALL = {
    "derm_grpopp_cpu": {**PLAYED, **PANEL, **ROOM},
    "derm_sft_cpu": {"data.source": "talks", **ROOM},
    "derm_mine_cpu": MINED,
    "derm_dpo_cpu": ROOM,
    "dermiq_grpopp_qwen2.5_vl_3b": {**PLAYED, **PANEL, **ROOM, **ON_CPU, "data.resize.size": 28},
    "dermiq_sft_qwen2.5_vl_3b": {"data.source": "llava talks", **ROOM, **ON_CPU, "data.resize.size": 28},
    "dermiq_mine_qwen2.5_vl_3b": {**MINED, "trainer.precision": "32-true", "model.dtype": "float32"},
    "dermiq_dpo_qwen2.5_vl_3b": {**ROOM, **ON_CPU, "data.resize.size": 28},
}
TALKS = {
    "class_path": "LesionConversations",
    "init_args": {"lesions": {"class_path": "SyntheticLesions", "init_args": {"num_train": 7}}},
}
LLAVA_TALKS = {
    "class_path": "LlavaConversations",
    "init_args": {"path": "data/derm_talks.json", "image_root": "data/derm"},
}
LABELS = ("melanoma", "melanocytic nevus", "dermatofibroma")


@pytest.fixture(scope="module")
def vlms(tmp_path_factory) -> dict[str, str]:
    """By the recipes' first word; with room for prompts that are long in bytes."""
    folders = {}
    for word, family in (("derm", "llava_dino"), ("dermiq", "qwen2_5_vl")):
        folders[word] = build_vlm_folder(tmp_path_factory.mktemp(word) / "vlm", family)
        config = Path(folders[word]) / "config.json"
        config.write_text(
            config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096')
        )
    return folders


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder to start the command in, with the user's images, conversations and preferences in it."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0)
    for label in LABELS:
        folder = tmp_path / "data" / "derm" / label.replace(" ", "_")
        folder.mkdir(parents=True)
        for number in range(10):
            Image.fromarray(pixels.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Melanoma."}]
    talks = [{"image": f"melanoma/{number}.png", "conversations": turns} for number in range(3)]
    (tmp_path / "data" / "derm_talks.json").write_text(json.dumps(talks))
    image = image_ref(str(tmp_path / "data" / "derm" / "melanoma" / "0.png"))
    pair = {
        "prompt": [{"role": "user", "content": "What is it?"}],
        "chosen": [{"role": "assistant", "content": "Melanoma."}],
        "rejected": [{"role": "assistant", "content": "A mole, I think."}],
        "images": [{"path": image.path, "sha256": image.sha256}],
    }
    second = json.dumps(pair | {"rejected": [{"role": "assistant", "content": "No idea."}]})
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n{second}\n")
    return tmp_path


def test_every_recipe_is_run() -> None:
    assert set(SMALL) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(name: str, vlms: dict[str, str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, object] = {"model.pretrained": vlms[name.partition("_")[0]], **SMALL[name]}
    if "data.source" in given:
        given["data.source"] = json.dumps(TALKS if given["data.source"] == "talks" else LLAVA_TALKS)
    if "_dpo_" in name:
        given["data.path"] = "pairs.jsonl"
    given["trainer.default_root_dir"] = home / "run"
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    config = ["--config", str(EXPERIMENTS / f"{name}.yaml")]
    if "_mine_" in name:
        with pytest.raises(SystemExit):  # a random model's answers are no text: every candidate is counted and left out
            main(["mine-preferences", *config, *words])
        assert (
            "0 pairs of 2 candidates from 2 tasks (2 tasks gave none); left out: undecodable 2"
            in capsys.readouterr().out
        )
        return
    main(["fit", *config, *words, "--trainer.max_epochs", "1"])
    assert checkpoint(home / "run")["global_step"] >= 1
    assert (home / "run" / "export" / "model.safetensors").is_file()
    if "_grpopp_" in name:
        lines = [json.loads(line) for line in (home / "run" / "evaluation.jsonl").read_text().splitlines()]
        assert [line["num_episodes"] for line in lines] == [3, 3]
        assert all(0 <= line["metrics"]["accuracy"] <= 1 for line in lines)
