"""The models of `scaling_model.py`: published configurations, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_batches import Work


@dataclass(frozen=True)
class Shape:
    """A dense decoder, with the names of transformers' configurations."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    is_tied: bool
    head_dim: int = 128
    has_bias: bool = False
    """Of queries, keys and values (Qwen2.5); without it queries and keys have a norm (Qwen3)."""

    @property
    def num_weights(self) -> int:
        """All of them, an embedding that is the head too once."""
        layer = self._layer_matrices + 2 * self.hidden_size
        widths = self._query_width + 2 * self._key_width
        layer += widths if self.has_bias else 2 * self.head_dim
        tables = (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size
        return self.num_hidden_layers * layer + tables + self.hidden_size

    @property
    def kv_bytes(self) -> int:
        """Keys and values of a token in bfloat16."""
        return 2 * 2 * self.num_hidden_layers * self._key_width

    @property
    def width(self) -> int:
        """Numbers that a layer writes for a token: norms and residuals, projections, the MLP."""
        return 4 * self.hidden_size + 2 * (self._query_width + 2 * self._key_width) + 3 * self.intermediate_size

    def forward_flops(self, work: Work) -> tuple[float, float]:
        """Of matrices, and of scores: the two parts of `Work.flops`."""
        whole = work.flops(self)  # type: ignore[arg-type]  # it reads the attributes that are here
        scores = 4.0 * self.num_hidden_layers * self._query_width * work.pairs
        return whole - scores, scores

    @property
    def _query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def _key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def _layer_matrices(self) -> int:
        return self.hidden_size * (2 * self._query_width + 2 * self._key_width + 3 * self.intermediate_size)


MEASURED = Shape("Qwen3-0.6B", 1024, 3072, 28, 16, 8, 151_936, True)
SHAPES = (
    Shape("Qwen2.5-7B", 3584, 18_944, 28, 28, 4, 152_064, False, has_bias=True),
    Shape("Qwen3-8B", 4096, 12_288, 36, 32, 8, 151_936, False),
    Shape("Qwen2.5-32B", 5120, 27_648, 64, 40, 8, 152_064, False, has_bias=True),
    Shape("Qwen3-32B", 5120, 25_600, 64, 64, 8, 151_936, False),
)
