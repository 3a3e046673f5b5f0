"""Scores in rows of preferences: of the two sides, or of every answer of a list."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from modern_llm.config.data import PreferenceDatasetConfig
from modern_llm.data.columns import Columns, RowError, checked_text, column_names, first_present

ANSWER_KEYS = ("text", "response", "content", "answer")
SCORE_KEYS = ("score", "rating", "overall_score", "fine-grained_score")
SCORE_COLUMNS = ("scores", "ratings")
RANK_COLUMNS = ("ranks", "rank")
SIDE_SCORES = ("score", "rating", "avg_rating", "reward")
"""Words for the score of one side, before or behind the side's name."""


def side_scores(
    row: Columns, config: PreferenceDatasetConfig, names: tuple[str, str]
) -> tuple[float | None, float | None] | None:
    """The scores of the better and of the worse side; None if there are none.

    Raises:
        RowError: `min_score_ratio` needs them, and they are absent or no numbers.
    """
    forms = ("{word}_{side}", "{side}_{word}", "{side}-{word}")
    pairs = [(names, form, word) for names in (names, ("chosen", "rejected")) for form in forms for word in SIDE_SCORES]
    known = {*row, *row.nulls}
    for sides, form, word in pairs:
        columns = [form.format(side=side, word=word) for side in sides]
        if known.issuperset(columns):
            try:
                better, worse = (_number(row.get(name), f"column '{name}'", text=True) for name in columns)
            except RowError:
                if config.min_score_ratio > 0:
                    raise
                row.found.add("ignored_scores")
                return None
            return better, worse
    if config.min_score_ratio > 0:
        wanted = " and ".join(forms[0].format(side=side, word=SIDE_SCORES[0]) for side in names)
        raise RowError(
            f"min_score_ratio needs a score of each side, such as the columns {wanted} (columns: {column_names(row)})"
        )
    return None


def rated_answers(row: Columns, column: str) -> tuple[list[tuple[float, str]], bool]:
    """The answers that have a score, each as (score, text), and whether scores are ranks, which come out negative."""
    answers, place = row[column], f"column '{column}'"
    if all(isinstance(answer, Mapping) for answer in answers):
        keys = (*SCORE_KEYS, "rank")
        name = next((key for key in keys if any(answer.get(key) is not None for answer in answers)), None)
        if answers and name is None:
            raise RowError(f"{place}: no answer has a score out of {', '.join(keys)}")
        scores = [answer.get(name) for answer in answers]
        answers = [answer.get(first_present(answer, ANSWER_KEYS)) for answer in answers]
    else:
        name = first_present(row, (*SCORE_COLUMNS, *RANK_COLUMNS))
        scores = row[name] if name is not None else None
        if not isinstance(scores, list) or len(scores) != len(answers):
            wanted = ", ".join((*SCORE_COLUMNS, *RANK_COLUMNS))
            raise RowError(f"{place} needs a list of as many scores, in one of the columns {wanted}")
    are_ranks = name in RANK_COLUMNS
    texts = [checked_text(text, f"{place} answer {n}") for n, text in enumerate(answers)]
    numbers = [_number(score, f"{place} answer {n}: its '{name}'") for n, score in enumerate(scores)]
    known = [(number, text) for number, text in zip(numbers, texts, strict=True) if number is not None]
    return [(-number if are_ranks else number, text) for number, text in known], are_ranks


def _number(value: Any, place: str, text: bool = False) -> float | None:
    """A score; None where it is missing. With `text` it may be written as text, as in CSV files."""
    if text and isinstance(value, str):
        with contextlib.suppress(ValueError):  # refused below
            value = float(value) if value.strip() else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise RowError(f"{place} must be a finite number, not {value!r:.20}")
    return value


def score_ratio(better: float | None, other: float | None) -> float:
    """How many times the other score the better one is. Scores of zero or less have no ratio: above them everything
    positive is infinitely better, and the rest, as where a score is missing, is not better at all.
    """
    if better is None or other is None:
        return 1.0
    if other > 0:
        return better / other
    return math.inf if better > 0 else 1.0
