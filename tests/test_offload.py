"""Activations kept in the CPU's memory: the same gradients bit for bit, nothing else moved, each tensor once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_agentrl.methods import GRPOPlusPlusModule
from lit_agentrl.models import offload
from lit_agentrl.models.offload import OffloadActivations
from lit_agentrl.models.policy import Lora, load_policy
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel
from prefix_cases import SHAPES
from test_vlm_policy import shown
from vlm_folders import build_vlm_folder


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """As if the CPU were a GPU, and no tensor small; gives what was put away."""
    away: list[Tensor] = []
    out = OffloadActivations.out

    def watched(self: OffloadActivations, tensor: Tensor) -> object:
        away.append(tensor)
        return out(self, tensor)

    monkeypatch.setattr(offload, "is_elsewhere", lambda tensor: True)
    monkeypatch.setattr(offload, "SMALL", 1)
    monkeypatch.setattr(OffloadActivations, "out", watched)
    return away


def gradients(policy: PaddedModel, rows: tuple, **more: object) -> list[Tensor]:
    token_ids, lengths, targets = rows
    scores = policy(token_ids, lengths, targets=targets, entropy=True, **more)
    (scores.logprobs.sum() + 0.1 * scores.entropy.sum()).backward()
    found = [p.grad for p in policy.parameters() if p.grad is not None]
    for parameter in policy.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(r=4)])
@pytest.mark.parametrize("make", [PaddedModel, lambda lm: PrefixGroupedModel(lm, min_reuse=1.0)])
def test_gradients_are_equal_bit_by_bit(
    make: Callable[..., PaddedModel], lora: Lora | None, checkpointed: bool, tiny_lm: str, everywhere: list[Tensor]
) -> None:
    policy = make(load_policy(tiny_lm, lora=lora, gradient_checkpointing=checkpointed))
    rows = SHAPES["multi_turn"]()
    expected = gradients(policy, rows)
    assert not everywhere
    policy.offload_activations = True
    found = gradients(policy, rows)
    assert len(everywhere) > 10
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_rows_with_images_too(tmp_path: Path, everywhere: list[Tensor]) -> None:
    folder = build_vlm_folder(tmp_path, "llava_dino")
    policy = PaddedModel(load_policy(folder))
    token_ids, lengths, vision = shown(folder, policy.lm)
    expected = gradients(policy, (token_ids, lengths, None), vision=vision)
    policy.offload_activations = True
    for one, other in zip(gradients(policy, (token_ids, lengths, None), vision=vision), expected, strict=True):
        assert torch.equal(one, other)
    assert everywhere


def test_weights_stay_and_a_tensor_goes_once(tiny_lm: str, everywhere: list[Tensor]) -> None:
    """Three projections save the same input; every matrix product saves its weight."""
    policy = PaddedModel(load_policy(tiny_lm), check=False)
    policy.offload_activations = True
    gradients(policy, SHAPES["group"]())
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    assert not weights & {tensor.untyped_storage().data_ptr() for tensor in everywhere}
    saved: list[Tensor] = []
    policy.offload_activations = False
    token_ids, lengths, targets = SHAPES["group"]()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        policy(token_ids, lengths, targets=targets)
    activations = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in weights]
    assert len(everywhere) < len(activations)


def test_what_is_changed_in_place_comes_back_as_it_was_saved(everywhere: list[Tensor]) -> None:
    """x^2 at 3, then x is overwritten and squared again at 5: gradients 6 and 10, of two copies."""
    base = torch.tensor([3.0], requires_grad=True)
    with OffloadActivations(torch.nn.Linear(1, 1)):
        x = base * 1.0
        first = x.detach().requires_grad_()
        one = (first * first).sum()
        with torch.no_grad():
            first.fill_(5.0)
        other = (first * first).sum()
    assert torch.autograd.grad(one, first)[0].item() == 6.0
    assert torch.autograd.grad(other, first)[0].item() == 10.0
    assert len(everywhere) == 2


def test_on_a_cpu_nothing_is_copied(tiny_lm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is all there already."""
    monkeypatch.setattr(OffloadActivations, "out", lambda self, tensor: pytest.fail("copied"))
    policy = PaddedModel(load_policy(tiny_lm))
    policy.offload_activations = True
    assert gradients(policy, SHAPES["group"]())


def test_scoring_without_gradients_does_not_enter_it(tiny_lm: str, everywhere: list[Tensor]) -> None:
    policy = PaddedModel(load_policy(tiny_lm), check=False)
    policy.offload_activations = True
    token_ids, lengths, _ = SHAPES["group"]()
    with torch.no_grad():
        policy(token_ids, lengths)
    assert not everywhere


def test_the_option_reaches_the_policy(tiny_lm: str) -> None:
    for chosen in (False, True):
        module = GRPOPlusPlusModule(pretrained=tiny_lm, offload_activations=chosen)
        module.configure_model()
        assert module.policy.offload_activations is chosen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none")
def test_a_gpu_holds_less(tiny_lm: str) -> None:
    """Between forward and backward; the gradients do not change."""
    policy = PaddedModel(load_policy(tiny_lm).cuda(), check=False)
    token_ids = torch.randint(4, 200, (16, 256), device="cuda")
    lengths = torch.full((16,), 256, device="cuda")
    held, found = [], []
    for policy.offload_activations in (False, True):
        before = torch.cuda.memory_allocated()
        loss = policy(token_ids, lengths).logprobs.sum()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        found.append([p.grad.clone() for p in policy.parameters()])
        policy.zero_grad()
    assert held[1] < 0.5 * held[0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
