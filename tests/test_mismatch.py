"""Sampler and trainer are two policies: what their difference is measured by, and how the loss is corrected for it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_agentrl.errors import UserError
from lit_agentrl.losses import Importance, mismatch_metrics, truncated_importance
from lit_agentrl.methods.grpo_pp import GRPOPlusPlusModule
from lit_agentrl.models.scoring import TokenScores
from lit_agentrl.types import TrainBatch

NAN = math.nan
# exp(old - sampler) = 2, 1/2, 4 in the first row, 1/2, 1/2 in the second; off the mask stands NaN.
RATIOS = torch.tensor([[2.0, 0.5, 4.0], [0.5, 0.5, NAN]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
SAMPLER = torch.full_like(RATIOS, -1.0)
OLD = SAMPLER + RATIOS.log()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token_truncate", [[2.0, 0.5, 3.0], [0.5, 0.5, 0.0]]),
        ("token_mask", [[2.0, 0.5, 0.0], [0.5, 0.5, 0.0]]),
        ("sequence_truncate", [[3.0, 3.0, 3.0], [0.25, 0.25, 0.0]]),  # 2 * 1/2 * 4 = 4, held at 3; 1/2 * 1/2
        ("sequence_mask", [[0.0, 0.0, 0.0], [0.25, 0.25, 0.0]]),
    ],
)
def test_weights_by_hand(kind: Importance, expected: list[list[float]]) -> None:
    old = OLD.clone().requires_grad_()
    weight = truncated_importance(old, SAMPLER, 3.0, MASK, kind=kind)
    assert_close(weight, torch.tensor(expected, dtype=torch.float64))
    assert not weight.requires_grad


def test_metrics_by_hand() -> None:
    """d = log of 2, 1/2, 4, 1/2, 1/2: their sum is 0, and k3 = 2 + 1/2 + 4 + 1/2 + 1/2 - 5 - 0 = 2.5."""
    found = mismatch_metrics(OLD, SAMPLER, MASK, 3.0)
    expected = {"kl": 0.0, "kl_k3": 2.5, "weight_mean": 6.5, "clipped_fraction": 1.0, "max_logp_gap": math.log(4)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-12), name


def test_metrics_count_tokens_as_they_weigh_and_rows_as_they_are_held_back() -> None:
    """Weight 2 on the first row and 1/2 on the second; the row's product 4 is above the cap on all its three tokens."""
    weights = torch.tensor([[2.0, 2.0, 2.0], [0.5, 0.5, NAN]], dtype=torch.float64)
    found = mismatch_metrics(OLD, SAMPLER, MASK, 3.0, kind="sequence_mask", weights=weights)
    assert float(found["clipped_fraction"]) == 6.0
    assert float(found["weight_mean"]) == pytest.approx(0.25)  # 2 x 1/2 x 1/4: the first row's are 0
    assert float(found["kl"]) == pytest.approx(-(2 * math.log(4) + 0.5 * math.log(0.25)))


def test_without_a_cap_nothing_is_held_back() -> None:
    found = mismatch_metrics(OLD, SAMPLER, MASK, None)
    assert float(found["weight_mean"]) == pytest.approx(7.5)
    assert float(found["clipped_fraction"]) == 0.0


def test_k1_and_k3_estimate_the_divergence_of_the_sampler_from_the_trainer() -> None:
    """Exactly: the mean over what the sampler draws is KL(sampler || trainer), for both."""
    sampler, trainer = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    kl = float((sampler * (sampler / trainer).log()).sum())
    logs = trainer.log()[None], sampler.log()[None]
    found = mismatch_metrics(*logs, torch.ones(1, 3), None, weights=sampler[None])
    assert float(found["kl"]) == pytest.approx(kl)
    assert float(found["kl_k3"]) == pytest.approx(kl)


def test_a_batch_without_tokens_measures_nothing() -> None:
    found = mismatch_metrics(OLD, SAMPLER, torch.zeros_like(MASK), 2.0)
    assert all(float(value) == 0 for value in found.values())


def test_a_sampler_s_nan_is_seen() -> None:
    assert mismatch_metrics(OLD, SAMPLER, torch.ones_like(MASK), 2.0)["max_logp_gap"].isnan()


# --- in the loss ---


class Scored(GRPOPlusPlusModule):
    """Scores every batch with the same log-probabilities."""

    def __init__(self, logprobs: Tensor, **options: object) -> None:
        super().__init__(pretrained="none", **options)
        self.logprobs = logprobs.requires_grad_()

    def score(self, batch: TrainBatch, *, entropy: bool = False) -> TokenScores:
        return TokenScores(self.logprobs, torch.zeros_like(self.logprobs))


def batch_of(**more: object) -> TrainBatch:
    """Two rows of 3 and 2 sampled tokens, with an advantage of 1 and -1."""
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]], dtype=torch.float64)
    sampler = torch.where(MASK, SAMPLER, 0.0)
    ids, lengths = torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 2])
    return TrainBatch(ids, lengths, MASK, sampler, advantages, num_action_tokens=5, num_rows=2, **more)


def module(**options: object) -> Scored:
    return Scored(torch.where(MASK, OLD, 0.0), importance_cap=3.0, **options)


def names(sums: dict[str, Tensor]) -> set[str]:
    return {name for name in sums if name.startswith("mismatch/")}


def test_auto_corrects_where_the_sampler_differs() -> None:
    """Old is the trainer's own, so the ratio is 1, and the gradient is A x weight / 5."""
    made = module()
    loss, sums = made.objective(batch_of(sampler_differs=True))
    loss.backward()
    weights = torch.tensor([[2.0, 0.5, 3.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    assert_close(made.logprobs.grad, -weights * batch_of().advantages / 5)
    assert float(sums["train/ratio"]) == pytest.approx(5.0)
    assert float(sums["mismatch/weight_mean"]) == pytest.approx(6.5)
    assert float(sums["mismatch/max_logp_gap"]) == pytest.approx(math.log(4))


def test_auto_takes_the_sampler_s_where_it_is_the_trainer() -> None:
    """Then the ratios are those of RATIOS, clipped at 1.2 where they would gain."""
    made = module()
    loss, sums = made.objective(batch_of())
    assert names(sums) == set()
    assert float(sums["train/ratio"]) == pytest.approx(7.5)
    assert float(loss) == pytest.approx(-(1.2 + 0.5 + 1.2 - 0.8 - 0.8) / 5)


@pytest.mark.parametrize(
    ("options", "differs", "recomputes"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"dtype": "bfloat16"}, False, True),
        ({"dtype": "float64"}, False, False),
        ({"old_logprobs": "sampler"}, True, False),
        ({"old_logprobs": "sampler", "dtype": "float16"}, True, False),
        ({"old_logprobs": "recompute"}, False, True),
    ],
)
def test_who_recomputes(options: dict[str, object], differs: bool, recomputes: bool) -> None:
    made = module(**options)
    assert made.recomputes(batch_of(sampler_differs=differs)) == recomputes
    _, sums = made.objective(batch_of(sampler_differs=differs))
    assert bool(names(sums)) == recomputes


@pytest.mark.parametrize(("precision", "recomputes"), [("32-true", False), ("bf16-mixed", True), ("16-true", True)])
def test_auto_knows_the_trainer_s_precision(precision: str, recomputes: bool) -> None:
    made = module()
    made._trainer = SimpleNamespace(precision=precision)
    assert made.recomputes(batch_of()) == recomputes


def test_with_several_updates_the_policy_of_the_iteration_s_start_is_the_old_one() -> None:
    """The sampler gave -1, the trainer OLD before its first update, and -0.5 now."""
    old, sampler = torch.where(MASK, OLD, 0.0), batch_of().old_logprobs
    given = replace(batch_of(sampler_differs=True, num_updates=2), old_logprobs=old, sampler_logprobs=sampler)
    made = Scored(torch.where(MASK, -0.5, 0.0).double(), importance_cap=3.0, clip_high=1e9, clip_low=1.0)
    loss, sums = made.objective(given)
    ratio = (-0.5 - OLD[MASK]).exp()
    weight = torch.tensor([2.0, 0.5, 3.0, 0.5, 0.5], dtype=torch.float64)
    assert float(sums["train/ratio"]) == pytest.approx(float(ratio.sum()))
    assert float(loss) == pytest.approx(-float((weight * ratio * given.advantages[MASK]).sum()) / 5)


@pytest.mark.parametrize("kind", ["sequence_truncate", "token_mask"])
def test_the_kind_of_weight_is_an_option(kind: Importance) -> None:
    made = module(importance=kind)
    loss, sums = made.objective(batch_of(sampler_differs=True))
    weight = truncated_importance(OLD, SAMPLER, 3.0, MASK, kind=kind)
    assert float(loss) == pytest.approx(-float((weight * batch_of().advantages).sum()) / 5)
    assert float(sums["mismatch/weight_mean"]) == pytest.approx(float(weight.sum()))


def test_no_cap_is_no_weight() -> None:
    made = Scored(torch.where(MASK, OLD, 0.0), importance_cap=None)
    loss, sums = made.objective(batch_of(sampler_differs=True))
    assert float(loss) == pytest.approx(-(3 - 2) / 5)
    assert names(sums)  # measured all the same


def test_a_cap_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="importance_cap=0"):
        Scored(OLD.clone(), importance_cap=0.0)
