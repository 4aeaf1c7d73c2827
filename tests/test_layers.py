"""Who may import whom: imports point to lower layers, siblings meet in types.py, nothing is relative."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    {
        "__init__",
        "errors",
        "types",
        "images",
        "cache",
        "deadline",
        "distributed",
        "files",
        "checkpoints",
        "vllm_worker",
    },
    {"advantages", "losses", "rewards", "intervals"}
    | {"_checks", "_importance", "_segments", "_step_advantages", "_preference_losses"},
    {"rows", "anchors", "envs", "models", "rollouts", "knowledge", "retrieval"},
    {"methods", "datamodules", "callbacks", "strategies"},
    {"report", "doctor", "vlm", "preferences"},
    {"lightning_cli", "pipeline", "compare"},
    {"cli"},
    {"__main__"},
)
SIBLINGS = {"methods", "datamodules", "callbacks"}
LINKED = {"datamodules", "callbacks"}


def layer_of(unit: str) -> int:
    """The place of a top-level module or package of lit_agentrl; a new one has to be given one here."""
    found = [index for index, names in enumerate(LAYERS) if unit in names]
    assert found, f"lit_agentrl.{unit} has no layer: add it to LAYERS in {Path(__file__).name}, and to CONTRIBUTING.md"
    return found[0]


def modules() -> dict[str, Path]:
    """Every module of the package by its full name, the linked folders included."""
    folders = {"lit_agentrl": ROOT / "lit_agentrl"} | {f"lit_agentrl.{name}": ROOT / name for name in LINKED}
    found = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "lit_agentrl" and parts[0] in LINKED:
                continue  # through the link: its own folder is listed
            found[".".join((package, *parts))] = path
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """What is imported anywhere in the file, functions included: `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of `module`."""
    unit = module.split(".")[1]
    wrong = []
    for name in imported(ast.parse(source)):
        first, _, rest = name.partition(".")
        if not first:
            wrong.append(f"{module} imports {name} relatively")
        elif first in LINKED:
            wrong.append(f"{module} imports {name} by its bare name: a second copy of lit_agentrl.{first}")
        elif first == "lit_agentrl":
            target = rest.partition(".")[0]
            target = target if is_unit(target) else "__init__"  # else a name of the package itself, as __version__
            if layer_of(target) > layer_of(unit):
                wrong.append(f"{module} imports {name}, which lies above it")
            elif {unit, target} <= SIBLINGS and unit != target:
                wrong.append(f"{module} imports {name}: {unit} and {target} meet in types.py and in YAML only")
    return wrong


def is_unit(name: str) -> bool:
    """Whether `lit_agentrl.name` is a module or package that has a layer."""
    return any(name in names for names in LAYERS)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    assert violations(module, modules()[module].read_text()) == []


def test_the_whole_package_was_looked_at() -> None:
    seen = {name.split(".")[1] for name in modules()}
    assert seen >= {"types", "advantages", "rows", "models", "methods", "datamodules", "callbacks", "cli", "__main__"}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("lit_agentrl.types", "from lit_agentrl.losses import kl_estimate", "above"),
        ("lit_agentrl.losses", "def f():\n    from lit_agentrl import models", "above"),
        ("lit_agentrl.models.policy", "import lit_agentrl.methods.base", "above"),
        ("lit_agentrl.methods.base", "if TYPE_CHECKING:\n    from lit_agentrl.datamodules import prompts", "meet in"),
        ("lit_agentrl.callbacks.export", "from lit_agentrl.methods import base", "meet in"),
        ("lit_agentrl.methods.base", "from . import sft", "relatively"),
        ("lit_agentrl.methods.base", "from ..types import Step", "relatively"),
        ("lit_agentrl.cli", "from datamodules.rollout import RolloutDataModule", "second copy"),
        ("lit_agentrl.cli", "import callbacks", "second copy"),
    ],
)
def test_what_is_forbidden_is_found(module: str, source: str, message: str) -> None:
    (wrong,) = violations(module, source)
    assert message in wrong


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lit_agentrl.methods.base", "from lit_agentrl.methods import sft"),
        ("lit_agentrl.methods.base", "from lit_agentrl import __version__, distributed"),
        ("lit_agentrl.rows", "from lit_agentrl.models.prefix_tree import PackedTree"),
        ("lit_agentrl.types", "import torch"),
        ("lit_agentrl.types", "import lit_agentrl"),
    ],
)
def test_what_is_allowed_is_let_through(module: str, source: str) -> None:
    assert violations(module, source) == []
