"""Which local files are a split of a data set: the rules of the hub (`datasets.data_files`), and nothing left out unseen."""

import glob
import re
from collections.abc import Mapping
from pathlib import Path

from modern_llm.config import UserError
from modern_llm.config.data import DatasetConfig
from modern_llm.config.memory import MEMORY
from modern_llm.data.raw_files import COMPRESSIONS

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_OTHER_ENDINGS = {".raw": ".txt", ".ndjson": ".jsonl", ".jsonlines": ".jsonl"}
"""Other endings of formats; `.raw` is WikiText's."""

SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_WORD = rf"(?:{'|'.join(word for words in SPLIT_WORDS.values() for word in words)})"
_SHARD = r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*$"
_RULES = (
    rf"^data/{_SHARD}",
    rf"(?:^|[-._ 0-9/])({_WORD})(?:[-._ 0-9][^/]*)?/",
    rf"(?:^|/)(?={_WORD}[-._ 0-9]){_SHARD}|(?:^|[-._ 0-9/])({_WORD})[-._ 0-9][^/]*$",
)
"""Rules of the hub: shards in `data/`, folders, file names. Unlike there, a shard elsewhere is of the split that it names
(`train_sft`), a name of two splits is of the first alone, and capitals do not matter: a model would be trained on `Test`."""
_NO_ROWS = re.compile(r"(?i)(readme|licen[cs]e)(\.(md|txt|rst))?|.*\.(md|py)|(dataset_infos?|dataset_dict|config|state)\.json")
MAX_NAMES = 5
"""Files that a report names; more are only counted."""


def file_format(path: Path) -> str:
    """The ending that says what is in a file, compression taken off."""
    suffix = (Path(path.stem) if path.suffix in COMPRESSIONS else path).suffix
    return _OTHER_ENDINGS.get(suffix, suffix)


def standard_split(name: str) -> str:
    """`validation` for `dev`, and so on; any other name as it is."""
    return next((split for split, words in SPLIT_WORDS.items() if name.lower() in words), name)


def is_glob(name: str) -> bool:
    return bool(set("*?[") & set(name))


def is_local(name: str) -> bool:
    path = Path(name)
    return path.exists() or is_glob(name) or file_format(path) in FORMATS or name.startswith(("/", "./", "../", "~", MEMORY))


def is_saved_table(path: Path) -> bool:
    """True for a folder saved by `datasets`."""
    return any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))


def check_files(config: DatasetConfig) -> None:
    """Refuse local files that are not there, or not of the split, without reading any.

    Raises:
        UserError: see `split_files`.
    """
    for name, source in [*config.sources().items(), *(config.eval_sources() or {}).items()]:
        if is_local(name) and not name.startswith(MEMORY) and not is_saved_table(Path(name)):
            split_files(Path(name), name, (source.split or "train").partition("[")[0])


def split_files(path: Path, name: str, split: str) -> tuple[list[Path], dict[str, int]]:
    """The files of a split in the order of their names, and counts of the others for the report.

    Those of no split and those of no known format are `left_out[NAME]`; the rest are `files_of_other_splits`.

    Args:
        path: the file, folder or pattern, expanded.
        name: as the user wrote it.
        split: without a slice.

    Raises:
        UserError: no file, several formats, or no such split.
    """
    if path.is_file():
        if split != "train" and file_format(path) != ".json":  # whose splits may be its keys
            raise UserError(f"split={split!r}: {path} is one file, the split 'train': hold rows out with eval_fraction")
        return [path], {}
    if path.is_dir():
        every = [file for file in sorted(path.rglob("*")) if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    elif is_glob(name):
        every = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    else:
        raise UserError(f"dataset_name={str(path)!r}: no such file")
    named = {file: file.relative_to(path).as_posix() if path.is_dir() else file.name for file in every if file.is_file()}
    named = {file: label for file, label in named.items() if not _NO_ROWS.fullmatch(file.name)}
    rows = {file: label for file, label in named.items() if file_format(file) in FORMATS}
    if not rows:
        endings = f"{', '.join(FORMATS)} (or one of them with {' or '.join(COMPRESSIONS)})"
        raise UserError(f"dataset_name={name!r}: {'' if every else 'nothing is there: '}no file there ends in {endings}")
    by_split = _by_split(rows)
    files = by_split.get(split) or by_split.get(standard_split(split)) or []
    filled = [file for file in files if file.stat().st_size]
    read = {*filled, *(file for its in by_split.values() for file in its if its is not files)}
    unread = [label for file, label in named.items() if file not in read]
    names = ", ".join(unread[:MAX_NAMES])
    if not files:
        in_none = f" (in none: {names})" if unread else ""
        raise UserError(f"split={split!r}: {name} has {sorted(by_split)} by the names of its files{in_none}: name one of them")
    if not filled:
        raise UserError(f"dataset_name={name!r}: has no rows: all files are empty (0 bytes): {names}")
    formats = sorted({file_format(file) for file in files})
    if len(formats) > 1:
        raise UserError(f"dataset_name={name!r}: several formats ({', '.join(formats)}): give a glob, such as '*{formats[0]}'")
    left_out = {f"left_out[{label}]": 1 for label in unread[:MAX_NAMES]}
    left_out |= {"left_out[more files]": len(unread) - MAX_NAMES, "files_of_other_splits": len(read) - len(filled)}
    return filled, {name: count for name, count in left_out.items() if count > 0}


def _by_split(rows: Mapping[Path, str]) -> dict[str, list[Path]]:
    """Files by split. The first rule that finds any decides alone; without any, all are `train`."""
    for rule in _RULES:
        found: dict[str, list[Path]] = {}
        for file, label in rows.items():
            if match := re.search(rule, label, re.IGNORECASE):
                found.setdefault(standard_split(match[match.lastindex or 0]), []).append(file)
        if found:
            return found
    return {"train": list(rows)}
