"""Prepared examples on disk: token files that are memory-mapped, built once, found again by their content's key.

A store is a folder of plain arrays. It is written under a temporary name and renamed when complete, so a killed build leaves
nothing that looks finished, and two runs that build the same one at once both end with a whole one. The key is a hash of all
that decides the tokens: the rows, the code that reads them, the tokenizer, the template and the limits; never a name or a date.
"""

import hashlib
import json
import os
import shutil
import socket
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from modern_llm.checkpoint import publish_folder, storing
from modern_llm.config.io import read_json
from modern_llm.config.paths import CACHE_VARIABLE as CACHE_VARIABLE
from modern_llm.config.paths import cache_folder
from modern_llm.layout import Segment

INDEX = "index.json"
FORMAT = 1

# what is known of each example besides its tokens
CUT_END, CUT_START, ENDS_WITH_END_TOKEN = 1, 2, 4


class StoreWriter:
    """Appends examples to a folder. Tokens go straight to disk; what stays in memory is 8 bytes a segment, 33 an example."""

    def __init__(self, folder: Path, vocab_size: int, all_scored: bool) -> None:
        """
        Args:
            folder: exists and is empty.
            vocab_size: decides the bytes of a token.
            all_scored: every token counts (documents), so no mask is kept.
        """
        self.folder, self.all_scored = folder, all_scored
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
        self.tokens = (folder / "tokens.bin").open("wb")
        self.scored = None if all_scored else (folder / "scored.bin").open("wb")
        self.digest = hashlib.sha256()
        self.num_tokens = self.num_segments = 0
        self.arrays = {name: array(code) for name, code in _ARRAYS.items()}

    def add(self, segments: Iterable[tuple[np.ndarray, np.ndarray | None]], row: int, key: int, flags: int = 0) -> None:
        """Append an example.

        Args:
            segments: ids and mask of each; None where `all_scored`.
            row: number of its row in the source.
            key: 64-bit hash of its prompt.
            flags: `CUT_END` and others.
        """
        num_scored = 0
        for ids, scored in segments:
            data = np.ascontiguousarray(ids, dtype=self.dtype).data
            self.tokens.write(data)
            self.digest.update(data)
            if self.scored is None:
                num_scored += len(ids) - 1
            else:
                assert scored is not None
                mask = np.ascontiguousarray(scored, dtype=bool).data
                self.scored.write(mask)
                self.digest.update(mask)
                num_scored += int(scored[1:].sum())
            self.num_tokens += len(ids)
            self.num_segments += 1
            self.arrays["segment_ends"].append(self.num_tokens)
        self.arrays["example_ends"].append(self.num_segments)
        self.arrays["num_scored"].append(num_scored)
        self.arrays["rows"].append(row)
        self.arrays["keys"].append(key)
        self.arrays["flags"].append(flags)

    def close(self, report: dict[str, Any]) -> None:
        """Write the arrays and, last, the index."""
        self.tokens.close()
        if self.scored is not None:
            self.scored.close()
        for name, values in self.arrays.items():
            found = np.frombuffer(values, dtype=_ARRAYS[name]) if len(values) else np.zeros(0, dtype=_ARRAYS[name])
            np.save(self.folder / f"{name}.npy", found, allow_pickle=False)
            self.digest.update(name.encode())
            self.digest.update(found.data)
        files = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        index = {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "all_scored": self.all_scored,
            "content": self.digest.hexdigest(),
            "report": report,
            "files": files,
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


_ARRAYS = {"segment_ends": "q", "example_ends": "q", "num_scored": "q", "rows": "q", "keys": "Q", "flags": "B"}


class Store:
    """A finished folder, read through memory maps: opening it costs nothing that grows with the tokens."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ValueError: the folder is not complete.
        """
        self.folder = folder
        index = read_json(folder / INDEX)
        for name, size in index["files"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{folder / name} has {(folder / name).stat().st_size} bytes, not {size}")
        if index["dtype"] not in ("uint16", "int32"):  # tokens of another type would be read as pointers (object)
            raise ValueError(f"{folder / INDEX}: no tokens are of type {index['dtype']!r}")
        self.content: str = index["content"]
        self.report: dict[str, Any] = index["report"]
        self.tokens = _mapped(folder / "tokens.bin", np.dtype(index["dtype"]))
        self.scored = None if index["all_scored"] else _mapped(folder / "scored.bin", np.dtype(bool))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        self.segment_ends, self.example_ends = arrays["segment_ends"], arrays["example_ends"]
        self.num_scored, self.rows, self.keys, self.flags = (arrays[n] for n in ("num_scored", "rows", "keys", "flags"))

    def __len__(self) -> int:
        return len(self.example_ends)

    def example_tokens(self) -> np.ndarray:
        """(examples,) int64 tokens of each example."""
        ends = self.segment_ends[self.example_ends - 1] if len(self) else np.zeros(0, dtype=np.int64)
        return np.diff(ends, prepend=0)

    def segments(self, example: int) -> tuple[Segment, ...]:
        """The segments of an example."""
        first = int(self.example_ends[example - 1]) if example else 0
        return tuple(self.segment(i) for i in range(first, int(self.example_ends[example])))

    def segment(self, i: int, start: int = 0, behind: int | None = None) -> Segment:
        """Segment i, or its tokens from `start` to before `behind`."""
        first = int(self.segment_ends[i - 1]) if i else 0
        behind = int(self.segment_ends[i]) - first if behind is None else behind
        ids = self.tokens[first + start : first + behind]
        if self.scored is None:
            return Segment(ids, np.ones(len(ids), dtype=bool))
        return Segment(ids, self.scored[first + start : first + behind])


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def stored(key: dict[str, Any], build: Callable[[Path], None]) -> Store:
    """The store of a key; built if it is not there.

    Args:
        key: everything that decides the content, as JSON.
        build: fills an empty folder by a `StoreWriter`, and closes it. What it raises goes through, and nothing is kept.

    Raises:
        StorageError: the cache folder does not take it.
    """
    name = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / name
    litter_name = scratch_name(name)
    if folder.is_dir():  # it got this name when it was complete
        try:
            return Store(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged since
            with suppress(FileNotFoundError):  # another run saw it too and was first
                folder.rename(folder.with_name(litter_name))
            shutil.rmtree(folder.with_name(litter_name), ignore_errors=True)
    with storing(folder):  # readers of the rows raise errors of their own
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_litter_of_the_dead(folder.parent)
        scratch = folder.with_name(litter_name)
        scratch.mkdir()
        try:
            build(scratch)
            publish_folder(scratch, folder, replace=False)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Store(folder)


def scratch_name(name: str) -> str:
    """The name of what this process is writing, to be called `name` when it is whole."""
    return f".{name}.{socket.gethostname()}.{os.getpid()}.{os.urandom(4).hex()}.partial"


def remove_litter_of_the_dead(parent: Path) -> None:
    """Remove what killed processes of this machine left half-written in a folder that several may write to."""
    prefix = f".{socket.gethostname()}."
    for path in parent.glob(".*.partial"):
        _, found, rest = path.name.partition(prefix)
        process = rest.split(".")[0]
        if found and process.isdigit() and not _is_alive(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
