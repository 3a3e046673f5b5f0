"""Local files as rows, one at a time: one reader for each format. Every row knows its file and line.

A file is never held whole, but for `.json` (one array) and a `.txt` without a separator (one document).
"""

import csv
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from modern_llm.config import UserError
from modern_llm.config.data import SourceConfig
from modern_llm.config.io import parse_json
from modern_llm.data.local_files import FORMATS, SPLIT_WORDS, file_format, standard_split
from modern_llm.data.raw_files import COMPRESSIONS, PARQUET, open_text, refuse_other_content

EACH_LINE = "\n"
"""The `document_separator` that makes every line a document."""
PARQUET_ROWS_AT_ONCE = 1000
_BLANK = b"\xef\xbb\xbf \t\r\n"
_CHAT = re.compile(rb'\[\s*\{\s*"(role|from|content|value)"')
_DELIMITERS = (",", ";", "\t")
_LIST_COLUMNS = {
    "messages", "conversations", "conversation", "dialog", "dialogue", "turns", "history", "tools", "prompt", "prompts",
    "completion", "completions", "response", "responses", "answers", "replies", "chosen", "rejected",
}  # fmt: skip
"""Columns of rows that hold lists of objects: an object with one of them is a row, not a file's table of rows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, and where it is."""

    values: dict[str, Any]
    place: str
    """File and line, or data set, split and row: as exactly as the source allows."""


class BadRows:
    """What becomes of rows that cannot be read: the first one is an error, or all are counted."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.count = 0
        self.any_good = False
        """A row was used before: not all of them are bad in the same way."""

    def __call__(self, message: str) -> None:
        """Report a row.

        Raises:
            UserError: bad rows are not to be skipped.
        """
        if not self.skip:
            hint = " (if only some rows are like this, on_bad_row: skip leaves them out)" if self.any_good else ""
            raise UserError(message + hint)
        self.count += 1

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on; when the next one is asked for, nothing was wrong with the last, or it was counted."""
        for row in rows:
            yield row
            self.any_good = True


def read_file(path: Path, bad: BadRows, config: SourceConfig, split: str = "train") -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: one of `FORMATS`; all but `.parquet` may be compressed.
        bad: told about each row that cannot be read.
        config: names the column of a `.txt` file's documents, the line between them, and the delimiter of a table.
        split: of a `.json` file that holds one object with a list of rows for each split.

    Raises:
        UserError: the file cannot be read or is of another kind, or a row cannot be read and is not to be skipped.
    """
    kind = file_format(path)
    if kind not in FORMATS or (kind == ".parquet" and path.suffix != kind):
        raise UserError(f"{path}: the file must end in {', '.join(FORMATS)}, each but .parquet also with .gz or .zst behind it")
    if kind == ".parquet":
        yield from bad.watch(_parquet_rows(path, bad))
        return
    try:
        with open_text(path) as file:
            if kind == ".jsonl":
                rows = _json_lines(path, file, bad, split)
            elif kind == ".json":
                rows = _json_file(path, file.read(), bad, split)
            elif kind in (".csv", ".tsv"):
                rows = _csv_rows(path, file, bad, config.delimiter)
            else:
                rows = _documents(path, file, bad, config.text_field or "text", config.document_separator)
            yield from bad.watch(rows)
    except UnicodeDecodeError as error:  # UTF-8 is decoded row by row
        raise UserError(f"{path}: not {error.encoding}, which its first bytes say: {error.reason}: save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        bad(f"{path}: cannot be read{' to its end' if path.suffix in COMPRESSIONS else ''}: {error}")


def _decoded(raw: bytes, place: str, bad: BadRows) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad(f"{place}: not UTF-8: byte {raw[error.start]:#04x} at position {error.start}: save the file as UTF-8")
        return None


def _json_lines(path: Path, file: BinaryIO, bad: BadRows, split: str) -> Iterator[Row]:
    """One object a line; or one JSON value over several lines, as some files of this name are."""
    start, first = 1, file.readline()
    while first and not first.strip(_BLANK):
        start, first = start + 1, file.readline()
    if first.strip(_BLANK) == b"{" or (first.strip(_BLANK)[:1] == b"[" and not _CHAT.search(first)):
        yield from _json_file(path, b"\n" * (start - 1) + first + file.read(), bad, split)
        return
    if split != "train":
        raise UserError(f"split={split!r}: {path} has ['train']")
    for number, raw in enumerate(itertools.chain([first], file), start):
        place = f"{path}, line {number}"
        line = _decoded(raw, place, bad)
        if line is None or not line.strip("\ufeff \t\r\n"):
            continue
        try:
            values = parse_json(line.lstrip("\ufeff"))
        except ValueError as error:
            # the message's own line number is that within the line
            why = f"{error.msg} (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else error
            bad(f"{place}: not JSON: {why}")
            continue
        yield from _row_of(values, place, bad)


def _json_file(path: Path, raw: bytes, bad: BadRows, split: str) -> Iterator[Row]:
    """A list of objects, or one object with such a list; or one object a line, as many files of this name are."""
    first, _, rest = raw.strip(_BLANK).partition(b"\n")
    ends = first[:1] + first.rstrip()[-1:]
    if rest and (ends == b"{}" or (ends == b"[]" and _CHAT.match(first))):
        yield from _json_lines(path, io.BytesIO(raw), bad, split)
        return
    text = (_decoded(raw, str(path), BadRows(skip=False)) or "").lstrip("\ufeff")  # all rows would be skipped as one
    try:
        content = parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        why = "more than one JSON value: write each on one line" if error.msg == "Extra data" else error
        raise UserError(f"{path}, line {error.lineno}: not JSON: {why}") from None
    except ValueError as error:  # nested too deeply, or a number of thousands of digits
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict | list):
        raise UserError(f"{path}: must hold a list of objects, not {type(content).__name__}")
    by_split = _lists_of(path, content) if isinstance(content, dict) else {"train": content}
    found = by_split.get(split, {standard_split(key): rows for key, rows in by_split.items()}.get(standard_split(split)))
    if found is None:
        raise UserError(f"split={split!r}: {path} has {list(by_split)}")
    for number, values in enumerate(found):
        yield from _row_of(values, f"{path}, row {number}", bad)


def _lists_of(path: Path, content: dict[str, Any]) -> dict[str, list[Any]]:
    """The rows of a file's one object by split: its one list of objects, such a list for each split, or the object itself.

    Raises:
        UserError: it has several lists that are no splits.
    """
    lists = {key: value for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    if not lists or _LIST_COLUMNS & lists.keys():
        return {"train": [content]}
    if len(lists) == 1 and standard_split(next(iter(lists)).partition("_")[0]) not in SPLIT_WORDS:
        return {"train": next(iter(lists.values()))}
    if any(standard_split(key.partition("_")[0]) not in SPLIT_WORDS for key in lists):
        raise UserError(f"{path}: one object with rows under {', '.join(map(repr, lists))}: save each as a file of its own")
    return lists


def _row_of(values: Any, place: str, bad: BadRows) -> Iterator[Row]:
    first = values[0] if isinstance(values, list) and values else None
    if isinstance(first, dict) and ("role" in first or "from" in first):  # the one column of a chat
        values = {"messages" if "role" in first else "conversations": values}
    if isinstance(values, dict):
        yield Row(values, place)
    else:
        bad(f"{place}: must be an object, not {type(values).__name__}")


def _csv_rows(path: Path, file: BinaryIO, bad: BadRows, delimiter: str | None) -> Iterator[Row]:
    """Every cell is text, whatever it looks like: `NA` and `7` are answers."""
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    head = [lines.readline()]
    while head[-1] and not head[-1].strip("\r\n"):
        head.append(lines.readline())
    delimiter = delimiter or _delimiter_of(path, head)
    reader = csv.reader(itertools.chain(head, lines), strict=True, delimiter=delimiter)
    columns: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on behind the line
            cells, problem = [], f"not CSV: {error}"
        else:
            problem = "not UTF-8: save the file as UTF-8" if any(re.search("[\udc80-\udcff]", c) for c in cells) else None
        if columns is None and (problem is not None or len(set(cells)) < len(cells)):  # nobody knows what the rows are called
            raise UserError(f"{place}: {problem or 'two columns have one name: ' + ', '.join(cells)}")
        if problem is None and columns and cells and len(cells) != len(columns):
            problem = f"{len(cells)} cells under the {len(columns)} columns of the first line, separated by {delimiter!r}"
        if problem is not None:
            bad(f"{place}: {problem}")
        elif columns is None:
            columns = cells or None
        elif cells:
            yield Row(dict(zip(columns, cells, strict=True)), place)


def _delimiter_of(path: Path, head: list[str]) -> str:
    """The one delimiter that cuts the first line into cells; a comma where none does.

    Raises:
        UserError: several do.
    """
    cutting = [c for c in _DELIMITERS if len(next(csv.reader(head[-1:], delimiter=c), [])) > 1]
    if file_format(path) == ".tsv" and "\t" in cutting:
        return "\t"
    if len(cutting) > 1:
        raise UserError(f"{path}, line {len(head)}: {' or '.join(map(repr, cutting))} may separate the cells: set delimiter")
    return cutting[0] if cutting else ","


def _documents(path: Path, file: BinaryIO, bad: BadRows, field: str, separator: str | None) -> Iterator[Row]:
    """A text file as documents, split at lines equal to the separator. Only `\\n` ends a line."""
    lines: list[bytes] = []
    start = 1

    def document() -> Iterator[Row]:
        place = f"{path}, line {start}"
        text = _decoded(b"".join(lines), place, bad)
        if text is not None and text.strip("\ufeff \t\r\n"):
            yield Row({field: text.lstrip("\ufeff").strip()}, place)

    mark = None if separator is None else separator.strip().encode()
    for number, line in enumerate(file, start=1):
        if separator == EACH_LINE:
            lines, start = [line], number
            yield from document()
        elif mark is not None and line.strip() == mark:
            yield from document()
            lines, start = [], number + 1
        else:
            lines.append(line)
    if separator != EACH_LINE:
        yield from document()


def _parquet_rows(path: Path, bad: BadRows) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        refuse_other_content(path, PARQUET)
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS_AT_ONCE):
                yield from _batch_rows(batch, path, number, bad)
                number += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as .parquet: {last_line(error)}") from None


def _batch_rows(batch: Any, path: Path, first: int, bad: BadRows) -> Iterator[Row]:
    """The rows of an Arrow batch; where one has no Python value (a date out of range, text that is not UTF-8), row by row."""
    try:
        every = batch.to_pylist()
    except (ValueError, OverflowError):
        every = None
    for i in range(len(batch)):
        place = f"{path}, row {first + i}"
        try:
            values = batch.slice(i, 1).to_pylist()[0] if every is None else every[i]
        except (ValueError, OverflowError) as error:
            bad(f"{place}: cannot be read: {last_line(error)}")
            continue
        yield Row(values, place)


def last_line(error: Exception) -> str:
    """The last line of an error's message: libraries put the reason there."""
    text = str(error).strip()
    return text.splitlines()[-1][:200] if text else type(error).__name__
