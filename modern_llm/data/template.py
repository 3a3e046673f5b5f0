"""Chat templates as programs: what they write around the words of a chat, found by rendering marks in place of the words.

A template is rendered with a mark for every stretch of words. What stands between the marks is the template's own, so no search
in the text is needed to find the words, and no word can be mistaken for the template's. White space at the ends of words, and
texts that the template's program names (`</think>`), stay in the rendering: templates act on them.
"""

import datetime
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, nodes
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from modern_llm.config import UserError
from modern_llm.config.base import one_line
from modern_llm.data.columns import RowError
from modern_llm.data.messages import Message

MARK = re.compile("\ue000aB(\\d+)\ue001")
"""A numbered mark: private-use characters, which no template writes, and letters whose case shows whether it was changed."""
WORDS = "\ue000"
"""A mark that has no number yet."""
_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template's own mistakes raise: it is a program of somebody else's."""
_DAY = datetime.datetime(2024, 7, 26)
_DIRECTIVES = [f"%-{letter}" for letter in "dmyHIMSj"] + [f"%{letter}" for letter in "aAbBcdefGHIjklmMnpSTuUVwWxXyYzZ"]
FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace({directive!r}, {_DAY.strftime(directive)!r})" for directive in _DIRECTIVES)
    + " -}}{%- endmacro -%}"
)
"""What stands before a template that asks for today's date (Llama 3.1, gpt-oss): tokens must not depend on when they are made.
A macro, because transformers 5.x turns functions among a template's arguments into text."""


class Shape(NamedTuple):
    """A message without its words: all of it that a template can act on."""

    role: str
    content: str
    """With `WORDS` for each stretch of words."""
    reasoning: str | None
    calls: tuple[str, ...]
    """The names of the functions that it calls, each `WORDS`."""
    trains: bool


class ChatTemplate:
    """The template or templates of a tokenizer, and what they write."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, more: Sequence[str] = ()) -> None:
        """Read the templates.

        Args:
            tokenizer: with a chat template.
            more: texts to be told apart from words like those that the program names.

        Raises:
            UserError: it is no Jinja template.
        """
        self.tokenizer = tokenizer
        named = tokenizer.chat_template
        self.sources: list[str] = list(named.values()) if isinstance(named, Mapping) else [str(named)]
        self._source = functools.cache(self._source_for)
        try:
            programs = [program_of(source) for source in self.sources]
        except TemplateError as error:
            raise UserError(f"the tokenizer's chat template is no Jinja template: {error}") from None
        self.literals = [program.literals for program in programs]
        self.is_opaque = any(program.is_opaque for program in programs)
        words = sorted(set(more).union(*(program.constants for program in programs)), key=len, reverse=True)
        self._words_of_constants = [word for word in words if not any(other != word and other in word for other in words)]
        self.constants = re.compile(f"({'|'.join(map(re.escape, words))})") if words else None
        """Texts that the program compares with, splits at or replaces, white space aside; a group."""

    def looks_for(self, text: str) -> bool:
        """Whether a text holds one that the program names."""
        return any(word in text for word in self._words_of_constants)  # faster than a pattern on long texts

    def writes(self, text: str) -> bool:
        """Whether a text is part of what a template writes or looks for."""
        return any(text in literal for literals in self.literals for literal in literals)

    def shape(self, message: Message, opened: bool) -> tuple[Shape, list[str]]:
        """A message's shape, and its words in their order.

        Args:
            message: of a chat.
            opened: leave the texts in it that the program names, which are words otherwise; an answer of white space has none.
        """
        content, words = self._opened(message["content"], opened)
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if not words and not names and message["role"] == "assistant":  # so that its place is known
            content, words = WORDS, ["" if opened else content]
        reasoning = None
        if message.get("reasoning_content"):
            reasoning, more = self._opened(message["reasoning_content"], opened)
            words = [*more, *words]
        return Shape(message["role"], content, reasoning, (WORDS,) * len(names), message.get("train", True)), [*words, *names]

    def _opened(self, text: str, opened: bool) -> tuple[str, list[str]]:
        found, words = [], []
        for n, piece in enumerate(self.constants.split(text) if opened and self.constants else [text]):
            core = piece.strip() if n % 2 == 0 else ""
            if core is piece:
                found.append(WORDS if core else "")
            elif core:
                start = piece.index(core)
                found += [piece[:start], WORDS, piece[start + len(core) :]]
            else:
                found.append(piece)
            words += [core] if core else []
        return "".join(found), words

    def render(self, messages: Sequence[Message], tools: Any = None, asks: bool = False) -> str:
        """The text of a chat.

        Args:
            messages: of the chat; thoughts go where the template looks for them.
            tools: functions that may be called.
            asks: with the generation prompt.

        Raises:
            RowError: the template refuses the chat, or has no place for the thoughts.
        """
        source = self._source(tools is not None)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [with_thoughts(message, source) for message in messages],
                    tools=tools, tokenize=False, add_generation_prompt=asks, chat_template=source,
                )
            )  # fmt: skip
        except _FAILURES as error:
            if isinstance(error, RowError):
                raise
            roles = ", ".join(message["role"] for message in messages)
            raise RowError(f"the tokenizer's chat template refuses a chat of {roles}: {one_line(str(error), 500)}") from None

    def _source_for(self, has_tools: bool) -> str:
        try:
            template = self.tokenizer.get_chat_template(tools=[] if has_tools else None)
        except ValueError as error:
            raise UserError(f"the tokenizer's chat template: {one_line(str(error), 300)}") from None
        return FIXED_DAY + template if "strftime_now" in template else template


def with_thoughts(message: Message, source: str) -> Message:
    """The message with its `reasoning_content` where a template looks for thoughts.

    Raises:
        RowError: the template has no place for them.
    """
    if "train" in message:
        message = {key: value for key, value in message.items() if key != "train"}
    if not message.get("reasoning_content") or "reasoning_content" in source:
        return message
    plain = {key: value for key, value in message.items() if key != "reasoning_content"}
    if re.search(r"""\.thinking\b|['"]thinking['"]""", source):  # gpt-oss
        return {**plain, "thinking": message["reasoning_content"]}
    if "</think>" in source:
        return {**plain, "content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"}
    raise RowError(
        "the tokenizer's chat template has no place for an answer's reasoning: give it in the content, or a template with "
        "reasoning_content"
    )


def common_length(left: str, right: str) -> int:
    """Letters that two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class Program(NamedTuple):
    """What a template's syntax tree says."""

    literals: frozenset[str]
    """All texts that stand in it."""
    constants: frozenset[str]
    """Those that the words of a message may be compared with, split at or replaced by; no white space."""
    is_opaque: bool
    """It does more to words than it names texts for: their length, a part of them, a filter."""


@functools.cache
def program_of(source: str) -> Program:
    """Read a template's program.

    White space is no constant: it is kept apart at the ends of words, and a program that acts on it in their middle is opaque.
    """
    environment: Environment = _compile_jinja_template(source).environment
    tree = environment.parse(source)
    texts = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    looked_for = {
        node.expr.value
        for node in tree.find_all(nodes.Compare)
        if isinstance(node.expr, nodes.Const) and isinstance(node.expr.value, str) and any(map(_speaks_of_words, node.ops))
    }
    # words such as a role are written, or compared with other fields
    constants = {text for text in texts if text.strip() and not text.strip().isalnum()} | looked_for
    literals = frozenset([*texts, *(node.data for node in tree.find_all(nodes.TemplateData))])
    return Program(literals, frozenset(filter(str.strip, constants)), any(map(_is_opaque, tree.find_all(nodes.Expr))))


_SAFE = ("trim", "string", "safe", "default", "d", "strip", "lstrip", "rstrip", "startswith", "endswith")
"""Filters and methods that look at the ends of words, which stay in the rendering."""


def _is_opaque(node: nodes.Expr) -> bool:
    """Whether an expression does something to a message's words that no constant shows."""
    if isinstance(node, nodes.Filter):
        return node.node is not None and _speaks_of_words(node.node) and node.name not in _SAFE
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice) and _speaks_of_words(node.node)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and _speaks_of_words(node.node.node):
        blank = any(isinstance(arg, nodes.Const) and not str(arg.value).strip() for arg in node.args)
        other = any(not isinstance(arg, nodes.Const) for arg in node.args)
        return node.node.attr not in _SAFE and (blank or other or not node.args)
    if isinstance(node, nodes.Compare) and any(map(_speaks_of_words, [node.expr, *node.ops])):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        return not all(isinstance(side, nodes.Const) or _speaks_of_words(side) for side in sides) or not any(
            isinstance(side, nodes.Const) for side in sides
        )
    return False


def _speaks_of_words(node: nodes.Node) -> bool:
    """Whether an expression is, or is made of, what a message's `content` holds."""
    inner = [node, *node.find_all((nodes.Getattr, nodes.Getitem, nodes.Name))]
    return any(
        (isinstance(part, nodes.Getattr) and part.attr == "content")
        or (isinstance(part, nodes.Name) and part.name == "content")
        or (isinstance(part, nodes.Getitem) and isinstance(part.arg, nodes.Const) and part.arg.value == "content")
        for part in inner
    )
