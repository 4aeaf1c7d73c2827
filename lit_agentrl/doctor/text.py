"""The findings as text: a section a question, each ended by `passed` or `look here`."""

from __future__ import annotations

from lit_agentrl.doctor.cost import SideCost
from lit_agentrl.doctor.equality import FURTHER, Distance
from lit_agentrl.doctor.findings import Findings
from lit_agentrl.doctor.memory import GIB
from lit_agentrl.doctor.noise import MAX_KL, MAX_OUTSIDE, Ratios
from lit_agentrl.doctor.plan_text import memory_lines
from lit_agentrl.doctor.recommendation import in_words
from lit_agentrl.doctor.rows import Reuse


def render(findings: Findings) -> str:
    """The whole report."""
    head = [
        f"{findings.model}, {findings.precision}, on {findings.device}",
        f"rows: {findings.data}; measured: {findings.measured.num_rows} of {findings.collected.num_rows}",
    ]
    sections = [
        _equality(findings),
        _reuse(findings),
        _cost(findings),
        _noise(findings),
        _advice(findings),
        _memory(findings),
    ]
    verdict = "healthy" if findings.is_healthy else "not healthy: see `look here` above"
    return "\n".join([*head, *("\n" + "\n".join(section) for section in sections), "", verdict])


def _equality(findings: Findings) -> list[str]:
    title = "1. Is the shared-prefix forward the padded one?"
    found = findings.equality
    if found is None:
        return [title, f"  passed: nothing to compare, rows are computed in full ({findings.sharing.refusal})"]
    lines = [
        title,
        "  |difference| of log-probabilities, nats       max      mean",
        _distance("shared - padded", found.logprobs),
    ]
    if found.padded_rounding is not None and found.grouped_rounding is not None:
        lines += [
            _distance(f"padded - its {found.exact} copy (rounding)", found.padded_rounding),
            _distance(f"shared - the {found.exact} copy (rounding)", found.grouped_rounding),
        ]
    else:
        lines.append("  rounding not measured: no memory for a more exact copy of the model, or it would take too long")
    lines.append(
        f"  gradients: cosine {found.cosine:.7f}, norms differ by {found.norm_difference:.1e} of the padded one's"
    )
    limits = found.limits
    stated = f"limits: {found.allowed:.2g} nats, cosine {limits.cosine:g}, norm {limits.norm:g}"
    stated += f", {FURTHER:g} x the mean rounding" if found.exact else ""
    if found.is_healthy:
        return [*lines, f"  passed ({stated})"]
    off = "the start-up check refuses sharing" if findings.sharing.refusal else "model.share_prefix is false"
    ignored = "" if findings.is_configured_to_share else f"; {off}, so training is not touched"
    return [*lines, f"  look here: beyond the {stated}{ignored}"]


def _reuse(findings: Findings) -> list[str]:
    sharing, collected = findings.sharing, findings.collected
    lines = ["2. How much is there to share?", _count("collected", collected), _count("measured", findings.measured)]
    if sharing.refusal:
        return [*lines, f"  look here: this model does not share prefixes: {sharing.refusal}"]
    used = f"backend {sharing.backend}; `auto` shares from {sharing.gate:g} on"
    if not findings.is_configured_to_share:
        return [*lines, f"  look here: switched off by model.share_prefix false ({used})"]
    if sharing.reuse < sharing.gate:
        return [*lines, f"  look here: too little to share ({used})"]
    return [*lines, f"  passed: {used}"]


def _cost(findings: Findings) -> list[str]:
    cost = findings.cost
    lines = [
        "3. What does an update cost? Forward, loss, backward of the measured rows",
        "                 median s   range            peak GiB   micro-batches",
        _side("padded", cost.padded),
    ]
    tried = ", ".join(f"{budget}: {took:.3f} s" for budget, took in cost.tried.items())
    lines.append(f"  padded tokens a micro-batch that were tried: {tried}")
    if cost.grouped is None or cost.speedup is None or cost.memory_ratio is None:
        return [*lines, "  passed: the padded forward is the only one for this model"]
    lines.insert(3, _side("shared", cost.grouped))
    if len(cost.padded.seconds) < findings.repeats:
        lines.append(
            f"  {len(cost.padded.seconds)} instead of {findings.repeats} repeats: the time (--seconds) was over"
        )
    fact = f"shared is {in_words(cost.speedup, cost.memory_ratio)}"
    pays = cost.speedup >= 1.0 or cost.memory_ratio >= 1.0
    return [*lines, f"  {'passed' if pays else 'look here'}: {fact}"]


def _noise(findings: Findings) -> list[str]:
    title = "4. How far from 1 are ratios at learning rate 0?"
    noise = findings.noise
    if noise is None:
        return [title, "  passed: nothing was sampled, so there is no ratio (supervised rows)"]
    low, high = noise.clip
    unit = "of rows " if noise.is_per_row else ""
    lines = [
        f"{title} (ratios {unit}inside [{1 - low:g}, {1 + high:g}] are not clipped)",
        "  trainer computes in, against the sampler         rows       max |r-1|    outside       KL",
        *(_ratios(ratios) for found in noise.sampler.values() for ratios in found),
        _ratios(noise.itself),
        _ratios(noise.again),
    ]
    stated = f"limits: {MAX_OUTSIDE:.1%} outside, KL {MAX_KL:g}"
    trained = f"old_logprobs: {noise.old_logprobs}"
    return [*lines, f"  {'passed' if noise.is_healthy else 'look here'}: {trained} ({stated})"]


def _advice(findings: Findings) -> list[str]:
    return ["5. What to set", *(f"  {a.option}: {a.value}\n      {a.because}" for a in findings.advice)]


def _memory(findings: Findings) -> list[str]:
    title = "6. What memory does it take?"
    if findings.memory is None:
        return [title, f"  not planned: {findings.unplanned}"]
    return [title, *memory_lines(findings.memory)]


def _distance(name: str, distance: Distance) -> str:
    return f"  {name:<40}  {distance.max:8.1e}  {distance.mean:8.1e}"


def _count(name: str, reuse: Reuse) -> str:
    return (
        f"  {name}: {reuse.num_rows} rows, {reuse.row_tokens} tokens, {reuse.unique_tokens} unique: "
        f"{reuse.ratio:.2f} row tokens and {reuse.padded_ratio:.2f} padded tokens per unique token"
    )


def _side(name: str, side: SideCost) -> str:
    spread = f"{min(side.seconds):.3f} - {max(side.seconds):.3f}"
    return (
        f"  {name:<14} {side.median_seconds:8.3f}   {spread:<15}  {side.peak_bytes / GIB:8.3f}   "
        f"{side.num_micro_batches} of at most {side.largest} tokens"
    )


def _ratios(ratios: Ratios) -> str:
    outside = f"{ratios.num_outside}/{ratios.num_tokens}"
    figures = f"{ratios.max_error:8.1e}  {outside:>9}  {ratios.approx_kl:8.1e}"
    return f"  {ratios.compared:<46} {ratios.micro_batch:<16} {figures}"
