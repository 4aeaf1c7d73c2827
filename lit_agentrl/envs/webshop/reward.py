"""How well a purchase fulfils a goal, in [0, 1] (WebShop, arXiv 2207.01206, section 3).

r = r_type (|attributes met| + |options met| + [price <= limit]) / (|attributes| + |options| + 1)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lit_agentrl.envs.webshop.goals import Goal
from lit_agentrl.envs.webshop.products import Product
from lit_agentrl.retrieval.words import STOP_WORDS

SIMILAR = 85
"""Texts match where their token-set ratio, a whole per cent, is above this."""
_COLOURS = (
    "amber apricot aqua beige black blue bronze brown burgundy camel camouflage charcoal cherry chocolate coffee "
    "copper coral cream crimson cyan denim emerald floral fuchsia gold gray green grey indigo ivory khaki lavender "
    "leopard lilac lime magenta maroon mint mocha multicolor mustard navy nude olive orange peach pink plum purple "
    "red rose rust sand silver tan taupe teal turquoise violet walnut white wine yellow"
)
COLOURS = tuple(_COLOURS.split())
"""Options that name one of these count as that colour; the first in the alphabet where there are several."""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Score:
    """The reward and what it is made of."""

    total: float
    type_factor: float
    num_attributes: int
    """Attributes of the goal that the product meets."""
    num_options: int
    """Options of the goal that were chosen."""
    price_ok: bool


def score(product: Product, chosen: Iterable[str], goal: Goal) -> Score:
    """What buying the product with the chosen option values is worth."""
    factor = type_factor(product, goal.product)
    attributes = sum(meets_attribute(product, wanted) for wanted in goal.attributes)
    picked = [normalize_colour(value) for value in chosen]
    options = sum(any(similar(value, normalize_colour(wanted)) for value in picked) for _, wanted in goal.options)
    price_ok = product.price <= goal.price_upper
    parts = len(goal.attributes) + len(goal.options) + 1
    return Score(factor * (attributes + options + price_ok) / parts, factor, attributes, options, price_ok)


def type_factor(bought: Product, wanted: Product) -> float:
    """Whether the product is of the right type: 1, 0.5, 0.1 or 0.

    With t the share of the wanted title's words that are in the other's: 0 for t = 0, 0.1 for t < 0.1, else 1 where
    the query that found both is the same, two levels of their categories are, or t > 0.2, else 0.5. The official code
    counts nouns as spaCy tags them; here every word that is no stop word and no number counts.
    """
    words = title_words(wanted.title)
    share = len(set(title_words(bought.title)) & set(words)) / len(words) if words else 0.2
    if share == 0.0:
        return 0.0
    if share < 0.1:
        return 0.1
    same_category = len(_levels(bought) & _levels(wanted)) >= 2
    return 1.0 if bought.query == wanted.query or same_category or share > 0.2 else 0.5


def meets_attribute(product: Product, wanted: str) -> bool:
    """Whether an attribute is like one of the product's, or stands in its title, bullet points or description."""
    if any(similar(attribute, wanted) for attribute in product.attributes):
        return True
    texts = (product.title, " ".join(product.bullets), product.description)
    return any(wanted in text.lower() for text in texts)


@lru_cache(maxsize=4096)
def title_words(title: str) -> tuple[str, ...]:
    """The content words of a title in order, lower case: no stop words, no single letters, nothing with a digit."""
    words = _WORD.findall(title.lower())
    return tuple(word for word in words if len(word) > 1 and word.isalpha() and word not in STOP_WORDS)


def normalize_colour(value: str) -> str:
    """The colour that an option names, or the option as it is."""
    return next((colour for colour in COLOURS if colour in value), value)


def similar(one: str, other: str) -> bool:
    """Whether two texts have nearly the same words: a token-set ratio of 86 % or more, rounded as thefuzz does."""
    from rapidfuzz.fuzz import token_set_ratio  # here: the package is an extra, and suites are imported together

    return round(token_set_ratio(_plain(one), _plain(other))) > SIMILAR


def _plain(text: str) -> str:
    """ASCII letters and digits in lower case, all else blank: thefuzz's preparation."""
    from rapidfuzz.utils import default_process

    return default_process(text.encode("ascii", "ignore").decode())


def _levels(product: Product) -> set[str]:
    return {level.strip() for level in product.product_category.split("›")}
