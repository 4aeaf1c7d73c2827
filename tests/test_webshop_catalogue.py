"""WebShop's files: streaming, both layouts, broken data, the search, the goals and their splits."""

import json
import math
import random
import tracemalloc
from dataclasses import replace

import pytest

from lit_agentrl.envs.webshop import json_stream
from lit_agentrl.envs.webshop.catalogue import open_catalogue
from lit_agentrl.envs.webshop.goals import GoalTable, make_goal, num_goals
from lit_agentrl.envs.webshop.json_stream import array_items, lines, object_items
from lit_agentrl.envs.webshop.products import Product, parse_product, with_attributes, with_human
from lit_agentrl.envs.webshop.sources import find_sources
from lit_agentrl.errors import UserError
from webshop_parts import ATTRIBUTES, HUMAN, RECORDS, SHIRT, TABLE, record, write_shop

pytest.importorskip("bm25s", reason="needs the webshop extra: pip install 'lit-agentrl[webshop]'")

VALUES = [
    {"a": [1, 2.5, None, True], "b": 'quote " and \\ and é'},
    [],
    {},
    "text",
    12,
    -3.5e2,
    False,
    {"c": {"d": [{}]}},
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_streaming_gives_what_the_file_holds(chunk, indent, tmp_path, monkeypatch):
    """However the chunks fall: in numbers, escapes, strings, between values."""
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    array, mapping = tmp_path / "array.json", tmp_path / "object.json"
    array.write_text(json.dumps(VALUES, indent=indent, ensure_ascii=indent is None))
    mapping.write_text(json.dumps({f"k{i}": value for i, value in enumerate(VALUES)}, indent=indent))
    assert list(array_items(array)) == VALUES
    assert list(object_items(mapping)) == [(f"k{i}", value) for i, value in enumerate(VALUES)]


def test_empty_containers_hold_nothing(tmp_path):
    (tmp_path / "a").write_text(" [ ] ")
    (tmp_path / "o").write_text("{}\n")
    (tmp_path / "l").write_text("\n\n")
    assert list(array_items(tmp_path / "a")) == list(object_items(tmp_path / "o")) == list(lines(tmp_path / "l")) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"a": 1},\n{"b": 2', 3),  # cut
        ('[\n{"a": 1},\n{"b": "x', 3),  # cut in a string
        ('[\n{"a": 1}\n{"b": 2}]', 3),  # no comma
        ('[\n{"a": 1},\n{"b" 2}, {"c": "' + "x" * 100 + '"}]', 3),  # no colon
        ('{"a": 1}', 1),  # no array
        ("[1, 2]\n\n3", 3),  # more than one value
        ("", 1),
        ("[" * 100_000, 1),
    ],
)
def test_broken_arrays_name_file_and_line(text, line, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 40)
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"broken.json, line {line}: .*Fetch it again"):
        list(array_items(path))


def test_other_broken_files_name_the_line(tmp_path):
    path = tmp_path / "broken"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match="line 2"):
        list(lines(path))
    path.write_text('{"a": 1,\n 2: 3}')
    with pytest.raises(UserError, match=r"line 2: .*"):
        list(object_items(path))
    path.write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match=r"line 1: .*utf-8"):
        list(array_items(path))


def test_a_mistake_early_in_a_large_file_is_found_there(tmp_path, monkeypatch):
    """Not after the rest of the file was read in the hope that it completes the value."""
    monkeypatch.setattr(json_stream, "CHUNK", 1000)
    path = tmp_path / "large.json"
    path.write_text('[{"a": tru}, ' + ", ".join(['"padding"'] * 50_000) + "]")
    tracemalloc.start()
    with pytest.raises(UserError, match="line 1"):
        list(array_items(path))
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 10_000)
    path = tmp_path / "large.json"
    path.write_text(json.dumps([{"n": n, "text": "x" * 400} for n in range(8000)]))  # 3.4 MB
    tracemalloc.start()
    assert sum(item["n"] for item in array_items(path)) == 8000 * 7999 // 2
    assert tracemalloc.get_traced_memory()[1] < 300_000
    tracemalloc.stop()


def parsed(item: dict[str, object]) -> Product:
    found = parse_product(item)
    assert found is not None
    return found


def test_a_record_becomes_a_product():
    shirt = parsed(SHIRT)
    assert shirt.options == (("size", ("small", "large")), ("color", ("red", "blue | white")))
    assert (shirt.pricing, shirt.price_tag, shirt.price) == ((25.0,), "$25.0", 25.0)
    assert shirt.search_text == (
        "acme cotton shirt soft and warm. wash it hot  size: small, large, and color: red, blue | white"
    )
    assert Product.loads(shirt.dumps()) == shirt


@pytest.mark.parametrize(
    ("pricing", "prices", "tag"),
    [
        ("$1,200.00$1,300.00", (1200.0, 1300.0), "$1200.0 to $1300.0"),
        ("$5$6$7", (5.0, 6.0), "$5.0 to $6.0"),
        ("$19.99 - $27.99", (19.99, 27.99), "$19.99 to $27.99"),
        ([8.5], (8.5,), "$8.5"),
        ("", (100.0,), "$100.0"),
        (None, (100.0,), "$100.0"),
        ("$", (100.0,), "$100.0"),
        ("$1.2.3", (100.0,), "$100.0"),
    ],
)
def test_prices(pricing, prices, tag):
    product = parsed(record("B1", "x", pricing=pricing))
    assert (product.pricing, product.price_tag) == (prices, tag)
    assert min(prices) <= product.price <= max(prices)
    assert product.price == parsed(record("B1", "x", pricing=pricing)).price


@pytest.mark.parametrize("asin", ["", "nan", "B0123456789", None])
def test_records_without_a_usable_asin_are_left_out(asin):
    assert parse_product({**SHIRT, "asin": asin}) is None


def test_what_is_left_out_is_counted_and_said(tmp_path, caplog):
    extra = [record("nan", "no asin"), record("B00000SHRT", "the shirt again"), record("B0000NEWER", "new")]
    folder = write_shop(tmp_path, RECORDS + extra)
    with caplog.at_level("INFO", "lit_agentrl"):
        catalogue = open_catalogue(find_sources(folder, "small", "synthetic"))
    assert len(catalogue) == len(RECORDS) + 1
    assert catalogue.facts["without an ASIN (left out)"] == catalogue.facts["repeated (left out)"] == 1
    assert catalogue.find("B00000SHRT").title == "Acme Cotton Shirt"
    assert f"{len(RECORDS) + 1} products, 1 without an ASIN (left out), 1 repeated (left out)" in caplog.text


def test_all_files_are_joined_by_asin(tmp_path):
    reviews = [{"asin": "B00000SHRT", "average_rating": 4.5, "reviews": [{"title": "Good", "stars": 5, "review": "!"}]}]
    catalogue = open_catalogue(find_sources(write_shop(tmp_path, reviews=reviews), "small", "human"))
    shirt, table = catalogue.find("B00000SHRT"), catalogue.product(2)
    assert (shirt.rating, shirt.reviews[0].score, shirt.reviews[0].body) == ("4.5", "5", "!")
    assert shirt.attributes == ("machine wash", "long sleeve", "cotton")
    assert [said.text for said in shirt.human] == ["i want a warm red shirt."]
    assert (table.asin, table.rating, table.human) == ("B0000TABLE", "N.A.", ())
    assert catalogue.goal_counts("human")[:4] == [1, 0, 0, 2]
    assert catalogue.goal_counts("synthetic")[:4] == [4, 1, 1, 0]


def test_lines_with_products_are_the_same_catalogue(tmp_path):
    """The indexed form, one {"id", "contents", "product"} a line, gives the products of the array."""
    array = open_catalogue(find_sources(write_shop(tmp_path / "array"), "small", "human"))
    folder = tmp_path / "lines"
    write_shop(folder)
    (folder / "items_shuffle_1000.json").unlink()
    items = [{"id": r["asin"], "contents": "", "product": r} for r in RECORDS]
    (folder / "products.jsonl").write_text("\n".join(map(json.dumps, items)))
    indexed = open_catalogue(find_sources(str(folder), "small", "human"))
    assert [indexed.product(row) for row in range(len(indexed))] == [array.product(row) for row in range(len(array))]


def test_the_full_layout_and_a_part_of_it(tmp_path):
    (tmp_path / "items_shuffle.json").write_text(json.dumps(RECORDS))
    (tmp_path / "items_ins_v2.json").write_text(json.dumps(ATTRIBUTES))
    assert len(open_catalogue(find_sources(str(tmp_path), "full", "synthetic"))) == len(RECORDS)
    assert len(open_catalogue(find_sources(str(tmp_path), "full", "synthetic", num_products=3))) == 3


@pytest.mark.parametrize(
    ("left", "size", "goals", "missing"),
    [
        ([], "small", "synthetic", "items_shuffle_1000.json or products.jsonl or documents.jsonl, items_ins_v2_1000"),
        (["items_shuffle_1000.json"], "small", "synthetic", "lacks items_ins_v2_1000.json"),
        (["items_shuffle_1000.json", "items_ins_v2_1000.json"], "small", "human", "lacks items_human_ins.json"),
        (["items_shuffle_1000.json", "items_ins_v2_1000.json"], "full", "synthetic", "lacks items_shuffle.json"),
    ],
)
def test_missing_files_are_named_with_their_layout_and_origin(left, size, goals, missing, tmp_path):
    for name in left:
        (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match=missing) as error:
        find_sources(str(tmp_path), size, goals)
    assert "princeton-nlp/WebShop" in str(error.value)
    assert "make-webshop-demo" in str(error.value)


def test_a_missing_folder_and_wrong_options(tmp_path):
    with pytest.raises(UserError, match="It should hold items_shuffle_1000"):
        find_sources(str(tmp_path / "nowhere"), "small", "synthetic")
    with pytest.raises(UserError, match="size='big'"):
        find_sources(str(tmp_path), "big", "synthetic")
    with pytest.raises(UserError, match="goals='all'"):
        find_sources(str(tmp_path), "small", "all")
    with pytest.raises(UserError, match="num_products=0"):
        find_sources(str(tmp_path), "small", "human", 0)


def test_a_broken_catalogue_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    folder = write_shop(tmp_path / "shop")
    path = tmp_path / "shop" / "items_shuffle_1000.json"
    whole = path.read_text()
    for text, message in [
        (whole[:-40], "line"),
        ('["not a product"]', "record 1 is no object"),
        ("[]", "holds no product"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            open_catalogue(find_sources(folder, "small", "synthetic"))
    assert [p.suffix for p in (tmp_path / "cache" / "webshop").iterdir()] == [".lock"] * 3
    path.write_text(whole)
    assert len(open_catalogue(find_sources(folder, "small", "synthetic"))) == len(RECORDS)


def with_instruction(item: dict[str, object]) -> Product:
    product = parsed(item)
    return with_human(with_attributes(product, ATTRIBUTES.get(product.asin)), HUMAN.get(product.asin))


def test_synthetic_goals_are_all_combinations_in_the_official_order():
    shirt = with_instruction(SHIRT)
    goals = [make_goal(shirt, "synthetic", member) for member in range(num_goals(shirt, "synthetic"))]
    assert [goal.options for goal in goals] == [
        (("color", colour), ("size", size)) for colour in ("red", "blue | white") for size in ("small", "large")
    ]
    for goal in goals:
        assert goal.price_upper in (40.0, 50.0, 60.0)  # the higher of two of 30, 40, 50, 60
    assert goals[0].instruction == (
        "Find me machine wash men's shirts with long sleeve with color: red, and size: small, "
        f"and price lower than {goals[0].price_upper:.2f} dollars"
    )


def test_human_goals_say_what_the_person_said():
    shirt = with_instruction(SHIRT)
    assert num_goals(shirt, "human") == 1  # the instruction that asks for nothing is no goal
    goal = make_goal(shirt, "human", 0)
    assert goal.instruction == f"i want a warm red shirt, and price lower than {goal.price_upper:.2f} dollars"
    assert (goal.attributes, goal.options) == (("cotton",), (("", "red"),))


def test_a_price_beyond_the_list_has_no_limit():
    goal = make_goal(with_instruction(TABLE), "synthetic", 0)
    assert (goal.instruction, goal.price_upper) == ("Find me console tables with solid wood", math.inf)


def test_price_limits_are_spread_as_the_official_draw():
    """The higher of two out of the next four tens: the second in 1/6, the third in 2/6, the fourth in 3/6 of cases."""
    shirt = with_instruction(SHIRT)
    limits = [make_goal(replace(shirt, asin=f"B{n}"), "synthetic", 0).price_upper for n in range(1200)]
    assert {limit: limits.count(limit) / 1200 for limit in sorted(set(limits))} == pytest.approx(
        {40.0: 1 / 6, 50.0: 2 / 6, 60.0: 3 / 6}, abs=0.05
    )
    assert limits[:50] == [make_goal(replace(shirt, asin=f"B{n}"), "synthetic", 0).price_upper for n in range(50)]


def test_goal_number_i_is_the_official_session_i():
    """All goals in the catalogue's order, shuffled as the official server does it: test first, then val, then train."""
    counts = [0, 3, 0, 0, 5, 1, 0, 40]
    goals = [(row, member) for row, count in enumerate(counts) for member in range(count)]
    random.seed(233)
    random.shuffle(goals)
    table = GoalTable(counts)
    assert [table.locate(number) for number in range(len(table))] == goals
    assert [list(table.numbers(split)) for split in ("test", "val", "train")] == [
        list(range(9)), list(range(9, 13)), list(range(13, 49)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("total", "options", "sizes"),
    [
        (12_087, {}, (500, 1000, 10_587)),
        (3000, {}, (500, 1000, 1500)),
        (2999, {}, (599, 299, 2101)),
        (501, {}, (100, 50, 351)),
        (3, {}, (1, 1, 1)),
        (501, {"num_test": 500, "num_val": 0}, (500, 0, 1)),
    ],
)
def test_split_sizes(total, options, sizes):
    table = GoalTable([total], **options)
    assert tuple(len(table.numbers(split)) for split in ("test", "val", "train")) == sizes


@pytest.mark.parametrize(("total", "options"), [(2, {}), (0, {}), (10, {"num_test": 10}), (10, {"num_val": 9})])
def test_too_few_goals_are_refused(total, options):
    with pytest.raises(UserError, match=f"{total} goals cannot be split"):
        GoalTable([total], **options)
