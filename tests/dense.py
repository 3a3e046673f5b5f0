"""Attention by dense masks in float64: the definition, against which every fast path is held.

Shapes: T tokens of the row, H query heads, K key heads, D channels of a query, V channels of a value.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from tolerances import BF16_ROUNDING, FP32_ROUNDING, TIMES_OWN, TIMES_OWN_NORM
from torch import Tensor

from modern_llm.layout import PackedRow

ROWS: dict[str, list[tuple[int, int]]] = {  # (own tokens, shared tokens) of each segment
    "one document": [(7, 0)],
    "one token": [(1, 0)],
    "documents of all sizes": [(3, 0), (30, 0), (1, 0), (20, 0), (21, 0), (2, 0)],
    "a pair": [(12, 0), (9, 5)],
    "one-token answers": [(6, 0), (1, 5), (4, 0), (1, 3)],
    "pairs and documents": [(9, 0), (8, 3), (15, 0), (14, 0), (3, 12), (11, 0), (10, 1)],
    "five answers": [(8, 0), (2, 6), (3, 6), (1, 6), (9, 6)],
    "prompts of unequal length in one grid": [(30, 0), (10, 20), (30, 0), (8, 22), (28, 0), (9, 19)],
}
WINDOWS = (None, 1, 2, 5, 100)
HEADS = {
    "plain": (2, 2, 4, 4),
    "grouped": (4, 2, 4, 4),
    "one key head, narrow values": (3, 1, 6, 2),
    "wide values": (4, 2, 2, 5),
}
"""(H, K, D, V)."""
SCALING = 0.7


class Inputs(NamedTuple):
    query: Tensor
    """(T, H, D)."""
    key: Tensor
    """(T, K, D)."""
    value: Tensor
    """(T, K, V)."""
    factors: Tensor
    """(T, H, V), what the output is multiplied by in the loss."""

    @property
    def learned(self) -> list[Tensor]:
        return [self.query, self.key, self.value]


def inputs(tokens: int, heads: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    num_heads, num_keys, width, value_width = heads

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    learned = (drawn(tokens, num_heads, width), drawn(tokens, num_keys, width), drawn(tokens, num_keys, value_width))
    return Inputs(*(tensor.requires_grad_() for tensor in learned), drawn(tokens, num_heads, value_width))


def visible(row: PackedRow, window: int | None) -> Tensor:
    """(T, T) bool by definition: a token sees those of its segment, shared ones too, less than `window` positions back."""
    found = torch.zeros(row.num_tokens, row.num_tokens, dtype=torch.bool)
    position = row.positions[0].tolist()
    for start, own, trunk, shared in row.spans.tolist():
        for t in range(start, start + own):
            for s in [*range(trunk, trunk + shared), *range(start, start + own)]:
                found[t, s] = 0 <= position[t] - position[s] < (window or row.num_tokens)
    return found


def dense(
    given: Inputs,
    mask: Tensor,
    scaling: float = SCALING,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    softmax: torch.dtype = torch.float64,
    products: torch.dtype = torch.float64,
) -> Tensor:
    """(T, H, V), one head at a time; in float64, or with softmax and products in less, as the eager attention of models."""
    query, key, value = (tensor.to(products) for tensor in given.learned)
    heads = []
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // key.shape[1])
        scores = query[:, head] @ key[:, group].T * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        exponentials = scores.to(softmax).exp() * mask
        sink = 0.0 if sinks is None else sinks[head].to(softmax).exp()
        weights = exponentials / (exponentials.sum(1, keepdim=True) + sink)
        heads.append(weights.to(products) @ value[:, group])
    return torch.stack(heads, dim=1)


def with_gradients(out: Tensor, given: Inputs, *more: Tensor) -> list[Tensor]:
    loss = (out * given.factors.to(out.dtype)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [*given.learned, *more])]


def assert_equal(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        assert bool(ours.isfinite().all())
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def assert_within_own_rounding(got: Sequence[Tensor], wanted: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """Value and gradients against float64, as far off as any of them is with dense masks in fp32."""
    spread = max(float((rounded.double() - theirs.double()).abs().max()) for rounded, theirs in zip(plain, wanted, strict=True))
    assert_equal(got, wanted, FP32_ROUNDING + TIMES_OWN * spread)


def assert_within_bf16(
    got: Sequence[Tensor],
    given: Inputs,
    mask: Tensor,
    scaling: float = SCALING,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Value and gradients against float64, as far off as dense masks in bf16 are, and a rounding of the result; that of the
    gradient it comes from where it is about 0 (a token that sees itself alone passes nothing to its query)."""
    wanted = with_gradients(dense(given, mask, scaling, softcap, sinks), given)
    plain = with_gradients(dense(given, mask, scaling, softcap, sinks, torch.float32, torch.bfloat16), given)
    floor = float(given.factors.double().norm())
    for ours, theirs, rounded in zip(got, wanted, plain, strict=True):
        allowed = BF16_ROUNDING * max(float(theirs.double().norm()), floor)
        allowed += TIMES_OWN_NORM * float((rounded.double() - theirs.double()).norm())
        assert float((ours.cpu().double() - theirs.double()).norm()) <= allowed


SEGMENTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=8)


def valid(drawn: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """No segment shares more than the one before it that shares none has."""
    found, room = [], 0
    for own, shared in drawn:
        shared = min(shared, room)
        found.append((own, shared))
        room = own if shared == 0 else room
    return found
