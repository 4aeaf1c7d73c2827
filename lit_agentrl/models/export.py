"""A trained policy as a Hugging Face folder that any tool can load."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lit_agentrl.distributed import world
from lit_agentrl.errors import UserError
from lit_agentrl.files import room_for
from lit_agentrl.models.pretrained import PROCESSOR_FILES, find_file
from lit_agentrl.models.quantized import is_quantized
from lit_agentrl.models.shards import gathered, reshard
from lit_agentrl.models.trained_parts import FILE, trained_parts
from lit_agentrl.models.vision_families import has_vision

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


_HOW_TO_MERGE = (
    "To merge it, load the export with `load_policy`, which takes its base in full precision, and export that again."
)

log = logging.getLogger(__name__)


def export(
    lm: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, merge: bool = True
) -> None:
    """Write weights (safetensors), configurations and the tokenizer with its chat template; `lm` stays as it is.

    With a vision-language model go the files of its image processor, as they were in the folder that it was loaded
    from. Where weights were trained whole beside an adapter, the adapter's folder gets a file of them, which only
    `load_policy` reads: export merged for other tools.

    The folder is written beside its place and renamed into it, so it never holds half a model. An earlier export there
    is replaced. Rank 0 writes. A sharded model is gathered tensor by tensor, so then every rank has to call this.

    Args:
        lm: The policy.
        tokenizer: The tokenizer that goes with it.
        folder: Where to write.
        merge: Add an adapter's update to the weights that it adapts; otherwise write the adapter alone, as is done for
            a model of 4-bit weights in any case.

    Raises:
        UserError: The folder holds something that is no earlier export, or there is no room for this one.
    """
    target = Path(folder).absolute()
    _refuse_foreign(target)
    reshard(lm)  # layers that were left gathered hold copies in the type that they compute in
    if merge and is_quantized(lm):
        log.warning("%s: 4-bit weights take no update, so the adapter alone is exported. %s", folder, _HOW_TO_MERGE)
        merge = False
    if isinstance(lm, PeftModel) and not merge:
        write = _adapter_writer(lm)
    else:
        write = _model_writer(lm)
    if world()[0] != 0:
        return
    with room_for(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            write(temporary)
            tokenizer.save_pretrained(temporary)
            _copy_processor(lm, temporary)
            temporary.chmod(0o755)  # mkdtemp made it the user's alone
            _replace(target, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_processor(lm: PreTrainedModel | PeftModel, folder: Path) -> None:
    """What turns images into the model's inputs, copied from where its weights came from."""
    if not has_vision(lm.config):
        return
    source = str(lm.config._name_or_path)
    copied = [file for name in PROCESSOR_FILES if source and (file := find_file(source, name)) is not None]
    for file in copied:
        shutil.copyfile(file, folder / file.name)
    if not copied:
        log.warning("%s has no image processor's files: the export reads text, and images once they are added.", source)


def _refuse_foreign(target: Path) -> None:
    is_export = any((target / name).exists() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not is_export and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is no exported model, so it is not replaced. Choose another folder.")


def _replace(target: Path, new: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old)


def _adapter_writer(lm: PeftModel) -> Callable[[Path], None]:
    """What writes the adapter alone, its weights gathered already."""
    state = {name: gathered(tensor) for name, tensor in lm.state_dict().items() if ".lora_" in name}
    beside = {
        name: gathered(weight.detach()).contiguous() for name, weight in trained_parts(lm.get_base_model()).items()
    }

    def write(folder: Path) -> None:
        # the embeddings are the base's: left at "auto", peft asks the hub whether they were resized
        lm.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        if beside:
            save_file(beside, folder / FILE)

    return write


def _model_writer(lm: PreTrainedModel | PeftModel) -> Callable[[Path], None]:
    """What writes the whole model, its weights gathered and merged already."""
    model = lm.get_base_model() if isinstance(lm, PeftModel) else lm
    assert isinstance(model, PreTrainedModel)
    state = _merged_state(model)
    return lambda folder: model.save_pretrained(folder, state_dict=state)


def _merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights by the names they have without adapters, each adapted one with its update added."""
    state = {
        name.replace(".base_layer.", "."): gathered(tensor)
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for parameter, value in merged_layer(module).named_parameters():
                state[f"{name}.{parameter}"] = value.detach()
    for tied in model.all_tied_weights_keys:  # gathered shards no longer share memory: left in, it would be saved twice
        state.pop(tied, None)
    return state


def merged_layer(module: Any) -> nn.Module:
    """The layer under an adapter with the update added, as peft does it, on a copy of this one layer."""
    # weights are given to the copy, not copied with all that hangs on them: of sharded gradients there is no copy
    made = {id(p): torch.nn.Parameter(_own(p.detach()), requires_grad=False) for p in module.parameters()}
    layer = copy.deepcopy(module, dict(made))
    layer.merge()
    base: nn.Module = layer.get_base_layer()
    return base


def _own(tensor: Tensor) -> Tensor:
    """The whole tensor in memory of its own."""
    found = gathered(tensor)
    return found.clone() if found is tensor else found
