"""One GRPO step against TRL's GRPOTrainer: same model, prompts, group size, lengths, reward and optimiser.

Run: `pip install -e ".[bench]"`, then `python benchmarks/vs_trl.py [--repeats 3]` (about 10 minutes on 2 cores). The
table lies in `benchmarks/vs_trl.md`.

The sides run in processes of their own that take turns, with the same threads: SmolLM2-135M-Instruct in float32 from
the same folder, LoRA r = 16 on all linear layers, one prompt of 256 tokens with G = 8 completions of exactly 32 new
tokens (the end token is disabled on both sides), temperature 1, one AdamW step on all 8 completions, no KL term, no
gradient checkpointing, dropout 0. The reward is the share of even token ids. A step is rollout + reward + advantage +
update; the first step of each process warms up and is not counted. `ours, padded` is our step with prefix sharing off.

`--device cuda` does the same on a GPU: a random policy in the shape of Qwen3-0.6B with all weights trained in
bfloat16 (no LoRA), a prompt of 1024 byte-level tokens, 64 new ones; the table goes to `benchmarks/vs_trl_gpu.md`. The
clock is read when the GPU has ended. `--device cuda-test` is that on a CPU with a tiny model, to test the script.

The numerical error: the log-probabilities that each side assigns to one fixed set of 8 completions, compared with a
plain forward in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GROUP = 8


@dataclass(frozen=True)
class Size:
    """What a step is measured on."""

    prompt: int
    new: int
    unused: int
    """A token that never ends an action, as it is hardly ever sampled."""
    accelerator: str
    dtype: str
    has_lora: bool


SIZES = {
    "cpu": Size(256, 32, 49_151, "cpu", "float32", True),
    "cuda": Size(1024, 64, 151_935, "gpu", "bfloat16", False),
    "cuda-test": Size(200, 8, 511, "cpu", "float32", False),
}
size = SIZES["cpu"]
weights = ""
"""The folder of the random policy; empty for the one that is downloaded."""
SIDES = ("trl", "ours", "ours, padded")


def main() -> None:
    """Run the sides in turn, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a process")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    global size, weights
    size, weights = SIZES[parsed.device], parsed.weights
    if parsed.side:
        measured = run_trl(parsed.steps) if parsed.side == "trl" else run_ours(parsed.steps, parsed.side == "ours")
        measured.setdefault("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        print("RESULT " + json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as place:
        if parsed.device != "cpu":
            import torch
            from gpu_policy import build

            weights = build(Path(place), "0.6b", parsed.device == "cuda-test", getattr(torch, size.dtype))
        results = measure(parsed)
    text = table(results, parsed.device)
    print(text)
    (parsed.output or HERE / ("vs_trl.md" if parsed.device == "cpu" else "vs_trl_gpu.md")).write_text(text)


def measure(parsed: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What the sides' processes say, in turn."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(parsed.repeats):
        for side in SIDES:
            words = [sys.executable, __file__, "--side", side, "--steps", str(parsed.steps)]
            words += ["--device", parsed.device, "--weights", weights]
            done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            results[side].append(json.loads(lines[-1][7:]))
            print(repeat, side, {k: v for k, v in results[side][-1].items() if k != "steps"}, flush=True)
    return results


def now() -> float:
    """Seconds, when a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def gpu_memory() -> dict[str, float]:
    """Peak GiB of the GPU so far; nothing without one."""
    import torch

    return {"memory": torch.cuda.max_memory_allocated() / 2**30} if size.accelerator == "gpu" else {}


def folder() -> str:
    """What both sides load: the dequantised SmolLM2, or the random policy."""
    if weights:
        return weights
    from lit_agentrl.models.pretrained import resolve

    return str(resolve("smollm2-135m-instruct").weights)


def prompt_ids() -> list[int]:
    """A chat prompt of exactly 256 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    words = "The warehouse lists its goods: " + ", ".join(f"shelf {i} holds {i * 7 % 13} boxes" for i in range(60))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": words}], add_generation_prompt=True)["input_ids"]
    tail = ids[-5:]  # the end of the turn and the answer's prefix stay whole
    return ids[: size.prompt - 5] + tail


def even_share(ids: list[int]) -> float:
    """The reward: the share of even token ids."""
    return sum(i % 2 == 0 for i in ids) / max(1, len(ids))


def run_ours(steps: int, shared: bool) -> dict[str, Any]:
    """Our step, through the engine, the rows, the module and Lightning's Trainer."""
    import lightning as L
    import torch

    from lit_agentrl.datamodules import RolloutDataModule
    from lit_agentrl.methods import GRPOPlusPlusModule
    from lit_agentrl.models.policy import Lora
    from lit_agentrl.rewards import Reward
    from lit_agentrl.rollouts.chain import ChainRollout
    from lit_agentrl.rollouts.hf import HFEngine
    from lit_agentrl.types import EnvironmentSuite, Observation, SamplingParams

    ids = prompt_ids()

    class Fixed:
        anchor, success = 0, None

        def reset(self) -> Observation:
            return Observation("")

        def step(self, action: str) -> tuple[Observation, float, bool]:
            return Observation(""), 0.0, True

        def close(self) -> None: ...

    class Suite(EnvironmentSuite):
        def tasks(self, split: str) -> list[str]:
            return ["one"]

        def make(self, task: str) -> Fixed:
            return Fixed()

    def reward(trajectory: Any) -> float:
        return even_share(trajectory.steps[0].action_ids)

    class Clock(L.Callback):
        """Wall seconds of collection and update of every step."""

        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.began = now()

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            update = now() - self.began
            rollout = data.iteration_metrics["time/collect"]
            self.steps.append({"rollout": rollout, "update": update, "step": rollout + update})

    torch.manual_seed(0)
    model = GRPOPlusPlusModule(
        pretrained=folder(),
        dtype=size.dtype,
        lora=Lora(r=16, alpha=32) if size.has_lora else None,
        advantage="grpo",
        share_prefix="auto" if shared else False,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-6),
    )
    data = RolloutDataModule(
        Suite(),
        tokenizer=folder(),
        engine=HFEngine(stop_token_ids=[]),
        rollout=ChainRollout(cut_actions="continue"),
        rewards=[Reward(reward)],
        sampling=SamplingParams(temperature=1.0, max_new_tokens=size.new),
        num_prompts=1,
        group_size=GROUP,
        max_length=2 * size.prompt,
        max_tokens=GROUP * 2 * size.prompt,
    )
    chat = data._parts()[1]
    chat.opening = lambda observation: list(ids)  # type: ignore[method-assign]  # the very ids TRL is given
    chat.end_of_turn_id = lambda: size.unused  # type: ignore[method-assign]  # an unused token: no action ends by itself
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=steps + 1,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[clock],
        accelerator=size.accelerator,
        devices=1,
        precision="32-true" if size.dtype == "float32" else "bf16-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(model, data)
    counted = clock.steps[1:]
    lengths = {len(s.action_ids) for g in data.groups for t in g.trajectories for s in t.steps}
    assert lengths == {size.new}, lengths
    return summary(counted) | gpu_memory() | {"error": error_of_ours(model)}


def error_of_ours(model: Any) -> float:
    """The largest difference of log-probabilities on fixed completions from a float64 forward."""
    import torch

    rows = fixed_rows()
    model.policy.to(rows.device)  # the trainer has taken it back to the CPU
    targets = torch.zeros_like(rows, dtype=torch.bool)
    targets[:, size.prompt :] = True
    lengths = torch.full((len(rows),), rows.shape[1], device=rows.device)
    with torch.no_grad():
        logprobs = model.policy(rows, lengths, targets=targets).logprobs[:, size.prompt :]
    return float((logprobs.double() - exact(model.policy.lm, rows)).abs().max())


def fixed_rows() -> Any:
    """8 rows of the prompt and 32 tokens drawn with a fixed seed."""
    import torch

    highest = min(40_000, size.unused)
    tail = torch.randint(100, highest, (GROUP, size.new), generator=torch.Generator().manual_seed(1))
    rows = torch.cat([torch.tensor([prompt_ids()]).expand(GROUP, -1), tail], 1)
    return rows.cuda() if size.accelerator == "gpu" else rows


def exact(lm: Any, rows: Any) -> Any:
    """Log-probabilities of the rows' last 32 tokens by a plain forward in float64."""
    import torch

    lm = lm.double()
    with torch.no_grad():
        out = [lm(input_ids=row[None], use_cache=False).logits[0, size.prompt - 1 : -1].log_softmax(-1) for row in rows]
    lm.float()
    return torch.stack([o.gather(-1, row[size.prompt :, None])[:, 0] for o, row in zip(out, rows, strict=True)])


def run_trl(steps: int) -> dict[str, Any]:
    """TRL's step, timed by wrapping its rollout and its whole training step."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    ids = prompt_ids()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    lm = AutoModelForCausalLM.from_pretrained(folder(), dtype=getattr(torch, size.dtype))
    lm.generation_config.eos_token_id = None
    prompt = tokenizer.decode(ids)
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [even_share(c) for c in completion_ids]

    place = Path(tempfile.mkdtemp())
    # from a file: fingerprints of tables made in memory fail with some releases of pyarrow
    (place / "prompts.jsonl").write_text((json.dumps({"prompt": prompt}) + "\n") * (steps + 1))
    config = GRPOConfig(
        output_dir=str(place),
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        max_completion_length=size.new,
        gradient_accumulation_steps=1,
        max_steps=steps + 1,
        beta=0.0,
        learning_rate=1e-6,
        temperature=1.0,
        bf16=size.dtype == "bfloat16",
        fp16=False,
        use_cpu=size.accelerator == "cpu",
        gradient_checkpointing=False,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        generation_kwargs={"min_new_tokens": size.new},
    )
    trainer = GRPOTrainer(
        model=lm,
        reward_funcs=reward,
        args=config,
        train_dataset=load_dataset("json", data_files=str(place / "prompts.jsonl"), split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)
        if size.has_lora
        else None,
    )
    measured: list[dict[str, float]] = []
    generate, train = trainer._generate_and_score_completions, trainer.training_step
    spent = {"rollout": 0.0}

    def timed_generate(inputs: Any) -> Any:
        began = now()
        result = generate(inputs)
        spent["rollout"] = now() - began
        assert result["completion_ids"].shape == (GROUP, size.new), result["completion_ids"].shape
        return result

    def timed_train(*args: Any, **kwargs: Any) -> Any:
        spent["began"] = now()
        return train(*args, **kwargs)

    class Clock(__import__("transformers").TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: object, **__: object) -> None:  # after the optimiser's step
            step = now() - spent["began"]
            measured.append({"rollout": spent["rollout"], "update": step - spent["rollout"], "step": step})

    trainer._generate_and_score_completions, trainer.training_step = timed_generate, timed_train
    trainer.add_callback(Clock())
    trainer.train()
    memory = gpu_memory()
    rows = fixed_rows()
    mask = torch.ones_like(rows)
    with torch.no_grad():
        logprobs = trainer._get_per_token_logps_and_entropies(trainer.model, rows, mask, size.new)[0]
    error = float((logprobs.double() - exact(trainer.model, rows)).abs().max())
    return summary(measured[1:]) | memory | {"error": error}


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the counted steps."""
    return {key: statistics.median(step[key] for step in steps) for key in ("rollout", "update", "step")} | {
        "steps": steps
    }


def table(results: dict[str, list[dict[str, Any]]], device: str) -> str:
    """The results as Markdown, with the machine and the versions."""
    option = "" if device == "cpu" else f" --device {device}"
    lines = [
        "# One GRPO step against TRL",
        "",
        f"`python benchmarks/vs_trl.py{option}`. Median over {len(results['trl'])} processes a side of the median",
        "step; ratios are medians over repeats of TRL's step (update) / this one in the same repeat.",
        "",
        "| side | rollout s | update s | step s | new tokens/s | peak GiB | log-prob error | TRL step / step "
        "| TRL update / update |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side, repeats in results.items():
        mid = {k: statistics.median(r[k] for r in repeats) for k in ("rollout", "update", "step", "memory", "error")}
        pairs = list(zip(results["trl"], repeats, strict=True))
        ratios = " | ".join(f"{statistics.median(t[k] / r[k] for t, r in pairs):.2f}" for k in ("step", "update"))
        rate = GROUP * size.new / mid["rollout"]
        seconds = " | ".join(f"{mid[key]:.{2 if device == 'cpu' else 4}f}" for key in ("rollout", "update", "step"))
        lines.append(f"| {side} | {seconds} | {rate:.0f} | {mid['memory']:.2f} | {mid['error']:.1e} | {ratios} |")
    import torch

    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "torch", "transformers", "lightning", "peft"))
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    lines += [
        "",
        f"{gpu}{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}; {versions}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
