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
from modern_llm.config.io import parse_json
from modern_llm.data.local_files import FORMATS, file_format, one_split_only, standard_split
from modern_llm.data.raw_files import COMPRESSIONS, PARQUET, open_text, refuse_other_content

EACH_LINE = "\n"
"""The `document_separator` that makes every line a document."""
PARQUET_ROWS_AT_ONCE = 1000
_BLANK = b"\xef\xbb\xbf \t\r\n"
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


def read_file(
    path: Path,
    bad: BadRows,
    text_field: str = "text",
    document_separator: str | None = None,
    delimiter: str | None = None,
    split: str = "train",
) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: one of `FORMATS`; all but `.parquet` may be compressed.
        bad: told about each row that cannot be read.
        text_field: the column that a `.txt` file's documents get.
        document_separator: the line between two documents of a `.txt` file.
        delimiter: what separates the cells of a `.csv` or `.tsv` file. None: the first line decides.
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
                rows = _csv_rows(path, file, bad, delimiter)
            else:
                rows = _documents(path, file, bad, text_field, document_separator)
            yield from bad.watch(rows)
    except UnicodeDecodeError as error:  # UTF-8 is decoded row by row
        encoding = error.encoding[:6].upper()
        raise UserError(f"{path}: not {encoding}, which its first bytes say: {error.reason}: save it as UTF-8") from None
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
    if _begins_json_file(first):
        yield from _json_file(path, b"\n" * (start - 1) + first + file.read(), bad, split)
        return
    if split != "train":
        raise UserError(one_split_only(path, split))
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


def _begins_json_file(line: bytes) -> bool:
    """True if a first line is the beginning, or the whole, of an indented object or a list of rows."""
    line = line.strip(_BLANK)
    if line[:1] != b"[":
        return line == b"{"
    try:
        return not _is_chat(parse_json(line.decode()))
    except ValueError:
        return True


def _json_file(path: Path, raw: bytes, bad: BadRows, split: str) -> Iterator[Row]:
    """A list of objects, or one object with such a list; or one object a line, as many files of this name are."""
    first, _, rest = raw.strip(_BLANK).partition(b"\n")
    if first[:1] == b"{" and first.rstrip()[-1:] == b"}" and rest:
        yield from _json_lines(path, io.BytesIO(raw), bad, split)
        return
    text = (_decoded(raw, str(path), bad) or "").lstrip("\ufeff")
    try:
        content: Any = parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        why = "more than one JSON value: write each on one line" if error.msg == "Extra data" else error
        raise UserError(f"{path}, line {error.lineno}: not JSON: {why}") from None
    except ValueError as error:  # nested too deeply, or a number of thousands of digits
        raise UserError(f"{path}: not JSON: {error}") from None
    key = _key_of_rows(path, content, split)
    found: Any = content if key is None else content[key]
    if isinstance(found, dict) or _is_chat(found):
        found = [found]
    if not isinstance(found, list):
        raise UserError(f"{path}: must hold a list of objects, not {type(found).__name__}")
    for number, values in enumerate(found):
        yield from _row_of(values, f"{path}, {'' if key is None else f'{key!r} '}row {number}", bad)


def _key_of_rows(path: Path, content: Any, split: str) -> str | None:
    """The key under which a file's one object holds the rows; None where the file is a list, or the object is a row.

    Raises:
        UserError: it has several such keys that are no splits, or not this split.
    """
    lists = []
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list) and isinstance(next(iter(value), None), dict)]
    words = {standard_split(key if len(lists) == 1 else key.partition("_")[0]) for key in lists}
    if lists and words <= {"train", "test", "validation"}:
        found = split if split in lists else {standard_split(key): key for key in lists}.get(standard_split(split))
        if found is None:
            raise UserError(f"split={split!r}: {path} has {lists}")
        return found
    if split != "train":
        raise UserError(one_split_only(path, split))
    if not lists or _LIST_COLUMNS & set(lists):
        return None
    if len(lists) > 1:
        raise UserError(f"{path}: one object with rows under {', '.join(map(repr, lists))}: save each as a file of its own")
    return lists[0]


def _is_chat(value: Any) -> bool:
    """True for a list of messages, which is the only column of its row."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and (first.keys() >= {"role", "content"} or first.keys() >= {"from", "value"})


def _row_of(values: Any, place: str, bad: BadRows) -> Iterator[Row]:
    if _is_chat(values):
        values = {"messages" if "role" in values[0] else "conversations": values}
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
        raise UserError(
            f"{path}, line {len(head)}: cells may be separated by {' or '.join(map(repr, cutting))}: "
            f"set delimiter to one of them"
        )
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
