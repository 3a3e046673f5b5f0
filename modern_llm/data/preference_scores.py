"""Scores in rows of preferences: of the two sides, or of every answer of a list."""

import contextlib
import math
import re
from collections.abc import Mapping
from typing import Any

from modern_llm.config.data import PreferenceDatasetConfig
from modern_llm.data.columns import Columns, RowError, checked_text

ANSWER_KEYS = ("text", "response", "content", "answer")
SCORE_KEYS = ("score", "rating", "overall_score", "fine-grained_score")
SCORE_COLUMNS = ("scores", "ratings")
RANK_COLUMNS = ("ranks", "rank")
SCORE_COLUMNS_OF_SIDES = [
    form.format(word, "{}")
    for form in ("{0}_{1}", "{1}_{0}", "{1}-{0}")
    for word in ("score", "rating", "avg_rating", "reward")
]
"""Columns with the score of one side, the side's name left open: `score_{}`, `{}_score`, `{}-rating`, …"""
_IS_SCORE = re.compile("score|rating|reward")
Scores = tuple[float | None, float | None]
"""Of the better and of the worse side; None where a score is missing."""


def side_scores(row: Columns, config: PreferenceDatasetConfig, names: tuple[str, str]) -> Scores | None:
    """The scores of the sides; None if the row has none. What is no number is missing.

    Args:
        row: has them in columns such as `score_chosen` and `score_rejected`.
        config: says whether they are needed.
        names: of the better and the worse side.

    Raises:
        RowError: `min_score_ratio` needs scores, and there are none.
    """
    known = [*row, *row.nulls]
    if not any(_IS_SCORE.search(name) for name in known):
        known = []
    for better, worse in dict.fromkeys((names, ("chosen", "rejected"))):
        for form in SCORE_COLUMNS_OF_SIDES:
            columns = form.format(better), form.format(worse)
            if known and columns[0] in known and columns[1] in known:
                return _parsed_number(row.get(columns[0])), _parsed_number(row.get(columns[1]))
    if config.min_score_ratio > 0:
        expected = f"score_{names[0]} and score_{names[1]}"
        raise RowError(f"min_score_ratio needs a score of each side, such as {expected} (columns: {row.names()})")
    return None


def _parsed_number(value: Any) -> float | None:
    """A number, which may be written as text, as in CSV files; None if it is something else."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return float(value) if math.isfinite(float(value)) else None
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
        answers = [answer.get(next((key for key in ANSWER_KEYS if key in answer), None)) for answer in answers]
    else:
        name = row.first((*SCORE_COLUMNS, *RANK_COLUMNS))
        scores = row[name] if name is not None else None
        if not isinstance(scores, list) or len(scores) != len(answers):
            wanted = ", ".join((*SCORE_COLUMNS, *RANK_COLUMNS))
            raise RowError(f"{place} needs a list of as many scores, in one of the columns {wanted}")
    are_ranks = name in RANK_COLUMNS
    texts = [checked_text(text, f"{place} answer {n}") for n, text in enumerate(answers)]
    numbers = [_number(score, f"{place} answer {n}: its '{name}'") for n, score in enumerate(scores)]
    known = [(number, text) for number, text in zip(numbers, texts, strict=True) if number is not None]
    return [(-number if are_ranks else number, text) for number, text in known], are_ranks


def _number(value: Any, place: str) -> float | None:
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
