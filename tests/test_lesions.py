"""Synthetic lesions: the same everywhere, different in every split, and what the attributes say is what is drawn."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # last: it holds an alfworld.py

from lesion_difficulty import pixel_statistics, probe

from lesion_parts import digest
from lit_agentrl.envs.dermatology.labels import DISEASES
from lit_agentrl.envs.dermatology.lesion_attributes import GRADES, Lesion, draw_lesion
from lit_agentrl.envs.dermatology.lesion_canvas import NUM_ANGLES, make_outline
from lit_agentrl.envs.dermatology.lesion_classes import (
    BORDERS,
    COLOURS,
    IMPLIED_COLOURS,
    LESION_LABELS,
    PROFILES,
    SIZES,
    STRUCTURES,
    SURFACES,
    SYMMETRIES,
)
from lit_agentrl.envs.dermatology.lesion_render import PIGMENT, render
from lit_agentrl.envs.dermatology.lesion_structures import DRAWN
from lit_agentrl.envs.dermatology.synthetic_lesions import SyntheticLesions
from lit_agentrl.envs.seeded import SPLITS
from lit_agentrl.errors import UserError
from lit_agentrl.knowledge import facts
from lit_agentrl.knowledge.names import name_key

PLAIN = draw_lesion(0, "train", 0, "easy")


def lesions_of(difficulty: str, count: int = 700, seed: int = 0) -> list[Lesion]:
    return [draw_lesion(seed, "train", number, difficulty) for number in range(count)]


def with_attributes(lesion: Lesion, **changed: object) -> Lesion:
    return replace(lesion, attributes=replace(lesion.attributes, **changed))


def test_the_labels_are_those_of_ham10000():
    assert LESION_LABELS == DISEASES


def test_a_lesion_is_what_it_was():
    """The data is fixed: who changes a distribution changes every published number, and should mean to."""
    lesion = draw_lesion(0, "test", 3, "medium")
    assert lesion.label == "actinic keratosis"
    assert lesion.attributes.colours == ("brown", "tan")
    assert lesion.attributes.structures == ("strawberry pattern",)
    assert (lesion.attributes.border, lesion.attributes.surface) == ("sharp", "rough")
    assert render(lesion).mean() == pytest.approx(179.5, abs=0.5)


def test_pictures_are_the_same_in_another_process():
    code = (
        "from lesion_parts import digest\n"
        "from lit_agentrl.envs.dermatology import SyntheticLesions\n"
        "source = SyntheticLesions(14, 7, 7, 'hard', seed=5)\n"
        "for split in ('test', 'train', 'val'):\n"
        "    for sample in reversed(source.samples(split)):\n"
        "        print(sample.id, sample.label, digest(sample.shown()), sample.findings, sep='|')\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    source = SyntheticLesions(14, 7, 7, "hard", seed=5)
    own = [
        f"{sample.id}|{sample.label}|{digest(sample.shown())}|{sample.findings}"
        for split in SPLITS
        for sample in source.samples(split)
    ]
    assert sorted(output.stdout.split("\n")[:-1]) == sorted(own)


def test_no_picture_is_in_two_splits_or_seeds():
    shown = [
        digest(sample.shown())
        for seed in (0, 1)
        for split in SPLITS
        for sample in SyntheticLesions(28, 28, 28, "easy", 64, seed).samples(split)
    ]
    assert len(set(shown)) == len(shown) == 2 * 3 * 28


def test_more_pictures_do_not_change_the_first():
    few, many = (SyntheticLesions(count, 0, 0) for count in (7, 21))
    assert [s.findings for s in few.samples("train")] == [s.findings for s in many.samples("train")[:7]]
    assert digest(few.samples("train")[6].shown()) == digest(many.samples("train")[6].shown())


def test_every_seven_hold_all_diseases():
    labels = [sample.label for sample in SyntheticLesions(70, 0, 0).samples("train")]
    assert all(set(labels[at : at + 7]) == set(LESION_LABELS) for at in range(0, 70, 7))
    assert len({tuple(labels[at : at + 7]) for at in range(0, 70, 7)}) > 5, "their order should not tell the label"


def test_easy_attributes_are_those_of_the_disease():
    for lesion in lesions_of("easy"):
        what, profile = lesion.attributes, PROFILES[lesion.label]
        assert what.structures in profile.structures
        assert any(what.colours[: len(names)] == names for names in profile.colours)
        assert what.border in profile.border
        assert what.symmetry in profile.symmetry
        assert what.size in profile.size
        assert what.surface in profile.surface
        assert 1 <= what.skin_tone <= 6


@pytest.mark.parametrize("difficulty", ["medium", "hard"])
def test_borrowed_attributes_come_from_mimics_as_often_as_said(difficulty):
    """Structures of a disease and of its mimics have nothing in common, so a borrowed one is seen."""
    own = 0
    lesions = lesions_of(difficulty)
    for lesion in lesions:
        owners = {label for label in LESION_LABELS if lesion.attributes.structures in PROFILES[label].structures}
        assert owners <= {lesion.label, *PROFILES[lesion.label].mimics} or len(owners) > 1
        own += lesion.label in owners
    assert 1 - own / len(lesions) == pytest.approx(GRADES[difficulty].borrowed, abs=0.05)


def test_skin_and_view_say_nothing_of_the_disease():
    """Or a model would learn the camera: mean tone and hair by label differ no more than chance lets them."""
    lesions = lesions_of("hard", 2100)
    for label in LESION_LABELS:
        own = [lesion for lesion in lesions if lesion.label == label]
        assert np.mean([lesion.attributes.skin_tone for lesion in own]) == pytest.approx(3.5, abs=0.35)
        assert np.mean([lesion.view.num_hairs > 0 for lesion in own]) == pytest.approx(0.5, abs=0.1)


def test_colours_that_structures_bring_are_named():
    for lesion in lesions_of("hard"):
        what = lesion.attributes
        assert {IMPLIED_COLOURS[name] for name in what.structures if name in IMPLIED_COLOURS} <= set(what.colours)
        assert len(set(what.colours)) == len(what.colours)


def test_vocabularies_hold_all_that_is_used():
    for profile in PROFILES.values():
        assert {name for names in profile.colours for name in names} <= set(COLOURS)
        assert {name for names in profile.structures for name in names} <= set(STRUCTURES)
        assert set(profile.border) <= set(BORDERS)
        assert set(profile.symmetry) <= set(SYMMETRIES)
        assert set(profile.size) <= set(SIZES)
        assert set(profile.surface) <= set(SURFACES)
        assert set(profile.mimics) <= set(LESION_LABELS)
    assert set(DRAWN) == set(STRUCTURES)
    assert set(PIGMENT) == set(COLOURS)


@pytest.mark.parametrize("label", LESION_LABELS)
def test_the_knowledge_graph_knows_what_is_drawn(label):
    """So a true description of a typical picture is supported by the graph, and never contradicts it."""
    profile = PROFILES[label]
    structures = {name for names in profile.structures for name in names}
    colours = {name for names in profile.colours for name in names}
    colours |= {IMPLIED_COLOURS[name] for name in structures if name in IMPLIED_COLOURS}
    parts = {part for name in colours & {"blue-grey"} for part in name.split("-")}
    if "blue-grey" not in facts(label, "has_colour"):  # or it has blue, and grey
        colours = colours - {"blue-grey"} | parts
    for relation, drawn in (("has_feature", structures), ("has_colour", colours), ("has_border", profile.border)):
        known = {name_key(name) for name in facts(label, relation)}
        assert {name for name in drawn if name_key(name) not in known} == set(), relation


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_is_seen_where_it_is_named(structure):
    """And only on and near the lesion: the rest of the picture is the same."""
    with_it, without = (
        render(with_attributes(PLAIN, structures=names, size="medium", border="regular"), 112).astype(int)
        for names in ((structure,), ())
    )
    changed = np.abs(with_it - without).max(axis=-1) > 25
    far = np.hypot(*np.mgrid[-56:56, -56:56]) > 112 * 0.28 * 1.9
    assert changed.mean() > 0.004
    assert changed[far].mean() < 0.002


@pytest.mark.parametrize("skin_tone", [1, 6])
def test_colours_are_as_dark_as_their_names(skin_tone):
    """On light and on dark skin: tan, brown, dark brown, black."""
    order = ("tan", "brown", "dark brown", "black")
    pictures = [
        render(with_attributes(PLAIN, colours=(name,), structures=(), surface="smooth", skin_tone=skin_tone))
        for name in order
    ]
    middle = [picture[46:66, 46:66].mean() for picture in pictures]
    assert middle == sorted(middle, reverse=True)
    assert all(picture[:8, :8].mean() > level + 5 for picture, level in zip(pictures, middle, strict=True))


def test_borders_and_symmetry_are_as_rough_as_their_names():
    def outlines(symmetry: str, border: str) -> list[np.ndarray]:
        return [make_outline(np.random.default_rng(seed), symmetry, border) for seed in range(40)]

    def unlike_its_half_turn(symmetry: str) -> float:
        return float(np.mean([np.abs(o - np.roll(o, NUM_ANGLES // 2)).mean() for o in outlines(symmetry, "regular")]))

    def jagged(border: str) -> float:
        return float(np.mean([np.abs(np.diff(outline)).sum() for outline in outlines("symmetric", border)]))

    assert 2 * unlike_its_half_turn("symmetric") < unlike_its_half_turn("slightly asymmetric")
    assert 1.5 * unlike_its_half_turn("slightly asymmetric") < unlike_its_half_turn("asymmetric")
    assert jagged("regular") < 0.5 * jagged("sharp") < 0.5 * jagged("irregular")


def test_a_picture_is_the_same_lesion_at_every_size():
    small, large = (render(PLAIN, size).astype(float) for size in (96, 192))
    halved = large.reshape(96, 2, 96, 2, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), halved.ravel())[0, 1] > 0.97


def test_pictures_are_arrays_that_a_model_takes():
    picture = SyntheticLesions(1, 0, 0, size=33).samples("train")[0].shown()
    assert isinstance(picture, np.ndarray)
    assert (picture.shape, picture.dtype, picture.flags["C_CONTIGUOUS"]) == ((33, 33, 3), np.uint8, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "out of range"),
        ({"size": 31}, "32 to 1024"),
        ({"size": 100_000}, "size=100000"),
        ({"difficulty": "impossible"}, "easy, medium, hard"),
        ({"num_train": -1}, "num_train=-1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(options, message):
    with pytest.raises(UserError, match=message):
        SyntheticLesions(**options)


def test_numbers_beyond_a_split_are_refused():
    with pytest.raises(UserError, match="train-7"):
        SyntheticLesions(7, 0, 0).lesion("train", 7)
    with pytest.raises(UserError, match="index=-1"):
        draw_lesion(0, "train", -1)


@pytest.mark.slow
def test_grades_are_graded():
    """A linear probe of pixel statistics finds them harder and harder, and none hopeless (chance is 0.14)."""
    easy, medium, hard = (probe(SyntheticLesions(280, 70, 140, grade), pixel_statistics) for grade in GRADES)
    assert easy > medium + 0.1
    assert medium > hard + 0.1
    assert easy > 0.7
    assert hard > 0.25
