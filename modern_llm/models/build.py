"""Models with random weights from a `ModelConfig`, and rows for new tokens."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from modern_llm.config import ModelConfig, UserError
from modern_llm.models.policy import vocabulary_rows


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A model with random fp32 weights, the same for the same seed; the global random state is left as it was.

    Raises:
        UserError: the tokenizer has more tokens than `vocab_size` has rows.
    """
    if config.vocab_size is not None and config.vocab_size < len(tokenizer):
        raise UserError(f"vocab_size={config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens: leave it out")
    ffn = config.ffn_hidden_size or -(-config.d_model * 8 // 3 // 64) * 64
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size or len(tokenizer),
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.d_model // config.n_heads,
        "intermediate_size": ffn,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if config.architecture == "qwen3_moe":
        common |= {
            "num_experts": config.n_experts,
            "num_experts_per_tok": config.n_experts_per_token,
            "moe_intermediate_size": ffn,
            "norm_topk_prob": True,
        }
    if config.architecture == "gpt_oss":
        common |= {
            "num_local_experts": config.n_experts,
            "num_experts_per_tok": config.n_experts_per_token,
            "sliding_window": config.sliding_window or 128,
        }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.architecture, **common), dtype=torch.float32)


def grow_vocabulary(model: PreTrainedModel, num_tokens: int) -> int:
    """Give the model rows for tokens that it lacks, each the mean of the rows it has; a padded vocabulary is left alone.

    Returns how many it lacked.
    """
    old = vocabulary_rows(model)
    if num_tokens <= old:
        return 0
    with torch.random.fork_rng():  # transformers 5.x draws random rows first
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in table.parameters():  # type: ignore[union-attr]
                rows[old:] = rows[:old].mean(0)
    return num_tokens - old
