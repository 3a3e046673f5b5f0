"""What a row becomes, a chat or a pair, and how messages are read. Shared by the layouts of both kinds of data set."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modern_llm.config.io import parse_json
from modern_llm.data.columns import (
    MEDIA_COLUMNS,
    ROLES,
    SHAREGPT_ROLES,
    Columns,
    RowError,
    checked_list,
    checked_text,
    without_nulls,
)

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant" | "tool", "content": text}`. An assistant's may carry `tool_calls`, a list of
`{"type": "function", "function": {"name": text, "arguments": mapping}}`; `reasoning_content`, text that it thought before; and
`"train": False` if its words do not count. A tool's may carry its `name` and the `tool_call_id` that it answers."""

TRAIN_KEYS = ("train", "trainable", "training", "loss", "loss_mask", "weight", "loss_weight")
"""Keys of an answer that say true or 1 where it counts (axolotl, ms-swift, verl, OpenAI, LLaMA-Factory)."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
READ_KEYS = {
    "assistant": {*TRAIN_KEYS, *REASONING_KEYS, "masked", "tool_calls", "function_call", "refusal"},
    "tool": {"name", "tool_call_id"},
}
"""Keys that are read, by role, besides `role` and `content`, or `from` and `value`."""
HARMLESS_KEYS = {
    *("id", "message_id", "parent_id", "uuid", "index", "turn", "turn_id", "turn_identifier", "hash", "rank"),
    *("timestamp", "created_at", "updated_at", "date", "time", "model", "author", "source", "country", "state", "hashed_ip"),
    *("header", "lang", "language", "toxic", "redacted", "moderation", "finish_reason", "stop_reason", "usage", "tokens"),
    *("num_tokens", "token_count", "logprobs", "score", "rating", "metadata", "info"),
}
"""Keys of a message that only describe it. Others that are not read are counted as `ignored_…`."""
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Chat:
    """A chat to train on: it ends with an assistant's turn."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """Functions that the assistant may call, each `{"type": "function", "function": {"name": …, …}}`."""
    found: tuple[str, ...] = ()
    """Names of counts for the report: what was noticed in the row."""


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it, each an assistant's message."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[dict[str, Any]] | None = None
    """Functions that the assistant may call, in the form of `Chat.tools`."""

    @functools.cached_property
    def prompt_key(self) -> int:
        """Hash of the prompt."""
        return prompt_hash(prompt_text(self.prompt))


def prompt_hash(text: str) -> int:
    """A 64-bit hash of a prompt, the same on every machine: decides who is held out, and who meets whom."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")


# Columns


def system_turn(row: Columns) -> list[Message]:
    """The system message of a `system` or `system_prompt` column; none if it is blank."""
    text = row.optional_text("system", "system_prompt")
    return [{"role": "system", "content": text}] if text else []


def history(row: Columns) -> list[Message]:
    """The turns of a `history` column: `[question, answer]` pairs (ChatGLM, LLaMA-Factory), or messages.

    Raises:
        RowError: it is something else.
    """
    turns: list[Message] = []
    entries = checked_list(row.get("history") or [], "column 'history'", "[question, answer] pairs or messages")
    for n, entry in enumerate(entries):
        place = f"column 'history' entry {n}"
        if isinstance(entry, Mapping):
            turns.append(read_message(entry, place, row))
            continue
        if len(checked_list(entry, place, "a question and an answer")) != 2:
            raise RowError(f"{place} must be a question and an answer, not {len(entry)} texts")
        for role, text in zip(("user", "assistant"), entry, strict=True):
            turns.append({"role": role, "content": checked_text(text, place)})
    return turns


def read_tools(row: Columns) -> list[dict[str, Any]] | None:
    """The `tools` column (or `functions`): a list of functions, or JSON of one. None if there are none.

    Functions in a list stay as they are, for the chat template; in JSON, and those of `functions`, they become
    `{"type": "function", "function": …}`. Nulls are left out and counted as in arguments of calls.

    Raises:
        RowError: it is neither, or a function has no name.
    """
    column = "tools" if row.get("tools") else "functions"
    value, place = row.get(column), f"column {column!r}"
    if not value:
        return None
    wraps = isinstance(value, str) or column == "functions"
    if isinstance(value, str):
        value = _parsed(value, place) if value.strip() else None
    elif value != (value := without_nulls(value)):
        row.found.add("found_nulls_in_tools")
    tools = []
    for tool in [value] if isinstance(value, Mapping) else checked_list(value or [], place, "functions"):
        known = isinstance(tool, Mapping)
        function = tool.get("function", tool) if known else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{place} must be a list of functions, each with a text 'name'")
        checked_text(json.dumps(function, ensure_ascii=False, default=str), place)
        tools.append({"type": "function", "function": dict(function)} if wraps else dict(tool))
    return tools or None


# Messages


def read_messages(value: Any, place: str, row: Columns) -> list[Message]:
    """A list of messages of a row.

    Raises:
        RowError: it is none, or something in it is no message.
    """
    messages = checked_list(value, place, "messages")
    return [read_message(fields, f"{place} message {n}", row) for n, fields in enumerate(messages)]


def messages_column(row: Columns, name: str) -> list[Message]:
    """The messages of a column. Raises `RowError`."""
    return read_messages(row.required(name), f"column '{name}'", row)


def with_system(row: Columns, messages: list[Message]) -> list[Message]:
    """The messages below the system column, unless they have a system message of their own."""
    return messages if any(message["role"] == "system" for message in messages) else [*system_turn(row), *messages]


def read_message(fields: Any, place: str, row: Columns) -> Message:
    """One message, with `role` and `content`, or with `from` and `value`. Keys that are null are absent.

    Content is text; a list of `{"type": "text", "text": …}` parts, which are joined; or absent next to calls or a `refusal`,
    which is what the assistant said then. Calls are `tool_calls`, OpenAI's former `function_call`, or the value of a turn from
    `function_call`. `row` has the roles of its data set, and is told which keys were left out.

    Raises:
        RowError: a role that is not known, content that is no text, a call that cannot be read, two keys that contradict each
            other, or one that says neither that an answer counts nor that it does not.
    """
    if not isinstance(fields, Mapping):
        raise RowError(f"{place} must have 'role' and 'content', or 'from' and 'value', not be {type(fields).__name__}")
    fields = {key: value for key, value in fields.items() if value is not None}
    role_key, content_key, roles = ("from", "value", SHAREGPT_ROLES) if "from" in fields else ("role", "content", ROLES)
    given = fields.get(role_key)
    given = row.roles.get(given, given) if isinstance(given, str) else given
    if not isinstance(given, str) or given not in roles:
        expected = ", ".join(roles)
        raise RowError(f"{place}: '{role_key}' must be one of {expected}, not {given!r}: 'roles' of the config may name others")
    role, content, calls = roles[given], fields.get(content_key), fields.get("tool_calls")
    if given == "function_call":
        content, calls = "", _parsed(checked_text(content, f"{place}: '{content_key}'"), f"{place}: '{content_key}'")
        calls = [calls] if isinstance(calls, Mapping) else calls
    calls = [*checked_list(calls or [], place, "tool calls"), *filter(None, [fields.get("function_call")])]
    if calls and role != "assistant":
        raise RowError(f"{place}: only an assistant has 'tool_calls', not {given!r}")
    calls = [_call(call, f"{place} call {n}", row) for n, call in enumerate(calls)]
    if role == "assistant" and "refusal" in fields:
        content = _only_one({content_key: content, "refusal": fields["refusal"]}, place)
    text = "" if content is None and calls else _content(content, f"{place}: '{content_key}'")
    message: Message = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: checked_text(fields[key], f"{place}: '{key}'") for key in READ_KEYS[role] & fields.keys()}
    more = fields.keys() - {role_key, content_key}
    if role == "assistant" and more:
        if thought := _only_one({key: fields.get(key) for key in REASONING_KEYS}, place):
            message["reasoning_content"] = checked_text(thought, f"{place}: the thought")
        if not _counts(fields, place):
            message["train"] = False
    for key in more and more - READ_KEYS.get(role, set()) - HARMLESS_KEYS:
        if key in MEDIA_COLUMNS and fields[key]:
            raise RowError(f"{place}: '{key}' is no text, and only text can be trained on: leave such rows out")
        if fields[key]:
            row.found.add(f"ignored_{key}")
    return message


def _only_one(values: Mapping[str, Any], place: str) -> Any:
    """Value of the one key that has any, or of several that say the same; the first if none has.

    Raises:
        RowError: two keys say different things.
    """
    said = {key: value for key, value in values.items() if value}
    if any(value != first for first in list(said.values())[:1] for value in said.values()):
        raise RowError(f"{place}: {' and '.join(map(repr, said))} say different things: leave one of them out")
    return next(iter((said or values).values()))


def _counts(fields: Mapping[str, Any], place: str) -> bool:
    """Return True if an answer counts: none of its `TRAIN_KEYS` says no, and `masked` (torchtune) does not say yes.

    Raises:
        RowError: a weight in between, or `mask`, which means in some data sets that an answer counts, in others the reverse.
    """
    if "mask" in fields:
        raise RowError(
            f"{place}: 'mask' has two meanings: rename it to 'train' (true: it counts) or 'masked' (true: it does not)"
        )
    verdicts = [True]
    for key in fields.keys() & {*TRAIN_KEYS, "masked"}:
        value = fields[key]
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RowError(f"{place}: '{key}' is {value!r}: an answer counts as a whole (1, true) or not at all (0, false)")
        verdicts.append(bool(value) == (key != "masked"))
    return all(verdicts)


def has_words(message: Message) -> bool:
    """Return True if a message says, calls or thinks something."""
    return bool(message["content"].strip() or "tool_calls" in message or "reasoning_content" in message)


def merged(messages: Sequence[Message]) -> list[Message]:
    """Consecutive turns of one speaker as one, a blank line between them, so that speakers alternate.

    Results of tools stay apart: each answers its own call. Words that follow a call stay apart too: in one message they
    would come before it. So do an answer that counts and one that does not, and what is said before a thought.
    """
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else None
        words_after_call = last is not None and "tool_calls" in last and message["content"].strip()
        apart = words_after_call or message["role"] == "tool" or "reasoning_content" in message
        if last is None or last["role"] != message["role"] or last.get("train") != message.get("train") or apart:
            turns.append(message)
            continue
        content = "\n\n".join(text for text in (last["content"], message["content"]) if text.strip())
        calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
        turns[-1] = {**last, "content": content, **({"tool_calls": calls} if calls else {})}
    return turns


def dialogue(text: str) -> list[Message] | None:
    """The turns of an HH-RLHF dialogue; None if the text is not of that form."""
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": words.strip()} for who, words in zip(pieces[1::2], pieces[2::2], strict=True)]


def from_first_question(messages: Sequence[Message], row: Columns) -> list[Message]:
    """The system messages, and everything from the user's first turn on: what is said before answers nothing that is known."""
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), len(messages))
    before = [message for message in messages[:first] if message["role"] == "system"]
    if len(before) < first < len(messages):
        row.found.add("found_answer_before_the_first_question")
    return [*before, *messages[first:]]


def prompt_text(messages: Sequence[Message]) -> str:
    """What two chats must differ in to count as different prompts."""
    said = []
    for m in messages:
        # ids of calls are drawn at random
        calls = [{key: call[key] for key in ("type", "function")} for call in m.get("tool_calls", ())]
        thoughts = [m["reasoning_content"]] if "reasoning_content" in m else []
        said.append((m["role"], m["content"].strip(), *([calls] if calls else []), *thoughts))
    return json.dumps(said, ensure_ascii=False, default=str)


def answer_text(answer: Message) -> str:
    """Text by which answers are compared: the words; with a call or a thought, JSON of all."""
    return answer["content"] if set(answer) <= {"role", "content", "train"} else prompt_text([answer])


def _content(value: Any, place: str) -> str:
    if not isinstance(value, list):
        return checked_text(value, place)
    texts = []
    for n, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "refusal"):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError(f"{place} part {n} must be of type 'text', not {kind!r}: only text can be trained on")
        text = next((part[key] for key in ("text", "value", "refusal") if part.get(key) is not None), None)
        texts.append(checked_text(text, f"{place} part {n}"))
    return "".join(texts)


def _call(value: Any, place: str, row: Columns) -> dict[str, Any]:
    """A call as `{"function": {"name", "arguments"}}` or `{"name", "arguments"}`.

    Arguments are a mapping or JSON of one, and may be called `parameters` (Llama 3) or `input` (Anthropic).

    Nulls in a mapping are left out and counted: Arrow fills in the arguments of all other calls. Those in JSON text stay.
    """
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{place} must have a text 'name' and 'arguments'")
    named = [name for name in ("arguments", "parameters", "input") if function.get(name) is not None]
    if len(named) > 1:
        raise RowError(f"{place} has {' and '.join(map(repr, named))}: which are its arguments?")
    arguments = function[named[0]] if named else None
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(arguments, f"{place}: 'arguments'")
    elif arguments != (arguments := without_nulls(arguments)):
        row.found.add("found_nulls_in_arguments")
    arguments = arguments or {}
    if not isinstance(arguments, Mapping):
        raise RowError(f"{place}: 'arguments' must be a mapping, not {type(arguments).__name__}")
    call = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    if isinstance(value.get("id"), str):
        call["id"] = value["id"]
    checked_text(json.dumps(call, ensure_ascii=False, default=str), place)
    return call


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RowError(f"{place} is no JSON: {error}") from None
