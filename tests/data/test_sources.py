"""Rows from files and the hub: every format reads the same, and every bad input is one line that says where it is."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    PreferenceDatasetConfig,
    UserError,
)
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.messages import prompt_hash
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.readers import BadRows
from modern_llm.data.sources import are_held_out, is_held_out, open_source

ROWS = [{"text": "Eins, zwei", "note": "a"}, {"text": 'drei "vier"\nfünf', "note": "b"}, {"text": " sechs", "note": "c"}]


@pytest.fixture(autouse=True)
def _tables_are_cached_here(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@dataclass
class Loaded:
    rows: list[dict[str, Any]]
    places: list[str]


def load(path: Path | str, split: str = "train", **fields: Any) -> Loaded:
    config = LanguageModelingDatasetConfig(dataset_name=str(path), split=split, **fields)
    ((name, source),) = config.sources().items()
    found = list(open_source(name, source, "text").rows(BadRows(skip=False)))
    return Loaded([row.values for row in found], [row.place for row in found])


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(action: Callable[[], object]) -> str:
    """The one line that the user reads."""
    with pytest.raises(UserError) as refused:
        action()
    message = str(refused.value)
    assert "\n" not in message
    return message


# Formats


def _jsonl(rows: list[dict]) -> bytes:
    return b"\n\n".join(json.dumps(row).encode() for row in rows)  # an empty line is no row


def _json(rows: list[dict]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def _csv(rows: list[dict]) -> bytes:
    lines = [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
    return "\n".join([",".join(rows[0]), *lines, ""]).encode()


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(("suffix", "encode"), [("jsonl", _jsonl), ("json", _json), ("csv", _csv)])
def test_the_same_rows_come_from_every_text_format(tmp_path, suffix, encode, zipped) -> None:
    content = encode(ROWS)
    path = write(tmp_path / f"rows.{suffix}{'.gz' * zipped}", gzip.compress(content) if zipped else content)
    assert load(path).rows == ROWS


def test_the_same_rows_come_from_parquet(tmp_path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert load(path).rows == ROWS


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_name_may_hold_what_a_pattern_would_read_otherwise(tmp_path, suffix) -> None:
    path = tmp_path / f"rows [1]*.{suffix}"
    table = datasets.Dataset.from_list(ROWS)
    table.to_csv(path) if suffix == "csv" else table.to_parquet(path)
    assert [row["note"] for row in load(path).rows] == ["a", "b", "c"]


def test_the_cells_of_a_csv_are_text_whatever_they_look_like(tmp_path) -> None:
    path = write(tmp_path / "rows.csv", "question,answer\n1 + 1?,2\nIs it?,NA\nWhat?,\nReally?,None\n")
    assert [row["answer"] for row in load(path).rows] == ["2", "NA", "", "None"]


def test_a_csv_that_has_changed_is_read_again(tmp_path) -> None:
    path = write(tmp_path / "rows.csv", "text\na\n")
    assert load(path).rows == [{"text": "a"}]
    write(path, "text\nb\n")
    assert load(path).rows == [{"text": "b"}]


def test_a_text_file_is_one_document_or_is_split_at_the_separator(tmp_path) -> None:
    path = write(tmp_path / "a.txt", "One.\n\nStill one.\n---\n\nTwo.\n---\n---\n  \n---\nThree.")
    assert [row["text"] for row in load(path).rows] == [path.read_text().strip()]
    rows = load(path, document_separator="---")
    assert [row["text"] for row in rows.rows] == ["One.\n\nStill one.", "Two.", "Three."]
    assert rows.places == [f"{path}, line 1", f"{path}, line 5", f"{path}, line 11"]


def test_a_text_file_fills_the_column_that_the_config_names(tmp_path) -> None:
    assert load(write(tmp_path / "a.txt", "One."), text_field="story").rows == [{"story": "One."}]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_line_separators_of_unicode_end_no_line(tmp_path, suffix) -> None:
    """Only line feeds do, in jsonl by definition and in text as every editor counts."""
    text = "a\u2028b\x0cc\x85d"
    content = text if suffix == "txt" else json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "x"}\n'
    rows = load(write(tmp_path / f"a.{suffix}", content + ("\n---\nx" if suffix == "txt" else "")), document_separator="---")
    assert [row["text"] for row in rows.rows] == [text, "x"]
    assert rows.places[1].endswith("line 3" if suffix == "txt" else "line 2")


def test_folders_saved_by_datasets_give_their_splits(tmp_path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "two").rows == ROWS[:2]
    assert load(tmp_path / "two", "test").rows == ROWS[2:]
    assert load(tmp_path / "two", "test").places[0] == f"{tmp_path / 'two'}[test] row 0"
    assert "has ['test', 'train']" in refusal(lambda: load(tmp_path / "two", "dev"))


def test_a_folder_with_one_saved_split_is_that_split_and_no_other(tmp_path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one").rows == ROWS
    assert "split='test'" in refusal(lambda: load(tmp_path / "one", "test"))


def test_a_json_file_of_one_object_gives_a_split_for_each_key(tmp_path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS[:2], "test": ROWS[2:], "version": 1}, indent=2))
    assert load(path).rows == ROWS[:2]
    assert load(path, "test[:1]").rows == load(path, "eval").rows == ROWS[2:]
    assert load(path, "test").places == [f"{path}, row 0"]
    assert "has ['train', 'test']" in refusal(lambda: load(path, "dev"))
    fingerprints = []
    for split in ("train", "test"):
        config = LanguageModelingDatasetConfig(dataset_name=str(path), split=split)
        fingerprints.append(open_source(str(path), config.sources()[str(path)], "text").fingerprint())
    assert fingerprints[0] != fingerprints[1]
    for name, content in {"b.json": _json(ROWS), "c.json": _jsonl(ROWS), "d.json": json.dumps({"data": ROWS}).encode()}.items():
        other = write(tmp_path / name, content)
        assert load(other).rows == ROWS
        assert f"split='test': {other} has ['train']" in refusal(lambda path=other: load(path, "test"))


def test_max_rows_takes_the_first(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", _jsonl(ROWS))
    assert load(path, max_rows=2).rows == ROWS[:2]
    assert load(path, max_rows=9).rows == ROWS


# Folders and patterns


def texts(name: Path | str, split: str = "train", **fields: Any) -> list[str]:
    return [row["text"] for row in load(name, split, **fields).rows]


def files(folder: Path, *names: str) -> None:
    """Each with one row that says its name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, [{"text": name}])


def test_a_folder_is_read_with_all_below_it_and_without_what_is_hidden(tmp_path) -> None:
    files(tmp_path, "b.jsonl", "a.jsonl", "c/d.jsonl", ".hidden.jsonl", ".git/e.jsonl", "README.md", "c/.cache/f.jsonl")
    assert texts(tmp_path) == ["a.jsonl", "b.jsonl", "c/d.jsonl"]


SPLITS = {
    "file names": ["train-00001.jsonl", "train-00000.jsonl", "my_test.jsonl", "a/validation.jsonl"],
    "folder names": ["train/b.jsonl", "train/a.jsonl", "test/a.jsonl", "dev/a.jsonl"],
    "shards": [f"data/{split}-00000-of-00001.jsonl" for split in ("train", "train.2", "test", "validation")],
    "capitals": ["Train.jsonl", "TRAIN 2.jsonl", "Test.jsonl", "Dev.jsonl"],
}


@pytest.mark.parametrize("names", SPLITS.values(), ids=SPLITS)
def test_names_in_a_folder_select_the_split(tmp_path, names) -> None:
    names = [names[0], *names[2:]] if "train.2" in names[1] else names
    files(tmp_path, *names)
    assert texts(tmp_path) == sorted(name for name in names if "train" in name.lower())
    assert texts(tmp_path, "test") == [names[-2]]
    assert texts(tmp_path, "dev") == texts(tmp_path, "validation") == [names[-1]]
    assert "has ['test', 'train', 'validation']" in refusal(lambda: load(tmp_path, "dpo"))


@pytest.mark.parametrize(
    ("names", "split", "read", "left_out"),
    [
        (["poems.jsonl", "train-timetables.jsonl"], "train", [1], {"left_out[poems.jsonl]": 1}),
        (["trainers.jsonl", "contest.jsonl", "testimony/a.jsonl"], "train", [1, 2, 0], {}),  # words inside of others
        (["train/a.jsonl", "test-of-time.jsonl"], "train", [0], {"left_out[test-of-time.jsonl]": 1}),
        (["train_sft-00000-of-00002.jsonl", "train_sft-00001-of-00002.jsonl", "train_gen-00000-of-00001.jsonl"],
         "train_sft", [0, 1], {"files_of_other_splits": 1}),
        (["data/part-00000-of-00001.jsonl", "data/more.jsonl"], "part", [0], {"left_out[data/more.jsonl]": 1}),
        (["train-00000-of-00001.jsonl", "dev.jsonl", "b/train-dev.jsonl"], "train", [2, 0], {"files_of_other_splits": 1}),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], "train", [0, 1], {}),
        (["a.jsonl", "b.jsonl.bz2", "README.md", "LICENSE", "dataset_info.json"], "train", [0], {"left_out[b.jsonl.bz2]": 1}),
        (["train.jsonl", *(f"{n}.jsonl" for n in range(7))], "train", [0],
         {**{f"left_out[{n}.jsonl]": 1 for n in range(5)}, "left_out[more files]": 2}),
    ],
)  # fmt: skip
def test_files_that_are_not_read_are_named(tmp_path, encoder, names, split, read, left_out) -> None:
    files(tmp_path, *names)
    assert texts(tmp_path, split) == [names[i] for i in read]
    config = LanguageModelingDatasetConfig(dataset_name=str(tmp_path), split=split)
    for _ in range(2):  # made anew, and out of the cache
        report = prepare_documents(config, encoder.encoder, 256, 0).report
        assert {name: count for name, count in report.items() if name.startswith(("left_out", "files_"))} == left_out


LAYOUTS = [
    ["data/train_sft-00000-of-00001.jsonl", "data/test_gen-00000-of-00001.jsonl", "train.jsonl"],
    ["data/part-00000-of-00001.jsonl", "data/a.jsonl"],
    ["part-00000-of-00001.jsonl", "a.jsonl"],
    ["train/a.jsonl", "my test/a.jsonl", "x/dev-1/a.jsonl", "contest/a.jsonl", "eval.jsonl"],
    ["training.jsonl", "my_eval.v2.jsonl", "val2.jsonl", "trainers.jsonl", "contest.jsonl"],
    ["latest/a.jsonl", "traindata.jsonl", "mytest.jsonl"],
]


@pytest.mark.parametrize("names", LAYOUTS, ids=lambda names: names[0])
def test_files_have_the_splits_that_datasets_gives_them(tmp_path, names) -> None:
    files(tmp_path, *names)
    patterns = datasets.data_files.get_data_patterns(str(tmp_path))
    for split, found in datasets.data_files.DataFilesDict.from_local_or_remote(patterns, base_path=str(tmp_path)).items():
        assert texts(tmp_path, str(split)) == sorted({str(Path(file).relative_to(tmp_path)) for file in found})


def test_files_of_no_split_are_named_where_the_split_is_absent(tmp_path) -> None:
    files(tmp_path, "poems.jsonl", "test-flights.jsonl")
    assert "has ['test'] by the names of its files (in none: poems.jsonl)" in refusal(lambda: load(tmp_path))


def test_empty_files_of_a_folder_are_named(tmp_path) -> None:
    files(tmp_path, "a.jsonl")
    write(tmp_path / "b.jsonl", "")
    config = LanguageModelingDatasetConfig(dataset_name=str(tmp_path))
    assert dict(open_source(str(tmp_path), config.sources()[str(tmp_path)], "text").left_out) == {"left_out[b.jsonl]": 1}
    write(tmp_path / "a.jsonl", "")
    assert "are empty (0 bytes): a.jsonl, b.jsonl" in refusal(lambda: load(tmp_path))
    (tmp_path / "c").mkdir()
    assert "nothing is there: no file there ends in" in refusal(lambda: load(tmp_path / "c"))


def test_the_name_of_the_folder_itself_says_nothing(tmp_path) -> None:
    files(tmp_path / "test", "a.jsonl", "b.jsonl")
    assert texts(tmp_path / "test") == ["a.jsonl", "b.jsonl"]
    assert texts(f"{tmp_path}/test/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert "has ['train'] by the names of its files" in refusal(lambda: load(tmp_path / "test", "test"))


def test_a_pattern_selects_files_in_the_order_of_their_names(tmp_path) -> None:
    files(tmp_path, "b.jsonl", "a.jsonl", "a.json", "c/d.jsonl")
    assert texts(f"{tmp_path}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert texts(f"{tmp_path}/**/[bd].jsonl") == ["b.jsonl", "c/d.jsonl"]
    assert "no file there ends in" in refusal(lambda: load(f"{tmp_path}/*.csv"))


def test_files_of_several_formats_are_refused_unless_a_pattern_chooses(tmp_path) -> None:
    files(tmp_path, "a.jsonl", "b.jsonl")
    write(tmp_path / "c.csv", "text\nc\n")
    assert "several formats (.csv, .jsonl): give a glob, such as '*.csv'" in refusal(lambda: load(tmp_path))
    assert texts(f"{tmp_path}/*.csv") == ["c"]


# Slices

MANY = [{"text": f"row {n}"} for n in range(37)]
SLICES = ["train[:5%]", "train[10:20]", "train[-3:]", "train[33%:67%]", "train[-10%:]", "train[:7]", "train[5:99]"]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("many") / "rows.jsonl", MANY)


def by_datasets(path: Path, split: str) -> list[dict[str, Any]]:
    return datasets.load_dataset("json", data_files=str(path), split=split).to_list()  # type: ignore[union-attr]


@pytest.mark.parametrize("split", SLICES)
def test_a_slice_is_the_one_that_datasets_gives(tmp_path, many, split) -> None:
    expected = by_datasets(many, split)
    assert 0 < len(expected) < len(MANY)
    assert load(many, split).rows == expected
    datasets.Dataset.from_list(MANY).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved", split).rows == expected


def test_a_slice_of_the_built_in_world_is_the_one_that_datasets_gives(tmp_path) -> None:
    whole = load("builtin:village").rows
    path = write_jsonl(tmp_path / "rows.jsonl", whole)
    for split in ("train[:5%]", "train[-3:]"):
        assert load("builtin:village", split).rows == by_datasets(path, split)
    assert load("builtin:village", "test[:2]").rows == load("builtin:village", "test").rows[:2]


def test_a_slice_counts_rows_over_all_files_and_max_rows_cuts_the_slice(tmp_path) -> None:
    files(tmp_path, *(f"{n}.jsonl" for n in range(6)))
    assert texts(tmp_path, "train[2:4]") == ["2.jsonl", "3.jsonl"]
    found = load(tmp_path, "train[2:5]", max_rows=2)
    assert [row["text"] for row in found.rows] == ["2.jsonl", "3.jsonl"]
    assert found.places[0] == f"{tmp_path}/2.jsonl, line 1"


@pytest.mark.parametrize("split", ["train[", "train[:200%]", "train[:2]+train[4:]", "train[a:]"])
def test_a_slice_that_is_none_is_refused(many, split) -> None:
    assert f"split={split!r}" in refusal(lambda: load(many, split))


# Fingerprints


def fingerprint(name: Path | str, **fields: Any) -> str:
    config = LanguageModelingDatasetConfig(dataset_name=str(name), **fields)
    ((name, source),) = config.sources().items()
    return open_source(name, source, "text").fingerprint()


def test_the_content_of_a_file_is_its_fingerprint_not_its_name_or_date(tmp_path) -> None:
    first, second = (write_jsonl(tmp_path / name, MANY) for name in ("a.jsonl", "b.jsonl"))
    os.utime(second, (1, 1))
    assert fingerprint(first) == fingerprint(second)
    content = second.read_bytes()
    second.write_bytes(content[:-4] + b"9" + content[-3:])
    assert fingerprint(first) != fingerprint(second)


def test_all_that_decides_the_rows_is_in_the_fingerprint(tmp_path) -> None:
    path = write(tmp_path / "a.txt", "One.\n---\nTwo.")
    found = [
        fingerprint(path),
        fingerprint(path, text_field="story"),
        fingerprint(path, document_separator="---"),
        fingerprint(path, document_separator="\n"),
        fingerprint(path, max_rows=1),
        fingerprint(path, max_rows=2),
        fingerprint(write(tmp_path / "a.csv", path.read_bytes())),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(path, split="train[:1]") == fingerprint(path, max_rows=1)  # the same rows


def test_the_rows_of_a_saved_folder_are_its_fingerprint(tmp_path) -> None:
    """Not how they lie in memory or on disk."""
    table = datasets.Dataset.from_list(MANY)
    table.save_to_disk(tmp_path / "whole")
    datasets.Dataset.from_list([{"text": "before"}, *MANY]).select(range(1, 38)).save_to_disk(
        tmp_path / "in parts", num_shards=3
    )
    table.select(reversed(range(37))).save_to_disk(tmp_path / "turned round")
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "in parts")
    others = [fingerprint(tmp_path / "turned round"), fingerprint(tmp_path / "whole", split="train[:9]")]
    assert len({fingerprint(tmp_path / "whole"), *others}) == 3


def test_the_built_in_world_has_a_fingerprint_for_each_split() -> None:
    found = [fingerprint("builtin:village", split=split) for split in ("train", "test", "train[:9]", "train")]
    assert found[0] == found[3]
    assert len(set(found)) == 3


# Places


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'\n{"text": "a"}\n\n{"text": "b"}\n', "line 4"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}]', "row 1"),
        ("a.csv", b"text\na\nb\n", ("row 1", "line 3")),
    ],
)
def test_a_row_names_itself(tmp_path, name, content, place) -> None:
    path = write(tmp_path / name, content)
    places = place if isinstance(place, tuple) else (place,)
    assert load(path).places[1] in [f"{path}, {place}" for place in places]


# Bad files

GZ = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(60)), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "a"}\n' * 6 + '{"text": \n', ["line 7", "not JSON"]),
        ("a.jsonl", '{"text": "a"}\n[1]\n', ["line 2", "must be an object, not list"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2", "not UTF-8", "0xff"]),
        ("a.jsonl", "", ["no rows"]),
        ("a.jsonl", "\n \n", ["no rows"]),
        ("a.json", '"text"', ["must hold a list of objects"]),
        ("a.json", '[{"text": "a"}, 3]', ["row 1", "must be an object, not int"]),
        ("a.json", '{"text": "a"}\n{"text":\n', ["line 2", "not JSON"]),
        ("a.json", '[{"text": "a"},\n', ["not JSON", "line 2"]),
        ("a.json", "", ["no rows"]),
        ("a.json", "null", ["must hold a list of objects, not NoneType"]),
        ("a.json", "[]", ["no rows"]),
        ("a.txt", "", ["no rows"]),
        ("a.txt", b"\xff\xfe\x00", ["not utf-16-le", "save it as UTF-8"]),
        ("a.csv", "", ["a.csv"]),
        ("a.csv", "text\n", ["a.csv"]),
        ("a.csv", "text,b\na,b\na,b,c\n", ["line 3", "3 cells under the 2 columns"]),
        ("a.csv", b"text,b\na,b\na,\xff\n", ["line 3", "not UTF-8"]),
        ("a.parquet", "PAR1", ["cannot be read as .parquet"]),
        ("a.xml", "<a/>", ["must end in .jsonl, .json, .csv, .tsv, .parquet, .txt"]),
        ("a.jsonl.gz", '{"text": "a"}', ["cannot be read", "Not a gzipped file"]),
        ("a.jsonl.gz", GZ[:-20], ["cannot be read"]),
        ("a.jsonl", b"PAR1\0\0", ["a parquet file", "rename it to end in .parquet"]),
        ("a.jsonl", GZ, ["compressed with gzip", "add .gz to its name"]),
        ("a.jsonl.zst", GZ, ["compressed with gzip"]),
        ("a.csv", b"PK\x03\x04", ["zip archive or a spreadsheet", "save it as .csv"]),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer", "git lfs pull"]),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer", "git lfs pull"]),
        ("a.parquet", b"", ["empty (0 bytes)"]),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), ["UTF-16 without a byte order mark", "save it as UTF-8"]),
        ("a.csv", "text;b\n1,2\n", ["line 2", "1 cells under the 2 columns of the first line, separated by ';'"]),
        ("a.csv", "\ntext,b;c\na\n", ["line 2", "',' or ';' may separate the cells", "set delimiter"]),
        ("a.csv", "text,text\na,b\n", ["line 1", "two columns have one name: text, text"]),
        ("a.json", '{"a": [{"text": "a"}], "b": [{"text": "b"}]}', ["rows under 'a', 'b'"]),
        ("a.json", '{"test": [{"text": "a"}]}', ["split='train'", "has ['test']"]),
        ("a.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}\n', ["line 4", "more than one JSON value", "each on one line"]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value)[:30],
)
def test_a_file_that_cannot_be_read_is_one_line_with_its_name(tmp_path, encoder, name, content, expected) -> None:
    path = write(tmp_path / name, content)
    message = refusal(lambda: prepare("text", path, encoder))
    assert str(path) in message
    for words in expected:
        assert words in message


@pytest.mark.parametrize("at", range(10, len(GZ) - 12, 9))
def test_no_damage_to_a_zipped_file_escapes_as_another_error(tmp_path, at) -> None:
    path = write(tmp_path / "a.jsonl.gz", GZ[:at] + bytes([GZ[at] ^ 64]) + GZ[at + 1 :])
    assert str(path) in refusal(lambda: load(path))


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.txt.gz", "a/absent.parquet"])
def test_a_missing_file_is_named(tmp_path, name) -> None:
    assert refusal(lambda: load(tmp_path / name)) == f"dataset_name={str(tmp_path / name)!r}: no such file"
    assert "no such file" in refusal(lambda: load(name))


def test_a_file_has_the_one_split_train(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}')
    message = refusal(lambda: load(path, "test"))
    assert "split='test'" in message
    assert str(path) in message


def test_a_folder_that_datasets_did_not_save_is_named(tmp_path) -> None:
    assert str(tmp_path) in refusal(lambda: load(tmp_path))


def test_an_unknown_built_in_name_is_answered_with_the_one_there_is() -> None:
    assert refusal(lambda: load("builtin:town")).endswith("the only built-in data set is 'builtin:village'")
    assert "choose one of train, test" in refusal(lambda: load("builtin:village", "dev"))


# Bad rows: what each kind of data set says of them

BAD_ROWS = [
    ("text", [{"text": "a"}, {"txt": "b"}], ["line 2", "no column 'text' (columns: txt): set text_field to the column"]),
    ("text", [{"text": 7}], ["line 1", "'text' must be text, not int"]),
    ("text", [{"text": None}], ["line 1", "column 'text' is null: set text_field to the column"]),
    ("instructions", [{"prompt": "a", "completion": "b"}, {"question": "a"}], ["line 2", "question", "answer"]),
    ("instructions", [{"prompt": "a", "completion": ["b"]}], ["line 1", "'completion' message 0 must have", "not be str"]),
    ("instructions", [{"instruction": "a", "input": 5, "output": "b"}], ["line 1", "'input' must be text, not int"]),
    ("instructions", [{"messages": None}], ["line 1", "columns none; null: messages are no"]),
    ("instructions", [{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}], ["message 1"]),
    ("instructions", [{"messages": [{"role": "user", "content": None}]}], ["line 1", "'messages' message 0", "content"]),
    ("instructions", [{"messages": [{"role": ["user"], "content": "a"}]}], ["line 1", "'messages' message 0", "role"]),
    ("instructions", [{"messages": [{"role": "user", "content": "half \ud83d"}]}], ["line 1", "'messages' message 0"]),
    ("preferences", [{"prompt": "a", "chosen": "b"}], ["line 1", "no column 'rejected' (columns: prompt, chosen): set r"]),
    ("preferences", [{"prompt": "a", "chosen": "b", "rejected": 3}], ["line 1", "'rejected' must be text", "int"]),
    ("preferences", [{"prompt": "a", "chosen": "b", "rejected": None}], ["line 1", "column 'rejected' is null"]),
    ("preferences", [{"prompt": "a", "chosen": [], "rejected": "b"}], ["line 1", "'chosen'", "empty"]),
    ("preferences", [{"prompt": "a", "chosen": {"role": "assistant"}, "rejected": "b"}], ["'chosen': 'content' must be text"]),
    ("preferences", [{"prompt": 4, "chosen": "a", "rejected": "b"}], ["line 1", "'prompt' must be text, not int"]),
    ("preferences", [{"chosen": "a", "rejected": "b"}], ["line 1", "no prompt", "set prompt_field"]),
    ("preferences", [{"prompt": "a", "chosen": "b", "rejected": [{"role": "x", "content": "c"}]}], ["'rejected' message 0"]),
]  # fmt: skip


def prepare(kind: str, path: Path, encoder: Any, **fields: Any) -> object:
    name = {"dataset_name": str(path), **fields}
    if kind == "text":
        return prepare_documents(LanguageModelingDatasetConfig(**name), encoder.encoder, 32, 0)
    if kind == "instructions":
        return prepare_instructions(InstructionDatasetConfig(**name), encoder)
    return prepare_preferences(PreferenceDatasetConfig(**name), DPOConfig(), encoder)


@pytest.mark.parametrize("fields", [{}, {"eval_fraction": 0.5}], ids=["all", "held out"])
@pytest.mark.parametrize(("kind", "rows", "expected"), BAD_ROWS)
def test_a_bad_row_is_one_line_with_file_line_and_field(tmp_path, encoder, kind, rows, expected, fields) -> None:
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    message = refusal(lambda: prepare(kind, path, encoder, **fields))
    assert message.startswith(f"{path}, line ")
    for words in expected:
        assert words in message


GOOD_ROWS = {
    "text": {"text": "a"},
    "instructions": {"prompt": "a", "completion": "b"},
    "preferences": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


@pytest.mark.parametrize("fields", [{}, {"eval_fraction": 0.5}], ids=["all", "held out"])
@pytest.mark.parametrize("kind", GOOD_ROWS)
def test_half_a_character_is_one_line_with_file_line_and_field(tmp_path, encoder, kind, fields) -> None:
    r"""Scraped JSON holds lone surrogates (`\ud83d`), which are no text and have no bytes."""
    good = GOOD_ROWS[kind]
    for field in good:
        path = write(tmp_path / "rows.jsonl", json.dumps(good) + "\n" + json.dumps({**good, field: "half \ud83d"}) + "\n")
        message = refusal(lambda path=path: prepare(kind, path, encoder, **fields))
        assert message.startswith(f"{path}, line 2")
        assert field in message


# Holding out


HASHES = st.integers(0, 2**64 - 1)


def holding_out(fraction: float, fold: int = 0) -> LanguageModelingDatasetConfig:
    return LanguageModelingDatasetConfig(dataset_name="rows.txt", eval_fraction=fraction, eval_fold=fold)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), low=st.floats(0, 0.999), high=st.floats(0, 0.999))
def test_a_larger_fraction_holds_out_what_a_smaller_one_does(text, low, high) -> None:
    low, high = sorted((low, high))
    assert is_held_out(prompt_hash(text), holding_out(high)) or not is_held_out(prompt_hash(text), holding_out(low))
    assert not is_held_out(prompt_hash(text), holding_out(0.0))
    assert prompt_hash(text) == prompt_hash(f"  {text}\n")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    keys=st.lists(HASHES | st.sampled_from([0, 2**64 - 1, 2**63, 2**62]), max_size=20),
    folds=st.sampled_from([1.5, 2, 3, 4, 5, 10]),
)
def test_every_row_is_held_out_by_one_fold(keys, folds) -> None:
    configs = [holding_out(1 / folds, fold) for fold in range(int(folds))]
    found = np.array([are_held_out(np.array(keys, dtype=np.uint64), config) for config in configs])
    assert found.tolist() == [[is_held_out(key, config) for key in keys] for config in configs]
    assert (found.sum(axis=0) == [1 if key < int(folds) / folds * 2**64 else 0 for key in keys]).all()


def test_the_fraction_is_the_share_that_is_held_out() -> None:
    for fold in (0, 4):
        share = sum(is_held_out(prompt_hash(f"prompt {i}"), holding_out(0.2, fold)) for i in range(5000)) / 5000
        assert 0.18 < share < 0.22


@pytest.mark.parametrize("given", [{}, {"eval_split": "test"}, {"eval_fraction": 0.5}, {"eval_fraction": 0.4}])
def test_a_fold_that_does_not_exist_is_refused(given) -> None:
    with pytest.raises(ValidationError, match=r"eval_fold=2: eval_fraction=.* makes [12] fold"):
        LanguageModelingDatasetConfig(dataset_name="rows.txt", eval_fold=2, **given)


def test_who_is_held_out_is_the_same_on_every_machine() -> None:
    assert prompt_hash("Who bakes?") == 0xE6F773BBE63B8888  # printf "Who bakes?" | sha256sum


# The hub

NO_SUCH = "no-such-organisation/no-such-thing"
ASK = """
from modern_llm.config import LanguageModelingDatasetConfig, UserError
from modern_llm.data.sources import open_source

def refused(ask):
    try:
        ask()
    except UserError as error:
        print("refused:", error)

(source,) = LanguageModelingDatasetConfig(dataset_name=NAME).sources().values()
refused(lambda: open_source(NAME, source, "text"))
"""
ASK_FOR_ALL = """
from modern_llm.data.tokenizer import load_tokenizer
from modern_llm.initial.checkpoint import load_model

refused(lambda: load_tokenizer(NAME))
refused(lambda: load_model(NAME, "sft_checkpoint"))
"""


@pytest.mark.parametrize(
    ("questions", "environment"),
    [(ASK, {"HF_HUB_OFFLINE": "1"}), (ASK + ASK_FOR_ALL, {"HF_ENDPOINT": "http://127.0.0.1:9"})],
    ids=["told to stay offline", "nobody answers"],
)
def test_a_hub_name_without_a_network_is_refused_soon(tmp_path, questions, environment) -> None:
    """A closed port stands for no network. The limit is only there to find the retries of `huggingface_hub`, 24 s a name; what
    is imported takes 5 s on an idle machine."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", f"NAME = {NO_SUCH!r}{questions}"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**clean, "HF_HOME": str(tmp_path), **environment}, timeout=60
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("refused: ")]
    fields = ["dataset_name", "tokenizer_name", "sft_checkpoint"][: 1 if questions == ASK else 3]
    assert len(lines) == len(fields), ran.stderr
    for line, field in zip(lines, fields, strict=True):
        assert f"{field}='{NO_SUCH}'" in line
        assert "network" in line
