"""The planner's findings as text."""

from __future__ import annotations

from lit_agentrl.doctor.memory import GIB
from lit_agentrl.doctor.plan_report import MemoryFindings, Option, Trial


def memory_lines(found: MemoryFindings) -> list[str]:
    """The section of the report, without its title."""
    lines = [] if found.trial is None else _trial(found.trial)
    room = "" if found.memory is None else f"  fits {found.memory:g}"
    lines.append(
        f"  at data.max_tokens {found.max_tokens}, GiB of a rank     resting  update  rollout  keys/values   peak"
        f"   CPU{room}"
    )
    lines += [_option(option, found.memory) for option in found.options]
    lines.append(
        f"  rollout and keys/values are at most that: {found.kv_bytes / 1024:.0f} KiB a token; peak holds them"
    )
    if found.images is not None:
        lines.append(f"  {_images(found.images)}")
    return lines


def _images(count: int) -> str:
    if count:
        return f"update is for a micro-batch that shows {count} images of the sizes met, their pixels included"
    return (
        "this model sees, but the plan is for rows of text: images add their pixels and the vision tower's activations"
        " (doctor without --plan counts those of the rows that it collects)"
    )


def _trial(trial: Trial) -> list[str]:
    parts = trial.parts
    held = [
        ("weights", parts.weights),
        ("gradients", parts.gradients),
        ("optimiser", parts.optimizer),
        ("pass", parts.activations),
        ("update", parts.update),
    ]
    said = ", ".join(f"{name} {size / GIB:.3f}" for name, size in held)
    if trial.measured is None or trial.error is None:
        outcome = f"not measured: {trial.unmeasured}"
    else:
        outcome = f"measured {trial.measured / GIB:.3f} GiB (error {trial.error:+.1%} of what it adds to the weights)"
    return [
        f"  a step of {trial.tokens} tokens: peak memory: predicted {trial.predicted / GIB:.3f} GiB, {outcome}",
        f"      {said}",
    ]


def _option(option: Option, memory: float | None) -> str:
    peak = option.peak
    kept = peak.resting + peak.reference + peak.replica
    sizes = f"{kept / GIB:7.2f} {peak.update / GIB:7.2f}  {peak.rollout / GIB:7.2f}      {peak.cached / GIB:7.2f}"
    fits = "" if memory is None else f"  {'yes' if option.fits(memory) else 'no'}"
    return f"  {option.name:<44} {sizes} {option.device / GIB:6.2f} {option.host / GIB:5.2f}{fits}"
