"""What every test has: no network, no cache outside the run's temporary folder, and a tiny model."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
# Read when torch is: tiny models gain nothing from threads, and tests start processes that would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # `import tiny` from any test, and from `python tests/x.py`

import pytest

from tiny import build_tiny_lm
from vllm_parts import find_python


@pytest.fixture(scope="session")
def user_cache() -> str | None:
    """The cache folder that the user's environment names, for the tests that load the real model."""
    return os.environ.get("LIT_AGENTRL_CACHE")


@pytest.fixture(scope="session", autouse=True)
def temporary_cache(user_cache: str | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every test's cache: a folder of this run."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LIT_AGENTRL_CACHE"] = str(folder)
    return folder


@pytest.fixture
def real_cache(user_cache: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache, where the real model is kept dequantised between runs."""
    if user_cache is None:
        monkeypatch.delenv("LIT_AGENTRL_CACHE")
    else:
        monkeypatch.setenv("LIT_AGENTRL_CACHE", user_cache)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama: hidden 64, 2 layers, 4 heads (2 for keys), 300 rows, 512 positions, float32."""
    return build_tiny_lm(tmp_path_factory.mktemp("tiny") / "lm")


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Transformers' loop of continuous batching: one that went on would keep the interpreter from ending."""
    yield
    assert not [thread.name for thread in threading.enumerate() if "generation_loop" in thread.name]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM; tests that need it are skipped where there is none."""
    found, reason = find_python()
    if found is None:
        pytest.skip(reason)
    return found
