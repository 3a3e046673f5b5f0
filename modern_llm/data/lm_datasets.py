"""Documents for pretraining, as blocks without padding in which documents keep their borders."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from modern_llm.config import UserError
from modern_llm.config.data import LanguageModelingDatasetConfig, SourceConfig
from modern_llm.data.messages import RowError, text_column
from modern_llm.data.prepared import (
    Example,
    Mixture,
    Part,
    PreparedData,
    PreparedSource,
    Report,
    fingerprint_of,
    finish,
    prepare_sources,
    read_rows,
)
from modern_llm.data.readers import BadRows, Row
from modern_llm.data.sources import Source, is_held_out, open_source, prompt_hash
from modern_llm.data.store import ENDS_WITH_END_TOKEN, StoreWriter
from modern_llm.data.tokenizer import TextEncoder, tokenizer_fingerprint
from modern_llm.layout import Segment

__all__ = ["LanguageModelingDatasetConfig", "prepare_documents", "training_texts"]

CHARACTERS_AT_ONCE = 1_000_000
"""Text tokenized in one parallel call; bounds the memory."""


class Documents(Protocol):
    """What `Blocks` cuts up: a store with one segment for each document, or the like in memory."""

    content: str
    """Hash of the tokens."""

    def example_tokens(self) -> np.ndarray: ...

    def segment(self, i: int, start: int, behind: int) -> Segment: ...


class Blocks(Part):
    """Documents of a store cut into blocks of exactly `max_length` tokens (the last may be shorter).

    A document that goes over a block's end goes on in the next block as a segment of its own, which repeats the last token:
    what follows it is predicted there. Nothing is copied; a block is found by bisection when it is asked for.
    """

    def __init__(self, store: Documents, documents: np.ndarray, max_length: int) -> None:
        """
        Args:
            store: the documents.
            documents: (n,) int64 numbers of the documents to use, in order.
            max_length: tokens of a block.
        """
        if max_length < 2:
            raise UserError(f"max_length={max_length}: a block holds at least 2 tokens, one to see and one to predict")
        self.store, self.documents, self.max_length = store, documents, max_length
        lengths = store.example_tokens()[documents]
        self.starts, self.fed = _lay_out(lengths, max_length)
        self.num_tokens = self.fed
        self.num_scored = int((lengths - 1).sum())
        self.longest = min(max_length, int(lengths.max())) if len(lengths) else 0

    def __len__(self) -> int:
        return -(-self.fed // self.max_length)

    def __getitem__(self, i: int) -> Example:  # type: ignore[override] - no slices
        if not 0 <= i < len(self):
            raise IndexError(i)
        first, behind = i * self.max_length, min((i + 1) * self.max_length, self.fed)
        document = int(np.searchsorted(self.starts, first, side="right")) - 1
        segments, at = [], first
        while at < behind:
            start = int(self.starts[document])
            # each block that the document has entered since its first repeats one token
            skipped = at - start - (i - start // self.max_length)
            end = int(self.starts[document + 1]) if document + 1 < len(self.starts) else self.fed
            width = min(end, behind) - at
            segments.append(self.store.segment(int(self.documents[document]), skipped, skipped + width))
            at += width
            document += 1
        return Example(tuple(segments), row=i)

    def fingerprint(self) -> str:
        return fingerprint_of(self.store.content, self.documents, str(self.max_length))


def _lay_out(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, int]:
    """Where each document starts in the tokens that are fed, and how many are: one more for every cut."""
    starts, at = [], 0
    for length in lengths.tolist():
        starts.append(at)
        room = max_length - at % max_length
        cuts = 0 if length <= room else -(-(length - room) // (max_length - 1))
        at += length + cuts
    return np.array(starts, dtype=np.int64), at


def training_texts(config: LanguageModelingDatasetConfig) -> Iterator[str]:
    """The documents of the training part, for training a tokenizer."""
    held_out: set[int] = set()
    if config.eval_split is not None:
        held_out = {prompt_hash(text) for text in _texts(config, config.eval_split)}
    for text in _texts(config, None):
        key = prompt_hash(text)
        if key not in held_out and not is_held_out(key, config.eval_fraction):
            yield text


def _texts(config: LanguageModelingDatasetConfig, split: str | None) -> Iterator[str]:
    bad = BadRows(skip=config.on_bad_row == "skip")
    for name, source in config.sources().items():
        for row in open_source(name, source, "text", split).rows(bad):
            text = document_text(row, source.text_field or "text", bad)
            if text is not None:
                yield text


def prepare_documents(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int, seed: int) -> PreparedData:
    """Blocks of exactly `max_length` tokens (the last of a source may be shorter) in an order that the seed decides.

    Each document ends with the end token, taught once, and begins with the tokenizer's begin token if it has one.
    """
    report: Report = {}
    sources = _sources(config, encoder, report)
    train = [Blocks(s.train, s.used[np.random.default_rng([seed, 0]).permutation(len(s.used))], max_length) for s in sources]
    return finish(config, Mixture(train, [s.weight for s in sources]), _held_out(sources, max_length), sources, report)


def held_out_blocks(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int) -> Sequence[Example]:
    """The blocks of the evaluation part."""
    return _held_out(_sources(config, encoder, {}), max_length)


def _sources(config: LanguageModelingDatasetConfig, encoder: TextEncoder, report: Report) -> list[PreparedSource]:
    ends = [encoder.document_start, encoder.document_end]  # the fingerprint does not know whether a begin token is used
    key = {"tokenizer": tokenizer_fingerprint(encoder.tokenizer), "document": ends}
    return prepare_sources(config, "text", key, encoder.vocab_size, True, partial(_build, encoder), report)


def _held_out(sources: list[PreparedSource], max_length: int) -> Mixture:
    return Mixture([Blocks(s.evaluation, s.held_out, max_length) for s in sources], [1.0] * len(sources))


def document_ids(encoder: TextEncoder, ids: np.ndarray) -> np.ndarray:
    """A document's ids with its begin token, if the tokenizer has one, and its end token."""
    return np.concatenate([encoder.document_start, ids, [encoder.document_end]]).astype(np.int32)


def document_text(row: Row, field: str, bad: BadRows) -> str | None:
    """The text of a row; None if it has none and bad rows are skipped."""
    try:
        return text_column(row.values, field)
    except RowError as error:
        bad(f"{row.place}: {error}")
        return None


def _build(
    encoder: TextEncoder, config: SourceConfig, source: Source, writer: StoreWriter, bad: BadRows, report: Report
) -> None:
    field = config.text_field or "text"
    waiting: list[tuple[int, str]] = []
    characters = 0

    def flush() -> None:
        for (number, text), ids in zip(waiting, encoder.texts([text for _, text in waiting]), strict=True):
            if not len(ids):
                report["dropped_because_empty"] = report.get("dropped_because_empty", 0) + 1
                continue
            writer.add([(document_ids(encoder, ids), None)], number, prompt_hash(text), ENDS_WITH_END_TOKEN)

    for number, row in read_rows(source, bad, report, "documents"):
        text = document_text(row, field, bad)
        if text is None:
            continue
        waiting.append((number, text))
        characters += len(text)
        if characters >= CHARACTERS_AT_ONCE:
            flush()
            waiting, characters = [], 0
    flush()
