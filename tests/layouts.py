"""Rows with shared prompts, for tests of what reads a layout."""

from collections.abc import Sequence

import numpy as np

from modern_llm.layout import PackedRow, Segment, pack

Spec = Sequence[tuple[int, int]]
"""(own tokens, shared tokens) of each segment; a segment shares with the nearest one before it that shares none."""


def segments_of(spec: Spec, seed: int = 0, vocab: int = 256) -> list[Segment]:
    """Random tokens; every token of its own counts, except those of a prompt that is shared later."""
    draw = np.random.default_rng(seed)
    found: list[Segment] = []
    trunk = np.zeros(0, dtype=np.int32)
    for number, (own, shared) in enumerate(spec):
        ids = np.concatenate([trunk[:shared], draw.integers(0, vocab, own).astype(np.int32)])
        trunk = trunk if shared else ids
        behind = [later for _, later in spec[number + 1 :]]
        answers = behind[: behind.index(0)] if 0 in behind else behind
        prompt = shared or max(answers, default=0)
        found.append(Segment(ids, np.arange(len(ids)) >= prompt, shared))
    return found


def apart(segments: Sequence[Segment]) -> list[Segment]:
    """The same segments, each with its prompt."""
    return [Segment(segment.ids, segment.scored) for segment in segments]


def laid(spec: Spec, seed: int = 0) -> PackedRow:
    return pack(segments_of(spec, seed))


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> list[Segment]:
    """Both answers count, the prompt does not, and the second segment shares it with the first."""
    found = []
    for answer, shared in ((chosen, 0), (rejected, len(prompt))):
        ids = np.array([*prompt, *answer], dtype=np.int32)
        found.append(Segment(ids, np.arange(len(ids)) >= len(prompt), shared))
    return found


def everything(seed: int = 0, vocab: int = 256) -> list[Segment]:
    """Documents of 3, 30 and a single token, a chat, and pairs: unequal answers to a long prompt, one of them a single token;
    two identical answers; two answers of which one begins like the other."""
    draw = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return draw.integers(0, vocab, count).tolist()

    def document(count: int, unscored: int = 0) -> Segment:
        return Segment(np.array(words(count), dtype=np.int32), np.arange(count) >= unscored)

    same, begin = words(4), words(3)
    return [
        document(3),
        *pair(words(20), words(11), words(1)),
        document(30),
        document(1),
        *pair(words(6), same, same),
        document(20, unscored=7),
        *pair(words(18), [*begin, *words(2)], [*begin, *words(9)]),
    ]
