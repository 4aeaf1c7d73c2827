"""Training strategies: FSDP2 with the options that belong to it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lit_agentrl import distributed
from lit_agentrl.checkpoints.optimizer_names import by_name, by_number
from lit_agentrl.errors import UserError
from lit_agentrl.models.sharding import Compute, Sharding


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimiser states sharded over all ranks by FSDP2, layer by layer.

    Lightning's `ModelParallelStrategy` shards over nodes alone by default, and has no place for options of the
    sharding itself. The policy is sharded in `LanguageModule.configure_model`.

    Args:
        tensor_parallel_size: Ranks, of one machine, that split the decoder's matrices among them and train on the same
            rows; by the plan that transformers has for many language models.
        compute: What layers are gathered and computed in; `auto` follows `trainer.precision` (`bf16-mixed`: bfloat16).
        cpu_offload: Keep weights, gradients and optimiser states in the CPU's memory.
        reshard_after_forward: Free a layer's weights after its forward; false takes memory for less communication.
        save_distributed_checkpoint: A folder with each rank's shard, or a single file that rank 0 gathers. By default a
            single file, which every strategy resumes from.
        process_group_backend: By default NCCL on GPUs (with Gloo beside it for what is offloaded), Gloo on CPUs.
        timeout: Seconds that a rank waits for the others before the run ends.

    Example:
        ```yaml
        trainer:
          devices: 8
          precision: bf16-mixed
          strategy: {class_path: FSDP2Strategy}
        ```
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        compute: Compute = "auto",
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        if tensor_parallel_size < 1 or timeout <= 0:
            raise UserError(
                f"FSDP2Strategy: tensor_parallel_size={tensor_parallel_size} must be at least 1, and timeout={timeout} "
                "more than 0 seconds."
            )
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self.sharding = Sharding(compute, cpu_offload, reshard_after_forward)

    def setup_environment(self) -> None:
        """Shard over all ranks that tensor parallelism leaves."""
        size = self.num_nodes * self.num_processes
        per_replica: Any = self._tensor_parallel_size
        if size % per_replica:
            raise UserError(f"FSDP2Strategy: tensor_parallel_size={per_replica} does not divide the {size} ranks.")
        self._data_parallel_size = size // per_replica
        super().setup_environment()
        distributed.set_team(self.device_mesh["tensor_parallel"].get_group() if per_replica > 1 else None)

    def teardown(self) -> None:
        """Forget which ranks form teams."""
        distributed.set_team(None)
        super().teardown()

    def model_to_device(self) -> None:
        """Sharding has moved the weights; what is offloaded has to stay where it is."""
        if not self.sharding.cpu_offload:
            super().model_to_device()

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and self.root_device.type == "cuda" and self.sharding.cpu_offload:
            return "cpu:gloo,cuda:nccl"  # norms of offloaded gradients are reduced on the CPU
        backend: str = super()._get_process_group_backend()
        return backend

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state; in a single file as every other strategy writes it, weights by their number.

        Lightning counts all weights of the model, but an optimiser has those alone that are trained: of an adapter its
        numbers fit no other strategy.
        """
        if self._save_distributed_checkpoint:
            found: dict[str, Any] = super().optimizer_state(optimizer)
            return found
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return by_number(get_optimizer_state_dict(self.model, _bare(optimizer), options=options))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimiser states go where they belong; the rest is returned."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            rest: dict[str, Any] = super().load_checkpoint(path, weights_only)
            return rest
        assert self.model is not None
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            if not state["state"]:
                continue  # SGD without momentum keeps nothing
            named = by_name(state, names_in(optimizer, self.model))
            set_optimizer_state_dict(self.model, _bare(optimizer), named, options=options)
        return checkpoint


# so that `--trainer.strategy fsdp2` is enough
StrategyRegistry.register("fsdp2", FSDP2Strategy, override=True, description="FSDP2 over all ranks")


def names_in(optimizer: Optimizer, module: torch.nn.Module) -> list[str]:
    """The names of the weights that an optimiser moves, in its order."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[parameter] for group in _bare(optimizer).param_groups for parameter in group["params"]]


def _bare(optimizer: Any) -> Optimizer:
    """The optimiser inside of Lightning's wrapper."""
    inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner
