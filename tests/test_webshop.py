"""Visits to the shop: pages word for word, clicks, purchases, anchors, walkthroughs, threads, the demo catalogue."""

import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lit_agentrl.cli import main
from lit_agentrl.envs import WebShopSuite
from lit_agentrl.envs.pool import EnvironmentPool
from lit_agentrl.envs.webshop import demo
from lit_agentrl.envs.webshop import suite as suite_module
from lit_agentrl.envs.webshop.catalogue import open_catalogue
from lit_agentrl.envs.webshop.environment import PageLimit, WebShopEnvironment
from lit_agentrl.envs.webshop.sources import find_sources
from lit_agentrl.errors import UserError
from lit_agentrl.types import RestorableEnvironment
from tiny import build_tiny_lm
from webshop_parts import HUMAN, RECORDS, SHIRT, record, write_shop

pytest.importorskip("bm25s", reason="needs the webshop extra: pip install 'lit-agentrl[webshop]'")

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write_shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def suite(folder) -> WebShopSuite:
    return WebShopSuite(folder, "synthetic", num_test=3, num_val=2)


def everything(suite: WebShopSuite) -> list[str]:
    return [task for split in SPLITS for task in suite.tasks(split)]


def task_for(suite: WebShopSuite, asin: str, *options: str) -> str:
    """The task that asks for a product with these option values."""
    found = {task: suite.goal(task) for task in everything(suite)}
    return next(t for t, g in found.items() if g.product.asin == asin and {v for _, v in g.options} == set(options))


def visit(suite: WebShopSuite, task: str, *actions: str) -> WebShopEnvironment:
    """The environment after some actions that all were possible."""
    environment = suite.make(task)
    environment.reset()
    for action in actions:
        observation, _, _ = environment.step(action)
        assert observation.valid is True, action
    return environment


def test_pages_word_for_word(suite):
    """The text mode of the official site: separators, order and buttons."""
    task = task_for(suite, "B00000SHRT", "red", "small")
    instruction = suite.goal(task).instruction
    environment = suite.make(task)
    first = environment.reset()
    assert first.text == f"WebShop [SEP] Instruction: [SEP] {instruction} [SEP] Search\nActions:\nsearch[<your query>]"
    assert (first.state, first.task, first.valid, first.actions) == (
        "Search", instruction, None, ("search[<your query>]",),
    )  # fmt: skip
    results, reward, done = environment.step("search[Acme   cotton SHIRTS, polo]")
    assert results.text.startswith(f"Instruction: [SEP] {instruction} [SEP] Back to Search [SEP] Page 1 (Total results")
    assert results.state.startswith(
        "Back to Search [SEP] Page 1 (Total results: 27) [SEP] Next > [SEP] B00000SHRT [SEP] Acme Cotton Shirt [SEP] "
        "$25.0 [SEP] B00000POLO [SEP] Bravo Polo Shirt [SEP] $62.5 [SEP] B000000000 [SEP]"
    )
    assert results.actions[:4] == ("click[Back to Search]", "click[Next >]", "click[B00000SHRT]", "click[B00000POLO]")
    assert len(results.actions) == 12
    assert (results.system, results.valid, reward, done) == ("", True, 0.0, False)
    item, _, _ = environment.step("click[b00000shrt]")
    assert item.state == (
        "Back to Search [SEP] < Prev [SEP] size [SEP] small [SEP] large [SEP] color [SEP] red [SEP] blue | white [SEP] "
        "Acme Cotton Shirt [SEP] Price: $25.0 [SEP] Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] "
        "Buy Now"
    )
    assert item.text.endswith("\nActions:\n" + "\n".join(item.actions))
    assert item.actions == tuple(
        f"click[{label}]" for label in (
            "Back to Search", "< Prev", "Description", "Features", "Reviews", "Buy Now", "small", "large", "red",
            "blue | white",
        )
    )  # fmt: skip
    for label, text in [
        ("Description", "Soft and warm."),
        ("Features", "Wash it hot  [SEP] Sleeves are long "),
        ("Reviews", "No reviews found"),
    ]:
        page, _, _ = environment.step(f"click[{label}]")
        assert page.state == f"Back to Search [SEP] < Prev [SEP] {text}"
        assert page.actions == ("click[Back to Search]", "click[< Prev]")
        environment.step("click[< Prev]")
    bought, reward, done = environment.step("click[Buy Now]")
    assert (bought.state, bought.actions, reward, done) == ("Thank you for shopping with us!", (), 0.0, True)


def test_the_attributes_page_is_an_option(folder):
    suite = WebShopSuite(folder, "synthetic", num_test=1, num_val=1, show_attributes=True)
    environment = visit(suite, task_for(suite, "B00000POLO", "red", "small"), "search[polo]", "click[B00000POLO]")
    page, _, _ = environment.step("click[attributes]")
    assert page.state == "Back to Search [SEP] < Prev [SEP] machine wash"


def test_results_are_paged_by_ten(suite):
    environment = visit(suite, suite.tasks("train")[0], "search[shirt]")
    shown = []
    for number in (1, 2, 3):
        observation = environment._observe(None)
        assert f"Page {number} (Total results: 27)" in observation.state
        shown += [a[6:-1] for a in observation.actions if a.startswith("click[B0")]
        assert ("click[Next >]" in observation.actions, "click[< Prev]" in observation.actions) == (
            number < 3,
            number > 1,
        )
        environment.step("click[Next >]")
    assert len(shown) == len(set(shown)) == 27
    assert environment.page.number == 3  # there is no fourth page
    assert environment.step("click[< prev]")[0].valid
    assert environment.page.number == 2


@pytest.mark.parametrize(
    ("chosen", "score", "reward"),
    [
        (["red", "small"], 1.0, 10.0),
        (["small", "large", "blue | white", "red", "small"], 1.0, 10.0),  # the last choice of a list counts
        (["red", "large"], 4 / 5, 0.0),
        ([], 3 / 5, 0.0),
    ],
)
def test_buying_pays_for_a_perfect_purchase_only(suite, folder, chosen, score, reward):
    task = task_for(suite, "B00000SHRT", "red", "small")
    way = ["search[acme]", "click[B00000SHRT]", *(f"click[{value}]" for value in chosen)]
    environment = visit(suite, task, *way)
    assert (environment.score, environment.success) == (None, False)
    _, paid, done = environment.step("click[Buy Now]")
    assert (environment.score, paid, done, environment.success) == (score, reward, True, score == 1.0)
    graded = WebShopSuite(folder, "synthetic", num_test=3, num_val=2, reward="score")
    assert visit(graded, task, *way).step("click[Buy Now]")[1] == score


def test_a_sold_visit_stays_over(suite):
    environment = visit(suite, suite.tasks("train")[0], "search[acme]", "click[B00000SHRT]", "click[Buy Now]")
    observation, reward, done = environment.step("click[Back to Search]")
    assert (observation.valid, reward, done) == (False, 0.0, True)


@pytest.mark.parametrize(
    ("way", "reply"),
    [
        ([], "click[Search]"),
        ([], "search[]"),
        ([], "search[  ]"),
        ([], "click[Back to Search]"),
        ([], "cotton shirt"),
        ([], "I would search[shirt] now"),
        ([], ""),
        (["search[shirt]"], "search[polo]"),  # no search bar on this page
        (["search[shirt]"], "click[B0000TABLE]"),  # not among the results
        (["search[shirt]"], "click[< Prev]"),  # this is the first page
        (["search[shirt]"], "click[Buy Now]"),
        (["search[acme]", "click[B00000SHRT]"], "click[green]"),  # outside the list
        (["search[acme]", "click[B00000SHRT]"], "click[size]"),
        (["search[acme]", "click[B00000SHRT]"], "click[Next >]"),
        (["search[acme]", "click[B00000SHRT]", "click[Features]"], "click[Buy Now]"),
    ],
)
def test_what_is_not_possible_shows_the_page_again(suite, way, reply):
    environment = visit(suite, suite.tasks("train")[0], *way)
    before, anchor = environment._observe(False), environment.anchor
    observation, reward, done = environment.step(reply)
    assert (observation, reward, done) == (before, 0.0, False)
    assert (observation.valid, environment.anchor) == (False, anchor)


@pytest.mark.parametrize(
    ("style", "reply"),
    [
        ("plain", "\n Search[acme] \nthen more"),
        ("plain", "> `search [acme]`."),
        ("tagged", "<think>click[x]? <action>click[y]</action></think><action>search[acme]</action>"),
    ],
)
def test_replies_that_mean_an_action(folder, style, reply):
    suite = WebShopSuite(folder, "synthetic", action_format=style)
    environment = suite.make(suite.tasks("train")[0])
    assert ("<action>" in environment.reset().system) == (style == "tagged")
    assert environment.step(reply)[0].valid is True
    assert environment.page.query == "acme"


def test_anchors_are_the_page_with_its_choices(suite):
    """What the text does not show tells states apart; the way that led to a state does not."""
    task = task_for(suite, "B00000SHRT", "red", "small")
    item = ["search[acme]", "click[B00000SHRT]"]
    plain, red = visit(suite, task, *item), visit(suite, task, *item, "click[red]")
    assert plain._observe(None).state == red._observe(None).state
    assert plain.anchor != red.anchor
    same = [
        visit(suite, task, *item, "click[small]", "click[red]"),
        visit(suite, task, *item, "click[red]", "click[small]"),
        visit(
            suite, task, *item, "click[blue | white]", "click[small]", "click[Features]", "click[< Prev]", "click[red]"
        ),
        visit(suite, task, "search[shirt]", "click[Back to Search]", *item, "click[red]", "click[small]"),
    ]
    assert len({environment.anchor for environment in same}) == 1
    assert visit(suite, task, *item, "click[red]", "click[< Prev]", "click[B00000SHRT]").anchor == plain.anchor
    assert visit(suite, task, *item, "click[Back to Search]").anchor == visit(suite, task).anchor
    assert visit(suite, task).anchor != visit(suite, suite.tasks("train")[0]).anchor or task == suite.tasks("train")[0]


def test_snapshot_and_restore(suite):
    task = task_for(suite, "B00000SHRT", "red", "small")
    environment = visit(suite, task, "search[acme]", "click[B00000SHRT]", "click[red]")
    assert isinstance(environment, RestorableEnvironment)
    saved, anchor = environment.snapshot(), environment.anchor
    assert environment.step("click[Buy Now]")[1:] == (0.0, True)
    environment.restore(saved)
    assert (environment.anchor, environment.score) == (anchor, None)
    environment.step("click[small]")
    assert environment.step("click[Buy Now]")[1:] == (10.0, True)
    other = suite.make(task)
    other.restore(saved)
    assert other.anchor == anchor


def test_a_value_of_two_lists_can_be_chosen_in_both(tmp_path):
    twice = record("B00000SHRT", "Twice Shirt", options={"Front": ["Red", "Blue"], "Back": ["Red", "Buy Now"]})
    suite = WebShopSuite(write_shop(tmp_path, [twice]), "synthetic", num_test=0, num_val=1)
    environment = visit(suite, suite.tasks("val")[0], "search[twice]", "click[B00000SHRT]", "click[red]")
    assert environment.page.options == (("front", "red"),)
    environment.step("click[red]")
    assert environment.page.options == (("front", "red"), ("back", "red"))
    assert environment.step("click[buy now]")[2]  # a value that is called like a button is hidden by it
    won = visit(suite, suite.tasks("val")[0], "search[twice]", "click[B00000SHRT]", "click[blue]", "click[red]")
    assert won.page.options == (("front", "blue"), ("back", "red"))


def test_long_pages_are_cut_in_the_middle_and_counted(folder):
    suite = WebShopSuite(folder, "synthetic", max_page_chars=200)
    environment = suite.make(suite.tasks("train")[0])
    assert environment.reset().state == "Search"
    assert suite.num_cut_pages == 0
    results, _, _ = environment.step("search[shirt]")
    whole = visit(WebShopSuite(folder, "synthetic"), suite.tasks("train")[0], "search[shirt]")._observe(None)
    surplus = len(whole.state) - 200
    assert results.state == f"{whole.state[:100]} [{surplus} characters cut] {whole.state[-100:]}"
    assert (results.actions, suite.num_cut_pages) == (whole.actions, 1)


@pytest.mark.parametrize("length", range(200, 206))
def test_cutting_keeps_the_promised_characters(length):
    text = "".join(chr(33 + n % 90) for n in range(length))
    cut = PageLimit(201).cut(text)
    if length <= 201:
        assert cut == text
    else:
        head, tail = cut.split(f" [{length - 201} characters cut] ")
        assert text == head + text[len(head) : len(head) + length - 201] + tail
        assert len(head) + len(tail) == 201


def test_splits_share_no_goal_and_are_stable(suite, folder):
    tasks = {split: suite.tasks(split) for split in SPLITS}
    assert [len(tasks[split]) for split in ("test", "val", "train")] == [3, 2, 7]
    goals = {
        split: {suite.goal(task).instruction + suite.goal(task).product.asin for task in tasks[split]}
        for split in tasks
    }
    assert sum(map(len, goals.values())) == len(set.union(*goals.values())) == 12
    assert {
        split: list(WebShopSuite(folder, "synthetic", num_test=3, num_val=2).tasks(split)) for split in SPLITS
    } == tasks
    assert tasks["test"] == ["test-0", "test-1", "test-2"]
    assert tasks["val"] == ["val-3", "val-4"]
    assert tasks["train"][0] == "train-5"


def test_what_there_is_to_buy_is_said(folder, caplog):
    with caplog.at_level("INFO", "lit_agentrl"):
        WebShopSuite(folder, "synthetic", num_test=4, num_val=1).tasks("train")
    assert "9 of 29 products carry a synthetic instruction, 12 goals (7 train, 1 val, 4 test)" in caplog.text
    assert "products asked for in test are also asked for in train" in caplog.text


def test_kinds_are_departments(suite):
    assert {suite.kind(task) for task in everything(suite)} == {"fashion", "garden"}
    assert suite.kind(task_for(suite, "B0000TABLE")) == "garden"


@pytest.mark.parametrize("task", ["test-3", "train-0", "val-x", "train-05", "other-5", "", "train--5", "5"])
def test_unknown_tasks_are_refused(suite, task):
    with pytest.raises(UserError, match="there are train-5 to train-11, val-3 to val-4, test-0 to test-2"):
        suite.make(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goals": "all"}, "goals='all'"),
        ({"reward": "dense"}, "reward='dense'"),
        ({"action_format": "json"}, "action_format='json'"),
        ({"max_page_chars": 10}, "max_page_chars=10"),
        ({"num_test": -1}, "num_test=-1"),
        ({"size": "full"}, r"lacks items_shuffle\.json, items_ins_v2\.json"),
    ],
)
def test_wrong_options_are_refused_at_once(folder, options, message):
    with pytest.raises(UserError, match=message):
        WebShopSuite(**{"folder": folder, "goals": "synthetic", **options})
    with pytest.raises(UserError, match="split='dev'"):
        WebShopSuite(folder, "synthetic").tasks("dev")


@pytest.mark.parametrize("package", ["bm25s", "rapidfuzz"])
def test_a_missing_package_names_the_extra(folder, package, monkeypatch):
    monkeypatch.setattr(suite_module, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=rf"`{package}`.*pip install 'lit-agentrl\[webshop\]'"):
        WebShopSuite(folder, "synthetic")


def test_the_packages_are_not_imported_before_a_shop_is_opened():
    """Every suite is imported with `lit_agentrl.envs`, with or without its extra."""
    code = "import sys, lit_agentrl.envs.webshop as w; print({'bm25s', 'rapidfuzz'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_catalogue_without_goals_is_refused(tmp_path):
    lines = tmp_path / "lines"
    write_shop(lines, human=None)
    (lines / "items_shuffle_1000.json").unlink()
    (lines / "products.jsonl").write_text(json.dumps({"product": SHIRT}))
    with pytest.raises(UserError, match=r"None of the 1 products .* has a human instruction"):
        WebShopSuite(str(lines), "human").tasks("train")


@pytest.mark.parametrize("style", ["plain", "tagged"])
def test_walkthroughs_win(folder, style):
    suite = WebShopSuite(folder, "synthetic", action_format=style)
    for task in everything(suite):
        environment = suite.make(task)
        observation, rewards = environment.reset(), []
        turns = suite.walkthrough(task, held_out=True)
        for expected, reply in turns:
            assert observation == expected
            observation, reward, done = environment.step(reply)
            assert observation.valid is True
            rewards.append(reward)
        assert (rewards, done, environment.success) == ([0.0] * (len(turns) - 1) + [10.0], True, True)
        query = turns[0][1].lower()
        assert suite.goal(task).attributes[0] in query  # searched for with words of the instruction
    with pytest.raises(UserError, match="'test-0' is held out"):
        suite.walkthrough("test-0")


def test_goals_that_cannot_be_won_are_told_and_can_be_left_out(folder, caplog):
    """People also asked for what their product does not have."""
    suite = WebShopSuite(folder, "human", num_test=1, num_val=1)
    lost = next(task for task in everything(suite) if "tall" in suite.goal(task).instruction)
    with pytest.raises(UserError, match="cannot be won"):
        suite.walkthrough(lost, held_out=True)
    with caplog.at_level("INFO", "lit_agentrl"):
        winnable = WebShopSuite(folder, "human", num_test=1, num_val=1, winnable_only=True)
        assert everything(winnable) == [task for task in everything(suite) if task != lost]
    assert "0 of 1 " in caplog.text
    for task in everything(winnable):
        assert winnable.walkthrough(task, held_out=True)
    assert sum(len(entries) for entries in HUMAN.values()) == 4  # one more asks for nothing and is no goal


def play(suite: WebShopSuite, task: str) -> list[object]:
    environment = suite.make(task)
    environment.reset()
    return [environment.step(reply) for _, reply in suite.walkthrough(task, held_out=True)] + [environment.anchor]


def test_sixteen_threads_share_one_catalogue(tmp_path, monkeypatch, caplog):
    """They all start at once, on files that nobody has read: these are read once, and all see what one sees."""
    monkeypatch.setenv("LIT_AGENTRL_CACHE", str(tmp_path / "cache"))
    folder = write_shop(tmp_path / "shop")
    suite, barrier = WebShopSuite(folder, "synthetic"), threading.Barrier(16)
    catalogues = set()

    def job(number: int) -> list[object]:
        barrier.wait(10)
        catalogues.add(open_catalogue(find_sources(folder, "small", "synthetic")))
        tasks = everything(suite)
        return play(suite, tasks[number % len(tasks)])

    with caplog.at_level("INFO", "lit_agentrl"):
        results = EnvironmentPool(num_workers=16, deadline_seconds=60).call([lambda n=n: job(n) for n in range(16)])
    assert results == [play(suite, everything(suite)[n % 12]) for n in range(16)]
    assert len(catalogues) == 1
    assert caplog.text.count("items_shuffle_1000.json read") == 1


def test_processes_see_the_same_shop(folder, tmp_path):
    """Two at once on an empty cache, with different string hashes: one builds, both read, and the texts are equal."""
    code = (
        "from lit_agentrl.envs.webshop import WebShopSuite\n"
        f"suite = WebShopSuite({folder!r}, 'synthetic')\n"
        "for split in ('train', 'val', 'test'):\n"
        "    for task in suite.tasks(split):\n"
        "        print(suite.walkthrough(task, held_out=True))\n"
    )
    environment = {**os.environ, "LIT_AGENTRL_CACHE": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**environment, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("1", "2")
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 1000
    assert len([path for path in (tmp_path / "webshop").iterdir() if path.is_dir()]) == 1


def test_a_used_suite_goes_to_another_process(suite):
    suite.walkthrough(suite.tasks("train")[0])
    again = pickle.loads(pickle.dumps(suite))
    assert play(again, again.tasks("train")[0]) == play(suite, suite.tasks("train")[0])


def test_a_forked_process_opens_its_own_connection(suite):
    """SQLite forbids that a child goes on with a connection of its parent."""
    task = suite.tasks("train")[0]
    expected = play(suite, task)
    child = os.fork()
    if child == 0:
        os._exit(0 if play(suite, task) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_demo_catalogue_is_a_shop(tmp_path, capsys):
    main(["make-webshop-demo", str(tmp_path / "demo"), "--num_products", "60", "--seed", "3"])
    assert "Synthetic, not WebShop's data" in capsys.readouterr().out
    assert "SYNTHETIC DATA" in (tmp_path / "demo" / "SYNTHETIC.txt").read_text()
    for goals in ("synthetic", "human"):
        suite = WebShopSuite(str(tmp_path / "demo"), goals)
        assert min(len(suite.tasks(split)) for split in SPLITS) >= 1
        assert len({suite.kind(task) for task in everything(suite)}) > 2
        for task in everything(suite)[::5]:
            assert len(suite.walkthrough(task, held_out=True)) <= 15


def test_demo_files_depend_on_the_seed_alone(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        demo.write_demo(tmp_path / name, 30, seed)
    texts = [(tmp_path / name / "items_shuffle_1000.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert len(json.loads(texts[0])) == 30


def test_demo_mistakes(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(SystemExit):
        main(["make-webshop-demo", str(tmp_path / "full")])
    assert "is not an empty folder: nothing was written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["make-webshop-demo", str(tmp_path / "new"), "--num_products", "3"])
    assert "num_products=3 is out of range" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_the_small_shop_has_what_these_tests_count_on():
    assert len(RECORDS) == 29


def test_the_documented_run_trains(tmp_path):
    """The YAML of docs/webshop.md, with the tiny model on the demo catalogue."""
    document = (Path(__file__).parent.parent / "docs" / "webshop.md").read_text()
    demo.write_demo(tmp_path / "demo", 40)
    config = tmp_path / "config.yaml"
    config.write_text(re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)[0])
    given = {
        "model.pretrained": build_tiny_lm(tmp_path / "lm", max_position_embeddings=2048),
        "data.environment.init_args.folder": tmp_path / "demo",
        "data.rollout.init_args.max_steps": 2,
        "data.sampling.max_new_tokens": 8,
        "data.max_length": 2048,
        "evaluation.num_tasks": 2,
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": tmp_path / "run",
    }
    main(["fit", "--config", str(config), *(word for k, v in given.items() for word in (f"--{k}", str(v)))])
    (transcripts,) = (tmp_path / "run" / "transcripts").glob("iteration_*.jsonl")
    assert transcripts.read_text().count("WebShop [SEP] Instruction: [SEP] Find me") >= 8
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
