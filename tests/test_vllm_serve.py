"""`lit-agentrl serve-vllm`: what it becomes, without becoming it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_agentrl.cli import main
from lit_agentrl.rollouts.vllm import serve


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What the process was replaced by; the interpreter that runs the tests counts as one that has vLLM."""
    found: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(serve.os, "execvpe", lambda file, command, environment: found.append((command, environment)))
    monkeypatch.setattr(serve, "_HAS_VLLM", "")
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LIT_AGENTRL_VLLM_PYTHON", raising=False)
    return found


def test_the_server_gets_what_the_client_needs(became, tiny_lm):
    main(["serve-vllm", tiny_lm, "--python", sys.executable, "--port", "8123", "--", "--max-num-seqs", "4"])
    ((command, environment),) = became
    text = " ".join(command)
    assert text.startswith(f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {tiny_lm} ")
    for part in (
        "--host 127.0.0.1 --port 8123",
        "--logprobs-mode processed_logprobs",
        "--worker-extension-cls lit_agentrl.vllm_worker.WorkerExtension",
        "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
        "--generation-config vllm",
        "--no-enable-chunked-prefill --max-num-batched-tokens 4096",
    ):
        assert part in text
    assert text.endswith("--max-num-seqs 4")
    assert "--enable-lora" not in text
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment


def test_the_worker_is_found_without_the_rest_of_the_project(became, tiny_lm, tmp_path):
    main(["serve-vllm", tiny_lm, "--python", sys.executable])
    path = became[0][1]["PYTHONPATH"].split(os.pathsep)[0]
    assert sorted(file.name for file in (Path(path) / "lit_agentrl").iterdir()) == ["__init__.py", "vllm_worker.py"]
    code = "import lit_agentrl.vllm_worker as w; print(w.__file__, w.WorkerExtension.lit_load.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONPATH": path}
    )
    assert done.stdout.split() == [str(Path(path) / "lit_agentrl" / "vllm_worker.py"), "lit_load"]


def test_adapters_open_the_way_for_them(became, tiny_lm):
    main(["serve-vllm", tiny_lm, "--python", sys.executable, "--lora_rank", "9"])  # vLLM has room for 8, 16, ...
    command, environment = became[0]
    assert "--enable-lora --max-loras 2 --max-lora-rank 16" in " ".join(command)
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def test_a_model_over_two_workers(became, tiny_lm, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    for size in ("1", "2"):
        main(["serve-vllm", tiny_lm, "--python", sys.executable, "--tensor_parallel", size])
    (one, alone), (two, shared) = became
    assert "--tensor-parallel-size" not in one
    assert "VLLM_CPU_OMP_THREADS_BIND" not in alone
    assert "--tensor-parallel-size 2" in " ".join(two)
    assert shared["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_no_worker_is_too_few(became, tiny_lm, capsys):
    with pytest.raises(SystemExit):
        main(["serve-vllm", tiny_lm, "--python", sys.executable, "--tensor_parallel", "0"])
    assert "--tensor_parallel 0: a model needs 1 worker or more" in capsys.readouterr().err
    assert became == []


def test_a_rank_that_vllm_has_no_room_for_is_refused(became, tiny_lm, capsys):
    for rank in ("0", "513"):
        with pytest.raises(SystemExit):
            main(["serve-vllm", tiny_lm, "--python", sys.executable, "--lora_rank", rank])
        assert f"rank 1 to 512, and this is of rank {rank}" in capsys.readouterr().err
    assert became == []


def test_an_open_host_is_warned_of(became, tiny_lm, capsys):
    main(["serve-vllm", tiny_lm, "--python", sys.executable, "--host", "0.0.0.0"])
    assert "can be reached from other machines" in capsys.readouterr().err
    assert len(became) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere/at/all.gguf"], "no file"),
        (["--python", "/no/python"], "no interpreter that has vllm"),
        (["--python", sys.executable], "no interpreter that has vllm"),
    ],
)
def test_what_cannot_be_started_is_said(became, tiny_lm, capsys, monkeypatch, options, said):
    monkeypatch.setattr(serve, "_HAS_VLLM", "raise SystemExit(1)" if "--python" in options else "")
    given = [tiny_lm, *options] if "--python" in options else [*options, "--python", sys.executable]
    with pytest.raises(SystemExit) as end:
        main(["serve-vllm", *given])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert became == []


def test_without_vllm_anywhere_the_extra_is_named(became, tiny_lm, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["serve-vllm", tiny_lm])
    assert "lit-agentrl[vllm]" in capsys.readouterr().err
