"""A made-up catalogue in WebShop's published layout, for recipes and tests that have no data. None of it is real."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from lit_agentrl.envs.webshop.sources import ATTRIBUTES, HUMAN, PRODUCTS
from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text

MOST_PRODUCTS = 100_000
NOTICE = (
    "SYNTHETIC DATA. Every product, price and instruction in this folder was made up by `lit-agentrl make-webshop-demo "
    "--num_products {num_products} --seed {seed}`. The layout is that of WebShop (arXiv 2207.01206); the contents are "
    "not, so scores on it say nothing about WebShop.\n"
)

_COLOURS = ("black", "white", "blue", "green", "red", "grey", "pink", "yellow")
_SIZES = ("small", "medium", "large", "x-large")
_PACKS = ("pack of 1", "pack of 2", "pack of 6")


@dataclass(frozen=True, slots=True)
class _Department:
    query: str
    path: str
    nouns: tuple[str, ...]
    attributes: tuple[str, ...]
    lists: tuple[tuple[str, tuple[str, ...]], ...]


_DEPARTMENTS = {
    "fashion": _Department(
        "men's shirts",
        "Clothing, Shoes & Jewelry › Men › Clothing › Shirts",
        ("shirt", "t-shirt", "polo", "flannel"),
        ("machine wash", "long sleeve", "short sleeve", "slim fit", "cotton spandex", "classic fit", "button closure"),
        (("Color", _COLOURS), ("Size", _SIZES)),
    ),
    "garden": _Department(
        "console tables",
        "Home & Kitchen › Furniture › Living Room Furniture › Tables",
        ("console table", "side table", "coffee table", "desk"),
        ("solid wood", "easy assemble", "space saving", "steel frame", "storage space", "living room", "white item"),
        (("Color", _COLOURS),),
    ),
    "beauty": _Department(
        "hair care",
        "Beauty & Personal Care › Hair Care › Shampoo & Conditioner",
        ("shampoo", "conditioner", "hair mask", "hair oil"),
        ("sulfate free", "paraben free", "cruelty free", "dry hair", "argan oil", "natural ingredients", "hair growth"),
        (("Scent", ("lavender", "lemon", "coconut", "unscented")), ("Style", _PACKS)),
    ),
    "electronics": _Department(
        "headphones",
        "Electronics › Headphones › Over-Ear Headphones",
        ("headphones", "headset", "earbuds", "speaker"),
        ("noise cancelling", "fast charging", "long lasting", "stereo sound", "hands free", "water resistant"),
        (("Color", _COLOURS),),
    ),
    "grocery": _Department(
        "snack bars",
        "Grocery & Gourmet Food › Snacks & Sweets › Snack Bars",
        ("granola bar", "protein bar", "fruit snack", "cookie"),
        ("gluten free", "low sugar", "plant based", "nut free", "non gmo", "dairy free", "high protein"),
        (("Flavor", ("peanut", "cocoa", "apple", "vanilla")), ("Size", _PACKS)),
    ),
}
_MAKERS = ("Abelo", "Brisk", "Corva", "Delmo", "Estra", "Fenlo", "Gilt", "Hovan")


def write_demo(folder: Path, num_products: int = 200, seed: int = 0) -> None:
    """Write the demo into `folder`: products, attributes, people's instructions and a notice that they are made up.

    Raises:
        UserError: The folder holds something already, or the number of products is out of range.
    """
    if not 10 <= num_products <= MOST_PRODUCTS:
        raise UserError(f"num_products={num_products} is out of range: allowed are 10 to {MOST_PRODUCTS}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: nothing was written. Give a new one, or empty it.")
    rng = random.Random(f"webshop demo {seed}")
    products, attributes, human = [], {}, {}
    for number in range(num_products):
        category = rng.choice(list(_DEPARTMENTS))
        asin = f"DEMO{number:06d}"
        record, entry, said = _product(rng, asin, category)
        products.append(record)
        attributes[asin] = entry
        if said:
            human[asin] = [said]
    write_text(folder / PRODUCTS["small"][0], json.dumps(products, indent=1, ensure_ascii=False))
    write_text(folder / ATTRIBUTES["small"], json.dumps(attributes))
    write_text(folder / HUMAN, json.dumps(human))
    write_text(folder / "SYNTHETIC.txt", NOTICE.format(num_products=num_products, seed=seed))


def main(options: list[str]) -> None:
    """`lit-agentrl make-webshop-demo OUTPUT [--num_products 200] [--seed 0]`."""
    parser = argparse.ArgumentParser("lit-agentrl make-webshop-demo", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    parser.add_argument("--num_products", type=int, default=200, help="products to make up (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds make equal files (default: 0)")
    given = parser.parse_args(options)
    write_demo(given.output, given.num_products, given.seed)
    print(f"{given.output}: {given.num_products} made-up products in WebShop's layout. Synthetic, not WebShop's data.")


def _product(
    rng: random.Random, asin: str, category: str
) -> tuple[dict[str, object], dict[str, object], dict[str, object] | None]:
    """A record of the products' file, its entry of the attributes' file, and what a person might have asked for."""
    department = _DEPARTMENTS[category]
    noun, maker = rng.choice(department.nouns), rng.choice(_MAKERS)
    attributes = rng.sample(department.attributes, 3)
    lists = {name: sorted(rng.sample(values, rng.randint(2, len(values)))) for name, values in department.lists}
    low = rng.randint(3, 120) + 0.99
    record: dict[str, object] = {
        "asin": asin,
        "name": f"{maker} {noun.title()} ({', '.join(attributes)}) - Demo Product {asin[4:]}",
        "category": category,
        "query": department.query,
        "product_category": department.path,
        "pricing": f"${low}" if rng.random() < 0.7 else f"${low}${low + rng.randint(2, 30):.2f}",
        "full_description": f"A made-up {noun} of the maker {maker}: {attributes[0]} and {attributes[1]}.",
        "small_description": [f"{attribute.capitalize()}: as {maker} says." for attribute in attributes],
        "customization_options": {name: [{"value": value} for value in values] for name, values in lists.items()},
        "images": [""],
    }
    entry: dict[str, object] = {"attributes": attributes}
    if rng.random() < 0.5:  # in the published small set, too, somewhat under half carry an instruction
        asked = attributes[:2]
        entry |= {
            "instruction": f"Find me {asked[0]} {department.query} with {asked[1]}",
            "instruction_attributes": asked,
        }
    if rng.random() < 0.7:
        return record, entry, None
    option = rng.choice(next(iter(lists.values())))
    return record, entry, {
        "asin": asin,
        "instruction": f"i am looking for a {attributes[2]} {noun} by {maker.lower()}, {option} if possible.",
        "instruction_attributes": [attributes[2]],
        "instruction_options": [option],
    }  # fmt: skip
