"""A module and a datamodule that satisfy what the callbacks ask for, with a linear layer as the policy."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lit_agentrl.types import SamplingParams, Split, Step, StopReason, Trajectory, TrajectoryGroup


def step(
    observation: str = "You see a key.",
    action: str = "take key",
    reward: float = 0.0,
    logprob: float = -0.5,
    valid: bool | None = None,
) -> Step:
    ids = list(action.encode())
    return Step(
        list(observation.encode(errors="replace")),
        ids,
        [logprob] * len(ids),
        reward,
        observation=observation,
        action=action,
        valid=valid,
    )


def trajectory(success: bool | None = True, stop: StopReason = StopReason.DONE, **fields: object) -> Trajectory:
    reward = float(bool(success))
    fields = {"steps": [step(reward=reward)], "total_reward": reward, "rewards": {"solved": reward}} | fields
    return Trajectory(stop_reason=stop, success=success, **fields)


def group(*outcomes: bool | None, prompt_id: str = "task-0") -> TrajectoryGroup:
    return TrajectoryGroup(prompt_id, [trajectory(outcome) for outcome in outcomes])


class Batches(IterableDataset):
    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class FakeRollouts(L.LightningDataModule):
    """Collects `num_batches` random batches a time, and evaluates as many solved tasks as there were collections."""

    def __init__(self, num_batches: int = 2, log: list[str] | None = None) -> None:
        super().__init__()
        self.num_batches = num_batches
        self.log = [] if log is None else log
        self.groups: list[TrajectoryGroup] = []
        self.iteration_metrics: dict[str, float] = {}
        self.tokenizer = SimpleNamespace(name="fake")
        self.evaluations: list[tuple[Split, int | None, int, SamplingParams]] = []
        self.collected = -1

    def train_dataloader(self) -> DataLoader:
        iteration = self.trainer.fit_loop.epoch_progress.current.processed
        if iteration != self.collected:
            self.log.append(f"collect {iteration}")
            self.collected = iteration
            self.groups = [group(True, False, prompt_id=f"task-{iteration}")]
            self.iteration_metrics = {
                "reward/mean": 0.5,
                "success": 0.25,
                "time/collect": 2.0,
                "tokens/generated": 100.0,
                "tokens/trained": 60.0,
                "truncated": 0.125,
                "zero_signal": 0.0,
                "failed": 1.0,
            }
            generator = torch.Generator().manual_seed(iteration)
            self.batches = [torch.randn(4, 3, generator=generator) for _ in range(self.num_batches)]
        return DataLoader(Batches(self.batches), batch_size=None)

    def evaluate(
        self, split: Split, *, num_tasks: int | None, group_size: int, sampling: SamplingParams
    ) -> list[TrajectoryGroup]:
        assert not torch.is_grad_enabled()
        self.log.append("evaluate")
        self.evaluations.append((split, num_tasks, group_size, sampling))
        torch.rand(7)  # an evaluation that draws from the global generator must not change the training
        return [group(*[index < 3] * group_size, prompt_id=f"test-{index}") for index in range(num_tasks or 10)]

    def val_dataloader(self) -> list[int]:
        return [] if self.trainer.state.fn == "fit" else [0]

    def test_dataloader(self) -> list[int]:
        return [0]


class FakePolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm = nn.Linear(3, 1)


class FakeModule(L.LightningModule):
    """Minimises `loss_of(prediction, global step)`; noise from the global generator makes a changed stream visible."""

    def __init__(self, loss_of: Callable[[Tensor, int], Tensor] | None = None, log: list[str] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.policy = FakePolicy()
        self.loss_of = loss_of or (lambda prediction, step: (prediction - 1).square().mean())
        self.events = [] if log is None else log
        self.weights: list[Tensor] = []
        """The weights after each optimiser step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss_of(self.policy.lm(batch + 0.1 * torch.rand(())), self.global_step)
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch))
        return loss

    def on_train_batch_end(self, outputs: object, batch: Tensor, batch_idx: int) -> None:
        self.events.append("update")
        self.weights.append(self.policy.lm.weight.detach().clone())

    def validation_step(self, batch: object, batch_idx: int) -> None:
        return None

    def test_step(self, batch: object, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def trainer(run: Path, *callbacks: L.Callback, max_epochs: int = 2, **options: object) -> L.Trainer:
    options = {"logger": False, "enable_checkpointing": False, "reload_dataloaders_every_n_epochs": 1} | options
    return L.Trainer(
        default_root_dir=run,
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
