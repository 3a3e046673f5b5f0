"""Prepared data on disk: built once, found by content, whole or not there at all."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import pytest
from helpers import SENTENCES, write_jsonl

from modern_llm.config import DPOConfig, InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.data import instruction_datasets, lm_datasets, preference_datasets
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import PreparedData
from modern_llm.data.store import CACHE_VARIABLE, Store, StoreWriter, stored
from modern_llm.data.tokenizer import train_tokenizer

MODULES = {"text": lm_datasets, "instructions": instruction_datasets, "preferences": preference_datasets}
ROWS = {
    "text": [{"text": f"Story {n}"} for n in range(9)],
    "instructions": [{"prompt": f"Question {n}", "completion": f"Answer {n}"} for n in range(9)],
    "preferences": [
        {"prompt": f"Question {n}", "chosen": f"Answer {n}", "rejected": "no", "score_chosen": 3, "score_rejected": 1}
        for n in range(9)
    ],
}


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """An empty one."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepare(kind: str, path: Path, encoder: ChatEncoder, limits: Mapping[str, Any] = {}, **fields: Any) -> PreparedData:
    name = {"dataset_name": str(path), **fields}
    if kind == "text":
        return prepare_documents(
            LanguageModelingDatasetConfig(**name), encoder.encoder, **{"max_length": 32, "seed": 0, **limits}
        )
    if kind == "instructions":
        return prepare_instructions(InstructionDatasetConfig(**name), encoder)
    return prepare_preferences(PreferenceDatasetConfig(**name), DPOConfig(**limits), encoder)


def write_rows(folder: Path, kind: str) -> Path:
    return write_jsonl(folder / f"{kind}.jsonl", ROWS[kind])


def names(cache: Path) -> list[str]:
    """All that is in a cache, litter too."""
    return sorted(path.name for path in cache.iterdir())


# Built once


@pytest.mark.parametrize("kind", ROWS)
def test_what_is_there_is_not_built_again_whatever_its_file_is_called(tmp_path, own_cache, encoder, kind, monkeypatch) -> None:
    path = write_rows(tmp_path, kind)
    first = prepare(kind, path, encoder)

    def build(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(MODULES[kind], "_build", build)
    second = prepare(kind, path, encoder)
    assert second.fingerprint() == first.fingerprint()
    assert second.report == first.report
    renamed = path.rename(tmp_path / "renamed.jsonl")
    os.utime(renamed, (1, 1))
    assert prepare(kind, renamed, encoder).fingerprint() == first.fingerprint()
    assert len(names(own_cache)) == 1


@pytest.mark.parametrize(
    ("kind", "limits", "fields"),
    [
        ("text", {}, {"max_rows": 5}),
        ("text", {}, {"on_bad_row": "skip"}),
        ("instructions", {}, {"max_length": 100}),
        ("instructions", {}, {"truncation": "drop"}),
        ("instructions", {}, {"adapter": "prompt_completion"}),
        ("instructions", {}, {"prompt_field": "completion", "response_field": "prompt"}),
        ("preferences", {}, {"truncation": "cut_end"}),
        ("preferences", {}, {"lint": {"duplicate": "drop"}}),
        ("preferences", {}, {"chosen_field": "rejected", "rejected_field": "chosen"}),
        ("preferences", {}, {"min_score_ratio": 2.0}),
        ("preferences", {}, {"columns": {"chosen": "rejected", "rejected": "chosen"}}),
        ("instructions", {}, {"roles": {"bot": "assistant"}}),
        ("instructions", {}, {"train_on": "last"}),
        ("preferences", {"max_length": 100}, {}),
        ("preferences", {"max_prompt_length": 20}, {}),
        ("preferences", {"max_completion_length": 20}, {}),
    ],
)
def test_what_decides_the_tokens_makes_another_entry(tmp_path, own_cache, encoder, kind, limits, fields) -> None:
    path = write_rows(tmp_path, kind)
    prepare(kind, path, encoder)
    prepare(kind, path, encoder, limits, **fields)
    assert len(names(own_cache)) == 2


@pytest.mark.parametrize(
    ("kind", "limits", "fields"),
    [
        ("text", {"max_length": 7, "seed": 3}, {}),  # documents are stored whole
        ("text", {}, {"eval_fraction": 0.2}),
        ("instructions", {}, {"packing": True}),
        ("preferences", {"beta": 0.7}, {"eval_fraction": 0.2}),
    ],
)
def test_what_decides_no_token_makes_none(tmp_path, own_cache, encoder, kind, limits, fields) -> None:
    path = write_rows(tmp_path, kind)
    prepare(kind, path, encoder)
    prepare(kind, path, encoder, limits, **fields)
    prepare(kind, path, encoder, dataset_name={str(path): 0.5})
    assert len(names(own_cache)) == 1


@pytest.mark.parametrize("kind", ROWS)
def test_other_rows_another_tokenizer_and_another_template_make_another_entry(tmp_path, own_cache, encoder, kind) -> None:
    path = write_rows(tmp_path, kind)
    prepare(kind, path, encoder)
    prepare(kind, write_jsonl(tmp_path / "other.jsonl", ROWS[kind][1:]), encoder)
    assert len(names(own_cache)) == 2
    other = train_tokenizer(SENTENCES, vocab_size=280)
    prepare(kind, path, ChatEncoder(other))
    assert len(names(own_cache)) == 3
    assert isinstance(other.chat_template, str)
    other.chat_template = other.chat_template.replace("\\n", ":")
    prepare(kind, path, ChatEncoder(other))
    assert len(names(own_cache)) == (3 if kind == "text" else 4)


def test_other_code_makes_another_entry(tmp_path, own_cache, encoder, monkeypatch) -> None:
    path = write_rows(tmp_path, "text")
    prepare("text", path, encoder)
    monkeypatch.setattr("modern_llm.data.prepared.preparation_version", lambda: "of another release")
    prepare("text", path, encoder)
    assert len(names(own_cache)) == 2


# Damage


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])  # whole tokens, so that only the size tells


DAMAGES: dict[str, Callable[[Path], object]] = {
    "tokens cut off": lambda folder: _cut(folder / "tokens.bin"),
    "masks cut off": lambda folder: _cut(folder / "scored.bin"),
    "no tokens": lambda folder: (folder / "tokens.bin").unlink(),
    "ends cut off": lambda folder: _cut(folder / "segment_ends.npy"),
    "index cut off": lambda folder: _cut(folder / "index.json"),
    "index of zeros": lambda folder: (folder / "index.json").write_bytes(bytes(500)),
    "index of something else": lambda folder: (folder / "index.json").write_text('{"files": {}}'),
    "index of a list": lambda folder: (folder / "index.json").write_text("[]"),
    "no index": lambda folder: (folder / "index.json").unlink(),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_built_again(tmp_path, own_cache, encoder, damage) -> None:
    path = write_rows(tmp_path, "instructions")
    whole = prepare("instructions", path, encoder).fingerprint()
    (entry,) = own_cache.iterdir()
    damage(entry)
    assert prepare("instructions", path, encoder).fingerprint() == whole
    assert names(own_cache) == [entry.name]
    Store(entry)


loaded: list[str] = []


class Pickled:
    """An object that can only be read by running code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return note_load, ("pickle",)


def note_load(what: str) -> None:
    loaded.append(what)


def test_entries_are_plain_arrays_and_no_pickle_is_loaded_from_one(tmp_path, own_cache, encoder) -> None:
    path = write_rows(tmp_path, "instructions")
    whole = prepare("instructions", path, encoder).fingerprint()
    (entry,) = own_cache.iterdir()
    assert {file.suffix for file in entry.iterdir()} == {".bin", ".npy", ".json"}
    assert not any(np.load(file, allow_pickle=False).dtype.hasobject for file in entry.glob("*.npy"))
    np.save(entry / "rows.npy", np.array([Pickled()] * 9, dtype=object), allow_pickle=True)
    index = json.loads((entry / "index.json").read_text())
    index["files"]["rows.npy"] = (entry / "rows.npy").stat().st_size
    (entry / "index.json").write_text(json.dumps(index))
    assert prepare("instructions", path, encoder).fingerprint() == whole
    assert not loaded


# Several processes


def build(folder: Path) -> None:
    """A small store whose tokens are written in several pieces."""
    writer = StoreWriter(folder, vocab_size=300, all_scored=False)
    for row in range(6):
        ids = np.arange(1500 * row + 2, dtype=np.int32) % 300
        writer.add([(ids, ids % 3 > 0), (ids[:2], ids[:2] > 0)], row, row**9, row % 4)
    writer.close({"rows_read": 6})


def content(store: Store) -> list[list[Any]]:
    """All that a store holds, as it is read."""
    arrays = [store.segment_ends, store.example_ends, store.num_scored, store.rows, store.keys, store.flags]
    segments = [part.tolist() for i in range(len(store)) for s in store.segments(i) for part in (s.ids, s.scored)]
    return [array.tolist() for array in arrays] + segments


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@needs_fork
def test_two_processes_that_build_one_entry_at_once_both_get_all_of_it(tmp_path, own_cache) -> None:
    (tmp_path / "alone").mkdir()
    build(tmp_path / "alone")
    context = multiprocessing.get_context("fork")
    both_build, found = context.Barrier(2, timeout=60), context.Queue()

    def build_together(folder: Path) -> None:
        both_build.wait()
        build(folder)

    def run() -> None:
        found.put(content(stored({"test": 1}, build_together)))

    builders = [context.Process(target=run) for _ in range(2)]
    for builder in builders:
        builder.start()
    assert [found.get(timeout=60) for _ in builders] == [content(Store(tmp_path / "alone"))] * 2
    for builder in builders:
        builder.join()
    assert len(names(own_cache)) == 1


def killed_at_line(line: int | None, action: Callable[[], object]) -> tuple[bool, int]:
    """Run an action in a child process that gets SIGKILL as it reaches its n-th line of ours (or of `shutil`).

    Returns:
        Whether it was killed; lines that it ran.
    """
    ours = (str(Path(sys.modules["modern_llm"].__file__ or "").parent), __file__, shutil.__file__)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.startswith(ours):
                return None
            lines += event == "line"
            if lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            action()
            sys.settrace(None)
            os.write(writing, str(lines).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        ran = pipe.read()
    _, status = os.waitpid(child, 0)
    assert ran or os.WIFSIGNALED(status), "the action failed"
    return os.WIFSIGNALED(status), int(ran or line or 0)


@needs_fork
def test_a_build_killed_at_any_point_leaves_nothing_that_looks_finished(own_cache) -> None:
    """50 kills, each among what the ones before it left, and at times with a damaged entry."""
    key, random = {"test": 1}, Random(0)
    expected = content(stored(key, build))
    (entry,) = own_cache.iterdir()
    shutil.rmtree(entry)
    _, num_lines = killed_at_line(None, lambda: stored(key, build))
    num_whole = num_with_litter = 0
    for kill in range(50):
        if entry.is_dir() and kill % 2:
            _cut(entry / "tokens.bin")
        else:
            shutil.rmtree(entry, ignore_errors=True)
        first = 1 if kill % 2 else num_lines - 60  # the end, when names are given, more often
        killed, _ = killed_at_line(random.randint(first, num_lines), lambda: stored(key, build))
        assert killed
        found = finished(entry)
        assert found in (None, expected)
        num_whole += found is not None
        num_with_litter += any(name.startswith(".") for name in names(own_cache))
        if kill % 3 == 0:
            shutil.rmtree(entry, ignore_errors=True)
            assert content(stored(key, build)) == expected
            assert names(own_cache) == [entry.name]
    assert num_whole
    assert num_with_litter


def finished(entry: Path) -> list[list[Any]] | None:
    """What is read from an entry that is taken for a finished one."""
    try:
        return content(Store(entry))
    except (OSError, ValueError):
        return None


def test_only_what_dead_processes_of_this_machine_left_is_removed(own_cache) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = f".0123.{socket.gethostname()}.{dead.pid}.ab.partial"
    kept = [f".0123.{socket.gethostname()}.{os.getpid()}.ab.partial", f".0123.elsewhere.{dead.pid}.ab.partial"]
    for name in (left, *kept):
        (own_cache / name).mkdir(parents=True)
        (own_cache / name / "tokens.bin").write_bytes(b"")
    stored({"test": 1}, build)
    assert sorted(name for name in names(own_cache) if name.startswith(".")) == sorted(kept)
