"""Chats as token ids, built part by part: what is template, what is content and what counts is known by construction.

The template is rendered once for each order of roles, with a marker in place of every content. The text between markers is
template and is encoded with control tokens; contents are encoded as plain text and put back. So no search in text or ids is
needed to find the assistant's words, no user can write a control token, and generation sees the very ids that training saw.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from modern_llm.config import UserError
from modern_llm.config.base import one_line
from modern_llm.data.messages import Chat, Message, RowError
from modern_llm.data.tokenizer import TextEncoder

# Private-use characters, which no template contains, in a space that no template writes: it is gone where the template strips.
_SPACE = "\u2003"
_MARKER = re.compile(f"({_SPACE}?)\ue000aB(\\d+)\ue001({_SPACE}?)")
SPECIAL = ("\n", "</think>")
"""Text inside contents that templates are known to treat specially; reasoning templates take thoughts out of earlier turns."""
FIXED_DAY = "{%- macro strftime_now(format) -%}2024-07-26{%- endmacro -%}"
"""What stands before a template that asks for today's date (gpt-oss, Llama 3.1): tokens must not depend on when they are made.
A macro, because transformers 5.x turns functions among the template's arguments into text."""
_TEMPLATE_FAILS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template's own mistakes raise: it is a program of somebody else's."""
HARMLESS = ("Hello there", "Good morning.", "Thank you", "Bye.")


@dataclass(frozen=True)
class ChatPart:
    """A run of ids that counts as a whole or not at all."""

    ids: Sequence[int]
    scored: bool
    is_words: bool = False
    """It came from the row: content or a call, not what the template writes around them."""


@dataclass(frozen=True)
class Slot:
    """Where a message's content goes."""

    message: int
    before: str
    """Spaces of the template that are encoded with the content, as they would be in one text."""
    after: str
    strip_left: bool
    """The template takes spaces off the content's left side."""
    strip_right: bool
    scored: bool

    def fill(self, content: str) -> str:
        content = content.lstrip() if self.strip_left else content
        return self.before + (content.rstrip() if self.strip_right else content) + self.after


Plan = tuple[ChatPart | Slot, ...]
"""A chat with its contents left open."""


class ChatEncoder:
    """Renders chats of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        template = tokenizer.get_chat_template()
        self._template = FIXED_DAY + template if "strftime_now" in template else template
        self._plan_of_roles = functools.lru_cache(maxsize=10_000)(self._plan_roles)

    def chat(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[ChatPart]:
        """A whole chat that ends with an assistant's turn; every assistant's words and their end token count.

        Raises:
            UserError: the tokenizer's template cannot be trained on.
            RowError: the template refuses this chat.
        """
        return self.encode([(Chat(list(messages), tools), self.plan(Chat(list(messages), tools)))])[0]

    def plan(self, chat: Chat) -> Plan:
        """How a chat is rendered, its contents left open.

        Raises:
            UserError: the tokenizer's template cannot be trained on.
            RowError: the template refuses this chat.
        """
        self._check_template()
        if chat.tools is None and not any("tool_calls" in message for message in chat.messages):
            return self._plan_of_roles(tuple(message["role"] for message in chat.messages))
        return self._plan_with_tools(chat)

    def rewrites(self, chat: Chat) -> bool:
        """Whether the template, given this chat as it is, would not show every word of it.

        Templates of reasoning models take thoughts out of earlier turns. Here they stay, as text.
        """
        self._check_template()
        return any(text in message["content"] for message in chat.messages for text in self._rewritten)

    def encode(self, planned: Sequence[tuple[Chat, Plan]]) -> list[list[ChatPart]]:
        """The ids of many chats; their contents are tokenized in one parallel call."""
        slots = [(chat, slot) for chat, plan in planned for slot in plan if isinstance(slot, Slot)]
        texts = iter(self.encoder.texts([slot.fill(chat.messages[slot.message]["content"]) for chat, slot in slots]))
        found = []
        for _, plan in planned:
            parts = [part if isinstance(part, ChatPart) else ChatPart(next(texts).tolist(), part.scored, True) for part in plan]
            found.append([part for part in parts if part.ids])
        return found

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the assistant begins to answer: what generation starts from."""
        return [i for part in self.prompt_and_answer(messages, "")[0] for i in part.ids]

    def prompt_and_answer(self, messages: Sequence[Message], answer: str) -> tuple[list[ChatPart], list[int]]:
        """A prompt, in which nothing counts, and the ids of one answer with its end token, all of which count."""
        return split_answer(self.chat([*messages, {"role": "assistant", "content": answer}]))

    @functools.cached_property
    def end_token_id(self) -> int:
        """The token that ends an assistant's turn.

        Raises:
            UserError: the template writes no chat of one question and one answer.
        """
        try:
            plan = self._plan_of_roles(("user", "assistant"))
        except RowError as error:
            raise UserError(f"the tokenizer's chat template refuses a question with an answer: {error}") from None
        return plan[-1].ids[-1]  # type: ignore[union-attr]

    def _plan_roles(self, roles: tuple[str, ...]) -> Plan:
        return self._plan(Chat([{"role": role, "content": "x"} for role in roles]))

    def _plan_with_tools(self, chat: Chat) -> Plan:
        """Names, calls and tool descriptions are written by the template and encoded with it: none may look like control."""
        said = [(message.get("name"), message.get("tool_calls")) for message in chat.messages]
        written = json.dumps([chat.tools, said], ensure_ascii=False)
        for text in self.encoder.control_texts:
            if text in written:
                raise RowError(
                    f"a tool's name, call or description holds {text!r}, which the chat template would take for a control token"
                )
        return self._plan(chat)

    def _plan(self, chat: Chat) -> Plan:
        messages, opening = chat.messages, self._generation_prompt
        marked = [_marked(i, message) for i, message in enumerate(messages)]
        pieces = _MARKER.split(self._render(marked, tools=chat.tools))
        # template, space, index, space, template, …, template
        if [int(index) for index in pieces[2::4]] != list(range(len(messages))):
            raise RowError("the tokenizer's chat template leaves out, repeats or reorders messages of this chat")
        if (
            chat.tools is not None
            and pieces[::4] == _MARKER.split(self._render([_marked(i, m) for i, m in enumerate(messages)]))[::4]
        ):
            raise RowError("the tokenizer's chat template has no place for tools")
        parts: list[ChatPart | Slot] = []
        piece = pieces[0]
        for i, message in enumerate(messages):
            left, right, behind = pieces[4 * i + 1], pieces[4 * i + 3], pieces[4 * i + 4]
            if message["role"] != "assistant":
                before = piece[len(piece.rstrip(" ")) :]
                after = behind[: len(behind) - len(behind.lstrip(" "))]
                parts.append(ChatPart(self.encoder.control(piece.removesuffix(before)), scored=False))
                parts.append(Slot(i, before, after, not left, not right, scored=False))
                piece = behind.removeprefix(after)
                continue
            cut = piece.rfind(opening)
            if cut < 0:
                raise UserError("the tokenizer's chat template opens a turn in another way than its generation prompt does")
            cut += len(opening)
            parts.append(ChatPart(self.encoder.control(piece[:cut]), scored=False))
            # what the template adds by itself, such as an empty <think> block, is the model's to write
            added, is_last = piece[cut:], i == len(messages) - 1
            if _is_marked_by_name(message):
                written, _, piece = behind.partition(self._end_text)
                name = message["tool_calls"][0]["function"]["name"]
                parts.append(ChatPart(self.encoder.control(added + name + written + self._end_text), True, is_words=True))
                continue
            parts.append(ChatPart(self.encoder.control(added), scored=True))
            parts.append(Slot(i, "", "", not left, not right, scored=True))
            if "tool_calls" in message:
                written, _, piece = behind.partition(self._end_text)
                parts.append(ChatPart(self.encoder.control(written + self._end_text), scored=True))
                continue
            end_ids, piece = self._end_of_turn(behind, is_last)
            parts.append(ChatPart(end_ids, scored=True))
        # what stands behind the last end token is never reached in generation
        return tuple(part for part in parts if isinstance(part, Slot) or part.ids)

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False, tools: Any = None) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    chat_template=self._template,
                )
            )
        except _TEMPLATE_FAILS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RowError(f"the tokenizer's chat template refuses a chat of {roles}: {one_line(str(error), 500)}") from None

    @functools.cached_property
    def _generation_prompt(self) -> str:
        """The text by which the template opens an assistant's turn."""
        probe = [_marked(0, {"role": "user", "content": "x"})]
        with_opening, without = self._render(probe, generation_prompt=True), self._render(probe)
        if not with_opening.startswith(without) or with_opening == without:
            raise UserError("the tokenizer's chat template has no generation prompt, so no answer could be asked for")
        return with_opening[len(without) :]

    @functools.cached_property
    def _end_text(self) -> str:
        """The control token that ends an assistant's turn, as text."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end_token_id))

    def _check_template(self) -> None:
        """Refuse a template whose text, rendered and encoded at once, is not what the parts give: words that merge with it."""
        if hasattr(self, "_rewritten"):
            return
        chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, HARMLESS, strict=True)]
        try:
            plan, whole = self._plan_of_roles(tuple(m["role"] for m in chat)), self.encoder.control(self._render(chat))
        except RowError as error:
            raise UserError(f"the tokenizer's chat template cannot be trained on: {error}") from None
        parts = [i for part in self.encode([(Chat(chat), plan)])[0] for i in part.ids]
        # a template without an end token gets the tokenizer's behind the last turn
        same = parts if whole[len(parts) - 1 : len(parts)] == parts[-1:] else parts[:-1]
        if whole[: len(same)] != same:
            at = next((n for n, (a, b) in enumerate(zip(whole, same, strict=False)) if a != b), min(len(whole), len(same)))
            raise UserError(
                f"the tokenizer's chat template cannot be trained on part by part: rendered at once, 'Hello there' has other "
                f"tokens ({self.tokenizer.convert_ids_to_tokens(whole[at : at + 3])} instead of "
                f"{self.tokenizer.convert_ids_to_tokens(same[at : at + 3])}), so training and generation would differ: use a "
                f"template that puts a line break or a control token between itself and the words"
            )
        self._rewritten = tuple(text for text in SPECIAL if self._rewrites(text))
        if "\n" in self._rewritten:
            raise UserError("the tokenizer's chat template takes out or rewrites line breaks: it cannot be trained on")

    def _rewrites(self, text: str) -> bool:
        """Whether the template shows a message with this text in it otherwise than as it is."""
        chat: list[Message] = [
            {"role": role, "content": f"a{text}b{text}c"} for role in ("user", "assistant", "user", "assistant")
        ]
        try:
            shown, marked = self._render(chat), self._render([_marked(i, message) for i, message in enumerate(chat)])
        except RowError:
            return True
        return shown != _MARKER.sub(lambda match: chat[int(match[2])]["content"], marked)

    def _end_of_turn(self, piece: str, is_last: bool) -> tuple[list[int], str]:
        """The ids that end an assistant's turn (up to its end token), and the rest of the template.

        A template without such a token gets the tokenizer's end token behind the last turn, and nothing in between.
        """
        if self._written_end is None:
            return ([self.encoder.document_end] if is_last else []), piece
        end_text = str(self.tokenizer.convert_ids_to_tokens(self._written_end))
        before, found, behind = piece.partition(end_text)
        return (self.encoder.control(before + end_text), behind) if found else ([], piece)

    @functools.cached_property
    def _written_end(self) -> int | None:
        """The control token that the template writes first behind the last answer of a chat; None if it writes none there.

        Behind earlier answers the next control token might only open the next turn.
        """
        chat = [_marked(i, {"role": role, "content": "x"}) for i, role in enumerate(("user", "assistant"))]
        ids = self.encoder.control(_MARKER.split(self._render(chat))[-1])
        return next((token for token in ids if token in self.encoder.control_ids), None)


def split_answer(parts: Sequence[ChatPart]) -> tuple[list[ChatPart], list[int]]:
    """The last answer, which is the run of scored parts at the end, and what is before it, in which nothing counts then."""
    first = len(parts)
    while first and parts[first - 1].scored:
        first -= 1
    return [ChatPart(part.ids, scored=False) for part in parts[:first]], [i for part in parts[first:] for i in part.ids]


def _is_marked_by_name(message: Message) -> bool:
    """Whether a message is a call without words: then its function's name is what is marked."""
    return bool(message.get("tool_calls")) and not message["content"]


def _marked(i: int, message: Message) -> Message:
    marker = f"{_SPACE}\ue000aB{i}\ue001{_SPACE}"
    if not _is_marked_by_name(message):
        return {**message, "content": marker}
    call, *rest = message["tool_calls"]
    return {**message, "tool_calls": [{**call, "function": {**call["function"], "name": marker}}, *rest]}
