"""What runs inside vLLM's worker processes: reloading weights under a version, and fingerprints of them.

vLLM is told of it by `worker_extension_cls`. Needs torch alone: a server's Python has to find this project, not to have
what else it stands on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 512
"""Rows of the identity that a packed matrix is read through at once."""

_CHUNK = 2**20
"""Numbers that exist in float64 at a time, 8 MiB: beside vLLM there is little memory left."""

_SPREAD = (
    "ReplicatedLinear",
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "ParallelLMHead",
)
"""Layers of which is known what tensor parallelism gives each worker: others inherit from them and do otherwise."""


class WorkerExtension:
    """Methods that vLLM adds to its workers; `collective_rpc` calls them by name.

    All take and give what JSON holds, and return what went wrong instead of raising it: an exception in a worker may
    end its engine.
    """

    lit_version: str = ""
    """Of the weights it computes with; empty where nobody has said."""
    lit_is_changed: bool = False
    """Whether it has been handed a whole model since it was started, as its base or as anything else."""

    def lit_load(self, folder: str, version: str) -> dict[str, Any]:
        """Take over the weights of a Hugging Face folder; until all are there, the version is empty."""
        self.lit_version = ""
        if not os.path.isfile(os.path.join(folder, "config.json")):
            return {"error": f"{folder} holds no model where this worker runs (no config.json)"}
        self.lit_is_changed = True
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
        lora = self.vllm_config.lora_config  # type: ignore[attr-defined]
        return {
            "version": self.lit_version,
            "logprobs_mode": str(config.logprobs_mode),
            "max_length": int(config.max_model_len),
            "vocab_size": int(config.get_vocab_size()),
            "dtype": str(config.dtype).removeprefix("torch."),
            "lora_rank": 0 if lora is None else int(lora.max_lora_rank),
            "is_changed": self.lit_is_changed,
        }

    def lit_adapters(self) -> dict[str, Any]:
        """Whether they lie on the weights it was started with, and the moments of each LoRA adapter that it holds."""
        manager = getattr(self.model_runner, "lora_manager", None)  # type: ignore[attr-defined]
        held = {} if manager is None else manager._adapter_manager.list_adapters()
        return {"is_changed": self.lit_is_changed, "adapters": [adapter_moments(each) for each in held.values()]}

    def lit_fingerprint(self) -> dict[str, Any]:
        """`count`, `total` and `squares` of this worker's weights, which add up to those of the model over all workers.

        Or `unknown`, why it cannot tell; or `error`, what is wrong.
        """
        config = self.vllm_config  # type: ignore[attr-defined]
        num_workers = int(config.parallel_config.tensor_parallel_size)
        if config.parallel_config.world_size > num_workers:
            return {"unknown": "the weights are spread over a pipeline"}
        if config.model_config.quantization is not None:
            return {"unknown": "the weights are quantised"}
        try:
            return moments(self.model_runner.get_model(), num_workers)  # type: ignore[attr-defined]
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
def moments(model: nn.Module, num_workers: int = 1) -> dict[str, Any]:
    """How many numbers the weights of a vLLM model are, their sum and the sum of their squares, in float64.

    Tied weights count once; rows that pad a vocabulary do not count. What several workers hold the same counts on each
    by a part, so that their moments add up to the model's.

    Args:
        model: As it is on this worker.
        num_workers: How many it is spread over, by tensor parallelism.

    Raises:
        UnreadableWeightError: For a weight that was packed by a kernel this does not know, or spread in another way.
        StalePackingError: A kernel has packed other weights than its layer has.
    """
    found = {"count": 0.0, "total": 0.0, "squares": 0.0}
    for values, num_copies in _values(model, num_workers):
        found = {name: found[name] + part / num_copies for name, part in _sums([values]).items()}
    return found


def _sums(tensors: Iterable[Tensor]) -> dict[str, Any]:
    count, sums = 0, torch.zeros(2, dtype=torch.float64)
    for values in tensors:
        count += values.numel()
        for part in values.reshape(-1).split(_CHUNK):  # type: ignore[no-untyped-call]
            exact = part.double()
            sums = sums.to(exact.device) + torch.stack([exact.sum(), exact.square().sum()])
    total, squares = sums.tolist()
    return {"count": count, "total": total, "squares": squares}


@torch.inference_mode()
def adapter_moments(adapter: Any) -> dict[str, Any]:
    """As `moments`, of both matrices of every layer of a `LoRAModel`, the second scaled by alpha / r.

    They are whole on every worker, and computed once: vLLM does not change them.
    """
    if not hasattr(adapter, "lit_moments"):
        layers = adapter.loras.values()
        matrices = [part for layer in layers for side in (layer.lora_a, layer.lora_b) for part in _listed(side)]
        adapter.lit_moments = _sums(matrices)
    found: dict[str, Any] = adapter.lit_moments
    return found


def _listed(matrices: Any) -> list[Tensor]:
    """Of a layer, or of the several that vLLM packs into one."""
    return [each for each in (matrices if isinstance(matrices, list) else [matrices]) if each is not None]


def _values(model: nn.Module, num_workers: int) -> Iterator[tuple[Tensor, int]]:
    """Every number of this worker's weights, and how many workers hold the same."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        packed = getattr(module, "cpu_linear", None)
        for kind, parameter in module.named_parameters(recurse=False):
            is_new = id(parameter) not in seen
            seen.add(id(parameter))
            if kind == "weight" and packed is not None and parameter.numel() > 0:
                _check_packing(module, parameter, name)
            if not is_new:
                continue
            rows = _copies_of_rows(module, kind, parameter, num_workers)
            if rows is None:
                raise UnreadableWeightError(f"there is no telling how {kind} of {name} is spread over workers")
            if kind == "weight" and packed is not None and parameter.numel() == 0:
                for columns in _packed_columns(module, parameter, name):
                    yield from ((columns[:, part], num_copies) for part, num_copies in rows)
            elif parameter.numel() == 0:
                raise UnreadableWeightError(f"the kernel of {name} keeps {kind} in a form of its own")
            else:
                yield from ((parameter[part], num_copies) for part, num_copies in rows)


def _copies_of_rows(module: Any, kind: str, parameter: Any, num_workers: int) -> list[tuple[slice, int]] | None:
    """How many workers hold the same of which rows; rows that stand for no token are left out.

    None where that is not known.
    """
    rows = slice(getattr(module, "num_org_embeddings_per_partition", None))
    layer, size = type(module).__name__, getattr(module, "tp_size", None)
    if num_workers == 1:
        return [(rows, 1)]
    if layer not in _SPREAD:  # what is not loaded as a whole has a loader of its own
        return None if hasattr(parameter, "weight_loader") else [(rows, num_workers)]
    if layer == "ReplicatedLinear" or size == 1 or (layer == "RowParallelLinear" and kind == "bias"):
        return [(rows, num_workers)]
    if size != num_workers:
        return None
    if layer == "QKVParallelLinear":  # where there are more workers than heads of keys, several have the same
        queries = module.num_heads * module.head_size
        return [(slice(queries), 1), (slice(queries, None), module.num_kv_head_replicas)]
    return [(rows, 1)]


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
