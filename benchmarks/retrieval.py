"""What BM25 over 100,000 passages costs: to index once, to open, and to ask, alone and from workers side by side.

    python benchmarks/retrieval.py [--passages 100000] [--words 100] [--queries 500] [--workers 4]

The passages are random words whose frequencies fall as those of a language do (the n-th has a share of 1/n), 100 words
each, as in Search-R1's Wikipedia. A query is 8 words of one passage, so common words, which have to be looked up in
nearly every passage, are in it as often as in the text: there are no stop words among made-up ones. Each measurement
runs in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

import bm25s
import numpy as np

from lit_agentrl.retrieval import BM25Retriever

VOCABULARY = 200_000
QUERY_WORDS = 8
TOP_K = 3
COLUMNS = (
    "processes",
    "ms to open",
    "ms a query: median",
    "p95",
    "of a core: median",
    "p95",
    "MB resident",
    "of them its own",
)


def write_corpus(path: Path, passages: int, words: int) -> list[str]:
    """Passages of random words; gives a query from each of the first."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    edges = np.cumsum(shares / shares.sum())
    queries = []
    with path.open("w") as file:
        for number in range(passages):
            drawn = [f"w{word}x" for word in np.searchsorted(edges, rng.random(words)).tolist()]
            contents = f'"{" ".join(drawn[:2])}"\n{" ".join(drawn[2:])}'
            file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")
            queries.append(" ".join(drawn[-QUERY_WORDS:]))
    return queries


def build(corpus: str, index: str, answers: multiprocessing.Queue[float]) -> None:
    """Seconds to index, those of a core, and the most megabytes resident."""
    began, worked = time.perf_counter(), time.process_time()
    BM25Retriever(corpus, index).prepare()
    answers.put(time.perf_counter() - began)
    answers.put(time.process_time() - worked)
    answers.put(memory("VmHWM", Path("/proc/self/status")))


def work(retriever: BM25Retriever, queries: Sequence[str], barrier: Barrier, answers: multiprocessing.Queue) -> None:
    """Seconds to open, of each query and of a core for each, and megabytes resident and written to."""
    import bm25s  # noqa: F401 -- imported before the clock starts: every worker pays it, with or without an index

    barrier.wait()
    began = time.perf_counter()
    retriever.prepare()
    opened = time.perf_counter() - began
    for query in queries[:50]:
        retriever.search([query], TOP_K)
    barrier.wait()
    seconds, core = [], []
    for query in queries:
        began, worked = time.perf_counter(), time.process_time()
        retriever.search([query], TOP_K)
        core.append(time.process_time() - worked)
        seconds.append(time.perf_counter() - began)
    barrier.wait()  # all have touched what they use
    rollup = Path("/proc/self/smaps_rollup")
    answers.put((opened, seconds, core, memory("Rss", rollup), memory("Private_Dirty", rollup)))
    barrier.wait()


def memory(name: str, path: Path) -> float:
    """A line of the system's account of a process, in megabytes."""
    (line,) = [line for line in path.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024 / 1e6


def measure(corpus: str, index: str, queries: Sequence[str], workers: int) -> str:
    """A line of the table."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(workers), context.Queue()
    retriever = BM25Retriever(corpus, index)
    processes = [context.Process(target=work, args=(retriever, queries, barrier, answers)) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    opened, seconds, core, resident, own = zip(*found, strict=True)
    cells = [str(workers), f"{1000 * statistics.median(opened):.0f}"]
    for column in (seconds, core):
        times = [1000 * value for values in column for value in values]
        cells += [f"{statistics.median(times):.2f}", f"{statistics.quantiles(times, n=20)[-1]:.2f}"]
    cells += [f"{statistics.median(column):.0f}" for column in (resident, own)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"passages": 100_000, "words": 100, "queries": 500, "workers": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIT_AGENTRL_CACHE"] = folder
        corpus, index = f"{folder}/corpus.jsonl", f"{folder}/index"
        queries = write_corpus(Path(corpus), args.passages, args.words)[: args.queries]
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        builder = context.Process(target=build, args=(corpus, index, answers))
        builder.start()
        seconds, core, peak = answers.get(), answers.get(), answers.get()
        builder.join()
        size = sum(path.stat().st_size for path in Path(index).rglob("*") if path.is_file()) / 1e6
        once = (
            f"A corpus of {Path(corpus).stat().st_size / 1e6:.0f} MB is indexed once in {seconds:.1f} s "
            f"({core:.1f} s of a core), with at most {peak:.0f} MB resident; the index takes {size:.0f} MB on disk."
        )
        print(once, flush=True)
        lines = []
        for workers in (1, args.workers):
            lines.append(measure(corpus, index, queries, workers))
            print(lines[-1], flush=True)
    write(once, lines, args, load)


def write(once: str, lines: list[str], args: argparse.Namespace, load: float) -> None:
    """The table beside the script."""
    options = " ".join(f"--{name} {value}" for name, value in vars(args).items())
    text = [
        f"# BM25 over {args.passages:,} passages\n",
        f"`python benchmarks/retrieval.py {options}`: random words, {args.words} a passage; queries of {QUERY_WORDS} "
        f"words, {TOP_K} passages each, {args.queries} queries a process after 50 to warm up.\n",
        f"{once}\n",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *lines,
        "\nOpening includes checking that the corpus is the one that was indexed: the first process hashes it, later "
        "ones look that up. What is resident and not a process's own is the mapped index, which all share, and the "
        "libraries' code. Milliseconds of a core leave out waiting for one: more processes than cores wait, and so "
        f"does one beside other work. When this began, the load was {load:.1f}.",
        f"\nbm25s {bm25s.__version__}, numpy {np.__version__}, {os.cpu_count()} cores.",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
