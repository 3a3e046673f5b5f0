"""Documents read, tokenized and shuffled while training, for text larger than memory and disk: nothing is stored.

The source is read in windows of `shuffle_window` documents. Each rank takes its share of a window's documents, tokenizes them,
cuts them into blocks, and shuffles these. So the position in the data is two integers, the window and the blocks of it that
are used up; a resumed run reads past the windows before, without tokenizing them. The same number of ranks gives the same
steps; in a window each rank leaves out what goes beyond the rank with the fewest blocks.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from modern_llm import distributed
from modern_llm.config import UserError
from modern_llm.config.data import LanguageModelingDatasetConfig
from modern_llm.data.blocks import Blocks, document_ids, document_text, document_texts, held_out_keys
from modern_llm.data.messages import prompt_hash
from modern_llm.data.prepared import Example, InMemory, Mixture, PreparedData, fingerprint_of
from modern_llm.data.readers import BadRows, Row
from modern_llm.data.sources import is_held_out, left_out_files, preparation_version, stream_rows
from modern_llm.data.tokenizer import TextEncoder, tokenizer_fingerprint
from modern_llm.layout import Segment


class _Documents:
    """What `Blocks` cuts up, in memory."""

    def __init__(self, encoder: TextEncoder, texts: Iterable[str]) -> None:
        self.ids = [document_ids(encoder, ids) for ids in encoder.texts(list(texts)) if len(ids)]

    @property
    def content(self) -> str:
        return fingerprint_of(*self.ids)

    def example_tokens(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def segment(self, i: int, start: int, behind: int) -> Segment:
        ids = self.ids[i][start:behind]
        return Segment(ids, np.ones(len(ids), dtype=bool))

    def blocks(self, max_length: int) -> Blocks:
        return Blocks(self, np.arange(len(self.ids)), max_length)


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
        if self.source.weight != 1:
            raise UserError(
                f"weight={self.source.weight:g}: a streamed source is alone and is read again and again: leave it out"
            )
        self.longest = self.max_length
        self.bad = BadRows(skip=self.config.on_bad_row == "skip")
        self.held_out = held_out_keys(self.config)

    def windows(self, start: int, rank: int, world_size: int) -> Iterator[tuple[int, list[Example]]]:
        """This rank's blocks of each window from number `start` on; as many on every rank.

        Raises:
            UserError: a whole pass over the source gave no block.
        """
        given, skipped, whole = 0, 0, start == 0
        for number, texts, ends_pass in self._texts(start):
            order = np.random.default_rng([self.seed, 2, number]).permutation(len(texts))[rank::world_size]
            blocks = _Documents(self.encoder, (texts[i] for i in order)).blocks(self.max_length)
            count = distributed.minimum(len(blocks))
            shuffled = np.random.default_rng([self.seed, 3, number]).permutation(len(blocks))[:count]
            yield number, [blocks[int(i)] for i in shuffled]
            given += count
            if self.bad.count > skipped:
                skipped = self.bad.count
                print(f"{self.name}: {skipped} bad rows skipped so far", flush=True)
            if ends_pass and whole and not given:
                raise UserError(f"dataset_name={self.name!r}: a whole pass over it gave nothing to train on every rank")
            if ends_pass:
                whole = True

    def _texts(self, start: int) -> Iterator[tuple[int, list[str], bool]]:
        """The documents to train on of each window from number `start` on, and whether it is the last of a pass.

        Windows before `start` are read past.
        """
        number = 0
        while True:
            rows = stream_rows(self.name, self.source, "text", self.bad)
            window = list(itertools.islice(rows, self.config.window))
            if not window:
                raise UserError(f"dataset_name={self.name!r}: split {self.source.split!r} has no rows")
            while window:
                following = list(itertools.islice(rows, self.config.window))
                if number >= start:
                    yield number, list(self._to_train_on(window)), not following
                number, window = number + 1, following

    def _to_train_on(self, rows: Iterable[Row]) -> Iterator[str]:
        for row in rows:
            text = document_text(row, self.source.text_field or "text", self.bad)
            if text is None:
                continue
            key = prompt_hash(text)
            if key not in self.held_out and not is_held_out(key, self.config):
                yield text

    def fingerprint(self) -> str:
        """What decides the stream; its first window stands for the rows."""
        _, texts, _ = next(self._texts(0))
        settings = self.config.model_dump_json(exclude={"eval_split", "eval_dataset"})
        ends = str((self.max_length, self.seed, self.encoder.document_start, self.encoder.document_end))
        return fingerprint_of(settings, ends, tokenizer_fingerprint(self.encoder.tokenizer), preparation_version(), *texts)


def prepare_stream(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int, seed: int) -> PreparedData:
    """A stream to train on; what is held out of its first window (or the first window of what is held out), to evaluate on."""
    stream = DocumentStream(config, encoder, max_length, seed)
    report = {"streaming": 1, **left_out_files(stream.name, stream.source, "text")}
    return PreparedData(stream, _held_out(config, encoder, max_length), report)


def _held_out(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int) -> Mixture:
    eval_sources = config.eval_sources()
    if eval_sources is None and not config.eval_fraction:
        return Mixture((InMemory([]),), (1.0,))
    texts = document_texts(config, eval_sources or config.sources(), config.window)
    kept = (t for t in texts if eval_sources is not None or is_held_out(prompt_hash(t), config))
    return Mixture((_Documents(encoder, kept).blocks(max_length),), (1.0,))
