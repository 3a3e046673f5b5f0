"""A row's columns in standard form, and how they are read. Shared by every layout of demonstrations and preferences."""

import ast
import re
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

from modern_llm.config.data import ChatDatasetConfig
from modern_llm.config.io import parse_json

MEDIA_COLUMNS = {"image", "images", "video", "videos", "audio", "audios"}
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "history")
"""Columns that may hold messages, besides those that a config names."""
MEANINGFUL_COLUMNS = {
    *("system", "system_prompt", "history", "tools", "functions", "input", "context", "documents"),
    *("reasoning_content", "reasoning", "thinking", "label", "labels", "kto_tag"),
    *("train", "trainable", "training", "loss", "loss_mask", "loss_weight", "weight", "mask", "masked"),
}
"""Columns that change what a row means: a layout that does not read one of them says so by a count. All others (ids, sources,
categories, languages, scores, copies of the prompt, …) are taken for notes about the row."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"} | dict.fromkeys(
    ("tool", "function"), "tool"
)
"""Roles of messages with `role` and `content` (OpenAI, TRL)."""

SHAREGPT_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}
"""Roles of messages with `from` and `value` (ShareGPT, LLaMA-Factory)."""
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|from)["']\s*:\s*["'](user|human|system|assistant|gpt)["']""")


class RowError(ValueError):
    """What is wrong with a row, by column. It does not know the file and the line: who reads the rows adds them."""


class Columns(UserDict[str, Any]):
    """One row: column to value, in standard names and without nulls. Remembers what was read, for `findings`."""

    def __init__(self, values: Mapping[str, Any], config: ChatDatasetConfig | None = None) -> None:
        self.data = {name: value for name, value in values.items() if value is not None}
        self.nulls = [name for name, value in values.items() if value is None]
        self.roles: Mapping[str, str] = (config and config.roles) or {}
        self.renamed = set((config and config.columns) or ())
        self.found: set[str] = set()
        """Counts for the report, by name."""
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    @classmethod
    def standard(cls, row: Mapping[str, Any], config: ChatDatasetConfig) -> "Columns":
        """A row as every layout expects it: columns renamed, nulls taken out, messages that were written as text read.

        Raises:
            RowError: a column of `config.columns` is absent, or the row holds images, sound or video.
        """
        if isinstance(row, Columns):
            return row
        renamed = config.columns or {}
        if absent := next((name for name in renamed.values() if name not in row), None):
            raise RowError(f"no column {absent!r}, which 'columns' of the config names (columns: {column_names(row)})")
        kept = {name: value for name, value in row.items() if name not in renamed and name not in renamed.values()}
        columns = cls({**kept, **{standard: row[name] for standard, name in renamed.items()}}, config)
        for name in MEDIA_COLUMNS & {*columns, *columns.nulls}:
            if not is_empty(columns.data.get(name)) or f"<{name.rstrip('s')}>" in str(columns.data):
                raise RowError(
                    f"column {name!r} belongs to the row's words: only text can be trained on, so leave such rows out"
                )
        fields = (getattr(config, f"{word}_field", None) for word in ("prompt", "response", "chosen", "rejected"))
        for name in {*MESSAGE_COLUMNS, *filter(None, fields)}:
            text = columns.data.get(name)
            if isinstance(text, str) and (messages := columns._messages_in(text, pairs=name == "history")) is not None:
                columns[name] = messages
                columns.found.add("found_messages_as_text")
            elif isinstance(text, str) and _LOOKS_LIKE_MESSAGES.match(text):
                columns.found.add("found_text_like_messages")
        return columns

    def _messages_in(self, text: str, pairs: bool) -> Any:
        """The messages, or `[question, answer]` pairs, that a text spells out as JSON or Python; None if it is only text."""
        for parse in (parse_json, ast.literal_eval) if text.lstrip()[:1] in ("[", "{") else ():
            try:
                value = parse(text.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            entries = value if isinstance(value, list) else [value]
            if entries and all(self._is_message(entry) or (pairs and isinstance(entry, list)) for entry in entries):
                return value
        return None

    def _is_message(self, value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        role, keys = value.get("from", value.get("role")), {"content", "value", "tool_calls"}
        return role in (*ROLES, *SHAREGPT_ROLES, *self.roles) and not keys.isdisjoint(value)

    def required(self, name: str, remedy: str = "") -> Any:
        """What a column holds. Raises `RowError`, with the remedy, where it is missing."""
        if name not in self:
            what = f"column '{name}' is null" if name in self.nulls else f"no column '{name}' (columns: {column_names(self)})"
            raise RowError(what + (f": {remedy}" if remedy else ""))
        return self[name]

    def findings(self) -> tuple[str, ...]:
        """Names of counts for the report; among them `ignored_…` for each meaningful column that the layout did not read."""
        unread = [name for name in self.data.keys() - self.read if name in MEANINGFUL_COLUMNS or name in self.renamed]
        return tuple(sorted({*self.found, *(f"ignored_{name}" for name in unread if not is_empty(self.data[name]))}))


def is_empty(value: Any) -> bool:
    """Nothing is said by it: null, or no characters or entries. Zero and false say something."""
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def without_nulls(value: Any) -> Any:
    """Mappings in it, however deep, without keys that are null: Arrow gives every row the keys of all rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(more) for key, more in value.items() if more is not None}
    return [without_nulls(more) for more in value] if isinstance(value, list) else value


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


def text_column(row: Columns, name: str, remedy: str = "") -> str:
    """The text of a column.

    Args:
        row: of a data set.
        name: the column.
        remedy: what to do where it is missing.

    Raises:
        RowError: the column is missing or holds something else.
    """
    return checked_text(row.required(name, remedy), f"column '{name}'")


def checked_list(value: Any, place: str, what: str) -> list[Any]:
    """The value if it is a list; `what` says of what, for the error."""
    if not isinstance(value, list):
        raise RowError(f"{place} must be a list of {what}, not {type(value).__name__}")
    return value


def column_names(row: Mapping[str, Any]) -> str:
    """The columns of a row, for errors; those that are null apart."""
    names, nulls = ", ".join(map(str, row)) or "none", getattr(row, "nulls", ())
    return f"{names}; null: {', '.join(nulls)}" if nulls else names


def first_present(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def optional_text(row: Columns, names: Sequence[str]) -> str:
    """The first of these columns that has words; empty if none has."""
    texts = [text_column(row, name) for name in names if row.get(name) is not None]
    return next((text for text in texts if text.strip()), "")


def asked_text(row: Columns, name: str, material: Sequence[str] = (), remedy: str = "") -> str:
    """The user's words: a column and, below it after a blank line, the columns with what it speaks about."""
    texts = [optional_text(row, [more]) for more in material]
    return "\n\n".join([text_column(row, name, remedy), *filter(None, texts)])
