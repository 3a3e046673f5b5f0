"""The shape of a model built from random weights."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from modern_llm.config.base import StrictModel


class ModelConfig(StrictModel):
    """Shape of a decoder-only transformer. It becomes a `transformers` config; no model code of our own exists."""

    architecture: Literal["qwen3", "llama", "qwen3_moe", "gpt_oss"] = "qwen3"
    """Model family. `qwen3`: RMSNorm, RoPE, SwiGLU, grouped queries, QK-norm. `llama`: the same without QK-norm.
    `qwen3_moe`: experts in place of the feed-forward layer. `gpt_oss`: experts, attention sinks, every second layer
    with a sliding window."""
    d_model: PositiveInt = 512
    """Width of the residual stream."""
    n_layers: PositiveInt = 8
    """Number of decoder layers."""
    n_heads: PositiveInt = 8
    """Number of query heads; must divide `d_model`."""
    n_kv_heads: PositiveInt | None = None
    """Number of key and value heads; must divide `n_heads`. None: as many as query heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the gated feed-forward layer (of one expert, where there are experts). None: 8/3 of `d_model`, rounded up
    to a multiple of 64."""
    max_seq_len: PositiveInt = 1024
    """Longest sequence the model is made for, in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position embedding."""
    tie_embeddings: bool = True
    """Use the input embedding as output projection too. `gpt_oss` models may be tied as well."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding. None: the size of the tokenizer. Where the run trains its own tokenizer, the size to train."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping an attention weight in training."""
    n_experts: PositiveInt = 4
    """Number of experts of a layer; mixture-of-experts architectures only."""
    n_experts_per_token: PositiveInt = 2
    """Experts that each token is sent to; mixture-of-experts architectures only."""
    sliding_window: PositiveInt | None = None
    """Positions that a sliding-window layer sees, itself included; `gpt_oss` only. None: 128, as in the released models."""

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
        if (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"d_model/n_heads={self.d_model // self.n_heads} must be even: rotary embeddings turn pairs of channels"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        experts = {"n_experts", "n_experts_per_token"} & self.model_fields_set
        if experts and self.architecture not in ("qwen3_moe", "gpt_oss"):
            raise ValueError(f"{sorted(experts)[0]} has no meaning for architecture='{self.architecture}': leave it out")
        if self.sliding_window is not None and self.architecture != "gpt_oss":
            raise ValueError(f"sliding_window has no meaning for architecture='{self.architecture}': leave it out")
        if self.n_experts_per_token > self.n_experts:
            raise ValueError(f"n_experts_per_token={self.n_experts_per_token} exceeds n_experts={self.n_experts}")
        return self
