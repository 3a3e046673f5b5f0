"""What a packed row is: several segments end to end in one row of tokens, with no padding anywhere.

A segment is one document, one chat or one prompt + answer. Segments never see each other, and positions restart in each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from modern_llm.losses.shift import next_token_targets


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens on the host, before packing."""

    ids: np.ndarray
    """(tokens,) int32 token ids."""
    scored: np.ndarray
    """(tokens,) bool, True where the token counts in the loss."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PackedRow:
    """One forward pass's input. Every field is a tensor, so a row moves to a device and through `torch.compile` whole."""

    ids: Tensor
    """(1, tokens) int64."""
    positions: Tensor
    """(1, tokens) int64, position of each token in its segment."""
    grid: Tensor
    """(segments, longest) int64: which token of the row stands in each cell when every segment has a line of its own;
    cells behind a segment's end repeat token 0 and are never read back."""
    cells: Tensor
    """(tokens,) int64: the cell of each token in the flattened grid."""
    predicting: Tensor
    """(scored,) int64: positions of the row that predict a scored token."""
    targets: Tensor
    """(scored,) int64: the token that each of them predicts."""
    target_segments: Tensor
    """(scored,) int64: the segment that each of them belongs to."""

    @property
    def num_segments(self) -> int:
        return self.grid.shape[0]

    @property
    def num_scored(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> "PackedRow":
        """The same row on a device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def pack(segments: Sequence[Segment]) -> PackedRow:
    """Lay segments end to end.

    Args:
        segments: at least one, none of them empty.
    """
    lengths = np.array([len(segment) for segment in segments], dtype=np.int64)
    assert len(lengths) > 0, "a packed row holds at least one segment"
    assert lengths.min() > 0, "a segment holds at least one token"
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    owner = np.repeat(np.arange(len(segments)), lengths)
    positions = np.arange(lengths.sum()) - starts[owner]
    longest = int(lengths.max())
    cells = owner * longest + positions
    grid = np.zeros(len(segments) * longest, dtype=np.int64)
    grid[cells] = np.arange(lengths.sum())
    ids = torch.from_numpy(np.concatenate([segment.ids for segment in segments]).astype(np.int64))
    scored = torch.from_numpy(np.concatenate([segment.scored for segment in segments]))
    predicting, targets = next_token_targets(ids, scored, torch.from_numpy(starts))
    return PackedRow(
        ids=ids[None],
        positions=torch.from_numpy(positions)[None],
        grid=torch.from_numpy(grid.reshape(len(segments), longest)),
        cells=torch.from_numpy(cells),
        predicting=predicting,
        targets=targets,
        target_segments=torch.from_numpy(owner)[predicting],
    )


def num_scored(segment: Segment) -> int:
    """Tokens of a segment that count; its first token never does, having nothing before it."""
    return int(segment.scored[1:].sum())
