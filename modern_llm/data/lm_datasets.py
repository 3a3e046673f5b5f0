"""Documents for pretraining, as blocks without padding in which documents keep their borders."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from modern_llm.config.data import LanguageModelingDatasetConfig, SourceConfig
from modern_llm.data.blocks import Blocks, document_ids, document_text, document_texts, held_out_keys
from modern_llm.data.held_out import held_out_mixture
from modern_llm.data.messages import prompt_hash
from modern_llm.data.prepared import (
    Example,
    Mixture,
    PreparedData,
    PreparedSource,
    Report,
    count,
    finish,
    prepare_sources,
    read_rows,
)
from modern_llm.data.readers import BadRows
from modern_llm.data.sources import Source, is_held_out
from modern_llm.data.store import ENDS_WITH_END_TOKEN, StoreWriter
from modern_llm.data.streaming import prepare_stream
from modern_llm.data.tokenizer import TextEncoder, tokenizer_fingerprint

__all__ = ["LanguageModelingDatasetConfig", "prepare_documents", "training_texts"]

CHARACTERS_AT_ONCE = 1_000_000
"""Text tokenized in one call; bounds the memory."""


def training_texts(config: LanguageModelingDatasetConfig) -> Iterator[str]:
    """The documents of the training part, for training a tokenizer; of a stream, those of the first window."""
    held_out = held_out_keys(config)
    for text in document_texts(config, config.sources(), config.window if config.streaming else None):
        key = prompt_hash(text)
        if key not in held_out and not is_held_out(key, config):
            yield text


def prepare_documents(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int, seed: int) -> PreparedData:
    """Blocks of exactly `max_length` tokens (the last of a source may be shorter) in an order that the seed decides.

    Each document ends with the end token, taught once, and begins with the tokenizer's begin token if it has one. With
    `streaming`, a stream of such blocks.
    """
    if config.streaming:
        return prepare_stream(config, encoder, max_length, seed)
    report: Report = {}
    sources = _sources(config, encoder, report)
    train = [Blocks(s.train, s.used[np.random.default_rng([seed, 0]).permutation(len(s.used))], max_length) for s in sources]
    evaluation = _held_out(config, sources, max_length)
    return finish(config, Mixture(train, [s.weight for s in sources]), evaluation, sources, report)


def held_out_blocks(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int) -> Sequence[Example]:
    """The blocks of the evaluation part."""
    if config.streaming:
        return prepare_stream(config, encoder, max_length, seed=0).evaluation
    return _held_out(config, _sources(config, encoder, {}), max_length)


def _sources(config: LanguageModelingDatasetConfig, encoder: TextEncoder, report: Report) -> list[PreparedSource]:
    ends = [encoder.document_start, encoder.document_end]  # the fingerprint does not know whether a begin token is used
    key = {"tokenizer": tokenizer_fingerprint(encoder.tokenizer), "document": ends}
    return prepare_sources(config, "text", key, encoder.vocab_size, True, partial(_build, encoder), report)


def _held_out(config: LanguageModelingDatasetConfig, sources: list[PreparedSource], max_length: int) -> Mixture:
    return held_out_mixture(config, [Blocks(s.evaluation, s.held_out, max_length) for s in sources])


def _build(
    encoder: TextEncoder, config: SourceConfig, source: Source, writer: StoreWriter, bad: BadRows, report: Report
) -> None:
    field = config.text_field or "text"
    read: deque[list[tuple[int, str]]] = deque()  # what is being encoded

    def batches() -> Iterator[list[str]]:
        batch: list[tuple[int, str]] = []
        characters = 0
        for number, row in read_rows(source, bad, report, "documents"):
            text = document_text(row, field, bad)
            if text is None:
                continue
            batch.append((number, text))
            characters += len(text)
            if characters >= CHARACTERS_AT_ONCE:
                read.append(batch)
                yield [text for _, text in batch]
                batch, characters = [], 0
        read.append(batch)
        yield [text for _, text in batch]

    for encoded in encoder.batches(batches()):
        for (number, text), ids in zip(read.popleft(), encoded, strict=True):
            if len(ids):
                writer.add([(document_ids(encoder, ids), None)], number, prompt_hash(text), ENDS_WITH_END_TOKEN)
            else:
                count(report, "dropped_because_empty")
