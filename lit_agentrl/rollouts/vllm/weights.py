"""The policy's weights as files that vLLM reads."""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lit_agentrl import distributed
from lit_agentrl.errors import UserError
from lit_agentrl.models.export import export
from lit_agentrl.models.fingerprint import fingerprint
from lit_agentrl.models.pretrained import resolve
from lit_agentrl.models.quantized import is_quantized
from lit_agentrl.models.trained_parts import trained_parts
from lit_agentrl.rollouts.vllm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from lit_agentrl.types import Fingerprint

    LanguageModel = PreTrainedModel | PeftModel

Sync = Literal["full", "adapter"]
log = logging.getLogger(__name__)


def language_model(policy: nn.Module, engine: str) -> LanguageModel:
    """The transformers (or PEFT) model that `policy` is, or has as `lm`.

    Raises:
        UserError: It is neither.
    """
    lm = policy if isinstance(policy, PreTrainedModel | PeftModel) else getattr(policy, "lm", None)
    if not isinstance(lm, PreTrainedModel | PeftModel):
        raise UserError(
            f"{engine}.sync needs a transformers or PEFT model, or a module with one as `.lm`: {type(policy).__name__}."
        )
    return lm


def check_sync(lm: LanguageModel, sync: Sync, engine: str) -> None:
    """Refuse a policy that cannot be handed over in this way.

    Raises:
        UserError: No adapter where the adapter alone should go, weights trained beside it, or 4-bit weights.
    """
    if sync == "full" and is_quantized(lm):
        raise UserError(
            f"{engine}: 4-bit weights take no update, so there is no whole model to hand over. Set sync to adapter, "
            "which samples from the base in full precision, or use HFEngine."
        )
    if sync == "full":
        return
    if not isinstance(lm, PeftModel):
        raise UserError(f"{engine}: sync=adapter needs a policy with a LoRA adapter. Set sync to full.")
    if names := sorted(trained_parts(lm.get_base_model())):
        raise UserError(
            f"{engine}: sync=adapter, but weights beside the adapter are trained too ({names[0]} and "
            f"{len(names) - 1} more), which would stay behind. Set sync to full."
        )
    if is_quantized(lm):
        log.warning(
            "%s samples from the base in full precision while the trainer's is of 4 bits: their log-probabilities "
            "differ by more than rounding. Set the method's old_logprobs to recompute.",
            engine,
        )


def base_of(lm: LanguageModel) -> str:
    """Where the weights under an adapter were loaded from: a folder or a hub id."""
    assert isinstance(lm, PeftModel)
    return resolve(str(lm.peft_config["default"].base_model_name_or_path)).weights


def lora_rank(lm: LanguageModel) -> int:
    """The rank of the adapter's update."""
    assert isinstance(lm, PeftModel)
    options = lm.peft_config["default"]
    assert isinstance(options, LoraConfig)
    return int(options.r)


def lora_scales(lm: LanguageModel) -> dict[str, float]:
    """What the update of each layer under the adapter is multiplied by, by the layer's name."""
    return {name: module.scaling["default"] for name, module in lm.named_modules() if isinstance(module, LoraLayer)}


def adapter_fingerprint(folder: Path, scales: Mapping[str, float], dtype: torch.dtype) -> Fingerprint:
    """Of an adapter that was written to `folder`, as vLLM holds it: in `dtype`, the second matrix times the scale."""

    def held(name: str, matrix: Tensor) -> Tensor:
        layer, is_second, _ = name.partition(".lora_B.")
        return matrix.to(dtype) * scales[layer] if is_second else matrix.to(dtype)

    return fingerprint(held(name, matrix) for name, matrix in load_file(folder / "adapter_model.safetensors").items())


def agree(error: BaseException | None, engine: str) -> None:
    """Raise on every rank what one of them failed with: alone it would leave the others waiting.

    Raises:
        EngineError: On the ranks that did not fail themselves.
    """
    texts = distributed.gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed := [(rank, text) for rank, text in enumerate(texts) if text is not None]:
        raise EngineError(f"{engine}.sync failed on rank {failed[0][0]}: {failed[0][1]}")


class WeightsFolder:
    """Where a run's weights are written for vLLM to read, one version at a time.

    Args:
        parent: A folder to write below, which all ranks and servers see; None is memory (`/dev/shm`) where it is large
            enough, and else the system's temporary folder.
        engine: Whose it is, for messages.
    """

    def __init__(self, parent: str | None, engine: str) -> None:
        self._parent, self._engine = parent, engine
        self._path: Path | None = None

    def write(self, lm: LanguageModel, tokenizer: PreTrainedTokenizerBase, sync: Sync) -> Path:
        """Write the merged model, or the adapter alone; every rank calls this, and the first one writes.

        Raises:
            EngineError: Another rank could not.
            UserError: There is no room, or the folder cannot be seen from this rank.
        """
        error: BaseException | None = None
        try:
            if self._path is None:
                self._path = Path(distributed.gather(self._choose(lm))[0])
                if distributed.world()[0] == 0:
                    weakref.finalize(self, shutil.rmtree, self._path, ignore_errors=True)
            export(lm, tokenizer, self._path / "policy", merge=sync == "full")
        except OSError as failure:
            error = UserError(
                f"{self._engine}: the weights cannot be written to {self._path or self._parent}: {failure}. Give a "
                "folder with room for them."
            )
        agree(error, self._engine)
        assert self._path is not None
        folder = self._path / "policy"
        if not folder.is_dir():
            raise UserError(
                f"{self._engine}: rank 0 wrote the weights to {folder}, which this rank does not see. Give a folder "
                "on a file system that all machines share."
            )
        return folder

    def forget_weights(self) -> None:
        """Free what the last version's weights take, once everybody has read them."""
        if self._path is not None and distributed.world()[0] == 0:
            for file in (self._path / "policy").glob("*.safetensors"):
                file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Leave nothing behind."""
        if self._path is not None and distributed.world()[0] == 0:
            shutil.rmtree(self._path, ignore_errors=True)
        self._path = None

    def _choose(self, lm: LanguageModel) -> str:
        """A folder that nobody else has; made by the first rank alone."""
        if distributed.world()[0] != 0:
            return ""
        if self._parent is not None:
            path = Path(self._parent).expanduser().absolute() / f"lit-agentrl-{secrets.token_hex(4)}"
            path.mkdir(parents=True)
            return str(path)
        size = sum(parameter.numel() * parameter.element_size() for parameter in lm.parameters())
        memory = Path("/dev/shm")
        # twice: a new version is written beside the old one
        fits = memory.is_dir() and shutil.disk_usage(memory).free > 2 * size
        return tempfile.mkdtemp(prefix="lit-agentrl-", dir=memory if fits else None)
