"""Documents read, tokenized and shuffled while training, for text larger than memory and disk: nothing is stored.

The source is read in windows of `shuffle_window` documents. Each rank takes its share of a window's documents, tokenizes them,
cuts them into blocks, and shuffles these. So the position in the data is two integers, the window and the blocks of it that
are used up, whatever the ranks; a resumed run reads past the windows before, without tokenizing them.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from modern_llm import distributed
from modern_llm.config import UserError
from modern_llm.config.data import LanguageModelingDatasetConfig
from modern_llm.data.lm_datasets import Blocks, document_ids, document_text
from modern_llm.data.prepared import Example, InMemory, Mixture, PreparedData, fingerprint_of
from modern_llm.data.readers import BadRows, Row
from modern_llm.data.sources import is_held_out, preparation_version, prompt_hash, stream_rows
from modern_llm.data.tokenizer import TextEncoder, tokenizer_fingerprint
from modern_llm.layout import Segment


@dataclass
class _Documents:
    """What `Blocks` cuts up, in memory."""

    ids: list[np.ndarray]
    content: str = ""

    def example_tokens(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def segment(self, i: int, start: int, behind: int) -> Segment:
        ids = self.ids[i][start:behind]
        return Segment(ids, np.ones(len(ids), dtype=bool))


@dataclass
class DocumentStream:
    """Windows of blocks, without end: after the last document comes the first again."""

    config: LanguageModelingDatasetConfig
    encoder: TextEncoder
    max_length: int
    seed: int
    epoch_size: None = None
    """Not known."""

    def __post_init__(self) -> None:
        sources = self.config.sources()
        if len(sources) != 1:
            raise UserError(f"streaming reads one source, and dataset_name has {len(sources)}: leave streaming out to mix them")
        ((self.name, self.source),) = sources.items()
        self.longest = self.max_length
        self.bad = BadRows(skip=self.config.on_bad_row == "skip")

    def windows(self, start: int, rank: int, world_size: int) -> Iterator[tuple[int, list[Example]]]:
        """This rank's blocks of each window from number `start` on; as many on every rank."""
        for number, texts in self._texts(start):
            order = np.random.default_rng([self.seed, 2, number]).permutation(len(texts))[rank::world_size]
            ids = [ids for ids in self.encoder.texts([texts[i] for i in order]) if len(ids)]
            documents = _Documents([document_ids(self.encoder, piece) for piece in ids])
            blocks = Blocks(documents, np.arange(len(documents.ids)), self.max_length)
            count = distributed.minimum(len(blocks))
            shuffled = np.random.default_rng([self.seed, 3, number]).permutation(len(blocks))[:count]
            yield number, [blocks[int(i)] for i in shuffled]

    def _texts(self, start: int) -> Iterator[tuple[int, list[str]]]:
        """The documents to train on of each window, from number `start` on; those before are read past."""
        number, fraction = 0, self.config.eval_fraction
        for is_first_pass in itertools.chain([True], itertools.repeat(False)):
            rows = stream_rows(self.name, self.source, "text", self.bad)
            while window := list(itertools.islice(rows, self.config.shuffle_window)):
                if number >= start:
                    yield number, [t for t in self.documents(window) if not is_held_out(prompt_hash(t), fraction)]
                number += 1
            if is_first_pass and not number:
                raise UserError(f"dataset_name={self.name!r}: split {self.source.split!r} has no rows")

    def documents(self, rows: Iterable[Row]) -> Iterator[str]:
        """The text of each row that has one."""
        for row in rows:
            text = document_text(row, self.source.text_field or "text", self.bad)
            if text:
                yield text

    def fingerprint(self) -> str:
        """What decides the stream, but for rows that change at the source while it is read."""
        settings = self.config.model_dump_json(exclude={"eval_split"})
        return fingerprint_of(settings, tokenizer_fingerprint(self.encoder.tokenizer), preparation_version(), str(self.seed))


def prepare_stream(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int, seed: int) -> PreparedData:
    """A stream to train on; what is held out of its first window (or of the first window of `eval_split`), to evaluate on."""
    stream = DocumentStream(config, encoder, max_length, seed)
    return PreparedData(stream, _held_out(stream), {"streaming": 1})


def _held_out(stream: DocumentStream) -> Mixture:
    config = stream.config
    if config.eval_split is None and not config.eval_fraction:
        return Mixture((InMemory([]),), (1.0,))
    source = stream.source if config.eval_split is None else stream.source.model_copy(update={"split": config.eval_split})
    texts = stream.documents(itertools.islice(stream_rows(stream.name, source, "text", stream.bad), config.shuffle_window))
    kept = [t for t in texts if config.eval_split is not None or is_held_out(prompt_hash(t), config.eval_fraction)]
    documents = _Documents([document_ids(stream.encoder, ids) for ids in stream.encoder.texts(kept) if len(ids)])
    return Mixture((Blocks(documents, np.arange(len(documents.ids)), stream.max_length),), (1.0,))
