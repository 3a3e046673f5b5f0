"""Data of a Python script, registered under a hash of its content, so that a config names it in one word."""

import copy
import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator

from modern_llm.config.base import UserError
from modern_llm.config.paths import Name

MEMORY = "memory:"
"""How names of data in memory begin."""


_REGISTERED: dict[str, dict[str, tuple[Iterable[dict[str, Any]], str]]] = {}
"""Rows and their sha256 of every split of every data set of this process, by name."""


def memory_rows(name: str, split: str) -> tuple[Iterable[dict[str, Any]], str]:
    """The rows that a script gave under a name, and their sha256. The order of columns does not matter to it.

    Raises:
        UserError: another process has them, or there is no such split.
    """
    splits = _REGISTERED.get(name)
    if splits is None:
        raise UserError(f"dataset_name={name!r} is data of a Python script, not of this process: save it to a file")
    if split not in splits:
        raise UserError(f"split={split!r}: {name} has {sorted(splits)}")
    return splits[split]


def register(value: Any) -> Any:
    """The name of data in memory: a list of row dicts, a `Dataset` or a `DatasetDict`. Anything else comes back as it is.

    Raises:
        ValueError: a row is no dict.
    """
    datasets = sys.modules.get("datasets")  # nobody has a Dataset who has not imported it
    if isinstance(value, list) and value and isinstance(value[0], dict):
        splits: dict[str, Iterable[Any]] = {"train": copy.deepcopy(value)}
    elif datasets is not None and isinstance(value, datasets.Dataset | datasets.DatasetDict):
        tables: Any = value if isinstance(value, dict) else {"train": value}
        splits = {str(split): table.with_format(None) for split, table in tables.items()}
    else:
        return value
    digests = {split: _digest(rows) for split, rows in sorted(splits.items())}
    name = MEMORY + hashlib.sha256(repr(digests).encode()).hexdigest()[:16]
    _REGISTERED[name] = {split: (rows, digests[split]) for split, rows in splits.items()}
    return name


def _digest(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} must be a dict, not {type(row).__name__}")
        if not all(isinstance(name, str) for name in row):
            raise ValueError(f"row {number}: names of columns must be text, not {[n for n in row if not isinstance(n, str)]}")
        digest.update(json.dumps(sorted(row.items()), default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has in place of an array, or of a date or the like."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)


DatasetName = Annotated[Name, BeforeValidator(register)]
"""Field that names a file, folder, hub id or something built in, or takes data in memory."""
