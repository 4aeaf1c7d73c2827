"""`lit-agentrl doctor --plan`: memory from a configuration alone, for models that do not fit this machine."""

from __future__ import annotations

import json as json_format
from pathlib import Path

import lightning as L

from lit_agentrl.doctor.findings import plain
from lit_agentrl.doctor.plan_report import planned_memory
from lit_agentrl.doctor.plan_setup import setup_of
from lit_agentrl.doctor.plan_text import memory_lines
from lit_agentrl.errors import UserError
from lit_agentrl.files import write_text
from lit_agentrl.methods.language import LanguageModule


def print_plan(
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    precision: str,
    memory: float | None,
    json: str | None,
) -> None:
    """Print what the run would take on a GPU, and write the numbers.

    Args:
        module: Its options; nothing is loaded.
        datamodule: Its limits.
        precision: The trainer's.
        memory: GiB of a device.
        json: A file.

    Raises:
        UserError: The module is not of `lit_agentrl.methods`.
    """
    if not isinstance(module, LanguageModule):
        raise UserError(f"doctor plans for the modules of lit_agentrl.methods, not {type(module).__name__}.")
    config, setup = setup_of(module, datamodule, precision, "cuda")
    found = planned_memory(config, setup, memory)
    print(f"{module.pretrained}: {config.model_type}, {setup.dtype}, precision {precision}, planned for a GPU\n")
    print("\n".join(["What memory does it take?", *memory_lines(found)]), flush=True)
    if json is not None:
        write_text(Path(json), json_format.dumps(plain(found), indent=2) + "\n")
