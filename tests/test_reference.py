"""The reference policy: what it computes, and that the policy is itself again afterwards."""

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lit_agentrl.errors import UserError
from lit_agentrl.models.export import export
from lit_agentrl.models.policy import Lora, load_policy, load_tokenizer
from lit_agentrl.models.reference import Reference
from tiny import build_tiny_lm

IDS = torch.arange(4, 44).view(2, 20)
Policy = PreTrainedModel | PeftModel


def logits(lm: Policy) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=IDS, use_cache=False).logits


def move(lm: Policy, by: float = 0.05) -> None:
    """What an optimiser step does, as far as the reference is concerned."""
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


def weights(lm: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}


def assert_same(lm: Policy, expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(parameter, expected[name]) for name, parameter in lm.named_parameters())


@pytest.fixture(params=["full", "lora"])
def policy(request: pytest.FixtureRequest, tiny_lm: str) -> Policy:
    return load_policy(tiny_lm, lora=Lora(r=4) if request.param == "lora" else None)


@pytest.mark.parametrize("mode", ["frozen", "sync", "ema"])
def test_reference_is_the_policy_as_it_was_attached(policy: Policy, mode: str) -> None:
    reference = Reference(mode)
    reference.attach(policy)
    at_start = logits(policy)
    move(policy)
    moved, kept = logits(policy), weights(policy)
    assert not torch.equal(moved, at_start)
    with reference.using(policy):
        assert torch.equal(logits(policy), at_start)
    assert torch.equal(logits(policy), moved)
    assert_same(policy, kept)


def test_adapter_off_is_the_base_model(tiny_lm: str) -> None:
    policy = load_policy(tiny_lm, lora=Lora(r=4))
    reference = Reference("adapter_off")
    reference.attach(policy)
    move(policy)
    moved, kept = logits(policy), weights(policy)
    with reference.using(policy):
        assert torch.equal(logits(policy), logits(load_policy(tiny_lm)))
    assert torch.equal(logits(policy), moved)
    assert_same(policy, kept)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in policy.named_parameters())


@pytest.mark.parametrize("mode", ["adapter_off", "frozen"])
def test_an_error_under_the_reference_gives_the_policy_back(tiny_lm: str, mode: str) -> None:
    policy = load_policy(tiny_lm, lora=Lora(r=4))
    reference = Reference(mode)
    reference.attach(policy)
    move(policy)
    moved = logits(policy)

    def fail() -> None:
        with reference.using(policy):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(logits(policy), moved)


@pytest.mark.parametrize("mode", ["adapter_off", "frozen", "ema"])
def test_no_gradient_flows_through_the_reference(tiny_lm: str, mode: str) -> None:
    """Nor does using it between the policy's forward and backward change the policy's gradient."""
    policy = load_policy(tiny_lm, lora=Lora(r=4))
    reference = Reference(mode)
    reference.attach(policy)
    move(policy)

    def gradient(use_reference: bool) -> dict[str, torch.Tensor]:
        policy.zero_grad()
        loss = policy(input_ids=IDS, labels=IDS, use_cache=False).loss
        if use_reference:
            with reference.using(policy):
                against = policy(input_ids=IDS, use_cache=False).logits
            assert not against.requires_grad
            loss = loss + 0 * against.sum()
        loss.backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    alone, beside = gradient(use_reference=False), gradient(use_reference=True)
    assert alone.keys() == beside.keys() == {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_full_policy_gradient_survives_a_reference_in_between(tiny_lm: str) -> None:
    """Autograd saved the weights themselves here; it must not refuse them as changed in place."""
    policy = load_policy(tiny_lm)
    reference = Reference("frozen")
    reference.attach(policy)
    loss = policy(input_ids=IDS, labels=IDS, use_cache=False).loss
    with reference.using(policy):
        logits(policy)
    loss.backward()
    between = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    policy(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(torch.equal(between[name], parameter.grad) for name, parameter in policy.named_parameters())


class OneWeight(torch.nn.Module):
    """A policy whose output is its weight."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([value], dtype=dtype))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)

    def under(self, reference: Reference) -> float:
        with reference.using(self):
            return self.weight.item()


def test_sync_copies_at_multiples_of_sync_every() -> None:
    policy, reference = OneWeight(0.0), Reference("sync", sync_every=3)
    reference.attach(policy)
    seen = []
    for step in range(1, 8):
        policy.set(float(step))
        reference.update(policy, step)
        seen.append(policy.under(reference))
    assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_sync_is_not_missed_when_several_steps_lie_between_updates() -> None:
    policy, reference = OneWeight(0.0), Reference("sync", sync_every=3)
    reference.attach(policy)
    seen = []
    for step in (2, 4, 5, 8):  # passes 3 on the way to 4, and 6 on the way to 8
        policy.set(float(step))
        reference.update(policy, step)
        seen.append(policy.under(reference))
    assert seen == [0, 4, 4, 8]


def test_ema_is_the_moving_average() -> None:
    policy, reference = OneWeight(1.0), Reference("ema", decay=0.75)
    reference.attach(policy)
    policy.set(5.0)
    reference.update(policy, 1)
    assert policy.under(reference) == 0.75 * 1 + 0.25 * 5  # 2
    reference.update(policy, 1)
    assert policy.under(reference) == 2, "the same step counts once"
    policy.set(10.0)
    reference.update(policy, 3)
    assert policy.under(reference) == pytest.approx(0.5625 * 2 + 0.4375 * 10)  # 0.75 ** 2 = 0.5625
    assert policy.weight.item() == 10


def test_ema_of_half_precision_weights_does_not_stall() -> None:
    """A thousandth of the distance is below bfloat16's spacing at 1: kept in bfloat16 the average would never move."""
    policy, reference = OneWeight(1.0, torch.bfloat16), Reference("ema", decay=0.999)
    reference.attach(policy)
    policy.set(2.0)
    for step in range(1, 1001):
        reference.update(policy, step)
    assert policy.under(reference) == pytest.approx(2 - 0.999**1000, abs=0.01)


def test_frozen_never_moves() -> None:
    policy, reference = OneWeight(1.0), Reference("frozen", sync_every=1)
    reference.attach(policy)
    policy.set(2.0)
    reference.update(policy, 1000)
    assert policy.under(reference) == 1


@pytest.mark.parametrize("mode", ["frozen", "sync", "ema"])
def test_resumed_reference_goes_on_as_the_uninterrupted_one(mode: str) -> None:
    def run(interrupted_at: int | None) -> list[float]:
        policy, reference, seen = OneWeight(1.0), Reference(mode, sync_every=4, decay=0.9), []
        reference.attach(policy)
        for step in range(1, 10):
            policy.set(step**2)
            reference.update(policy, step)
            if step == interrupted_at:
                file = io.BytesIO()
                torch.save(reference.state_dict(), file)
                file.seek(0)
                policy, reference = OneWeight(1.0), Reference(mode, sync_every=4, decay=0.9)
                reference.attach(policy)
                reference.load_state_dict(torch.load(file, weights_only=True))
                policy.set(step**2)
            seen.append(policy.under(reference))
        return seen

    assert run(interrupted_at=6) == run(interrupted_at=None)


def test_state_is_empty_without_weights_and_ignored_then(tiny_lm: str) -> None:
    assert Reference("frozen").state_dict() == {}, "not attached"
    policy, adapter_off = load_policy(tiny_lm, lora=Lora(r=4)), Reference("adapter_off")
    adapter_off.attach(policy)
    assert adapter_off.state_dict() == {}
    frozen = Reference("frozen")
    frozen.attach(policy)
    adapter_off.load_state_dict(frozen.state_dict())  # the mode was changed for the resumed run
    move(policy)
    with adapter_off.using(policy):
        assert torch.equal(logits(policy), logits(load_policy(tiny_lm)))


def test_reference_of_another_policy_is_refused(tiny_lm: str) -> None:
    small, large = Reference("frozen"), Reference("frozen")
    small.attach(load_policy(tiny_lm, lora=Lora(r=2)))
    large.attach(load_policy(tiny_lm, lora=Lora(r=4)))
    with pytest.raises(UserError, match="does not fit"):
        large.load_state_dict(small.state_dict())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Reference("sync", sync_every=0), "sync_every=0"),
        (lambda: Reference("ema", decay=1.0), "decay=1.0"),
        (lambda: Reference("ema", decay=0.0), "decay=0.0"),
        (lambda: Reference("froozen"), "must be one of"),
        (lambda: Reference("adapter_off").attach(OneWeight(1.0)), "needs a policy with a LoRA adapter"),
        (lambda: OneWeight(1.0).under(Reference("none")), "no reference"),
    ],
)
def test_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


# sharded over two processes


def shard(lm: Policy) -> None:
    for layer in lm.get_decoder().layers if isinstance(lm, PreTrainedModel) else lm.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(lm)


def sharded_worker(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)  # an unseeded process has a seed of its own, and with it an adapter of its own
    try:
        for lora in (None, Lora(r=4)):
            check_sharded(folder, lora, Path(folder).parent / f"out-{lora is None}")
    finally:
        dist.destroy_process_group()


def check_sharded(folder: str, lora: Lora | None, out: Path) -> None:
    """One process's run of every mode, sharded, against the same unsharded."""
    plain, lm = load_policy(folder, lora=lora), load_policy(folder, lora=lora)
    shard(lm)
    assert all(isinstance(parameter, DTensor) for parameter in lm.parameters())
    for mode in ("frozen", "ema") if lora is None else ("frozen", "ema", "adapter_off"):
        expected, reference = Reference(mode, decay=0.5), Reference(mode, decay=0.5)
        for ours, model in ((expected, plain), (reference, lm)):
            ours.attach(model)
            logits(model)  # leaves the root's weights gathered
            move_sharded(model)
            ours.update(model, 1)
        policy = logits(lm)
        with expected.using(plain), reference.using(lm):
            torch.testing.assert_close(logits(lm), logits(plain), rtol=0, atol=1e-5)
            assert (logits(lm) - policy).abs().max() > 1e-3, "the reference is the policy"
        assert torch.equal(logits(lm), policy)
        torch.testing.assert_close(policy, logits(plain), rtol=0, atol=1e-5)
        again = Reference(mode, decay=0.5)
        again.attach(lm)
        again.load_state_dict(reference.state_dict())
        with again.using(lm):
            restored = logits(lm)
        with reference.using(lm):
            assert torch.equal(restored, logits(lm))
    export(lm, load_tokenizer(folder), out)
    dist.barrier()
    torch.testing.assert_close(logits(load_policy(str(out))), logits(plain), rtol=0, atol=1e-5)


def move_sharded(lm: Policy) -> None:
    from lit_agentrl.models.shards import reshard

    reshard(lm)
    move(lm)


@pytest.mark.slow
def test_sharded_policy_has_the_same_reference_and_export(tmp_path: Path) -> None:
    folder = build_tiny_lm(tmp_path / "lm", tie_word_embeddings=True)
    with tempfile.TemporaryDirectory() as store:
        mp.spawn(sharded_worker, args=(os.path.join(store, "store"), folder), nprocs=2)
