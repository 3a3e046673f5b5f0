"""Attention over grids by plain products with a backward pass of its own: the fastest way on a CPU for segments of up to about
a thousand tokens, where torch's fused kernel has a slow backward pass.

Opaque to `torch.compile`: it sees tensors and one operator, whatever the layout, so that a new layout recompiles nothing.

Measured on torch 2.13, 2 cores with AVX512-BF16, forward + backward of 8 pairs in 1,970 tokens, 6 heads of 64 channels: 25 ms,
against 186 ms through `scaled_dot_product_attention` a segment at a time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modern_llm.models.grids import Grid, Grids

KEPT_BITS = 16
"""Attention weights of types up to this width wait for the backward pass. Wider ones, which would take twice the memory, are
made again there."""

BLOCK = 256
"""Queries of a line that are worked on at once, in lines of more than twice as many. Measured, forward + backward of a layer, 6
heads of 64 channels, 4 documents of 1,024 tokens in bf16, one core: 126 ms against 178 ms whole. Blocks of 128, in lines of 257
to 512 too, were faster on one core (91 against 113 ms) and slower on two (the quickstart 9,500 against 11,300 tokens/s)."""

AT_ONCE = 2**21
"""Weights that are worked on at once; more where a single line has more. Measured, forward + backward of a layer, 6 heads of 64
channels, 8 documents of 511 tokens, two cores of an EPYC (Zen 4): in fp32 104 ms against 160 with all lines at once, in
bf16 54 against 57. Half and twice as many: 104 and 112, 55 and 53 ms."""


def grid_attention(query: Tensor, key: Tensor, value: Tensor, grids: Grids, scaling: float, window: int | None) -> Tensor:
    """Causal attention inside each segment.

    Args:
        query: (T, H, D).
        key: (T, K, D), K a divisor of H.
        value: (T, K, V).
        grids: the row's layout.
        scaling: what scores are multiplied by.
        window: positions that a token sees, itself included. None: all before it.

    Returns:
        (T, H, V).
    """
    with torch.autocast(query.device.type, enabled=False):  # the products run in the type that comes
        return _forward(query, key, value, *grids[:5], scaling, window or 0)[0]


def _stacked(x: Tensor, cells: Tensor, groups: int) -> Tensor:
    """(T, H, D) → (n · K, H/K · Q, D): heads that look at the same keys stand below each other. K = H / groups."""
    lines, width = cells.shape
    x = x.index_select(0, cells.flatten()).view(lines, width, -1, groups, x.shape[-1])
    return x.permute(0, 2, 3, 1, 4).reshape(-1, groups * width, x.shape[-1])


def _unstacked(x: Tensor, cells: Tensor, groups: int) -> Tensor:
    """The way back: (n · K, H/K · Q, D) → (n · Q, H, D)."""
    lines, width = cells.shape
    x = x.view(lines, -1, groups, width, x.shape[-1]).permute(0, 3, 1, 2, 4)
    return x.reshape(lines * width, -1, x.shape[-1])


class _Block(NamedTuple):
    """Some queries of some lines of a grid, and the keys that any of them may see."""

    lines: slice
    queries: slice
    keys: slice
    visible: Tensor
    """(lines or 1, queries, keys) bool."""

    def seen(self, x: Tensor, groups: int) -> Tensor:
        """(n · K, W, D) → (lines · K, keys, D): what it sees of keys or values, not copied. K = groups."""
        return x[self.lines.start * groups : self.lines.stop * groups, self.keys]


def _blocks(grid: Grid, heads: int, window: int | None) -> Iterator[_Block]:
    """A grid in blocks of queries, without which half of the scores would be made to be hidden, and of as many lines as come
    to `AT_ONCE` weights."""
    lines, width, seen = *grid.queries.shape, grid.keys.shape[1]
    visible = grid.visible(window)
    fewest, most = (int(grid.shared.min()), int(grid.shared.max())) if grid.is_branch else (0, 0)
    size = BLOCK if width > 2 * BLOCK else width
    for start in range(0, width, size):
        behind = min(start + size, width)
        first = 0 if window is None else min(max(0, fewest + start - window + 1), seen - 1)
        keys = slice(first, min(most + behind, seen))
        part = visible[:, start:behind, keys]
        count = max(1, AT_ONCE // (heads * part[0].numel()))
        for line in range(0, lines, count):
            some = slice(line, min(line + count, lines))
            yield _Block(some, slice(start, behind), keys, part[some] if grid.is_branch else part)


def _num_weights(grid: Grid, heads: int, window: int | None) -> int:
    every = (block.visible[0].numel() * (block.lines.stop - block.lines.start) for block in _blocks(grid, heads, window))
    return heads * sum(every)


def weights_are_kept(dtype: torch.dtype) -> bool:
    """Whether attention weights of this type wait for the backward pass, or are made again there."""
    return torch.finfo(dtype).bits <= KEPT_BITS


def _weights(q: Tensor, k: Tensor, block: _Block, scaling: float, into: Tensor | None = None) -> Tensor:
    """softmax(scaling · q kᵀ) over the visible keys: (lines · K, H/K · Q, keys), written into the flat `into` if given.

    q: (lines · K, H/K · Q, D). k: (lines · K, keys, D).
    """
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
    hidden = torch.zeros(1, dtype=scores.dtype).masked_fill(~block.visible, float("-inf"))
    scores.view(block.lines.stop - block.lines.start, -1, *hidden.shape[1:]).add_(hidden[:, None])
    return torch.softmax(scores, -1, out=scores if into is None else into.view_as(scores))


@torch.library.custom_op("modern_llm::grid_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, shapes: Tensor, queries: Tensor, keys: Tensor, shared: Tensor, outputs: Tensor,
    scaling: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns what every token attended to, (T, H, V), and the weights of all blocks in one flat tensor, for the way back; an
    empty one where they are made again."""
    grids = Grids(shapes, queries, keys, shared, outputs)
    heads, shares = query.shape[1], key.shape[1]
    groups = heads // shares
    keep = weights_are_kept(query.dtype)
    kept = query.new_empty(sum(_num_weights(grid, heads, window or None) for grid in grids.each()) if keep else 0)
    out = query.new_empty(len(queries), heads, value.shape[2])
    cell = used = 0
    for grid in grids.each():
        k, v = _stacked(key, grid.keys, 1), _stacked(value, grid.keys, 1)
        cells = torch.arange(cell, cell + grid.queries.numel()).view_as(grid.queries)
        for block in _blocks(grid, heads, window or None):
            q = _stacked(query, grid.queries[block.lines, block.queries], groups)
            size = q.shape[0] * q.shape[1] * block.visible.shape[2]
            into = kept[used : used + size] if keep else None
            weights = _weights(q, block.seen(k, shares), block, scaling, into)
            mine = cells[block.lines, block.queries]
            out[mine.flatten()] = _unstacked(torch.bmm(weights, block.seen(v, shares)), mine, groups)
            used += size
        cell += grid.queries.numel()
    return out.index_select(0, outputs), kept


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2]), query.new_empty(size)


@torch.library.custom_op("modern_llm::grid_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor,
    shapes: Tensor, queries: Tensor, keys: Tensor, shared: Tensor, outputs: Tensor, scaling: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value. A key gets its own from several blocks and, in a shared prompt, from several lines:
    they are added up in fp32."""
    grids = Grids(shapes, queries, keys, shared, outputs)
    heads, shares = query.shape[1], key.shape[1]
    groups = heads // shares
    accumulate = torch.promote_types(query.dtype, torch.float32)
    grad_key, grad_value = torch.zeros_like(key, dtype=accumulate), torch.zeros_like(value, dtype=accumulate)
    grad_query = query.new_empty(len(queries), *query.shape[1:])
    grad_cells = grad.new_zeros(len(queries), *grad.shape[1:]).index_copy_(0, outputs, grad)  # zero where nothing is read
    cell = used = 0
    for grid in grids.each():
        k, v = _stacked(key, grid.keys, 1), _stacked(value, grid.keys, 1)
        grad_k, grad_v = torch.zeros_like(k, dtype=accumulate), torch.zeros_like(v, dtype=accumulate)
        cells = torch.arange(cell, cell + grid.queries.numel()).view_as(grid.queries)
        for block in _blocks(grid, heads, window or None):
            mine = cells[block.lines, block.queries]
            g = _stacked(grad_cells, mine, groups)
            q = _stacked(query, grid.queries[block.lines, block.queries], groups)
            seen_k, seen_v = block.seen(k, shares), block.seen(v, shares)
            if weights_are_kept(query.dtype):
                size = q.shape[0] * q.shape[1] * block.visible.shape[2]
                weights = kept[used : used + size].view(*q.shape[:2], -1)
                used += size
            else:
                weights = _weights(q, seen_k, block, scaling)
            grad_weights = torch.bmm(g, seen_v.transpose(1, 2))
            # softmax backward: w · (g − Σ w g)
            softmax_backward = torch.ops.aten._softmax_backward_data.out
            grad_scores = softmax_backward(grad_weights, weights, -1, weights.dtype, grad_input=grad_weights)
            grad_scores.mul_(scaling)
            grad_query[mine.flatten()] = _unstacked(torch.bmm(grad_scores, seen_k), mine, groups)
            block.seen(grad_k, shares).add_(torch.bmm(grad_scores.transpose(1, 2), q))
            block.seen(grad_v, shares).add_(torch.bmm(weights.transpose(1, 2), g))
        grad_key.index_add_(0, grid.keys.flatten(), _unstacked(grad_k, grid.keys, 1))
        grad_value.index_add_(0, grid.keys.flatten(), _unstacked(grad_v, grid.keys, 1))
        cell += grid.queries.numel()
    return grad_query.index_select(0, outputs), grad_key.to(key.dtype), grad_value.to(value.dtype)


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(*tensors[:3], output[1], *tensors[3:])
    ctx.set_materialize_grads(False)


def _backward_of(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    with torch.autocast(grad.device.type, enabled=False):
        grads = _backward(grad.contiguous(), *ctx.saved_tensors, ctx.scaling, ctx.window)
    return *grads, *[None] * 7


_forward.register_autograd(_backward_of, setup_context=_setup_context)
