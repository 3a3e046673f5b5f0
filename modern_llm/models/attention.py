"""Attention over packed rows, for unchanged `transformers` models.

Registered with `AttentionInterface`, so every model that dispatches its attention through it uses this function; the mask
function builds no mask, because what may see what is in the layout, and hands on only a layer's sliding window. The layout's
tensors reach it as extra keyword arguments of the model call (`packed_grid`, `packed_cells`), which transformers 5.x passes
down to the attention unchanged.

Every segment gets a line of its own in a right-padded grid. Under a causal mask a real token never sees the padding behind
it, so no mask is needed, and only attention pays for the padding: every other layer runs on the packed row.

Shapes: T tokens of the row, S segments, W longest segment, H query heads, K key heads, D channels of a head.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

Kernel = Literal["auto", "sdpa", "eager"]

# transformers 5.23 treats a name that contains "sdpa" or "flash" as one of its own kernels, with their restrictions
IMPLEMENTATIONS: dict[Kernel, str] = {"auto": "packed_auto", "sdpa": "packed_fused", "eager": "packed_plain"}

SHORT_ON_CPU = 160
"""On a CPU in bf16, segments up to this length are faster with plain products: the fused kernel's backward pass is slow there.
Measured on torch 2.13 with AVX512-BF16, forward + backward: 14 against 46 ms at (79, 4, 76, 48), 28 against 58 ms at (32, 8,
128, 64), but 32 against 29 ms at (16, 4, 256, 48) and 79 against 57 ms at (8, 4, 512, 64), shapes as (S, H, W, D)."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: int | None,
    packed_grid: Tensor,
    packed_cells: Tensor,
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
        packed_grid: (S, W) token of each cell.
        packed_cells: (T,) cell of each token.
        scaling: what scores are multiplied by. None: 1/√D.
        dropout: probability of dropping an attention weight.
        sliding_window: positions that a token sees, itself included. None: all before it.
        softcap: scores become softcap · tanh(score / softcap), as in Gemma-2.
        s_aux: (H,) attention sinks: one more logit in each head's softmax, with no value behind it (gpt_oss).

    Returns:
        (1, T, H, D), and None for the weights.
    """
    if attention_mask is not None:
        sliding_window = attention_mask
    assert query.shape[0] == 1, "packed attention takes one row"
    scaling = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    query, key, value = (x[0].transpose(0, 1)[packed_grid].transpose(1, 2) for x in (query, key, value))  # (S, H or K, W, D)
    width = packed_grid.shape[1]
    implementation: str = module.config._attn_implementation  # type: ignore[union-attr, assignment]
    window = sliding_window if sliding_window is not None and sliding_window < width else None
    beyond_fused = softcap is not None or s_aux is not None
    if beyond_fused and implementation == IMPLEMENTATIONS["sdpa"]:
        raise NotImplementedError("attention='sdpa' knows neither attention sinks nor soft caps: use 'auto' or 'eager'")
    if not beyond_fused and _use_fused(implementation, value, width):
        mask = None if window is None else _band(width, window, query.device)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    else:
        mask = _band(width, width if window is None else window, query.device)
        out = _explicit_attention(query, key, value, mask, scaling, dropout, softcap, s_aux)
    out = out.transpose(1, 2).flatten(0, 1)[packed_cells]  # (T, H, D)
    return out[None], None


def _use_fused(implementation: str, value: Tensor, width: int) -> bool:
    """Whether the fused kernel runs, where either could.

    The values' type tells the precision: under autocast QK-norm leaves queries and keys in fp32 (transformers 5.23), and the
    products cast them.
    """
    if implementation == IMPLEMENTATIONS["auto"]:
        return value.device.type != "cpu" or value.dtype != torch.bfloat16 or width > SHORT_ON_CPU
    return implementation == IMPLEMENTATIONS["sdpa"]


def _band(width: int, window: int, device: torch.device) -> Tensor:
    """(W, W) bool, True where a query position (line) sees a key position (column): 0 ≤ query − key < window."""
    position = torch.arange(width, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


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
    """Plain matrix products with the softmax in fp32, for what the fused kernel cannot do; (S, H, W, D)."""
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
