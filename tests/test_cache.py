"""Where the cache folder is."""

from pathlib import Path

import pytest

from lit_agentrl.cache import cache_dir


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/data/own", "/data/shared", "/data/own"),
        ("", "/data/shared", "/data/shared/lit-agentrl"),
        ("", "", "/home/someone/.cache/lit-agentrl"),
        ("~/own", "", "/home/someone/own"),
    ],
)
def test_cache_dir(monkeypatch: pytest.MonkeyPatch, own: str, shared: str, expected: str):
    monkeypatch.setenv("LIT_AGENTRL_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir() == Path(expected)
