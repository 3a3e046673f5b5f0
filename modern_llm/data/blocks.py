"""Documents as token ids, and their cutting into blocks without padding in which they keep their borders."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from modern_llm.config import UserError
from modern_llm.config.data import LanguageModelingDatasetConfig, SourceConfig
from modern_llm.data.columns import Columns, RowError
from modern_llm.data.messages import prompt_hash
from modern_llm.data.prepared import Example, Part, fingerprint_of
from modern_llm.data.readers import BadRows, Row
from modern_llm.data.sources import open_source, stream_rows
from modern_llm.data.tokenizer import TextEncoder
from modern_llm.layout import Segment


def document_ids(encoder: TextEncoder, ids: np.ndarray) -> np.ndarray:
    """A document's ids with its begin token, if the tokenizer has one, and its end token."""
    return np.concatenate([encoder.document_start, ids, [encoder.document_end]]).astype(np.int32)


def document_text(row: Row, field: str, bad: BadRows) -> str | None:
    """The text of a row; None if it has none and bad rows are skipped."""
    try:
        return Columns(row.values).text(field, "set text_field to the column that holds the document")
    except RowError as error:
        bad(f"{row.place}: {error}")
        return None


def document_texts(
    config: LanguageModelingDatasetConfig, sources: Mapping[str, SourceConfig], most: int | None = None
) -> Iterator[str]:
    """The text of every row of every source.

    Args:
        config: the data set; what it streams is streamed here.
        sources: its own, or those held out.
        most: rows of each source to read.
    """
    bad = BadRows(skip=config.on_bad_row == "skip")
    for name, source in sources.items():
        if config.streaming:
            rows = stream_rows(name, source, "text", bad)
        else:
            rows = open_source(name, source, "text").rows(bad)
        for row in itertools.islice(rows, most):
            text = document_text(row, source.text_field or "text", bad)
            if text is not None:
                yield text


def held_out_keys(config: LanguageModelingDatasetConfig) -> frozenset[int]:
    """Hashes of the documents of `eval_split` or `eval_dataset`: none of them is trained on."""
    return frozenset(prompt_hash(text) for text in document_texts(config, config.eval_sources() or {}))


class Documents(Protocol):
    """What `Blocks` cuts up: a store with one segment for each document, or the like in memory."""

    @property
    def content(self) -> str:
        """Hash of the tokens."""
        ...

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
            raise UserError(f"dataset_config.max_length={max_length} (or model_config.max_seq_len): set 2 or more")
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
