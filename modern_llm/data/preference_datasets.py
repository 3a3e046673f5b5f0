"""Pairs of answers to one prompt: both sides carry the same prompt ids, and only the answers count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from modern_llm.config.data import PreferenceDatasetConfig, SourceConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.data.chat import ChatEncoder, Planned
from modern_llm.data.columns import RowError
from modern_llm.data.held_out import held_out_mixture
from modern_llm.data.lint import Lint, check_words
from modern_llm.data.messages import Chat, Message, Pair
from modern_llm.data.preference_adapters import PairRow, read_pair
from modern_llm.data.prepared import (
    Example,
    Mixture,
    PreparedData,
    Report,
    StoredExamples,
    count,
    finish,
    prepare_sources,
    read_rows,
)
from modern_llm.data.readers import BadRows, Row
from modern_llm.data.sources import Source
from modern_llm.data.store import CUT_END, CUT_START, ENDS_WITH_END_TOKEN, StoreWriter
from modern_llm.data.tokenizer import template_fingerprint
from modern_llm.layout import Segment

__all__ = ["Pair", "PreferenceDatasetConfig", "prepare_preferences"]

PAIRS_AT_ONCE = 1000
"""Pairs tokenized in one parallel call."""

_DECIDING = {
    "prompt_field", "chosen_field", "rejected_field", "min_score_ratio", "train_on_reasoning", "truncation", "lint",
}  # fmt: skip
"""Fields of the config that decide the tokens, besides those of each source."""

Sides = tuple[list[int], list[int], list[int]]
"""Ids of the prompt, the chosen and the rejected answer, each answer with its end token."""

Thoughts = tuple[int, int]
"""Tokens at the beginning of the chosen and the rejected answer that do not count: see `train_on_reasoning`."""


def prepare_preferences(config: PreferenceDatasetConfig, dpo: DPOConfig, encoder: ChatEncoder) -> PreparedData:
    """Every pair as two segments, chosen first, within the limits of `DPOConfig`."""
    report: Report = {}
    encoder = encoder.counting(config.train_on_reasoning)
    limits = {
        **dpo.model_dump(include={"max_length", "max_prompt_length", "max_completion_length"}),
        **config.model_dump(include=_DECIDING),
    }
    sources = prepare_sources(
        config, "preferences", {"tokenizer": template_fingerprint(encoder.tokenizer), **limits}, encoder.encoder.vocab_size,
        False, partial(_build, config, dpo, encoder), report,
    )  # fmt: skip
    train = [StoredPairs(s.train, s.used) for s in sources]
    evaluation = held_out_mixture(config, [StoredPairs(s.evaluation, s.held_out) for s in sources])
    return finish(config, Mixture(train, [s.weight for s in sources]), evaluation, sources, report)


class StoredPairs(StoredExamples):
    """Pairs of a store. It holds the prompt with each answer; a packed row holds it once."""

    def __getitem__(self, i: int) -> Example:  # type: ignore[override] - no slices
        example = super().__getitem__(i)
        return replace(example, segments=sharing_prompt(*example.segments))


def sharing_prompt(chosen: Segment, rejected: Segment) -> tuple[Segment, Segment]:
    """The two sides of a pair, the second of which shares with the first what comes before both answers."""
    shared = min(int(chosen.scored.argmax()), int(rejected.scored.argmax()))
    differ = np.flatnonzero(chosen.ids[:shared] != rejected.ids[:shared])  # thoughts that do not count
    return chosen, replace(rejected, shared=int(differ[0]) if len(differ) else shared)


def pair_key(pair: Pair) -> int:
    """Hash of the prompt."""
    return pair.prompt_key


@dataclass(frozen=True)
class FoundPair:
    """A row that is a pair."""

    number: int
    row: Row
    pair: Pair
    plans: tuple[Planned, Planned]
    """Of the prompt with the chosen and with the rejected answer."""


def pairs_of(
    source: Source, config: PreferenceDatasetConfig, encoder: ChatEncoder, lint: Lint, bad: BadRows, report: Report
) -> Iterator[FoundPair]:
    """Every row that is a pair which passes the checks and the template can show; the others are counted by reason.

    Args:
        source: of rows.
        config: for this source (`for_source`).
        encoder: knows the template.
        lint: the checks.
        bad: hears of rows that cannot be read.
        report: gets the counts.
    """
    for number, row in read_rows(source, bad, report, "pairs"):
        try:
            found = read_pair(row.values, config)
            plans = _plans(found.pair, encoder) if isinstance(found, PairRow) else None
        except RowError as error:
            bad(f"{row.place}: {error}")
            continue
        if not isinstance(found, PairRow) or plans is None:
            count(report, f"dropped_because_{found}")
        elif lint.keeps(found.pair, found.doubts, row.place):
            pair = found.pair
            for name in found.found:
                count(report, name)
            if any(map(encoder.merges_over_border, plans)):
                count(report, "found_answer_that_merges_with_its_prompt")
            check_words([*pair.prompt, pair.chosen, pair.rejected], encoder, row.place, report)
            yield FoundPair(number, row, pair, plans)


def _build(
    config: PreferenceDatasetConfig,
    dpo: DPOConfig,
    encoder: ChatEncoder,
    source_config: SourceConfig,
    source: Source,
    writer: StoreWriter,
    bad: BadRows,
    report: Report,
) -> None:
    waiting: list[FoundPair] = []
    lint = Lint(config.lint, report)

    def flush() -> None:
        encoded = _encode(encoder, [found.plans for found in waiting])
        for found, (sides, thoughts) in zip(waiting, encoded, strict=True):
            if len(sides[1]) != len(sides[2]):
                count(report, "longer_answer_chosen" if len(sides[1]) > len(sides[2]) else "shorter_answer_chosen")
            if is_over(sides, dpo) and not lint.verdict("over_limit", found.row.place):
                continue
            cut = within_limits(sides, dpo, config.truncation)
            if isinstance(cut, str):
                count(report, f"dropped_because_{cut}")
                continue
            (prompt, chosen, rejected), flags = cut
            if chosen == rejected and sides[1] != sides[2]:
                count(report, "dropped_because_answers_identical_up_to_the_cut")
                continue
            if thoughts[0] >= len(chosen) or thoughts[1] >= len(rejected):
                count(report, "dropped_because_prompt_fills_max_length")
                continue
            if chosen[thoughts[0] :] == rejected[thoughts[1] :] and chosen != rejected:
                count(report, "dropped_because_answers_identical_but_for_thoughts")
                continue
            segments = [_arrays(prompt, *side) for side in zip((chosen, rejected), thoughts, strict=True)]
            if any(encoder.holds_unknown(ids) for ids, _ in segments):
                count(report, "found_unknown_token")
            writer.add(segments, found.number, pair_key(found.pair), flags)
        waiting.clear()

    for found in pairs_of(source, config.for_source(source_config), encoder, lint, bad, report):
        waiting.append(found)
        if len(waiting) == PAIRS_AT_ONCE:
            flush()
    flush()


def _as_chat(pair: Pair, answer: Message) -> Chat:
    return Chat([*pair.prompt, answer], pair.tools)


def _plans(pair: Pair, encoder: ChatEncoder) -> tuple[Planned, Planned]:
    """The plans of both sides, which share their prompt.

    Raises:
        RowError: the template refuses them, leaves words of an answer out, or writes another prompt for one of them.
    """
    chosen, rejected = (encoder.answer(_as_chat(pair, answer)) for answer in (pair.chosen, pair.rejected))
    if chosen.prompt.plan.parts != rejected.prompt.plan.parts:
        raise RowError("the tokenizer's chat template writes another prompt for one answer than for the other")
    return chosen, rejected


def _encode(encoder: ChatEncoder, planned: Sequence[tuple[Planned, Planned]]) -> list[tuple[Sides, Thoughts]]:
    """The ids of many pairs; the prompt is encoded once."""
    parts = encoder.encode([part for chosen, rejected in planned for part in (chosen.prompt, chosen.answer, rejected.answer)])
    ids = [[i for part in found for i in part.ids] for found in parts]
    thoughts = [sum(len(part.ids) for part in found if not part.scored) for found in parts]
    return [
        ((prompt, chosen, rejected), (first, second))
        for prompt, chosen, rejected, first, second in zip(
            ids[::3], ids[1::3], ids[2::3], thoughts[1::3], thoughts[2::3], strict=True
        )
    ]


def _arrays(prompt: list[int], answer: list[int], thoughts: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([*prompt, *answer], dtype=np.int32)
    return ids, np.arange(len(ids)) >= len(prompt) + thoughts


def is_over(sides: Sides, dpo: DPOConfig) -> bool:
    prompt, chosen, rejected = map(len, sides)
    longest = max(chosen, rejected)
    return (
        prompt + longest > dpo.max_length
        or (dpo.max_prompt_length is not None and prompt > dpo.max_prompt_length)
        or (dpo.max_completion_length is not None and longest > dpo.max_completion_length)
    )


def within_limits(sides: Sides, dpo: DPOConfig, truncation: str) -> tuple[Sides, int] | str:
    """A pair within the limits and its flags, or why it is left out.

    No answer is ever empty, both sides keep one prompt, and an answer that loses its end loses its end token. A limit of the
    prompt alone is always kept by cutting its beginning.
    """
    prompt, chosen, rejected = sides
    if truncation == "drop" and is_over(sides, dpo):
        return "over_max_length"
    flags = 0
    if dpo.max_prompt_length is not None and len(prompt) > dpo.max_prompt_length:
        prompt, flags = prompt[-dpo.max_prompt_length :], CUT_START
    most = dpo.max_completion_length or dpo.max_length
    if truncation == "cut_prompt_start":
        longest = min(most, max(len(chosen), len(rejected)))
        kept = max(dpo.max_length - longest, dpo.max_length // 2)
        if len(prompt) > kept:
            prompt, flags = prompt[-kept:], CUT_START
    room = min(most, dpo.max_length - len(prompt))
    if room < 1:
        return "prompt_fills_max_length"
    if max(len(chosen), len(rejected)) > room:
        chosen, rejected, flags = chosen[:room], rejected[:room], flags | CUT_END
    else:
        flags |= ENDS_WITH_END_TOKEN
    return (prompt, chosen, rejected), flags


def encode_whole(pair: Pair, encoder: ChatEncoder) -> Sides:
    """All ids of a pair. Raises `RowError` where the template refuses the prompt."""
    return _encode(encoder, [_plans(pair, encoder)])[0][0]
