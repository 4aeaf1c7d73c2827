"""Scaling on paper: what one iteration takes and needs on 8 and 64 GPUs with 7B to 32B models, and what breaks first.

Run: `python benchmarks/scaling_model.py` prints the tables; `--write` puts them into `docs/scaling.md`, which says how
to read them. `scaling_points.py` holds the measurements, `scaling_fit.py` the fitted parameters, `scaling_shapes.py`
the models. What is assumed stands here, in `Assumed` and `Task`. Nothing here has been measured on more than one GPU.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from prefix_batches import Work
from prefix_tables import markdown
from scaling_fit import FLASH, GIB, HBM, MATRICES, PEAK, Fit, fit, is_gpu_bound
from scaling_points import CONTINUOUS_BATCHING, MEMORIES, PREPARE, ROLLOUTS, UPDATES
from scaling_shapes import MEASURED, SHAPES, Shape

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "scaling.md"
CPU = HERE / "strategies_cpu.md"
MARK = re.compile(r"(<!-- scaling: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GPUS = (8, 64)


class Assumed:
    """What no measurement of ours supports."""

    nvlink = 450e9
    """Bytes/s a GPU and direction inside a node of 8 (data sheet of the H100 SXM: 900 GB/s both ways)."""
    infiniband = 50e9
    """Bytes/s a GPU and direction between nodes (one NDR adapter of 400 Gbit/s a GPU)."""
    of_wire = 0.80
    """Share of either that collectives reach."""
    of_hbm = 0.80
    """Share of the data sheet's 3.35 TB/s that decoding reaches."""
    memory = 80e9
    """Bytes of a GPU."""
    free_engine = 2e-3
    """Seconds a step beside memory traffic, of an engine that replays CUDA graphs."""
    disk = 2e9
    """Bytes/s of a checkpoint's disk."""


@dataclass(frozen=True)
class Task:
    """An iteration of agents: every prompt's trajectories share the prompt alone."""

    prompts: int = 64
    group: int = 8
    prompt: int = 1024
    turns: int = 6
    new: int = 128
    observation: int = 128
    micro_batch: int = 16_384
    """Unique tokens, `data.max_tokens`."""
    kept: int = 65_536
    """Tokens in `HFEngine`'s cache between calls, its default."""

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.turns * (self.new + self.observation)

    def work(self, groups: float, is_shared: bool) -> Work:
        """A forward of some groups' rows."""
        tail, rows = self.length - self.prompt, groups * self.group
        own = rows * sum(range(self.prompt + 1, self.length + 1))
        prompts = groups if is_shared else rows
        pairs = own + prompts * self.prompt * (self.prompt + 1) / 2
        return Work(int(prompts * self.prompt + rows * tail), int(pairs), int(rows * self.turns * self.new))


TASK = Task()


def wire(num_gpus: int) -> float:
    """Bytes/s that a collective over all GPUs moves at each of them."""
    return Assumed.of_wire * (Assumed.nvlink if num_gpus <= 8 else Assumed.infiniband)


@dataclass(frozen=True)
class Iteration:
    """One model on some GPUs under FSDP2, with activations recomputed, one rank a GPU."""

    shape: Shape
    num_gpus: int
    parameters: Fit
    task: Task = TASK

    @property
    def groups(self) -> int:
        """Of the fullest rank: groups are never split."""
        return math.ceil(self.task.prompts / self.num_gpus)

    # --- memory, bytes of a GPU -----------------------------------------------------------------------------------

    @property
    def states(self) -> float:
        """Weights, gradients and AdamW's two moments in float32, sharded."""
        return 16 * self.shape.num_weights / self.num_gpus

    @property
    def replica(self) -> float:
        """The whole copy in bfloat16 that an in-process engine samples from."""
        return 2 * self.shape.num_weights

    @property
    def activations(self) -> float:
        """Layers' inputs, one layer's own numbers, gathered layers, and what the root gathers: its tables."""
        shape, tokens = self.shape, self.task.micro_batch
        inputs = 2.0 * tokens * shape.hidden_size * shape.num_hidden_layers
        tables = (1 if shape.is_tied else 2) * shape.vocab_size * shape.hidden_size
        layer = (shape.num_weights - tables) / shape.num_hidden_layers
        own = self.parameters.stored * shape.width * tokens
        return inputs + own + 2 * 2 * layer + 2 * tables + 4 * (layer + tables)  # and unreduced float32 gradients

    @property
    def cache(self) -> float:
        """Keys and values that are kept."""
        rows = self.groups * self.task.group
        return float(self.shape.kv_bytes * min(self.task.kept, rows * self.task.length))

    @property
    def memory(self) -> float:
        """All of it, with rollouts in process."""
        return self.states + self.replica + self.activations + self.cache

    @property
    def memory_apart(self) -> float:
        """With rollouts on other GPUs."""
        return self.states + self.activations

    # --- seconds --------------------------------------------------------------------------------------------------

    def decode_step(self, is_free: bool = False) -> tuple[float, float]:
        """Host and GPU seconds of one token for a rank's batch; `is_free` of an engine that waits for memory alone."""
        rows = self.groups * self.task.group
        middle = (self.task.prompt + self.task.length) / 2
        traffic = self.replica + self.shape.kv_bytes * rows * middle
        gpu = traffic / (Assumed.of_hbm * HBM)
        host = Assumed.free_engine if is_free else self.parameters.decode * self.shape.num_hidden_layers
        return (0.0, gpu + host) if is_free else (host, gpu)

    def rollout(self, is_free: bool = False) -> float:
        """All turns, one token after another, and the prefill; environments take nothing."""
        steps = self.task.turns * self.task.new
        work = self.task.work(self.groups, is_shared=True)
        prefill = self.gpu_seconds(work, is_shared=False) / 3
        return steps * max(self.decode_step(is_free)) + prefill

    def gpu_seconds(self, work: Work, is_shared: bool) -> float:
        """Of forward and backward."""
        matrices, scores = self.shape.forward_flops(work)
        kernel = "flex" if is_shared else "flash"
        return self.parameters.gpu_seconds(self.shape, (3 * matrices, 3 * scores), work.tokens, kernel)

    def micro_batches(self, is_shared: bool = True) -> int:
        """Of a rank."""
        return math.ceil(self.task.work(self.groups, is_shared).tokens / self.task.micro_batch)

    def computing(self, is_shared: bool = True) -> float:
        """GPU seconds of the update: forward, forward again, backward."""
        return 4 / 3 * self.gpu_seconds(self.task.work(self.groups, is_shared), is_shared)

    def launching(self, is_shared: bool = True) -> float:
        """Host seconds of the update."""
        return 4 / 3 * self.parameters.host_seconds(self.shape, self.micro_batches(is_shared))

    @property
    def communicating_once(self) -> float:
        """Seconds of a micro-batch: weights gathered twice in bfloat16, gradients reduced in float32."""
        return (2 + 2 + 4) * self.shape.num_weights * (1 - 1 / self.num_gpus) / wire(self.num_gpus)

    def communicating(self, is_shared: bool = True) -> float:
        """Seconds of the update: every micro-batch communicates."""
        return self.communicating_once * self.micro_batches(is_shared)

    def update(self, is_shared: bool = True) -> float:
        """The three overlap where they can: the longest counts."""
        return max(self.computing(is_shared), self.launching(is_shared), self.communicating(is_shared))

    @property
    def syncing(self) -> float:
        """Seconds of gathering the replica."""
        return self.replica * (1 - 1 / self.num_gpus) / wire(self.num_gpus)

    @property
    def preparing(self) -> float:
        """Host seconds of rows, tree and micro-batches, by row tokens."""
        seconds, tokens, _ = PREPARE
        return seconds * self.task.work(self.groups, is_shared=False).tokens / tokens

    @property
    def bound(self) -> str:
        """What the update waits for."""
        named = {"GPU": self.computing(), "host": self.launching(), "network": self.communicating()}
        return max(named, key=lambda name: named[name])

    @property
    def checkpoint(self) -> float:
        """Bytes: weights and moments in float32."""
        return 12.0 * self.shape.num_weights


# --- tables -----------------------------------------------------------------------------------------------------------


def iterations(parameters: Fit) -> list[Iteration]:
    """Every model on every number of GPUs."""
    return [Iteration(shape, num, parameters) for shape in SHAPES for num in GPUS]


def fitted(parameters: Fit) -> list[str]:
    """The parameters."""
    busy = sum(map(is_gpu_bound, UPDATES))
    rows = [
        ["host, update", f"{1e3 * parameters.launch:.2f} ms a layer and micro-batch",
         f"fitted: {len(UPDATES) - busy} updates of at most 8,000 tokens"],
        ["GPU, beside matrices and scores", f"{1e12 * parameters.rest:.1f} ps a token, layer and written number"
         f" ({parameters.rest * HBM / 2:.0f} passes over it at 3.35 TB/s)", f"fitted: {busy} updates above"],
        ["FlexAttention", f"{parameters.flex:.0%} of peak", f"fitted: the same {busy}"],
        ["flash attention", f"{FLASH:.0%} of peak", "assumed"],
        ["matrix products", f"{MATRICES:.0%} of peak", "assumed"],
        ["host, decoding", f"{1e3 * parameters.decode:.2f} ms a layer and token", "fitted: 4 rollouts of 64 tokens"],
        ["collection beside decoding", f"{parameters.collect:.2f} s", "fitted: 8 collections"],
        ["kept for the backward", f"{parameters.stored:.2f} bytes a token, layer and written number",
         "fitted: 4 peaks"],
    ]  # fmt: skip
    return markdown(["parameter", "value", "from"], rows)


def residuals(parameters: Fit) -> list[str]:
    """Every measurement beside what the fit says of it."""
    rows = []
    for point in UPDATES:
        rows.append(_residual("update", point.name, point.source, point.seconds, parameters.update(point), "s"))
    for each in ROLLOUTS:
        rows.append(_residual("rollout", each.name, each.source, each.seconds, parameters.rollout(each), "s"))
    for peak in MEMORIES:
        source = "benchmarks/prefix_gpu_0.6b.md"
        rows.append(_residual("memory", peak.name, source, peak.gib, parameters.memory(peak), "GiB"))
    return markdown(["what", "measurement", "source", "measured", "fitted", "error"], rows)


def _residual(what: str, name: str, source: str, measured: float, said: float, unit: str) -> list[str]:
    file = source.removeprefix("benchmarks/")
    link = f"[{file}](../{source})"
    return [what, name, link, f"{measured:.3g} {unit}", f"{said:.3g} {unit}", f"{said / measured - 1:+.0%}"]


def memory_table(parameters: Fit) -> list[str]:
    """GiB of a GPU."""
    rows = []
    for each in iterations(parameters):
        parts = (each.states, each.replica, each.activations, each.cache, each.memory, each.memory_apart)
        fits = ["yes" if total <= 0.9 * Assumed.memory else "**no**" for total in (each.memory, each.memory_apart)]
        rows.append([each.shape.name, str(each.num_gpus), *(f"{part / GIB:.0f}" for part in parts), *fits])
    header = (
        "model", "GPUs", "states", "replica", "activations, tables", "keys and values", "in all", "without rollouts",
        "fits with rollouts", "fits without",
    )  # fmt: skip
    return markdown(header, rows)


def time_table(parameters: Fit) -> list[str]:
    """Seconds of an iteration."""
    rows = []
    for each in iterations(parameters):
        update, rollout, free = each.update(), each.rollout(), each.rollout(is_free=True)
        rest = each.syncing + each.preparing
        whole = rollout + update + rest
        tokens = TASK.prompts * TASK.group * TASK.turns * TASK.new
        name = each.shape.name + ("" if each.memory <= 0.9 * Assumed.memory else " (*)")
        parts = f"{each.computing():.1f} / {each.launching():.1f} / {each.communicating():.1f}"
        rows.append(
            [
                name, str(each.num_gpus), f"{rollout:.0f}", f"{free:.0f}", parts, each.bound,
                f"{each.update(False) / update:.2f}x", f"{rest:.1f}", f"{whole:.0f}",
                f"{max(rollout, update) + rest:.0f}", f"{free + update + rest:.0f}", f"{tokens / whole:,.0f}",
            ]
        )  # fmt: skip
    header = (
        "model", "GPUs", "rollout, HFEngine", "rollout, memory-bound engine", "update: GPU / host / network",
        "waits for",
        "sharing off", "sync, rows", "iteration", "the same, one step off", "with the other engine", "new tokens/s",
    )  # fmt: skip
    return markdown(header, rows)


def breaking_table(parameters: Fit) -> list[str]:
    """What grows out of proportion, in numbers."""
    rows = []
    for each in iterations(parameters):
        host, gpu = each.decode_step()
        break_even = each.communicating_once / (each.computing() / each.task.work(each.groups, True).tokens)
        seconds = each.checkpoint / Assumed.disk
        rows.append(
            [
                each.shape.name, str(each.num_gpus), f"{1e3 * host:.0f} / {1e3 * gpu:.0f}",
                f"{each.groups}", f"{break_even:,.0f}", f"{each.checkpoint / 1e9:,.0f}",
                f"{seconds:,.0f} / {seconds / max(1, each.num_gpus // 8):,.0f}", f"{each.preparing:.2f}",
            ]
        )  # fmt: skip
    header = (
        "model", "GPUs", "ms a decoded token: host / GPU", "groups a rank",
        "tokens of a micro-batch that hide FSDP2's network",
        "checkpoint GB", "seconds to write it: one file / a shard a node", "rows and tree, s",
    )  # fmt: skip
    return markdown(header, rows)


def cpu_table() -> list[str]:
    """Collectives of FSDP2 on two CPU ranks in float32, counted, and as `communicating_once` counts them."""
    text = CPU.read_text()
    weights = int(re.findall(r"([\d,]+) weights in float32", text)[0].replace(",", ""))
    size, layers = 4 * weights / 2**20, 6
    counted = re.findall(
        r"FSDP2 \| 2 \| (\d) \|.*?(\d+) all-gathers, (\d+) MiB, (\d+) reduce-scatters, (\d+) MiB", text
    )
    rows = []
    for micro, gathers, gathered, scatters, scattered in counted:
        of = int(micro)
        said = (of * (2 * layers + 2), 2 * of * size, of * (layers + 1), of * size)
        rows.append(
            [
                micro, f"{gathers} ({gathered} MiB)", f"{said[0]} ({said[1]:.0f} MiB)",
                f"{scatters} ({scattered} MiB)", f"{said[2]} ({said[3]:.0f} MiB)",
            ]
        )  # fmt: skip
    header = ("micro-batches", "all-gathers, counted", "by the model", "reduce-scatters, counted", "by the model")
    return markdown(header, rows)


def tables() -> dict[str, list[str]]:
    """Every table of the page, by name."""
    parameters = fit()
    return {
        "fit": fitted(parameters),
        "residuals": residuals(parameters),
        "cpu": cpu_table(),
        "memory": memory_table(parameters),
        "time": time_table(parameters),
        "breaking": breaking_table(parameters),
    }


def filled(page: str) -> str:
    """The page with its tables made anew."""
    made = tables()
    return MARK.sub(lambda found: f"{found[1]}{chr(10).join(made[found[2]])}\n{found[3]}", page)


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for name, lines in tables().items():
        print(f"{name}\n", *lines, "", sep="\n")
    seconds = fit().decode * MEASURED.num_hidden_layers * 64
    print(f"Continuous batching (sdpa, with its set-up) took {CONTINUOUS_BATCHING[0] / seconds:.1f}x HFEngine's fit.")
    print(f"Peak assumed: {PEAK / 1e12:.0f} TFLOP/s.")
    if args.write:
        PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
