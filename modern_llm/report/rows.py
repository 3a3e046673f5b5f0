"""What training will see: rows as colours, and the counts of the whole data set. `modern-llm inspect`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modern_llm.config import InstructionDatasetConfig, PipelineConfig, PreferenceDatasetConfig, UserError
from modern_llm.config.data import DatasetConfig, SourceConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.training import Stage
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import chat_key, chats_of, prepare_instructions, within_limit
from modern_llm.data.known_templates import with_chat_template
from modern_llm.data.lint import Lint
from modern_llm.data.lm_datasets import prepare_documents, training_texts
from modern_llm.data.preference_datasets import (
    encode_whole,
    is_over,
    pair_key,
    pairs_of,
    prepare_preferences,
    within_limits,
)
from modern_llm.data.prepared import Mixture, PreparedData, segment_arrays
from modern_llm.data.readers import BadRows
from modern_llm.data.sources import Kind, Source, is_held_out, open_source
from modern_llm.data.store import CUT_START
from modern_llm.data.tokenizer import DEFAULT_VOCAB_SIZE, TextEncoder, load_tokenizer, train_tokenizer
from modern_llm.initial.checkpoint import read_initial

LEGEND = {"trained": "bold green", "context": "dim", "cut": "red strike"}


@dataclass(frozen=True)
class Shown:
    """One row: its tokens, and what becomes of each."""

    title: str
    ids: np.ndarray
    """(tokens,) int: all tokens of the row, cut ones too."""
    kinds: list[str]
    """`trained`, `context` or `cut`, for each token."""


def inspect(config: PipelineConfig, stage: Stage | None, num_rows: int, as_json: bool, console: Console | None = None) -> None:
    """Print what the data of a pipeline becomes.

    Args:
        config: the pipeline.
        stage: only this one. None: every stage of the pipeline.
        num_rows: rows to show of each stage.
        as_json: print the counts as one JSON object and no rows.
        console: where to print.

    Raises:
        UserError: a config, file or name that the user can put right.
    """
    console = console or Console()
    tokenizer = pipeline_tokenizer(config)
    sections = {name: getattr(config, name) for name in ("pretrain", "sft", "dpo") if getattr(config, name) is not None}
    if stage is not None and stage not in sections:
        raise UserError(f"stage={stage!r}: the file has {', '.join(sections)}")
    reports = {}
    for name in sections if stage is None else [stage]:
        prepared, rows = _prepare(config, name, tokenizer)  # type: ignore[arg-type] - the names are stages
        reports[name] = prepared.report
        if as_json:
            continue
        console.print(_report_table(name, prepared.report))
        console.print(Text.assemble(*[(f" {kind} ", style) for kind, style in LEGEND.items()]))
        for _, shown in zip(range(num_rows), rows, strict=False):
            console.print(f"[bold]{escape(shown.title)}[/bold]")
            console.print(coloured(shown, tokenizer))
    if as_json:
        console.print_json(json.dumps(reports))


def pipeline_tokenizer(config: PipelineConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that the pipeline will have: the start's, the one named, or one trained on the documents."""
    if config.pretrain is None:
        assert config.start_checkpoint is not None
        first = config.training(config.stages()[0])
        initial = read_initial(config.start_checkpoint, "start_checkpoint")
        return initial.tokenizer(first.tokenizer_name).tokenizer
    name = config.pretrain.train.tokenizer_name
    if name is not None:
        return load_tokenizer(name)
    return train_tokenizer(training_texts(config.pretrain.data), config.pretrain.model.vocab_size or DEFAULT_VOCAB_SIZE)


def _prepare(config: PipelineConfig, stage: Stage, tokenizer: PreTrainedTokenizerFast) -> tuple[PreparedData, Iterator[Shown]]:
    if stage == "pretrain":
        assert config.pretrain is not None
        data, length = config.pretrain.data, config.pretrain.data.max_length or config.pretrain.model.max_seq_len
        train = config.pretrain.train
        seed = train.seed if "seed" in train.model_fields_set else config.seed
        prepared = prepare_documents(data, TextEncoder(tokenizer), length, seed)
        return prepared, _blocks(prepared)
    section = config.sft if stage == "sft" else config.dpo
    assert section is not None
    encoder = ChatEncoder(with_chat_template(tokenizer, section.data.chat_template), section.data.train_on_reasoning)
    if stage == "sft":
        assert config.sft is not None
        return prepare_instructions(config.sft.data, encoder), _chats(config.sft.data, encoder)
    assert config.dpo is not None
    prepared = prepare_preferences(config.dpo.data, config.dpo.dpo, encoder)
    return prepared, _pairs(config.dpo.data, config.dpo.dpo, encoder)


def _blocks(prepared: PreparedData) -> Iterator[Shown]:
    """Blocks as they are packed: documents in turn, the first token of each being context."""
    if not isinstance(prepared.train, Mixture):  # a stream begins only when it trains
        return
    for i in range(len(prepared.train)):
        segments = prepared.train[i].segments
        ids = np.concatenate([segment.ids for segment in segments])
        kinds = [kind for segment in segments for kind in ["context", *["trained"] * (len(segment) - 1)]]
        yield Shown(f"block {i}: {len(segments)} documents", ids, kinds)


def _sources(config: DatasetConfig, kind: Kind) -> Iterator[tuple[Source, SourceConfig]]:
    for name, source in config.sources().items():
        yield open_source(name, source, kind), source


def _chats(config: InstructionDatasetConfig, encoder: ChatEncoder) -> Iterator[Shown]:
    bad = BadRows(skip=config.on_bad_row == "skip")
    for source, settings in _sources(config, "instructions"):
        for found in chats_of(source, config.for_source(settings), encoder, bad, {"rows_read": 0}):
            place = found.row.place + _held_out(config, chat_key(found.chat))
            for parts in encoder.encode(found.plans):
                ids, scored = segment_arrays([(part.ids, part.scored) for part in parts])
                kept = within_limit(parts, config)
                if isinstance(kept, str):
                    yield Shown(f"{place}: dropped, {kept.replace('_', ' ')}", ids, ["cut"] * len(ids))
                    continue
                (kept_ids, _), flags = kept
                first = len(ids) - len(kept_ids) if flags & CUT_START else 0
                yield Shown(place, ids, _kinds(scored, first, first + len(kept_ids)))


def _pairs(config: PreferenceDatasetConfig, dpo: DPOConfig, encoder: ChatEncoder) -> Iterator[Shown]:
    bad = BadRows(skip=config.on_bad_row == "skip")
    for source, settings in _sources(config, "preferences"):
        lint = Lint(config.lint, {})
        for found in pairs_of(source, config.for_source(settings), encoder, lint, bad, {"rows_read": 0}):
            whole = encode_whole(found.pair, encoder)
            kept = within_limits(whole, dpo, config.truncation)
            if is_over(whole, dpo) and not lint.verdict("over_limit", found.row.place):
                kept = "over_limit"
            place = found.row.place + _held_out(config, pair_key(found.pair))
            for side, name in ((1, "chosen"), (2, "rejected")):
                prompt, answer = whole[0], whole[side]
                ids, scored = np.array([*prompt, *answer]), np.arange(len(prompt) + len(answer)) >= len(prompt)
                if isinstance(kept, str):
                    yield Shown(f"{place}, {name}: dropped, {kept.replace('_', ' ')}", ids, ["cut"] * len(ids))
                    continue
                first = len(prompt) - len(kept[0][0])
                yield Shown(f"{place}, {name}", ids, _kinds(scored, first, len(prompt) + len(kept[0][side])))


def _held_out(config: DatasetConfig, key: int) -> str:
    return " (held out)" if is_held_out(key, config) else ""


def _kinds(scored: np.ndarray, first: int, behind: int) -> list[str]:
    """What becomes of each token; those from `first` to before `behind` are kept, and the first of them is never predicted."""
    kept = ["trained" if counts else "context" for counts in scored[first:behind]]
    return ["cut"] * first + ["context", *kept[1:]] + ["cut"] * (len(scored) - behind)


def coloured(shown: Shown, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The text of a row; runs of one kind are decoded together, so that characters of several tokens stay whole."""
    text, start = Text(), 0
    for i in range(1, len(shown.ids) + 1):
        if i == len(shown.ids) or shown.kinds[i] != shown.kinds[start]:
            words = str(tokenizer.decode(shown.ids[start:i].tolist(), skip_special_tokens=False))
            text.append(words, LEGEND[shown.kinds[start]])
            start = i
    return text


def _report_table(stage: str, report: dict) -> Table:
    table = Table("", Column(overflow="fold"), title=stage, title_justify="left", show_header=False)
    for name, value in report.items():
        if value:
            label = Text(name if "[" in name else name.replace("_", " "))  # a file's name stays as it is, and is no markup
            table.add_row(
                label, escape(value) if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.1%}"
            )
    return table
