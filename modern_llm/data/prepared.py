"""What every kind of data set becomes: examples ready to be packed into rows, and a report of what happened to the data."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from modern_llm import distributed
from modern_llm.config import UserError
from modern_llm.config.data import DatasetConfig, SourceConfig
from modern_llm.data.readers import BadRows, Row
from modern_llm.data.sources import Kind, Source, are_held_out, open_source, preparation_version
from modern_llm.data.store import CUT_END, CUT_START, ENDS_WITH_END_TOKEN, Store, StoreWriter, stored
from modern_llm.layout import Segment, num_scored

Report = dict[str, Any]
"""Counts of rows and tokens by name; what the numbers are is in docs/data-formats.md."""


@dataclass(frozen=True)
class Example:
    """What is drawn together: a block of documents, one chat or a pack of them, or the two sides of a pair (chosen first)."""

    segments: tuple[Segment, ...]
    row: int
    """Where it came from: the row's number in its source (pretraining: the block's number)."""
    reference: np.ndarray | None = None
    """What a reference says of it, for the objective that asked for it (`modern_llm.objectives.reference`)."""

    @property
    def num_tokens(self) -> int:
        """Tokens that a packed row holds for it."""
        return sum(len(segment) - segment.shared for segment in self.segments)

    @property
    def num_scored(self) -> int:
        return sum(num_scored(segment) for segment in self.segments)


class Part(Sequence[Example]):
    """The examples of one source."""

    num_tokens: int
    """Tokens of all examples."""
    num_scored: int
    """How many of them count."""
    longest: int
    """Tokens of the longest segment."""

    def fingerprint(self) -> str:
        """A hash of every token and mask, in order."""
        raise NotImplementedError


class InMemory(Part):
    """A list of examples."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        lengths = [len(segment) for example in examples for segment in example.segments]
        self.num_tokens, self.longest = sum(lengths), max(lengths, default=0)
        self.num_scored = sum(example.num_scored for example in examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:  # type: ignore[override] - no slices
        return self.examples[i]

    def fingerprint(self) -> str:
        return fingerprint_of(*(data for e in self.examples for s in e.segments for data in (s.ids, s.scored, b"|")))


class StoredExamples(Part):
    """Some examples of a store, each alone or several of them packed into one."""

    def __init__(self, store: Store, chosen: np.ndarray, pack_ends: np.ndarray | None = None) -> None:
        """
        Args:
            store: where they are.
            chosen: (n,) int64 numbers of the examples to use.
            pack_ends: (packs,) int64: pack p holds `chosen[pack_ends[p - 1] : pack_ends[p]]`. None: each is one.
        """
        self.store, self.chosen = store, chosen
        self.pack_ends = np.arange(1, len(chosen) + 1) if pack_ends is None else pack_ends
        tokens = store.example_tokens()[chosen]
        self.num_tokens, self.num_scored = int(tokens.sum()), int(store.num_scored[chosen].sum())
        segments = np.diff(store.segment_ends, prepend=0)
        self.longest = int(segments.max()) if len(segments) else 0

    def __len__(self) -> int:
        return len(self.pack_ends)

    def __getitem__(self, i: int) -> Example:  # type: ignore[override] - no slices
        first = int(self.pack_ends[i - 1]) if i else 0
        members = self.chosen[first : int(self.pack_ends[i])]
        segments = tuple(segment for member in members for segment in self.store.segments(int(member)))
        return Example(segments, int(self.store.rows[members[0]]))

    def fingerprint(self) -> str:
        return fingerprint_of(self.store.content, self.chosen, self.pack_ends)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch: (num_examples,) int64, the same on every machine."""
    return np.random.default_rng([seed, 1 + epoch]).permutation(num_examples)


@dataclass(frozen=True)
class Mixture(Sequence[Example]):
    """Examples of several sources, and how often an epoch goes through each."""

    parts: Sequence[Part]
    weights: Sequence[float]
    names: Sequence[str] = ()
    """Name of each part's source where it is reported alone (`modern_llm.data.held_out`); what has none is empty."""

    def __len__(self) -> int:
        """Examples that exist, each counted once."""
        return sum(len(part) for part in self.parts)

    def __getitem__(self, i: int) -> Example:  # type: ignore[override] - no slices
        i += len(self) if i < 0 else 0
        for part in self.parts:
            if 0 <= i < len(part):
                return part[int(i)]
            i -= len(part)
        raise IndexError(i)

    @property
    def epoch_size(self) -> int:
        """Examples that an epoch draws."""
        return sum(whole * len(part) + more for part, (whole, more) in zip(self.parts, self._passes(), strict=True))

    def fingerprint(self) -> str:
        """sha256 over every token and every mask, in order, and the weights."""
        return fingerprint_of(*(part.fingerprint() for part in self.parts), repr([float(w) for w in self.weights]))

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max((part.longest for part in self.parts), default=0)

    def _passes(self) -> Iterator[tuple[int, int]]:
        """Of each part: whole passes, and the examples of the pass that is cut short. No part is left out altogether."""
        for part, weight in zip(self.parts, self.weights, strict=True):
            whole = int(weight)
            more = round((weight - whole) * len(part))
            yield whole, more if whole else max(more, min(1, len(part)))

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """(epoch_size,) int64: what an epoch draws, in order; a pure function of its arguments.

        A weight of 1/2 takes another half each epoch: the parts of a pass that is cut short follow each other round a fixed
        permutation.
        """
        drawn, offset = [], 0
        for number, (part, (whole, more)) in enumerate(zip(self.parts, self._passes(), strict=True)):
            drawn += [offset + np.arange(len(part))] * whole
            if more:
                circle = np.random.default_rng([seed, 0, number]).permutation(len(part))
                drawn.append(offset + circle[(epoch * more + np.arange(more)) % len(part)])
            offset += len(part)
        together = np.concatenate(drawn)
        return together[epoch_order(len(together), seed, epoch)]


@dataclass(frozen=True)
class Referenced(Sequence[Example]):
    """A mixture whose examples bring what the reference says of them; everything else about it is the mixture's."""

    mixture: Mixture
    table: np.ndarray
    """(examples, 2, 2) fp32: of the chosen and of the rejected answer, the log-prob of the whole and of its first m tokens, m
    the length of the shorter one; nats."""

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, i: int) -> Example:  # type: ignore[override] - no slices
        return replace(self.mixture[i], reference=self.table[i])

    @property
    def epoch_size(self) -> int:
        return self.mixture.epoch_size

    @property
    def longest(self) -> int:
        return self.mixture.longest

    def fingerprint(self) -> str:
        return self.mixture.fingerprint()

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return self.mixture.epoch_order(seed, epoch)


class Stream(Protocol):
    """Examples that are read while training, without end (`modern_llm.data.streaming`)."""

    epoch_size: None
    longest: int

    def fingerprint(self) -> str: ...

    def windows(self, start: int, rank: int, world_size: int) -> Iterator[tuple[int, list[Example]]]: ...


@dataclass(frozen=True)
class PreparedData:
    """Training and evaluation examples of a stage."""

    train: Mixture | Referenced | Stream
    evaluation: Mixture | Referenced
    report: Report = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Equal data trains equally."""
        return fingerprint_of(self.train.fingerprint(), self.evaluation.fingerprint())

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(self.train.longest, self.evaluation.longest)


def mixture_of(examples: Sequence[Example]) -> Mixture:
    """Examples in memory, each once an epoch."""
    return Mixture((InMemory(examples),), (1.0,))


def fingerprint_of(*content: str | bytes | np.ndarray) -> str:
    """sha256 over several pieces."""
    digest = hashlib.sha256()
    for item in content:
        data = item.encode() if isinstance(item, str) else item if isinstance(item, bytes) else np.ascontiguousarray(item).data
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def segment_arrays(parts: Sequence[tuple[Sequence[int], bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask from runs of ids that count as a whole or not at all."""
    ids = np.array([i for run, _ in parts for i in run], dtype=np.int32)
    scored = np.repeat([counts for _, counts in parts], [len(run) for run, _ in parts]).astype(bool)
    return ids, scored


Build = Callable[[SourceConfig, Source, StoreWriter, BadRows, Report], None]
"""Reads a source into a store and counts what happens to its rows."""


@dataclass(frozen=True)
class PreparedSource:
    """One source of a mixture, in tokens."""

    weight: float
    train: Store
    used: np.ndarray
    """(n,) int64: the examples to train on."""
    evaluation: Store
    held_out: np.ndarray
    """(n,) int64: the examples held out."""


def prepare_sources(
    config: DatasetConfig, kind: Kind, key: dict[str, Any], vocab_size: int, all_scored: bool, build: Build, report: Report
) -> list[PreparedSource]:
    """Every source of a data set as a store, built at most once, and which of its examples are held out.

    Args:
        config: the data set.
        kind: what its rows are for.
        key: what decides the tokens besides rows and code: tokenizer, template, limits.
        vocab_size: of the tokenizer.
        all_scored: every token counts.
        build: reads the rows.
        report: gets the counts of all sources together.

    Raises:
        UserError: a source is not there, or a row cannot be read.
    """

    def store_of(name: str, source: SourceConfig, prefix: str = "") -> Store:
        opened = open_source(name, source, kind)
        whole_key = {
            **key,
            "kind": kind,
            "source": opened.fingerprint(),
            **source.model_dump(include={"text_field", "adapter", "columns", "roles"}),
            "code": preparation_version(),
            "on_bad_row": config.on_bad_row,
        }

        def fill(folder: Path) -> None:
            counts: Report = {"rows_read": 0}
            bad = BadRows(skip=config.on_bad_row == "skip")
            writer = StoreWriter(folder, vocab_size, all_scored)
            build(source, opened, writer, bad, counts)
            if bad.count:
                counts["bad_rows_skipped"] = bad.count
            if not counts["rows_read"]:
                raise UserError(f"dataset_name={name!r}: split {source.split or 'train'!r} has no rows")
            writer.close(counts)

        distributed.on_main(stored)(whole_key, fill)
        store = distributed.together(stored)(whole_key, fill)  # built anew where the ranks do not share a file system
        for counts in (store.report, opened.left_out):  # files that are not read are no part of the key
            add_counts(report, {prefix + count: value for count, value in counts.items()})
        return store

    train = [(source.weight, store_of(name, source)) for name, source in config.sources().items()]
    eval_sources = config.eval_sources()
    found = []
    if eval_sources is None:
        for weight, store in train:
            out = are_held_out(store.keys, config)
            found.append(PreparedSource(weight, store, np.flatnonzero(~out), store, np.flatnonzero(out)))
        return found
    evaluation = [store_of(name, source, "eval_") for name, source in eval_sources.items()]
    held_out = np.concatenate([store.keys for store in evaluation])  # also what another source holds out
    for (weight, store), other in itertools.zip_longest(train, evaluation):  # `eval_dataset` is one, beside the first source
        used = np.flatnonzero(~np.isin(store.keys, held_out))
        add_counts(report, {"dropped_because_held_out_too": len(store) - len(used)})
        evaluated, number = (store, 0) if other is None else (other, len(other))
        found.append(PreparedSource(weight, store, used, evaluated, np.arange(number)))
    return found


def count(report: Report, name: str) -> None:
    """One more of something."""
    add_counts(report, {name: 1})


def add_counts(report: Report, counts: Report) -> None:
    """Add counts of a part to those of the whole. Of places of rows, which are text, the first stays."""
    for name, value in counts.items():
        report[name] = report.get(name, value) if isinstance(value, str) else report.get(name, 0) + value


def read_rows(source: Source, bad: BadRows, report: Report, name: str = "rows") -> Iterator[tuple[int, Row]]:
    """The rows of a source with their numbers, counted, under a progress bar where there is a terminal."""
    with tqdm(desc="preparing", unit=f" {name}", disable=None, leave=False) as bar:
        for number, row in enumerate(source.rows(bad)):
            report["rows_read"] += 1
            bar.update()
            yield number, row


def finish(
    config: DatasetConfig, train: Mixture, evaluation: Mixture, sources: list[PreparedSource], report: Report
) -> PreparedData:
    """Close a preparation: the numbers of what is left.

    Raises:
        UserError: nothing is left to train on.
    """
    report["examples"], report["eval_examples"] = len(train), len(evaluation)
    tokens = np.concatenate([s.train.example_tokens()[s.used] for s in sources])
    flags = np.concatenate([s.train.flags[s.used] for s in sources])
    report["tokens"] = sum(part.num_tokens for part in train.parts)
    report["scored_tokens"] = sum(part.num_scored for part in train.parts)
    for name, flag in {"cut_end": CUT_END, "cut_start": CUT_START}.items():
        if number := int(np.count_nonzero(flags & flag)):
            report[name] = number
    for name, part in zip(config.sources(), train.parts, strict=True):
        if len(train) and not len(part):
            raise UserError(f"dataset_name={name!r}: no example of this source is left to train on: take it out")
    if not len(train):
        counts = ", ".join(f"{name}={count}" for name, count in report.items() if count)
        raise UserError(f"dataset_name={config.dataset_name!r}: no example is left to train on ({counts}): correct the rows")
    report["end_token_share"] = round(float(np.count_nonzero(flags & ENDS_WITH_END_TOKEN)) / len(flags), 4)
    for percent in (50, 90, 99, 100):
        name = "length_max" if percent == 100 else f"length_p{percent}"
        report[name] = int(np.percentile(tokens, percent, method="higher"))
    return PreparedData(train, evaluation, report)
