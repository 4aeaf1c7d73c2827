"""The contract: the baseline first, then every setting beside it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_agentrl.doctor.contract.data import cut, replaying
from lit_agentrl.doctor.contract.facts import Facts, read
from lit_agentrl.doctor.contract.processes import CONFIG, Ended, Execute, command, in_processes
from lit_agentrl.doctor.contract.recorder import BASELINE_FOLDER
from lit_agentrl.doctor.contract.settings import BASELINE, IN_FLOAT32, SETTINGS, Options, Setting, is_plain, options_of
from lit_agentrl.doctor.contract.verdict import NONE, Limits, Outcome, is_half, judge, limits_for
from lit_agentrl.doctor.memory import available_bytes
from lit_agentrl.errors import UserError

OWN_OPTIONS = ("num_prompts", "repeats", "seconds", "json", "contract", "record", "memory", "plan", "config")
"""Of the doctor: they say nothing about a run."""
LEAST_SECONDS = 300.0
"""That any run may take; more where the baseline took long: ranks that wait for one another never end."""
PATIENCE = 10
"""How many times as long as the baseline a run may take."""

RAISED = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b")
"""The line of a traceback that says what was raised; other ranks then complain of a closed connection."""


@dataclass(frozen=True)
class Contract:
    """All outcomes."""

    baseline: Facts
    limits: Limits
    outcomes: list[Outcome]
    seconds: float
    exact: Outcome | None = None
    """The first run in float32, which limits for 16 bits come from; None where none was needed."""

    @property
    def is_kept(self) -> bool:
        """Whether no setting changed the step; what was skipped is not counted."""
        return all(outcome.status in ("held", "skipped") for outcome in self.outcomes)

    def to_json(self) -> str:
        """Every number but the rows' hashes."""
        plain = {"is_kept": self.is_kept, "limits": dataclasses.asdict(self.limits), "seconds": self.seconds}
        rows = [dataclasses.asdict(outcome) for outcome in self.outcomes]
        baseline = dataclasses.asdict(self.baseline)
        exact = [] if self.exact is None else [dataclasses.asdict(self.exact)]
        for facts in (baseline, *(row["facts"] for row in [*exact, *rows] if row["facts"])):
            del facts["units"]
        found = {"baseline": baseline, "exact": exact[0] if exact else None, "settings": rows}
        return json.dumps(_finite(plain | found), indent=2)


def check(options: Options, num_prompts: int, execute: Execute = in_processes) -> Contract:
    """Run every setting on the same rows.

    Args:
        options: The doctor's, cut down to one step in one process.
        num_prompts: Prompts, conversations or pairs of the step; an even number is raised by one, so that two ranks
            get unequal shares.
        execute: Runs one setting.

    Raises:
        UserError: The baseline did not run, or its gradient is 0.
    """
    began = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("doctor --contract starts ranks of its own: run it as one process, not under torchrun or srun.")
    with tempfile.TemporaryDirectory(prefix="lit-agentrl-contract-") as folder:
        bench = Bench(Path(folder), prepared(options, num_prompts | 1, Path(folder)), execute)
        baseline, took = bench.baseline()
        print(f"{BASELINE.name}: {took:.0f} s; {len(bench.settings)} settings follow", flush=True)
        exact = bench.exact(baseline, took) if is_half(baseline.precision) else None
        limits = limits_for(baseline.precision, exact)
        outcomes = bench.outcomes(baseline, took, limits)
    return Contract(baseline, limits, outcomes, time.perf_counter() - began, exact)


def prepared(options: Options, count: int, folder: Path) -> Options:
    """What all runs share."""
    shared = {name: value for name, value in copy.deepcopy(options).items() if name not in OWN_OPTIONS}
    return cut(shared, count, folder)


@dataclass(frozen=True)
class Bench:
    """Runs settings, each in a folder of its own."""

    folder: Path
    options: Options
    execute: Execute

    @property
    def settings(self) -> list[Setting]:
        """All that are worth a run: a configuration that is the baseline would repeat it."""
        return [setting for setting in SETTINGS if not (setting.is_as_configured and is_plain(self.options))]

    def baseline(self) -> tuple[Facts, float]:
        """What the first run found, and its seconds.

        Raises:
            UserError: It found nothing, or a gradient of 0.
        """
        began = time.perf_counter()
        ended = self.execute(command([str(self.prepare(BASELINE, None))]), math.inf)
        facts = read(self.folder / BASELINE_FOLDER)
        if facts is None:
            raise UserError(f"The contract's first run ({BASELINE.name}) did not end well: {_last_words(ended)}")
        if not facts.norm > 0:
            raise UserError(
                f"The gradient's norm is {facts.norm} on {facts.num_rows} rows, so nothing can be compared: raise "
                "--num_prompts, or look at why advantages are 0."
            )
        return facts, time.perf_counter() - began

    def prepare(self, setting: Setting, baseline: Facts | None) -> Path:
        """The folder of a run, with its options."""
        target = self.folder / (BASELINE_FOLDER if baseline is None else setting.name.replace(" ", "_"))
        target.mkdir()
        base = self.options if baseline is None else replaying(copy.deepcopy(self.options))
        options = options_of(setting, base, baseline)
        options["trainer"]["default_root_dir"] = str(target / "run")
        (target / CONFIG).write_text(yaml.safe_dump(options))
        return target

    def exact(self, baseline: Facts, took: float) -> Outcome:
        """The baseline in float32, held against nothing."""
        return self._run({IN_FLOAT32: self.prepare(IN_FLOAT32, baseline)}, baseline, took, NONE)[IN_FLOAT32]

    def outcomes(self, baseline: Facts, took: float, limits: Limits | None = None) -> list[Outcome]:
        """Of all settings in their order; `took` are the baseline's seconds."""
        found: dict[Setting, Outcome] = {}
        for ranks in sorted({setting.ranks for setting in self.settings}):
            folders = {}
            for setting in self.settings:
                if setting.ranks != ranks:
                    continue
                if refusal := why_not(setting, self.options, baseline):
                    found[setting] = Outcome(setting, "skipped", refusal)
                else:
                    folders[setting] = self.prepare(setting, baseline)
            found |= self._run(folders, baseline, took, limits)
        return [found[setting] for setting in self.settings]

    def _run(
        self, folders: dict[Setting, Path], baseline: Facts, took: float, limits: Limits | None
    ) -> dict[Setting, Outcome]:
        """Run settings one after the other in the same processes; what comes after one that fails, in new ones."""
        found: dict[Setting, Outcome] = {}
        while left := {setting: folder for setting, folder in folders.items() if setting not in found}:
            began = time.perf_counter()
            allowed = len(left) * max(LEAST_SECONDS, PATIENCE * took)
            ended = self.execute(command([str(folder) for folder in left.values()]), allowed)
            for setting, folder in left.items():
                facts = read(folder)
                if facts is None:  # the others were not begun
                    found[setting] = did_not_end(setting, ended, time.perf_counter() - began)
                    break
                found[setting] = judge(setting, facts, baseline, limits)
            for setting in (setting for setting in left if setting in found):
                print(f"{setting.name}: {found[setting].status}", flush=True)
        return found


def why_not(setting: Setting, options: Options, baseline: Facts) -> str:
    """Why a setting cannot be tried here; empty where it can."""
    model, data = options["model"]["init_args"], options["data"]["init_args"]
    if setting.strategy == "fsdp2" and model.get("quantize", "none") != "none":
        return "weights of 4 bits cannot be sharded"
    if setting.is_split and "max_tokens" not in data and setting.num_changes == 1:
        return f"{options['data']['class_path']} has no max_tokens to split by"
    if setting.ranks == 1:
        return ""
    if baseline.device.startswith("cuda"):
        found = torch.cuda.device_count()
        return "" if found >= setting.ranks else f"this machine has {found} GPU, and every rank takes one"
    room, needed = available_bytes(torch.device("cpu")), setting.ranks * baseline.peak_bytes
    if room is not None and needed > room:
        return f"{setting.ranks} ranks take about {needed / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free"
    return ""


def did_not_end(setting: Setting, ended: Ended, seconds: float) -> Outcome:
    """A run that found nothing: refused, out of memory, hanging, or broken."""
    if ended.is_late:
        return Outcome(setting, "failed", f"had not ended after {seconds:.0f} s: ranks wait for one another")
    if ended.code == 2:  # an error that is the user's to mend: here, what the model or the machine cannot do
        return Outcome(setting, "skipped", _last_words(ended).removeprefix("error: "))
    if ended.code in (-9, 137) or "OutOfMemoryError" in ended.output or "can't allocate memory" in ended.output:
        return Outcome(setting, "skipped", "not enough memory")
    return Outcome(setting, "failed", f"exit code {ended.code}: {_last_words(ended)}")


def _last_words(ended: Ended) -> str:
    """The error of what a run printed, of the first rank that had one; otherwise the last line."""
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")] or [line for line in lines if RAISED.match(line)]
    return errors[0] if errors else (lines or ["it printed nothing"])[-1]


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    is_number = not isinstance(value, float) or value - value == 0
    return value if is_number else None
