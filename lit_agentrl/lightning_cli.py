"""The Lightning subcommands and the project's own: LightningCLI with the project's defaults, checks and callbacks."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TextIO

import lightning as L
import transformers
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

# Imported so that classes can be named without their path on the command line.
from lit_agentrl import __version__
from lit_agentrl import datamodules as _datamodules  # noqa: F401
from lit_agentrl import envs as _envs  # noqa: F401
from lit_agentrl import methods as _methods  # noqa: F401
from lit_agentrl import preferences as _preferences  # noqa: F401
from lit_agentrl import retrieval as _retrieval  # noqa: F401
from lit_agentrl import rollouts as _rollouts  # noqa: F401
from lit_agentrl import strategies as _strategies  # noqa: F401
from lit_agentrl.callbacks import (
    AtomicCheckpointIO,
    BudgetStop,
    CollectionMetrics,
    Evaluation,
    HFExport,
    IdleGuard,
    IterationCheckpoint,
    IterationProgress,
    NonFiniteGuard,
    RankWatch,
    RunLog,
    Throughput,
    Transcripts,
    UpdateClock,
    stop_on_sigterm,
)
from lit_agentrl.callbacks.source import RolloutSource
from lit_agentrl.checkpoints.choice import checked, refuse_folder
from lit_agentrl.doctor.checkup import Checkup
from lit_agentrl.doctor.contract.processes import command
from lit_agentrl.doctor.contract.recorder import Recorder
from lit_agentrl.doctor.contract.run import check
from lit_agentrl.doctor.contract.text import render as render_contract
from lit_agentrl.doctor.plan_only import print_plan
from lit_agentrl.doctor.small_run import shrink
from lit_agentrl.doctor.text import render
from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text
from lit_agentrl.methods.language import LanguageModule
from lit_agentrl.preferences import Mining
from lit_agentrl.preferences.stage import MiningRun

# In the order they run; each has a section of its name. The last ones read what the first ones log.
STANDING_CALLBACKS = {
    "collection": CollectionMetrics,
    "clock": UpdateClock,
    "budget": BudgetStop,
    "guard": NonFiniteGuard,
    "evaluation": Evaluation,
    "transcripts": Transcripts,
    "throughput": Throughput,
    "progress": IterationProgress,
    "export": HFExport,
    "checkpoint": IterationCheckpoint,
}

OWN_SUBCOMMANDS = ("evaluate", "doctor", "mine_preferences")
"""Methods of `AgentTrainer` beside Lightning's."""


class AgentParser(LightningArgumentParser):
    """Says what is wrong without the hundred lines of usage that argparse would print first."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and where all options are listed, and exit with 2."""
        if not self.exit_on_error:  # an inner parser that tries one reading of a value among several
            super().error(message, ex)
        print(f"error: {message}", file=sys.stderr)
        print("All options with their values: add --print_config; with explanations: --help.", file=sys.stderr)
        raise SystemExit(2)


class AgentTrainer(L.Trainer):
    """Lightning's Trainer with `evaluate`, `doctor` and `mine_preferences`."""

    options: Mapping[str, Any] = MappingProxyType({})
    """The command's configuration, as plain values."""

    def evaluate(
        self,
        model: L.LightningModule | None = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Measure success on held-out tasks without training.

        Args:
            model: The module whose policy plays.
            datamodule: Where its tasks come from.
            ckpt_path: A checkpoint to take the weights from; without one, `model.pretrained` is evaluated as it is.
            weights_only: As in `test`; here so that a fit's saved configuration can be evaluated.
        """
        self.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=weights_only)

    def doctor(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        num_prompts: int = 2,
        repeats: int = 3,
        seconds: float = 120.0,
        json: str | None = None,
        contract: bool = False,
        record: list[str] | None = None,
        memory: float | None = None,
        plan: bool = False,
    ) -> None:
        """Check shared prefixes, speed, memory and the noise of ratios on the rows of one small collection.

        Args:
            model: The module whose policy is looked at.
            datamodule: Where its rows come from.
            ckpt_path: A checkpoint to take the weights from; without one, `model.pretrained` is looked at as it is.
            weights_only: As in `fit`.
            num_prompts: Prompts to collect, at most `data.num_prompts`.
            repeats: Timings of each side.
            seconds: About how long the passes may take; it decides how many rows are measured.
            json: A file for the numbers.
            contract: Look at something else: whether one optimiser step has the same loss and gradient in micro-batches
                of any size, packed or padded, with gradient checkpointing, under DDP and FSDP2, on 1 and 2 ranks.
            record: A folder for the facts of one such step, as configured; `contract` runs these. Of more folders each
                following one is read for its `config.yaml`, and gets the facts of that step.
            memory: GiB of a device, to say what fits in it.
            plan: Plan the memory from the model's configuration, for a GPU, and end: no weights, no rollout.

        Raises:
            SystemExit: With 1 where the shared forward is not the padded one, ratios are noisy beyond the limits, or a
                setting of the contract is not equal.
        """
        if json is not None and not Path(json).absolute().parent.is_dir():
            raise UserError(f"--json {json}: its folder does not exist.")
        if record:
            self.callbacks.append(Recorder(Path(record[0]), ckpt_path, weights_only))  # type: ignore[attr-defined]
            self.fit(model, datamodule=datamodule)
            return
        if contract:
            self._check_contract(num_prompts, json)
            return
        checkup = Checkup(repeats, seconds, ckpt_path, weights_only, memory)
        if plan:
            print_plan(model, datamodule, str(self.precision), memory, json)
            return
        self.callbacks.append(checkup)  # type: ignore[attr-defined]  # set by a connector of Lightning's
        self.fit(model, datamodule=datamodule)
        if checkup.findings is None:
            raise UserError(f"{type(datamodule).__name__} gave no training batch, so there is nothing to look at.")
        print(render(checkup.findings), flush=True)
        if json is not None:
            write_text(Path(json), checkup.findings.to_json() + "\n")
        if not checkup.findings.is_healthy:
            raise SystemExit(1)

    def _check_contract(self, num_prompts: int, json: str | None) -> None:
        """Run every setting in processes of its own."""
        found = check(dict(self.options), num_prompts)
        print(render_contract(found), flush=True)
        if json is not None:
            write_text(Path(json), found.to_json() + "\n")
        if not found.is_kept:
            raise SystemExit(1)

    def mine_preferences(
        self,
        model: L.LightningModule,
        mine: Mining,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Play tasks and write pairs of a better and a worse answer, for DPO.

        Args:
            model: The module whose policy plays.
            mine: How pairs are found and filtered.
            datamodule: Where its tasks come from.
            ckpt_path: A checkpoint to take the weights from; without one, `model.pretrained` plays as it is.
            weights_only: As in `test`.
        """
        options = {name: self.options.get(name) for name in ("model", "data", "mine", "seed_everything")}
        options["mine"] = {**(options["mine"] or {}), "output": None}
        self.callbacks.append(MiningRun(mine, options, ckpt_path))  # type: ignore[attr-defined]
        self.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=weights_only)


class SaveConfig(SaveConfigCallback):
    """Writes `<run>/config.yaml` when a fit starts: the record of what was run, and what a resume is compared with."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file, whole or not at all."""
        if not trainer.is_global_zero or trainer.state.fn != TrainerFn.FITTING:
            return
        text = self.parser.dump(self.config, skip_none=False, format="yaml")
        write_text(Path(trainer.default_root_dir) / "config.yaml", text)


class AgentRLCLI(LightningCLI):
    """LightningCLI, where the configuration given now always wins and standing callbacks have a section each."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One tokenizer and one seed for everything; `--evaluation.num_tasks 20` instead of a list of callbacks."""
        parser.link_arguments("model.init_args.pretrained", "data.init_args.tokenizer")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        for name, callback in STANDING_CALLBACKS.items():
            parser.add_lightning_class_args(callback, name)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without `predict`, and the project's own."""
        commands = {name: LightningCLI.subcommands()[name] for name in ("fit", "validate", "test")}
        return commands | {name: {"model", "datamodule"} for name in OWN_SUBCOMMANDS}

    def before_doctor(self) -> None:
        """The contract makes other runs of the configuration."""
        assert isinstance(self.trainer, AgentTrainer)
        self.trainer.options = self._dumped()

    def before_mine_preferences(self) -> None:
        """What was asked for decides whether a stopped run may go on."""
        assert isinstance(self.trainer, AgentTrainer)
        self.trainer.options = self._dumped()

    def _parse_ckpt_path(self) -> None:
        """Resume with the configuration given now; Lightning would let the checkpoint's win (Lightning #21455)."""

    def before_instantiate_classes(self) -> None:
        """What can go wrong with files is said before anything is loaded."""
        config = self.config[self.config.subcommand]
        run = Path(config.trainer.default_root_dir)
        checkpoint = config.get("ckpt_path")
        if checkpoint:
            is_last = checkpoint == "last"
            path = run / "checkpoints" / "last.ckpt" if is_last else Path(checkpoint)
            checkpoint = config.ckpt_path = str(checked(path, or_older=is_last))
            refuse_folder(Path(checkpoint), str(config.trainer.strategy))
        if self.config.subcommand == "doctor":
            self._shrink(config)
        if self.config.subcommand != "fit":
            return
        if checkpoint:
            print_differences(Path(checkpoint).parent.parent / "config.yaml", self._dumped())
        elif (run / "checkpoints" / "last.ckpt").exists():
            raise UserError(
                f"{run} already holds a run. Resume it with --ckpt_path last, start elsewhere with "
                "--trainer.default_root_dir FOLDER, or delete the folder."
            )

    def _shrink(self, config: Namespace) -> None:
        """Leave of the run what the doctor looks at; the folder that it may write to disappears with this object."""
        self.save_config_callback = None
        if config.record:
            return  # cut down already, but for the ranks
        self._folder = tempfile.TemporaryDirectory(prefix="lit-agentrl-doctor-")
        num_prompts = sys.maxsize if config.plan else config.num_prompts
        for change in shrink(config, num_prompts, self._folder.name):
            if not config.plan:
                print(f"for the doctor: {change}")

    def _dumped(self) -> dict[str, Any]:
        config = self.config[self.config.subcommand]
        dumped: dict[str, Any] = yaml.safe_load(
            self._parser(self.config.subcommand).dump(config, skip_none=False, format="yaml")
        )
        return dumped

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """Leave out what reads rollouts where the datamodule collects none."""
        if self.subcommand in ("doctor", "mine_preferences"):
            callbacks = []
        elif not isinstance(self.datamodule, RolloutSource):
            callbacks = [callback for callback in callbacks if not isinstance(callback, Evaluation | Transcripts)]
        if self.subcommand == "fit":
            callbacks = [IdleGuard(), *callbacks]
        if not any(isinstance(callback, RankWatch) for callback in config.get("callbacks") or []):
            callbacks = [RankWatch(), *callbacks]
        return super()._instantiate_trainer(config, callbacks)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Log to CSV files inside the run folder where no logger was asked for."""
        config = self.config[self.subcommand].trainer
        if self.subcommand == "mine_preferences":
            kwargs["logger"] = False  # there is nothing to log
        elif self.subcommand != "doctor" and config.logger in (None, True):
            folder = "logs" if self.subcommand == "fit" else f"logs_{self.subcommand}"
            kwargs["logger"] = RunLog(config.default_root_dir, name=folder)
        return super().instantiate_trainer(**kwargs)


def print_differences(recorded: Path, now: dict[str, Any]) -> None:
    """Say which options differ from those the checkpoint's run was started with; the ones given now are used."""
    if not recorded.is_file():
        print(f"Resuming; {recorded} is not there, so the options cannot be compared with the first run's.")
        return
    before, after = _flatten(yaml.safe_load(recorded.read_text())), _flatten(now)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k) and k != "ckpt_path")
    if changed:
        print("Resuming with other options than the run was started with; those given now are used:")
        for key in changed:
            print(f"  {key}: {before.get(key)} -> {after.get(key)}")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {
            k: v for name, child in tree.items() for k, v in _flatten(child, f"{prefix}.{name}".lstrip(".")).items()
        }
    return {prefix: tree}


class _Console(logging.StreamHandler[TextIO]):
    """Standard error as it is at each message: who calls `main` from a program may have it redirected for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def quiet() -> None:
    """Silence what Lightning and Transformers say about things that are as they should be here."""
    project = logging.getLogger("lit_agentrl")
    if not project.handlers:
        project.addHandler(_Console())
        project.setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    for message in (
        "LightningCLI's args parameter",  # `main` takes a list, as the tests and the pipeline give one
        "Found .* module\\(s\\) in eval mode",  # dropout is off in RL: sampling and training see the same network
        "Your `IterableDataset` has `__len__` defined",  # ready batches, no loading workers
        "The .*_dataloader. does not have many workers",
        "It is recommended to use `self.log",  # what is logged is reduced already, or of one rank on purpose
        "Total length of .* across ranks is zero",  # no validation inside a fit; of training `IdleGuard` says it
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning with torch 2.13
        "`is_gradient_checkpointing` is deprecated",  # peft with Transformers 5.23
    ):
        warnings.filterwarnings("ignore", message=message)


def run(args: list[str]) -> None:
    """Parse the arguments and run the subcommand they start with."""
    quiet()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes of the user's own; last, so that no installed package is shadowed
    with stop_on_sigterm():
        cli = AgentRLCLI(
            LanguageModule,
            L.LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_class=AgentTrainer,
            trainer_defaults={
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "reload_dataloaders_every_n_epochs": 1,
                "default_root_dir": "runs/latest",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "plugins": [{"class_path": f"{AtomicCheckpointIO.__module__}.{AtomicCheckpointIO.__qualname__}"}],
            },
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=AgentParser,
            parser_kwargs={"parser_mode": "omegaconf+", "version": __version__},
            args=[args[0].replace("-", "_"), *args[1:]],  # a subcommand is a method of the trainer
        )
    recorded = cli.config[cli.subcommand].get("record") or []
    del cli  # its model and its rows
    gc.collect()
    if len(recorded) > 1:
        run(command(recorded[1:]))
