"""Demonstrations for supervised fine-tuning: only the assistant's words and their end token count."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from modern_llm.config.data import InstructionDatasetConfig, SourceConfig
from modern_llm.data.chat import ChatEncoder, ChatPart, Planned
from modern_llm.data.columns import Columns, RowError
from modern_llm.data.held_out import held_out_mixture
from modern_llm.data.instruction_adapters import needs_regrouping, read_chat, threads
from modern_llm.data.lint import check_words
from modern_llm.data.messages import Chat, prompt_hash, prompt_text
from modern_llm.data.packing import best_fit
from modern_llm.data.prepared import (
    Mixture,
    PreparedData,
    Report,
    StoredExamples,
    count,
    finish,
    prepare_sources,
    read_rows,
    segment_arrays,
)
from modern_llm.data.readers import BadRows, Row
from modern_llm.data.sources import Source, is_held_out, open_source
from modern_llm.data.store import CUT_END, CUT_START, ENDS_WITH_END_TOKEN, Store, StoreWriter
from modern_llm.data.tokenizer import template_fingerprint

__all__ = ["InstructionDatasetConfig", "prepare_instructions"]

_DECIDING = {"prompt_field", "response_field", "train_on", "train_on_reasoning", "max_length", "truncation"}
"""Fields of the config that decide the tokens, besides those of each source."""

CHATS_AT_ONCE = 1000
"""Chats tokenized in one parallel call."""


def prepare_instructions(config: InstructionDatasetConfig, encoder: ChatEncoder) -> PreparedData:
    """Every chat as one segment of at most `max_length` tokens."""
    report: Report = {}
    encoder = encoder.counting(config.train_on_reasoning)
    limits = config.model_dump(include=_DECIDING)
    sources = prepare_sources(
        config, "instructions", {"tokenizer": template_fingerprint(encoder.tokenizer), **limits}, encoder.encoder.vocab_size,
        False, partial(_build, config, encoder), report,
    )  # fmt: skip
    train = [_examples(s.train, s.used, config) for s in sources]
    evaluation = held_out_mixture(config, [StoredExamples(s.evaluation, s.held_out) for s in sources])
    return finish(config, Mixture(train, [s.weight for s in sources]), evaluation, sources, report)


def _examples(store: Store, used: np.ndarray, config: InstructionDatasetConfig) -> StoredExamples:
    if not config.packing:
        return StoredExamples(store, used)
    order, ends = best_fit(store.example_tokens()[used], config.max_length)
    return StoredExamples(store, used[order], ends)


def held_out_rows(config: InstructionDatasetConfig, encoder: ChatEncoder) -> list[dict[str, Any]]:
    """The rows of the evaluation part as they are, for data sets whose answers can be judged."""
    found = []
    eval_sources = config.eval_sources()
    for name, source in (eval_sources or config.sources()).items():
        bad = BadRows(skip=config.on_bad_row == "skip")
        opened = open_source(name, source, "instructions")
        for found_chat in chats_of(opened, config.for_source(source), encoder, bad, {"rows_read": 0}):
            if eval_sources is not None or is_held_out(chat_key(found_chat.chat), config):
                found.append(found_chat.row.values)
    return found


def chat_key(chat: Chat) -> int:
    """Hash of what is asked first: everything before the first answer."""
    first_answer = next(n for n, message in enumerate(chat.messages) if message["role"] == "assistant")
    return prompt_hash(prompt_text(chat.messages[:first_answer]))


@dataclass(frozen=True)
class FoundChat:
    """A row that is a chat."""

    number: int
    row: Row
    chat: Chat
    plans: list[Planned]
    """One for each sample."""


def chats_of(
    source: Source, config: InstructionDatasetConfig, encoder: ChatEncoder, bad: BadRows, report: Report
) -> Iterator[FoundChat]:
    """Every row that is a chat which the template can show; the others are counted by reason.

    Args:
        source: of rows.
        config: for this source (`for_source`).
        encoder: knows the template.
        bad: hears of rows that cannot be read.
        report: gets the counts.
    """
    rows = read_rows(source, bad, report)
    first = next(rows, None)
    if first is None:
        return
    every: Iterator[tuple[tuple[int, Row], Mapping[str, Any]]]
    every = ((item, item[1].values) for item in itertools.chain([first], rows))
    if config.adapter in (None, "oasst") and needs_regrouping(first[1].values):
        every = ((place, Columns(thread, config)) for place, thread in threads(every))
    for (number, row), values in every:
        try:
            chat = read_chat(values, config)
            plans = [] if isinstance(chat, str) else encoder.samples(chat)
        except RowError as error:
            bad(f"{row.place}: {error}")
            continue
        if isinstance(chat, str):
            count(report, f"dropped_because_{chat}")
        else:
            for name in chat.found:
                count(report, name)
            if any(plan.plan.loses for plan in plans):
                count(report, "found_reasoning_of_earlier_turns_left_out")
            if any(map(encoder.merges_over_border, plans)):
                count(report, "found_answer_that_merges_with_its_prompt")
            check_words(chat.messages, encoder, row.place, report)
            yield FoundChat(number, row, chat, plans)


def _build(
    config: InstructionDatasetConfig,
    encoder: ChatEncoder,
    source_config: SourceConfig,
    source: Source,
    writer: StoreWriter,
    bad: BadRows,
    report: Report,
) -> None:
    waiting: list[FoundChat] = []

    def flush() -> None:
        samples = [(found, plan) for found in waiting for plan in found.plans]
        encoded = encoder.encode([plan for _, plan in samples])
        for (found, _), parts in zip(samples, encoded, strict=True):
            cut = within_limit(parts, config)
            if isinstance(cut, str):
                count(report, f"dropped_because_{cut}")
            else:
                segment, flags = cut
                if encoder.holds_unknown(segment[0]):
                    count(report, "found_unknown_token")
                writer.add([segment], found.number, chat_key(found.chat), flags)
        waiting.clear()

    for found in chats_of(source, config.for_source(source_config), encoder, bad, report):
        waiting.append(found)
        if len(waiting) == CHATS_AT_ONCE:
            flush()
    flush()


def within_limit(
    parts: Sequence[ChatPart], config: InstructionDatasetConfig
) -> tuple[tuple[np.ndarray, np.ndarray], int] | str:
    """A chat of at most `max_length` tokens and its flags; or why it is left out."""
    ids, scored = segment_arrays([(part.ids, part.scored) for part in parts])
    over, flags = len(ids) - config.max_length, ENDS_WITH_END_TOKEN
    if over > 0:
        if config.truncation == "drop":
            return "over_max_length"
        if config.truncation == "cut_end":
            ids, scored, flags = ids[:-over], scored[:-over], CUT_END
        else:
            last_answer = len(ids) - int(np.argmin(scored[::-1]))  # scored tokens at the end begin here
            if over >= last_answer:  # not even one token of the question would be left
                return "answer_over_max_length"
            ids, scored, flags = ids[over:], scored[over:], CUT_START | ENDS_WITH_END_TOKEN
    words = np.repeat([part.scored and part.is_words for part in parts], [len(part.ids) for part in parts])
    kept = words[: len(ids)] if flags & CUT_END else words[-len(ids) :]
    if not kept[1:].any():
        return "prompt_fills_max_length"
    return (ids, scored), flags
