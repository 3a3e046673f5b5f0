"""What a packed row is: several segments end to end in one row of tokens, with no padding anywhere.

A segment is one document, one chat or one prompt + answer. Segments never see each other, and positions restart in each. Two
answers to one prompt share it: the prompt is laid once, both answers see it, and neither sees the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    shared: int = 0
    """How many tokens at its beginning it has in common with the nearest segment before it that shares none."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PackedRow:
    """One forward pass's input."""

    ids: Tensor
    """(1, tokens) int64."""
    positions: Tensor
    """(1, tokens) int64, position of each token in its segment."""
    spans: Tensor
    """(segments, 4) int64, always on the host: where a segment's own tokens start in the row, how many they are, where the
    prompt that it shares starts, and how many of its tokens it shares (0: none)."""
    predicting: Tensor
    """(scored,) int64: positions of the row that predict a scored token."""
    targets: Tensor
    """(scored,) int64: the token that each of them predicts."""
    target_segments: Tensor
    """(scored,) int64: the segment that each of them belongs to."""

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def num_segments(self) -> int:
        return self.spans.shape[0]

    @property
    def num_scored(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> "PackedRow":
        """The same row on a device."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in _ON_DEVICE})

    def pinned(self) -> "PackedRow":
        """The same row in page-locked memory."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _ON_DEVICE})


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The same on a device. From pageable memory a copy to a GPU waits for all the work before it, from page-locked not."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


_ON_DEVICE = ("ids", "positions", "predicting", "targets", "target_segments")


def pack(segments: Sequence[Segment]) -> PackedRow:
    """Lay segments end to end; what a segment shares with one before it is not laid again.

    Args:
        segments: at least one, none of them empty. A segment that shares tokens has at least one of its own, and no shared
            token counts.
    """
    assert segments, "a packed row holds at least one segment"
    shared = np.array([segment.shared for segment in segments], dtype=np.int64)
    own = np.array([len(segment) for segment in segments], dtype=np.int64) - shared
    assert own.min() > 0, "a segment holds at least one token of its own"
    assert shared[0] == 0, "the first segment has nothing to share with"
    starts = np.concatenate([[0], np.cumsum(own)[:-1]])
    trunk = np.maximum.accumulate(np.where(shared == 0, np.arange(len(segments)), 0))
    for i in np.flatnonzero(shared).tolist():
        mine, other = segments[i], segments[trunk[i]]
        assert not mine.scored[: mine.shared].any(), "a shared token does not count"
        assert np.array_equal(mine.ids[: mine.shared], other.ids[: mine.shared]), "shared tokens are the same tokens"
    owner = np.repeat(np.arange(len(segments)), own)
    previous = np.arange(len(owner)) - 1
    previous[starts] = np.where(shared > 0, starts[trunk] + shared - 1, -1)
    ids = torch.from_numpy(np.concatenate([segment.ids[segment.shared :] for segment in segments]).astype(np.int64))
    scored = torch.from_numpy(np.concatenate([segment.scored[segment.shared :] for segment in segments]))
    predicting, targets, tokens = next_token_targets(ids, scored, torch.from_numpy(previous))
    positions = np.arange(len(owner)) - starts[owner] + shared[owner]
    return PackedRow(
        ids=ids[None],
        positions=torch.from_numpy(positions)[None],
        spans=torch.from_numpy(np.stack([starts, own, starts[trunk], shared], axis=1)),
        predicting=predicting,
        targets=targets,
        target_segments=torch.from_numpy(owner)[tokens],
    )


def num_scored(segment: Segment) -> int:
    """Tokens of a segment that count; its first token never does, having nothing before it."""
    return int(segment.scored[1:].sum())
