"""DPO: what each term costs by hand, what the reference is, and what must not change a loss or its gradient."""

import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_agentrl.datamodules.pairs import collate_pairs
from lit_agentrl.errors import UserError
from lit_agentrl.methods import DPOModule
from lit_agentrl.methods.preference_terms import TERMS, PairScores, TermOptions, term
from lit_agentrl.models import PaddedModel, PrefixGroupedModel
from lit_agentrl.models.policy import Lora
from lit_agentrl.models.reference import Reference
from lit_agentrl.rows import Row
from lit_agentrl.types import PreferenceBatch

PROMPT = [1, 60, 61, 62, 63, 64, 65, 66, 67, 68]


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def scores(logp: list[float], reference: list[float], lengths: list[int]) -> PairScores:
    """Of one pair."""
    return PairScores(f64(*logp)[None], f64(*reference)[None], torch.tensor([lengths]))


def row(prompt: list[int], answer: list[int]) -> Row:
    made = Row()
    made.extend(prompt)
    made.extend(answer, [0.0] * len(answer))
    return made


def batch(rows_per_pair: int = 2) -> PreferenceBatch:
    """Three pairs: two of one prompt, answers of different lengths."""
    prompts = [PROMPT, PROMPT, [1, 90, 91, 92, 93, 94, 95]]
    answers = [([70, 71], [72, 73, 74]), ([75], [70, 71]), ([80, 81, 82, 83], [84])]
    pairs = [
        [row(prompt, chosen), row(prompt, rejected), row([*prompt[:-1], 99], chosen)][:rows_per_pair]
        for prompt, (chosen, rejected) in zip(prompts, answers, strict=True)
    ]
    return collate_pairs(pairs, pairs)


def module(lm: str, **more: Any) -> DPOModule:
    """A module in float64, its adapter too (peft makes it float32)."""
    torch.manual_seed(0)
    made = DPOModule(pretrained=lm, dtype="float64", lora=Lora(r=4, alpha=8), **more)
    made.trainer = Mock(global_step=0, accumulate_grad_batches=1, world_size=1)
    made.configure_model()
    made.policy.double()
    return made


def move(made: DPOModule, by: float = 0.05) -> None:
    """Away from the reference."""
    generator = torch.Generator().manual_seed(1)
    for parameter in made.policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def gradients(made: DPOModule, given: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
    loss, _ = made.objective(given)
    loss.backward()
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return loss.detach(), found


# --- terms ---


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {}, math.log1p(math.exp(-1.5))),
        ("sigmoid", {"label_smoothing": 0.1}, 0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5))),
        ("robust", {}, math.log1p(math.exp(-1.5))),
        ("sigmoid_norm", {"norm_beta": 2.0}, math.log1p(math.exp(-2 * (2 / 4 + 1 / 2)))),
        ("hinge", {"beta": 0.1}, 0.7),
        ("ipo", {}, (2 / 4 + 1 / 2 - 1) ** 2),
        ("ipo", {"ipo": "sum"}, (3 - 1) ** 2),
        ("bco_pair", {}, math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-0.5))),
        ("apo_zero", {}, 1 - 1 / (1 + math.exp(-1.0)) + 1 / (1 + math.exp(0.5))),
        ("dpop", {}, math.log1p(math.exp(-1.5))),
        ("nll", {}, 10 / 4),
        ("simpo", {"simpo_beta": 2.0, "simpo_gamma": 1.0}, math.log1p(math.exp(-(2 * (-10 / 4 + 6 / 2) - 1)))),
        (
            "orpo",
            {},
            math.log1p(math.exp(10 / 4 - 6 / 2 + math.log1p(-math.exp(-2.5)) - math.log1p(-math.exp(-3.0)))),
        ),
        ("image", {}, math.log1p(math.exp(-0.5 * (2 - 1)))),
        ("anchor", {"delta": 0.4}, math.log1p(math.exp(-(0.5 * 2 - 0.4)))),
    ],
)
def test_terms_by_hand(name: str, options: dict[str, Any], expected: float) -> None:
    """Chosen: 4 tokens, log-probability -10, reference -12. Rejected: 2, -6, -5. Corrupted: 4, -11, -12. Beta 0.5."""
    given = scores([-10, -6, -11], [-12, -5, -12], [4, 2, 4])
    assert_close(term(name, given, TermOptions(**({"beta": 0.5} | options))), f64(expected))


def test_every_term_is_tested_and_a_filler_costs_nothing() -> None:
    """An empty pair keeps ranks in step: 0, and no NaN on the way back."""
    for name in TERMS:
        logp = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        value = term(name, PairScores(logp, torch.zeros(1, 3).double(), torch.zeros(1, 3).long()), TermOptions())
        value.sum().backward()
        assert value.item() == 0.0
        assert logp.grad is not None
        assert logp.grad.isfinite().all()


def test_a_pair_without_images_has_no_image_term() -> None:
    """Its third row is empty; the other terms are what they were."""
    given = scores([-10, -6, 0], [-12, -5, 0], [4, 2, 0])
    assert term("image", given, TermOptions()).item() == 0.0
    assert term("anchor", given, TermOptions()).item() > 0.0


def test_ipo_has_its_minimum_at_half_over_beta() -> None:
    """Mean log-ratios that differ by 1 / (2 beta) cost nothing, and pull nowhere; one way or the other they cost."""
    logp = f64(-8, -12)[None].requires_grad_()
    given = PairScores(logp, f64(-18, -12)[None], torch.tensor([[2, 3]]))
    value = term("ipo", given, TermOptions(beta=0.1))
    value.sum().backward()
    assert_close(value, f64(0))
    assert_close(logp.grad, torch.zeros(1, 2).double())
    for moved in (-7.0, -9.0):
        other = PairScores(f64(moved, -12)[None], f64(-18, -12)[None], torch.tensor([[2, 3]]))
        assert_close(term("ipo", other, TermOptions(beta=0.1)), f64(0.25))


# --- the module ---


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"sigmoid": 1.0}, math.log(2)),
        ({"sigmoid": 1.0, "image": 1.0, "anchor": 1.0}, 3 * math.log(2)),
        ({"sigmoid_norm": 1.0}, math.log(2)),
        ({"sigmoid": 0.8, "bco_pair": 0.2}, 1.2 * math.log(2)),
        ({"ipo": 1.0}, 25.0),
    ],
)
def test_a_policy_that_is_its_reference(tiny_lm: str, losses: dict[str, float], expected: float) -> None:
    """DPO costs log 2, mDPO 3 log 2, whatever the answers are; the loss is a mean over pairs."""
    given = batch(3 if "image" in losses else 2)
    loss, sums = module(tiny_lm, losses=losses).objective(given)
    assert_close(loss, f64(expected)[0])
    assert sums["train/margin"] == 0
    assert sums["train/accuracy"] == 0


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
def test_no_smoothing_is_plain_dpo(tiny_lm: str, name: str) -> None:
    """cDPO and robust DPO at e = 0, away from the reference, in loss and gradient; at e = 0.1 they differ."""
    found = []
    for losses, smoothing in (({"sigmoid": 1.0}, 0.0), ({name: 1.0}, 0.0), ({name: 1.0}, 0.1)):
        made = module(tiny_lm, losses=losses, label_smoothing=smoothing, beta=1.0)
        move(made)
        found.append(gradients(made, batch()))
    assert_close(found[1], found[0])
    assert abs(found[2][0] - found[0][0]) > 1e-3


@pytest.mark.parametrize("losses", [{name: 1.0} for name in TERMS] + [{"sigmoid": 0.8, "bco_pair": 0.2, "nll": 1.0}])
def test_grouped_equals_plain(tiny_lm: str, losses: dict[str, float]) -> None:
    """Chosen and rejected share their prompt in one forward: the same loss, gradients and metrics as without."""
    found = []
    for share in (True, False):
        made = module(tiny_lm, losses=losses, share_prefix=share, beta=0.5)
        assert type(made.policy) is (PrefixGroupedModel if share else PaddedModel)
        move(made)
        given = batch(3 if made.corrupts_images else 2)
        found.append((*gradients(made, given), made.objective(given)[1]))
    assert_close(found[0], found[1], rtol=1e-5, atol=2e-7)  # norms and rotations are in float32
    assert max(float(g.abs().max()) for g in found[0][1].values()) > 1e-4


@pytest.mark.parametrize("mode", ["frozen", "adapter_off"])
def test_the_reference_leaves_the_policy_alone_and_has_no_gradient(tiny_lm: str, mode: str) -> None:
    """Weights are back bit for bit, the reference's are what they were, and only the policy's own forward pulls."""
    made = module(tiny_lm, reference=Reference(mode), beta=1.0)
    at_reference = made._sums(batch()).detach()
    move(made)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    reference = made._reference(batch())
    assert reference is not None
    assert not reference.requires_grad
    assert_close(reference, at_reference)
    _, found = gradients(made, batch())
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())
    assert all("lora_" in name for name in found)
    # The gradient by hand: that of the policy's log-probabilities alone, weighted by beta S(-h) / 3 pairs.
    logp = made._sums(batch()).view(3, 2)
    margin = (logp - reference.view(3, 2)).detach() @ f64(1, -1)
    made.zero_grad()
    (-(-margin).sigmoid() / 3 * (logp[:, 0] - logp[:, 1])).sum().backward()
    assert_close({n: p.grad for n, p in made.named_parameters() if p.grad is not None}, found)


def test_the_mean_is_over_the_pairs_of_the_whole_step(tiny_lm: str) -> None:
    """Micro-batches add up to the one batch, in loss and gradient: the denominator is fixed beforehand."""
    made = module(tiny_lm, losses={"sigmoid": 1.0, "nll": 0.5}, beta=1.0)
    move(made)
    whole = batch()
    loss, expected = gradients(made, whole)
    made.zero_grad()
    pairs = [
        [row(PROMPT, [70, 71]), row(PROMPT, [72, 73, 74])],
        [row(PROMPT, [75]), row(PROMPT, [70, 71])],
        [row([1, 90, 91, 92, 93, 94, 95], [80, 81, 82, 83]), row([1, 90, 91, 92, 93, 94, 95], [84])],
    ]
    parts = [collate_pairs(pairs[:1], pairs), collate_pairs(pairs[1:], pairs)]
    total = f64(0)[0]
    for part in parts:
        share, _ = made.objective(part)
        share.backward()
        total += share.detach()
    assert_close(total, loss)
    assert_close({n: p.grad for n, p in made.named_parameters() if p.grad is not None}, expected)


def test_metrics_by_hand(tiny_lm: str) -> None:
    """Rewards are beta times log-ratios; the gap is in tokens: (2 - 3) + (1 - 2) + (4 - 1)."""
    made = module(tiny_lm, beta=0.5)
    reference = made._sums(batch()).detach().view(3, 2)
    move(made)
    logp = made._sums(batch()).detach().view(3, 2)
    _, sums = made.objective(batch())
    rewards = 0.5 * (logp - reference)
    assert_close(sums["train/reward_chosen"], rewards[:, 0].sum())
    assert_close(sums["train/reward_rejected"], rewards[:, 1].sum())
    assert_close(sums["train/margin"], (rewards[:, 0] - rewards[:, 1]).sum())
    assert sums["train/accuracy"] == (rewards[:, 0] > rewards[:, 1]).sum()
    assert_close(sums["train/logp_chosen"], logp[:, 0].sum())
    assert_close(sums["train/logp_rejected"], logp[:, 1].sum())
    assert sums["train/length_gap"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {}}, "give weights of one or more"),
        ({"losses": {"cdpo": 1.0}}, "cdpo"),
        ({"losses": {"sigmoid": 0.0}}, "above 0"),
        ({"losses": {"sigmoid": float("nan")}}, "above 0"),
        ({"beta": 0.0}, "beta=0"),
        ({"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"losses": {"ipo": 1.0}, "label_smoothing": 0.1}, "no term of losses"),
        ({"simpo_gamma": -1.0}, "simpo_gamma=-1"),
        ({"reference": Reference("none")}, "compare with a reference"),
        ({"reference": Reference("ema"), "precompute": True}, "must not move"),
        ({"losses": {"simpo": 1.0}, "precompute": True}, "have no reference"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DPOModule(pretrained="nowhere", **options)


def test_losses_without_a_reference_keep_none(tiny_lm: str, caplog: pytest.LogCaptureFixture) -> None:
    """No copy of the weights, no second forward; one that was asked for is named."""
    made = module(tiny_lm, losses={"simpo": 1.0}, reference=Reference("frozen"))
    assert made.reference is None
    assert "not used" in caplog.text
    assert made._scores(batch()).reference is None
    checkpoint = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(checkpoint)
    assert "reference" not in checkpoint
