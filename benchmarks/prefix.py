"""What sharing prefixes saves on CPU: forward, loss and backward of a whole model against three other ways to do them.

Run: `pip install -e ".[bench]"`, then `python benchmarks/prefix.py [--cases A,B] [--repeats 3] [--threads 1]` (about
25 minutes on one idle core; `--quick` checks the script in seconds, with lengths a 16th). The tables lie in
`benchmarks/prefix.md`.

A Qwen3 with random weights (hidden 384, 4 layers, 6 heads on 2 key heads of 64, MLP 1024, vocabulary 8192) in float32.
The loss is PPO-clip with one advantage a row, on target tokens; the head runs on those only, on every side.

- padded: the plain causal forward without a mask; all rows at once, and at the number of rows (1, 4, all) that took the
  least CPU time in one trial of each. One row at a time has no padding at all and the smallest tensors, which stay in
  the processor's caches: the strongest plain baseline.
- unshared packing: rows behind one another in packs of 4,096 tokens, each attending to itself. Only for ragged rows:
  without padding it is the padded side.
- prefix-grouper: the published package, on an attention of ours that takes its masks (it supports FlashAttention 2
  only). It shares what all rows begin with, to depth 1.
- ours: `PrefixGroupedModel`, all rows in one pack, its gate off. Where the gate refuses, what `auto` does instead is
  measured too.

Every measurement is one step in a fresh process (a fork of one that has the imports), after a step on its first
micro-batch or pack, so that no side pays for memory that it asks the system for the first time. Sides take turns, and a
ratio is taken within one repeat; only `padded, all rows` is measured once.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from prefix_batches import BUILDS, CASES, Batch, group, padded_work, prompt_for, tree_work, unshared_work
from prefix_sides import loss_and_gradients, random_qwen3, side
from prefix_tables import CaseResult, Measured, equality_table, footer, markdown, memory_table, ratio, time_table
from transformers import Qwen3Config

from lit_agentrl.errors import missing_extra
from lit_agentrl.models import PackedTree
from lit_agentrl.models.scoring import MIN_REUSE, MIN_REUSE_DENSE

HERE = Path(__file__).parent
QUICK = 16  # what lengths are divided by
PACK_TOKENS = 4096
REUSES = (1.05, 1.1, 1.2, 1.5, 2.0, 2.5)
ROW_TOKENS = 512  # of the 8 rows of every reuse


@dataclass(frozen=True)
class Request:
    """What a child process is asked to measure."""

    batch: str
    """A case, or "reuse 1.2"."""
    side: str
    size: int = 0
    """See `side`."""
    reference: Path | None = None
    """Where the float64 log-probabilities and gradients lie."""
    quick: bool = False
    threads: int = 1


def main() -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="letters, with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small shapes, one repeat, nothing written by default")
    parser.add_argument("--output", type=Path, help="where the tables go; benchmarks/prefix.md unless quick")
    args = parser.parse_args()
    names = args.cases.split(",")
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"--cases: unknown {unknown}; there are {', '.join(CASES)}.")
    if importlib.util.find_spec("prefix_grouper") is None:
        raise SystemExit(str(missing_extra("prefix-grouper", "bench", "benchmarks/prefix.py")))
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the processes below
    bench = Bench(1 if args.quick else args.repeats, args.threads, args.quick)
    with tempfile.TemporaryDirectory() as folder:
        results = [bench.case(name, Path(folder) / "reference.pt") for name in names]
    text = report(results, bench.reuses(), bench.builds(), bench)
    print(text)
    output = args.output or (None if args.quick else HERE / "prefix.md")
    if output:
        output.write_text(text)


class Bench:
    """Runs measurements in processes of their own, sides in turn."""

    def __init__(self, repeats: int, threads: int, quick: bool) -> None:
        self.repeats, self.threads, self.quick = repeats, threads, quick
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lit_agentrl.models", "transformers.models.qwen3.modeling_qwen3"])
        self.pool = ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1)

    def run(self, batch: str, name: str, size: int = 0, reference: Path | None = None) -> Measured:
        """One measurement."""
        request = Request(batch, name, size, reference, self.quick, self.threads)
        measured = self.pool.submit(measure, request).result()
        print(f"{batch} {name}[{size}]: {measured}", file=sys.stderr, flush=True)
        return measured

    def case(self, name: str, reference: Path) -> CaseResult:
        """All sides of one case, the padded one at its best micro-batch."""
        batch = make_batch(name, self.quick)
        self.pool.submit(write_reference, Request(name, "padded", 1, reference, self.quick, self.threads)).result()
        trials = {size: self.run(name, "padded", size, reference) for size in (1, 4, len(batch))}
        best = min(trials, key=lambda size: trials[size].cpu)
        packed = PackedTree.build(batch.token_ids, batch.lengths)
        turns = {"padded": best, "prefix-grouper": 0, "shared": 0}
        if batch.lengths.min() < batch.lengths.max():
            turns["unshared"] = PACK_TOKENS // QUICK if self.quick else PACK_TOKENS
        is_shared = packed.reuse >= MIN_REUSE
        if not is_shared:
            turns["gated"] = best
        sides: dict[str, list[Measured]] = {side: [] for side in turns}
        for _ in range(self.repeats):
            for each, size in turns.items():
                sides[each].append(self.run(name, each, size, reference))
        config, work = model_config(self.quick), tree_work(batch)
        others = (padded_work(batch, len(batch)), padded_work(batch, best), unshared_work(batch))
        all_rows, at_best, unpadded = (other.flops(config) / work.flops(config) for other in others)
        return CaseResult(
            name=name,
            what=CASES[name][0],
            padded_tokens=batch.token_ids.numel(),
            unique_tokens=len(packed),
            micro_batch=best,
            at_once=trials[len(batch)],
            sides=sides,
            ideals=(all_rows, at_best, unpadded),
            choice="sharing" if is_shared else f"padded (reuse {packed.reuse:.2f})",
        )

    def reuses(self) -> list[str]:
        """A table: from which reuse on sharing pays."""
        rows = []
        trials = {size: self.run(f"reuse {REUSES[0]}", "padded", size) for size in (1, 4, 8)}
        best = min(trials, key=lambda size: trials[size].cpu)
        for reuse in REUSES[:: 3 if self.quick else 1]:
            turns: dict[str, list[Measured]] = {"padded": [], "tree_merge": [], "dense": []}
            for _ in range(self.repeats):
                for name, measured in turns.items():
                    measured.append(self.run(f"reuse {reuse}", name, best if name == "padded" else 0))
            cells = [ratio(turns["padded"], turns[backend]) for backend in ("tree_merge", "dense")]
            gates = (MIN_REUSE, MIN_REUSE_DENSE)
            rows.append(
                [f"{reuse:.2f}"]
                + [f"{middle:.2f}x ({least:.2f}-{most:.2f})" for middle, least, most in cells]
                + ["shared" if reuse >= gate else "padded" for gate in gates]
            )
        header = ("reuse", "tree_merge over padded", "dense over padded", "auto, tree_merge", "auto, dense")
        return markdown(header, rows)

    def builds(self) -> list[str]:
        """A table: how long the host packs rows."""
        rows = []
        for what, make in BUILDS.items():
            batch = make(30_000)
            seconds = []
            for _ in range(1 if self.quick else 7):
                began = time.process_time()
                packed = PackedTree.build(batch.token_ids, batch.lengths)
                seconds.append(time.process_time() - began)
            rows.append(
                [what, f"{packed.num_row_tokens:,}", f"{len(packed):,}", f"{1e3 * statistics.median(seconds):.1f}"]
            )
        return markdown(("batch", "row tokens", "unique tokens", "ms of CPU time, median of 7"), rows)


def make_batch(name: str, quick: bool, divisor: int = QUICK) -> Batch:
    """The batch called `name`; a small one where it is quick."""
    divisor, vocab = (divisor, model_config(True).vocab_size) if quick else (1, model_config(False).vocab_size)
    if name in CASES:
        return CASES[name][1](divisor, vocab)
    length = ROW_TOKENS // divisor
    prompt = prompt_for(float(name.removeprefix("reuse ")), 8, length)
    return group(8, prompt, length - prompt, vocab)


def model_config(quick: bool) -> Qwen3Config:
    """A small Qwen3; an even smaller one where it is quick."""
    small = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 16}
    full = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
    return Qwen3Config(
        **(small if quick else full),
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )


def measure(request: Request) -> Measured:
    """One step of one side, in a process of its own."""
    torch.set_num_threads(request.threads)
    batch = make_batch(request.batch, request.quick)
    lm = random_qwen3(model_config(request.quick), torch.float32)
    chosen = side(request.side, request.size)
    scorer = chosen.scorer(lm)
    small = make_batch(request.batch, quick=True)
    loss_and_gradients(scorer, chosen.parts(small), small)  # what is loaded and set up once is not the step's memory
    lm.zero_grad()
    peak = peak_megabytes()
    loss_and_gradients(scorer, chosen.parts(batch)[:1], batch)
    lm.zero_grad()
    cpu, wall = time.process_time(), time.perf_counter()
    logprobs = loss_and_gradients(scorer, chosen.parts(batch), batch)
    seconds = time.process_time() - cpu, time.perf_counter() - wall
    grown = peak_megabytes() - peak
    errors = (float("nan"), float("nan"))
    if request.reference is not None:
        exact = torch.load(request.reference, weights_only=True)
        gradient = gradients(lm)
        errors = (
            float((logprobs - exact["logprobs"]).abs().max()),
            float((gradient - exact["gradient"]).norm() / exact["gradient"].norm()),
        )
    return Measured(*seconds, grown, *errors)


def write_reference(request: Request) -> None:
    """The same step in float64 (but for the norms, which transformers computes in float32), padded, to a file."""
    assert request.reference is not None
    torch.set_num_threads(request.threads)
    batch = make_batch(request.batch, request.quick)
    lm = random_qwen3(model_config(request.quick), torch.float32).double()
    chosen = side(request.side, request.size)
    logprobs = loss_and_gradients(chosen.scorer(lm), chosen.parts(batch), batch)
    torch.save({"logprobs": logprobs, "gradient": gradients(lm)}, request.reference)


def gradients(lm: torch.nn.Module) -> torch.Tensor:
    """All of them, one after another, float64."""
    return torch.cat([weight.grad.double().flatten() for weight in lm.parameters() if weight.grad is not None])


def peak_megabytes() -> float:
    """Peak resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def report(results: list[CaseResult], reuses: list[str], builds: list[str], bench: Bench) -> str:
    """All tables."""
    lines = [
        "# Shared prefixes on CPU",
        "",
        f"`python benchmarks/prefix.py{' --quick' if bench.quick else ''}`, which says what the sides are. Seconds are",
        "CPU time of one step (in brackets, time on the clock): the median over repeats, of which there are",
        f"{bench.repeats}, each in a fresh process. Ratios are medians of the ratios within one repeat (in brackets,",
        "the least and the most). The ideal counts floating-point operations of layers, attention and head.",
        "",
        *time_table(results),
        "",
        "Memory: MB that the step adds to the process's peak. Padded in fewer rows at a time needs less, and so would",
        "ours in smaller packs; like is compared with like where all rows are computed at once.",
        "",
        *memory_table(results),
        "",
        "Numerical error against the padded forward in float64: the largest difference of a log-probability in nats,",
        "and the relative difference of the whole gradient.",
        "",
        *equality_table(results),
        "",
        "## From which reuse on sharing pays",
        "",
        f"8 rows of {ROW_TOKENS} tokens whose common prompt gives `reuse` row tokens per unique token. The gate of",
        f"`auto` is {MIN_REUSE} for tree_merge and {MIN_REUSE_DENSE} for a dense mask.",
        "",
        *reuses,
        "",
        "## Packing on the host",
        "",
        *builds,
        "",
        footer(bench.threads, "prefix-grouper"),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
