"""A product of the shop, from the published records or back from the store."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

LONGEST_ASIN = 10
DEFAULT_PRICE = 100.0
"""Dollars, where a record names none: the official site's number."""

_AMOUNT = re.compile(r"[^\d.]")


@dataclass(frozen=True, slots=True)
class HumanInstruction:
    """What a person was asked to describe: an instruction, and which attributes and options it stands for."""

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Review:
    """A customer's words."""

    title: str
    score: str
    body: str


@dataclass(frozen=True, slots=True)
class Product:
    """What the shop knows of a product, and the instructions that ask for it."""

    asin: str
    category: str
    query: str
    product_category: str
    title: str
    description: str
    bullets: tuple[str, ...]
    pricing: tuple[float, ...]
    """Dollars: one price, or the lowest and the highest."""
    options: tuple[tuple[str, tuple[str, ...]], ...]
    """The lists on the product's page by name, lower case."""
    rating: str = "N.A."
    reviews: tuple[Review, ...] = ()
    attributes: tuple[str, ...] = ()
    """What the product is, as mined from its texts: the hidden side of the reward."""
    instruction: str = ""
    """The synthetic instruction without options and price; empty where there is none."""
    instruction_attributes: tuple[str, ...] = ()
    human: tuple[HumanInstruction, ...] = ()

    @property
    def price_tag(self) -> str:
        """The price as the site writes it."""
        return f"${self.pricing[0]}" if len(self.pricing) == 1 else f"${self.pricing[0]} to ${self.pricing[1]}"

    @property
    def price(self) -> float:
        """The price that is paid. In a range it is drawn from the ASIN, so that every process pays the same."""
        if len(self.pricing) == 1:
            return self.pricing[0]
        return random.Random(f"webshop price {self.asin}").uniform(*self.pricing)

    @property
    def search_text(self) -> str:
        """What is indexed: title, description, first bullet point and options, as in the official index."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options)
        return " ".join([self.title, self.description, self.bullets[0] if self.bullets else "", options]).lower()

    def dumps(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def loads(cls, line: str) -> Product:
        """The product that `dumps` wrote."""
        fields = json.loads(line)
        for name in ("bullets", "pricing", "attributes", "instruction_attributes"):
            fields[name] = tuple(fields[name])
        fields["options"] = tuple((name, tuple(values)) for name, values in fields["options"])
        fields["reviews"] = tuple(Review(**review) for review in fields["reviews"])
        fields["human"] = tuple(
            HumanInstruction(said["text"], tuple(said["attributes"]), tuple(said["options"]))
            for said in fields["human"]
        )
        return cls(**fields)


def parse_product(record: Mapping[str, object]) -> Product | None:
    """The product of a published record, raw or as indexed; None without a usable ASIN.

    The official code passes over the ASIN "nan" and those of more than 10 characters; so does this.
    """
    asin = _text(record.get("asin"))
    if not asin or asin == "nan" or len(asin) > LONGEST_ASIN:
        return None
    small = record.get("small_description")
    product = Product(
        asin=asin.upper(),
        category=_text(record.get("category")),
        query=_text(record.get("query")).lower().strip(),
        product_category=_text(record.get("product_category")),
        title=_text(record.get("name")),
        description=_text(record.get("full_description")),
        bullets=_texts(small if isinstance(small, list) else [small]),
        pricing=_pricing(record.get("pricing")),
        options=_options(record.get("customization_options")),
        rating=_text(record.get("Rating")) or "N.A.",
        attributes=_texts(record.get("Attributes")),
    )
    return with_human(with_reviews(product, record.get("Reviews"), None), record.get("instructions"))


def with_attributes(product: Product, entry: object) -> Product:
    """The product with its entry of `items_ins_v2*.json`: attributes, and the synthetic instruction if there is one."""
    if not isinstance(entry, Mapping):
        return product
    return replace(
        product,
        attributes=_texts(entry.get("attributes")),
        instruction=_text(entry.get("instruction")),
        instruction_attributes=_texts(entry.get("instruction_attributes")),
    )


def with_human(product: Product, entries: object) -> Product:
    """The product with its entry of `items_human_ins.json`; instructions without attributes ask for nothing."""
    if not isinstance(entries, list):
        return product
    found = []
    for entry in entries:
        if isinstance(entry, Mapping) and (attributes := _texts(entry.get("instruction_attributes"))):
            options = entry.get("instruction_options")
            options = list(options.values()) if isinstance(options, Mapping) else options
            found.append(HumanInstruction(_text(entry.get("instruction")), attributes, _texts(options)))
    return replace(product, human=tuple(found))


def with_reviews(product: Product, reviews: object, rating: object) -> Product:
    """The product with its entry of `reviews.json`."""
    if not isinstance(reviews, list):
        return product
    found = tuple(
        Review(
            _text(entry.get("title")),
            _text(entry.get("score", entry.get("stars"))),
            _text(entry.get("body", entry.get("review"))),
        )
        for entry in reviews
        if isinstance(entry, Mapping)
    )
    return replace(product, reviews=found, rating=_text(rating) or product.rating)


def _text(value: object) -> str:
    """Numbers are written out (a rating of 4.5), everything else that is no text is left out."""
    return value if isinstance(value, str) else str(value) if isinstance(value, int | float) else ""


def _texts(values: object) -> tuple[str, ...]:
    return tuple(text for value in values if (text := _text(value))) if isinstance(values, Sequence) else ()


def _pricing(value: object) -> tuple[float, ...]:
    """The first two amounts of "$1,299.00$1,499.00", or of a list of numbers."""
    if isinstance(value, str):
        amounts = [_AMOUNT.sub("", part) for part in value.split("$")[1:]]
        prices = [float(amount) for amount in amounts if re.fullmatch(r"\d+\.?\d*|\.\d+", amount)]
    else:
        prices = [float(p) for p in value if isinstance(p, int | float)] if isinstance(value, list) else []
    return tuple(prices[:2]) or (DEFAULT_PRICE,)


def _options(value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Lower case; a slash becomes a bar, as on the site, where it would be part of an address."""
    if not isinstance(value, Mapping):
        return ()
    lists: dict[str, tuple[str, ...]] = {}
    for name, entries in value.items():
        if isinstance(entries, list):
            values = (_text(entry.get("value")) for entry in entries if isinstance(entry, Mapping))
            lists[str(name).lower()] = tuple(text.strip().replace("/", " | ").lower() for text in values if text)
    return tuple(lists.items())
