"""Rows of local files: the same from every format, packed or not; what cannot be read is named, or left out and counted."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers import write_jsonl
from pydantic import ValidationError

from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    PreferenceDatasetConfig,
    UserError,
)
from modern_llm.config.data import SourceConfig
from modern_llm.data import instruction_datasets, lm_datasets, preference_datasets
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import PreparedData
from modern_llm.data.readers import BadRows, read_file
from modern_llm.data.sources import open_source

TEXTS = ["Eins, zwei", 'drei "vier"\nfünf', "sechs;7"]
CONTENT = {
    "jsonl": "\n".join(json.dumps({"text": text}) for text in TEXTS),
    "json": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=1),
    "csv": "text\n" + "".join('"' + text.replace('"', '""') + '"\n' for text in TEXTS),
    "txt": "\n---\n".join(TEXTS),
}
PACK = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path: Path, **fields: Any) -> list[str]:
    return [row.values["text"] for row in read_file(path, BadRows(skip=False), SourceConfig(**fields))]


# Formats


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("ending", CONTENT)
def test_the_same_rows_come_from_every_text_format_packed_or_not(tmp_path, ending, packing) -> None:
    path = write(tmp_path / f"rows.{ending}{packing}", PACK[packing](CONTENT[ending].encode()))
    assert texts(path, document_separator="---") == TEXTS


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_files_packed_one_behind_the_other_are_read_whole(tmp_path, packing) -> None:
    """`cat a.gz b.gz` is a file of both."""
    halves = [PACK[packing](json.dumps({"text": text}).encode() + b"\n") for text in TEXTS]
    assert texts(write(tmp_path / f"rows.jsonl{packing}", b"".join(halves))) == TEXTS


def test_a_json_file_may_hold_an_object_a_line(tmp_path) -> None:
    assert texts(write(tmp_path / "rows.json", CONTENT["jsonl"])) == TEXTS


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("\n", ["One.", "Still one.", "---", "Two."]),
        ("", ["One.\nStill one.", "---", "Two."]),
        ("---", ["One.\nStill one.", "Two."]),
        (None, ["One.\nStill one.\n\n---\n \t\nTwo."]),
    ],
    ids=["each line", "blank line", "own line", "none"],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_separator_decides_what_a_document_is(tmp_path, separator, expected, line_end) -> None:
    content = "One.\nStill one.\n\n---\n \t\nTwo.".replace("\n", line_end)
    found = texts(write(tmp_path / "a.txt", content), document_separator=separator)
    assert [text.replace("\r\n", "\n") for text in found] == expected


@pytest.mark.parametrize("ending", CONTENT)
def test_a_byte_order_mark_is_no_text(tmp_path, ending) -> None:
    assert texts(write(tmp_path / f"rows.{ending}", "\ufeff" + CONTENT[ending]), document_separator="---") == TEXTS
    assert texts(write(tmp_path / f"empty.{ending}", "\ufeff")) == []


def test_a_csv_may_begin_with_blank_lines(tmp_path) -> None:
    assert texts(write(tmp_path / "rows.csv", "\n\ntext,b\na,1\n")) == ["a"]


# Files of another form than their name says

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
ROW = {"prompt": "Hi", "completion": "Yes"}


def indented(value: Any) -> str:
    return json.dumps(value, indent=2)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", indented({"data": [ROW, ROW], "version": "1.0"}), [ROW, ROW]),
        ("a.json", json.dumps({"rows": [ROW]}), [ROW]),
        ("a.jsonl", indented({"data": [ROW, ROW]}), [ROW, ROW]),
        ("a.json", indented(ROW), [ROW]),
        ("a.json", indented({"messages": CHAT}), [{"messages": CHAT}]),
        ("a.json", json.dumps({"chosen": CHAT, "rejected": CHAT}), [{"chosen": CHAT, "rejected": CHAT}]),
        ("a.jsonl", "\n" + indented(ROW), [ROW]),
        ("a.jsonl", json.dumps([ROW, ROW]), [ROW, ROW]),
        ("a.jsonl", indented([ROW, ROW]), [ROW, ROW]),
        ("a.jsonl", f"{json.dumps(CHAT)}\n\n{json.dumps(CHAT)}\n", [{"messages": CHAT}] * 2),
        ("a.json", f"{json.dumps(CHAT)}\n\n{json.dumps(CHAT)}\n", [{"messages": CHAT}] * 2),
        ("a.jsonl", f"{json.dumps(SHAREGPT)}\n", [{"conversations": SHAREGPT}]),
        ("a.json", indented([CHAT, CHAT]), [{"messages": CHAT}] * 2),
        ("a.ndjson", f"{json.dumps(ROW)}\n", [ROW]),
        ("a.tsv", 'prompt\tcompletion\nHi\tYes\n"Hi"\tYes\n', [ROW, ROW]),
        ("a.csv", "prompt\tcompletion\nHi\tYes\n", [ROW]),
        ("a.csv", "prompt;completion\r\nHi;Yes\r\n", [ROW]),
        ("a.csv", '"prompt";"completion"\n"Hi";Yes\n', [ROW]),
        ("a.csv", '"prompt; long",completion\nHi,Yes\n', [{"prompt; long": "Hi", "completion": "Yes"}]),
        ("a.csv", "prompt\nHi;Yes\n", [{"prompt": "Hi;Yes"}]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_rows_are_read_in_whatever_form_they_are_written(tmp_path, name, content, expected, encoding) -> None:
    path = write(tmp_path / name, content.encode(encoding))
    assert [row.values for row in read_file(path, BadRows(skip=False), SourceConfig())] == expected
    packed = write(tmp_path / f"{name}.gz", gzip.compress(content.encode(encoding)))
    assert [row.values for row in read_file(packed, BadRows(skip=False), SourceConfig())] == expected


def test_a_json_file_that_cannot_be_decoded_is_not_skipped_as_one_row(tmp_path) -> None:
    path = write(tmp_path / "a.json", b'[{"text": "a"}, {"text": "\xff"}]')
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_file(path, BadRows(skip=True), SourceConfig()))


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("ending", CONTENT)
def test_a_byte_order_mark_says_the_encoding(tmp_path, ending, codec) -> None:
    """The text is longer than what is converted at once."""
    long = CONTENT[ending].replace("drei", "drei" * 100_000 + "€𝄞")
    path = write(tmp_path / f"rows.{ending}", f"\ufeff{long}".encode(codec))
    assert texts(path, document_separator="---") == [text.replace("drei", "drei" * 100_000 + "€𝄞") for text in TEXTS]


def test_the_delimiter_may_be_given(tmp_path) -> None:
    path = write(tmp_path / "a.csv", "text|n,1;2\na;b|3\n")
    assert [row.values for row in read_file(path, BadRows(skip=False), SourceConfig(delimiter="|"))] == [
        {"text": "a;b", "n,1;2": "3"}
    ]
    config = LanguageModelingDatasetConfig(dataset_name=str(path), split="train[:1]", delimiter="|")
    source = open_source(str(path), config.sources()[str(path)], "text")
    assert [row.values for row in source.rows(BadRows(skip=False))] == [{"text": "a;b", "n,1;2": "3"}]
    name = str(write(tmp_path / "a.jsonl", '{"text": "a"}'))
    config = LanguageModelingDatasetConfig(dataset_name=name, delimiter=";")
    with pytest.raises(UserError, match=r"^delimiter=';' is for .csv and .tsv files, not for .*a.jsonl"):
        open_source(name, config.sources()[name], "text")
    with pytest.raises(ValidationError, match="delimiter"):
        LanguageModelingDatasetConfig(dataset_name=name, delimiter=", ")


# What cannot be read


@pytest.mark.parametrize("ending", CONTENT)
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_that_breaks_off_is_named(tmp_path, ending, packing) -> None:
    path = write(tmp_path / f"rows.{ending}{packing}", PACK[packing](CONTENT[ending].encode())[:-12])
    with pytest.raises(UserError) as refused:
        texts(path)
    assert str(refused.value).startswith(f"{path}: cannot be read to its end: ")


HINT = " (if only some rows are like this, on_bad_row: skip leaves them out)"


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        # Python reads no number of so many digits
        ("a.json", b'[{"text": ' + b"1" * 5000 + b"}]", ": not JSON: ", False),
        ("a.jsonl", b'\n{"text": ' + b"1" * 5000 + b"}", ", line 2: not JSON: ", False),
        ("a.json", b"[" * 100_000, ": not JSON: nested more than 100 levels deep", False),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 101 + b"]" * 101, ", line 2: not JSON: nested more than 100 levels deep", True),
        ("a.jsonl", b'{"text": "a"}\n' + b'{"text":' * 10**5, ", line 2: not JSON: nested more than 100 levels deep", True),
        ("a.csv", "größe,b\n1,2\n".encode("latin-1"), ", line 1: not UTF-8: save the file as UTF-8", False),
        ("a.csv", b'text,b\na,b\n"a"c,b\n', ", line 3: not CSV: ", True),
        ("a.csv", b'text,b\na,b\n"a,b\n', ", line 3: not CSV: ", True),
        ("a.csv", b"text,b\na\na,b\n", ", line 2: 1 cells under the 2 columns", False),
        ("a.txt", b"a\n---\nb\n\xff", ", line 3: not UTF-8: byte 0xff at position 2: save the file as UTF-8", True),
        ("a.txt", b"\xff\n---\nb\n", ", line 1: not UTF-8: byte 0xff at position 0: save the file as UTF-8", False),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, message, hint) -> None:
    """Skipping is proposed only where some row was read."""
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as refused:
        texts(path, document_separator="---")
    assert str(refused.value).startswith(f"{path}{message}")
    assert str(refused.value).endswith(HINT) == hint


@pytest.mark.parametrize("kind", ["text", "instructions", "preferences"])
def test_skipping_is_proposed_only_where_a_row_was_used_before(tmp_path, encoder, kind) -> None:
    for rows, hint in ((BAD[kind][:1], False), ([*good_rows(kind, 1), BAD[kind][0]], True)):
        with pytest.raises(UserError) as refused:
            prepare(kind, write_jsonl(tmp_path / "rows.jsonl", rows), encoder)
        assert str(refused.value).endswith(HINT) == hint


@pytest.mark.parametrize(
    ("name", "content", "num_bad"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n[1]\n{"text": "\xff"}\n{"text": "b"}\n{"text": "c"}', 3),
        ("a.json", b'[{"text": "a"}, 3, {"text": "b"}, null, {"text": "c"}]', 2),
        ("a.csv", b'text,n\na,1\nx,1,2\n"x"y,1\n\xff,1\nb,2\nx\nc,3\n"x,1', 5),
        ("a.txt", b"a\n---\nb\n---\n\xff\nx\n---\nc", 1),
    ],
)
def test_every_row_but_the_bad_ones_is_read_where_they_are_skipped(tmp_path, name, content, num_bad) -> None:
    bad = BadRows(skip=True)
    rows = read_file(write(tmp_path / name, content), bad, SourceConfig(document_separator="---"))
    assert [row.values["text"] for row in rows] == ["a", "b", "c"]
    assert bad.count == num_bad


# Bad rows of each kind of data set

MODULES = {"text": lm_datasets, "instructions": instruction_datasets, "preferences": preference_datasets}
GOOD = {
    "text": {"text": "w{}q"},
    "instructions": {"prompt": "w{}q", "completion": "yes"},
    "preferences": {"prompt": "w{}q", "chosen": "yes", "rejected": "no"},
}
BAD = {
    "text": [{"story": "a"}, {"text": 3}, {"text": None}],
    "instructions": [{"prompt": "a"}, {"prompt": "a", "completion": 3}, {"messages": [{"role": "bot", "content": "a"}]}],
    "preferences": [
        {"prompt": "a", "chosen": "b"},
        {"prompt": 3, "chosen": "b", "rejected": "c"},
        {"chosen": [], "rejected": []},
    ],
}


def prepare(kind: str, path: Path, encoder: Any, **fields: Any) -> PreparedData:
    name = {"dataset_name": str(path), **fields}
    if kind == "text":
        return prepare_documents(LanguageModelingDatasetConfig(**name), encoder.encoder, 256, 0)
    if kind == "instructions":
        return prepare_instructions(InstructionDatasetConfig(**name), encoder)
    return prepare_preferences(PreferenceDatasetConfig(**name), DPOConfig(), encoder)


def good_rows(kind: str, count: int) -> list[dict[str, str]]:
    return [{field: text.format(n) for field, text in GOOD[kind].items()} for n in range(count)]


@pytest.mark.parametrize("kind", GOOD)
def test_bad_rows_are_left_out_and_counted_on_request(tmp_path, encoder, kind) -> None:
    good, bad = good_rows(kind, 4), [json.dumps(row) for row in BAD[kind]]
    lines = [json.dumps(good[0]), *bad, json.dumps(good[1]), "{", "[1]", *map(json.dumps, good[2:])]
    path = write(tmp_path / "rows.jsonl", "\n".join(lines).encode() + b'\n{"text": "\xff"}')
    data = prepare(kind, path, encoder, on_bad_row="skip")
    assert data.report["bad_rows_skipped"] == len(bad) + 3
    found = "".join(encoder.tokenizer.decode(segment.ids) for example in data.train for segment in example.segments)
    assert all(f"w{n}q" in found for n in range(4))
    assert sum(len(example.segments) for example in data.train) == 4 * (2 if kind == "preferences" else 1)
    clean = prepare(kind, write_jsonl(tmp_path / "clean.jsonl", good), encoder, on_bad_row="skip")
    assert "bad_rows_skipped" not in clean.report
    assert clean.report["scored_tokens"] == data.report["scored_tokens"]


@pytest.mark.parametrize("kind", GOOD)
def test_nothing_is_kept_of_a_build_that_failed(tmp_path, encoder, kind, cache, monkeypatch) -> None:
    """The bad row is the last one, when the rows before it are already written."""
    for module, name in zip(MODULES.values(), ("CHARACTERS_AT_ONCE", "CHATS_AT_ONCE", "PAIRS_AT_ONCE"), strict=True):
        monkeypatch.setattr(module, name, 1)
    before = sorted(cache.iterdir())
    path = write_jsonl(tmp_path / "rows.jsonl", [*good_rows(kind, 50), BAD[kind][0]])
    with pytest.raises(UserError, match="line 51"):
        prepare(kind, path, encoder)
    empty = write(tmp_path / "empty.jsonl", "\n")
    with pytest.raises(UserError, match=r"has no rows"):
        prepare(kind, empty, encoder)
    assert sorted(cache.iterdir()) == before
