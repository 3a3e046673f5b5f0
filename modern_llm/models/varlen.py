"""Attention over packed rows on CUDA in bf16: torch's flash kernel for sequences of different lengths, without any padding."""

import inspect
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modern_llm.layout import PackedRow, sent
from modern_llm.models.grids import Grids, lay_grids


class Lengths(NamedTuple):
    """A row's segments as lengths. The queries are the row itself."""

    query_ends: Tensor
    """(segments + 1,) int32: 0, then where each segment's own tokens end in the row."""
    key_ends: Tensor
    """(segments + 1,) int32: the same among the keys."""
    keys: Tensor
    """(keys,) int64: which token of the row each key is; a shared prompt is there once for every segment that sees it."""
    longest: Tensor
    """(2,) int64 on the host: tokens of the longest segment, without and with what it shares."""
    grids: Grids
    """The same row for layers that this kernel cannot do (soft caps, sinks, dropout)."""


def lay_lengths(row: PackedRow) -> Lengths:
    """The lengths of a row's segments, on its device."""
    start, own, trunk, shared = row.spans.numpy().T
    seen = own + shared
    key_ends = np.concatenate([[0], np.cumsum(seen)])
    owner = np.repeat(np.arange(len(seen)), seen)
    position = np.arange(key_ends[-1]) - key_ends[owner]
    in_prompt = position < shared[owner]
    keys = np.where(in_prompt, trunk[owner] + position, start[owner] + position - shared[owner])
    query_ends = np.concatenate([[0], np.cumsum(own)])
    device = row.ids.device
    return Lengths(
        query_ends=sent(torch.from_numpy(query_ends).int(), device),
        key_ends=sent(torch.from_numpy(key_ends).int(), device),
        keys=sent(torch.from_numpy(keys), device),
        longest=torch.tensor([own.max(), seen.max()]),
        grids=lay_grids(row),
    )


def varlen_takes(key: Tensor, value: Tensor) -> bool:
    """Whether the kernel knows these head sizes: keys' and values' the same, a multiple of 8, at most 256 (torch 2.11–2.13)."""
    return key.shape[2] == value.shape[2] and key.shape[2] % 8 == 0 and key.shape[2] <= 256


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: float, window: int | None) -> Tensor:
    """Causal attention inside each segment, (T, H, D); arguments as in `grid_attention`, in bf16 on a CUDA device.

    Query i of a segment stands behind its shared tokens: the kernel's causal mask is aligned at the end (bottom right), which
    is just that.
    """
    if len(lengths.keys) != len(key):  # with nothing shared, the keys are the row itself
        key, value = key.index_select(0, lengths.keys), value.index_select(0, lengths.keys)
    return _varlen(query, key, value, lengths, scaling, window)  # type: ignore[call-arg] - the decorator's type


@torch.compiler.disable
def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scaling: float, window: int | None) -> Tensor:
    """The kernel takes the longest lengths as numbers; behind this call `torch.compile` does not see them change."""
    from torch.nn.attention.varlen import varlen_attn  # asks for CUDA pieces that a CPU build may lack

    takes = inspect.signature(varlen_attn).parameters  # torch 2.10 had `is_causal`; 2.11 has windows; 2.12 added GQA
    options: dict[str, Any] = {"scale": scaling}
    if "window_size" in takes:
        # (left, right): tokens seen besides the query itself
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise NotImplementedError(
            f"this torch ({torch.__version__}) has no sliding window in varlen_attn: use attention='sdpa'"
        )
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    longest_query, longest_key = lengths.longest.tolist()
    out = varlen_attn(query, key, value, lengths.query_ends, lengths.key_ends, longest_query, longest_key, **options)
    assert isinstance(out, Tensor)
    return out
