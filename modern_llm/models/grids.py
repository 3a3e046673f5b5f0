"""Segments of a packed row as a few right-padded grids, for kernels that want batches of equal shapes.

A line of a grid is one segment: its own tokens are the queries, and what it shares plus its own tokens are the keys, so key j
of a line stands at position j, and query i at position `shared + i`. Segments go into one grid while it stays nearly full.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modern_llm.layout import PackedRow, sent

FULLEST = 1.3
"""A segment joins a grid while the widest line has at most so many times its tokens. Measured on a 2-core CPU, forward and
backward of a layer with 6 heads of 64 channels: equal shapes alone were slower on rows of many short documents (45 against
25 ms), and one grid for all was slower on preference pairs (34 against 25 ms)."""

LONG = 1024
"""Keys of a line above which plain products, which hold all (Q, W) weights, give way to torch's fused kernel."""


@dataclass(frozen=True)
class Grid:
    """One of them."""

    queries: Tensor
    """(n, Q) int64: which token of the row asks; cells behind a segment's end hold token 0 and are never read back."""
    keys: Tensor
    """(n, W) int64: which token of the row is seen."""
    shared: Tensor
    """(n,) int64: shared tokens of each line."""
    is_branch: bool
    """Whether its segments share a prompt."""

    def visible(self, window: int | None) -> Tensor:
        """(n or 1, Q, W) bool, True where a query sees a key: 0 ≤ position of the query − that of the key < window."""
        first = self.shared[:, None, None] if self.is_branch else self.shared[:1, None, None]
        seen = self.keys.shape[1]
        # a padding query may stand behind every key: without the bound it would see none, and its softmax would be NaN
        query = (first + torch.arange(self.queries.shape[1], device=first.device)[:, None]).clamp(max=seen - 1)
        distance = query - torch.arange(seen, device=first.device)
        return distance >= 0 if window is None else (distance >= 0) & (distance < window)


class Grids(NamedTuple):
    """All grids of a row, as tensors, so that a layout travels through `torch.compile` without being looked at."""

    shapes: Tensor
    """(grids, 4) int64 on the host: lines, queries and keys of a line, and whether its segments share a prompt."""
    queries: Tensor
    """(query cells,) int64."""
    keys: Tensor
    """(key cells,) int64."""
    shared: Tensor
    """(segments,) int64, in the grids' order."""
    outputs: Tensor
    """(T,) int64: the query cell of each token."""
    is_long: bool = False
    """Whether a line has more keys than `LONG`."""

    def each(self) -> Iterator[Grid]:
        """One after the other."""
        line = query = key = 0
        for lines, width, seen, is_branch in self.shapes.tolist():
            yield Grid(
                self.queries[query : query + lines * width].view(lines, width),
                self.keys[key : key + lines * seen].view(lines, seen),
                self.shared[line : line + lines],
                bool(is_branch),
            )
            line, query, key = line + lines, query + lines * width, key + lines * seen


def lay_grids(row: PackedRow) -> Grids:
    """Group a row's segments by size."""
    start, own, trunk, shared = row.spans.numpy().T
    shapes, queries, keys, order = [], [], [], []
    outputs = np.empty(row.num_tokens, dtype=np.int64)
    cells = 0
    for group in _groups(own, shared):
        width, seen = int(own[group].max()), int((own + shared)[group].max())
        mine, common = own[group, None], shared[group, None]
        query, key = np.arange(width), np.arange(seen)
        is_real = query < mine
        tokens = np.where(is_real, start[group, None] + query, 0)
        outputs[tokens[is_real]] = cells + np.flatnonzero(is_real)
        cells += tokens.size
        in_prompt, in_own = key < common, key < common + mine
        keys.append(
            np.where(in_prompt, trunk[group, None] + key, np.where(in_own, start[group, None] + key - common, 0)).ravel()
        )
        queries.append(tokens.ravel())
        order.append(shared[group])
        shapes.append((len(group), width, seen, int(shared[group[0]] > 0)))
    device = row.ids.device
    return Grids(
        shapes=torch.tensor(shapes),
        queries=sent(torch.from_numpy(np.concatenate(queries)), device),
        keys=sent(torch.from_numpy(np.concatenate(keys)), device),
        shared=sent(torch.from_numpy(np.concatenate(order)), device),
        outputs=sent(torch.from_numpy(outputs), device),
        is_long=max(seen for _, _, seen, _ in shapes) > LONG,
    )


def _groups(own: np.ndarray, shared: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of the segments of each grid; those that share a prompt apart from those that share none."""
    seen = own + shared
    group: list[int] = []
    fewest = most = 0
    for i in np.lexsort((-own, -seen, shared > 0)).tolist():
        if group:
            alike = (shared[i] > 0) == (shared[group[0]] > 0)
            fewest, most = min(fewest, own[i]), max(most, own[i])
            if not alike or seen[group[0]] > FULLEST * seen[i] or most > FULLEST * fewest:
                yield np.array(group)
                group = []
        if not group:
            fewest = most = own[i]
        group.append(i)
    yield np.array(group)
