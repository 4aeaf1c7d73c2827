"""Is it worth it? Configurations trained to the same budget, several seeds each, and reported with intervals.

Every arm and seed is a `fit` of its own that ends where the budget is spent (`BudgetStop`). What is compared, and how,
is in `report/comparison.py`.
"""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_agentrl.errors import UserError
from lit_agentrl.pipeline.check import parsed
from lit_agentrl.pipeline.options import config_files, dotted, parse_overrides
from lit_agentrl.pipeline.process import run_all
from lit_agentrl.pipeline.stage import Stage
from lit_agentrl.report import plot
from lit_agentrl.report.comparison import AXES, INFORMATION, compare_runs
from lit_agentrl.report.outcomes import RunOutcome, read_run
from lit_agentrl.report.render import write_report

KEYS = ("name", "output", "seeds", "budget", "metric", "level", "baseline", "arms", "options")
ARM_KEYS = ("config", "options")
CAPS = tuple(axis for axis in AXES if axis not in INFORMATION)
RESERVED = ("seed_everything", "trainer.default_root_dir", "ckpt_path", "budget")
"""Options that the comparison sets."""


@dataclass(slots=True)
class Plan:
    """A comparison, read and checked."""

    name: str
    output: Path
    seeds: list[int]
    caps: dict[str, float]
    metric: str
    level: float | None
    baseline: str
    stages: dict[tuple[str, int], Stage]
    """By arm and seed, in the order they run: seed by seed, so that a comparison cut short has whole pairs."""


def main(args: list[str]) -> None:
    """Run `lit-agentrl compare --config FILE [--dry-run | --report-only] [--no-plot] [key=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="lit-agentrl compare", description="Train configurations to the same budget and compare them."
    )
    parser.add_argument("--config", required=True, help="a comparison, e.g. configs/compare/gigpo_vs_grpo_echo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the file's, e.g. seeds=[0]"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the commands, run nothing")
    parser.add_argument("--report-only", action="store_true", help="redraw the report from the runs that are finished")
    parser.add_argument("--no-plot", action="store_true", help="no pictures, so that matplotlib is not needed")
    parsed = parser.parse_intermixed_args(args)
    plan = load(Path(parsed.config), parsed.overrides)
    if not parsed.no_plot and not parsed.dry_run:
        plot.check_installed()
    if not parsed.report_only:
        check_options(plan)
    if parsed.dry_run:
        for stage in plan.stages.values():
            print(f"{stage.name}: lit-agentrl {shlex.join(stage.arguments())}")
        return
    if not parsed.report_only:
        run_all(list(plan.stages.values()), lambda stage: _check_run(plan, stage))
    report(plan, not parsed.no_plot)


def load(path: Path, overrides: list[str]) -> Plan:
    """Read a comparison file.

    Raises:
        UserError: The file is missing or malformed, or asks for what cannot be compared.
    """
    if not path.is_file():
        raise UserError(f"no comparison file {str(path)!r}. There are some in configs/compare/.")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), parse_overrides(overrides, path, KEYS))
        given: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error}") from None
    _check_keys(f"{path}", given, KEYS)
    arms, baseline = given.get("arms") or {}, given.get("baseline")
    if len(arms) < 2:
        raise UserError(f"{path}: {len(arms)} arms; a comparison needs at least 2 under `arms`.")
    if baseline not in arms:
        raise UserError(f"{path}: baseline {baseline!r} is none of the arms {', '.join(arms)}.")
    seeds = given.get("seeds", [0, 1, 2])
    if not isinstance(seeds, list) or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds={seeds} must be a list of different numbers, e.g. [0, 1, 2].")
    name = str(given.get("name", path.stem))
    plan = Plan(
        name,
        Path(given.get("output", f"runs/compare/{name}")),
        [int(seed) for seed in seeds],
        _caps(path, given.get("budget") or {}),
        str(given.get("metric", "success")),
        None if given.get("level") is None else float(given["level"]),
        baseline,
        {},
    )
    for seed in plan.seeds:
        for arm, entry in arms.items():
            plan.stages[arm, seed] = _stage(path, plan, arm, entry or {}, seed, dotted(given.get("options") or {}))
    return plan


def _check_keys(place: str, given: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{place}: must have the keys {', '.join(allowed)}; it is {given!r}.")
    unknown = sorted(set(map(str, given)) - set(allowed))
    if unknown:
        raise UserError(f"{place} has unknown keys {unknown}; allowed are {', '.join(allowed)}.")


def _caps(path: Path, given: dict[str, Any]) -> dict[str, float]:
    _check_keys(f"{path}: budget", given, CAPS)
    caps = {name: float(cap) for name, cap in given.items() if cap is not None}
    if not caps or min(caps.values()) <= 0:
        raise UserError(f"{path}: budget={given} must set at least one of {', '.join(CAPS)}, above 0.")
    return caps


def _stage(path: Path, plan: Plan, arm: str, entry: Any, seed: int, shared: dict[str, Any]) -> Stage:
    _check_keys(f"{path}: arm {arm!r}", entry, ARM_KEYS)
    if not re.fullmatch(r"\w[\w.+-]*", arm):
        raise UserError(f"{path}: arm {arm!r} names a folder: letters, digits, and _ . + - are allowed.")
    if not entry.get("config"):
        raise UserError(f"{path}: arm {arm!r} has no `config`.")
    options = shared | dotted(entry.get("options") or {})
    taken = sorted(name for name in options if name in RESERVED or name.startswith("budget."))
    if taken:
        raise UserError(f"{path}: arm {arm!r} sets {', '.join(taken)}, which the comparison sets for all runs.")
    # a run goes on until its budget is spent, however many iterations its configuration is for
    options = {"trainer.max_epochs": -1} | options | {"seed_everything": seed}
    options |= {f"budget.{name}": _whole(plan.caps.get(name)) for name in CAPS}
    return Stage(
        f"{arm} seed {seed}",
        "fit",
        config_files(entry["config"], path, f"arm {arm!r}"),
        options,
        plan.output / arm / f"seed_{seed}",
        elsewhere="give the comparison another output=FOLDER",
        may_change=False,
    )


def _whole(cap: float | None) -> float | int | None:
    return int(cap) if cap is not None and cap == int(cap) else cap


def check_options(plan: Plan) -> None:
    """Parse every arm's options as `fit` will, and see that all arms are evaluated alike.

    Raises:
        UserError: An option is wrong, evaluations give no curve, or they differ between arms.
    """
    found: dict[str, dict[str, Any]] = {}
    for (arm, seed), stage in plan.stages.items():
        if seed == plan.seeds[0]:
            found[arm] = yaml.safe_load(parsed(f"arm {arm!r}", stage))["evaluation"]
            _check_schedule(arm, found[arm])
    alike = ("name", "split", "num_tasks", "group_size", "sampling")
    for arm, evaluation in found.items():
        for key in alike:
            if evaluation[key] != found[plan.baseline][key]:
                raise UserError(
                    f"arm {arm!r} has evaluation.{key}={evaluation[key]}, the baseline {found[plan.baseline][key]}: "
                    "they would not be comparable. Set it under the comparison's own `options`."
                )


def _check_schedule(arm: str, evaluation: dict[str, Any]) -> None:
    times = [evaluation["at_start"], evaluation["at_end"], evaluation["every_n_epochs"] > 0]
    if sum(times) < 2:
        raise UserError(
            f"arm {arm!r}: a curve needs two evaluations, but evaluation.at_start={evaluation['at_start']}, "
            f"at_end={evaluation['at_end']}, every_n_epochs={evaluation['every_n_epochs']} give one at most."
        )


def report(plan: Plan, with_plot: bool) -> None:
    """Compare the finished runs: the seeds that every arm has.

    Raises:
        UserError: There is no such seed.
    """
    arms = list(dict.fromkeys(arm for arm, _ in plan.stages))
    missing = [place for place, stage in plan.stages.items() if not stage.is_finished()]
    seeds = [seed for seed in plan.seeds if not any(seed == other for _, other in missing)]
    if not seeds:
        raise UserError(f"{plan.output}: no seed is finished in all arms, so there is nothing to compare yet.")
    runs = [_read(plan, (arm, seed)) for arm in arms for seed in seeds]
    comparison = compare_runs(plan.name, runs, plan.metric, plan.baseline, plan.caps, plan.level)
    if missing:
        names = ", ".join(f"{arm} seed {seed}" for arm, seed in missing)
        comparison.notes.append(f"Not finished, so that their seeds are left out: {names}.")
    write_report(comparison, plan.output, with_plot)


def _check_run(plan: Plan, stage: Stage) -> None:
    """Read a run as soon as it is there: a metric that does not exist is found after the first, not the last."""
    _read(plan, next(place for place, other in plan.stages.items() if other is stage))


def _read(plan: Plan, place: tuple[str, int]) -> RunOutcome:
    return read_run(*place, plan.stages[place].run, plan.metric)
