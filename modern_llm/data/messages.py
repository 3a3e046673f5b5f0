"""From the columns of a row to messages: one pure function for each layout that rows come in."""

import json
import re
from collections.abc import Mapping
from typing import Any

from modern_llm.config import UserError
from modern_llm.data.chat import Message
from modern_llm.data.prepared import checked_text, text_column
from modern_llm.data.sources import Rows

ROLES = ("system", "user", "assistant")
_TURN = re.compile(r"\n\n(Human|Assistant):")


def user_message(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def checked_messages(rows: Rows, i: int, field: str) -> list[Message]:
    """A column that holds a list of messages.

    Raises:
        UserError: something in it is no message, by file, line and field.
    """
    value = rows.rows[i].get(field)
    messages = []
    for number, message in enumerate(value if isinstance(value, list) else [value]):
        fields = message if isinstance(message, Mapping) else {}
        if fields.get("role") not in ROLES or not isinstance(fields.get("content"), str):
            raise UserError(
                f"{rows.place(i)}: '{field}' message {number} must have a 'role' out of {', '.join(ROLES)} and a text 'content'"
            )
        content = checked_text(fields["content"], f"{rows.place(i)}: '{field}' message {number}")
        messages.append({"role": fields["role"], "content": content})
    return messages


def instruction_text(rows: Rows, i: int, field: str) -> str:
    """An instruction with the optional `input` column below it (Alpaca's layout)."""
    text = text_column(rows, i, field)
    if field != "instruction" or rows.rows[i].get("input") is None:
        return text
    more = text_column(rows, i, "input")
    return f"{text}\n\n{more}" if more.strip() else text


def hh_messages(text: str) -> list[Message] | None:
    """The turns of an HH-RLHF dialogue; None if the text is not of that form."""
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": words.strip()} for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def first_present(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def prompt_text(messages: list[Message]) -> str:
    """What two chats must differ in to count as different prompts."""
    return json.dumps([(message["role"], message["content"].strip()) for message in messages], ensure_ascii=False)
