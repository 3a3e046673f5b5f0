"""Where rows come from: local files, the hub, the built-in world. Every row knows how to name itself in an error."""

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from modern_llm.config import UserError
from modern_llm.config.data import DatasetConfig, MoreDocuments
from modern_llm.data.village import VILLAGE_NAME, village_rows
from modern_llm.hub import hub

Kind = Literal["text", "instructions", "preferences"]
SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")


@dataclass(frozen=True)
class Rows:
    """Rows of one split, each a mapping from column to value."""

    rows: list[dict[str, Any]]
    place: Callable[[int], str]
    """Names row i for an error, as exactly as its source allows: file and line, or data set, split and row."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return iter(enumerate(self.rows))


Source = DatasetConfig | MoreDocuments
"""What names a source of rows."""


def load_rows(source: Source, kind: Kind, split: str) -> Rows:
    """All rows of a split, in their own order.

    Raises:
        UserError: no such file or data set, an unreadable row (by file and line), or no row at all.
    """
    name = source.dataset_name
    if name == VILLAGE_NAME:
        try:
            found = village_rows(kind, split)  # type: ignore[arg-type] - it names the splits that exist
        except ValueError as error:
            raise UserError(f"split={split!r}: {error}") from None
        rows = Rows(found, lambda i: f"{name}[{split}] row {i}")
    elif name.startswith("builtin:"):
        raise UserError(f"dataset_name={name!r}: the only built-in data set is {VILLAGE_NAME!r}")
    elif _looks_local(name):
        rows = _local_rows(Path(name), source, split)
    else:
        rows = _hub_rows(source, split)
    if source.max_rows is not None:
        rows = Rows(rows.rows[: source.max_rows], rows.place)
    if not len(rows):
        raise UserError(f"dataset_name={name!r}: split {split!r} has no rows")
    return rows


def joined(parts: list[Rows]) -> Rows:
    """Rows of several sources, one after the other."""
    owners = [(part, i) for part in parts for i in range(len(part))]
    return Rows([row for part in parts for row in part.rows], lambda i: owners[i][0].place(owners[i][1]))


def prompt_hash(text: str) -> int:
    """A 64-bit hash of a prompt, the same on every machine: decides who is held out, and who meets whom."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big")


def is_held_out(key: int, fraction: float) -> bool:
    """Whether a prompt of this hash belongs to the evaluation part."""
    return key < fraction * 2**64


def _suffix(path: Path) -> str:
    """The suffix that says what is in the file, `.gz` taken off."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _looks_local(name: str) -> bool:
    path = Path(name)
    return path.exists() or _suffix(path) in SUFFIXES or name.startswith(("/", "./", "../", "~"))


def _local_rows(path: Path, source: Source, split: str) -> Rows:
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"dataset_name={str(path)!r}: no such file")
    if path.is_dir():
        return _saved_dataset(path, split)
    if split != "train":
        raise UserError(
            f"split={split!r}: {path} is one file and has the one split 'train'; use eval_fraction to hold rows out"
        )
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise UserError(f"dataset_name={str(path)!r}: the file must end in {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _parquet_rows(path)
    try:
        with _open(path, newline="" if suffix == ".csv" else None) as file:
            if suffix == ".jsonl":
                return _json_lines(path, file)
            if suffix == ".csv":
                return _csv_rows(path, file)
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return _json_array(path, text) if suffix == ".json" else _documents(path, text, source)


def _open(path: Path, newline: str | None) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline=newline)
    return path.open(encoding="utf-8", newline=newline)


def _json_lines(path: Path, file: IO[str]) -> Rows:
    rows, lines = [], []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: must be an object, not {type(row).__name__}")
        rows.append(row)
        lines.append(number)
    return Rows(rows, lambda i: f"{path}, line {lines[i]}")


def _json_array(path: Path, text: str) -> Rows:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: must hold a list of objects")
    return Rows(rows, lambda i: f"{path}, row {i}")


def _documents(path: Path, text: str, source: Source) -> Rows:
    """A text file as documents, split at lines equal to the separator."""
    separator: str | None = getattr(source, "document_separator", None)
    field: str = getattr(source, "text_field", "text")
    documents, lines, start = [], [], 0
    split_lines = re.split("(?<=\n)", text)  # `splitlines` would end lines at form feeds and U+2028 too
    for number, line in enumerate([*split_lines, None]):
        if line is None or (separator is not None and line.strip() == separator):
            document = "".join(split_lines[start:number]).strip()
            if document:
                documents.append({field: document})
                lines.append(start + 1)
            start = number + 1
    return Rows(documents, lambda i: f"{path}, line {lines[i]}")


def _csv_rows(path: Path, file: IO[str]) -> Rows:
    """Every cell is text, whatever it looks like: `NA` and `7` are answers."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(file, strict=True)
    rows, lines, line = [], [], 1
    try:
        columns = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(columns):
                raise UserError(f"{path}, line {line}: {len(cells)} cells under the {len(columns)} columns of the first line")
            if cells:
                rows.append(dict(zip(columns, cells, strict=True)))
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV: {error}") from None
    return Rows(rows, lambda i: f"{path}, line {lines[i]}")


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as .parquet: {_last_line(error)}") from None
    return Rows(rows, lambda i: f"{path}, row {i}")


def _saved_dataset(path: Path, split: str) -> Rows:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"dataset_name={str(path)!r}: not a folder saved by datasets: {_last_line(error)}") from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise UserError(f"split={split!r}: {path} has {sorted(map(str, saved))}")
        saved = saved[split]
    elif split != "train":
        raise UserError(f"split={split!r}: {path} is one split without a name: use 'train', and eval_fraction to hold rows out")
    assert isinstance(saved, Dataset)
    return Rows(list(saved), lambda i: f"{path}[{split}] row {i}")  # type: ignore[arg-type]


def _hub_rows(source: Source, split: str) -> Rows:
    from datasets import load_dataset

    name = source.dataset_name
    try:
        with hub():
            found = load_dataset(name, source.dataset_config_name, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError and FileNotFoundError are OSErrors
        raise UserError(
            f"dataset_name={name!r}: no such file, and the hub did not give a data set of that name and split {split!r} "
            f"({type(error).__name__}: {_last_line(error)}): check the spelling, or the network"
        ) from None
    return Rows(list(found), lambda i: f"{name}[{split}] row {i}")  # type: ignore[arg-type]


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
