"""Which local files are a split of a data set: the rules of the hub (`datasets.data_files`), and nothing left out unseen."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from modern_llm.config import UserError
from modern_llm.data.raw_files import COMPRESSIONS

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_OTHER_ENDINGS = {".raw": ".txt", ".ndjson": ".jsonl", ".jsonlines": ".jsonl"}
"""Other endings of formats; `.raw` is WikiText's."""

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SEPARATOR = r"[-._ 0-9]"
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json", "state.json"}
_DOCUMENTATION = re.compile(r"(readme|licen[cs]e|changelog|citation)\b.*|.*\.(md|py)", re.IGNORECASE)
MAX_NAMES = 5
"""Files that a report names; more are only counted."""


@dataclass(frozen=True)
class SplitFiles:
    """Files of one split, in the order of their names, and what of the folder is not among them."""

    files: Sequence[Path]
    left_out: Mapping[str, int]
    """Counts for the report: `left_out[NAME]` for files of no split or no known format, and `files_of_other_splits`."""


def file_format(path: Path) -> str:
    """The ending that says what is in a file, compression taken off."""
    suffix = (Path(path.stem) if path.suffix in COMPRESSIONS else path).suffix
    return _OTHER_ENDINGS.get(suffix, suffix)


def standard_split(name: str) -> str:
    """`validation` for `dev`, and so on; any other name as it is."""
    return next((split for split, words in _SPLIT_WORDS.items() if name in words), name)


def is_glob(name: str) -> bool:
    return bool(set("*?[") & set(name))


def split_files(path: Path, name: str, split: str) -> SplitFiles:
    """The files of a split.

    Args:
        path: the file, folder or pattern, expanded.
        name: as the user wrote it.
        split: without a slice.

    Raises:
        UserError: no file, several formats, or no such split.
    """
    if path.is_file():
        if split != "train" and file_format(path) != ".json":  # whose splits may be its keys
            raise UserError(one_split_only(path, split))
        if not path.stat().st_size:
            raise UserError(f"{path}: has no rows: the file is empty (0 bytes)")
        return SplitFiles([path], {})
    if path.is_dir():
        every = [file for file in sorted(path.rglob("*")) if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    elif is_glob(name):
        every = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    else:
        raise UserError(f"dataset_name={str(path)!r}: no such file")
    named = {file: str(file.relative_to(path)) if path.is_dir() else file.name for file in every if file.is_file()}
    rows = {file: label for file, label in named.items() if file_format(file) in FORMATS and file.name not in _METADATA}
    if not rows:
        what = "no file there" if named or is_glob(name) else "the folder is empty: no file there"
        endings = f"{', '.join(FORMATS)} (or one of them with {' or '.join(COMPRESSIONS)})"
        raise UserError(f"dataset_name={name!r}: {what} ends in {endings}")
    by_split = _by_split(rows)
    if by_split:
        files = by_split.get(split) or by_split.get(standard_split(split))
        if files is None:
            raise UserError(f"split={split!r}: {name} has {sorted(by_split)}{_names(rows, by_split)}")
    elif split != "train":
        raise UserError(f"split={split!r}: no file name in {name} says a split, so it has the one split 'train'")
    else:
        files = list(rows)
    formats = sorted({file_format(file) for file in files})
    if len(formats) > 1:
        raise UserError(
            f"dataset_name={name!r}: files of several formats ({', '.join(formats)}): give a glob, such as '*{formats[0]}'"
        )
    filled = [file for file in files if file.stat().st_size]
    if not filled:
        raise UserError(f"dataset_name={name!r}: has no rows: {named[files[0]]} and all other files are empty (0 bytes)")
    others = sum(len(its) for its in by_split.values()) - len(files) if by_split else 0
    used = {*filled, *(file for its in by_split.values() for file in its if file not in files)}
    unused = [
        label
        for file, label in named.items()
        if file not in used and file.name not in _METADATA and not _DOCUMENTATION.fullmatch(file.name)
    ]
    left_out = {f"left_out[{label}]": 1 for label in unused[:MAX_NAMES]}
    if len(unused) > MAX_NAMES:
        left_out["left_out[more files]"] = len(unused) - MAX_NAMES
    return SplitFiles(filled, left_out | ({"files_of_other_splits": others} if others else {}))


def one_split_only(path: Path, split: str) -> str:
    """Message that a single file does not have a split."""
    return f"split={split!r}: {path} is one file and has the one split 'train'; use eval_fraction to hold rows out"


def _names(rows: Mapping[Path, str], by_split: Mapping[str, Sequence[Path]]) -> str:
    chosen = {file for its in by_split.values() for file in its}
    unused = [label for file, label in rows.items() if file not in chosen]
    return f", and of no split {', '.join(unused[:MAX_NAMES])}" if unused else ""


def _by_split(rows: Mapping[Path, str]) -> dict[str, list[Path]]:
    """Files by split. The first rule that finds any decides alone: shard numbers, then folders, then file names."""
    for rule in (_split_of_shard, _split_of_folder, _split_of_file):
        found: dict[str, list[Path]] = {}
        for file, label in rows.items():
            if split := rule(PurePath(label)):
                found.setdefault(split, []).append(file)
        if found:
            return found
    return {}


def _split_of_shard(label: PurePath) -> str | None:
    """`train_sft` of `train_sft-00000-of-00003.parquet`. Outside a folder `data` the name has to begin with a split's word."""
    shard = _SHARD.match(label.name)
    if shard and (label.parent.name == "data" or _word(rf"^(?:{{}})(?:{_SEPARATOR}|$)", shard[1])):
        return shard[1]
    return None


def _split_of_folder(label: PurePath) -> str | None:
    inside = rf"(?:^|{_SEPARATOR})(?:{{}})(?:{_SEPARATOR}|$)"
    return next((split for part in label.parent.parts if (split := _word(inside, part))), None)


def _split_of_file(label: PurePath) -> str | None:
    return _word(rf"(?:^|{_SEPARATOR})(?:{{}}){_SEPARATOR}", label.name)


def _word(pattern: str, text: str) -> str | None:
    """The split one of whose words stands where the pattern has its braces. Capitals do not matter, unlike on the hub: where
    `Train` and `Test` were no splits, a model would be trained on both."""
    for split, words in _SPLIT_WORDS.items():
        if re.search(pattern.format("|".join(words)), text, re.IGNORECASE):
            return split
    return None
