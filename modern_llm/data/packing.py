"""Which examples share a pack: best-fit decreasing, in O(n log n)."""

import heapq

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items into bins by best-fit decreasing (Johnson 1974: at most 11/9 of the fewest bins, and 6/9 of one).

    The longest item first, each into the fullest bin that it fits; items of one length keep their order, so the same lengths
    give the same packs.

    Args:
        lengths: (n,) tokens of each item, none over `capacity`.
        capacity: tokens of a bin.

    Returns:
        (n,) int64 item numbers, bin after bin; (bins,) int64 where each bin ends in it.
    """
    assert not len(lengths) or lengths.max() <= capacity, "every item fits an empty bin"
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # room left: a heap of bins with it
    rooms = _SortedRooms(capacity)
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        room = rooms.smallest_at_least(length)
        if room is None:
            number, room = len(bins), capacity
            bins.append([])
        else:
            number = heapq.heappop(open_bins[room])
            if not open_bins[room]:
                rooms.remove(room)
        bins[number].append(item)
        left = room - length
        if left:
            if not open_bins.get(left):
                rooms.add(left)
            heapq.heappush(open_bins.setdefault(left, []), number)
    order = np.array([item for members in bins for item in members], dtype=np.int64)
    return order, np.cumsum([len(members) for members in bins], dtype=np.int64)


class _SortedRooms:
    """A set of integers up to a limit that answers 'the smallest one of at least x': a binary tree of counts, as an array."""

    def __init__(self, limit: int) -> None:
        self.size = 1 << limit.bit_length()
        self.tree = [0] * (2 * self.size)

    def add(self, room: int) -> None:
        self._change(room, 1)

    def remove(self, room: int) -> None:
        self._change(room, -1)

    def _change(self, room: int, by: int) -> None:
        node = room + self.size
        while node:
            self.tree[node] += by
            node //= 2

    def smallest_at_least(self, room: int) -> int | None:
        node = room + self.size
        if not self.tree[node]:
            # up, to the first right sibling that holds something; then down on its left side
            while node > 1 and (node % 2 or not self.tree[node + 1]):
                node //= 2
            if node <= 1:
                return None
            node += 1
            while node < self.size:
                node = 2 * node + (not self.tree[2 * node])
        return node - self.size
