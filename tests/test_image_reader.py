"""Our prompts with images are those of each family's own processor, token by token and pixel by pixel."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image as pil

from lit_agentrl.errors import UserError
from lit_agentrl.images import Image, Resize, image_ref
from lit_agentrl.models.image_reader import HFImageReader, load_image_reader
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel
from lit_agentrl.models.vision import VisionInputs
from lit_agentrl.rollouts.chat import Chat
from lit_agentrl.types import Observation
from tiny import build_tiny_lm
from vlm_folders import FAMILIES, TRAINABLE, build_vlm_folder, own_processor, vlm_config, vlm_tokenizer

SIZES = ((40, 60), (20, 20), (50, 16), (7, 30))  # height, width: one tile and several, wide and tall


def noise(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders by family, each built when it is first asked for."""
    root = tmp_path_factory.mktemp("vlms")
    return cache(lambda name: build_vlm_folder(root / name, name))


def reader_of(name: str, **options: Any) -> HFImageReader:
    return HFImageReader(vlm_config(name), vlm_tokenizer(name), FAMILIES[name].image_processor(), **options)


def processed(name: str, messages: list[dict[str, Any]], images: list[np.ndarray]) -> Any:
    """What the family's own processor makes of a conversation."""
    processor = own_processor(name)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [pil.fromarray(image) for image in images]
    return processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt")


def message(role: str, text: str, num_images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


# --- the same tokens and pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num_images", [1, 4])
def test_prompts_are_those_of_the_family_s_own_processor(name, num_images):
    images = [noise(k, *SIZES[k]) for k in range(num_images)]
    chat = Chat(vlm_tokenizer(name), reader=reader_of(name))
    found = chat.opening(Observation("What is it?\n\nSay.", "Be brief.", images=tuple(images)))
    expected = processed(
        name, [message("system", "Be brief."), message("user", "What is it?\n\nSay.", num_images)], images
    )
    assert found == expected["input_ids"][0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_later_turns_are_those_of_the_family_s_own_processor(name):
    """Turns with no, one and two images, appended to what the policy saw and said."""
    images = [noise(k, *SIZES[k]) for k in range(4)]
    chat = Chat(vlm_tokenizer(name), reader=reader_of(name))
    turns = [("Look.", images[:1]), ("And now?", images[1:3]), ("In words?", []), ("Last.", images[3:])]
    context: list[int] = []
    messages = []
    for k, (text, shown) in enumerate(turns):
        observation = Observation(text, images=tuple(shown))
        if k == 0:
            context = chat.opening(observation)
        else:
            context = chat.next_context(context, chat.action_ids(f"Answer {k}."), observation)
            messages.append(message("assistant", f"Answer {k}."))
        messages.append(message("user", text, len(shown)))
    assert context == processed(name, messages, images)["input_ids"][0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_family_s_own_processor(name, size):
    image = noise(0, *size)
    expected = processed(name, [message("user", "What?", 1)], [image])
    picture = reader_of(name).read(image)
    assert set(picture.pixels) == {name for name in expected if "pixel" in name or "grid" in name}
    for key, value in picture.pixels.items():
        assert torch.equal(value, expected[key].reshape(value.shape))


@pytest.mark.parametrize("name", TRAINABLE)
def test_scores_are_those_of_the_model_on_its_own_processor_s_inputs(name, folders):
    """From image to log-probability, by our way and by theirs; shared prefixes too."""
    images = [noise(0), noise(1, 20, 20)]
    vlm = tf.AutoModelForImageTextToText.from_pretrained(folders(name), dtype=torch.float64)
    theirs = processed(name, [message("user", "Which?", 2)], images)
    prompt = theirs["input_ids"][0]
    answers = torch.tensor([[50, 60, 70], [50, 61, 71]])
    token_ids = torch.cat([prompt.expand(2, -1), answers], 1)
    lengths = torch.full((2,), token_ids.shape[1])
    theirs["mm_token_type_ids"] = (token_ids[:1] == vlm.config.image_token_id).int()
    inputs = {key: value for key, value in theirs.items() if key not in ("input_ids", "attention_mask")}
    if "qwen" not in name:
        del inputs["mm_token_type_ids"]
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    vision = reader_of(name).inputs([images, images], token_ids, lengths)
    assert isinstance(vision, VisionInputs)
    assert vision.shown == [[0, 1], [0, 1]]
    targets = torch.zeros(token_ids.shape, dtype=torch.bool)
    targets[:, -3:] = True
    for b in range(2):
        with torch.no_grad():
            logits = vlm(input_ids=token_ids[b : b + 1], **inputs).logits[0]
        expected = logits.log_softmax(-1)[-4:-1].gather(1, answers[b, :, None])[:, 0]
        for model in (PaddedModel(vlm), PrefixGroupedModel(vlm, min_reuse=1.0)):
            found = model(token_ids, lengths, targets=targets, vision=vision).logprobs
            torch.testing.assert_close(found[b, -3:], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("crops", [0, 2])
def test_gemma_3_says_what_its_crops_are(crops):
    """Pan and scan: an image and crops of it, in the words that the model was trained with."""
    processor = tf.Gemma3ImageProcessorPil(
        size={"height": 16, "width": 16},
        do_pan_and_scan=bool(crops),
        pan_and_scan_min_crop_size=10,
        pan_and_scan_max_num_crops=2,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    reader = HFImageReader(vlm_config("gemma3"), vlm_tokenizer("gemma3"), processor)
    one = "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
    expected = one
    if crops:
        expected = f"Here is the original image {one} and here are some crops to help you see better {one} {one}"
    assert reader.read(noise(0, 20, 40)).text == expected


# --- reading once -----------------------------------------------------------------------------------------------------


class Counting:
    """An image processor that counts its calls, and waits for as many threads as it is told to."""

    def __init__(self, name: str) -> None:
        self.inner, self.calls, self.gate = FAMILIES[name].image_processor(), 0, threading.Event()
        self.gate.set()

    def __call__(self, picture: pil.Image, **options: Any) -> Any:
        self.calls += 1
        self.gate.wait(10)
        return self.inner(picture, **options)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.inner.to_dict())


def counting_reader(**options: Any) -> tuple[HFImageReader, Counting]:
    processor = Counting("llava")
    return HFImageReader(vlm_config("llava"), vlm_tokenizer("llava"), processor, **options), processor


def test_an_image_is_read_once_wherever_it_comes_from(tmp_path):
    reader, processor = counting_reader()
    for name in ("a.png", "b.png"):
        pil.fromarray(noise(0)).save(tmp_path / name)
    first = reader.read(image_ref(tmp_path / "a.png"))
    (tmp_path / "a.png").unlink()  # not looked at again
    assert reader.read(image_ref(tmp_path / "b.png")) is first
    assert processor.calls == 1
    assert reader.read(noise(0)).key != first.key  # content is bytes of a file, or pixels
    assert processor.calls == 2


def test_pictures_used_longest_ago_go_first():
    """Room for two pictures of 3 x 16 x 16 floats."""
    size = 3 * 16 * 16 * 4
    reader, processor = counting_reader(cache_bytes=2 * size)
    for seed in (0, 1, 0, 2, 0):  # 2 drives out 1, as 0 was used since
        reader.read(noise(seed))
    assert processor.calls == 3
    reader.read(noise(1))
    assert processor.calls == 4
    assert reader.cached_bytes == 2 * size


def test_a_picture_above_the_whole_limit_is_given_and_not_kept():
    reader, processor = counting_reader(cache_bytes=1000)
    for _ in range(2):
        assert reader.read(noise(0)).pixels["pixel_values"].shape == (1, 3, 16, 16)
    assert (processor.calls, reader.cached_bytes) == (2, 0)


def test_threads_that_want_one_picture_share_the_work():
    reader, processor = counting_reader()
    processor.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(reader.read, noise(seed)) for seed in (0, 1) for _ in range(4)]
        processor.gate.set()
        pictures = [future.result() for future in futures]
    assert processor.calls == 2
    assert len({id(picture) for picture in pictures}) == 2


def test_a_failure_reaches_every_thread_and_is_not_remembered(tmp_path):
    reader, processor = counting_reader()
    pil.fromarray(noise(0)).save(tmp_path / "a.png")
    ref, whole = image_ref(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:100])
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(reader.read, ref) for _ in range(4)]:
            with pytest.raises(UserError, match="not the one it was"):
                future.result()
    (tmp_path / "a.png").write_bytes(whole)
    assert reader.read(ref).pixels
    assert processor.calls == 1


def test_keys_depend_on_content_and_processing_alone():
    keys = [
        reader.read(image).key
        for reader in (
            reader_of("llava"),
            reader_of("llava", resize=Resize("squash", 8)),
            reader_of("llava", resize=Resize("squash", 9)),
            HFImageReader(vlm_config("llava"), vlm_tokenizer("llava"), tf.CLIPImageProcessorPil(crop_size=16)),
        )
        for image in (noise(0), noise(1))
    ]
    assert len(set(keys)) == 8
    assert all(0 <= key < 2**63 for key in keys)
    assert keys[:2] == [reader_of("llava", cache_bytes=0).read(noise(seed)).key for seed in (0, 1)]


# --- rows and sizes ---------------------------------------------------------------------------------------------------


def test_rows_show_each_image_once():
    reader = reader_of("qwen2_5_vl")
    chat = Chat(vlm_tokenizer("qwen2_5_vl"), reader=reader)
    shown: list[list[Image]] = [[noise(0), noise(1)], [], [noise(1)]]
    rows = [chat.opening(Observation("What?", images=tuple(images))) for images in shown]
    lengths = torch.tensor([len(row) for row in rows])
    token_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    vision = reader.inputs(shown, token_ids, lengths)
    assert vision is not None
    assert vision.shown == [[0, 1], [], [1]]
    assert vision.content_ids == [reader.read(noise(0)).key, reader.read(noise(1)).key]
    assert reader.inputs([[], [], []], token_ids, lengths) is None
    with pytest.raises(UserError, match="Row 2 shows 0 images"):
        reader.inputs([shown[0], [], []], token_ids, lengths)


def test_resizing_decides_what_an_image_costs():
    """Qwen2.5-VL: one token for 8 x 8 pixels here, of as many as the picture has, up to 1024 of them."""
    tokens = [
        reader_of("qwen2_5_vl", resize=resize).read(noise(0, 240, 320)).text.count("<|image_pad|>")
        for resize in (None, Resize("squash", 16), Resize("fit", max_pixels=400), Resize("pad", 24))
    ]
    assert tokens == [3 * 4, 2 * 2, 2 * 3, 3 * 3]  # 24 x 32; 16 x 16; 17 x 23, rounded to 16 x 24; 24 x 24


def test_what_the_processor_refuses_is_told_by_name(tmp_path):
    pil.fromarray(noise(0, 2, 500)).save(tmp_path / "line.png")
    with pytest.raises(UserError, match=r"refuses the image .*line.png, 500 x 2: absolute aspect ratio"):
        reader_of("qwen3_vl").read(image_ref(tmp_path / "line.png"))
    with pytest.raises(UserError, match=r"refuses an array \[2, 500, 3\]"):
        reader_of("qwen3_vl").read(noise(0, 2, 500))
    with pytest.raises(UserError, match=r"the limit is 0\.001 million"):
        reader_of("qwen3_vl", resize=Resize(refuse_above=1000)).read(noise(0))


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_its_reader(name, folders):
    reader = load_image_reader(folders(name), Resize("squash", 32))
    assert reader is not None
    assert reader.read(noise(0)).key == reader_of(name, resize=Resize("squash", 32)).read(noise(0)).key
    assert reader.placeholder in vlm_tokenizer(name).chat_template


def test_a_text_model_has_none(tiny_lm):
    assert load_image_reader(tiny_lm) is None


def test_an_unknown_family_has_none_and_is_named(tmp_path, caplog):
    build_tiny_lm(tmp_path)
    tf.PaliGemmaConfig(
        text_config={"model_type": "gemma", "vocab_size": 300}, vision_config={"model_type": "siglip_vision_model"}
    ).save_pretrained(tmp_path)
    assert load_image_reader(str(tmp_path)) is None
    assert "'paligemma' are not supported: qwen2_vl" in caplog.text


def test_a_folder_without_image_processor_is_refused(tmp_path):
    folder = Path(build_vlm_folder(tmp_path / "vlm", "llava"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"image processor cannot be loaded.*preprocessor_config.json"):
        load_image_reader(str(folder))
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="image processor cannot be loaded"):
        load_image_reader(str(folder))


def test_a_tokenizer_without_the_placeholder_is_refused():
    config = vlm_config("llava")
    tokenizer = vlm_tokenizer("llava")
    letter = tokenizer.convert_tokens_to_ids("Ġ")  # a space as the vocabulary writes it: the letter is another token
    for token, message in ((5000, "no special token 5000, which"), (letter, rf"no special token {letter}, .*'Ġ'")):
        config.image_token_id = token
        with pytest.raises(UserError, match=message):
            HFImageReader(config, tokenizer, FAMILIES["llava"].image_processor())


def test_towers_whose_features_are_not_known_are_refused():
    config = tf.LlavaConfig(vision_config={"model_type": "vit"}, text_config={"model_type": "llama"})
    config.image_token_id = vlm_config("llava").image_token_id
    reader = HFImageReader(config, vlm_tokenizer("llava"), FAMILIES["llava"].image_processor())
    with pytest.raises(UserError, match="'vit' tower: supported are clip_vision_model, dinov2"):
        reader.read(noise(0))
