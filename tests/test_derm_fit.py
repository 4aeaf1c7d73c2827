"""The dermatology task through the command line, with a tiny vision-language model and image files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from derm_parts import dialogue, llava
from lit_agentrl.cli import main
from vlm_folders import build_vlm_folder

COLOURS = {"melanoma": (40, 20, 20), "nevus": (150, 90, 60)}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> str:
    return build_vlm_folder(tmp_path_factory.mktemp("vlm"), "llava")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eight pictures of each of two classes, single-coloured but for noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label, colour in COLOURS.items():
        (root / label).mkdir()
        for number in range(8):
            pixels = np.clip(np.array(colour) + generator.integers(-15, 15, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


def source(images: Path) -> dict[str, object]:
    return {"class_path": "ClassFolders", "init_args": {"root": str(images), "select": {"test_share": 0.25}}}


def recognition(images: Path) -> dict[str, object]:
    options = {
        "source": source(images),
        "prompt": "Name it: {labels}. <{answer}>",
        "accuracy": [7, -1],
        "format_scale": 2,
    }
    return {"class_path": "RecognitionSuite", "init_args": options}


def run(folder: Path, config: dict[str, object]) -> Path:
    """Fit with the configuration, in this process."""
    config = {"seed_everything": 0, **config}
    trainer = {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": str(folder / "run"), "logger": False}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"trainer": trainer}))
    main(["fit", "--config", str(path), "--transcripts.show", "0"])
    return folder / "run"


def evaluations(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def test_recognition_is_trained_and_a_panel_evaluated(vlm, images, tmp_path):
    conversation = {"class_path": "ConversationSuite", "init_args": {"source": source(images)}}
    panel = {"recognition": recognition(images), "conversation": conversation, "num_conversation": 2}
    folder = run(
        tmp_path,
        {
            "model": {"class_path": "GRPOPlusPlusModule", "init_args": {"pretrained": vlm}},
            "data": {
                "class_path": "RolloutDataModule",
                "init_args": {
                    "environment": {"class_path": "DermatologyPanel", "init_args": panel},
                    "rollout": {"class_path": "ChainRollout", "init_args": {"max_steps": 1, "cut_actions": "continue"}},
                    "sampling": {"max_new_tokens": 6},
                    "num_prompts": 2,
                    "group_size": 2,
                    "max_length": 256,
                },
            },
            "evaluation": {"group_size": 3, "sampling": {"max_new_tokens": 6, "temperature": 1.0}},
        },
    )
    first, last = evaluations(folder)
    for record in (first, last):
        metrics = record["metrics"]
        assert metrics["accuracy"] == metrics["vote_accuracy"] == metrics["success/recognition"] == 0.0
        assert (metrics["unparsable"], metrics["macro_f1"], metrics["recall/nevus"]) == (1.0, 0.0, 0.0)
        assert (metrics["num_recognised"], metrics["num_answered"]) == (4.0, 2.0)
        assert metrics["environment/format_ok"] == 0.0
        assert metrics["success/conversation"] is None
    episodes = [
        json.loads(line) for line in (folder / "transcripts" / "iteration_000000.jsonl").read_text().splitlines()
    ]
    assert len(episodes) == 4
    for episode in episodes:
        (step,) = episode["steps"]
        (shown,) = step["images"]
        assert shown["sha256"] == hashlib.sha256(Path(shown["path"]).read_bytes()).hexdigest()
        assert step["reward"] == -1 - 0.5 * 2  # wrong and malformed
        assert episode["stop_reason"] == "done"


def test_supervised_training_on_a_mixture_with_images(vlm, images, tmp_path):
    talks = llava(
        tmp_path / "talks.json",
        [
            dialogue(str(number), f"melanoma/{number}.png", "<image>\nBad?", "Yes.", "Sure?", "Very.")
            for number in range(6)
        ],
    )
    sources = [
        {"class_path": "LlavaConversations", "init_args": {"path": talks, "image_root": str(images)}},
        {"class_path": "Walkthroughs", "init_args": {"environment": recognition(images)}},
    ]
    folder = run(
        tmp_path,
        {
            "model": {
                "class_path": "SFTModule",
                "init_args": {
                    "pretrained": vlm,
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
                },
            },
            "data": {
                "class_path": "ConversationDataModule",
                "init_args": {
                    "source": {"class_path": "Mixture", "init_args": {"sources": sources, "shares": [0.75, 0.25]}},
                    "batch_size": 4,
                    "max_length": 400,
                },
            },
        },
    )
    assert (folder / "checkpoints" / "last.ckpt").exists()
