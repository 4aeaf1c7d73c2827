"""What the callbacks see of a rollout datamodule and of a policy module: the seam, so that they import neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lit_agentrl.errors import UserError
from lit_agentrl.types import EnvironmentSuite, Ledger, SamplingParams, Split, TrajectoryGroup

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@runtime_checkable
class TokenizerSource(Protocol):
    """A datamodule that owns the policy's tokenizer; supervised and preference data have one too."""

    tokenizer: PreTrainedTokenizerBase


@runtime_checkable
class RolloutSource(Protocol):
    """A datamodule that collects rollouts: one collection per Lightning epoch."""

    groups: list[TrajectoryGroup]
    """This rank's groups of the last collection, after dynamic sampling."""
    iteration_metrics: dict[str, float]
    """Numbers of the last collection, all ranks: "reward/mean", "success", "time/collect", "tokens/generated" ..."""
    tokenizer: PreTrainedTokenizerBase

    def evaluate(
        self, split: Split, *, num_tasks: int | None, group_size: int, sampling: SamplingParams
    ) -> list[TrajectoryGroup]:
        """Groups of the first `num_tasks` tasks of the split, gathered: every rank gets all of them."""
        ...


@runtime_checkable
class SpendingSource(Protocol):
    """A datamodule that knows what the run has cost; a checkpoint keeps it."""

    totals: Ledger
    """Of all collections so far, all ranks; of evaluations nothing."""
    total_seconds: float
    """Wall clock of the iterations so far: collecting, preparing and, added by `UpdateClock`, updating."""


@runtime_checkable
class SuiteSource(Protocol):
    """A datamodule whose tasks come from a suite, which may have numbers of its own to add to an evaluation."""

    environment: EnvironmentSuite


class LanguagePolicy(Protocol):
    """A policy: a Hugging Face model, or its PEFT wrapper, is its `lm`."""

    lm: PreTrainedModel | PeftModel


def rollout_source(trainer: Trainer, user: str) -> RolloutSource:
    """The trainer's datamodule as a rollout source, for the callback named `user`.

    Raises:
        UserError: If the datamodule does not collect rollouts.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # a property that Lightning leaves unannotated
    if not isinstance(datamodule, RolloutSource):
        raise UserError(
            f"The callback {user} reads rollouts, but {type(datamodule).__name__} collects none. "
            f"Use RolloutDataModule, or remove {user} from `trainer.callbacks`."
        )
    return datamodule


def tokenizer_of(trainer: Trainer, user: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the trainer's datamodule, for the callback named `user`.

    Raises:
        UserError: If the datamodule has none.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(datamodule, TokenizerSource):
        raise UserError(
            f"The callback {user} needs the policy's tokenizer, but {type(datamodule).__name__} has no `tokenizer`. "
            f"Give the datamodule one, or remove {user} from `trainer.callbacks`."
        )
    return datamodule.tokenizer


def policy_lm(pl_module: LightningModule, user: str) -> PreTrainedModel | PeftModel:
    """The Hugging Face model that the module trains, for the callback named `user`.

    Raises:
        UserError: If the module owns no policy.
    """
    # Not isinstance: from Python 3.12 on a protocol looks past `__getattr__`, which is how a module finds a submodule.
    policy: LanguagePolicy | None = getattr(pl_module, "policy", None)
    if policy is None:
        raise UserError(
            f"The callback {user} needs a module with a `policy`, but {type(pl_module).__name__} has none. "
            f"Use one of lit_agentrl.methods, or remove {user} from `trainer.callbacks`."
        )
    return policy.lm
