"""The engine shows images to the policy: the tokens are the model's own, whatever is shared, cut, kept or forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lit_agentrl.errors import UserError
from lit_agentrl.images import Image, ImageRef, Picture
from lit_agentrl.models import PaddedModel, VisionInputs, content_id
from lit_agentrl.models.image_reader import HFImageReader
from lit_agentrl.models.lm_parts import base_lm
from lit_agentrl.rollouts.driver import CausalDriver, UndrivableModelError
from lit_agentrl.rollouts.hf import HFEngine
from lit_agentrl.rollouts.sampling import sample_tokens
from lit_agentrl.types import Completion, SamplingParams
from tiny_vlm import CONFIGS, IMAGE, ONE_SIZE, build_vlm, picture, placeholders, text
from vlm_folders import FAMILIES, vlm_config, vlm_tokenizer

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TILED = ("smolvlm", "idefics3")
SAMPLED = SamplingParams(temperature=0.9, max_new_tokens=8)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=num_tokens)


@cache
def model_of(name: str) -> tf.PreTrainedModel:
    """Made once for the whole file: no test changes it."""
    return build_vlm(name).eval()


def drawn(seed: int, *, large: bool = False) -> np.ndarray:
    """An image whose picture is `picture(name, seed)`; a large one has more patches or tiles where possible."""
    return np.full((1, 1, 3), seed + 100 * large, dtype=np.uint8)


class FakeReader:
    """Gives the pictures of tiny_vlm for `drawn` arrays, and for files that are called like their seed."""

    placeholder = "<image>"
    image_token_id = IMAGE

    def __init__(self, name: str) -> None:
        self.name = name
        self.reads: list[int] = []

    def read(self, image: Image) -> Picture:
        code = int(image.path) if isinstance(image, ImageRef) else int(image[0, 0, 0])
        self.reads.append(code)
        is_large = code >= 100 and self.name not in ONE_SIZE
        pixels = picture(self.name, code % 100, **({"size": (6, 4), "tiles": 2} if is_large else {}))
        return Picture(content_id(pixels), "", pixels)

    def inputs(self, images: object, token_ids: Tensor, lengths: Tensor) -> None:
        raise AssertionError("the engine has no rows")


class Shown:
    """Contexts [B] made of words and images, as the engine takes them."""

    def __init__(self, name: str, *rows: Sequence[list[int] | np.ndarray | ImageRef]) -> None:
        config, reader = base_lm(model_of(name)).config, FakeReader(name)
        self.name = name
        self.images = [[piece for piece in row if not isinstance(piece, list)] for row in rows]
        self.pixels = [[dict(reader.read(image).pixels) for image in row] for row in self.images]
        self.contexts: list[list[int]] = []
        for row, pixels in zip(rows, self.pixels, strict=True):
            rest = iter(pixels)
            pieces = (piece if isinstance(piece, list) else placeholders(config, next(rest)) for piece in row)
            self.contexts.append([token for piece in pieces for token in piece])

    def by(self, engine: HFEngine, params: SamplingParams, seeds: Sequence[int] | None = None) -> list[Completion]:
        return engine.generate(self.contexts, params, seeds, self.images)

    def own_logits(self, lm: nn.Module, b: int, action: Sequence[int]) -> Tensor:
        """[V, len(action) + 1]: by the model's own forward from pixels, after the context and after each token."""
        row = torch.tensor([[*self.contexts[b], *action]])
        inputs: dict[str, Tensor] = {}
        for key in self.pixels[b][0] if self.pixels[b] else ():
            inputs[key] = torch.cat([image[key] for image in self.pixels[b]], int(self.name in TILED))
        if self.name in GRIDS:
            inputs["mm_token_type_ids"] = (row == IMAGE).int()
        if self.name == "gemma3":
            inputs["token_type_ids"] = (row == IMAGE).long()
        with torch.no_grad():
            return lm(input_ids=row, **inputs, use_cache=False).logits[0, len(self.contexts[b]) - 1 :]

    def own_greedy(self, lm: nn.Module, b: int, num_tokens: int) -> tuple[list[int], list[float]]:
        """The slow obvious twin: the whole sequence from pixels for every token."""
        tokens: list[int] = []
        logprobs: list[float] = []
        for _ in range(num_tokens):
            logp = self.own_logits(lm, b, tokens)[-1].log_softmax(-1)
            tokens.append(int(logp.index_fill(0, torch.tensor([IMAGE]), float("-inf")).argmax()))
            logprobs.append(float(logp[tokens[-1]]))
        return tokens, logprobs

    def check(self, lm: nn.Module, completions: Sequence[Completion]) -> None:
        """Greedy completions: every token is the best of the model's own logits, and the numbers add up."""
        for b, completion in enumerate(completions):
            logp = self.own_logits(lm, b, completion.token_ids[:-1]).log_softmax(-1)
            best = logp.index_fill(1, torch.tensor([IMAGE]), float("-inf")).argmax(-1)
            assert completion.token_ids == best.tolist(), f"context {b}"
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), logp.gather(1, best[:, None])[:, 0].float(), atol=1e-5, rtol=0
            )
            assert completion.num_cached + completion.num_prefilled == len(self.contexts[b])


def engine_of(lm: nn.Module, name: str, **options: Any) -> HFEngine:
    """A synced engine with a reader that has looked at the model already, so that forwards can be counted."""
    engine = HFEngine(**{"stop_token_ids": [], **options})
    engine.sync(lm)
    engine.generate([[3]], greedy(1))
    engine.use_image_reader(FakeReader(name))
    return engine


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@contextmanager
def encoded_by(lm: nn.Module) -> Iterator[list[int]]:
    """How many pictures (tiles) the vision tower is given, call by call."""
    counts: list[int] = []
    (tower,) = {m for n, m in lm.named_modules() if n.split(".")[-1] in ("visual", "vision_model", "vision_tower")}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        counts.append(len(kwargs["grid_thw"]) if "grid_thw" in kwargs else len(pixels))

    handle = tower.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    handle.remove()


@contextmanager
def forwards(lm: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes [r, q] of the token ids of every forward."""
    shapes: list[tuple[int, ...]] = []
    handle = lm.register_forward_pre_hook(
        lambda _, __, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


# --- the tokens are the model's ---------------------------------------------------------------------------------------


def many(name: str) -> Shown:
    """A group, the same words about another image, two images of different sizes, an image at the end, and text."""
    return Shown(
        name,
        [text(1, 6), drawn(0), text(2, 4)],
        [text(1, 6), drawn(0), text(2, 4)],
        [text(1, 6), drawn(1), text(2, 4)],
        [text(3, 2), drawn(2, large=True), text(4, 1), drawn(0), text(5, 3)],
        [text(6, 3), drawn(3, large=True)],
        [text(7, 9)],
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_the_whole_sequence_from_pixels(name: str) -> None:
    lm, shown = model_of(name), many(name)
    completions = shown.by(engine_of(lm, name), greedy(5))
    for b, completion in enumerate(completions):
        tokens, logprobs = shown.own_greedy(lm, b, 5)
        assert completion.token_ids == tokens, f"context {b}"
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert abs(completions[0].logprobs[0] - completions[2].logprobs[0]) > 0.01  # the image counts


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("limits", [{}, {"max_prefill_tokens": 3, "max_batch_size": 2}])
def test_turns_that_bring_an_image_each(name: str, limits: dict[str, int]) -> None:
    """Two episodes that differ in the first image, one of text, and one that goes back: also with tiny forwards."""
    lm = model_of(name)
    engine = engine_of(lm, name, **limits)
    rows: list[list[Any]] = [[text(1, 5), drawn(0), text(2, 3)], [text(1, 5), drawn(1), text(2, 3)], [text(3, 7)]]
    before: list[int] = []
    for turn in range(3):
        shown = Shown(name, *rows)
        completions = shown.by(engine, greedy(6))
        shown.check(lm, completions)
        for length, completion in zip(before, completions, strict=False):
            assert completion.num_cached == length + 5  # the last sampled token was never fed
        before = [len(context) for context in shown.contexts[:3]]
        for row, completion in zip(rows, completions, strict=True):
            row += [completion.token_ids, drawn(10 + turn, large=turn == 1), text(20 + turn, 2)]
        rows = [*rows[:3], [*rows[0][:-3], text(9, 2)]]  # a branch from before the last image


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "idefics3", "llava", "llava_dinov2"])
def test_log_probabilities_are_what_training_computes(name: str) -> None:
    """On-policy, the ratio of every sampled token is 1; what may be drawn is restricted, not renormalised."""
    lm, shown = model_of(name), many(name)
    params = SamplingParams(temperature=0.8, max_new_tokens=7, top_p=0.9)
    completions = shown.by(engine_of(lm, name), params, seeds=range(6))
    rows = [torch.tensor([*context, *c.token_ids]) for context, c in zip(shown.contexts, completions, strict=True)]
    token_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    vision = VisionInputs.from_rows(lm.config, shown.pixels, token_ids, lengths)
    with torch.no_grad():
        scores = PaddedModel(lm)(token_ids, lengths, temperature=0.8, vision=vision).logprobs
    for b, completion in enumerate(completions):
        expected = scores[b, lengths[b] - 7 : lengths[b]].float()
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:HFEngine cannot share")
def test_real_images_through_the_models_own_processor(name: str) -> None:
    """Two turns, a wide image and then a tall one: training reads the same reader and finds ratio 1."""
    tokenizer = vlm_tokenizer(name)
    reader = HFImageReader(vlm_config(name), tokenizer, FAMILIES[name].image_processor())
    torch.manual_seed(0)
    lm = tf.AutoModelForImageTextToText.from_config(vlm_config(name), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    engine = HFEngine(stop_token_ids=[])
    engine.use_image_reader(reader)
    engine.sync(lm)
    noise = np.random.default_rng(0)
    context: list[int] = tokenizer.encode("Look:", add_special_tokens=False)
    images: list[Image] = []
    for shape in ((40, 60, 3), (70, 30, 3)):
        images.append(noise.integers(0, 256, shape, dtype=np.uint8))
        context = context + tokenizer.encode(reader.read(images[-1]).text + "what?", add_special_tokens=False)
        completions = engine.generate([context] * 2, SAMPLED, images=[images] * 2)
        rows = torch.tensor([context + completion.token_ids for completion in completions])
        lengths = torch.tensor([rows.shape[1]] * 2)
        vision = reader.inputs([images] * 2, rows, lengths)
        with torch.no_grad():
            scores = PaddedModel(lm)(rows, lengths, temperature=SAMPLED.temperature, vision=vision).logprobs[:, -8:]
        found = torch.tensor([completion.logprobs for completion in completions])
        torch.testing.assert_close(found, scores, atol=1e-4, rtol=0)
        context = context + completions[0].token_ids


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3"])
def test_a_trajectory_does_not_depend_on_its_batch(name: str) -> None:
    """Alone, among others, in another order: context, images and seed decide."""
    lm, shown = model_of(name), many(name)
    together = tokens_of(shown.by(engine_of(lm, name), SAMPLED, range(6)))
    backwards = engine_of(lm, name).generate(shown.contexts[::-1], SAMPLED, range(6)[::-1], shown.images[::-1])
    assert tokens_of(backwards)[::-1] == together
    engine = engine_of(lm, name)
    for b in range(6):
        alone = engine.generate([shown.contexts[b]], SAMPLED, [b], [shown.images[b]])
        assert tokens_of(alone) == [together[b]]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_positions_move_with_their_rows_when_others_have_ended(name: str) -> None:
    """Rows stop one after another, and rows whose images differ in size change places."""
    lm = model_of(name)
    rows = [[text(k, 3), *[drawn(k, large=k % 2 == 0), text(k + 10, 2)] * (k % 3)] for k in range(6)]
    shown = Shown(name, *rows)
    answers = [shown.own_greedy(lm, b, 7)[0] for b in range(6)]
    stops = {answers[0][0], answers[1][1], answers[2][3]}
    expected = [next((a[: i + 1] for i, token in enumerate(a) if token in stops), a) for a in answers]
    assert len(set(map(len, expected))) > 2
    completions = shown.by(engine_of(lm, name, stop_token_ids=sorted(stops)), greedy(7))
    assert tokens_of(completions) == expected


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_group_shares_its_prompt_and_its_image(name: str) -> None:
    lm = model_of(name)
    shown = Shown(name, *[[text(1, 6), drawn(0), text(2, 4)]] * 8)
    engine = engine_of(lm, name)
    length = len(shown.contexts[0])
    with encoded_by(lm) as counts, forwards(lm) as shapes:
        completions = shown.by(engine, SAMPLED, range(8))
    assert counts == [1]
    assert shapes == [(1, length)] + [(8, 1)] * 7
    assert [(c.num_prefilled, c.num_cached) for c in completions] == [(length, 0)] + [(0, length)] * 7
    alone = engine_of(lm, name).generate(shown.contexts[5:6], SAMPLED, [5], shown.images[5:6])
    assert tokens_of(alone) == tokens_of(completions[5:6])
    assert len(set(map(tuple, tokens_of(completions)))) > 4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "llava"])
def test_different_images_share_what_stands_before_them(name: str) -> None:
    """Equal token ids, unequal contexts; a system prompt before the image is computed once, and so is each image."""
    lm = model_of(name)
    rows = [[text(1, 40), drawn(seed), text(2, 3)] for seed in (0, 2, 0, 4)]
    shown = Shown(name, *rows)
    assert len(set(map(tuple, shown.contexts))) == 1
    with encoded_by(lm) as counts:
        completions = shown.by(engine_of(lm, name), greedy(4))
    shown.check(lm, completions)
    rest = len(shown.contexts[0]) - 41  # the token that begins an image is text
    assert [c.num_prefilled for c in completions] == [41 + rest, rest, 0, rest]
    assert counts == [3]


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_contexts_that_share_an_image_compute_it_once(name: str) -> None:
    """Two questions about one image with a long text before it: the shared beginning ends behind the image."""
    lm = model_of(name)
    shown = Shown(name, *[[text(1, 40), drawn(0), text(seed, 3)] for seed in (2, 3, 4)])
    engine = engine_of(lm, name)
    with encoded_by(lm) as counts, forwards(lm) as shapes:
        completions = shown.by(engine, greedy(3))
    shown.check(lm, completions)
    prefix = len(shown.contexts[0]) - 3
    assert counts == [1]
    assert shapes == [(1, prefix), (3, 3), (3, 1), (3, 1)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_turn_computes_its_new_tokens_and_encodes_its_new_image(name: str) -> None:
    lm, engine = model_of(name), engine_of(model_of(name), name)
    rows: list[list[Any]] = [[text(1, 6), drawn(seed), text(2, 4)] for seed in (0, 1)]
    first = Shown(name, *rows)
    completions = first.by(engine, greedy(5))
    for row, completion in zip(rows, completions, strict=True):
        row += [completion.token_ids, drawn(7), text(3, 2)]
    second = Shown(name, *rows)
    with encoded_by(lm) as counts:
        completions = second.by(engine, greedy(5))
    second.check(lm, completions)
    assert counts == [1]
    new = len(second.contexts[0]) - len(first.contexts[0]) - 4  # the last sampled token was never fed
    assert [c.num_prefilled for c in completions] == [new, new]


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_a_context_that_ends_inside_what_is_known(name: str) -> None:
    """It ends with a placeholder, or before the image, or is the very same: the last token gives the logits."""
    lm, engine = model_of(name), engine_of(model_of(name), name)
    whole = Shown(name, [text(1, 6), drawn(0, large=True)])
    while whole.contexts[0][-1] != IMAGE:
        whole.contexts[0].pop()  # what closes an image
    for num_new in (len(whole.contexts[0]), 1):
        completions = whole.by(engine, greedy(4))
        whole.check(lm, completions)
        assert completions[0].num_prefilled == num_new
    before = Shown(name, [text(1, 6)])
    completions = before.by(engine, greedy(4))
    before.check(lm, completions)
    assert completions[0].num_prefilled == 1


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_a_shared_beginning_that_ends_inside_an_image(name: str) -> None:
    """One context ends with the image's last placeholder, which it computes alone; the others go on behind it."""
    lm, engine = model_of(name), engine_of(model_of(name), name)
    shown = Shown(name, *[[text(1, 40), drawn(0, large=True), text(seed, 4)] for seed in (2, 3, 4)])
    end = len(shown.contexts[0]) - shown.contexts[0][::-1].index(IMAGE)
    shown.contexts[1] = shown.contexts[1][:end]
    with encoded_by(lm) as counts, forwards(lm) as shapes:
        completions = shown.by(engine, greedy(3))
    shown.check(lm, completions)
    assert counts == [1]
    assert shapes[0] == (1, end - 1)
    rest = len(shown.contexts[0]) - (end - 1)
    assert [c.num_prefilled for c in completions] == [end - 1 + rest, 1, rest]


@pytest.mark.parametrize("limit", [1, 5, 7])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "idefics3", "llava_dinov2"])
def test_forwards_that_cut_images_change_nothing(name: str, limit: int) -> None:
    lm, shown = model_of(name), many(name)
    engine = engine_of(lm, name, max_prefill_tokens=limit)
    with encoded_by(lm) as counts, forwards(lm) as shapes:
        completions = shown.by(engine, greedy(4))
    shown.check(lm, completions)
    assert max(rows * columns for rows, columns in shapes if columns > 1 or rows == 1) <= max(limit, 6)
    num_pictures = 4 + 2 * (name == "idefics3")  # large ones are cut into two tiles
    assert sum(counts) == num_pictures  # each once, though many forwards show a part of it


def test_pictures_are_encoded_together_within_the_limit() -> None:
    """Six of 4 features each, at most 10 a forward of the tower: two at a time."""
    lm = model_of("qwen3_vl")
    shown = Shown("qwen3_vl", [piece for seed in range(6) for piece in (drawn(seed), text(seed, 2))])
    for limit, expected in ((10, [2, 2, 2]), (3, [1] * 6), (1000, [6])):
        engine = engine_of(lm, "qwen3_vl", max_prefill_tokens=limit)
        with encoded_by(lm) as counts:
            completions = shown.by(engine, greedy(2))
        shown.check(lm, completions)
        assert sum(counts) == 6
        if limit != 10:  # there a prefill forward ends inside an image, and the tower runs for what it shows
            assert counts == expected


def test_text_beside_images_is_as_without_them() -> None:
    """The vision tower is left alone, and the same words keep their tokens with and without a reader."""
    lm = model_of("qwen3_vl")
    words = [text(1, 9), text(2, 4)]
    params = greedy(6)
    bare = HFEngine(stop_token_ids=[IMAGE])
    bare.sync(lm)
    expected = bare.generate(words, params)
    assert all(IMAGE not in c.token_ids for c in expected)
    engine = engine_of(lm, "qwen3_vl")
    with encoded_by(lm) as counts:
        assert engine.generate(words, params) == expected
        assert engine.generate(words, params, images=[[], []])[1].token_ids == expected[1].token_ids
    assert counts == []
    mixed = engine.generate([*words, many("qwen3_vl").contexts[0]], params, images=[[], [], [drawn(0)]])
    assert tokens_of(mixed[:2]) == tokens_of(expected)


# --- what is kept and forgotten ---------------------------------------------------------------------------------------


def test_features_are_bounded_and_files_are_read_again_when_they_are_gone() -> None:
    lm, name = model_of("qwen3_vl"), "qwen3_vl"
    shown = Shown(name, *[[text(k, 3), ImageRef(str(k), "0" * 64), text(k + 5, 2)] for k in range(4)])
    engine = engine_of(lm, name, max_cached_tokens=0)
    reader = engine._reader
    for _ in range(2):
        with encoded_by(lm) as counts:
            completions = shown.by(engine, greedy(3))
        shown.check(lm, completions)
        assert counts == [4]
        assert engine._images.features.num_tokens == 0
    assert sorted(reader.reads) == sorted([*range(4)] * 3)  # once to know it, twice to encode it
    engine = engine_of(lm, name, max_cached_tokens=10)
    shown.by(engine, greedy(3))
    assert engine._images.features.num_tokens == 8
    engine = engine_of(lm, name)
    for turns in range(3):
        with encoded_by(lm) as counts:
            longer = Shown(name, *[[text(turns, 2), image] for (image,) in shown.images])
            longer.by(engine, greedy(3))
        assert counts == ([4] if turns == 0 else [])


def test_an_array_may_be_drawn_into_between_calls() -> None:
    """Its picture is looked at again: the same object shows something else now."""
    lm, name = model_of("llava"), "llava"
    engine, image = engine_of(lm, name), drawn(0)
    for seed in (0, 1, 0):
        image[:] = seed
        shown = Shown(name, [text(1, 4), image, text(2, 2)])
        shown.check(lm, shown.by(engine, greedy(3)))


def test_a_file_and_an_array_with_the_same_picture_are_one() -> None:
    lm, name = model_of("idefics3"), "idefics3"
    engine = engine_of(lm, name, max_cached_tokens=0)
    for image in (drawn(5), ImageRef("5", "0" * 64), ImageRef("5", "1" * 64), drawn(5)):
        shown = Shown(name, [text(1, 4), image, text(2, 2)])
        shown.check(lm, shown.by(engine, greedy(3)))
    both = Shown(name, [text(1, 4), drawn(5)], [text(1, 4), ImageRef("5", "0" * 64)])
    assert [c.num_prefilled for c in both.by(engine, greedy(1))] == [len(both.contexts[0]), 0]


def test_sync_forgets_features_numbers_and_keys() -> None:
    """New weights in the vision tower alone, and new pictures under the old numbers."""
    name = "qwen2_5_vl"
    lm = build_vlm(name).eval()
    engine, shown = engine_of(lm, name), Shown(name, [text(1, 4), drawn(0), text(2, 3)])
    before = shown.by(engine, greedy(8))
    shown.check(lm, before)
    with torch.no_grad():
        for parameter in lm.model.visual.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.3)
    engine.sync(lm)
    other = Shown(name, [text(1, 4), drawn(9), text(2, 3)])
    for now in (other, shown):
        completions = now.by(engine, greedy(8))
        now.check(lm, completions)
        assert completions[0].num_cached in (0, 5)
    assert tokens_of(completions) != tokens_of(before)


def test_training_state_and_gradients_stay() -> None:
    name = "qwen3_vl"
    lm = build_vlm(name)
    lm.model.visual.blocks[0].eval()
    flags = [module.training for module in lm.modules()]
    shown = many(name)
    shown.by(engine_of(lm, name), greedy(3))
    assert [module.training for module in lm.modules()] == flags
    assert all(parameter.grad is None for parameter in lm.parameters())
    assert lm.config.text_config._attn_implementation == "sdpa"
    assert lm.model.rope_deltas is None


def test_autocast_of_the_caller_is_respected() -> None:
    lm, name = build_vlm("qwen3_vl", torch.float32).eval(), "qwen3_vl"
    shown = many(name)
    with torch.autocast("cpu", torch.bfloat16):
        completions = shown.by(engine_of(lm, name), greedy(4))
        for b, completion in enumerate(completions):
            shown.pixels[b] = [
                {key: value.float() if value.is_floating_point() else value for key, value in image.items()}
                for image in shown.pixels[b]
            ]
            logp = shown.own_logits(lm, b, completion.token_ids[:-1]).float().log_softmax(-1)
            chosen = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=0.2, rtol=0)


def test_lora_adapters_on_decoder_and_vision_tower_are_active() -> None:
    name = "qwen3_vl"
    plain = many(name).by(engine_of(model_of(name), name), greedy(4))
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj", "qkv", "linear_fc1"]
    lm = get_peft_model(build_vlm(name), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    lm = lm.double().eval()
    shown = many(name)
    completions = shown.by(engine_of(lm, name), greedy(4))
    shown.check(lm, completions)
    assert tokens_of(completions) != tokens_of(plain)


# --- placeholders -----------------------------------------------------------------------------------------------------


def test_the_placeholder_is_never_sampled() -> None:
    """However likely it is; the log-probability of what is drawn instead is the model's own."""
    logits = torch.zeros(4, 5)
    logits[:, 2] = 500.0  # everything else has probability 0 in float32
    logits[:, 3] = 3.0
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=1), SamplingParams(top_p=0.5)):
        uniforms = torch.tensor([0.01, 0.3, 0.7, 0.999], dtype=torch.float64)
        tokens, logprobs = sample_tokens(logits, params, uniforms, excluded=(2,))
        assert 2 not in tokens.tolist()
        assert logprobs[tokens == 3] == pytest.approx(-497.0)
        assert sample_tokens(logits, params, uniforms)[0].tolist() == [2] * 4
    assert (tokens == 3).all()  # 0.5 of what is left: 20.1 of 23.1


def test_an_image_token_of_id_0_is_not_seen_in_columns_without_a_token() -> None:
    """Rows of different lengths leave gaps, whose ids must not ask for features."""
    name = "qwen3_vl"
    lm, shown = build_vlm(name).eval(), many(name)
    lm.config.image_token_id = 0
    engine = engine_of(lm, name)
    engine._reader.image_token_id = 0
    contexts = [[0 if token == IMAGE else token for token in context] for context in shown.contexts]
    for b, completion in enumerate(engine.generate(contexts, greedy(1), images=shown.images)):
        logp = shown.own_logits(model_of(name), b, [])[-1].log_softmax(-1)
        best = int(logp[1:].argmax()) + 1
        assert (completion.token_ids, completion.logprobs) == ([best], pytest.approx([float(logp[best])], abs=1e-5))


# --- models that share nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "idefics3", "llava"])
def test_models_that_cannot_be_driven_recompute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(driver: CausalDriver) -> None:
        raise UndrivableModelError("not today")

    monkeypatch.setattr(CausalDriver, "check", refuse)
    lm, shown = model_of(name), many(name)
    with pytest.warns(UserWarning, match="cannot share keys and values for .*not today"):
        engine = engine_of(lm, name)
    with encoded_by(lm) as counts:
        completions = shown.by(engine, greedy(5))
    shown.check(lm, completions)
    assert [c.num_cached for c in completions] == [0] * 6
    assert sum(counts) == 4 + 2 * (name == "idefics3")  # only the language model runs for every token


def test_images_that_attend_in_both_directions_are_recomputed() -> None:
    """Gemma 3, with one warning; contexts of text beside them keep their keys and values."""
    name = "gemma3"
    lm, shown = model_of(name), many(name)
    engine = engine_of(lm, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            completions = shown.by(engine, greedy(5))
            shown.check(lm, completions)
    messages = [str(w.message) for w in caught if "HFEngine" in str(w.message)]
    assert len(messages) == 1
    assert "contexts with images of Gemma3ForConditionalGeneration" in messages[0]
    assert [c.num_cached for c in completions] == [0] * 5 + [8]


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(contexts: list[list[int]], images: Any, message: str, name: str = "qwen2_vl") -> None:
    engine = engine_of(model_of(name), name)
    with pytest.raises(UserError, match=message):
        engine.generate(contexts, SAMPLED, images=images)


def test_images_that_do_not_fill_their_placeholders_are_refused() -> None:
    shown = Shown("qwen2_vl", [text(1, 3)], [text(2, 3), drawn(0), text(3, 2)])
    contexts = shown.contexts
    refusal(contexts, [[drawn(0)], [drawn(0)]], "Context 0 shows 1 images, which fill 4 = 4 placeholders, but holds 0")
    refusal(contexts, [[], [drawn(0, large=True)]], "Context 1 shows 1 images, which fill 6 = 6 .* holds 4")
    refusal(contexts, [[], []], r"Context 1 shows 0 images, which fill 0 = 0 placeholders, but holds 4 \(token 90\)")
    refusal(contexts, None, "Context 1 shows 0 images")
    refusal(contexts, [[drawn(0)]], "Images for 1 contexts, but there are 2")
    cut = [contexts[0], contexts[1][:6]]
    refusal(cut, shown.images, "Context 1 shows 1 images, which fill 4 = 4 placeholders, but holds 2")


def test_images_that_touch_are_refused_where_positions_would_be_wrong() -> None:
    images = [[drawn(0), drawn(1)]]
    refusal([[5, *[IMAGE] * 8, 6]], images, r"Context 0 shows images of \[4, 4\] tokens, .* are \[8\] long")
    refusal([[5, IMAGE, 6, *[IMAGE] * 7]], images, r"are \[1, 7\] long")
    touching = Shown("llava", [text(1, 3), drawn(0), drawn(0), drawn(1), text(2, 2)])
    touching.contexts = [[*text(1, 3), *[IMAGE] * 12, *text(2, 2)]]
    touching.check(model_of("llava"), touching.by(engine_of(model_of("llava"), "llava"), greedy(4)))


def test_images_need_a_model_that_sees_and_a_reader() -> None:
    llama = tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    for reader in (None, FakeReader("llava")):
        engine = HFEngine(stop_token_ids=[])
        engine.sync(llama)
        if reader is not None:
            engine.use_image_reader(reader)
            engine.generate([[3, IMAGE]], greedy(2))  # to a model of text the id means nothing
        with pytest.raises(UserError, match=r"Images for a model of type 'llama': supported are"):
            engine.generate([[3]], greedy(2), images=[[drawn(0)]])
    engine = HFEngine(stop_token_ids=[])
    engine.sync(model_of("llava"))
    with pytest.raises(UserError, match="no reader: call use_image_reader"):
        engine.generate([[3]], greedy(2), images=[[drawn(0)]])


def test_a_failed_call_leaves_nothing_behind() -> None:
    lm, name = model_of("llava"), "llava"
    engine, image = engine_of(lm, name), drawn(0)
    with pytest.raises(UserError, match="Context 0 shows 1"):
        engine.generate([[3]], SAMPLED, images=[[image]])
    image[:] = 1
    shown = Shown(name, [text(1, 4), image, text(2, 2)])
    shown.check(lm, shown.by(engine, greedy(3)))


def test_the_reader_is_used_for_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model_of("llava"), "llava")
    read: Callable[..., None] = lambda *args: pytest.fail("no image was given")  # noqa: E731
    monkeypatch.setattr(engine._reader, "read", read)
    assert len(engine.generate([[3, 4]], SAMPLED)[0].token_ids) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none")
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_the_tokens_are_those_of_a_cpu(name: str) -> None:
    shown = many(name)
    engine = engine_of(build_vlm(name).eval().cuda(), name, max_prefill_tokens=30)
    shown.check(model_of(name), shown.by(engine, greedy(6)))
