"""The tree benchmark runs, its sides do the same work, and its exact cost is the one counted by hand."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # last: it holds an alfworld.py

import tree_budget
from tree_counts import POLICIES, SHAPES, count, exact, nominal

from search_parts import PASSAGES, RECORDS
from test_benchmarks_prefix import tables
from tiny import build_tiny_lm, byte_tokenizer


def write_data(folder: Path) -> Path:
    """The library as the benchmark reads it."""
    corpus = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in PASSAGES]
    for name, records in {"corpus": corpus, "questions": RECORDS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_quick_run_gives_every_table_and_sides_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bm25s", reason="needs the package that searches")
    lm = build_tiny_lm(tmp_path / "lm", max_position_embeddings=8192)
    output = tmp_path / "table.md"
    words = ["--quick", "--pretrained", lm, "--data", str(write_data(tmp_path)), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["tree_budget.py", *words])
    tree_budget.main()
    counts, *rollouts, updates = tables(output.read_text())
    assert len(counts) == 1 + 2 * len(SHAPES)
    assert len(rollouts) == len(tree_budget.SHAPES)
    for rows in (counts, *rollouts, updates):
        assert all(len(row) == len(rows[0]) for row in rows)
    for _, kept, unkept, chains in rollouts:
        prefilled, cached, generated, calls = (
            [int(row[column].replace(",", "")) for row in (kept, unkept, chains)] for column in range(2, 6)
        )
        assert prefilled[0] + cached[0] == prefilled[1] + cached[1], "the same contexts, paid for otherwise"
        assert prefilled[0] < prefilled[1]
        assert generated[0] == generated[1]
        assert calls[0] == calls[1] < calls[2] == 3 * (6 if rollouts[0][1] is kept else 5)
    for _, row_tokens, padded_tokens, unique, reuse, *_, gradient, logprob in updates[1:]:
        row_tokens, padded_tokens, unique = (int(n.replace(",", "")) for n in (row_tokens, padded_tokens, unique))
        assert unique < row_tokens <= padded_tokens
        assert float(reuse) == pytest.approx(row_tokens / unique, abs=0.006)
        assert 0 <= float(gradient) < 1e-4
        assert 0 <= float(logprob) < 1e-4


def test_costs_counted_by_hand() -> None:
    """T = 2, one branch a round: 1/2 each for 2 new turns from the root (candidates: root, node, new node), or 1."""
    assert [nominal(shape) for shape in ((2, 2, 1), (4, 2, 1), (2, 6, 1), (6, 3, 1))] == [4, 8, 8, 15]
    assert [exact((2, 2, 1), turns) for turns in (1, 2, 3, 4)] == pytest.approx([6, 5, 14 / 3, 4.5])
    after_root, after_node = (2 + 1 + 1) / 3, (2 + 1) / 2
    second = (after_root + after_node) / 2
    assert math.isclose(exact((1, 1, 2), 2), 1 + (1.5 + second) / 2)
    assert math.isclose(exact((1, 1, 2), 2, per_depth=True), 1 + 2 * 1.5 / 2)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 1, 2)])
def test_trees_cost_what_the_exact_mean_says(shape: tuple[int, int, int], policy: str) -> None:
    counted = count(shape, 3, policy, byte_tokenizer(), prompts=100)
    assert counted.chains.agrees(exact(shape, 3, policy == "per depth"))
    assert not counted.chains.agrees(nominal(shape))
    assert counted.trajectories == shape[0] * (1 + shape[1] * shape[2])
