"""What runs inside vLLM's worker processes: reloading weights under a version, and fingerprints of them.

vLLM is told of it by `worker_extension_cls`. Needs torch alone: a server's Python has to find this project, not to have
what else it stands on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 512
"""Rows of the identity that a packed matrix is read through at once."""

_CHUNK = 2**20
"""Numbers that exist in float64 at a time, 8 MiB: beside vLLM there is little memory left."""


class WorkerExtension:
    """Methods that vLLM adds to its workers; `collective_rpc` calls them by name.

    All take and give what JSON holds, and return what went wrong instead of raising it: an exception in a worker may
    end its engine.
    """

    lit_version: str = ""
    """Of the weights it computes with; empty where nobody has said."""

    def lit_load(self, folder: str, version: str) -> dict[str, Any]:
        """Take over the weights of a Hugging Face folder; until all are there, the version is empty."""
        self.lit_version = ""
        if not os.path.isfile(os.path.join(folder, "config.json")):
            return {"error": f"{folder} holds no model where this worker runs (no config.json)"}
        try:
            self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]  # vLLM's worker
            repack(self.model_runner.get_model())  # type: ignore[attr-defined]
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return self.lit_mark(version)

    def lit_mark(self, version: str) -> dict[str, Any]:
        """Call the weights as they are by this version."""
        self.lit_version = version
        return {"version": version}

    def lit_state(self) -> dict[str, Any]:
        """The version of the weights, and the options that decide what log-probabilities and prompts mean."""
        config = self.vllm_config.model_config  # type: ignore[attr-defined]
        return {
            "version": self.lit_version,
            "logprobs_mode": str(config.logprobs_mode),
            "max_length": int(config.max_model_len),
            "vocab_size": int(config.get_vocab_size()),
            "dtype": str(config.dtype).removeprefix("torch."),
        }

    def lit_fingerprint(self) -> dict[str, Any]:
        """`count`, `total` and `squares` of all weights; `unknown`, why it cannot tell; or `error`, what is wrong."""
        config = self.vllm_config  # type: ignore[attr-defined]
        if config.parallel_config.world_size > 1:
            return {"unknown": "the weights are spread over several workers"}
        if config.model_config.quantization is not None:
            return {"unknown": "the weights are quantised"}
        try:
            return moments(self.model_runner.get_model())  # type: ignore[attr-defined]
        except UnreadableWeightError as error:
            return {"unknown": str(error)}
        except StalePackingError as error:
            return {"error": str(error)}


class UnreadableWeightError(Exception):
    """A kernel keeps a weight in a form that does not tell its values."""


class StalePackingError(Exception):
    """A CPU kernel multiplies by other weights than its layer has."""


@torch.inference_mode()
def repack(model: nn.Module) -> None:
    """Let CPU kernels of embeddings and heads pack their weights again.

    vLLM 0.32 packs a head anew only where it has a weight of its own: one that is tied to the embedding goes on
    multiplying by the weights from before the reload.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


@torch.inference_mode()
def moments(model: nn.Module) -> dict[str, Any]:
    """How many numbers the weights of a vLLM model are, their sum and the sum of their squares, in float64.

    Tied weights count once; rows that pad a vocabulary do not count.

    Raises:
        UnreadableWeightError: For a weight that was packed by a kernel this does not know.
        StalePackingError: A kernel has packed other weights than its layer has.
    """
    count, sums = 0, torch.zeros(2, dtype=torch.float64)
    for values in _values(model):
        count += values.numel()
        for part in values.reshape(-1).split(_CHUNK):  # type: ignore[no-untyped-call]
            exact = part.double()
            sums = sums.to(exact.device) + torch.stack([exact.sum(), exact.square().sum()])
    total, squares = sums.tolist()  # all that waits for a device
    return {"count": count, "total": total, "squares": squares}


def _values(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        packed = getattr(module, "cpu_linear", None)
        for kind, parameter in module.named_parameters(recurse=False):
            rows = _num_rows(module) if kind == "weight" else None
            is_new = id(parameter) not in seen
            seen.add(id(parameter))
            if kind == "weight" and packed is not None and parameter.numel() > 0:
                _check_packing(module, parameter, name)
            if is_new and kind == "weight" and packed is not None and parameter.numel() == 0:
                yield from _packed_columns(module, parameter, name)
            elif is_new and parameter.numel() == 0:
                raise UnreadableWeightError(f"the kernel of {name} keeps {kind} in a form of its own")
            elif is_new:
                yield parameter[:rows]


def _check_packing(module: nn.Module, weight: Tensor, name: str) -> None:
    """Compare what a kernel multiplies by with the weight that its layer has beside it, as embeddings and heads do."""
    start = 0
    for columns in _packed_columns(module, weight, name):
        if not torch.equal(columns, weight[:, start : start + len(columns)].T):
            raise StalePackingError(f"{name} multiplies by other weights than it has: they are of an earlier version")
        start += len(columns)


def _packed_columns(module: Any, weight: Tensor, name: str) -> Iterator[Tensor]:
    """A matrix [out, in] as its kernel multiplies by it: products with the identity [n, out], which are exact."""
    width = weight.shape[1] if weight.numel() else _width(module)
    if width is None:
        raise UnreadableWeightError(f"the kernel of {name} does not say how wide its matrix is")
    for start in range(0, width, _ROWS):
        rows = torch.zeros(min(_ROWS, width - start), width, dtype=weight.dtype)
        rows[torch.arange(len(rows)), start + torch.arange(len(rows))] = 1
        yield module.cpu_linear(rows, weight, None)


def _width(module: Any) -> int | None:
    for name in ("input_size_per_partition", "input_size", "embedding_dim"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    return None


def _num_rows(module: nn.Module) -> int | None:
    """Rows of an embedding or a head that stand for tokens; None: all."""
    rows = getattr(module, "org_vocab_size", None)
    return rows if isinstance(rows, int) else None
