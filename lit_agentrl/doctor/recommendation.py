"""What the measurements say about the configuration: one line per option, with the number it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from lit_agentrl.doctor.cost import Cost
from lit_agentrl.doctor.equality import Equality
from lit_agentrl.doctor.memory import GIB
from lit_agentrl.doctor.noise import Noise, Ratios
from lit_agentrl.models.scoring import MIN_REUSE, MIN_REUSE_DENSE

FASTER, SLOWER = 1.05, 0.95  # between them, repeats on one machine differ by as much
CLEARLY_FASTER = 1.2  # of single timings
SHARE_OF_MEMORY = 0.8  # the optimiser and fragmentation need some too


@dataclass(frozen=True)
class Advice:
    """One option and why."""

    option: str
    value: str
    because: str


@dataclass(frozen=True)
class Budget:
    """What a micro-batch may hold."""

    max_tokens: int
    """As configured."""
    least: int
    """The longest row that may come."""
    available: int | None
    """Free bytes; None where they are not known."""


@dataclass(frozen=True)
class Sharing:
    """What decides about sharing prefixes."""

    refusal: str
    """Why the model takes the padded path; empty where it shares."""
    backend: str
    """The attention of the shared forward; empty where the model refuses it."""
    reuse: float
    """Row tokens per unique token of the collected rows: what the gate sees."""
    measured_reuse: float
    """The same of the rows that were timed."""

    @property
    def gate(self) -> float:
        """The reuse from which on `auto` shares."""
        return MIN_REUSE_DENSE if self.backend == "dense" else MIN_REUSE


def advise(
    sharing: Sharing,
    equality: Equality | None,
    cost: Cost,
    noise: Noise | None,
    budget: Budget,
) -> list[Advice]:
    """All options; those about sampling only where something was sampled.

    Args:
        sharing: What the model and the rows allow.
        equality: None where the model refuses sharing.
        cost: Of the two forwards.
        noise: None where nothing was sampled.
        budget: Of a micro-batch.
    """
    first = advise_sharing(sharing, equality, cost)
    is_open = first.value == "auto" and sharing.reuse >= sharing.gate
    shares = not sharing.refusal and (first.value == "true" or is_open)
    tokens = advise_max_tokens(shares, cost, budget)
    if noise is None:
        return [first, tokens]
    return [first, advise_precision(noise), tokens, advise_old_logprobs(noise)]


def advise_sharing(sharing: Sharing, equality: Equality | None, cost: Cost) -> Advice:
    """`model.share_prefix`."""
    option = "model.share_prefix"
    if sharing.refusal and equality is not None and equality.is_healthy:
        fact = f"refused at start-up ({sharing.refusal}), yet on these rows the two forwards differ by rounding only"
        return Advice(option, "auto", fact)
    if sharing.refusal or equality is None or cost.speedup is None or cost.memory_ratio is None:
        return Advice(option, "auto", "the model takes the padded path by itself")
    if not equality.is_healthy:
        return Advice(
            option, "false", f"the two forwards differ: {equality.logprobs.max:.1e} nats, cosine {equality.cosine:.4f}"
        )
    fact = f"{in_words(cost.speedup, cost.memory_ratio)}, at a reuse of {sharing.measured_reuse:.2f}"
    if sharing.reuse >= sharing.gate:
        loses = cost.speedup < SLOWER and cost.memory_ratio < FASTER
        return Advice(option, "false" if loses else "auto", fact)
    if cost.speedup > FASTER and cost.memory_ratio > FASTER:
        return Advice(option, "true", f"{fact}; auto would start at {sharing.gate}")
    return Advice(option, "auto", f"{fact}; it computes rows in full below {sharing.gate}")


def in_words(speedup: float, memory_ratio: float) -> str:
    """What sharing does to time and memory."""
    return f"{speedup:.2f} x as fast, {1 / memory_ratio:.2f} of the memory"


def advise_precision(noise: Noise) -> Advice:
    """`model.dtype` and `trainer.precision`."""
    option = "precision"
    configured = noise.sampler[noise.configured][0]
    others = {name: found[0] for name, found in noise.sampler.items() if name != noise.configured}
    fact = "; ".join(
        f"trainer in {name}: {_outside(found)}" for name, found in {noise.configured: configured, **others}.items()
    )
    better = others.get("float32")
    if not configured.is_healthy and better is not None and better.outside < configured.outside:
        wanted = "--model.dtype float32 --trainer.precision 32-true"
        return Advice(option, wanted, f"{fact}, with a sampler still in {noise.configured}")
    return Advice(option, f"{noise.configured}, as it is", fact)


def advise_old_logprobs(noise: Noise) -> Advice:
    """`model.old_logprobs`."""
    sampler = noise.sampler[noise.configured][0]
    fact = f"sampler against trainer: {_outside(sampler)}, KL {sampler.approx_kl:.1e}"
    if sampler.is_healthy:
        return Advice("model.old_logprobs", "sampler", f"{fact}; no second forward needed")
    return Advice("model.old_logprobs", "recompute", f"{fact}; recomputed: {_outside(noise.again)}")


def advise_max_tokens(shares: bool, cost: Cost, budget: Budget) -> Advice:
    """`data.max_tokens`, of unique tokens where the rows are shared: what memory allows, for padded rows the fastest.

    The estimate takes the peak of the measured rows per token of their largest micro-batch, which also holds what does
    not grow with tokens (gradients), so it errs towards too much.
    """
    option, available = "data.max_tokens", budget.available
    side, unit = cost.padded, "padded"
    if shares and cost.grouped is not None:
        side, unit = cost.grouped, "unique"
    estimate = side.bytes_per_token * budget.max_tokens
    fact = f"{side.peak_bytes / GIB:.3f} GiB for {side.largest} {unit} tokens, "
    fact += f"so about {estimate / GIB:.2f} for {budget.max_tokens}"
    if available is not None:
        fact += f" of {available / GIB:.1f} free"
        if estimate > SHARE_OF_MEMORY * available:
            fits = int(SHARE_OF_MEMORY * available / side.bytes_per_token)
            return Advice(option, str(max(fits, budget.least)), fact)
    is_faster = cost.tried[max(cost.tried)] > CLEARLY_FASTER * cost.tried[cost.padded.budget]
    if unit == "padded" and is_faster and max(side.budget, budget.least) < budget.max_tokens:
        seconds = ", ".join(f"{took:.2f} s at {tokens}" for tokens, took in cost.tried.items())
        return Advice(option, str(max(side.budget, budget.least)), f"padded rows took {seconds}")
    return Advice(option, str(budget.max_tokens), fact)


def _outside(ratios: Ratios) -> str:
    return f"{ratios.num_outside} of {ratios.num_tokens} tokens outside"
