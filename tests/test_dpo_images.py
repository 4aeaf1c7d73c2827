"""DPO on vision-language models: the image of a pair, its corrupted twin, and mDPO through the real forward."""

import math
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lit_agentrl.cli import main
from lit_agentrl.datamodules import PreferenceDataModule
from lit_agentrl.datamodules.pairs import EMPTY, corrupted
from lit_agentrl.datamodules.preference_file import read_preferences
from lit_agentrl.envs.dermatology import SyntheticLesions
from lit_agentrl.images import ImageRef
from lit_agentrl.methods import DPOModule
from lit_agentrl.models import PrefixGroupedModel
from lit_agentrl.models.image_reader import load_image_reader
from lit_agentrl.models.policy import Lora, load_tokenizer
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.rows import Row
from lit_agentrl.types import Observation, PreferenceBatch
from preference_parts import dpo_options, fit_pairs, mined, mining_options, pair, write_pairs
from runs import checkpoint, metrics
from test_dpo import gradients, move
from test_resume import same
from vlm_folders import build_vlm_folder

MDPO = {"sigmoid": 1.0, "image": 1.0, "anchor": 1.0}
WIDE = ("--data.max_length", "500", "--data.max_tokens", "4000")
IMAGES = ("--model.losses", '{"sigmoid": 1, "image": 1, "anchor": 1}', *WIDE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of tiny models by family."""
    root = tmp_path_factory.mktemp("vlms")
    return cache(lambda name: build_vlm_folder(root / name, name))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs about one picture, one about another, and one without."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return write_pairs(
        folder / "pairs.jsonl",
        [
            pair("Which colour?", "red and blue", "green", images=["0.png"]),
            pair("Which form?", "round", "square, I think", images=[{"path": str(folder / "0.png")}]),
            pair("Which colour?", "blue", "black", images=["1.png"]),
            pair("Is there a picture?", "no", "yes", images=[]),
        ],
    )


def batches(folder: str, data: Path, module: DPOModule) -> tuple[PreferenceDataModule, PreferenceBatch]:
    """The datamodule, and all its pairs as one batch."""
    served = PreferenceDataModule(str(data), folder, max_length=500)
    served.setup("fit")
    served._corrupt(module, 0)
    everything = list(range(len(served.pairs)))
    return served, served.batch(everything, everything, 1)


def module(folder: str, **more: Any) -> DPOModule:
    torch.manual_seed(0)
    made = DPOModule(pretrained=folder, lora=Lora(r=4, alpha=8), **more)
    made.trainer = Mock(global_step=0, accumulate_grad_batches=1, world_size=1)
    made.configure_model()
    return made


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "llava"])
def test_grouped_equals_plain_with_images(name: str, folders: Any, data: Path) -> None:
    """Prompt and picture of a pair are computed once: the same mDPO loss and gradients as row by row."""
    found = []
    for share in (True, False):
        made = module(folders(name), losses=MDPO, share_prefix=share, beta=0.5)
        move_float(made)
        _, batch = batches(folders(name), data, made)
        assert batch.rows_per_pair == 3
        found.append(gradients(made, batch))
        if isinstance(made.policy, PrefixGroupedModel):
            assert not made.policy.refusal
            assert not made.policy.image_refusal
    assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    largest = max(float(g.abs().max()) for g in found[1][1].values())
    assert largest > 1e-3
    for key, value in found[1][1].items():
        assert_close(found[0][1][key], value, rtol=1e-3, atol=1e-4 * largest)


def move_float(made: DPOModule) -> None:
    """`move`, which draws in float64, on float32 weights."""
    made.double()
    move(made)
    made.float()


def test_a_policy_that_is_its_reference_costs_three_log_two(folders: Any, data: Path) -> None:
    """Of the four pairs one has no picture, so no image term: (3 * 3 + 2) / 4 log 2."""
    made = module(folders("qwen2_5_vl"), losses=MDPO)
    _, batch = batches(folders("qwen2_5_vl"), data, made)
    loss, sums = made.objective(batch)
    assert float(loss) == pytest.approx(11 / 4 * math.log(2), rel=1e-5)
    assert float(sums["train/loss_image"]) == pytest.approx(3 * math.log(2), rel=1e-5)
    assert float(sums["train/reward_anchor"]) == pytest.approx(0, abs=1e-5)


def test_rows_of_a_pair(folders: Any, data: Path) -> None:
    """The layout is the rollouts'; the third row has the same tokens, and another picture where there is one."""
    folder = folders("qwen2_5_vl")
    served, batch = batches(folder, data, module(folder, losses=MDPO))
    image = served.preferences[0].images[0]
    reader = load_image_reader(folder)
    chat = Chat(load_tokenizer(folder), reader=reader)
    opening = chat.opening(Observation("Which colour?", "Answer with one word.", images=(image,)))
    chosen, rejected, third = served.pairs[0]
    assert chosen.token_ids == [*opening, *chat.action_ids("red and blue")]
    assert chosen.images == rejected.images == (image,)
    assert third.token_ids == chosen.token_ids
    assert third.images[0].crop is not None
    assert served.pairs[3][2] is EMPTY
    assert batch.vision is not None
    assert [len(shown) for shown in batch.vision.shown] == [1] * 9 + [0] * 3
    assert len({shown[0] for shown in batch.vision.shown[:9]}) == 5  # two pictures, and a part for each of three pairs
    assert served.iteration_metrics == {"pairs": 4.0, "too_long": 0.0, "with_images": 3.0}


def test_the_corrupted_part_by_its_size_and_seed() -> None:
    """Of RandomResizedCrop: the area is uniform between the shares, the form between 3:4 and 4:3, anywhere inside."""
    row = Row([1, 2], [False, True], [0.0, 0.0], [0.0, 0.0], images=(ImageRef("x.png", "0" * 64),))
    generator = np.random.default_rng(0)
    crops = [corrupted(row, generator, (0.01, 0.2)).images[0].crop for _ in range(2000)]
    left, top, right, bottom = np.array(crops).T
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= 1
    area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
    assert 0.01 - 1e-9 <= area.min() < 0.012
    assert 0.195 < area.max() <= 0.2 + 1e-9
    assert area.mean() == pytest.approx(0.105, abs=0.004)
    assert 0.75 - 1e-9 <= ratio.min() < 0.76
    assert 1.32 < ratio.max() <= 4 / 3 + 1e-9
    whole = [corrupted(row, np.random.default_rng(k), (1.0, 1.0)).images[0].crop for k in range(20)]
    assert all(0 <= a < c <= 1 and 0 <= b < d <= 1 for a, b, c, d in whole)
    again = corrupted(row, np.random.default_rng([3, 0, 1]), (0.01, 0.2))
    assert again == corrupted(row, np.random.default_rng([3, 0, 1]), (0.01, 0.2))
    assert again != corrupted(row, np.random.default_rng([3, 1, 1]), (0.01, 0.2))


def test_mdpo_from_the_command_line(folders: Any, data: Path, tmp_path: Path) -> None:
    """Micro-batches and a precomputed reference change nothing in an epoch; all terms are logged."""
    folder = folders("qwen2_5_vl")
    one = ("--trainer.max_epochs", "1", "--data.batch_size", "2")
    fit_pairs(folder, tmp_path / "plain", data, *IMAGES, *one, "--model.share_prefix", "false")
    other = ("--model.precompute", "true", "--data.max_tokens", "500", "--model.share_prefix", "true")
    fit_pairs(folder, tmp_path / "other", data, *IMAGES, *one, *other)
    first, second = (checkpoint(tmp_path / name)["state_dict"] for name in ("plain", "other"))
    for name, value in first.items():
        assert_close(second[name], value, rtol=5e-3, atol=1e-4)
    assert max(float(v.abs().max()) for k, v in first.items() if "lora_B" in k) > 2e-3
    (logged,) = [row for row in metrics(tmp_path / "plain") if row.get("train/loss")]
    for name in ("loss_sigmoid", "loss_image", "loss_anchor", "reward_corrupted", "image_accuracy", "reward_anchor"):
        assert math.isfinite(float(logged[f"train/{name}"]))


def test_images_resume_exactly(folders: Any, data: Path, tmp_path: Path) -> None:
    """The parts that are drawn depend on seed, epoch and pair alone."""
    folder = folders("qwen2_5_vl")
    whole = fit_pairs(folder, tmp_path / "whole", data, *IMAGES)
    fit_pairs(folder, tmp_path / "part", data, *IMAGES, "--trainer.max_epochs=1")
    resumed = fit_pairs(folder, tmp_path / "part", data, *IMAGES, "--ckpt_path=last")
    assert same(whole["state_dict"], resumed["state_dict"])


def test_what_cannot_be_shown_is_refused(
    folders: Any, data: Path, tiny_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures for a model of text; the image term without pictures; a part of no size."""
    text = write_pairs(tmp_path / "text.jsonl", [pair("Say it.", "yes", "no")])
    for words, message in (
        (dpo_options(tiny_lm, tmp_path / "a", data, *WIDE), "image"),
        (dpo_options(folders("qwen2_5_vl"), tmp_path / "b", text, *IMAGES), "has no images"),
        (dpo_options(tiny_lm, tmp_path / "c", text, "--data.crop", "[0, 0.2]"), "crop=[0.0, 0.2]"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


SPEAKER = (
    "--data.engine",
    "preference_parts.Speaker",
    "--data.canary",
    "null",
    "--data.rollout",
    "ChainRollout",
    "--data.group_size",
    "2",
)
LESIONS = (
    '{"class_path": "SyntheticQuestions", "init_args": {"lesions": {"class_path": "SyntheticLesions", '
    '"init_args": {"num_train": 7, "num_val": 7, "num_test": 7, "size": 32}}}}'
)


def test_pictures_that_were_drawn_are_written_beside_the_pairs(
    folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lesions exist as pixels only: each is one PNG by its hash, and the folder can be moved as a whole."""
    run = tmp_path / "mined"
    suite = ("--data.environment", "ConversationSuite", "--data.environment.source", LESIONS)
    # The tiny model has 512 positions, a byte each: one fact has room.
    short = ("--data.sampling.max_new_tokens", "8", "--data.max_length", "500", "--data.max_tokens", "500")
    lax = ("--mine.filters.length_ratio", "[0, 100]", "--mine.filters.min_gap", "0.001")
    words = mining_options(folders("llava"), run, *suite, *SPEAKER, *short, *lax)
    main([*words, "--mine.miner", "RagVsPlain", "--mine.miner.top", "1", "--mine.num_tasks", "7"])
    records = mined(run)
    assert records, capsys.readouterr().out
    named = {record["images"][0]["path"] for record in records}
    assert named == {f"images/{path.name}" for path in (run / "images").iterdir()}
    (run).rename(tmp_path / "moved")
    moved = read_preferences(tmp_path / "moved" / "preferences.jsonl")
    for preference, record in zip(moved, records, strict=True):
        assert preference.images[0].sha256 == record["images"][0]["sha256"]
        assert record["chosen"][0]["content"].startswith(f"This is {label_of(record)}.")
    fit_pairs(folders("llava"), tmp_path / "dpo", tmp_path / "moved" / "preferences.jsonl", *IMAGES)


def label_of(record: dict[str, Any]) -> str:
    """What the lesion of a mined pair is."""
    lesions = SyntheticLesions(num_train=7, num_val=7, num_test=7, size=32)
    by_id = {sample.id: sample.label for sample in lesions.samples("train")}
    return next(label for id, label in by_id.items() if id in record["provenance"]["task"])
