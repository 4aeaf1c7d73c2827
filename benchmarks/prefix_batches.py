"""The batches of the shared-prefix benchmarks, made of random tokens, and the work each way of computing them needs.

Legend: B rows, L row length. A batch is *quick* when every length in it is a 16th, for a test of the scripts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lit_agentrl.models import PackedTree


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, and what a PPO-clip loss wants to know of them."""

    token_ids: Tensor
    """[B, L]."""
    lengths: Tensor
    """[B]."""
    targets: Tensor
    """[B, L] bool: the tokens that have a loss."""
    advantages: Tensor
    """[B], one a row."""
    drift: Tensor
    """[B, L]: the log-probability under the policy that sampled, less the one now."""
    rows: Tensor
    """[B]: where these rows stand in the whole batch."""

    @classmethod
    def of(cls, rows: list[Tensor], spans: list[list[tuple[int, int]]]) -> Batch:
        """A batch of these rows, whose targets are the spans [first, last) of each."""
        generator = torch.Generator().manual_seed(1)
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        targets = torch.zeros_like(token_ids, dtype=torch.bool)
        for row, of_row in enumerate(spans):
            for first, last in of_row:
                targets[row, first:last] = True
        return cls(
            token_ids=token_ids,
            lengths=torch.tensor([len(row) for row in rows]),
            targets=targets,
            advantages=torch.randn(len(rows), generator=generator),
            drift=0.1 * torch.randn(token_ids.shape, generator=generator),  # a few per cent of the ratios are clipped
            rows=torch.arange(len(rows)),
        )

    def __len__(self) -> int:
        """B."""
        return len(self.lengths)

    def select(self, rows: list[int]) -> Batch:
        """Some of the rows, as long as the longest of them."""
        longest = int(self.lengths[rows].max())
        return Batch(
            token_ids=self.token_ids[rows, :longest],
            lengths=self.lengths[rows],
            targets=self.targets[rows, :longest],
            advantages=self.advantages[rows],
            drift=self.drift[rows, :longest],
            rows=self.rows[rows],
        )

    def micro_batches(self, size: int) -> list[Batch]:
        """`size` rows at a time; rows of like lengths together, so that little is padded."""
        by_length = torch.argsort(self.lengths, descending=True, stable=True).tolist()
        return [self.select(by_length[first : first + size]) for first in range(0, len(self), size)]

    def to(self, device: torch.device | str) -> Batch:
        """The same on `device`."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})

    @property
    def prefix_length(self) -> int:
        """Tokens that all rows begin with: what sharing of depth 1 shares."""
        shortest = int(self.lengths.min())
        same = (self.token_ids[:, :shortest] == self.token_ids[:1, :shortest]).all(0)
        return shortest if bool(same.all()) else int((~same).nonzero()[0])


def group(size: int, prompt: int, answer: int, vocab: int, ragged: bool = False) -> Batch:
    """One prompt with `size` answers; ragged ones are a quarter to the whole of `answer` tokens long."""
    generator = torch.Generator().manual_seed(0)
    shared = _tokens(prompt, vocab, generator)
    lengths = [answer] * size
    if ragged:
        lengths[1:] = torch.randint(answer // 4, answer + 1, (size - 1,), generator=generator).tolist()
    rows = [torch.cat([shared, _tokens(length, vocab, generator)]) for length in lengths]
    return Batch.of(rows, [[(prompt, len(row))] for row in rows])


def tree(levels: int, branches: int, root: int, segment: int, vocab: int) -> Batch:
    """A root and `levels` levels of branches of `segment` tokens; every leaf is a row, all but the root is trained."""
    generator = torch.Generator().manual_seed(0)
    rows = [_tokens(root, vocab, generator)]
    for _ in range(levels):
        rows = [torch.cat([row, _tokens(segment, vocab, generator)]) for row in rows for _ in range(branches)]
    return Batch.of(rows, [[(root, len(row))] for row in rows])


def turns(trajectories: int, turns: int, prompt: int, action: int, observation: int, vocab: int) -> Batch:
    """Trajectories of one prompt whose every turn is a row: all that came before, and the action, which is trained."""
    generator = torch.Generator().manual_seed(0)
    shared = _tokens(prompt, vocab, generator)
    rows, spans = [], []
    for _ in range(trajectories):
        context = shared
        for _ in range(turns):
            row = torch.cat([context, _tokens(action, vocab, generator)])
            rows.append(row)
            spans.append([(len(context), len(row))])
            context = torch.cat([row, _tokens(observation, vocab, generator)])
    return Batch.of(rows, spans)


def prompt_for(reuse: float, size: int, length: int) -> int:
    """The prompt of a group of `size` rows of `length` tokens that gives `reuse` row tokens per unique token."""
    return round(size * length * (1 - 1 / reuse) / (size - 1))


def _tokens(number: int, vocab: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, vocab, (number,), generator=generator)


CASES: dict[str, tuple[str, Callable[[int, int], Batch]]] = {
    "A": ("group 8 x (2048 + 128)", lambda n, vocab: group(8, 2048 // n, 128 // n, vocab)),
    "B": ("group 16 x (1024 + 64)", lambda n, vocab: group(16, 1024 // n, 64 // n, vocab)),
    "C": ("binary tree, root 512, 4 levels of 128", lambda n, vocab: tree(4, 2, 512 // n, 128 // n, vocab)),
    "D": (
        "4 trajectories x 6 turns, prompt 512, action 64, observation 128",
        lambda n, vocab: turns(4, 6, 512 // n, 64 // n, 128 // n, vocab),
    ),
    "E": ("group 8 x (128 + 512), little shared", lambda n, vocab: group(8, 128 // n, 512 // n, vocab)),
    "F": ("group 8 x (1024 + 1024)", lambda n, vocab: group(8, 1024 // n, 1024 // n, vocab)),
    "G": ("A with ragged answers", lambda n, vocab: group(8, 2048 // n, 128 // n, vocab, ragged=True)),
    "H": (
        "group 8 x 640, reuse 1.05",
        lambda n, vocab: group(8, p := prompt_for(1.05, 8, 640 // n), 640 // n - p, vocab),
    ),
}
"""What each is, and how to make it: (divisor of the lengths, vocabulary) -> batch."""

BUILDS: dict[str, Callable[[int], Batch]] = {
    "group 8 x (2048 + 128)": lambda vocab: group(8, 2048, 128, vocab),
    "4 trajectories x 6 turns": lambda vocab: turns(4, 6, 512, 64, 128, vocab),
    "16 trajectories x 12 turns, prompt 2048, action 128, observation 512": lambda vocab: turns(
        16, 12, 2048, 128, 512, vocab
    ),
    "group 64 x (4096 + 4096)": lambda vocab: group(64, 4096, 4096, vocab),
}
"""The batches whose packing is timed on its own."""


@dataclass(frozen=True)
class Work:
    """What a forward computes; a backward is in proportion."""

    tokens: int
    """That go through the layers."""
    pairs: int
    """Of a query and a key it sees."""
    targets: int
    """That go through the head."""

    def flops(self, config: PreTrainedConfig) -> float:
        """Floating-point operations: 2 a weight and token, 4 a pair, head and value of it (scores, then the sum)."""
        hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        layer = hidden * (2 * width + 2 * keys) + 3 * hidden * config.intermediate_size
        return (
            config.num_hidden_layers * (2.0 * layer * self.tokens + 4.0 * width * self.pairs)
            + 2.0 * hidden * config.vocab_size * self.targets
        )


def padded_work(batch: Batch, size: int) -> Work:
    """The padded forward, `size` rows at a time."""
    rows, longest = zip(*((len(part), part.token_ids.shape[1]) for part in batch.micro_batches(size)), strict=True)
    tokens = sum(b * length for b, length in zip(rows, longest, strict=True))
    pairs = sum(b * length * (length + 1) // 2 for b, length in zip(rows, longest, strict=True))
    return Work(tokens, pairs, int(batch.targets.sum()))


def unshared_work(batch: Batch) -> Work:
    """Every row on its own, without padding."""
    return Work(int(batch.lengths.sum()), _pairs(batch.lengths), int(batch.targets.sum()))


def tree_work(batch: Batch) -> Work:
    """Every unique token once."""
    packed = PackedTree.build(batch.token_ids, batch.lengths)
    edges, _ = packed.unique_targets(batch.targets)
    return Work(len(packed), int((packed.positions + 1).sum()), len(edges))


def _pairs(lengths: Tensor) -> int:
    return int((lengths * (lengths + 1) // 2).sum())
