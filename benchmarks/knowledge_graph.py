"""What the knowledge graph costs: building it, its files, retrieval, and judging answers.

    python benchmarks/knowledge_graph.py [--seconds 2]

Builds the default graph (needs the extra `kg`; no download) and prints two tables. Times are of one core's work, what
else runs left out; of three runs the best is printed. Answers are the notes' own sentences, so that they are full of
facts: `short` has 5 of them, `long` 25. Each is different from all before it, so that nothing is answered from a cache
but what belongs to the disease and the question.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from lit_agentrl.errors import UserError
from lit_agentrl.knowledge import FactScorer, KnowledgeGraph, join, note_diseases, notes_part, retrieve
from lit_agentrl.knowledge.hpo import read_hpo
from lit_agentrl.knowledge.icd import read_icd
from lit_agentrl.knowledge.notes import read_notes

QUESTION = "What is the treatment?"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each rate")
    seconds = parser.parse_args().seconds
    try:
        parts = [read_hpo(), read_icd(), notes_part()]
    except UserError as error:  # 2 is what `make bench` takes for "cannot run here"
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    graph = join(parts)
    print("| | CPU seconds |\n|---|---|")
    for name, act in (("read hpo", read_hpo), ("read icd", read_icd), ("read notes", fresh_notes)):
        print(f"| {name} | {best(act):.2f} |")
    print(
        f"| join: {len(graph):,} edges, {graph.network.number_of_nodes():,} names | {best(lambda: join(parts)):.2f} |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("graphml", "parquet"):
            path = Path(folder) / f"kg.{ending}"
            saved = best(lambda path=path: graph.save(path))
            print(f"| save {ending}: {path.stat().st_size / 1e6:.1f} MB | {saved:.2f} |")
            print(f"| load {ending} | {best(lambda path=path: KnowledgeGraph.load(path)):.2f} |")
    print(f"| make a scorer | {best(lambda: FactScorer(graph)):.2f} |")
    rates(graph, seconds)


def fresh_notes() -> None:
    """The notes, not from the cache."""
    read_notes.cache_clear()
    read_notes()


def best(act: Callable[[], object]) -> float:
    """Seconds of the best of three runs."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        act()
        taken.append(time.process_time() - start)
    return min(taken)


def rates(graph: KnowledgeGraph, seconds: float) -> None:
    """Answers judged and questions answered, per second."""
    scorer, rng = FactScorer(graph), random.Random(0)
    said = {name: sorted({edge.sentence for edge in graph.edges_of(name) if edge.sentence}) for name in note_diseases()}
    print("\n| | words | facts read | per CPU second |\n|---|---|---|---|")
    for kind, size in (("short", 5), ("long", 25)):
        answers = [(name, " ".join(rng.choices(said[name], k=size))) for name in note_diseases()]
        number = count()

        def judge(answers: list[tuple[str, str]] = answers, number: count[int] = number) -> None:
            name, answer = answers[(at := next(number)) % len(answers)]
            scorer.score(f"{answer} {at}", name, QUESTION)

        words = sum(len(answer.split()) for _, answer in answers) / len(answers)
        facts = sum(scorer.score(answer, name, QUESTION).num_facts for name, answer in answers) / len(answers)
        print(f"| {kind} answers judged | {words:.0f} | {facts:.0f} | {per_second(judge, seconds):,.0f} |")
    asked = per_second(lambda: retrieve(graph, "melanoma", QUESTION), seconds)
    print(f"| questions retrieved for (BM25, {len(graph.edges_of('melanoma'))} edges) | | | {asked:,.0f} |")


def per_second(act: Callable[[], object], seconds: float) -> float:
    """How often it can be done."""
    start, times = time.process_time(), 0
    while time.process_time() - start < seconds:
        act()
        times += 1
    return times / (time.process_time() - start)


if __name__ == "__main__":
    main()
