"""Where answers begin and end in a chat's text: behind the generation prompt, and with the token that ends the turn."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from modern_llm.data.columns import RowError
from modern_llm.data.messages import Message
from modern_llm.data.template import MARK, ChatTemplate, common_length
from modern_llm.data.tokenizer import TextEncoder

_TAG = r"(?:<[^<>]*(?:think|thought|channel|reason)[^<>]*>|\[/?THINK\])"
_THOUGHT = re.compile(rf"{_TAG}(?:{_TAG}|thought|analysis|\s)*\Z", re.IGNORECASE)
"""A thought block without words, at the end of a generation prompt."""
_THOUGHTS = re.compile(
    r"\s*(?:<(think|thought|reasoning)>.*?</\1>|<\|channel>thought.*?<channel\|>|<\|START_THINKING\|>.*?<\|END_THINKING\|>"
    r"|\[THINK\].*?\[/THINK\])\s*",
    re.DOTALL,
)
"""The thoughts with which an answer begins."""
_OPENED = re.compile(r"(<(?:think|thought|reasoning)>|<\|channel>thought|<\|START_THINKING\|>|\[THINK\])\s*\Z")
"""The beginning of thoughts, at the end of a prompt."""


class Ends(NamedTuple):
    """Control tokens that end an answer, as text; None where a template writes none."""

    last: str | None
    """Behind the last answer of a chat, and behind others where the template writes it there."""
    middle: str | None
    """Behind an earlier answer."""


class Answer(NamedTuple):
    """One answer in a marked text."""

    message: int
    start: int
    """Where generation would begin."""
    stop: int
    """Behind its end token."""
    ends: bool
    """The template writes a token that ends it."""
    words: int
    """Where it begins without its thoughts."""
    is_asked: bool
    """The text before it is what generation begins from. Else the generation prompt has a thought there, and the chat none."""


def find_answers(
    template: ChatTemplate,
    encoder: TextEncoder,
    marked: Sequence[Message],
    tools: Any,
    text: str,
    ends: "Ends",
    needs_answer: bool = True,
) -> tuple[list[Answer], set[int]]:
    """The answers of a chat, and the messages of which the template leaves words out.

    Args:
        template: that wrote the text.
        encoder: knows the control tokens.
        marked: messages with marks in place of words.
        tools: of the chat.
        text: the chat as the template writes it.
        ends: what ends an answer.
        needs_answer: the text is a whole chat, in which a system turn may be left out; not a prompt.

    Raises:
        RowError: a message is not in the text, stands there twice or in another order, or an answer opens in another way than
            the template's generation prompt.
    """
    spans = {int(match[1]): match.span() for match in MARK.finditer(text)}
    if len(spans) != sum(1 for _ in MARK.finditer(text)):
        raise RowError(_OUT_OF_ORDER)
    answers: list[Answer] = []
    loses: set[int] = set()
    behind = 0
    for n, message in enumerate(marked):
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        shown = "".join([message.get("reasoning_content", ""), message["content"], *calls])
        marks = [int(number) for number in MARK.findall(shown)]
        if any(int(number) not in spans for call in calls for number in MARK.findall(call)):
            raise RowError("the tokenizer's chat template leaves out a call of a tool: give it a template with tool_calls")
        there = sorted(spans[mark] for mark in marks if mark in spans)
        if len(there) < len(marks):
            loses.add(n)
        is_kept = message["role"] == "assistant" and bool(there)
        is_optional = message["role"] == "system" and needs_answer
        if n in loses and not (is_kept or is_optional):
            raise RowError(_OUT_OF_ORDER)
        if message["role"] == "system" or not there:
            continue
        if there[0][0] < behind:
            raise RowError(_OUT_OF_ORDER)
        behind = there[-1][1]
        if message["role"] == "assistant" and needs_answer:
            start, is_asked = _start(template, marked[:n], tools, text, there[0][0], n == len(marked) - 1)
            is_last = n == len(marked) - 1
            stop, is_ended = _stop(template, encoder, marked[: n + 1], tools, text, behind, ends, is_last)
            answers.append(Answer(n, start, stop, is_ended, _words(text, start, stop), is_asked))
    if needs_answer and not answers:
        raise RowError(_OUT_OF_ORDER)
    return answers, loses


_OUT_OF_ORDER = "the tokenizer's chat template leaves out, repeats or reorders messages of this chat"


def _start(
    template: ChatTemplate, before: Sequence[Message], tools: Any, text: str, first: int, is_last: bool
) -> tuple[int, bool]:
    """Where in a text an answer begins whose first words stand at `first`, and whether generation begins there too."""
    asked = template.render(before, tools, asks=True)
    if len(asked) <= first and text.startswith(asked):
        return len(asked), True
    opening = MARK.split(asked)[-1]
    marks = [match.end() for match in MARK.finditer(text, 0, first)]
    gap = text[marks[-1] if marks else 0 : first]
    if opening and gap.startswith(opening):
        return first - len(gap) + len(opening), True
    plain = _THOUGHT.sub("", opening)
    if plain and gap.startswith(plain):
        is_empty_thought = len(re.findall(_TAG, opening[len(plain) :], re.IGNORECASE)) > 1
        thinks = re.match(rf"\s*{_TAG}", gap[len(plain) :], re.IGNORECASE) is not None
        # a thought that the prompt only begins is left to the model, which is asked without it then
        return first - len(gap) + len(plain), is_last and (thinks or not is_empty_thought)
    raise RowError("the tokenizer's chat template opens an answer in another way than its generation prompt does")


def _words(text: str, start: int, stop: int) -> int:
    """Where in a text the words of an answer begin, behind its thoughts, which the prompt may have begun."""
    opened = _OPENED.search(text, 0, start)
    begin = opened.start() if opened and text[opened.end() : start] == "" else start
    thoughts = _THOUGHTS.match(text, begin, stop)
    return max(start, thoughts.end()) if thoughts else start


def _stop(
    template: ChatTemplate,
    encoder: TextEncoder,
    until: Sequence[Message],
    tools: Any,
    text: str,
    behind: int,
    ends: "Ends",
    is_last: bool,
) -> tuple[int, bool]:
    """Where in a text an answer stops whose last words end at `behind`, and whether a token ends it there."""
    closing = text[behind:] if is_last else _closing(template, encoder, until, tools, text, behind)
    for end in (ends.last,) if is_last else (ends.last, ends.middle):
        looked_at = closing if end == ends.last else MARK.split(text[behind:])[0]
        if end is not None and (at := looked_at.find(end)) >= 0:
            return behind + at + len(end), True
    return behind + len(closing), False


def _closing(template: ChatTemplate, encoder: TextEncoder, until: Sequence[Message], tools: Any, text: str, behind: int) -> str:
    """What the template writes behind an answer in the same turn: all that it writes too where the chat ends there."""
    alone = MARK.split(template.render(until, tools))[-1]
    rest = MARK.split(text[behind:])[0]
    length = common_length(alone, rest)
    cut = next((start for start, stop, _ in encoder.control_spans(rest) if start < length < stop), length)
    return rest[:cut]


def end_of_turn(template: ChatTemplate, encoder: TextEncoder) -> Ends:
    """The control tokens that end an assistant's turn.

    The tokenizer's end token where the template writes that in every turn, else the first control token behind an answer;
    gpt-oss writes one behind the last answer and another behind earlier ones.

    Raises:
        RowError: the template writes no chat of a question and an answer.
    """
    roles = ("user", "assistant", "user", "assistant")
    marked = [{"role": role, "content": f"\ue000aB{n}\ue001"} for n, role in enumerate(roles)]
    last = middle = MARK.split(template.render(marked[:2]))[-1]
    between = ""
    opening: set[str] = set()
    try:
        pieces = MARK.split(whole := template.render(marked))
        between, opening = pieces[4], set(_control_texts(encoder, pieces[0]))
        behind = next(match.end() for match in MARK.finditer(whole) if match[1] == "1")
        middle = _closing(template, encoder, marked[:2], None, whole, behind)
    except (RowError, StopIteration, IndexError):
        pass  # a template of one turn
    end = str(encoder.tokenizer.eos_token)
    for closing in (middle, last):
        control = [end] if end in closing else _control_texts(encoder, closing)
        if control:
            # what opens the next turn ends none
            first = next(iter(_control_texts(encoder, between)), None)
            return Ends(control[0], first if first not in opening else None)
    return Ends(None, None)


def _control_texts(encoder: TextEncoder, text: str) -> list[str]:
    return [text[start:stop].strip() for start, stop, _ in encoder.control_spans(text)]
