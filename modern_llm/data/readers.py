"""Local files as rows, one at a time: one reader for each format. Every row knows its file and line.

A file is never held whole, but for `.json` (one array) and a `.txt` without a separator (one document).
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from modern_llm.config import UserError
from modern_llm.config.io import parse_json

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
EACH_LINE = "\n"
"""The `document_separator` that makes every line a document."""
PARQUET_ROWS_AT_ONCE = 1000


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

    def __call__(self, message: str) -> None:
        """Report a row.

        Raises:
            UserError: bad rows are not to be skipped.
        """
        if not self.skip:
            raise UserError(f"{message} (if only some rows are like this, on_bad_row: skip leaves them out)")
        self.count += 1


def file_format(path: Path) -> str:
    """The suffix that says what is in a file, compression taken off; `.raw` (WikiText) is plain text."""
    suffix = (Path(path.stem) if path.suffix in COMPRESSIONS else path).suffix
    return ".txt" if suffix == ".raw" else suffix


def read_file(path: Path, bad: BadRows, text_field: str = "text", document_separator: str | None = None) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: one of `FORMATS`; all but `.parquet` may be compressed.
        bad: told about each row that cannot be read.
        text_field: the column that a `.txt` file's documents get.
        document_separator: the line between two documents of a `.txt` file.

    Raises:
        UserError: the file cannot be read, or a row cannot and is not to be skipped.
    """
    kind = file_format(path)
    if kind not in FORMATS or (kind == ".parquet" and path.suffix != kind):
        raise UserError(f"{path}: the file must end in {', '.join(FORMATS)}, each but .parquet also with .gz or .zst behind it")
    if kind == ".parquet":
        yield from _parquet_rows(path, bad)
        return
    try:
        with _open(path) as file:
            if kind == ".jsonl":
                yield from _json_lines(path, file, bad)
            elif kind == ".json":
                yield from _json_file(path, file, bad)
            elif kind == ".csv":
                yield from _csv_rows(path, file, bad)
            else:
                yield from _documents(path, file, bad, text_field, document_separator)
    except (OSError, EOFError, zlib.error) as error:
        bad(f"{path}: cannot be read{' to its end' if path.suffix in COMPRESSIONS else ''}: {error}")


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(_Zstandard(pyarrow.input_stream(str(path), compression="zstd")), 1 << 20)  # type: ignore[arg-type]
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """pyarrow's decompressor as a raw file. (`readinto` of its own streams copies twice, and `io` needs `readable`.)"""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _decoded(raw: bytes, place: str, bad: BadRows) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad(f"{place}: not UTF-8: byte {raw[error.start]:#04x} at position {error.start}")
        return None


def _json_lines(path: Path, file: BinaryIO, bad: BadRows) -> Iterator[Row]:
    for number, raw in enumerate(file, start=1):
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
        if isinstance(values, dict):
            yield Row(values, place)
        else:
            bad(f"{place}: must be an object, not {type(values).__name__}")


def _json_file(path: Path, file: BinaryIO, bad: BadRows) -> Iterator[Row]:
    """A list of objects; or one object a line, as many files of this name are."""
    raw = file.read()
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        yield from _json_lines(path, io.BytesIO(raw), bad)
        return
    text = (_decoded(raw, str(path), bad) or "").lstrip("\ufeff")
    try:
        found = parse_json(text) if text.strip() else []
    except json.JSONDecodeError as error:
        return bad(f"{path}, line {error.lineno}: not JSON: {error}")
    except ValueError as error:  # nested too deeply, or a number of thousands of digits
        return bad(f"{path}: not JSON: {error}")
    if not isinstance(found, list):
        return bad(f"{path}: must hold a list of objects, not {type(found).__name__}")
    for number, values in enumerate(found):
        if isinstance(values, dict):
            yield Row(values, f"{path}, row {number}")
        else:
            bad(f"{path}, row {number}: must be an object, not {type(values).__name__}")


def _csv_rows(path: Path, file: BinaryIO, bad: BadRows) -> Iterator[Row]:
    """Every cell is text, whatever it looks like: `NA` and `7` are answers."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""), strict=True)
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
            problem = "not UTF-8" if any(re.search("[\udc80-\udcff]", cell) for cell in cells) else None
        if problem is None and columns and cells and len(cells) != len(columns):
            problem = f"{len(cells)} cells under the {len(columns)} columns of the first line"
        if problem is not None:
            bad(f"{place}: {problem}")
            if columns is None:  # nobody knows what the rows are called
                return
        elif columns is None:
            columns = cells or None
            if len(set(cells)) < len(cells):
                bad(f"{place}: two columns have one name: {', '.join(cells)}")
                return
        elif cells:
            yield Row(dict(zip(columns, cells, strict=True)), place)


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
