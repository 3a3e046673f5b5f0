"""A row's columns in standard form, and how they are read. Shared by every layout of demonstrations and preferences."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modern_llm.config.data import ChatDatasetConfig
from modern_llm.config.io import parse_json

MEDIA_COLUMNS = {"image", "images", "video", "videos", "audio", "audios"}
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "history")
"""Columns that may hold messages, besides those that a config names."""
MEANINGFUL_COLUMNS = {
    *("system", "system_prompt", "history", "tools", "functions", "input", "context", "documents"),
    *("question", "instruction", "inputs", "choices", "options"),
    *("reasoning_content", "reasoning", "thinking", "label", "labels", "kto_tag"),
    *("train", "trainable", "training", "loss", "loss_mask", "loss_weight", "weight", "mask", "masked"),
}
"""Columns that change what a row means: counted as `ignored_…` where the layout does not read them. All others (ids, sources,
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
_ROLE = re.compile(r"""["'](role|from)["']\s*:""")


class RowError(ValueError):
    """What is wrong with a row, by column. It does not know the file and the line: who reads the rows adds them."""


_FIELDS = ("prompt_field", "response_field", "chosen_field", "rejected_field")
_OPENS = frozenset("[{")
"""First letters of a list or a mapping that is written as text."""


class Columns(dict[str, Any]):
    """One row: column to value, in standard names and without nulls. Remembers what was read, for `findings`."""

    def __init__(self, values: Mapping[str, Any], config: ChatDatasetConfig | None = None) -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})
        self.nulls = [name for name, value in values.items() if value is None]
        self.roles: Mapping[str, str] = (config and config.roles) or {}
        self.renamed = set((config and config.columns) or ())
        self.found: set[str] = set()
        """Names of counts for the report."""
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:  # type: ignore[override] - the dict's own would not remember it
        """Value of a column, or the default."""
        self.read.add(name)
        return super().get(name, default)

    @classmethod
    def standard(cls, row: Mapping[str, Any], config: ChatDatasetConfig) -> "Columns":
        """Return a row as every layout expects it: columns renamed, nulls taken out, messages that are written as text read.

        Raises:
            RowError: a column of `config.columns` is absent, or the row holds images, sound or video.
        """
        if isinstance(row, Columns):
            return row
        renamed = config.columns or {}
        if absent := next((name for name in renamed.values() if name not in row), None):
            raise RowError(f"no column {absent!r}, which 'columns' of the config names (columns: {', '.join(map(str, row))})")
        kept = {name: value for name, value in row.items() if name not in renamed and name not in renamed.values()}
        columns = cls({**kept, **{standard: row[name] for standard, name in renamed.items()}}, config)
        for name in MEDIA_COLUMNS & {*columns, *columns.nulls}:
            if not is_empty(dict.get(columns, name)) or f"<{name.rstrip('s')}>" in str(dict(columns)):
                raise RowError(
                    f"column {name!r} belongs to the row's words: only text can be trained on, so leave such rows out"
                )
        # asking a model of pydantic for a field that it has not is slow
        named = [getattr(config, field) for field in _FIELDS if field in type(config).model_fields]
        for name in columns.keys() & {*MESSAGE_COLUMNS, *filter(None, named)}:
            text = dict.get(columns, name)
            if not isinstance(text, str) or text.lstrip()[:1] not in _OPENS:
                continue
            if (messages := columns._messages_in(text, pairs=name == "history")) is not None:
                columns[name] = messages
                columns.found.add("found_messages_as_text")
        return columns

    def _messages_in(self, text: str, pairs: bool) -> Any:
        """The messages, or `[question, answer]` pairs, that a text spells out as JSON or Python; None if it is only text."""
        if not (pairs or _ROLE.search(text)):
            return None
        for parse in (parse_json, ast.literal_eval):
            try:
                value = parse(text.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(value, Mapping) and value.get("role") not in (None, "assistant"):
                return None  # an answer that is about a message
            entries = value if isinstance(value, list) else [value]
            return value if all(self._is_message(entry) or (pairs and isinstance(entry, list)) for entry in entries) else None
        self.found.update(() if pairs else ("found_text_like_messages",))
        return None

    def _is_message(self, value: Any) -> bool:
        if not isinstance(value, Mapping):
            return False
        role, keys = value.get("from", value.get("role")), {"content", "value", "tool_calls"}
        return role in (*ROLES, *SHAREGPT_ROLES, *self.roles) and not keys.isdisjoint(value)

    def required(self, name: str, remedy: str = "") -> Any:
        """Value of a column. Raises `RowError`, with the remedy, where it is missing."""
        if name not in self:
            what = f"column '{name}' is null" if name in self.nulls else f"no column '{name}' (columns: {self.names()})"
            raise RowError(what + (f": {remedy}" if remedy else ""))
        return self[name]

    def text(self, name: str, remedy: str = "") -> str:
        """The text of a column.

        Args:
            name: the column.
            remedy: what to do where it is missing.

        Raises:
            RowError: the column is missing or holds something else.
        """
        return checked_text(self.required(name, remedy), f"column '{name}'")

    def optional_text(self, *names: str) -> str:
        """The first of these columns that has words; empty if none has."""
        texts = [self.text(name) for name in names if name in self]
        return next((text for text in texts if text.strip()), "")

    def asked_text(self, name: str, material: Sequence[str] = (), remedy: str = "") -> str:
        """The user's words: a column and, below it after a blank line, the columns with what it speaks about."""
        return "\n\n".join([self.text(name, remedy), *filter(None, map(self.optional_text, material))])

    def first(self, names: Sequence[str]) -> str | None:
        """The first of these columns that is there."""
        return next((name for name in names if name in self), None)

    def names(self) -> str:
        """The columns, for errors; those that are null apart."""
        names = ", ".join(map(str, self)) or "none"
        return f"{names}; null: {', '.join(map(str, self.nulls))}" if self.nulls else names

    def findings(self) -> tuple[str, ...]:
        """Names of counts for the report; among them `ignored_…` for each meaningful column that the layout did not read."""
        unread = [name for name in self.keys() - self.read if name in MEANINGFUL_COLUMNS or name in self.renamed]
        return tuple(sorted({*self.found, *(f"ignored_{name}" for name in unread if not is_empty(dict.get(self, name)))}))


def is_empty(value: Any) -> bool:
    """Return True for null and for what has no characters or entries. Zero and false are values."""
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def without_nulls(value: Any) -> Any:
    """Drop keys that are null from mappings, however deep: Arrow gives every row the keys of all rows."""
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


def checked_list(value: Any, place: str, what: str) -> list[Any]:
    """The value if it is a list; `what` says of what, for the error."""
    if not isinstance(value, list):
        raise RowError(f"{place} must be a list of {what}, not {type(value).__name__}")
    return value
