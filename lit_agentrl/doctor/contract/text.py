"""The contract as a table."""

from __future__ import annotations

from lit_agentrl.doctor.contract.facts import Facts
from lit_agentrl.doctor.contract.run import Contract
from lit_agentrl.doctor.contract.settings import BASELINE
from lit_agentrl.doctor.contract.verdict import Outcome, hint

HEAD = "setting                     ranks  micro-b.  rows   loss     logged   1 - cos  norm     largest  verdict"


def render(contract: Contract) -> str:
    """Baseline, table, limits, what to do, verdict."""
    base, limits = contract.baseline, contract.limits
    exact = [] if contract.exact is None else [contract.exact]
    lines = [
        f"{base.model}, {base.precision}, on {base.device}",
        f"one optimiser step on {base.num_rows} rows of at most {base.longest} tokens, {base.num_weights} trained "
        "weights; differences from the first line",
        "",
        HEAD,
        _baseline(base),
        *(_row(outcome, "sets the limits" if outcome.status == "held" else outcome.status) for outcome in exact),
        *(_row(outcome, outcome.status) for outcome in contract.outcomes),
        f"{f'limits ({base.precision})':<43}{limits.loss:8.0e} {limits.loss:8.0e} {limits.one_minus_cosine:8.0e} "
        f"{limits.norm:8.0e} {limits.largest:8.0e}",
        "",
        *(line for outcome in exact for line in _why_loosest(outcome)),
        *_reasons(contract.outcomes),
        _verdict(contract),
    ]
    return "\n".join(lines)


def _baseline(base: Facts) -> str:
    logged = "-" if base.logged is None else f"{base.logged:.4f}"
    figures = f"{base.loss + 0.0:8.4f} {logged:>8} {'':8} {base.norm:8.2e} {'':8}"
    return f"{BASELINE.name:<28}{base.ranks:4}  {base.micro_batches:8}  {base.num_rows:4} {figures}".rstrip()


def _row(outcome: Outcome, verdict: str) -> str:
    name, facts = f"{outcome.setting.name:<28}", outcome.facts
    if facts is None or facts.difference is None:
        return f"{name}{outcome.setting.ranks:4}  {'':57}{verdict}"
    found = facts.difference
    rows = "same" if outcome.has_same_rows else "OTHER"
    values = (outcome.loss_difference, outcome.logged_difference, found.one_minus_cosine, found.norm, found.largest)
    figures = " ".join(f"{'-':>8}" if value is None else f"{value:8.1e}" for value in values)
    return f"{name}{facts.ranks:4}  {facts.micro_batches:8}  {rows:<5}{figures}  {verdict}"


def _why_loosest(exact: Outcome) -> list[str]:
    """Where the step in float32 gave no limits."""
    if exact.status == "held":
        return []
    return [
        f"{exact.setting.name}: {exact.status}: {exact.reason}",
        "    so the loosest limits of 16 bits are used",
        "",
    ]


def _reasons(outcomes: list[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        if outcome.reason:
            lines.append(f"{outcome.setting.name}: {outcome.status}: {outcome.reason}")
        if outcome.status == "violated":
            lines.append(f"    {hint(outcome, outcomes)}")
    return [*lines, ""] if lines else []


def _verdict(contract: Contract) -> str:
    counts = {s: sum(o.status == s for o in contract.outcomes) for s in ("held", "violated", "failed", "skipped")}
    counted = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    verdict = "the contract is kept" if contract.is_kept else "the contract is broken: see above"
    return f"{verdict} ({counted}; {contract.seconds:.0f} s)"
