"""make-facts-qa: every question is answered by its passages, step by step; no entity is asked about in two splits."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path

import pytest

from lit_agentrl.cli import main as cli
from lit_agentrl.envs.search.facts import sources
from lit_agentrl.envs.search.facts.command import Options, make_facts
from lit_agentrl.envs.search.facts.entities import Entity, Fact, Link
from lit_agentrl.envs.search.facts.folder import put
from lit_agentrl.envs.search.facts.passages import Corpus, Passage, cut
from lit_agentrl.envs.search.facts.questions import all_questions
from lit_agentrl.envs.search.facts.splits import PATCH, split_entities
from lit_agentrl.envs.search.facts.texts import day, holds, named, person, quoted, shares_word
from lit_agentrl.errors import UserError

SPLITS = ("train", "val", "test")
MANY = Options(num_train=20_000, num_val=20_000, num_test=20_000)
"""All questions there are of most kinds: the laws must hold for each of them."""


def missing() -> list[str]:
    absent = []
    for name in sources.PACKAGES:
        try:
            distribution(name)
        except PackageNotFoundError:
            absent.append(name)
    return absent


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the command makes by default."""
    if missing():
        pytest.skip(f"needs the facts extra: pip install --no-deps {' '.join(missing())}")
    path = tmp_path_factory.mktemp("facts") / "default"
    cli(["make-facts-qa", str(path)])
    return path


@pytest.fixture(scope="module")
def many(folder: Path) -> Path:
    """The same with all the questions that can be made."""
    path = folder.parent / "many"
    make_facts(path, MANY)
    return path


@pytest.fixture(scope="module")
def corpus(folder: Path) -> dict[str, str]:
    return {line["id"]: line["contents"] for line in lines(folder / "corpus.jsonl")}


@cache
def plain_words(text: str) -> str:
    """Words between spaces: the test's own idea of what stands in a text."""
    return " " + " ".join(re.sub(r"[\W_]+", " ", text.lower()).split()) + " "


def says(text: str, answers: list[str]) -> bool:
    return any(plain_words(answer) in plain_words(text) for answer in answers)


def test_the_folder_has_the_size_and_the_layout_it_promises(folder: Path, corpus: dict[str, str]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "corpus.jsonl", "manifest.json", "test.jsonl", "train.jsonl", "val.jsonl",
    ]  # fmt: skip
    assert 11_000 <= len(corpus) <= 13_000
    titles, texts = zip(*(contents.split("\n") for contents in corpus.values()), strict=True)
    assert len(set(titles)) == len(titles)
    assert all(re.fullmatch(r'"[^\n]+"', title) for title in titles)
    assert max(len(text.split()) for text in texts) <= 128
    assert 90 <= sum(len(text.split()) for text in texts) / len(texts) <= 110
    assert not [text for text in texts if re.search(r"</?(br|p|em|strong)\b|&(nbsp|amp|eacute|quot);", text)]
    for split, count in zip(SPLITS, (1400, 200, 400), strict=True):
        questions = lines(folder / f"{split}.jsonl")
        kinds = Counter(question["type"] for question in questions)
        assert len(questions) == count
        shares = {"single": 30, "two_hop": 35, "three_hop": 25, "comparison": 10}
        assert kinds == {kind: share * count // 100 for kind, share in shares.items()}


def test_the_manifest_tells_what_lies_beside_it(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["packages"].keys() == sources.PACKAGES.keys()
    for split in SPLITS:
        assert sum(manifest["questions"][split].values()) == len(lines(folder / f"{split}.jsonl"))
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert all(manifest["packages"][name]["version"] in (folder / "README.md").read_text() for name in sources.PACKAGES)


def test_the_answer_stands_in_the_last_passage_and_nowhere_before(many: Path, corpus: dict[str, str]) -> None:
    for question in (question for split in SPLITS for question in lines(many / f"{split}.jsonl")):
        *earlier, last = (corpus[gold] for gold in question["gold_ids"])
        answers = question["golden_answers"]
        assert says(last, answers), question
        assert not any(says(passage, answers) for passage in earlier), question
        assert not says(question["question"], answers), question
        titles = [corpus[gold].split("\n")[0].strip('"') for gold in question["gold_ids"]]
        assert question["supporting_titles"] == titles
        needed = {"single": [1], "two_hop": [2], "three_hop": [3], "comparison": [2, 3]}[question["type"]]
        assert len(set(titles)) == len(titles)
        assert len(titles) in needed


def test_questions_are_unlike_one_another_and_lead_to_one_answer(many: Path) -> None:
    questions = [question for split in SPLITS for question in lines(many / f"{split}.jsonl")]
    assert len({question["id"] for question in questions}) == len(questions)
    assert len({question["question"] for question in questions}) == len(questions) > 838


def test_no_entity_and_no_needed_passage_is_in_two_splits(many: Path) -> None:
    for field in ("entities", "gold_ids"):
        seen = [{item for question in lines(many / f"{split}.jsonl") for item in question[field]} for split in SPLITS]
        assert all(seen)
        assert sum(map(len, seen)) == len(set.union(*seen))


def test_a_clue_belongs_to_one_entry_of_the_whole_factbook(many: Path) -> None:
    """The slow way round: count the entries in whose field the value stands."""
    entries = sources.read_sources().factbook
    fields = {
        r"whose capital is (.+?)[?.]$": ("Government", "Capital, name"),
        r"whose highest point is (.+?)[?.]$": ("Geography", "Elevation, highest point"),
        r'anthem is titled "(.+?)"': ("Government", "National anthem(s), title"),
        r"became independent on (.+?)[?.]$": ("Government", "Independence"),
    }
    checked: Counter[str] = Counter()
    for question in (question for split in SPLITS for question in lines(many / f"{split}.jsonl")):
        for pattern, (section, field) in fields.items():
            if found := re.search(pattern, question["question"]):
                value = plain_words(found[1])
                assert sum(value in plain_words(entry.get(section, field)) for entry in entries) == 1, question
                checked[pattern] += 1
    assert len(checked) == len(fields)


def test_borders_are_those_of_the_passages(many: Path, corpus: dict[str, str]) -> None:
    """Whoever reads the first passage of a question by name finds the longest border there."""
    seen = 0
    for question in (question for split in SPLITS for question in lines(many / f"{split}.jsonl")):
        if question["template"] in ("by name > longest_border > name", "by name > only_neighbour > name"):
            text = re.sub(r"\([^)]*\)", "", corpus[question["gold_ids"][0]].split("border countries: ")[1])
            lengths = {
                name: float(number.replace(",", ""))
                for name, number in re.findall(r"([A-Z][\w' -]+?) ([\d,.]+) km", text.split(". Coastline")[0])
            }
            if "Russia" in lengths and "China" in question["question"]:
                continue  # they meet in two places
            assert max(lengths, key=lambda name: lengths[name]) in question["golden_answers"], question
            seen += 1
    assert seen > 80


def test_known_facts(many: Path) -> None:
    asked = {q["question"]: q["golden_answers"] for split in SPLITS for q in lines(many / f"{split}.jsonl")}
    known = {
        "capital of the only country that borders Portugal": "Madrid",
        "name of the country that has the longest land border with Austria": "Germany",
        "symbol of the element one atomic number above Iron": "Co",
        "symbol of the element one atomic number below Gold": "Pt",
        "capital of the country whose highest point is Mount Fuji": "Tokyo",
        "capital of whichever of Syria and Turkey has the larger area": "Ankara",
        "capital of the country of discovery of Tungsten": "Madrid",
    }
    checked = 0
    for phrase, answer in known.items():
        for question in (f"What is the {phrase}?", f"Give the {phrase}.", f"Which city is the {phrase}?"):
            if question in asked:  # its entities may lie in different splits
                assert asked[question][0] == answer
                checked += 1
    assert checked >= 4


def test_equal_packages_and_seed_make_equal_bytes(folder: Path, tmp_path: Path) -> None:
    """In another process with another order of sets; another seed makes other questions about the same corpus."""
    command = [sys.executable, "-m", "lit_agentrl", "make-facts-qa"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([*command, str(tmp_path / "again")], env=environment, check=True, capture_output=True)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    make_facts(tmp_path / "other", Options(seed=1))
    assert (tmp_path / "other" / "corpus.jsonl").read_bytes() == (folder / "corpus.jsonl").read_bytes()
    assert (tmp_path / "other" / "test.jsonl").read_bytes() != (folder / "test.jsonl").read_bytes()


def test_fewer_questions_than_asked_for_are_counted(many: Path) -> None:
    manifest = json.loads((many / "manifest.json").read_text())
    there = Counter(question["type"] for question in lines(many / "val.jsonl"))
    assert manifest["questions_missing"]["val"]["comparison"] == 2000 - there["comparison"] > 0
    assert manifest["questions"]["val"] == manifest["questions_offered"]["val"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    made = {"manifest.json": '{"maker": "lit-agentrl make-facts-qa"}', "train.jsonl": "a"}
    path = tmp_path / "facts"
    assert put(path, made, overwrite=False)
    assert not put(path, made, overwrite=False)  # there already
    changed = made | {"train.jsonl": "b"}
    with pytest.raises(UserError, match="--overwrite"):
        put(path, changed, overwrite=False)
    assert (path / "train.jsonl").read_text() == "a"
    assert put(path, changed, overwrite=True)
    assert (path / "train.jsonl").read_text() == "b"
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="did not make it"):
        put(tmp_path / "mine", made, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        put(tmp_path / "mine" / "thesis.txt", made, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failed_write_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    made = {"manifest.json": '{"maker": "lit-agentrl make-facts-qa"}', "train.jsonl": "a"}
    put(tmp_path / "facts", made, overwrite=False)
    with pytest.raises(OSError, match="too long"):
        put(
            tmp_path / "facts", made | {"train.jsonl": "b", "x" * 300: "no file system takes this name"}, overwrite=True
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts"]
    assert (tmp_path / "facts" / "train.jsonl").read_text() == "a"


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "PACKAGES", {"no-such-package-here": "data"})
    with pytest.raises(SystemExit):
        cli(["make-facts-qa", str(tmp_path / "facts")])
    said = capsys.readouterr().err
    assert "no-such-package-here" in said
    assert "lit-agentrl[facts]" in said
    assert not (tmp_path / "facts").exists()


@pytest.mark.parametrize("option", [{"num_val": -1}, {"num_test": 20_001}, {"max_words": 63}])
def test_options_out_of_range_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(option))):
        Options(**option)


def test_long_texts_are_cut_between_sentences_if_they_can_be() -> None:
    text = "One two three. Four five six. Seven eight; nine ten, eleven twelve thirteen."
    assert list(cut(text, 6)) == ["One two three. Four five six.", "Seven eight;", "nine ten, eleven twelve thirteen."]
    assert list(cut(text, 100)) == [text]
    for words in range(1, 14):
        pieces = list(cut(text, words))
        assert " ".join(pieces) == text
        assert max(len(piece.split()) for piece in pieces) <= words


def test_fields_are_packed_in_order_and_only_whole_ones_have_a_place() -> None:
    corpus = Corpus(words=6)
    corpus.add("r", "Title", [("a", "one two"), ("b", "three"), ("c", "four five six. seven eight nine")])
    assert [passage.contents for passage in corpus.passages.values()] == [
        '"Title"\na: one two. b: three.',
        '"Title (2)"\nc: four five six.',
        '"Title (3)"\nc: seven eight nine.',
    ]
    assert corpus.places == {("r", "a"): "r/0", ("r", "b"): "r/0"}


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (named, "Hanoi (Ha Noi)", ("Hanoi", "Ha Noi")),
        (named, "Pretoria (administrative capital); Cape Town (legislative capital)", ()),
        (named, "unnamed elevation", ()),
        (named, "Fogo (a volcano on Fogo Island)", ("Fogo",)),
        (named, "Maputo and Beira", ()),
        (quoted, '"Kassaman" (We Pledge)', ("Kassaman", "We Pledge")),
        (quoted, '"Surudi milli" (National Anthem)', ("Surudi milli",)),
        (quoted, '"One" and "Two"', ()),
        (person, "Sir Humphrey Davy", ("Sir Humphrey Davy", "Humphrey Davy")),
        (person, "André Debierne", ("André Debierne", "Andre Debierne")),
        (person, "A. Ghiorso, et al", ()),
        (person, "no lyrics", ()),
        (person, "unknown", ()),
        (lambda text: day(text, with_year=True), "5 July 1962 (from France)", ("5 July 1962", "July 5, 1962")),
        (lambda text: day(text, with_year=True), "1 May 1910 (union); 11 December 1931 (statute)", ()),
        (lambda text: day(text, with_year=False), "Independence Day, 5 July (1962)", ("5 July", "July 5")),
        (lambda text: day(text, with_year=False), "A Day, 5 July (1962); B Day, 1 May (1954)", ()),
    ],
)
def test_what_is_read_out_of_the_sources_wording(read, text: str, value: tuple[str, ...]) -> None:
    assert read(text) == value


def test_words_are_found_whole() -> None:
    assert holds("lyrics: Mufdi ZAKARIAH/Mohamed FAWZI.", ["Mohamed Fawzi"])
    assert not holds("Nigeria 5 km", ["Niger"])
    assert not holds("anything", ["", "..."])
    assert shares_word("Guatemala", ["Guatemala City"])
    assert not shares_word("the CAS number 7440-41-7", ["7440-42-8"])


def country(code: str, capital: str, clue: bool = True) -> Entity:
    fact = Fact((capital,), f"{code}/capital", clue)
    return Entity(code, "country", code, (code,), facts={"capital": fact})


def passages(**texts: str) -> dict[str, Passage]:
    made = {name.replace("_", "/"): text for name, text in texts.items()}
    return {name: Passage(name, name, text) for name, text in made.items()}


def test_questions_of_two_countries_by_hand() -> None:
    """Aland borders Bland and no other; where both can be asked the same, the later one, Bland, is what is compared."""
    one, two = country("Aland", "Ay"), country("Bland", "Bee")
    one.links["only_neighbour"] = Link("Bland", ("Aland/borders",))
    texts = passages(Aland_capital="capital Ay", Aland_borders="borders Bland", Bland_capital="capital Bee")
    left_out: Counter[str] = Counter()
    found = {(q.template, q.kind): (q.answers, q.gold) for q in all_questions([one, two], texts, left_out)}
    assert found == {
        ("by name > capital", "single"): (("Bee",), ("Bland/capital",)),
        ("by name > only_neighbour > capital", "two_hop"): (("Bee",), ("Aland/borders", "Bland/capital")),
        ("by name > only_neighbour > name", "single"): (("Bland",), ("Aland/borders",)),
        ("by capital > name", "single"): (("Bland",), ("Bland/capital",)),
        ("by capital > only_neighbour > capital", "three_hop"): (
            ("Bee",),
            ("Aland/capital", "Aland/borders", "Bland/capital"),
        ),
        ("by capital > only_neighbour > name", "two_hop"): (("Bland",), ("Aland/capital", "Aland/borders")),
    }
    assert not left_out


def test_a_shortcut_is_no_question_of_two_hops() -> None:
    one, two = country("Aland", "Ay"), country("Bland", "Bee")
    one.links["only_neighbour"] = Link("Bland", ("Aland/borders",))
    texts = passages(Aland_capital="Ay", Aland_borders="Bland, whose capital is Bee", Bland_capital="Bee")
    left_out: Counter[str] = Counter()
    kinds = [q.template for q in all_questions([one, two], texts, left_out)]
    assert "by name > only_neighbour > capital" not in kinds
    assert left_out["questions: an earlier passage holds the answer"] == 2


def test_linked_entities_stay_together_and_both_kinds_are_held_out() -> None:
    chain = [Entity(f"e{i}", "element", f"E{i}", ()) for i in range(100)]
    for one, other in pairwise(chain):
        one.links["next"] = Link(other.id, ())
    islands = [Entity(f"c{i}", "country", f"C{i}", ()) for i in range(100)]
    places = split_entities([*chain, *islands], random.Random(0))
    for group in (chain, islands):
        counts = Counter(places[entity.id] for entity in group)
        assert abs(counts["test"] - 25) <= PATCH / 2
        assert abs(counts["val"] - 15) <= PATCH / 2
    apart = sum(places[one.id] != places[other.id] for one, other in pairwise(chain))
    assert apart < 100 / PATCH * 3
