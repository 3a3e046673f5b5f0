"""Where rows come from: local files, the hub, the built-in world. A source can be read again and knows its content's hash."""

import functools
import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from modern_llm.checkpoint import sha256_of_file
from modern_llm.config import UserError
from modern_llm.config.data import DatasetConfig, SourceConfig
from modern_llm.config.memory import MEMORY, memory_rows
from modern_llm.data.local_files import file_format, is_local, is_saved_table, split_files
from modern_llm.data.readers import BadRows, Row, last_line, read_file
from modern_llm.data.village import VILLAGE_NAME, village_rows
from modern_llm.hub import HTTPError, hub

Kind = Literal["text", "instructions", "preferences"]


class Source(Protocol):
    """One split of one data set."""

    left_out: Mapping[str, int] = {}
    """Counts for the report: files that were there and are not read."""

    def fingerprint(self) -> str:
        """sha256 of the content; the same rows under another name or date have the same."""
        ...

    def rows(self, bad: BadRows) -> Iterator[Row]:
        """Every row in its own order."""
        ...


def open_source(name: str, config: SourceConfig, kind: Kind) -> Source:
    """The source of a name.

    Args:
        name: file, folder, glob, hub id, `builtin:village`, or that of data in memory.
        config: with nothing left to inherit.
        kind: what the rows are for.

    Raises:
        UserError: no such file, data set or split.
    """
    split = config.split or "train"
    if name == VILLAGE_NAME:
        source: Source = _Village(kind, split)
    elif name.startswith("builtin:"):
        raise UserError(f"dataset_name={name!r}: the only built-in data set is {VILLAGE_NAME!r}")
    elif is_local(name):
        source = _local(name, config, split)
    else:
        source = _Table(_hub_table(name, config, split), f"{name}[{split}]")
    whole = source.source if isinstance(source, _Part) else source
    if config.delimiter is not None and not (isinstance(whole, _Files) and file_format(whole.files[0]) in (".csv", ".tsv")):
        raise UserError(
            f"delimiter={config.delimiter!r} is for .csv and .tsv files, not for {name}: set it on the sources it is for"
        )
    return source if config.max_rows is None else _Part(source, 0, config.max_rows)


def left_out_files(name: str, config: SourceConfig, kind: Kind) -> Mapping[str, int]:
    """Counts for the report of a source that is streamed: files that are there and not read."""
    return open_source(name, config, kind).left_out if is_local(name) else {}


def _local(name: str, config: SourceConfig, split: str) -> Source:
    path = Path(name).expanduser()
    base, slices = _split_and_slices(split)
    if name.startswith(MEMORY):
        rows, digest = memory_rows(name, base)
        source: Source = _Table(rows, f"{name}[{base}]", digest)
    elif is_saved_table(path):
        source = _saved_table(path, base)
    else:
        source = _Files(*split_files(path, name, base), config, base if path.is_file() else "train")
    if slices is None:
        return source
    total = sum(1 for _ in source.rows(BadRows(skip=True)))
    return _Part(source, *_slice_bounds(split, base, total))


def _split_and_slices(split: str) -> tuple[str, str | None]:
    """`train[:5%]` as `train` and `[:5%]`."""
    base, bracket, rest = split.partition("[")
    return base, bracket + rest or None


def _slice_bounds(split: str, base: str, total: int) -> tuple[int, int]:
    """First row and row behind the last, by the rules of `datasets`, so that a local file and the hub agree."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({base: total})
    except (ValueError, AssertionError) as error:
        raise UserError(f"split={split!r}: {last_line(error)}") from None
    if len(parts) != 1:
        raise UserError(f"split={split!r}: one slice, such as {base}[:5%]")
    return parts[0].from_, parts[0].to


class _Files(Source):
    """Rows of local files, one file after the other."""

    def __init__(self, files: list[Path], left_out: Mapping[str, int], config: SourceConfig, split: str) -> None:
        """
        Args:
            files: of one format.
            left_out: see `Source`.
            config: how to read them.
            split: inside of each file.
        """
        self.files, self.left_out, self.config, self.split = files, left_out, config, split

    def fingerprint(self) -> str:
        try:
            hashes = [(file_format(file), _hash_of(file, *_version_of(file))) for file in self.files]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
        return _digest(hashes, self.config.text_field, self.config.document_separator, self.config.delimiter, self.split)

    def rows(self, bad: BadRows) -> Iterator[Row]:
        return itertools.chain.from_iterable(read_file(file, bad, self.config, self.split) for file in self.files)


def _version_of(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@functools.lru_cache(maxsize=10_000)
def _hash_of(file: Path, size: int, changed: int, number: int) -> str:
    """A file's hash, computed once in a process as long as the file is the same."""
    return sha256_of_file(file)


class _Village(Source):
    """The built-in world."""

    def __init__(self, kind: Kind, split: str) -> None:
        base, slices = _split_and_slices(split)
        try:
            self.found = village_rows(kind, base)  # type: ignore[arg-type] - it names the splits that exist
        except ValueError as error:
            raise UserError(f"split={split!r}: {error}") from None
        if slices is not None:
            first, behind = _slice_bounds(split, base, len(self.found))
            self.found = self.found[first:behind]
        self.split = split

    def fingerprint(self) -> str:
        return _digest(self.found)

    def rows(self, bad: BadRows) -> Iterator[Row]:
        return (Row(values, f"{VILLAGE_NAME}[{self.split}] row {i}") for i, values in enumerate(self.found))


class _Table(Source):
    """An Arrow table of `datasets`: memory-mapped, from the hub or from a saved folder; or rows in memory."""

    def __init__(self, table: Any, name: str, known_digest: str | None = None) -> None:
        self.table, self.name, self.known_digest = table, name, known_digest

    def fingerprint(self) -> str:
        if self.known_digest is not None:
            return self.known_digest
        import pyarrow

        digest = hashlib.sha256()
        with _Hashing(digest) as sink:
            for batch in self.table.with_format("arrow").iter(batch_size=10_000):
                with pyarrow.ipc.new_stream(sink, batch.schema.remove_metadata()) as writer:
                    writer.write_table(batch.replace_schema_metadata(None).combine_chunks())
        return digest.hexdigest()

    def rows(self, bad: BadRows) -> Iterator[Row]:
        return bad.watch(Row(values, f"{self.name} row {i}") for i, values in enumerate(self.table))


class _Hashing(io.RawIOBase):
    """A file that only hashes what is written to it."""

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


class _Part(Source):
    """Some rows of a source."""

    def __init__(self, source: Source, first: int, behind: int) -> None:
        self.source, self.first, self.behind = source, first, behind
        self.left_out = source.left_out

    def fingerprint(self) -> str:
        return _digest(self.source.fingerprint(), self.first, self.behind)

    def rows(self, bad: BadRows) -> Iterator[Row]:
        return itertools.islice(self.source.rows(bad), self.first, self.behind)


def _saved_table(path: Path, split: str) -> _Table:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"dataset_name={str(path)!r}: not a folder saved by datasets: {last_line(error)}") from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise UserError(f"split={split!r}: {path} has {sorted(map(str, saved))}")
        saved = saved[split]
    elif split != "train":
        raise UserError(f"split={split!r}: {path} is one split without a name: use 'train', and eval_fraction to hold rows out")
    assert isinstance(saved, Dataset)
    return _Table(saved, f"{path}[{split}]")


def _hub_table(name: str, config: SourceConfig, split: str, streaming: bool = False) -> Any:
    from datasets import load_dataset
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if name in _PACKAGED_DATASETS_MODULES:  # `json`, `sql`, …: load_dataset would read what lies in the working directory
        raise UserError(f"dataset_name={name!r} is a format of the datasets library and no data set: give a file or a folder")
    try:
        with hub(name, f"dataset_name={name!r}", "dataset"):
            return load_dataset(name, config.dataset_config_name, split=split, streaming=streaming)
    except UserError:
        raise
    except _hub_errors() as error:
        raise UserError(
            f"dataset_name={name!r}: the hub gives no rows of split {split!r} ({type(error).__name__}: {last_line(error)}): "
            f"check split and dataset_config_name"
        ) from None


def stream_rows(name: str, config: SourceConfig, kind: Kind, bad: BadRows) -> Iterator[Row]:
    """The rows of a source, without ever storing or hashing it; hub data sets are streamed.

    Raises:
        UserError: as `open_source`, or the hub stops answering on the way.
    """
    if name.startswith("builtin:") or is_local(name):
        return open_source(name, config, kind).rows(bad)
    return bad.watch(_streamed_rows(name, config, config.split or "train"))


def _streamed_rows(name: str, config: SourceConfig, split: str) -> Iterator[Row]:
    table = iter(_hub_table(name, config, split, streaming=True))
    for number in itertools.count() if config.max_rows is None else range(config.max_rows):
        try:
            values = next(table)
        except StopIteration:
            return
        except _hub_errors() as error:
            raise UserError(f"{name}[{split}] row {number}: the hub gave no more ({last_line(error)})") from None
        yield Row(values, f"{name}[{split}] row {number}")


def _hub_errors() -> tuple[type[Exception], ...]:
    """What `datasets` 5.x raises where a data set cannot be had; ConnectionError and FileNotFoundError are OSErrors."""
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, RuntimeError, DatasetsError, HTTPError)


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


@functools.cache
def preparation_version() -> str:
    """sha256 of the code that turns rows into tokens, and the versions of the libraries it calls: part of every cache key."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for library in ("tokenizers", "transformers", "jinja2"):
        digest.update(f"{library} {version(library)};".encode())
    return digest.hexdigest()


def is_held_out(key: int, config: DatasetConfig) -> bool:
    """Whether a prompt of this hash belongs to the evaluation part."""
    return key in _held_out_keys(config)


def are_held_out(keys: np.ndarray, config: DatasetConfig) -> np.ndarray:
    """`is_held_out` of many: (n,) bool."""
    held_out = _held_out_keys(config)
    if not held_out:
        return np.zeros(len(keys), dtype=bool)
    return (keys >= np.uint64(held_out.start)) & (keys <= np.uint64(held_out.stop - 1))


def _held_out_keys(config: DatasetConfig) -> range:
    """Hashes of the evaluation part. Parts next to each other share a bound, so no prompt is in two of them or in none."""
    first, behind = (math.ceil((config.eval_fold + part) * config.eval_fraction * 2**64) for part in (0, 1))
    return range(first, min(behind, 2**64))
