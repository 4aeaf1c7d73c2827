"""What the README shows works: its Python blocks run, its commands parse, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lit_agentrl.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every `lit-agentrl` command of the README, continued lines joined, comments left out."""
    text = "\n".join(blocks("bash") + re.findall(r"`(lit-agentrl [^`]+)`", README)).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("lit-agentrl ")]


def test_the_environment_and_the_python_example_run(tiny_lm, tmp_path):
    """The two blocks, one after the other, with the tiny model in the place of the real one."""
    environment, program = blocks("python")
    (tmp_path / "parrot.py").write_text(environment)
    (tmp_path / "program.py").write_text(program.replace('"smollm2-135m-instruct"', repr(tiny_lm)))
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0.0 <= float(done.stdout.split()[-1]) <= 1.0


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words, tmp_path, monkeypatch):
    """Every option exists and every file is there; runs of a made-up earlier command are taken as given."""
    (environment, _) = blocks("python")
    (tmp_path / "parrot.py").write_text(environment)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if words[0] in ("pipeline", "compare"):
        main([*words, "--dry-run"] if "--dry-run" not in words else words)
        return
    if "runs/dapo/config.yaml" in words:
        words = [word.replace("runs/dapo/config.yaml", "configs/experiment/grpopp_echo.yaml") for word in words]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"] if "--print_config" not in words else words)
    assert stop.value.code in (0, None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document):
    """Relative links name files, and their anchors name headings."""
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]+)?)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_make_test_is_what_ci_runs():
    """One command: the README's, the Makefile's and CI's."""
    assert "make test" in README
    assert re.search(
        r"^test:.*\n\t@\$\(BIN\)/python -m pytest -n 2 --dist loadfile$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
