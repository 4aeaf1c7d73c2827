"""Laws of the losses: hand-computed numbers, finite differences, and gradients that padding cannot reach."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_agentrl.losses import (
    aggregate,
    anchor_loss,
    clipped_surrogate,
    dpo_loss,
    kl_estimate,
    odds_ratio_loss,
    policy_loss,
    simpo_loss,
    surrogate_metrics,
    truncated_importance,
)

KINDS = ["ppo", "gspo", "gspo_token", "cispo", "reinforce"]
AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """d loss.sum() / d at."""
    leaf = at.detach().clone().requires_grad_()
    loss(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def batch(seed: int = 0, rows: int = 4, length: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, old_logp, one advantage per row, and a ragged mask; float64."""
    generator = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(rows, length, generator=generator, dtype=torch.float64)
    old_logp = logp + 0.5 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantage = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, length)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return logp, old_logp, advantage, mask


# --- clipped surrogate ---


def test_clipped_surrogate_by_hand() -> None:
    """Ratios 0.5, 1, 2 and clips 0.8, 1.28: the objective is the smaller of r A and clip(r) A."""
    logp = f64(0.5, 1.0, 2.0).log()
    up = clipped_surrogate(logp, torch.zeros(3).double(), f64(1, 1, 1), clip_low=0.2, clip_high=0.28)
    down = clipped_surrogate(logp, torch.zeros(3).double(), f64(-1, -1, -1), clip_low=0.2, clip_high=0.28)
    assert_close(up, f64(-0.5, -1.0, -1.28))
    assert_close(down, f64(0.8, 1.0, 2.0))


def test_clipped_tokens_have_no_gradient() -> None:
    """Where the clip is the smaller term the ratio is out of the game; elsewhere d/d logp = -r A."""
    logp, advantage = f64(0.5, 2.0, 0.5, 2.0).log(), f64(1, 1, -1, -1)
    grad = gradient(lambda x: clipped_surrogate(x, torch.zeros(4).double(), advantage), logp)
    assert_close(grad, f64(-0.5, 0, 0, 2.0))


def test_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    """A < 0: at most c |A|, without gradient beyond; A > 0 is untouched."""
    logp, advantage = f64(2, 5, 5).log(), f64(-1, -2, 1)

    def loss(x: Tensor) -> Tensor:
        return clipped_surrogate(x, torch.zeros(3).double(), advantage, dual_clip=3.0)

    assert_close(loss(logp), f64(2, 6, -1.2))
    assert_close(gradient(loss, logp), f64(2, 0, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_the_gradient_is_that_of_reinforce(kind: str) -> None:
    """At ratio 1 nothing is clipped; GSPO's gradient is the row's mean on each of its tokens, equal for equal A."""
    logp, _, advantage, mask = batch()
    grad = gradient(lambda x: policy_loss(kind, x, logp, advantage, mask), logp)
    assert_close(grad, -advantage * mask)


def test_a_huge_ratio_is_finite() -> None:
    """In float32 exp(100) is infinite; the bounded log-ratio keeps loss and gradient finite."""
    logp = torch.tensor([100.0, -100.0, 100.0])
    advantage = torch.tensor([-1.0, -1.0, 0.0])
    loss = clipped_surrogate(logp, torch.zeros(3), advantage)
    assert loss.isfinite().all()
    assert gradient(lambda x: clipped_surrogate(x, torch.zeros(3), advantage), logp).isfinite().all()


# --- the other policy losses ---


def test_ppo_is_the_clipped_surrogate_on_the_mask() -> None:
    """And exactly 0 off it."""
    logp, old_logp, advantage, mask = batch()
    clips = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5}
    expected = clipped_surrogate(logp, old_logp, advantage, **clips)
    assert_close(policy_loss("ppo", logp, old_logp, advantage, mask, **clips), expected * mask)
    assert not mask.all()


def test_gspo_by_hand() -> None:
    """Log-ratios 0.1, 0.3 (and one off the mask) make s = exp(0.2) for the row; a row of ratio 1 stays 1."""
    log_ratio = torch.tensor([[0.1, 0.3, 9.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss = policy_loss("gspo", log_ratio, torch.zeros_like(log_ratio), torch.ones_like(log_ratio), mask, clip_high=0.5)
    s = math.exp(0.2)
    assert_close(loss, -torch.tensor([[s, s, 0], [1, 1, 1]], dtype=torch.float64))
    clipped = policy_loss("gspo", log_ratio, torch.zeros_like(log_ratio), torch.ones_like(log_ratio), mask)
    assert_close(clipped[0], f64(-1.2, -1.2, 0))


@pytest.mark.parametrize("kind", ["gspo", "gspo_token"])
def test_gspo_of_one_token_is_ppo(kind: str) -> None:
    """T = 1: the sequence ratio is the token ratio, in value and gradient."""
    logp, old_logp, advantage, _ = batch(length=1)
    mask = torch.ones_like(logp, dtype=torch.bool)

    def loss(which: str) -> Callable[[Tensor], Tensor]:
        return lambda x: policy_loss(which, x, old_logp, advantage, mask)

    assert_close(loss(kind)(logp), loss("ppo")(logp))
    assert_close(gradient(loss(kind), logp), gradient(loss("ppo"), logp))


def test_gspo_token_equals_gspo_for_one_advantage_per_row() -> None:
    """Same values; the gradients are the same once the row is averaged."""
    logp, old_logp, advantage, mask = batch(1)
    grads = []
    for kind in ("gspo", "gspo_token"):
        grads.append(
            gradient(
                lambda x, kind=kind: aggregate(
                    policy_loss(kind, x, old_logp, advantage, mask, dual_clip=3.0), mask, "seq_mean_token_mean"
                ),
                logp,
            )
        )
    assert_close(
        policy_loss("gspo", logp, old_logp, advantage, mask), policy_loss("gspo_token", logp, old_logp, advantage, mask)
    )
    assert_close(*grads)
    assert grads[0].abs().max() > 0


def test_gspo_token_keeps_each_tokens_advantage() -> None:
    """Advantages 1 and -2 in one row of ratio s: each token's gradient is -s A, where GSPO spreads their mean."""
    logp, old_logp, advantage = torch.full((1, 2), 0.1).double(), torch.zeros(1, 2).double(), f64(1, -2)[None]
    mask, s = torch.ones(1, 2, dtype=torch.bool), math.exp(0.1)
    token = gradient(lambda x: policy_loss("gspo_token", x, old_logp, advantage, mask), logp)
    sequence = gradient(lambda x: policy_loss("gspo", x, old_logp, advantage, mask), logp)
    assert_close(token, -s * advantage)
    assert_close(sequence, s * f64(0.5, 0.5)[None])


def test_cispo_learns_where_ppo_is_clipped() -> None:
    """Ratio 8: PPO has no gradient, CISPO has -min(8, 5) A; the bound is the value itself."""
    logp, old_logp, ones = f64(math.log(8)), f64(0), f64(1)
    ppo = gradient(lambda x: policy_loss("ppo", x, old_logp, ones, ones.bool()), logp)
    cispo = gradient(lambda x: policy_loss("cispo", x, old_logp, ones, ones.bool(), cispo_max=5.0), logp)
    assert ppo.item() == 0
    assert_close(cispo, f64(-5))
    assert_close(policy_loss("cispo", logp, old_logp, ones, ones.bool(), cispo_max=10.0), -8 * logp)


def test_reinforce_ignores_the_old_policy() -> None:
    """-A logp."""
    logp, old_logp, advantage, mask = batch(2)
    assert_close(policy_loss("reinforce", logp, old_logp, advantage, mask), -advantage * logp * mask)


# --- off the mask ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_nothing_off_the_mask_reaches_loss_or_gradient(kind: str, rubbish: float) -> None:
    """Padding may hold anything, in every argument: same loss, same gradient, 0 on the padding itself."""
    logp, old_logp, advantage, mask = batch(3)

    def loss(x: Tensor, old: Tensor, weight: Tensor) -> Tensor:
        return aggregate(policy_loss(kind, x, old, weight, mask, dual_clip=3.0), mask, "token_mean")

    dirty = [torch.where(mask, each, rubbish) for each in (logp, old_logp, advantage)]
    assert_close(loss(*dirty), loss(logp, old_logp, advantage))
    grad = gradient(lambda x: loss(x, *dirty[1:]), dirty[0])
    assert_close(grad, gradient(lambda x: loss(x, old_logp, advantage), logp))
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("dirty", ["logp", "old_logp", "advantage"])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_the_maskless_losses_survive_a_later_mask(dirty: str, rubbish: float) -> None:
    """clipped_surrogate and k1 to k3+ take no mask: NaN on padding must not come back as 0 * NaN in the gradient."""
    logp, old_logp, advantage, mask = batch(4)
    given = {"logp": logp, "old_logp": old_logp, "advantage": advantage}
    given[dirty] = torch.where(mask, given[dirty], rubbish)

    def loss(x: Tensor, old: Tensor, weight: Tensor) -> Tensor:
        parts = [clipped_surrogate(x, old, weight, dual_clip=3.0)]
        parts += [kl_estimate(x, old, kind) for kind in ("k1", "k2", "k3", "k3+")]
        return sum(aggregate(part, mask, "seq_mean_token_mean") for part in parts)

    grad = gradient(lambda x: loss(x, given["old_logp"], given["advantage"]), given["logp"])
    assert_close(grad, gradient(lambda x: loss(x, old_logp, advantage), logp))
    assert_close(loss(*given.values()), loss(logp, old_logp, advantage))


def test_a_nan_on_the_mask_is_seen() -> None:
    """A broken token must not vanish."""
    nan, one = torch.tensor([[math.nan]]), torch.ones(1, 1)
    for kind in KINDS:
        assert policy_loss(kind, nan, one, one, one.bool()).isnan().all()
    assert aggregate(clipped_surrogate(nan, one, one), one.bool(), "token_mean").isnan()
    assert aggregate(kl_estimate(nan, one), one.bool(), "token_mean").isnan()


# --- importance of another sampler ---


def test_truncated_importance_by_hand() -> None:
    """Ratios 0.5, 1.5, 9 under a cap of 2; no gradient; 0 off the mask, whatever stands there."""
    old = f64(0.5, 1.5, 9.0, math.nan).log().requires_grad_()
    weight = truncated_importance(old, torch.zeros(4).double(), 2.0, torch.tensor([True, True, True, False]))
    assert_close(weight, f64(0.5, 1.5, 2.0, 0.0))
    assert not weight.requires_grad
    assert_close(truncated_importance(old[:3], torch.zeros(3).double(), 2.0), f64(0.5, 1.5, 2.0))


# --- KL ---


def test_kl_estimates_by_hand() -> None:
    """d = ln 2: k1 = ln 2, k2 = (ln 2)^2 / 2, k3 = 1/2 + ln 2 - 1."""
    logp, ref = f64(math.log(2)), f64(0)
    log2 = math.log(2)
    for kind, expected in (("k1", log2), ("k2", log2**2 / 2), ("k3", log2 - 0.5), ("k3+", log2 - 0.5)):
        assert_close(kl_estimate(logp, ref, kind), f64(expected))
    assert_close(kl_estimate(logp, ref), f64(log2 - 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative(dtype: torch.dtype) -> None:
    """And 0 where the policies agree; also for differences near the precision of the dtype."""
    size = torch.logspace(-12, 1, 2000, dtype=dtype)
    for kind in ("k3", "k3+"):
        assert (kl_estimate(torch.cat([size, -size]), torch.zeros(4000, dtype=dtype), kind) >= 0).all()
        assert kl_estimate(torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=dtype), kind).item() == 0


def test_gradients_of_the_kl_estimates() -> None:
    """d k1 = 1, d k2 = d, d k3 = 1 - exp(-d), d k3+ = d; the finite difference is k2's, since k3+ has its gradient."""
    d, ref, step = f64(-2, -0.3, 0, 0.7, 3), torch.zeros(5).double(), 1e-5
    for kind, expected in (("k1", torch.ones(5).double()), ("k2", d), ("k3", 1 - torch.exp(-d)), ("k3+", d)):
        assert_close(gradient(lambda x, kind=kind: kl_estimate(x, ref, kind), d), expected)
    numeric = (kl_estimate(d + step, ref, "k2") - kl_estimate(d - step, ref, "k2")) / (2 * step)
    assert_close(gradient(lambda x: kl_estimate(x, ref, "k3+"), d), numeric, atol=1e-8, rtol=1e-8)


def test_only_k3_plus_has_the_gradient_of_the_kl() -> None:
    """Over all four tokens of a small policy, E[d k3+] and E[d k2] are the true gradient; E[d k1] is 0, k3 is off."""
    logits, ref = f64(0.3, -1.0, 0.8, 0.1), f64(0.5, 0.2, -0.4, 0.0).log_softmax(-1)
    p = logits.softmax(-1)

    def true_kl(x: Tensor) -> Tensor:
        return (x.softmax(-1) * (x.log_softmax(-1) - ref)).sum()

    def estimated(kind: str) -> Tensor:
        return gradient(lambda x: (p * kl_estimate(x.log_softmax(-1), ref, kind)).sum(), logits)

    truth = gradient(true_kl, logits)
    assert_close(estimated("k3+"), truth)
    assert_close(estimated("k2"), truth)
    assert_close(estimated("k1"), torch.zeros(4).double())
    assert (estimated("k3") - truth).abs().max() > 0.01
    assert_close((p * kl_estimate(logits.log_softmax(-1), ref, "k3")).sum(), true_kl(logits))


# --- aggregation ---


def test_aggregate_by_hand() -> None:
    """Rows of 2, 1 and 0 tokens with losses (1, 3), (8): 12 / 3, (2 + 8) / 2, 12 / 2, 12 / (2 * 4)."""
    loss = torch.tensor([[1.0, 3.0, 100.0], [8.0, 100.0, 100.0], [100.0, 100.0, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    for kind, expected in zip(AGGREGATIONS, (4.0, 5.0, 6.0, 1.5), strict=True):
        assert aggregate(loss, mask, kind, max_length=4).item() == expected
        assert aggregate(loss, mask.float(), kind, max_length=4).item() == expected


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [1, 2, 1]])
def test_micro_batches_sum_to_one_big_batch(kind: str, sizes: list[int]) -> None:
    """With the counts of the whole step, any split of the rows gives the same loss."""
    loss, _, _, mask = batch(5)
    counts = {"num_tokens": int(mask.sum()), "num_sequences": 4, "max_length": 9}
    parts = [
        aggregate(l_part, m_part, kind, **counts)
        for l_part, m_part in zip(loss.split(sizes), mask.split(sizes), strict=True)
    ]
    assert_close(sum(parts), aggregate(loss, mask, kind, max_length=9))


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_the_order_of_the_rows_changes_nothing(kind: str) -> None:
    """Loss and gradient follow their row."""
    logp, old_logp, advantage, mask = batch(6)
    order = torch.tensor([2, 0, 3, 1])

    def loss(x: Tensor, rows: Tensor) -> Tensor:
        per_token = policy_loss("gspo", x, old_logp[rows], advantage[rows], mask[rows])
        return aggregate(per_token, mask[rows], kind, max_length=5)

    same = torch.arange(4)
    assert_close(loss(logp[order], order), loss(logp, same))
    assert_close(gradient(lambda x: loss(x, order), logp[order]), gradient(lambda x: loss(x, same), logp)[order])


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_an_empty_mask_gives_zero(kind: str) -> None:
    """A padding micro-batch (to have as many as the other ranks) must not be 0 / 0, and still has a graph."""
    loss = torch.ones(2, 3, requires_grad=True)
    result = aggregate(loss, torch.zeros(2, 3, dtype=torch.bool), kind, max_length=3)
    result.backward()
    assert result.item() == 0
    assert torch.equal(loss.grad, torch.zeros(2, 3))


# --- metrics ---


def test_surrogate_metrics_by_hand() -> None:
    """Ratios 0.5, 1, 1.5 on the mask: sum 3, two outside 0.8 to 1.2, KL sum of r - 1 - ln r."""
    logp = torch.tensor([[0.5, 1.0], [1.5, math.nan]]).double().log()
    mask = torch.tensor([[True, True], [True, False]])
    sums = surrogate_metrics(logp.requires_grad_(), torch.zeros(2, 2).double(), mask, 0.2, 0.2)
    expected = {"ratio": 3.0, "clip_fraction": 2.0, "approx_kl": -math.log(0.5) - math.log(1.5), "num_tokens": 3.0}
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(sums[name], torch.tensor(value, dtype=torch.float64))
        assert not sums[name].requires_grad


# --- preference ---


def test_dpo_at_the_reference_is_log_two() -> None:
    """pi == ref: every pair costs log 2, and mDPO's three terms (text, image, anchor) cost 3 log 2."""
    zero = torch.zeros(3).double()
    assert_close(dpo_loss(zero, zero), zero + math.log(2))
    text, image = (dpo_loss(zero, zero, beta=0.3) for _ in range(2))
    assert_close(text + image + anchor_loss(zero, beta=0.3), zero + 3 * math.log(2))


def test_the_anchor_pays_below_its_delta() -> None:
    """Log-ratio 4 at beta 0.5 is a reward of 2: at delta 2 log 2, at delta 0 log(1 + e^-2)."""
    assert_close(anchor_loss(f64(4), beta=0.5, delta=2.0), f64(math.log(2)))
    assert_close(anchor_loss(f64(4), beta=0.5), f64(math.log1p(math.exp(-2))))


def test_simpo_by_hand() -> None:
    """Means -1 and -2, beta 2: a margin of 2 less gamma; at gamma 2 the pair costs log 2."""
    assert_close(simpo_loss(f64(-1), f64(-2), beta=2.0, gamma=2.0), f64(math.log(2)))
    assert_close(simpo_loss(f64(-1), f64(-2), beta=2.0, gamma=0.5), f64(math.log1p(math.exp(-1.5))))


def test_odds_ratio_by_hand() -> None:
    """p = 3/4 has odds 3, p = 1/4 odds 1/3: a ratio of 9, and S(log 9) = 9/10."""
    assert_close(odds_ratio_loss(f64(0.75).log(), f64(0.25).log()), f64(-math.log(0.9)))


def test_certain_answers_have_finite_odds() -> None:
    """A log-probability of 0 has infinite odds; neither the loss nor its gradient may be NaN."""
    chosen, rejected = torch.tensor([0.0, -1e-9, -50.0]), torch.tensor([-50.0, 0.0, 0.0])
    assert odds_ratio_loss(chosen, rejected).isfinite().all()
    assert gradient(lambda x: odds_ratio_loss(x, rejected), chosen).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("sigmoid", {}, -math.log(1 / (1 + math.exp(-1.5)))),
        ("sigmoid", {"label_smoothing": 0.1}, 0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5))),
        (
            "robust",
            {"label_smoothing": 0.1},
            (0.9 * math.log1p(math.exp(-1.5)) - 0.1 * math.log1p(math.exp(1.5))) / 0.8,
        ),
        ("hinge", {}, 0.0),
        ("hinge", {"beta": 0.1}, 0.7),
        ("ipo", {}, 4.0),
        ("bco_pair", {}, math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-0.5))),
        ("apo_zero", {}, 1 - 1 / (1 + math.exp(-1.0)) + 1 / (1 + math.exp(0.5))),
        ("dpop", {}, math.log1p(math.exp(-1.5))),
    ],
)
def test_dpo_losses_by_hand(kind: str, options: dict[str, float], expected: float) -> None:
    """Chosen +2, rejected -1, beta 0.5 unless said: h = 1.5, and IPO's target is 1."""
    assert_close(dpo_loss(f64(2), f64(-1), kind=kind, **({"beta": 0.5} | options)), f64(expected))


def test_dpop_pays_for_a_chosen_answer_that_falls() -> None:
    """w = -1, l = -3: h = 1 at beta 0.5, minus 0.5 * 4 * 1."""
    assert_close(dpo_loss(f64(-1), f64(-3), beta=0.5, kind="dpop", dpop_weight=4.0), f64(math.log1p(math.exp(1.0))))


def test_without_smoothing_robust_is_sigmoid() -> None:
    """e = 0 leaves plain DPO, in both readings of noisy labels."""
    chosen, rejected = torch.linspace(-3, 3, 7).double(), torch.linspace(2, -1, 7).double()
    assert_close(dpo_loss(chosen, rejected, kind="robust"), dpo_loss(chosen, rejected))


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    """The mean over labels flipped with rate e is the loss on clean labels."""
    chosen, rejected, e = f64(0.7), f64(-0.4), 0.2
    clean = dpo_loss(chosen, rejected)
    right, wrong = (
        dpo_loss(*pair, kind="robust", label_smoothing=e) for pair in ((chosen, rejected), (rejected, chosen))
    )
    assert_close((1 - e) * right + e * wrong, clean)


def test_ipo_has_its_minimum_at_half_over_beta() -> None:
    """D = 1 / (2 beta) = 5 costs 0; both sides cost more."""
    loss = dpo_loss(f64(4.9, 5.0, 5.1), f64(0, 0, 0), beta=0.1, kind="ipo")
    assert_close(loss, f64(0.01, 0, 0.01))


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "bco_pair", "apo_zero", "dpop"])
def test_a_hopeless_pair_is_finite(kind: str) -> None:
    """Log-ratios of a thousand must not overflow float32, in loss or gradient."""
    chosen, rejected = torch.tensor([-1e3, 1e3]), torch.tensor([1e3, -1e3])
    assert dpo_loss(chosen, rejected, kind=kind, beta=5.0).isfinite().all()
    assert gradient(lambda x: dpo_loss(x, rejected, kind=kind, beta=5.0), chosen).isfinite().all()


# --- borders ---


def test_float64_stays_float64() -> None:
    """And float32 float32: no constant may change the precision."""
    for dtype in (torch.float32, torch.float64):
        logp, old_logp, advantage = (each.to(dtype) for each in batch()[:3])
        mask = batch()[3]
        losses = [policy_loss(kind, logp, old_logp, advantage, mask, dual_clip=3.0) for kind in KINDS]
        losses += [kl_estimate(logp, old_logp, kind) for kind in ("k1", "k2", "k3", "k3+")]
        losses += [aggregate(logp, mask, kind, max_length=4) for kind in AGGREGATIONS]
        losses += [dpo_loss(logp, old_logp), truncated_importance(logp, old_logp, 2.0)]
        losses += [simpo_loss(logp, old_logp), odds_ratio_loss(logp, old_logp), anchor_loss(logp)]
        assert {loss.dtype for loss in losses} == {dtype}


def test_bad_input_is_refused_by_name() -> None:
    """Shapes that would broadcast, options out of range and unknown kinds."""
    row, wide, mask = torch.zeros(2, 3), torch.zeros(1, 3), torch.ones(2, 3, dtype=torch.bool)
    for bad, message in (
        (lambda: clipped_surrogate(row, row, wide), r"advantage \[1, 3\]"),
        (lambda: clipped_surrogate(row, row, row, clip_low=1.5), "clip_low=1.5"),
        (lambda: clipped_surrogate(row, row, row, clip_high=-0.1), "clip_high=-0.1"),
        (lambda: clipped_surrogate(row, row, row, dual_clip=0.5), "dual_clip=0.5"),
        (lambda: policy_loss("ppo", row, row, row, wide.bool()), r"mask \[1, 3\]"),
        (lambda: policy_loss("a2c", row, row, row, mask), "kind='a2c'"),
        (lambda: policy_loss("cispo", row, row, row, mask, cispo_max=0.0), "cispo_max=0"),
        (lambda: kl_estimate(row, wide), r"ref_logp \[1, 3\]"),
        (lambda: kl_estimate(row, row, "k4"), "kind='k4'"),
        (lambda: truncated_importance(row, row, 0.0), "cap=0"),
        (lambda: surrogate_metrics(row, row, wide.bool()), r"mask \[1, 3\]"),
        (lambda: aggregate(row, wide.bool(), "token_mean"), r"mask \[1, 3\]"),
        (lambda: aggregate(row, mask, "mean"), "kind='mean'"),
        (lambda: aggregate(row, mask, "constant"), "max_length"),
        (lambda: aggregate(row, mask, "token_mean", num_tokens=-1), "num_tokens=-1"),
        (lambda: dpo_loss(row, wide), r"rejected_logratio \[1, 3\]"),
        (lambda: dpo_loss(row, row, beta=0.0), "beta=0"),
        (lambda: dpo_loss(row, row, label_smoothing=0.5), "label_smoothing=0.5"),
        (lambda: dpo_loss(row, row, kind="ipo", label_smoothing=0.1), "does not use label_smoothing"),
        (lambda: dpo_loss(row, row, kind="orpo"), "kind='orpo'"),
        (lambda: simpo_loss(row, wide), r"rejected_logp \[1, 3\]"),
        (lambda: simpo_loss(row, row, gamma=-1.0), "gamma=-1"),
        (lambda: odds_ratio_loss(row, wide), r"rejected_logp \[1, 3\]"),
        (lambda: anchor_loss(row, beta=0.0), "beta=0"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
