"""What is built and installed: one import package, typed, light to import, with its linked folders inside."""

import ast
import configparser
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from itertools import chain
from pathlib import Path

import pytest

import lit_agentrl

ROOT = Path(__file__).parent.parent
LINKED = ("datamodules", "callbacks")


def python(code: str, cwd: Path = ROOT) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel or sdist of a copy of the checkout, its links kept as links, by pyproject's own backend."""
    folder = tmp_path_factory.mktemp(kind)
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "benchmarks", "docs")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=left_out)
    python(f"from setuptools.build_meta import build_{kind}; build_{kind}({str(folder)!r})", cwd=folder / "checkout")
    (built,) = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory))


def info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def files_of(package: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / package).rglob("*.py"))]


def test_wheel_has_one_import_package(wheel: zipfile.ZipFile) -> None:
    assert info(wheel, "top_level.txt").split() == ["lit_agentrl"]
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lit_agentrl"}


@pytest.mark.parametrize("package", LINKED)
def test_wheel_holds_the_linked_folders(wheel: zipfile.ZipFile, package: str) -> None:
    expected = [f"lit_agentrl/{path}" for path in files_of(package)]
    assert len(expected) > 1
    assert set(expected) <= set(wheel.namelist())


def test_wheel_holds_every_module_and_its_types(wheel: zipfile.ZipFile) -> None:
    assert {"lit_agentrl/py.typed", *files_of("lit_agentrl")} <= set(wheel.namelist())


def test_wheel_holds_the_notes(wheel: zipfile.ZipFile) -> None:
    notes = [path.relative_to(ROOT).as_posix() for path in (ROOT / "lit_agentrl" / "knowledge" / "notes").glob("*.txt")]
    assert len(notes) > 1
    assert set(notes) <= set(wheel.namelist())


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(info(wheel, "METADATA"))
    assert metadata["Version"] == lit_agentrl.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in info(wheel, "licenses/LICENSE")
    scripts = configparser.ConfigParser()
    scripts.read_string(info(wheel, "entry_points.txt"))
    module, _, function = scripts["console_scripts"]["lit-agentrl"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_sdist_holds_the_linked_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    with tarfile.open(build("sdist", tmp_path_factory)) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {f"lit_agentrl/{path}" for package in LINKED for path in files_of(package)} <= names


def test_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", lit_agentrl.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert "version" not in project
    assignments = [
        path for path in (ROOT / "lit_agentrl").rglob("*.py") if re.search(r"^__version__ *=", path.read_text(), re.M)
    ]
    assert assignments == [ROOT / "lit_agentrl" / "__init__.py"]


def test_every_imported_package_is_declared() -> None:
    """What comes along with another dependency today may not tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    modules = {
        "pyyaml": "yaml",
        "faiss-cpu": "faiss",
        "sentence-transformers": "sentence_transformers",
        "pillow": "PIL",
    }
    declared = {modules.get(name := re.match(r"[\w-]+", line)[0], name) for line in requirements}
    names = set()
    for package in ("lit_agentrl", *LINKED):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add((node.module or "").partition(".")[0])
    assert {"torch", "transformers", "lightning"} <= names
    assert names - declared - set(sys.stdlib_module_names) - {"lit_agentrl"} == set()


@pytest.mark.parametrize("package", LINKED)
def test_links_are_relative_and_tracked_as_links(package: str) -> None:
    assert (ROOT / "lit_agentrl" / package).readlink() == Path("..") / package


@pytest.mark.slow
@pytest.mark.parametrize("package", LINKED)
def test_two_spellings_are_one_class(package: str) -> None:
    """At the top of a checkout `from datamodules import X` is the class that YAML names lit_agentrl.datamodules.X."""
    printed = python(
        f"import {package} as bare, lit_agentrl.{package} as full\n"
        "print(len(full.__all__), all(getattr(bare, name) is getattr(full, name) for name in full.__all__))"
    )
    count, is_one = printed.split()
    assert int(count) >= 1
    assert is_one == "True"


def seconds(statement: str) -> float:
    """The best of three fresh interpreters: the least disturbed by what else runs."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return min(float(python(code)) for _ in range(3))


@pytest.mark.parametrize("statement", ["import lit_agentrl", "import lit_agentrl.cli", "import lit_agentrl.types"])
def test_import_is_quick(statement: str) -> None:
    assert seconds(statement) < 0.3


HEAVY: Sequence[str] = ("torch", "lightning", "transformers", "peft", "numpy")


@pytest.mark.parametrize("statement", ["import lit_agentrl", "import lit_agentrl.cli", "import lit_agentrl.types"])
def test_import_brings_nothing_heavy(statement: str) -> None:
    printed = python(f"import sys; {statement}; print(*[name for name in {HEAVY!r} if name in sys.modules])")
    assert printed.split() == []


def test_module_and_script_say_the_version() -> None:
    for command in ([sys.executable, "-m", "lit_agentrl"], [str(Path(sys.executable).parent / "lit-agentrl")]):
        done = subprocess.run([*command, "--version"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == lit_agentrl.__version__, done.stderr
