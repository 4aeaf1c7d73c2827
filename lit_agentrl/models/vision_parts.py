"""The parts of a vision-language model, and which of them are trained: whole, under adapters, or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel

from lit_agentrl.errors import UserError
from lit_agentrl.models.vision_families import FAMILIES, has_vision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = Literal["language", "connector", "tower"]
State = Literal["frozen", "trained", "lora"]


@dataclass(frozen=True)
class Vision:
    """How the parts of a vision-language model are trained.

    Args:
        tower: The vision encoder: `frozen`, `trained` with all its weights, or under the adapter of `lora`.
        connector: What turns its features into embeddings of the language model: the same choices, or `auto`, which
            trains it beside a language model of which all weights are trained, and freezes it beside an adapter.
        language: The language model: `trained` (with all its weights, or under `lora` by its adapter) or `frozen`.

    Raises:
        UserError: A choice that is unknown, or nothing that is trained.
    """

    tower: Literal["frozen", "trained", "lora"] = "frozen"
    connector: Literal["auto", "frozen", "trained", "lora"] = "auto"
    language: Literal["trained", "frozen"] = "trained"

    def __post_init__(self) -> None:
        choices = {"tower": ("frozen", "trained", "lora"), "connector": ("auto", "frozen", "trained", "lora")}
        for part, allowed in {**choices, "language": ("trained", "frozen")}.items():
            if (chosen := getattr(self, part)) not in allowed:
                raise UserError(f"vision: {part}={chosen!r} must be one of {', '.join(allowed)}.")
        if self.language == "frozen" and self.tower == "frozen" and self.connector in ("auto", "frozen"):
            raise UserError("vision: everything is frozen. Train the language model, the connector or the tower.")

    def states(self, has_adapter: bool) -> dict[Part, State]:
        """What becomes of each part.

        Args:
            has_adapter: whether the model has, or gets, a LoRA adapter.

        Raises:
            UserError: A part is to be under an adapter that is not there.
        """
        if not has_adapter and "lora" in (self.tower, self.connector):
            raise UserError(f"{self}: there is no adapter to train. Set `lora`, or 'trained' instead of 'lora'.")
        language: State = "frozen" if self.language == "frozen" else "lora" if has_adapter else "trained"
        connector: State = "trained" if language == "trained" else "frozen"
        return {
            "language": language,
            "connector": connector if self.connector == "auto" else self.connector,
            "tower": self.tower,
        }


class Parts:
    """Which part each module and weight of a model belongs to; all of a text model is its language model."""

    def __init__(self, lm: PreTrainedModel) -> None:
        names = {id(module): name for name, module in lm.named_modules()}
        decoder: Any = lm.get_decoder()  # type: ignore[no-untyped-call]  # upstream's
        head: Any = lm.get_output_embeddings()  # type: ignore[no-untyped-call]
        family = FAMILIES.get(lm.config.model_type)
        self.has_vision = has_vision(lm.config)
        self.language = names[id(decoder)]
        """The decoder's name."""
        self.head = names.get(id(head), "")
        """The head's name."""
        self._connector = family.connector if family else ()
        outside = [name for name, _ in lm.named_parameters() if self.of(name) != "language"]
        self.seeing = sorted({".".join(name.split(".")[:2]) for name in outside})
        """The names of the largest modules that belong to the tower or the connector."""

    def of(self, name: str) -> Part:
        """The part of the module or weight with this name."""
        if not self.has_vision or _lies_in(name, self.language) or _lies_in(name, self.head):
            return "language"
        return "connector" if any(_lies_in(name, connector) for connector in self._connector) else "tower"


def freeze(lm: PreTrainedModel, states: dict[Part, State]) -> None:
    """Let the weights of `lm` itself, but not of an adapter on it, be trained where they are to be."""
    parts = Parts(lm)
    for name, parameter in lm.named_parameters():
        if "lora_" in name:
            continue
        trained = states[parts.of(name.replace(".base_layer.", "."))] == "trained"
        if parameter.is_floating_point():  # those of a quantised model are not, and cannot be trained
            parameter.requires_grad_(trained)


def seeing_weights(lm: PreTrainedModel | PeftModel) -> list[tuple[torch.nn.Module, str]]:
    """The trained weights of tower and connector, each by its module and its name there.

    They are what rows of text leave without a gradient. By place: a sharded module has another tensor there while its
    weights are gathered.
    """
    base: Any = lm.get_base_model() if isinstance(lm, PeftModel) else lm
    parts = Parts(base)
    return [
        (module, weight)
        for name, module in base.named_modules()
        for weight, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and parts.of(f"{name}.{weight}".replace(".base_layer.", ".")) != "language"
    ]


def adapter_targets(
    lm: PreTrainedModel, targets: str | Sequence[str], states: dict[Part, State]
) -> tuple[str | list[str], str | None]:
    """PEFT's `target_modules` and `exclude_modules` for adapters on the parts that are to have one.

    Args:
        lm: The model without an adapter.
        targets: "all-linear", or the last parts of layers' names.
        states: What becomes of each part.

    Raises:
        UserError: The targets match nothing in those parts.
    """
    parts = Parts(lm)
    if not parts.has_vision:
        return (targets if isinstance(targets, str) else list(targets)), None
    linear = [name for name, part in lm.named_modules() if isinstance(part, torch.nn.Linear) and name != parts.head]
    adapted = [name for name, state in states.items() if state == "lora"]
    chosen = [name for name in linear if parts.of(name) in adapted and _is_target(name, targets)]
    if not chosen:
        found = {part: sorted({_last(name) for name in linear if parts.of(name) == part}) for part in states}
        raise UserError(
            f"lora: targets={targets} match nothing in {' and '.join(adapted) or 'any part'}, the part that gets an "
            f"adapter; the linear layers are {found}. `vision` says which parts get one."
        )
    if adapted != ["language"]:
        return chosen, None
    # the short names that other tools expect, and nothing outside the decoder, whose layers may be called the same
    return sorted({_last(name) for name in chosen}), rf"(?!{re.escape(parts.language)}\.).*"


def _is_target(name: str, targets: str | Sequence[str]) -> bool:
    return isinstance(targets, str) or any(name == target or name.endswith(f".{target}") for target in targets)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _lies_in(name: str, module: str) -> bool:
    return bool(module) and (name == module or name.startswith(f"{module}."))
