"""The reference policy of a KL term: the same network with other values of its trainable weights."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_agentrl.errors import UserError
from lit_agentrl.models.shards import gathered, reshard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

Mode = Literal["none", "adapter_off", "frozen", "sync", "ema"]


class Reference:
    """What the policy is kept near to. It costs one copy of the *trainable* weights, and another while it is in use.

    Args:
        mode: "none" has no reference. "adapter_off" is the model without its LoRA adapter: the pretrained model, also
            where training went on from an adapter. "frozen" is the policy as training began. "sync" is the policy as
            it was at the last multiple of `sync_every` optimiser steps. "ema" is a moving average of the policy.
        sync_every: Optimiser steps between the copies of "sync".
        decay: Weight of the old average at each optimiser step of "ema".

    Raises:
        UserError: A value outside its range.
    """

    def __init__(self, mode: Mode = "none", sync_every: int = 64, decay: float = 0.99) -> None:
        if mode not in ("none", "adapter_off", "frozen", "sync", "ema"):
            raise UserError(f"reference: mode={mode!r} must be one of none, adapter_off, frozen, sync, ema.")
        if sync_every < 1:
            raise UserError(f"reference: sync_every={sync_every} must be at least 1 optimiser step.")
        if not 0 < decay < 1:
            raise UserError(f"reference: decay={decay} must lie between 0 and 1 (0.99 averages about 100 steps).")
        self.mode, self.sync_every, self.decay = mode, sync_every, decay
        self._shadow: dict[str, Tensor] = {}
        self._steps = 0

    def attach(self, policy: nn.Module) -> None:
        """Take the policy's present weights as the reference.

        Args:
            policy: A transformers or PEFT model, or the module that has it as `.lm`, which a sharded one needs.

        Raises:
            UserError: "adapter_off" for a policy without an adapter, or with trained weights beside it.
        """
        lm = _lm_of(policy)
        if self.mode == "adapter_off" and not isinstance(lm, PeftModel):
            raise UserError(
                "reference: mode='adapter_off' needs a policy with a LoRA adapter, and this one has none. Set `lora`, "
                "or mode='frozen', which keeps a copy of the weights."
            )
        beside = [name for name in _trainable(lm) if "lora_" not in name]
        if self.mode == "adapter_off" and beside:
            raise UserError(
                f"reference: mode='adapter_off' would leave {len(beside)} trained weights as they are, {beside[0]} for "
                "one: `vision` trains them beside the adapter. Use mode='frozen', or put them under the adapter."
            )
        self._steps = 0
        self._shadow = {}
        if self.mode in ("frozen", "sync", "ema"):
            reshard(policy)
            self._shadow = {name: self._kept(parameter).clone() for name, parameter in _trainable(lm).items()}

    @torch.no_grad()
    def update(self, policy: nn.Module, optimizer_steps: int) -> None:
        """Move "sync" and "ema" on to `optimizer_steps`, the number of steps made in all; again at the same is nothing.

        "sync" copies the policy where a multiple of `sync_every` was reached or passed since the last call. "ema" over
        n steps at once is s <- decay^n s + (1 - decay^n) p with the present p: exact when called after every step.
        """
        before, self._steps = self._steps, optimizer_steps
        if self.mode == "sync":
            keep = 1.0 if optimizer_steps // self.sync_every == before // self.sync_every else 0.0
        elif self.mode == "ema":
            keep = self.decay ** (optimizer_steps - before)
        else:
            return
        if keep == 1.0:
            return
        reshard(policy)
        for name, parameter in _trainable(_lm_of(policy)).items():
            shadow = self._shadow[name]
            if keep == 0.0:
                shadow.copy_(parameter)  # bit for bit: lerp's s + (p - s) would round
            else:
                shadow.lerp_(self._kept(parameter), 1.0 - keep)

    @contextmanager
    def using(self, policy: nn.Module) -> Iterator[None]:
        """Let the policy be the reference, without gradients; the policy's weights are back bit for bit afterwards.

        Raises:
            UserError: There is no reference ("none").
        """
        if self.mode == "none":
            raise UserError("reference: mode='none' has no reference to compare with. Set it to frozen, sync, ema, ...")
        lm = _lm_of(policy)
        if self.mode == "adapter_off":
            assert isinstance(lm, PeftModel), "attach() refuses anything else"
            with torch.no_grad(), lm.disable_adapter():
                yield
            return
        reshard(policy)
        kept = {name: parameter.detach().clone() for name, parameter in _trainable(lm).items()}
        try:
            _write(lm, self._shadow)
            with torch.no_grad():
                yield
        finally:
            reshard(policy)
            _write(lm, kept)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and an integer, empty before `attach`. Every rank of a sharded policy has to call it."""
        if not self._shadow:
            return {}
        weights = {name: gathered(tensor) for name, tensor in self._shadow.items()}
        return {"optimizer_steps": self._steps, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the reference of a checkpoint; nothing happens where the mode now keeps no weights.

        Raises:
            UserError: The checkpoint's reference has other weights than the policy.
        """
        if not state or not self._shadow:
            return
        weights: dict[str, Tensor] = state["weights"]
        wrong = [
            name for name, kept in self._shadow.items() if weights.get(name, kept.new_empty(0)).shape != kept.shape
        ]
        if wrong or len(weights) != len(self._shadow):
            raise UserError(
                f"The checkpoint's reference does not fit the policy: it has {len(weights)} weights, the policy trains "
                f"{len(self._shadow)} (first mismatch: {wrong[0] if wrong else 'only in the checkpoint'}). Resume with "
                "the `pretrained` and `lora` that it was made with."
            )
        self._steps = state["optimizer_steps"]
        for name, kept in self._shadow.items():
            kept.copy_(_sharded_like(kept, weights[name]))

    def _kept(self, parameter: Tensor) -> Tensor:
        """The weight as the shadow holds it: an average of half-precision weights needs more bits than they have."""
        dtype = torch.promote_types(parameter.dtype, torch.float32) if self.mode == "ema" else parameter.dtype
        return parameter.detach().to(dtype)


def _lm_of(policy: nn.Module) -> nn.Module:
    lm: nn.Module = getattr(policy, "lm", policy)
    return lm


def _trainable(lm: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}


def _write(lm: nn.Module, values: dict[str, Tensor]) -> None:
    """Overwrite the trainable weights in place, where FSDP2 and an engine that shares them see it.

    Through `.data`: a pending backward would refuse weights whose version changed, though they are back by then.
    """
    for name, parameter in _trainable(lm).items():
        parameter.data.copy_(values[name])


def _sharded_like(kept: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(kept, DTensor):
        return whole
    # src_data_rank=None: every rank has the whole tensor and cuts its own part, so nothing is sent
    return distribute_tensor(whole.to(kept.device), kept.device_mesh, kept.placements, src_data_rank=None)
