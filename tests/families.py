"""Tiny random models of many hub families."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCAB = 300
WINDOW = 16
"""Longer than the sequences on which a policy checks itself, shorter than those of the tests."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2}
SLIDING = {"head_dim": 8, "sliding_window": WINDOW}
GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def gpt2(rate: float = 0.0) -> GPT2Config:
    return GPT2Config(**GPT, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate)


def families(rate: float = 0.0) -> dict[str, PreTrainedConfig]:
    """Fresh configs (a model changes its own), with this probability wherever the family drops something out."""
    return {
        "llama": LlamaConfig(**GROUPED, attention_dropout=rate),
        "qwen3": Qwen3Config(**GROUPED, head_dim=8, attention_dropout=rate),
        "gpt2": gpt2(rate),
        "gpt_neox": GPTNeoXConfig(**SHAPE, attention_dropout=rate, hidden_dropout=rate),
        "gptj": GPTJConfig(
            **GPT, rotary_dim=4, attn_pdrop=rate, resid_pdrop=rate, embd_pdrop=rate, bos_token_id=0, eos_token_id=0
        ),
        "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW, attention_dropout=rate),
        "gemma2": Gemma2Config(
            **GROUPED, **SLIDING, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            attention_dropout=rate,
        ),
        "gemma3": Gemma3TextConfig(
            **GROUPED, **SLIDING, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"],
            attention_dropout=rate,
        ),
        "phi": PhiConfig(**GROUPED, partial_rotary_factor=0.5, attention_dropout=rate, resid_pdrop=rate, embd_pdrop=rate),
        "phi3": Phi3Config(**GROUPED, attention_dropout=rate, resid_pdrop=rate, embd_pdrop=rate),
        "phimoe": PhimoeConfig(**GROUPED, num_local_experts=4, sliding_window=WINDOW),
        "olmo2": Olmo2Config(**GROUPED, attention_dropout=rate),
        "granite": GraniteConfig(**GROUPED, logits_scaling=4.0, attention_dropout=rate),
        "cohere": CohereConfig(**GROUPED, logit_scale=0.25, attention_dropout=rate),
        "gpt_oss": GptOssConfig(
            **GROUPED, **SLIDING, num_local_experts=2, num_experts_per_tok=1, attention_dropout=rate
        ),
        "opt": OPTConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
            max_position_embeddings=64, dropout=rate, attention_dropout=rate, layerdrop=rate,
        ),
    }  # fmt: skip


OWN_HEAD = {"gemma2", "granite", "cohere"}
"""Families whose logits are more than a product: a soft cap, a scale."""
PADDED = {"gptj"}
"""Families whose attention is not reached from outside, so that they run on padded lines."""
WINDOWED = ("mistral", "gemma2", "gemma3", "phimoe", "gpt_oss")
"""Families with a sliding window in at least one layer."""


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
