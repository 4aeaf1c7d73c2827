"""The shared-prefix benchmarks run, their columns are what they say, and their sides compute the same thing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # last: it holds an alfworld.py

import prefix_gpu
from prefix import model_config
from prefix_batches import CASES, Batch, Work, group, padded_work, prompt_for, tree_work, turns, unshared_work
from prefix_sides import loss_and_gradients, packs_of, random_qwen3, side

SCRIPT = Path(prefix_gpu.__file__).parent / "prefix.py"
HAS_PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec("prefix_grouper") is None, reason="needs the package that the benchmark compares with"
)


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every Markdown table, headers first, without the rule below them."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[rows[0], *rows[2:]] for rows in found if rows]


@HAS_PACKAGE
def test_the_quick_run_gives_every_table_and_sides_that_agree_with_float64(tmp_path: Path) -> None:
    output = tmp_path / "table.md"
    words = [sys.executable, str(SCRIPT), "--quick", "--cases", "A,D", "--output", str(output)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    time, memory, equality, reuse, build = tables(output.read_text())
    assert all(len(row) == len(rows[0]) for rows in (time, memory, equality, reuse, build) for row in rows)
    assert [row[0][0] for row in time[1:]] == ["A", "D"] == [row[0] for row in memory[1:]]
    assert [row[1] for row in time[1:]] == ["1,088 to 192", "2,304 to 288"]
    assert [row[4] == "-" for row in time[1:]] == [True, False], "packing is a side of its own for ragged rows only"
    assert [row[0] for row in reuse[1:]] == ["1.05", "1.50"]
    assert [row[2] for row in build[1:]] == ["3,072", "4,608", "116,736", "266,240"]
    errors = [float(cell) for row in equality[1:] for cell in row[2:] if cell != "-"]
    assert len(equality) == 5
    assert len(errors) == 2 * 3 + 2 * 4
    assert max(errors) < 1e-5


def test_without_cuda_the_gpu_benchmark_says_so_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prefix_gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        prefix_gpu.main()
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--checkpoint"]])
def test_the_gpu_benchmark_runs_its_dense_twin_on_cpu(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table.md"
    words = ["--device", "cpu", "--quick", "--cases", "C", "--repeats", "1", "--output", str(output), *more]
    monkeypatch.setattr(sys, "argv", ["prefix_gpu.py", *words])
    prefix_gpu.main()
    ((header, row),) = tables(output.read_text())
    cells = dict(zip(header, row, strict=True))
    assert cells["tokens"] == "1,024 to 272"
    for name in ("log-prob error, padded", "log-prob error, ours"):
        assert 0 < float(cells[name].split(" / ")[1]) < 1e-5


@pytest.mark.parametrize("case", ["C", "D", "G"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("padded", 3),
        ("unshared", 40),
        pytest.param("prefix-grouper", 0, marks=HAS_PACKAGE),
        ("shared", 0),
        ("dense", 0),
        ("gated", 4),
    ],
)
def test_every_side_computes_the_same(case: str, name: str, size: int) -> None:
    """In float64, where only the models' own float32 norms round: a side that measured something else would show."""
    config = model_config(quick=True)
    batch = CASES[case][1](32, config.vocab_size)
    found = []
    for chosen in (side("padded", 0), side(name, size)):
        lm = random_qwen3(config, torch.float64)
        logprobs = loss_and_gradients(chosen.scorer(lm), chosen.parts(batch), batch)
        found.append((logprobs, torch.cat([weight.grad.flatten() for weight in lm.parameters()])))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=0)
    assert float((found[1][1] - found[0][1]).norm() / found[0][1].norm()) < 1e-6


def test_work_of_a_group_counted_by_hand() -> None:
    """2 rows of 3 shared and 2 own tokens, and the same with one own token less."""
    batch = group(2, 3, 2, vocab=1000)
    assert padded_work(batch, 2) == unshared_work(batch) == Work(tokens=10, pairs=30, targets=4)
    assert tree_work(batch) == Work(tokens=7, pairs=1 + 2 + 3 + 2 * (4 + 5), targets=4)
    ragged = Batch.of([batch.token_ids[0], batch.token_ids[1, :4]], [[(3, 5)], [(3, 4)]])
    assert padded_work(ragged, 2) == Work(tokens=10, pairs=30, targets=3)
    assert padded_work(ragged, 1) == unshared_work(ragged) == Work(tokens=9, pairs=15 + 10, targets=3)


def test_flops_counted_by_hand() -> None:
    config = model_config(quick=True)  # 2 layers, hidden 96, 6 heads and 2 key heads of 16, MLP 256, vocabulary 512
    weights = 96 * 96 + 2 * 96 * 32 + 96 * 96 + 3 * 96 * 256
    assert Work(tokens=1, pairs=0, targets=0).flops(config) == 2 * 2 * weights
    assert Work(tokens=0, pairs=1, targets=0).flops(config) == 2 * 4 * 96
    assert Work(tokens=0, pairs=0, targets=1).flops(config) == 2 * 96 * 512


@pytest.mark.parametrize("reuse", [1.05, 1.2, 2.0, 2.5])
def test_prompts_give_the_reuse_they_are_made_for(reuse: float) -> None:
    prompt = prompt_for(reuse, 8, 512)
    assert abs(8 * 512 / (prompt + 8 * (512 - prompt)) - reuse) < 0.01


def test_packs_hold_at_most_their_budget_and_every_row_once() -> None:
    batch = turns(2, 3, 8, 2, 4, vocab=1000)  # rows of 10, 16, 22 tokens, twice
    packs = packs_of(batch, 30)
    assert [pack.rows.tolist() for pack in packs] == [[0, 1], [2], [3, 4], [5]]
    assert [pack.token_ids.shape[1] for pack in packs] == [16, 22, 16, 22]
