"""A small shop that is written down here, for the tests of WebShop."""

import json
from pathlib import Path

CLOTHES = "Clothing, Shoes & Jewelry › Men › Clothing › Shirts"
TABLES = "Home & Kitchen › Furniture › Tables"


def record(asin: str, name: str, **fields: object) -> dict[str, object]:
    """A product as `items_shuffle_1000.json` has it."""
    options = fields.pop("options", {})
    return {
        "asin": asin,
        "name": name,
        "category": "fashion",
        "query": "men's shirts",
        "product_category": CLOTHES,
        "pricing": "$25.00",
        "full_description": "",
        "small_description": [],
        "customization_options": {key: [{"value": value} for value in values] for key, values in options.items()},
        "images": ["https://example.org/x.jpg"],
        **fields,
    }


SHIRT = record(
    "B00000SHRT",
    "Acme Cotton Shirt",
    full_description="Soft and warm.",
    small_description=["Wash it hot ", "Sleeves are long "],
    options={"Size": ["Small", "Large"], "Color": ["Red", "Blue/White"]},
)
POLO = record("B00000POLO", "Bravo Polo Shirt", pricing="$62.50", options={"Size": ["Small"], "Color": ["Red"]})
TABLE = record(
    "B0000TABLE", "Oak Console Table", category="garden", query="console tables", product_category=TABLES,
    pricing="$1,200.00$1,300.00", full_description="Made of oak.",
)  # fmt: skip
LAMP = record("B00000LAMP", "Brass Lamp", category="garden", query="lamps", product_category="Lamps", pricing="$9.99")
FILLER = [record(f"B0000000{n:02d}", f"Plain Shirt number {n}", pricing=f"${n + 3}.50") for n in range(25)]
RECORDS = [SHIRT, POLO, TABLE, LAMP, *FILLER]
ATTRIBUTES: dict[str, dict[str, object]] = {
    "B00000SHRT": {
        "attributes": ["machine wash", "long sleeve", "cotton"],
        "instruction": "Find me machine wash men's shirts with long sleeve",
        "instruction_attributes": ["machine wash", "long sleeve"],
    },
    "B00000POLO": {
        "attributes": ["machine wash"],
        "instruction": "Find me machine wash men's shirts",
        "instruction_attributes": ["machine wash"],
    },
    "B0000TABLE": {
        "attributes": ["solid wood"],
        "instruction": "Find me console tables with solid wood",
        "instruction_attributes": ["solid wood"],
    },
    "B00000LAMP": {"attributes": ["easy clean"]},
    **{
        str(item["asin"]): {
            "attributes": ["plain weave"],
            "instruction": "Find me men's shirts with plain weave",
            "instruction_attributes": ["plain weave"],
        }
        for item in FILLER[:6]
    },
}
HUMAN: dict[str, list[dict[str, object]]] = {
    "B00000SHRT": [
        {
            "asin": "B00000SHRT",
            "instruction": "i want a warm red shirt.",
            "instruction_attributes": ["cotton"],
            "instruction_options": ["red"],
        },
        {"asin": "B00000SHRT", "instruction": "any shirt.", "instruction_attributes": [], "instruction_options": []},
    ],
    "B00000LAMP": [
        {
            "asin": "B00000LAMP",
            "instruction": "i need a brass lamp",
            "instruction_attributes": ["easy clean"],
            "instruction_options": [],
        },
        {
            "asin": "B00000LAMP",
            "instruction": "i need a tall lamp",
            "instruction_attributes": ["easy clean", "very tall"],
            "instruction_options": ["tall"],
        },
    ],
}


def write_shop(folder: Path, records: list[dict[str, object]] = RECORDS, human: object = HUMAN, **files: object) -> str:
    """The folder of a shop in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items_shuffle_1000.json").write_text(json.dumps(records, indent=1))
    (folder / "items_ins_v2_1000.json").write_text(json.dumps(ATTRIBUTES))
    if human is not None:
        (folder / "items_human_ins.json").write_text(json.dumps(human))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)
