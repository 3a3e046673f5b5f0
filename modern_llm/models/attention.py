"""Attention over packed rows, for unchanged `transformers` models.

Registered with `AttentionInterface`, so every model that dispatches its attention through it uses this function; the mask
function builds no mask, because what may see what is in the layout, and hands on only a layer's sliding window. The layout's
tensors reach it as an extra keyword argument of the model call (`packed`), which transformers 5.x passes down to the attention
unchanged.

Segments of like size are laid side by side in small right-padded grids (`models/grids.py`), and each grid is one batched
product. Only attention pays for that padding: every other layer runs on the packed row. On CUDA in bf16 the kernel for
sequences of different lengths needs no grid (`models/varlen.py`).

Shapes: T tokens of the row, H query heads, K key heads, D channels of a head; in a grid n lines, Q queries, W keys of a line.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from modern_llm.layout import PackedRow
from modern_llm.models.grid_kernel import grid_attention
from modern_llm.models.grids import Grids, lay_grids
from modern_llm.models.varlen import Lengths, lay_lengths, varlen_attention, varlen_takes

Kernel = Literal["auto", "sdpa", "eager"]

# transformers 5.23 treats a name that contains "sdpa" or "flash" as one of its own kernels, with their restrictions
IMPLEMENTATIONS: dict[Kernel, str] = {"auto": "packed_auto", "sdpa": "packed_fused", "eager": "packed_plain"}


def attention_layout(row: PackedRow, dtype: torch.dtype, kernel: Kernel) -> Grids | Lengths:
    """What the attention needs to know of a row, as tensors on the row's device; the same for every layer.

    Args:
        row: on its device.
        dtype: type of the products.
        kernel: the implementation that the model was given.
    """
    if row.ids.device.type == "cuda" and dtype == torch.bfloat16 and kernel == "auto":
        return lay_lengths(row)
    return lay_grids(row)


WITHOUT_EFFECT = ("position_ids", "cache_position", "use_cache", "output_attentions", "output_router_logits", "is_causal")
"""Arguments of attention that change nothing in a packed row. Whatever else a model passes (relative positions, blocks of a
sparse attention) would be lost, so such a model runs padded."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: int | None,
    packed: Grids | Lengths,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment.

    Args:
        module: the attention layer of the model.
        query: (1, H, T, D).
        key: (1, K, T, D).
        value: (1, K, T, D).
        attention_mask: the layer's sliding window, where it has one, from the registered mask function.
        packed: the layout of the row.
        scaling: what scores are multiplied by. None: 1/√D.
        dropout: probability of dropping an attention weight.
        sliding_window: positions that a token sees, itself included. None: all before it.
        softcap: scores become softcap · tanh(score / softcap), as in Gemma-2.
        s_aux: (H,) attention sinks: one more logit in each head's softmax, with no value behind it (gpt_oss).

    Returns:
        (1, T, H, D), and None for the weights.
    """
    assert query.shape[0] == 1, "packed attention takes one row"
    if more := sorted(name for name, value in kwargs.items() if value is not None and name not in WITHOUT_EFFECT):
        raise NotImplementedError(f"its attention depends on {', '.join(more)}, which packed rows do not know")
    window = sliding_window if attention_mask is None else attention_mask
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    implementation: str = module.config._attn_implementation  # type: ignore[union-attr, assignment]
    beyond_fused = softcap is not None or s_aux is not None
    if beyond_fused and implementation == IMPLEMENTATIONS["sdpa"]:
        raise NotImplementedError("attention='sdpa' knows neither attention sinks nor soft caps: use 'auto' or 'eager'")
    # under autocast QK-norm leaves queries and keys in fp32, and some families their values too (transformers 5.23)
    kind = value.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, H or K, D)
    if isinstance(packed, Lengths) and not beyond_fused and dropout == 0 and varlen_takes(key, value):
        return varlen_attention(query, key, value, packed, scaling, window)[None], None
    if isinstance(packed, Lengths):
        packed = packed.grids
    plain = not beyond_fused and dropout == 0 and query.device.type == "cpu" and not packed.is_long
    if plain and implementation == IMPLEMENTATIONS["auto"]:
        return grid_attention(query, key, value, packed, scaling, window)[None], None
    fused = not beyond_fused and implementation != IMPLEMENTATIONS["eager"]
    out = []
    for grid in packed.each():
        causal = fused and window is None and not grid.is_branch
        mask = None if causal else grid.visible(window)[:, None]  # (n, 1, Q, W)
        q, k, v = query[grid.queries].transpose(1, 2), key[grid.keys].transpose(1, 2), value[grid.keys].transpose(1, 2)
        if fused:
            attended = _fused_attention(q, k, v, mask, scaling, dropout)
        else:
            assert mask is not None
            attended = _explicit_attention(q, k, v, mask, scaling, dropout, softcap, s_aux)
        out.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[packed.outputs][None], None


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """torch's kernels, causal where there is no mask; (n, H, Q, D)."""
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cuda" and groups > 1 and (mask is not None or query.dtype == torch.float32):
        # the flash kernel takes neither, and the memory-efficient one no groups (torch 2.11 to 2.13): plain products are left,
        # which hold all (Q, W) weights
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    is_grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
    )


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Plain matrix products with the softmax in fp32, for what no kernel can do; (n, H, Q, D)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sink = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return F.dropout(weights, p=dropout, training=dropout > 0).to(value.dtype) @ value


def _window_of_mask(*args: Any, config: Any, local_size: int | None = None, **kwargs: Any) -> int | None:
    """The layout says what may see what, so no mask is built: only its sliding window is handed on.

    Most families' layers pass their window too, but some (PhiMoE) have it in the mask alone.

    Raises:
        NotImplementedError: the mask is local in another way (chunks).
    """
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise NotImplementedError("its attention sees chunks")
    return local_size


for _name in IMPLEMENTATIONS.values():
    AttentionInterface.register(_name, packed_attention)
    AttentionMaskInterface.register(_name, _window_of_mask)
