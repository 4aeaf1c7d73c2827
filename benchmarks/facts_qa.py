"""How many searches the questions of make-facts-qa need: BM25 with the question alone, and with a search for each step.

    python benchmarks/facts_qa.py [--top_k 3] [--seed 0]

Makes the corpus with the default options (seconds, no download) and prints a table over the questions of all splits.
- one search: the question as it stands. `answer`: an answer stands in what was found; a short one can do so by chance.
  `all passages`: all passages that are needed were found.
- a search a step: for each passage that is needed, what an agent can ask once it knows whom to ask about: the passage's
  title without its number, and what is looked for (`Austria: Geography highest point`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import bm25s

from lit_agentrl.envs.search.facts.command import Options, build
from lit_agentrl.envs.search.facts.questions import KINDS
from lit_agentrl.envs.search.facts.texts import holds
from lit_agentrl.errors import UserError

WORDS = {
    "capital": "capital name",
    "highest_point": "elevation highest point",
    "lowest_point": "elevation lowest point",
    "anthem": "national anthem title",
    "lyricist": "national anthem lyrics music",
    "composer": "national anthem lyrics music",
    "independence": "independence",
    "holiday": "national holiday",
    "local_name": "country name local short form",
    "longest_border": "land boundaries border countries",
    "only_neighbour": "land boundaries border countries",
    "area": "area total",
}
"""What is looked for, by relation, in the Factbook's words; the other passages are found by their titles."""


def main() -> None:
    """Make the corpus, search it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--top_k", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    try:
        files, _ = build(Options(seed=parsed.seed))
    except UserError as error:  # 2 is what `make bench` takes for "cannot run here"
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    manifest = json.loads(files["manifest.json"])
    corpus = [json.loads(line) for line in files["corpus.jsonl"].splitlines()]
    questions = [
        json.loads(line) for split in ("train", "val", "test") for line in files[f"{split}.jsonl"].splitlines()
    ]
    index = bm25s.BM25()
    index.index(bm25s.tokenize([passage["contents"] for passage in corpus], show_progress=False), show_progress=False)

    def search(queries: Sequence[str]) -> list[list[dict[str, Any]]]:
        tokens = bm25s.tokenize(list(queries), show_progress=False)
        return [
            [corpus[row] for row in rows] for rows in index.retrieve(tokens, k=parsed.top_k, show_progress=False)[0]
        ]

    versions = ", ".join(f"{name} {package['version']}" for name, package in manifest["packages"].items())
    print(f"{len(corpus)} passages, {len(questions)} questions, top {parsed.top_k}, seed {parsed.seed}; {versions}\n")
    print("| kind | questions | one search: answer | one search: all passages | a search a step: all passages |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        asked = [question for question in questions if question["type"] == kind]
        rates = [_rates(question, found, search) for question, found in zip(asked, search(_texts(asked)), strict=True)]
        shares = " | ".join(f"{100 * sum(column) / len(asked):.0f} %" for column in zip(*rates, strict=True))
        print(f"| `{kind}` | {len(asked)} | {shares} |")


def _texts(questions: Sequence[dict[str, Any]]) -> list[str]:
    return [question["question"] for question in questions]


def _rates(question: dict[str, Any], found: list[dict[str, Any]], search: Any) -> tuple[bool, bool, bool]:
    """Answer found, all passages found, and all found by a search a step."""
    needed = set(question["gold_ids"])
    titles = {re.sub(r" \(\d+\)$", "", title) for title in question["supporting_titles"]}
    sought = {WORDS.get(part, "") for part in re.split(r" > ", question["template"].removeprefix("by "))}
    steps = search([f"{title} {words}" for title in sorted(titles) for words in sorted(sought)])
    return (
        any(holds(passage["contents"], question["golden_answers"]) for passage in found),
        needed <= {passage["id"] for passage in found},
        needed <= {passage["id"] for passages in steps for passage in passages},
    )


if __name__ == "__main__":
    main()
