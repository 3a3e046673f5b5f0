"""The models that are trained, and what is prepared for one of them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model and the batches that it is trained on."""

    model: dict[str, Any]
    """Fields of `ModelConfig`."""
    max_length: int
    """Tokens of a sequence."""
    micro_batch: int
    """Sequences of a step."""
    words: int | None = None
    """Size of a tokenizer that is trained on the text. None: the one that is given."""


def model(d_model: int, n_layers: int, n_heads: int, ffn_hidden_size: int, max_seq_len: int, vocab_size: int) -> dict[str, Any]:
    """Fields of `ModelConfig` for a Qwen3 with tied embeddings."""
    return {"architecture": "qwen3", "tie_embeddings": True, **locals()}


SIZES = {
    "tiny": Size(model(32, 2, 2, 64, 1024, 2048), 64, 4),
    "tiny-8k": Size(model(32, 2, 2, 64, 1024, 600), 64, 4, 600),
    "30M": Size(model(384, 6, 6, 1024, 2048, 50_257), 512, 8),
    "30M-8k": Size(model(384, 6, 6, 1024, 2048, 8192), 512, 8, 8192),
    "124M": Size(model(768, 12, 12, 2048, 1024, 50_304), 1024, 32),
    "1.3B": Size(model(2048, 24, 16, 5632, 2048, 50_304), 2048, 4),
}


@dataclass(frozen=True)
class Plan:
    """What is prepared before anything is compared."""

    folder: str
    size: str
    micro_batch: int
    steps: int
    """Optimizer steps that there are rows for."""
    text: str | None
    """A file of plain text. None: the documents of the built-in world."""
    tokenizer: str | None
    """A folder or hub id. None: one is trained on the text."""
