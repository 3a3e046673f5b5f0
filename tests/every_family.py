"""Tiny random models of every family of transformers' causal language models.

A config is made from its class's defaults: sizes become small by the names of their fields, and each kind of layer that the
default has stays once. `CORRECTIONS` holds what a family needs beyond that, `NOT_BUILT` the families without a model and why.
"""

import dataclasses
from collections.abc import Set
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 300
WIDTH = 32
HEADS = 4
HEAD_DIM = 8
WINDOW = 16
POSITIONS = 128

ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Families that see later tokens unless their config says `is_decoder`."""
AS_DECODER = "+decoder"

FAMILIES: tuple[str, ...] = (
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    *(family + AS_DECODER for family in ENCODERS),
)
"""Model types of the mapping, and the encoders once more as decoders."""

_SIZES: dict[int, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab",
    WIDTH: """hidden_size d_model n_embd emb_dim embed_dim embedding_size input_embedding_size output_embedding_size
        lru_width word_embed_proj_dim hidden_size_global text_hidden_size out_hidden_size projection_dim hidden_dim output_dim
        embedding_dim router_hidden_size backbone_hidden_size pronunciation_embed_dim shape_embed_dim""",
    64: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner dim_ff dff ffn_hidden_size feed_forward_size
        mlp_dim intermediate_size_mlp dense_intermediate_size shared_intermediate_size mamba_d_ssm block_multiple_of""",
    16: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size prefix_dense_intermediate_size q_lora_rank kv_lora_rank o_lora_rank
        sliding_window sliding_window_size window_size local_attention attention_chunk_size attention_window_size
        local_attention_window_len chunk_size mamba_chunk_size block_size rel_extent patch_size hc_lowrank index_n_heads
        n_mel_bins num_mel_bins gated_norm_rank laurel_rank adapter_rank hidden_size_per_layer_input floor_scale
        local_attn_chunk_length lsh_attn_chunk_length position_bias_num_buckets num_buckets""",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers
        depth num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_k moe_topk top_k_experts
        n_groups num_codebooks linear_num_key_heads n_group num_expert_group o_groups heads_per_ngram split_ngram_parts
        index_topk_blocks""",
    HEADS: """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads
        linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num d_rel""",
    HEAD_DIM: """head_dim swa_head_dim kv_channels dim_head attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim
        index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim state_size mamba_d_state ssm_state_size
        mamba_n_heads mamba_num_heads mamba_head_dim index_topk rotary_dim index_block_size prompt_types segment_types
        query_pre_attn_scalar prompt_length""",
    POSITIONS: """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length model_max_length
        original_max_position_embeddings keep_window_size""",
    1: "first_k_dense_replace num_dense_layers topk_group attn_layer_offset num_nextn_predict_layers",
}  # fmt: skip
SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
"""Size of each field that is called so, wherever a config has it and its default is not None. `keep_window_size` and
`index_n_heads` are large for a tiny model: equal scores tie in a choice of keys, and torch breaks ties by the row's length."""

UNSET = {"head_dim": HEAD_DIM, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
"""Size of fields that some classes leave at None, although their models need one."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
}  # fmt: skip
SHARED_KEYS = {"layer_types": SLIDING_AND_FULL * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
"""Layers that take keys and values from one before them."""
SMALL_MLA = {
    "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
CORRECTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    **{part: {"vocab_size": VOCAB} for part in ("blt", "blt_local_encoder", "blt_local_decoder", "blt_patcher")},
    "cohere_compass_text": {
        "layer_types": SLIDING_AND_FULL,
        "rope_parameters": {"full_attention": None, "sliding_attention": ROPE | {"mrope_section": [2, 1, 1]}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 64, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_text": {"head_dim": 16, **SMALL_MLA},
    "dots3_note_vision_encoder": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    "gemma3n_text": SHARED_KEYS | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "intermediate_size": 64},
    "gemma4_text": SHARED_KEYS | {"global_head_dim": 16},
    "gemma4_unified_text": SHARED_KEYS | {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "intermediate_size": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"rope_parameters": ROPE},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "rope_parameters": ROPE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "laguna": {"layer_types": SLIDING_AND_FULL, "num_attention_heads_per_layer": [4, 2]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": SLIDING_AND_FULL},
    "minicpm3": {"dim_model_base": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"],
    },
    "qwen4_exp_text": INDEXER | {"ple_layer_ids": [1], "eos_token_id": 0, "ngram_vocab_size_base": 300},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16],
    },
    "rwkv": {"rescale_every": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": WINDOW},
}  # fmt: skip
"""{model type: fields} that the rule above gets wrong, also of the configs inside others."""

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision part needs the package timm; its text part is gemma3n_text",
    "gemma4_assistant": "a drafter, which runs on the hidden states and keys of another model",
    "gemma4_unified_assistant": "a drafter, which runs on the hidden states and keys of another model",
    "musicgen": "continues codes of sound: the mapping leads to a class that does not take the family's config",
    "musicgen_melody": "continues codes of sound: the mapping leads to a class that does not take the family's config",
}
"""{model type: reason}."""


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return a fresh config of a family (a model changes its own)."""
    model_type = family.removesuffix(AS_DECODER)
    changes = {"is_decoder": True, **changes} if family != model_type else changes
    cls = CONFIG_MAPPING[model_type]
    return cls(**_small(cls, cls(), changes))


def tiny_model(family: str, tied: bool | None = None) -> PreTrainedModel:
    """Return a random fp32 model of a family, always the same, in eval mode; no global random state moves.

    Args:
        family: one of `FAMILIES`.
        tied: whether the output projection is the embedding. None: as is usual in the family.
    """
    config = tiny_config(family)
    for part in (config, config.get_text_config()) if tied is not None else ():
        part.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        return _as_trained(model)


@torch.no_grad()
def _as_trained(model: PreTrainedModel) -> PreTrainedModel:
    """Give each weight values that differ: as they are drawn, some factors are zero, and what they multiply has no effect."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.min() < parameter.max():
            parameter.mul_(2.0)  # fresh weights make nearly uniform attention, in which a wrong mask hides
        else:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for table in model.modules():
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:  # a control token of the tests' tokenizer
            table.weight[table.padding_idx] = table.weight.std() * torch.randn(table.embedding_dim)
    return model


def _small(cls: type[PreTrainedConfig], default: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Fields of a small config of this class."""
    correction = {**CORRECTIONS.get(cls.model_type, {}), **changes}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = fields.keys()
    small: dict[str, Any] = {}
    for name in sorted(names):
        value = _value(default, name)
        if name in correction:
            continue
        if value is None and name in UNSET:
            small[name] = UNSET[name]
        elif isinstance(value, PreTrainedConfig):
            small[name] = type(value)(**_small(type(value), value, {}))
        elif isinstance(value, int) and not isinstance(value, bool) and name in SIZE_OF:
            small[name] = min(value, SIZE_OF[name])
        elif isinstance(value, float) and "drop" in name:
            small[name] = 0.0
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id") and isinstance(value, int | list):
            small[name] = value if isinstance(value, int) and 0 <= value < VOCAB else _no_token(fields[name])
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        small["num_key_value_heads"] = HEADS  # latent attention has as many keys as queries
    small |= _layers(names, default)
    return small | correction


def _value(default: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except AmbiguousGlobalPerLayerAttributeError:  # it varies by layer
        return vars(default).get(name)


def _no_token(field: dataclasses.Field[Any]) -> int | None:
    """A token id in place of one beyond the vocabulary."""
    return None if field.name == "pad_token_id" and "None" in str(field.type) else 1


def _layers(names: Set[str], default: PreTrainedConfig) -> dict[str, Any]:
    """Each kind of layer once, in the order of the default; two where they are alike."""
    fields = [name for name in ("layer_types", "layers_block_type", "mlp_layer_types") if name in names]
    fields = [name for name in fields if isinstance(getattr(default, name, None), list | tuple)]
    if not fields:
        return {}
    kinds = list(dict.fromkeys(zip(*(getattr(default, name) for name in fields), strict=False)))
    kinds = kinds if len(kinds) > 1 else kinds * 2
    count = {"num_hidden_layers": len(kinds)} if "num_hidden_layers" in names else {}
    return {name: [kind[at] for kind in kinds] for at, name in enumerate(fields)} | count
