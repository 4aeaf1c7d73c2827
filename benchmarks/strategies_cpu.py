"""One optimiser step on one rank, under DDP and under FSDP2: seconds, what was communicated, and the gradients' error.

Run: `python benchmarks/strategies_cpu.py [--repeats 5]` (2 minutes on 2 cores). The tables go to
`benchmarks/strategies_cpu.md`, and `scaling_model.py` reads its communication from there.

The same 8 rows of 64 tokens through a random Qwen3 of 16 million weights in float32, one thread a rank: `single` has
all of them in one process; DDP and FSDP2 (the project's own `shard`) have half of them on each of two Gloo ranks. The
loss is the sum of log-probabilities over the tokens of all ranks. A step is forward and backward of 1 or 4
micro-batches and AdamW; sides take turns and the least of the repeats counts, as others use the machine too. DDP
communicates in the last micro-batch alone, FSDP2 gathers and reduces in every one. Beside it what the collectives
themselves take: all-gather, reduce-scatter and all-reduce of several sizes. Gradients are gathered and compared with
those of `single` in the Euclidean norm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from prefix_tables import footer, markdown
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from lit_agentrl.models import PaddedModel
from lit_agentrl.models.sharding import Sharding, shard
from lit_agentrl.models.shards import whole

HERE = Path(__file__).parent
ROWS, LENGTH, VOCABULARY = 8, 64, 2_048
SIDES = ("single", "DDP", "FSDP2")
MICRO = (1, 4)
SIZES_MB = (1, 4, 16, 64)


def main() -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "strategies_cpu.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2):
            spawn(work, (size, args.repeats, folder), nprocs=size)
        found = {size: json.loads((Path(folder) / f"{size}.json").read_text()) for size in (1, 2)}
        reference = torch.load(Path(folder) / "single.pt", weights_only=True)
        errors = {
            side: float((torch.load(Path(folder) / f"{side}.pt", weights_only=True) - reference).norm())
            / float(reference.norm())
            for side in SIDES
        }
    text = report(found, errors, args.repeats)
    print(text)
    args.output.write_text(text)


def work(rank: int, size: int, repeats: int, folder: str) -> None:
    """One rank: what it measures goes to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29_530 + size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    sides = {side: Side(side, rank, size) for side in (SIDES[:1] if size == 1 else SIDES[1:])}
    seconds: dict[str, list[float]] = {f"{side} {micro}": [] for side in sides for micro in MICRO}
    for repeat in range(repeats + 1):
        for side in sides.values():
            for micro in MICRO:
                dist.barrier()
                began = time.perf_counter()
                side.step(micro)
                dist.barrier()
                if repeat:
                    seconds[f"{side.name} {micro}"].append(time.perf_counter() - began)
                elif micro == MICRO[-1]:  # weights have moved by one step, the same on all sides
                    gradient = side.gradient
                    if rank == 0:
                        torch.save(gradient, Path(folder) / f"{side.name}.pt")
    moved = {f"{side.name} {micro}": side.moved(micro) for side in sides.values() for micro in MICRO}
    collectives = time_collectives(rank, size, repeats) if size > 1 else {}
    if rank == 0:
        found = {"seconds": seconds, "collectives": collectives, "moved": moved}
        found["weights"] = next(iter(sides.values())).num_weights
        (Path(folder) / f"{size}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


class Side:
    """A policy, its optimiser and its share of the rows."""

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.size = name, size
        torch.manual_seed(0)
        policy = PaddedModel(Qwen3ForCausalLM(config()))
        rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        self.rows = rows[rank::size]
        self.num_weights = sum(parameter.numel() for parameter in policy.parameters())
        self.policy: nn.Module = policy
        if name == "DDP":
            self.policy = nn.parallel.DistributedDataParallel(policy)
        elif name == "FSDP2":
            mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
            shard(policy, mesh, Sharding())
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-4)

    def step(self, micro: int) -> None:
        """One optimiser step in `micro` micro-batches; its gradients stay."""
        self.optimizer.zero_grad()
        parts = self.rows.chunk(micro)
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            quiet = self.name == "DDP" and not is_last
            with cast("Any", self.policy).no_sync() if quiet else nullcontext():
                lengths = torch.full((len(part),), LENGTH)
                loss = -self.policy(part, lengths).logprobs.sum() / (ROWS * LENGTH)
                (loss * self.size).backward()  # both strategies average over ranks
        self.optimizer.step()

    def moved(self, micro: int) -> dict[str, list[float]]:
        """Of a step, by collective: how many, and MiB of whole tensors. DDP's own are called from C++, and not seen."""
        with Watched() as watched:
            self.step(micro)
        return watched.found

    @property
    def gradient(self) -> Tensor:
        """All of it, [W]; every rank has to ask."""
        return torch.cat([whole(cast("Tensor", p.grad)).flatten() for p in self.policy.parameters()])


class Watched(TorchDispatchMode):
    """Counts collectives that Python calls, and the size of the tensor that each makes or takes whole."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation passes here."""
        name = KINDS.get(func.name())
        if name:
            whole_one = max((arg for arg in args if isinstance(arg, Tensor)), key=Tensor.numel)
            count, size = self.found.get(name, [0, 0.0])
            self.found[name] = [count + 1, size + whole_one.numel() * whole_one.element_size() / 2**20]
        return func(*args, **(kwargs or {}))


KINDS = {"c10d::_allgather_base_": "all-gather", "c10d::_reduce_scatter_base_": "reduce-scatter"}


def config() -> Qwen3Config:
    """6 layers of 512."""
    return Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip


def time_collectives(rank: int, size: int, repeats: int) -> dict[str, list[list[float]]]:
    """Of each collective [MB of the whole tensor, least seconds]."""
    kinds: dict[str, Callable[[Tensor, Tensor], object]] = {
        "all-gather": lambda full, part: dist.all_gather_into_tensor(full, part),
        "reduce-scatter": lambda full, part: dist.reduce_scatter_tensor(part, full),
        "all-reduce": lambda full, _: dist.all_reduce(full),
    }
    found: dict[str, list[list[float]]] = {}
    for kind, call in kinds.items():
        found[kind] = []
        for mb in SIZES_MB:
            full = torch.ones(int(mb * 2**20 / 4))
            part = torch.ones(len(full) // size)
            seconds = []
            for _ in range(repeats + 2):
                dist.barrier()
                began = time.perf_counter()
                call(full, part)
                seconds.append(time.perf_counter() - began)
            found[kind].append([mb, min(seconds)])
    return found


def report(found: dict[int, dict[str, Any]], errors: dict[str, float], repeats: int) -> str:
    """Both tables with their machine."""
    rows = []
    for size, sides in ((1, SIDES[:1]), (2, SIDES[1:])):
        for side in sides:
            for micro in MICRO:
                of = found[size]["seconds"][f"{side} {micro}"]
                each = f"{min(of):.3f} ({statistics.median(of):.3f}, {max(of):.3f})"
                moved = found[size]["moved"][f"{side} {micro}"]
                seen = ", ".join(f"{count} {kind}s, {mb:.0f} MiB" for kind, (count, mb) in moved.items()) or "-"
                rows.append([side, str(size), str(micro), each, seen, f"{errors[side]:.1e}"])
    collectives = found[2]["collectives"]
    times = [[kind, *(f"{1e3 * seconds:.2f}" for _, seconds in collectives[kind])] for kind in collectives]
    lines = [
        "# Strategies on two CPU ranks",
        "",
        f"`python benchmarks/strategies_cpu.py --repeats {repeats}`, which says what is measured:",
        f"{found[2]['weights']:,} weights in float32, {ROWS} rows of {LENGTH} tokens in all.",
        "",
        *markdown(
            [
                "side",
                "ranks",
                "micro-batches",
                "step s: least (median, most)",
                "collectives of a step",
                "relative error of the gradient",
            ],
            rows,
        ),
        "",
        "Collectives over Gloo, two ranks on one machine: least milliseconds, by the whole tensor's MiB.",
        "",
        *markdown(["", *(f"{mb:g}" for mb in SIZES_MB)], times),
        "",
        f"{footer(1)} Load of the machine's {os.cpu_count()} cores when it ended: {os.getloadavg()[0]:.0f}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
