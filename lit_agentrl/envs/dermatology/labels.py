"""Names of diseases: the seven of HAM10000, the codes that datasets write for them, and how else they are said."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

DISEASES = (
    "actinic keratosis",
    "basal cell carcinoma",
    "seborrheic keratosis",
    "dermatofibroma",
    "melanoma",
    "melanocytic nevus",
    "vascular lesion",
)
"""The classes of HAM10000. Its "benign keratosis" also holds solar lentigines and lichen-planus-like keratoses."""
CODES: Mapping[str, str] = {
    "akiec": DISEASES[0], "ak": DISEASES[0], "bcc": DISEASES[1], "bkl": DISEASES[2], "df": DISEASES[3],
    "mel": DISEASES[4], "nv": DISEASES[5], "vasc": DISEASES[6], "scc": "squamous cell carcinoma", "unk": "unknown",
}  # fmt: skip
"""How HAM10000 and the ISIC challenges write them, in lower case."""
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "actinic keratosis": ("actinic keratoses", "solar keratosis", "solar keratoses", "akiec", "ak"),
    "basal cell carcinoma": ("basal cell carcinomas", "basal cell cancer", "bcc"),
    "seborrheic keratosis": (
        "seborrheic keratoses", "seborrhoeic keratosis", "seborrhoeic keratoses", "seborrhoic keratosis",
        "benign keratosis", "bkl",
    ),
    "dermatofibroma": ("dermatofibromas", "fibrous histiocytoma", "df"),
    "melanoma": ("melanomas", "malignant melanoma"),
    "melanocytic nevus": (
        "melanocytic nevi", "melanocytic naevus", "melanocytic naevi", "nevus", "nevi", "naevus", "naevi", "mole",
        "moles", "nv",
    ),
    "vascular lesion": ("vascular lesions", "vascular skin lesion", "angioma", "hemangioma", "haemangioma", "vasc"),
    "squamous cell carcinoma": ("squamous cell carcinomas", "squamous cell cancer", "scc"),
}  # fmt: skip
"""Other words that mean a disease and no other of the list."""


def plain(text: str) -> str:
    """Lower case, one form of each letter, every other sign than letters and digits a space, spaces single."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", folded).split())


def label_name(raw: str, names: Mapping[str, str]) -> str:
    """The name of a label as a dataset writes it: by `names`, keyed by `plain` text, else its own words."""
    words = plain(raw)
    return names.get(words, words)


def name_table(names: Mapping[str, str] | None, codes: Mapping[str, str] | None = None) -> dict[str, str]:
    """What raw labels are called, keyed by `plain` text: the user's `names` before the dataset's `codes`."""
    return {plain(raw): plain(name) for raw, name in {**(codes or {}), **(names or {})}.items()}
