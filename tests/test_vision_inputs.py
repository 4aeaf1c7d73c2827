"""Which pictures rows show, what tells their tokens apart, and what is refused because it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_agentrl.errors import UserError
from lit_agentrl.models import PackedTree, VisionInputs, content_id
from scoring_twins import padded
from tiny_vlm import CONFIGS, IMAGE, SHAPES, build_vlm, picture, rows_of, text


def test_placeholders_are_told_apart_by_content_and_all_else_by_token_id() -> None:
    """Two rows, two pictures: one placeholder keeps the key of its picture wherever it stands."""
    config = CONFIGS["qwen2_vl"]()
    token_ids = torch.tensor([[5, IMAGE, 7, IMAGE, IMAGE], [IMAGE, IMAGE, 9, IMAGE, 5]])
    small = {"pixel_values": torch.ones(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    large = {"pixel_values": torch.ones(8, 96), "image_grid_thw": torch.tensor([[1, 2, 4]])}
    lengths = torch.tensor([5, 3])
    vision = VisionInputs.from_rows(config, [[small, large], [large]], token_ids, lengths, [[11, 22], [22]])
    assert vision.shown == [[0, 1], [1]]
    assert vision.num_tokens == [1, 2]
    assert vision.feature_index(token_ids, lengths).tolist() == [[-1, 0, -1, 1, 2], [1, 2, -1, -1, -1]]
    assert vision.keys(token_ids, lengths).tolist() == [[5, -12, 7, -23, -23], [-23, -23, 9, IMAGE, 5]]
    part = vision.rows([1])
    assert (part.content_ids, part.num_tokens, part.shown) == ([22], [2], [[0]])
    assert part.keys(token_ids[1:], lengths[1:]).tolist() == [[-23, -23, 9, IMAGE, 5]]
    assert part.pixels["pixel_values"][0] is vision.pixels["pixel_values"][1]


def test_prompts_with_different_pictures_share_what_stands_before_them() -> None:
    rows = SHAPES["two_pictures"]("qwen2_vl")
    vision = rows.vision(CONFIGS["qwen2_vl"]())
    tree = PackedTree.build(rows.token_ids, rows.lengths, vision.keys(rows.token_ids, rows.lengths))
    before, group = 4 + 1, 4 + 1 + 3 + 2 * 4  # text and its start token; picture, its end token, text, completions
    assert len(tree) == before + 2 * group
    assert (tree.tokens == IMAGE).sum() == 2 * 4


def test_equal_pictures_are_found_by_their_content() -> None:
    rows = SHAPES["two_questions"]("smolvlm")
    assert len({id(image) for row in rows.images for image in row}) == 2  # made twice
    vision = rows.vision(CONFIGS["smolvlm"]())
    assert vision.content_ids == [content_id(vision_pixels(vision, 0))]
    assert 0 <= vision.content_ids[0] < 2**63


def vision_pixels(vision: VisionInputs, image: int) -> dict[str, Tensor]:
    return {name: values[image] for name, values in vision.pixels.items()}


def test_content_ids_see_values_shapes_and_types() -> None:
    values = torch.arange(8.0)
    images = [values, values + 1, values.view(2, 4), values.double(), values.bfloat16()]
    assert len({content_id({"pixel_values": image}) for image in images}) == len(images)
    assert content_id({"pixel_values": values}) == content_id({"pixel_values": values.clone()})


def test_lightning_moves_the_pixels_and_nothing_else() -> None:
    vision = SHAPES["several"]("idefics3").vision(CONFIGS["idefics3"]())
    for moved in (move_data_to_device(vision, torch.device("meta")), vision.to("meta")):
        assert all(value.device.type == "meta" for values in moved.pixels.values() for value in values)
        assert (moved.shown, moved.content_ids) == (vision.shown, vision.content_ids)
        assert (moved.num_tokens, moved.image_token_id) == (vision.num_tokens, IMAGE)
    assert vision.pixels["pixel_values"][0].device.type == "cpu"


# --- rows and images that do not fit --------------------------------------------------------------------------------


def built(name: str, images: list[list[dict[str, Tensor]]], **options: Any) -> VisionInputs:
    rows = SHAPES["two_pictures"](name)
    return VisionInputs.from_rows(CONFIGS[name](), images, rows.token_ids, rows.lengths, **options)


def test_images_must_fill_their_placeholders() -> None:
    one, large = picture("qwen2_vl", 0), picture("qwen2_vl", 1, size=(6, 4))
    for images, message in (
        ([[one], [one], [], [one]], "Row 2 shows 0 images, which fill 0 = 0 placeholders, but holds 4"),
        (
            [[one], [one, large], [one], [one]],
            r"Row 1 shows 2 images, which fill 4 \+ 6 = 10 placeholders, but holds 4",
        ),
        ([[one], [one], [one]], "Images for 3 rows, but token_ids has 4 rows"),
    ):
        with pytest.raises(UserError, match=message):
            built("qwen2_vl", images)
    rows = SHAPES["two_pictures"]("qwen2_vl")
    vision = rows.vision(CONFIGS["qwen2_vl"]())
    with pytest.raises(UserError, match="Images of 4 rows with token_ids of 2"):
        padded(build_vlm("qwen2_vl"))(rows.token_ids[:2], rows.lengths[:2], vision=vision)
    with pytest.raises(UserError, match=r"Row 0 shows 1 images.* holds 2"):
        padded(build_vlm("qwen2_vl"))(rows.token_ids, torch.tensor([7, 16, 16, 16]), vision=vision)  # inside the image


def test_content_ids_must_tell_images_apart() -> None:
    images = [[picture("qwen2_vl", k)] for k in (0, 0, 2, 2)]
    assert built("qwen2_vl", images, content_ids=[[7], [7], [8], [8]]).content_ids == [7, 8]
    for ids, message in (
        ([[7], [7], [7], [7]], "Row 2: the content id 7 was given to a different image"),
        ([[7], [7], [8], [-1]], r"Row 3: content ids \[-1\] must lie in"),
        ([[7], [7, 7], [8], [8]], "Row 1 shows 1 images, but has 2 content ids"),
        ([[7]], "and content ids for 1, but token_ids has 4 rows"),
    ):
        with pytest.raises(UserError, match=message):
            built("qwen2_vl", images, content_ids=ids)


def test_images_must_be_what_the_family_takes() -> None:
    values, grid = picture("qwen2_vl", 0).values()
    for image, message in (
        ({"pixel_values": values}, r"without \['image_grid_thw'\]"),
        ({"pixel_values": values, "image_grid_thw": grid, "rows": grid}, r"with \['rows'\]"),
        ({"pixel_values": values[1:], "image_grid_thw": grid}, r"15 patches and the grids \[\[1, 4, 4\]\]"),
    ):
        with pytest.raises(UserError, match=message):
            built("qwen2_vl", [[image]] * 4)
    masked = picture("smolvlm", 0)
    plain = {"pixel_values": masked["pixel_values"]}
    with pytest.raises(UserError, match="different processor outputs"):
        built("smolvlm", [[masked], [masked], [plain], [plain]])


def test_images_of_different_sizes_are_refused_where_the_model_takes_one() -> None:
    wide = {"pixel_values": torch.ones(1, 1, 3, 16, 32)}
    narrow = {"pixel_values": torch.ones(1, 1, 3, 16, 16)}
    rows = rows_of("idefics3", [[narrow, text(1, 3)], [narrow, text(1, 3)]], [1, 1])
    rows.images[1] = [wide]
    rows.token_ids = torch.cat([rows.token_ids, torch.full((2, 4), IMAGE)], 1)
    rows.lengths[1] += 4  # twice the patches
    vision = rows.vision(CONFIGS["idefics3"]())
    with pytest.raises(UserError, match="Images of 2 sizes"):
        padded(build_vlm("idefics3"))(rows.token_ids, rows.lengths, vision=vision)


def test_images_that_touch_are_refused_where_positions_would_be_wrong() -> None:
    """The models' own rule takes a run of placeholders for one image."""
    one = picture("qwen2_vl", 0)
    for row, message in (
        ([5, *[IMAGE] * 8, 6], r"Row 0 shows images of \[4, 4\] tokens, but its runs of placeholders are \[8\] long"),
        ([5, IMAGE, 6, *[IMAGE] * 7], r"are \[1, 7\] long"),
    ):
        token_ids, lengths = torch.tensor([row]), torch.tensor([len(row)])
        vision = VisionInputs.from_rows(CONFIGS["qwen2_vl"](), [[one, one]], token_ids, lengths)
        with pytest.raises(UserError, match=message):
            padded(build_vlm("qwen2_vl"))(token_ids, lengths, vision=vision)
