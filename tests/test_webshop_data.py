"""The shop on real data: 100 of WebShop's products, with the attributes and instructions of its small set."""

import json
from pathlib import Path

import pytest

from lit_agentrl.envs import WebShopSuite
from lit_agentrl.envs.webshop.catalogue import open_catalogue
from lit_agentrl.envs.webshop.oracle import plan
from lit_agentrl.envs.webshop.sources import find_sources

pytest.importorskip("bm25s", reason="needs the webshop extra: pip install 'lit-agentrl[webshop]'")

FOLDER = Path(__file__).parent.parent.parent / "shared" / "data" / "webshop"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real WebShop records are not beside the checkout")


@pytest.fixture(scope="module")
def suite() -> WebShopSuite:
    return WebShopSuite(str(FOLDER), "synthetic")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "products.jsonl").read_text().splitlines()]


def test_products_are_read_as_the_official_code_reads_them(records):
    """Its own search texts, prices, options and attributes are in the records."""
    catalogue = open_catalogue(find_sources(str(FOLDER), "small", "synthetic"))
    assert len(catalogue) == len(records) == 100
    for row, item in enumerate(records):
        product, official = catalogue.product(row), item["product"]
        assert product.asin == item["id"]
        assert product.search_text == item["contents"]
        assert (product.price_tag, list(product.pricing)) == (official["Price"], official["pricing"])
        assert {name: list(values) for name, values in product.options} == official["options"]
        assert set(product.attributes) == set(official["Attributes"]) - {"DUMMY_ATTR"}


def test_forty_four_products_give_501_goals(suite):
    tasks = {split: suite.tasks(split) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in tasks.items()} == {"train": 351, "val": 50, "test": 100}
    goals = [suite.goal(task) for found in tasks.values() for task in found]
    assert len({goal.product.asin for goal in goals}) == 44
    assert {suite.kind(task) for task in tasks["test"]} <= {"beauty", "fashion", "garden", "electronics", "grocery"}


def test_the_one_human_instruction_of_the_records_is_a_goal():
    suite = WebShopSuite(str(FOLDER), "human", num_test=0, num_val=0)
    (task,) = suite.tasks("train")
    goal = suite.goal(task)
    assert goal.product.asin == "B07FYPSNH8"
    assert goal.instruction.startswith("i am looking for a gluten free, 100% vegan plant based protein shake")
    assert suite.make(task).success is False
    assert len(suite.walkthrough(task)) == 3


def test_every_goal_is_bought_for_a_score_of_one(suite):
    """By words of the instruction, in at most 6 actions."""
    for split in ("train", "val", "test"):
        for task in suite.tasks(split):
            environment = suite.make(task)
            environment.reset()
            for _, reply in suite.walkthrough(task, held_out=True):
                observation, reward, done = environment.step(reply)
                assert observation.valid
            assert (reward, done, environment.score) == (10.0, True, 1.0)
            assert observation.task == suite.goal(task).instruction


def shopping(suite: WebShopSuite, asin: str, **options: str) -> tuple[object, list[str]]:
    """An environment for the goal with these options, and the actions that win it."""
    tasks = [task for split in ("train", "val", "test") for task in suite.tasks(split)]
    goals = {task: suite.goal(task) for task in tasks}
    task = next(t for t, goal in goals.items() if goal.product.asin == asin and dict(goal.options) == options)
    environment = suite.make(task)
    environment.reset()
    actions = plan(suite._site, suite.goal(task))
    assert actions is not None
    return environment, actions


def buy(environment, actions: list[str]) -> float:
    for action in actions:
        observation, reward, done = environment.step(action)
        assert observation.valid, action
    assert done
    assert reward == 10.0 * (environment.score == 1.0)
    return environment.score


DRESS = {"size": "medium", "color": "red"}
"""Of B08ZRR3DZT, a dress for 2 attributes and 2 options: 5 parts."""


@pytest.mark.parametrize(
    ("wrong", "score"),
    [
        ({}, 5 / 5),
        ({"red": "khaki"}, 4 / 5),
        ({"red": "khaki", "medium": "small"}, 3 / 5),
    ],
)
def test_a_wrong_option_costs_its_part(suite, wrong, score):
    environment, actions = shopping(suite, "B08ZRR3DZT", **DRESS)
    for right, other in wrong.items():
        actions = [f"click[{other}]" if action == f"click[{right}]" else action for action in actions]
    assert buy(environment, actions) == score


SHOES = {"size": "12", "color": "black | white"}
"""Of B01DJGWDBA: memory foam, rubber sole, two options and a limit of 70 dollars: 5 parts."""


@pytest.mark.parametrize(
    ("goal", "options", "query", "bought", "score"),
    [
        # Clogs for 74.95: both attributes, no option, above the limit; one word of 7 and two category levels in common.
        (
            "B01DJGWDBA",
            SHOES,
            "skechers women's relaxed fit commute clog",
            "B09S6VN97V",
            1.0 * (2 + 0 + 0) / 5,
        ),
        # Another dress for at most 11.99: the titles share "women" and "dress" of 12 words, which is not above 0.2.
        ("B08ZRR3DZT", DRESS, "wytong women dress swing dress", "B095SX6366", 0.5 * (1 + 0 + 1) / 5),
        # A tunic: "women" alone of 12 words is below 0.1, and its one attribute and the price are worth a tenth.
        ("B08ZRR3DZT", DRESS, "viracy casual flowy tunic shirt", "B07MGB73NJ", 0.1 * (1 + 0 + 1) / 5),
        # A console table for 877.80: no word in common.
        ("B08ZRR3DZT", DRESS, "vhomes reclaimed wood console table", "B06Y3VLDFB", 0.0),
    ],
)
def test_other_products_score_by_the_formula(suite, goal, options, query, bought, score):
    environment, _ = shopping(suite, goal, **options)
    assert buy(environment, [f"search[{query}]", f"click[{bought}]", "click[Buy Now]"]) == pytest.approx(
        score, abs=1e-12
    )
