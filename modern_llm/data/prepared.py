"""What every kind of data set becomes: examples on the host, ready to be packed, and a report of what happened to the rows."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modern_llm.config import UserError
from modern_llm.config.data import DatasetConfig, LanguageModelingDatasetConfig, MoreDocuments
from modern_llm.data.sources import Kind, Rows, is_held_out, joined, load_rows
from modern_llm.layout import Segment, num_scored


@dataclass(frozen=True)
class Example:
    """What is drawn together: a block of documents, one chat, or the two sides of a pair (chosen first)."""

    segments: tuple[Segment, ...]
    row: int
    """Where it came from: the row's number in its split (pretraining: the block's number)."""

    @property
    def num_scored(self) -> int:
        return sum(num_scored(segment) for segment in self.segments)


@dataclass(frozen=True)
class PreparedData:
    """Training and evaluation examples of a stage."""

    train: list[Example]
    evaluation: list[Example]
    report: Counter[str] = field(default_factory=Counter)
    """Rows read, used, held out, cut and dropped, by reason; tokens."""

    def fingerprint(self) -> str:
        """sha256 over every token and every mask, in order: equal data trains equally."""
        digest = hashlib.sha256()
        for part in (self.train, self.evaluation):
            digest.update(f"{len(part)};".encode())
            for example in part:
                digest.update(f"{len(example.segments)},".encode())
                for segment in example.segments:
                    digest.update(segment.ids.tobytes())
                    digest.update(np.packbits(segment.scored).tobytes())
        return digest.hexdigest()


def segment(parts: list[tuple[list[int], bool]]) -> Segment:
    """A segment from runs of ids that count as a whole or not at all."""
    ids = np.array([i for run, _ in parts for i in run], dtype=np.int32)
    scored = np.array([counts for run, counts in parts for _ in run], dtype=bool)
    return Segment(ids, scored)


def split_rows(
    config: DatasetConfig, kind: Kind, key: Callable[[int, Rows], int], report: Counter[str]
) -> tuple[Rows, list[int], Rows, list[int]]:
    """Training and evaluation rows: the source of each, and which of its rows to use.

    Args:
        config: says how rows are held out.
        kind: kind of data set.
        key: hash of the prompt of row i; rows with equal hashes never stand on both sides.
        report: gets the counts.
    """
    rows = load_rows(config, kind, config.split)
    if isinstance(config, LanguageModelingDatasetConfig) and config.also:
        rows = joined([rows, *(_documents_of(source, config.text_field) for source in config.also)])
    report["rows_read"] = len(rows)
    if config.eval_split is None:
        held_out = [config.eval_fraction > 0 and is_held_out(key(i, rows), config.eval_fraction) for i in range(len(rows))]
        return (
            rows,
            [i for i, out in enumerate(held_out) if not out],
            rows,
            [i for i, out in enumerate(held_out) if out],
        )
    eval_rows = load_rows(config, kind, config.eval_split)
    eval_keys = {key(i, eval_rows) for i in range(len(eval_rows))}
    used = [i for i in range(len(rows)) if key(i, rows) not in eval_keys]
    report["dropped_because_held_out_too"] = len(rows) - len(used)
    return rows, used, eval_rows, list(range(len(eval_rows)))


def _documents_of(source: MoreDocuments, field_name: str) -> Rows:
    """The documents of one more source, under the main source's column name."""
    rows = load_rows(source, "text", source.split)
    texts = [text_column(rows, i, source.text_field) for i in range(len(rows))]
    return Rows([{field_name: text} for text in texts], rows.place)


def finish(config: DatasetConfig, train: list[Example], evaluation: list[Example], report: Counter[str]) -> PreparedData:
    """Close a preparation.

    Raises:
        UserError: nothing is left to train on.
    """
    report["examples"], report["eval_examples"] = len(train), len(evaluation)
    report["tokens"] = sum(len(s) for example in train for s in example.segments)
    report["scored_tokens"] = sum(example.num_scored for example in train)
    if not train:
        counts = ", ".join(f"{name}={count}" for name, count in report.items() if count)
        raise UserError(f"dataset_name={config.dataset_name!r}: no example is left to train on ({counts})")
    return PreparedData(train, evaluation, report)


def text_column(rows: Rows, i: int, field_name: str) -> str:
    """The text of a column.

    Raises:
        UserError: the column is missing or holds something else, by file, line and field.
    """
    row = rows.rows[i]
    if field_name not in row:
        raise UserError(f"{rows.place(i)}: no column '{field_name}' (columns: {', '.join(map(str, row)) or 'none'})")
    return checked_text(row[field_name], f"{rows.place(i)}: column '{field_name}'")


def checked_text(value: Any, place: str) -> str:
    """A text that a tokenizer can take.

    Raises:
        UserError: not text, or with half a character in it.
    """
    if not isinstance(value, str):
        raise UserError(f"{place} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds half a character ({value[error.start]!a}): take it out of the file") from None
    return value
