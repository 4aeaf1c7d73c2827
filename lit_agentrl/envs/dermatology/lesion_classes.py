"""The seven diseases of the synthetic lesions, and how often each shows which clinical attribute.

The distributions follow what dermoscopy textbooks call typical; they are a teaching aid's, not an epidemiologist's.
Attributes have the names that `lit_agentrl.knowledge` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COLOURS = ("tan", "brown", "dark brown", "black", "pink", "red", "purple", "blue-grey", "white", "yellow")
BORDERS = ("regular", "irregular", "sharp", "fading", "ill-defined", "rolled")
SYMMETRIES = ("symmetric", "slightly asymmetric", "asymmetric")
SIZES = ("small", "medium", "large")
"""About 6, 8 and 10 mm across, at 14 mm an image."""
SURFACES = ("smooth", "rough", "waxy", "shiny")
STRUCTURES = (
    "regular pigment network", "delicate peripheral pigment network", "atypical pigment network", "regular globules",
    "irregular dots", "irregular streaks", "blue-white veil", "milia-like cysts", "comedo-like openings",
    "arborizing vessels", "blue-grey ovoid nests", "central white patch", "red lacunae", "surface scale",
    "strawberry pattern", "ulceration",
)  # fmt: skip
IMPLIED_COLOURS: Mapping[str, str] = {
    "blue-white veil": "blue-grey", "blue-grey ovoid nests": "blue-grey", "central white patch": "white",
    "surface scale": "yellow",
}  # fmt: skip
"""The colour that a structure brings with it."""


@dataclass(frozen=True)
class Profile:
    """What a disease looks like: weights of the alternatives of each attribute, and what it is taken for."""

    colours: Mapping[tuple[str, ...], float]
    structures: Mapping[tuple[str, ...], float]
    border: Mapping[str, float]
    symmetry: Mapping[str, float]
    size: Mapping[str, float]
    surface: Mapping[str, float]
    mimics: tuple[str, ...]


PROFILES: Mapping[str, Profile] = {
    "actinic keratosis": Profile(
        colours={("pink",): 3, ("red",): 3, ("pink", "brown"): 2, ("red", "brown"): 1},
        structures={("surface scale",): 3, ("strawberry pattern",): 2, ("strawberry pattern", "surface scale"): 4},
        border={"ill-defined": 1},
        symmetry={"symmetric": 1, "slightly asymmetric": 3, "asymmetric": 1},
        size={"small": 1, "medium": 3, "large": 2},
        surface={"rough": 1},
        mimics=("basal cell carcinoma", "seborrheic keratosis"),
    ),
    "basal cell carcinoma": Profile(
        colours={("pink",): 4, ("pink", "red"): 2, ("red",): 1},
        structures={
            ("arborizing vessels",): 3,
            ("arborizing vessels", "blue-grey ovoid nests"): 3,
            ("arborizing vessels", "ulceration"): 2,
            ("blue-grey ovoid nests",): 1,
            ("blue-grey ovoid nests", "ulceration"): 1,
        },
        border={"rolled": 1},
        symmetry={"symmetric": 1, "slightly asymmetric": 2, "asymmetric": 1},
        size={"small": 1, "medium": 3, "large": 2},
        surface={"shiny": 4, "smooth": 1},
        mimics=("actinic keratosis", "vascular lesion", "melanoma"),
    ),
    "seborrheic keratosis": Profile(
        colours={("brown",): 3, ("tan",): 2, ("dark brown",): 2, ("brown", "tan"): 2, ("dark brown", "brown"): 1},
        structures={
            ("milia-like cysts",): 3,
            ("comedo-like openings",): 2,
            ("milia-like cysts", "comedo-like openings"): 4,
        },
        border={"sharp": 1},
        symmetry={"symmetric": 3, "slightly asymmetric": 2},
        size={"small": 1, "medium": 2, "large": 3},
        surface={"waxy": 4, "rough": 1},
        mimics=("melanoma", "melanocytic nevus", "actinic keratosis"),
    ),
    "dermatofibroma": Profile(
        colours={("brown",): 4, ("pink",): 1, ("brown", "pink"): 2, ("pink", "brown"): 2},
        structures={("central white patch", "delicate peripheral pigment network"): 3, ("central white patch",): 2},
        border={"fading": 1},
        symmetry={"symmetric": 5, "slightly asymmetric": 1},
        size={"small": 3, "medium": 1},
        surface={"smooth": 1},
        mimics=("melanocytic nevus", "basal cell carcinoma"),
    ),
    "melanoma": Profile(
        colours={
            ("brown", "black"): 2,
            ("dark brown", "black"): 2,
            ("brown", "dark brown", "black"): 3,
            ("dark brown", "red", "black"): 2,
            ("dark brown", "brown", "red"): 1,
        },
        structures={
            ("atypical pigment network", "blue-white veil"): 3,
            ("atypical pigment network", "irregular streaks"): 2,
            ("blue-white veil", "irregular streaks"): 2,
            ("atypical pigment network", "irregular dots"): 2,
            ("blue-white veil", "irregular dots"): 2,
        },
        border={"irregular": 1},
        symmetry={"asymmetric": 6, "slightly asymmetric": 1},
        size={"medium": 1, "large": 3},
        surface={"smooth": 4, "rough": 1},
        mimics=("melanocytic nevus", "seborrheic keratosis"),
    ),
    "melanocytic nevus": Profile(
        colours={("brown",): 4, ("tan",): 2, ("tan", "brown"): 3, ("brown", "tan"): 1},
        structures={
            ("regular pigment network",): 4,
            ("regular globules",): 3,
            ("regular pigment network", "regular globules"): 2,
        },
        border={"regular": 1},
        symmetry={"symmetric": 6, "slightly asymmetric": 1},
        size={"small": 2, "medium": 3},
        surface={"smooth": 1},
        mimics=("melanoma", "dermatofibroma", "seborrheic keratosis"),
    ),
    "vascular lesion": Profile(
        colours={("red",): 3, ("red", "purple"): 4, ("purple",): 2},
        structures={("red lacunae",): 1},
        border={"sharp": 1},
        symmetry={"symmetric": 4, "slightly asymmetric": 2},
        size={"small": 2, "medium": 2, "large": 1},
        surface={"smooth": 1},
        mimics=("basal cell carcinoma", "melanoma"),
    ),
}
LESION_LABELS: tuple[str, ...] = tuple(PROFILES)
"""The seven, as in HAM10000 (its benign keratosis is the seborrheic keratosis here)."""
