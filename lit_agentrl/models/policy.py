"""The policy: a model of language, or of vision and language, whole or under a LoRA adapter, and its tokenizer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from lit_agentrl.errors import UserError
from lit_agentrl.models.activations import recompute_activations
from lit_agentrl.models.export import export
from lit_agentrl.models.pretrained import Source, processor_template, read_config, resolve
from lit_agentrl.models.quantized import Quantize, keep_gradients, quantization_config
from lit_agentrl.models.trained_parts import load_trained_parts
from lit_agentrl.models.vision_families import has_vision
from lit_agentrl.models.vision_parts import Vision, adapter_targets, freeze

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from lit_agentrl.models.vision_parts import Part, State

__all__ = [
    "Attention",
    "DType",
    "Lora",
    "Quantize",
    "Vision",
    "blank_policy",
    "check_tokenizer",
    "export",
    "load_policy",
    "load_tokenizer",
    "max_context",
]

Policy = PreTrainedModel | PeftModel
DType = Literal["float32", "bfloat16", "float16", "float64"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter on linear layers: W + (alpha / r) B A, with A random and B zero at the start (Hu et al. 2021).

    Args:
        r: Rank of the update.
        alpha: Its scale, before the division by `r`.
        dropout: Only 0. The policy samples without dropout; with it, the same weights would give other
            log-probabilities in training, and the ratio of the first update would not be 1.
        targets: "all-linear" (every linear layer but the output head), or the last parts of layers' names. Of a
            vision-language model only the language model's layers, unless `Vision` puts other parts under the adapter.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0:
            raise UserError(f"lora: r={self.r} must be at least 1 and alpha={self.alpha} more than 0.")
        if self.dropout != 0:
            raise UserError(
                f"lora: dropout={self.dropout} is refused. Actions are sampled without dropout, so with it the first "
                "update's probability ratio would not be 1. Leave it at 0; a smaller `r` or a KL term regularise."
            )
        if isinstance(self.targets, str) and self.targets != "all-linear":
            raise UserError(
                f"lora: targets={self.targets!r} must be 'all-linear' or a list such as ['q_proj', 'v_proj']."
            )


def load_tokenizer(pretrained: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `pretrained` (see `load_policy`), checked against the model's configuration.

    Its chat template is that of the model's processor, where a vision-language model has one of its own.

    Raises:
        UserError: Nothing to load, more tokens than the model has embeddings, no chat template, or no end token.
    """
    source = resolve(pretrained)
    config = read_config(pretrained, source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"pretrained={pretrained!r}: its tokenizer cannot be loaded. {error}") from error
    if has_vision(config) and (template := processor_template(source)) is not None:
        tokenizer.chat_template = template
    check_tokenizer(tokenizer, config)
    return tokenizer


def load_policy(
    pretrained: str,
    *,
    dtype: DType = "float32",
    attention: Attention = "sdpa",
    lora: Lora | None = None,
    gradient_checkpointing: bool = False,
    vision: Vision | None = None,
    quantize: Quantize = "none",
    empty: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model, in `eval()` mode and with every dropout at 0: sampling and training see the same network.

    Lightning (2.2 and later) keeps a module's mode in `fit`, so it stays in `eval()`; gradients flow all the same.
    With an adapter only its weights require gradients, and they are float32 whatever the model's `dtype` is below that.

    Args:
        pretrained: A local Hugging Face folder, the packaged name "smollm2-135m-instruct", a `.gguf` file, or a hub
            id. A folder with a LoRA adapter gives its base with the adapter, trainable.
        dtype: What the model's weights are held in.
        attention: The implementation that transformers runs.
        lora: An adapter to put on the model, drawn from `torch.initial_seed()`: the same on every rank and run of a
            seed, however many random numbers were drawn before. Seed all ranks alike (`seed_everything` does).
        gradient_checkpointing: Recompute each layer in backward instead of keeping its activations.
        vision: Which parts of a vision-language model are trained; by default all but the vision tower, or the adapter
            on the language model alone.
        quantize: "nf4" holds the language model's frozen layers in 4 bits under an adapter (QLoRA, Dettmers et al.
            2023); vision tower, connector and head stay as they are.
        empty: Structure alone, on the `meta` device: another rank's weights will fill it.

    Raises:
        UserError: The model cannot be found or loaded, or an option does not fit it.
    """
    source = resolve(pretrained)
    has_adapter = source.adapter is not None or lora is not None
    states = (vision or Vision()).states(has_adapter)
    if source.adapter is not None and lora is not None:
        raise UserError(
            f"pretrained={pretrained!r} is a LoRA adapter already: leave `lora` out, or export it merged first."
        )
    config = read_config(pretrained, source)
    if vision is not None and not has_vision(config):
        raise UserError(f"pretrained={pretrained!r} is a model of text, which has no {vision}: leave `vision` out.")
    if quantize != "none" and not has_adapter:
        raise UserError(
            f"quantize={quantize!r}: weights of 4 bits cannot be trained. Set `lora`, or quantize to 'none'."
        )
    if empty:
        lm = _without_weights(config, dtype, attention)
    else:
        lm = _load_weights(pretrained, source, config, dtype, attention, quantize)
    if quantize != "none":
        keep_gradients(lm)
    policy: Policy = lm
    if source.adapter is not None:
        policy = _with_adapter(lm, source.adapter, empty)
    elif lora is not None:
        policy = _add_lora(lm, lora, pretrained, states)
    return _made_ready(policy, lm, states, gradient_checkpointing)


def blank_policy(
    config: PreTrainedConfig,
    *,
    dtype: DType = "float32",
    attention: Attention = "sdpa",
    lora: Lora | None = None,
    gradient_checkpointing: bool = False,
    vision: Vision | None = None,
    replace: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel | PeftModel:
    """What `load_policy` would give for a model of this configuration, with weights that hold nothing (`meta`).

    Args:
        config: The model's.
        dtype: As for `load_policy`, like all that follow.
        attention: The implementation that transformers runs.
        lora: An adapter.
        gradient_checkpointing: Whether layers recompute their activations.
        vision: Which parts are trained.
        replace: Called with the model before it gets an adapter.
    """
    config = copy.deepcopy(config)
    states = (vision or Vision()).states(lora is not None)
    lm = _without_weights(config, dtype, attention)
    with torch.device("meta"):
        if replace is not None:
            replace(lm)
        policy = lm if lora is None else _add_lora(lm, lora, "", states)
    return _made_ready(policy, lm, states, gradient_checkpointing)


def max_context(lm: PreTrainedModel | PeftModel) -> int | None:
    """The most tokens the model's positions reach; None where its configuration sets no limit."""
    # not every architecture has the attribute (ALiBi, state-space models), hence the default
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer that the model of `config` cannot chat with.

    Raises:
        UserError: More tokens than the model has embeddings, no chat template, or no end token.
    """
    name, rows = tokenizer.name_or_path, config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer {name} has {len(tokenizer)} tokens, the model only {rows} embeddings: they do not belong "
            "together. Use the tokenizer that the model was saved with."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer {name} has no eos token, so no answer could end. Set `eos_token` in its files.")
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer {name} has no chat template, which says how turns are written. Take the model's instruct "
            "variant, or put a chat_template.jinja into its folder."
        )


def _made_ready(
    policy: Policy, lm: PreTrainedModel, states: dict[Part, State], gradient_checkpointing: bool
) -> PreTrainedModel | PeftModel:
    """The policy with its parts frozen or trained, without dropout, in `eval()`."""
    freeze(lm, states)
    if gradient_checkpointing:
        recompute_activations(lm)
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # an adapter from elsewhere may bring one
    return policy.eval()


def _load_weights(
    pretrained: str, source: Source, config: PreTrainedConfig, dtype: DType, attention: Attention, quantize: Quantize
) -> PreTrainedModel:
    _remove_dropout(config)
    loader: Any = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
    options = {} if quantize == "none" else {"quantization_config": quantization_config(config, dtype, loader)}
    try:
        lm: PreTrainedModel = loader.from_pretrained(
            source.weights,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,  # a pickle runs code when it is read
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"pretrained={pretrained!r} cannot be loaded with attention={attention!r}. {error}") from error
    return lm


def _without_weights(config: PreTrainedConfig, dtype: DType, attention: Attention) -> PreTrainedModel:
    _remove_dropout(config)
    loader: Any = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM
    with torch.device("meta"):
        lm: PreTrainedModel = loader.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=False
        )
    return lm


def _with_adapter(lm: PreTrainedModel, adapter: Path, empty: bool) -> PeftModel:
    """The model under the adapter of a folder."""
    if empty:
        options = LoraConfig.from_pretrained(str(adapter))
        options.inference_mode = False  # saved adapters say so of themselves
        policy = get_peft_model(lm, options)
        assert isinstance(policy, PeftModel)
        return policy
    policy = PeftModel.from_pretrained(lm, str(adapter), is_trainable=True)
    loaded = policy.peft_config["default"]
    assert isinstance(loaded, LoraConfig), "resolve() refuses other adapters"
    _refuse_tied_targets(lm, loaded.target_modules or [])
    load_trained_parts(lm, adapter)
    return policy


def _remove_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout of the configuration to 0: `eval()` does so too, until someone calls `train()`."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def _add_lora(lm: PreTrainedModel, lora: Lora, pretrained: str, states: dict[Part, State]) -> PeftModel:
    _refuse_tied_targets(lm, lora.targets)
    targets, excluded = adapter_targets(lm, lora.targets, states)
    options = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        exclude_modules=excluded,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            policy = get_peft_model(lm, options)  # casts a half-precision model's adapter to float32
    except ValueError as error:  # no layer has such a name
        linear = {name.rpartition(".")[2] for name, part in lm.named_modules() if isinstance(part, torch.nn.Linear)}
        raise UserError(
            f"lora: targets={lora.targets} match nothing; the linear layers are {sorted(linear)}."
        ) from error
    policy.peft_config[
        "default"
    ].base_model_name_or_path = pretrained  # as given: a cache path holds on one machine only
    assert isinstance(policy, PeftModel)
    return policy


def _refuse_tied_targets(lm: PreTrainedModel, targets: str | Collection[str]) -> None:
    """An adapter on one of two layers that share a weight could not be merged: the other would change with it."""
    shared: tuple[Any, Any] = (lm.get_input_embeddings(), lm.get_output_embeddings())  # type: ignore[no-untyped-call]
    if isinstance(targets, str) or shared[1] is None or shared[0].weight is not shared[1].weight:
        return
    names = {name.rpartition(".")[2] for name, part in lm.named_modules() if any(part is layer for layer in shared)}
    if found := names.intersection(targets):
        raise UserError(
            f"lora: targets={sorted(found)} share one weight in this model (tied embeddings). Leave them out."
        )
