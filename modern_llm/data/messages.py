"""What a row becomes, a chat or a pair, and how its columns are read. Shared by the adapters of both kinds of data set."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modern_llm.config.io import parse_json

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant" | "tool", "content": text}`. An assistant's may carry `tool_calls`, a list of
`{"type": "function", "function": {"name": text, "arguments": mapping}}`; a tool's may carry its `name`."""

Row = Mapping[str, Any]
"""One row: column to value."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of messages with `role` and `content` (OpenAI, TRL)."""

SHAREGPT_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}
"""Roles of messages with `from` and `value` (ShareGPT, LLaMA-Factory)."""


_TURN = re.compile(r"\n\n(Human|Assistant):")


class RowError(ValueError):
    """What is wrong with a row, by column. It does not know the file and the line: who reads the rows adds them."""


@dataclass(frozen=True)
class Chat:
    """A chat to train on: it ends with an assistant's turn."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """Functions that the assistant may call, each `{"type": "function", "function": {"name": …, …}}`."""


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it, as text."""

    prompt: list[Message]
    chosen: str
    rejected: str


# Columns


def checked_text(value: Any, place: str) -> str:
    """A text that a tokenizer can take.

    Raises:
        RowError: not text, or with half a character in it.
    """
    if not isinstance(value, str):
        raise RowError(f"{place} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{place} holds half a character ({value[error.start]!a}): take it out of the file") from None
    return value


def text_column(row: Row, name: str, remedy: str = "") -> str:
    """The text of a column.

    Args:
        row: of a data set.
        name: the column.
        remedy: what to do where it is missing.

    Raises:
        RowError: the column is missing or holds something else.
    """
    return checked_text(value_of(row, name, remedy), f"column '{name}'")


def value_of(row: Row, name: str, remedy: str = "") -> Any:
    """What a column holds. Raises `RowError`, with the remedy, where it is missing."""
    if name not in row:
        raise RowError(f"no column '{name}' (columns: {column_names(row)})" + (f": {remedy}" if remedy else ""))
    return row[name]


def checked_list(value: Any, place: str, what: str) -> list[Any]:
    """The value if it is a list; `what` says of what, for the error."""
    if not isinstance(value, list):
        raise RowError(f"{place} must be a list of {what}, not {type(value).__name__}")
    return value


def column_names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def first_present(row: Row, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def optional_text(row: Row, names: Sequence[str]) -> str:
    """The first of these columns that has words; empty if none has."""
    texts = [text_column(row, name) for name in names if row.get(name) is not None]
    return next((text for text in texts if text.strip()), "")


def asked_text(row: Row, name: str, material: Sequence[str] = (), remedy: str = "") -> str:
    """The user's words: a column and, below it after a blank line, the columns with what it speaks about."""
    texts = [optional_text(row, [more]) for more in material]
    return "\n\n".join([text_column(row, name, remedy), *filter(None, texts)])


def system_turn(row: Row) -> list[Message]:
    """The system message of a `system` or `system_prompt` column; none if it is blank."""
    text = optional_text(row, ("system", "system_prompt"))
    return [{"role": "system", "content": text}] if text else []


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    """The `tools` column: a list of functions, or JSON of one. None if there are none.

    Raises:
        RowError: it is neither, or a function has no name.
    """
    value = row.get("tools")
    if isinstance(value, str):
        value = _parsed(value, "column 'tools'") if value.strip() else None
    tools = []
    for tool in [value] if isinstance(value, Mapping) else checked_list(value or [], "column 'tools'", "functions"):
        known = isinstance(tool, Mapping)
        function = tool.get("function", tool) if known else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("column 'tools' must be a list of functions, each with a text 'name'")
        checked_text(json.dumps(function, ensure_ascii=False, default=str), "column 'tools'")
        tools.append({"type": "function", "function": dict(function)})
    return tools or None


# Messages


def read_messages(value: Any, place: str) -> list[Message]:
    """A list of messages.

    Raises:
        RowError: it is none, or something in it is no message.
    """
    return [read_message(fields, f"{place} message {n}") for n, fields in enumerate(checked_list(value, place, "messages"))]


def messages_column(row: Row, name: str) -> list[Message]:
    """The messages of a column. Raises `RowError`."""
    return read_messages(value_of(row, name), f"column '{name}'")


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages below the system column, unless they have a system message of their own."""
    return messages if any(message["role"] == "system" for message in messages) else [*system_turn(row), *messages]


def read_message(fields: Any, place: str) -> Message:
    """One message, with `role` and `content`, or with `from` and `value`. Other keys are not read.

    Content is text; a list of `{"type": "text", "text": …}` parts, which are joined; or null next to `tool_calls`.

    Raises:
        RowError: a role that is not known, content that is no text, a call that cannot be read, or an assistant's `weight`
            other than 1: every word of an assistant counts.
    """
    if not isinstance(fields, Mapping):
        raise RowError(f"{place} must have 'role' and 'content', or 'from' and 'value', not be {type(fields).__name__}")
    role_key, content_key, roles = ("from", "value", SHAREGPT_ROLES) if "from" in fields else ("role", "content", ROLES)
    given = fields.get(role_key)
    if not isinstance(given, str) or given not in roles:
        raise RowError(f"{place}: '{role_key}' must be one of {', '.join(roles)}, not {given!r}")
    role, content, calls = roles[given], fields.get(content_key), fields.get("tool_calls")
    if given == "function_call":
        content, calls = "", _parsed(checked_text(content, f"{place}: '{content_key}'"), f"{place}: '{content_key}'")
        calls = [calls] if isinstance(calls, Mapping) else calls
    if calls and role != "assistant":
        raise RowError(f"{place}: only an assistant has 'tool_calls', not {given!r}")
    calls = [_call(call, f"{place} call {n}") for n, call in enumerate(checked_list(calls or [], place, "tool calls"))]
    text = "" if content is None and calls else _content(content, f"{place}: '{content_key}'")
    message: Message = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = calls
    if role == "tool" and fields.get("name") is not None:
        message["name"] = checked_text(fields["name"], f"{place}: 'name'")
    for key in ("weight", "loss_weight"):
        if role == "assistant" and fields.get(key) not in (None, 1):
            raise RowError(f"{place}: '{key}' is {fields[key]!r}: an assistant's turns all count, so it can only be 1")
    return message


def merged(messages: Sequence[Message]) -> list[Message]:
    """Consecutive turns of one speaker as one, a blank line between them, so that speakers alternate.

    Results of tools stay apart: each answers its own call. Words that follow a call stay apart too: in one message they
    would come before it.
    """
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else None
        words_after_call = last is not None and "tool_calls" in last and message["content"].strip()
        if last is None or last["role"] != message["role"] or message["role"] == "tool" or words_after_call:
            turns.append(message)
            continue
        content = "\n\n".join(text for text in (last["content"], message["content"]) if text.strip())
        calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        turns[-1] = {"role": last["role"], "content": content, **({"tool_calls": calls} if calls else {})}
    return turns


def dialogue(text: str) -> list[Message] | None:
    """The turns of an HH-RLHF dialogue; None if the text is not of that form."""
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": words.strip()} for who, words in zip(pieces[1::2], pieces[2::2], strict=True)]


def from_first_question(messages: Sequence[Message]) -> list[Message]:
    """The system messages, and everything from the user's first turn on: what is said before answers nothing that is known."""
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), len(messages))
    return [*(message for message in messages[:first] if message["role"] == "system"), *messages[first:]]


def prompt_text(messages: Sequence[Message]) -> str:
    """What two chats must differ in to count as different prompts."""
    said = [(m["role"], m["content"].strip(), *([m["tool_calls"]] if "tool_calls" in m else ())) for m in messages]
    return json.dumps(said, ensure_ascii=False, default=str)


def _content(value: Any, place: str) -> str:
    if not isinstance(value, list):
        return checked_text(value, place)
    texts = []
    for n, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError(f"{place} part {n} must be of type 'text', not {kind!r}: only text can be trained on")
        text = part.get("text")
        texts.append(checked_text(part.get("value") if text is None else text, f"{place} part {n}"))
    return "".join(texts)


def _call(value: Any, place: str) -> dict[str, Any]:
    """A call as `{"function": {"name", "arguments"}}` or `{"name", "arguments"}`; arguments are a mapping or JSON of one."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{place} must have a text 'name' and 'arguments'")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(arguments, f"{place}: 'arguments'")
    arguments = arguments or {}
    if not isinstance(arguments, Mapping):
        raise RowError(f"{place}: 'arguments' must be a mapping, not {type(arguments).__name__}")
    call = {"name": function["name"], "arguments": dict(arguments)}
    checked_text(json.dumps(call, ensure_ascii=False, default=str), place)
    return {"type": "function", "function": call}


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RowError(f"{place} is no JSON: {error}") from None
