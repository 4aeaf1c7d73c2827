"""A language model under training: what every method's LightningModule shares."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_agentrl import distributed
from lit_agentrl.errors import UserError
from lit_agentrl.methods.strategy_checks import check_strategy, warn_of_frozen_shards, wrap_layers
from lit_agentrl.models.compiled import compile_layers
from lit_agentrl.models.policy import Lora, Policy, Vision, load_policy
from lit_agentrl.models.reference import Reference
from lit_agentrl.models.scoring import PaddedModel, PrefixGroupedModel, TokenScores
from lit_agentrl.models.sharding import Sharding, shard
from lit_agentrl.models.shared_load import SharedLoad
from lit_agentrl.types import TrainBatch


class LanguageModule(L.LightningModule):
    """A language model under training: loading, prefix sharing, optimiser, checkpoint of the trainable weights only.

    Args:
        pretrained: A local Hugging Face folder, a hub id, a GGUF file, or `smollm2-135m-instruct`.
        dtype: Of the weights in memory.
        attention: Transformers' attention implementation.
        lora: Train adapters of this shape; None trains every weight, but not those of a vision tower.
        vision: Which parts of a vision-language model are trained: vision tower, connector, language model.
        quantize: Hold the frozen weights under an adapter in 4 bits (`nf4`, QLoRA): less memory, more time.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        offload_activations: Keep what the backward pass needs in the CPU's memory meanwhile: less memory of a GPU, more
            time. With `gradient_checkpointing` it is only the layers' inputs.
        share_prefix: Encode the tokens that rows share once: where it is right and pays (`auto`), wherever it is right
            (`true`), never (`false`).
        compile: Compile the decoder's layers with torch.compile, one graph for rows and trees of any size. The first
            steps take longer, later ones less; generation runs uncompiled.
        optimizer: Called with the trainable parameters.
        lr_scheduler: Called with the optimiser; stepped once per optimiser step.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
        attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa",
        lora: Lora | None = None,
        vision: Vision | None = None,
        quantize: Literal["none", "nf4"] = "none",
        gradient_checkpointing: bool = False,
        offload_activations: bool = False,
        share_prefix: Literal["auto"] | bool = "auto",
        compile: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.dtype_name, self.attention, self.lora = dtype, attention, lora
        self.vision, self.quantize = vision, quantize
        self.gradient_checkpointing, self.share_prefix = gradient_checkpointing, share_prefix
        self.offload_activations = offload_activations
        self.compiles_layers = compile  # `compile` is a method of every module
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.policy: nn.Module | None = None
        self.reference: Reference | None = None  # what methods with one compare the policy with
        self.strict_loading = False  # checkpoints hold the trainable weights only
        self._given: list[dict[str, Any]] = []  # the optimiser's options, before a schedule or a checkpoint
        self.num_step_tokens = 1  # what the guard skips a step for when it is 0

    def configure_model(self) -> None:
        """Load the policy, once."""
        if self.policy is not None:
            return
        if self._trainer is not None:
            check_strategy(self._trainer, self)
        sharding = self._sharding()
        shared = None if sharding is None else SharedLoad(self._load)
        lm = self._load() if shared is None else shared.lm
        if self.compiles_layers:
            compile_layers(lm)
        if self.share_prefix is False:
            self.policy = PaddedModel(lm)
        else:
            self.policy = PrefixGroupedModel(lm, min_reuse=None if self.share_prefix == "auto" else 1.0)
        self.policy.offload_activations = self.offload_activations
        if sharding is not None and shared is not None:
            assert self.device_mesh is not None
            replicas, team = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
            shard(self.policy, replicas, sharding, str(self.trainer.precision), team)
            shared.fill(self.policy)
        if self._trainer is not None:
            wrap_layers(self._trainer, lm)
            warn_of_frozen_shards(self._trainer, self.policy)

    def _load(self, empty: bool = False) -> Policy:
        return load_policy(
            self.pretrained,
            dtype=self.dtype_name,
            attention=self.attention,
            lora=self.lora,
            vision=self.vision,
            quantize=self.quantize,
            gradient_checkpointing=self.gradient_checkpointing,
            empty=empty,
        )

    def _sharding(self) -> Sharding | None:
        """How the policy is sharded; None where the strategy does not ask for it."""
        if self._trainer is None or not isinstance(strategy := self._trainer.strategy, ModelParallelStrategy):
            return None
        assert self.device_mesh is not None
        return getattr(strategy, "sharding", Sharding())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Built here, not by the command line, which would do it before the policy exists."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        self._given = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def on_train_start(self) -> None:
        """Let the optimiser's options given now win over those that a checkpoint brought back."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        for group, given in zip(optimizer.param_groups, self._given, strict=True):
            if self.lr_scheduler is not None:  # the schedule keeps its place, on the new learning rate
                given = given | {"lr": group["lr"] * (given["lr"] / group["initial_lr"]), "initial_lr": given["lr"]}
            group.update(given)
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
                scheduler.base_lrs = [given["lr"] for given in self._given]

    def validation_step(self, batch: object, batch_idx: int) -> None:
        """Nothing: the Evaluation callback plays the held-out tasks when the loop ends."""

    def test_step(self, batch: object, batch_idx: int) -> None:
        """Nothing: the Evaluation callback plays the held-out tasks when the loop ends."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether micro-batches should be planned by unique tokens."""
        return isinstance(self.policy, PrefixGroupedModel) and not self.policy.refusal

    def score(self, batch: TrainBatch, *, entropy: bool = False) -> TokenScores:
        """Log-probabilities (and entropy) of the batch's action tokens, [B, L]."""
        assert self.policy is not None
        scores: TokenScores = self.policy(
            batch.token_ids,
            batch.lengths,
            targets=batch.action_mask,
            temperature=batch.temperature,
            entropy=entropy,
            vision=batch.vision,
        )
        return scores

    def logprobs_of(self, batch: TrainBatch) -> Tensor:
        """`score` of a batch on the CPU, without gradients and in the trainer's arithmetic: [B, L] float32 on the CPU.

        Of a sharded policy every rank calls it.
        """
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return self.score(self.transfer_batch_to_device(batch, self.device, 0)).logprobs.float().cpu()

    def scaled(self, loss: Tensor) -> Tensor:
        """Undo Lightning's division by the accumulated batches and the strategy's mean over ranks (over their teams).

        The loss already carries the global denominator of the optimiser step, so micro-batches and ranks must add up.
        """
        return loss * (self.trainer.accumulate_grad_batches * distributed.share()[1])

    def log_sums(self, sums: dict[str, Tensor], batch: TrainBatch) -> None:
        """Log sums over tokens as means over all action tokens of the iteration; every rank logs the same keys."""
        share = 1.0 / ((batch.token_denominator or 1) * batch.num_updates)
        for name, value in sums.items():
            self.log_sum(name, value.detach().float() * share)

    def log_sum(self, name: str, value: Tensor) -> None:
        """Log a micro-batch's share of a number that adds up over those of an iteration, on all ranks."""
        own = value / distributed.team_size()  # each rank of a team has the same
        self.log(name, own, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trainable weights only (a frozen base is loaded from `pretrained` again), and the reference's."""
        if self.reference is not None:
            checkpoint["reference"] = self.reference.state_dict()
        if self._saves_shards():
            return  # ranks could not load a part of the names that they hold
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        if len(trainable) < sum(1 for _ in self.parameters()):
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}

    def _saves_shards(self) -> bool:
        """Whether each rank saves its own shards of the weights, as a folder."""
        return bool(getattr(self.trainer.strategy, "_save_distributed_checkpoint", False))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks weights this module trains: it would silently start from fresh ones."""
        saved = checkpoint.get("state_dict")  # None of a folder of shards: they are loaded already, or were refused
        missing = [n for n, p in self.named_parameters() if p.requires_grad and saved is not None and n not in saved]
        if missing:
            raise UserError(
                f"The checkpoint lacks {len(missing)} of the weights that this configuration trains, {missing[0]} for "
                "one. It was made with another model or other LoRA targets: use the same --model options, or start a "
                "new run."
            )
        if self.reference is not None and checkpoint.get("reference"):
            self.reference.load_state_dict(checkpoint["reference"])
