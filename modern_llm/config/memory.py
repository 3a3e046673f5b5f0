"""Data of a Python script, registered under a hash of its content, so that a config names it in one word."""

import copy
import datetime
import decimal
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from modern_llm.config.base import UserError
from modern_llm.config.paths import expanded_name

MEMORY = "memory:"
"""How names of data in memory begin."""


@dataclass(frozen=True)
class MemoryRows:
    """One split of a data set in memory."""

    rows: Iterable[Mapping[str, Any]]
    digest: str
    """sha256 of the rows; the order of columns does not matter."""


_REGISTERED: dict[str, dict[str, MemoryRows]] = {}
"""Splits of every data set of this process, by name."""


def memory_rows(name: str, split: str) -> MemoryRows:
    """The rows that a script gave under a name.

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
        ValueError: a row that is no dict or holds other values than JSON has, or a stream.
    """
    datasets = sys.modules.get("datasets")  # nobody has a Dataset who has not imported it
    if datasets is not None and isinstance(value, datasets.DatasetDict):
        splits = {str(name): table.with_format(None) for name, table in value.items()}
    elif datasets is not None and isinstance(value, datasets.Dataset):
        splits = {"train": value.with_format(None)}
    elif datasets is not None and isinstance(value, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise ValueError("a stream of datasets cannot be hashed: give its name and streaming, or a Dataset")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        splits = {"train": copy.deepcopy(value)}
    else:
        return value
    held = {name: MemoryRows(rows, _digest(rows)) for name, rows in splits.items()}
    whole = hashlib.sha256(json.dumps({name: rows.digest for name, rows in held.items()}, sort_keys=True).encode())
    name = MEMORY + whole.hexdigest()[:16]
    _REGISTERED[name] = held
    return name


def _digest(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} must be a dict, not {type(row).__name__}")
        try:
            digest.update(json.dumps(row, sort_keys=True, default=_plain).encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number}: {error}: rows hold text, numbers, lists and dicts") from None
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has in place of a value that Arrow and numpy have."""
    if isinstance(value, bytes | datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return repr(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}")


DatasetName = Annotated[str, BeforeValidator(lambda value: expanded_name(register(value)))]
"""Field that names a file, folder, hub id or something built in, or takes data in memory."""
