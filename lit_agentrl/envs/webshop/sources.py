"""Where the data lies: the published files, in the two sizes they come in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_agentrl.cache import content_digest
from lit_agentrl.errors import UserError

CatalogueSize = Literal["small", "full"]
GoalKind = Literal["synthetic", "human"]

PRODUCTS: dict[str, tuple[str, ...]] = {
    "small": ("items_shuffle_1000.json", "products.jsonl", "documents.jsonl"),
    "full": ("items_shuffle.json",),
}
ATTRIBUTES: dict[str, str] = {"small": "items_ins_v2_1000.json", "full": "items_ins_v2.json"}
HUMAN = "items_human_ins.json"
REVIEWS = "reviews.json"
ORIGIN = (
    "They are published with WebShop (github.com/princeton-nlp/WebShop; its setup.sh names the downloads). "
    "`lit-agentrl make-webshop-demo FOLDER` makes a small synthetic set in the same layout."
)


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a catalogue; equal sources are equal shops."""

    products: Path
    attributes: Path
    human: Path | None
    reviews: Path | None
    num_products: int | None = None
    """Only the first so many records of the products' file."""

    @property
    def digest(self) -> str:
        """A hash of all that is in the files, hexadecimal."""
        parts = [f"num_products={self.num_products}"]
        named = {"products": self.products, "attributes": self.attributes, "human": self.human, "reviews": self.reviews}
        for name, path in named.items():
            if path is not None:
                parts.append(f"{name}={path.suffix}:{content_digest(path)}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def find_sources(folder: str, size: CatalogueSize, goals: GoalKind, num_products: int | None = None) -> Sources:
    """The files in `folder` for a catalogue of this size and goals of this kind.

    Raises:
        UserError: The folder or a needed file is missing; the text says which, in which layout, and where from.
    """
    if size not in PRODUCTS:
        raise UserError(f"size={size!r} is unknown; allowed are {', '.join(PRODUCTS)}.")
    if goals not in ("synthetic", "human"):
        raise UserError(f"goals={goals!r} is unknown; allowed are synthetic and human.")
    if num_products is not None and num_products < 1:
        raise UserError(f"num_products={num_products}: a shop needs at least 1 product; leave it out for all.")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"folder={folder!r} is not there. It should hold {layout(size, goals)}. {ORIGIN}")
    products = next((root / name for name in PRODUCTS[size] if (root / name).is_file()), None)
    attributes = root / ATTRIBUTES[size]
    human = root / HUMAN if (root / HUMAN).is_file() else None
    missing = [] if products else [" or ".join(PRODUCTS[size])]
    missing += [] if attributes.is_file() else [attributes.name]
    missing += [HUMAN] if goals == "human" and human is None and products and products.suffix == ".json" else []
    if missing or products is None:
        raise UserError(f"{root} lacks {', '.join(missing)}. It should hold {layout(size, goals)}. {ORIGIN}")
    reviews = root / REVIEWS if (root / REVIEWS).is_file() else None
    return Sources(products, attributes, human, reviews, num_products)


def layout(size: CatalogueSize, goals: GoalKind) -> str:
    """What a folder should hold, in words."""
    array, *rest = PRODUCTS[size]
    products = f"{array} (a JSON array of products)"
    if rest:
        products += f" or {' or '.join(rest)} (one {{'id', 'contents', 'product'}} object a line)"
    names = [products, f"{ATTRIBUTES[size]} (an object: attributes and instruction by ASIN)"]
    return ", ".join(names + ([f"{HUMAN} (an object: instructions by ASIN)"] if goals == "human" else []))
