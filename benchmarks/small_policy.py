"""A policy of a million weights for TextWorld games, from nothing: for learning curves of many seeds on a CPU.

Its tokens are words, so that copying a thing's name out of an observation, which a policy has to do here, takes one
token. It knows no language: a supervised warm-up on games' own solutions teaches it all it knows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_agentrl.types import WalkthroughSuite

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(folder: Path, suite: WalkthroughSuite, num_games: int = 500, hidden: int = 128, layers: int = 4) -> Path:
    """A Hugging Face folder: random weights, and every word of the solutions of some training games."""
    texts = [
        text
        for task in islice(suite.tasks("train"), num_games)
        for observation, answer in suite.walkthrough(task)
        for text in (observation.text, observation.system, answer)
    ]
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)} | {"system", "user", "assistant"}
    return save(folder, words, hidden=hidden, layers=layers)


def save(folder: Path, words: Collection[str], tags: Sequence[str] = (), hidden: int = 128, layers: int = 4) -> Path:
    """A Hugging Face folder: random weights over `words`, and `tags` that are one token each and shown as they are."""
    ordered = sorted(words)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *ordered])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=CHATML,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
