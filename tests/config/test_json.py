"""JSON of any origin: read, or refused in a line that names the file; never more than is bounded, never a RecursionError."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modern_llm.config import UserError
from modern_llm.config.io import parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(VALUES, st.integers(0, 5))
def test_what_is_not_nested_too_deeply_reads_as_json_does(value: Any, most: int) -> None:
    text = json.dumps(value)
    if depth(value) <= most:
        assert parse_json(text, most, unique=True) == value
    else:
        with pytest.raises(ValueError, match=f"nested more than {most} levels deep"):
            parse_json(text, most)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 101 + "]" * 101, "[" * 5000 + "]" * 5000])
def test_depth_without_end_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="nested more than 100 levels deep"):
        parse_json(text)


def test_a_hundred_levels_and_brackets_in_text_are_fine() -> None:
    assert depth(parse_json("[" * 100 + "]" * 100)) == 100
    assert parse_json(json.dumps({"a": "[{" * 1000})) == {"a": "[{" * 1000}


def test_nan_and_infinity_are_numbers_as_python_writes_them() -> None:
    value = parse_json('{"a": NaN, "b": [-Infinity]}')
    assert math.isnan(value["a"])
    assert value["b"] == [-math.inf]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "codec can't decode byte 0xff"),
        (b"[1]", "no object but list"),
        (b"null", "no object but NoneType"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested more than 100 levels deep"),
        (b'{"a": "' + b"x" * 2**24 + b'"}', "more than 16 MiB"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_json(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_more_is_read_than_is_allowed() -> None:
    with pytest.raises(UserError, match=r"/dev/zero: .*more than 1 MiB"):
        read_json(Path("/dev/zero"), most_bytes=2**20)
