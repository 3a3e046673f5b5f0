"""Plans of chats: what a template writes, cut into parts, with places left open for the words."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modern_llm.data.answers import Answer
from modern_llm.data.messages import Message
from modern_llm.data.template import MARK, WORDS, Shape
from modern_llm.data.tokenizer import TextEncoder


@dataclass(frozen=True)
class ChatPart:
    """A run of ids that counts as a whole or not at all."""

    ids: Sequence[int]
    scored: bool
    is_words: bool = False
    """It holds words of the row, not only what the template writes around them."""


@dataclass(frozen=True)
class Stretch:
    """Text between two control tokens, or from a border on, with words in it."""

    pieces: tuple[str | int, ...]
    """What the template writes, and numbers of words."""
    scored: tuple[bool, ...]
    """Whether each piece counts."""
    continues: bool
    """It goes on from the text before it."""
    opening: int = 0
    """Tokens of an answer that the template writes before its first words."""

    def text(self, words: Sequence[str]) -> str:
        return "".join(words[piece] if isinstance(piece, int) else piece for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """A chat with its words left open."""

    parts: tuple[ChatPart | Stretch, ...]
    answer: int
    """The part with which the last answer begins."""
    borders: tuple[tuple[tuple[str | int, ...], Stretch], ...]
    """Where answers begin in the middle of text: what stands before it, back to the last control token, and the answer."""
    text: str
    """All that the template writes, with marks."""
    loses: frozenset[int]
    """Messages of which the template leaves words out."""
    rest: tuple[ChatPart | Stretch, ...] = ()
    """What the template writes behind the last answer's end, white space and end tokens aside."""
    apart: frozenset[int] = frozenset()
    """Answers that do not stand behind what generation begins from."""

    @functools.cached_property
    def prompt(self) -> "Plan":
        """The plan of all before the last answer."""
        return self.part(self.parts[: self.answer])

    @functools.cached_property
    def last_answer(self) -> "Plan":
        """The plan of the last answer."""
        return self.part(self.parts[self.answer :])

    def part(self, parts: tuple[ChatPart | Stretch, ...]) -> "Plan":
        """The plan of some parts."""
        return Plan(parts, 0, self.borders, self.text, self.loses)


class Planned(NamedTuple):
    """A plan, and the words for it."""

    plan: Plan
    words: Sequence[str]

    @property
    def prompt(self) -> "Planned":
        """All before the last answer, in which nothing counts then."""
        return Planned(self.plan.prompt, self.words)

    @property
    def answer(self) -> "Planned":
        """The last answer."""
        return Planned(self.plan.last_answer, self.words)


def cut(
    encoder: TextEncoder, text: str, answers: Sequence[Answer], counts: Sequence[tuple[int, int]], continues: bool = False
) -> tuple[list[ChatPart | Stretch], list[int]]:
    """Cut a marked text into parts.

    Args:
        encoder: knows the control tokens.
        text: as a template writes it.
        answers: in it; it is cut where one begins.
        counts: which stretches of it count, as (start, stop).
        continues: it goes on from other text.

    Returns:
        The parts, and which of them begin an answer.
    """
    borders = {a.start: a.is_asked for a in answers}
    control = {start: (behind, i) for start, behind, i in encoder.control_spans(text)}
    swallowed = {n: behind for start, (behind, _) in control.items() for n in range(start + 1, behind)}
    counts = [(swallowed.get(start, start), swallowed.get(stop, stop)) for start, stop in counts]
    ends = {*(behind for behind, _ in control.values()), *itertools.chain.from_iterable(counts)}
    cuts = sorted({0, len(text), *borders, *control, *ends})
    parts: list[ChatPart | Stretch] = []
    begins: list[int] = []
    pieces: list[str | int] = []
    flags: list[bool] = []

    def add(part: ChatPart | Stretch) -> None:
        last = parts[-1] if len(parts) > max(begins, default=0) else None
        if isinstance(part, ChatPart) and isinstance(last, ChatPart) and last.scored == part.scored:
            parts[-1] = ChatPart([*last.ids, *part.ids], part.scored)
        else:
            parts.append(part)

    def flush() -> None:
        if pieces:
            add(_stretch(encoder, tuple(pieces), tuple(flags), continues))
        pieces.clear()
        flags.clear()

    for start, behind in itertools.pairwise(cuts):
        if start in borders:
            goes_on = bool(pieces)
            if borders[start]:
                flush()
                continues = continues or goes_on
            begins.append(len(parts))
        scored = any(first <= start < last for first, last in counts)
        if start in control:
            flush()
            add(ChatPart([control[start][1]], scored))
            continues = not encoder.prefixes_each
            continue
        found = pieces_of(text[start:behind])
        pieces += found
        flags += [scored] * len(found)
    flush()
    return parts, begins


def _stretch(
    encoder: TextEncoder, pieces: tuple[str | int, ...], scored: tuple[bool, ...], continues: bool
) -> ChatPart | Stretch:
    """A stretch; encoded already if it holds no words and counts as a whole."""
    opening = "".join(itertools.takewhile(lambda piece: isinstance(piece, str), pieces))  # type: ignore[arg-type]
    ids = encoder.texts([opening], continues)[0].tolist() if opening else []
    if len({*scored}) == 1 and all(isinstance(piece, str) for piece in pieces):
        return ChatPart(ids, scored[0])
    return Stretch(pieces, scored, continues, len(ids) if scored[0] else 0)


def fill(text: str, words: Sequence[str]) -> str:
    """A marked text with its words."""
    return MARK.sub(lambda match: words[int(match[1])], text)


def pieces_of(text: str) -> tuple[str | int, ...]:
    split = MARK.split(text)
    return tuple(int(piece) if n % 2 else piece for n, piece in enumerate(split) if n % 2 or piece)


def numbered(shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes with numbers in their marks."""
    numbers = itertools.count()

    def number(text: str) -> str:
        first, *rest = text.split(WORDS)
        return first + "".join(f"\ue000aB{next(numbers)}\ue001{piece}" for piece in rest)

    found = []
    for shape in shapes:
        reasoning = None if shape.reasoning is None else number(shape.reasoning)
        content = number(shape.content)
        found.append(shape._replace(reasoning=reasoning, content=content, calls=tuple(map(number, shape.calls))))
    return found


def mark_words(shape: Shape, message: Message | None = None) -> Message:
    """A message of marks, with the other keys of the one given."""
    marked = {**(message or {}), "role": shape.role, "content": shape.content}
    if shape.reasoning is not None:
        marked["reasoning_content"] = shape.reasoning
    if shape.calls:
        calls = zip(marked["tool_calls"], shape.calls, strict=True)
        marked["tool_calls"] = [{**call, "function": {**call["function"], "name": name}} for call, name in calls]
    return marked
