"""From a row of preferences to a pair: one pure function for each layout that public data sets come in.

Whether a pair is worth training on (identical answers, an empty one, prompts that differ) is not decided here. Reasons are
given only where there is no pair: `turns_out_of_order` (a prompt that does not end with the user's turn, or a side that does
not end with the assistant's), `answer_calls_tools`, `tie`, `one_answer` and `score_ratio`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modern_llm.config.data import PreferenceAdapterName, PreferenceDatasetConfig
from modern_llm.data.messages import (
    Message,
    Pair,
    Row,
    RowError,
    asked_text,
    checked_text,
    column_names,
    dialogue,
    first_present,
    from_first_question,
    merged,
    messages_column,
    prompt_text,
    read_message,
    read_messages,
    system_turn,
    text_column,
    value_of,
    with_system,
)

PROMPT_COLUMNS = ("prompt", "question", "instruction")
MATERIAL_COLUMNS = {"question": ("context",), "instruction": ("input", "context")}
CONVERSATION_COLUMNS = ("conversations", "conversation")
ANSWER_COLUMNS = ("completions", "responses", "answers")
ANSWER_KEYS = ("text", "response", "content", "answer")
SCORE_KEYS = ("score", "rating", "overall_score", "fine-grained_score")
SCORE_COLUMNS = ("scores", "ratings")
RANK_COLUMNS = ("ranks", "rank")


@dataclass(frozen=True)
class PairRow:
    """A pair as its row has it."""

    pair: Pair
    prompts_differ: bool
    """The two sides carry different prompts; the pair has the chosen side's."""


@dataclass(frozen=True)
class PreferenceAdapter:
    """Reads the rows of one layout."""

    columns: str
    """What the layout looks like, for errors."""
    recognises: Callable[[Row, PreferenceDatasetConfig], bool]
    adapt: Callable[[Row, PreferenceDatasetConfig], PairRow | str]
    """A pair, or the reason why the row holds none. Raises `RowError`."""


def read_pair(row: Row, config: PreferenceDatasetConfig) -> PairRow | str:
    """One row as a pair, or the reason why it holds none.

    `config` names the layout (`adapter`), or the first one that recognises the row's columns reads it.

    Raises:
        RowError: the row is of no known layout, or not as its layout wants it.
    """
    if config.adapter is not None:
        return PREFERENCE_ADAPTERS[config.adapter].adapt(row, config)
    for adapter in PREFERENCE_ADAPTERS.values():
        if adapter.recognises(row, config):
            return adapter.adapt(row, config)
    has_one_side = config.chosen_field in row or config.rejected_field in row
    if has_one_side or config.prompt_field is not None or _names_its_sides(config):
        return adapt_prompt_pair(row, config)  # says which column is missing
    layouts = "; ".join(f"{name}: {adapter.columns}" for name, adapter in PREFERENCE_ADAPTERS.items())
    one_sided = first_present(row, ("label", "kto_tag"))
    hint = f"; rows with one answer and a verdict ('{one_sided}'), as for KTO, are no pairs" if one_sided else ""
    raise RowError(
        f"columns {column_names(row)} are no preference layout that is known ({layouts}): "
        f"set adapter, or prompt_field, chosen_field and rejected_field{hint}"
    )


# Two sides


def adapt_prompt_pair(row: Row, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{prompt | question | instruction (+ input), chosen, rejected, system? | system_prompt?}`: UltraFeedback binarized,
    Intel's Orca pairs, Argilla's mixes, TRL. With `score_chosen` and `score_rejected`, `min_score_ratio` applies.

    The prompt is text or a list of messages; so is each side, which may also be one message. A side that begins with a user's
    or a system turn carries the whole prompt, all but its last turn: the prompt column only repeats it. A side that begins
    with an assistant's turn goes on from the prompt column. Without such a column both sides must carry the prompt. A prompt
    of the form `\\n\\nHuman: … \\n\\nAssistant:` (Dahoas' HH) is split into turns.
    """
    column = config.prompt_field or first_present(row, PROMPT_COLUMNS)
    prompt, is_dialogue = ([], False) if column is None else _prompt(row, column, config)
    chosen, rejected = (_side(row, name, remedy, is_dialogue) for name, remedy in _sides(config))
    if column is None and not _has_sides(row, config, list):
        raise RowError(f"no prompt: there is none of the columns {', '.join(PROMPT_COLUMNS)}: set prompt_field")
    if config.min_score_ratio > 0 and {"score_chosen", "score_rejected"} <= row.keys():
        scores = (_number(row[name], f"column '{name}'") for name in ("score_chosen", "score_rejected"))
        if _ratio(*scores) < config.min_score_ratio:
            return "score_ratio"
    return _pair(_whole(prompt, chosen, row), _whole(prompt, rejected, row))


def adapt_hh(row: Row, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{chosen, rejected}`, each `\\n\\nHuman: … \\n\\nAssistant: …`: Anthropic's HH-RLHF.

    The prompt is everything up to the last `Assistant:`. Its turns of one speaker in a row are joined by a blank line.
    """
    sides = []
    for name, remedy in _sides(config):
        turns = dialogue(text_column(row, name, remedy))
        if turns is None:
            raise RowError(
                f"no prompt: column '{name}' is no 'Human:'/'Assistant:' dialogue and there is none of the columns "
                f"{', '.join(PROMPT_COLUMNS)}: set prompt_field"
            )
        sides.append([*merged(turns[:-1]), turns[-1]])
    return _pair(*sides)


def adapt_sharegpt_pair(row: Row, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}, system?}`: LLaMA-Factory's
    DPO-En-Zh-20k. Sides may be text; `role` and `content` are read as well. The conversation begins with the user's first
    turn, and turns of one speaker are joined, as in `instruction_adapters.adapt_sharegpt`.
    """
    column = _conversation_column(row, config) or "conversations"
    prompt = merged(from_first_question(with_system(row, messages_column(row, column))))
    chosen, rejected = (_side(row, name, remedy) for name, remedy in _sides(config))
    return _pair(_whole(prompt, chosen, row), _whole(prompt, rejected, row))


# Two answers of other names


def adapt_shp(row: Row, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{history, human_ref_A, human_ref_B, labels, score_A, score_B, score_ratio?}`: Stanford Human Preferences. `labels` is 1
    where A is better, 0 where B is. `min_score_ratio` applies.
    """
    label = row.get("labels")
    if isinstance(label, bool) or label not in (0, 1):
        raise RowError(f"column 'labels' must be 1 (A is better) or 0 (B is better), not {label!r}")
    better, worse = ("A", "B") if label else ("B", "A")
    if config.min_score_ratio > 0:
        names = [f"score_{better}", f"score_{worse}"]
        if not set(names) <= row.keys():
            raise RowError(f"min_score_ratio needs the columns {' and '.join(sorted(names))} (columns: {column_names(row)})")
        if _ratio(*(_number(row[name], f"column '{name}'") for name in names)) < config.min_score_ratio:
            return "score_ratio"
    return _text_pair(_user(text_column(row, "history")), *(text_column(row, f"human_ref_{side}") for side in (better, worse)))


def adapt_stack_exchange(row: Row, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{question, response_j, response_k}`: stack-exchange-paired. `response_j` is the better one."""
    return _text_pair(_user(text_column(row, "question")), text_column(row, "response_j"), text_column(row, "response_k"))


def adapt_rated(row: Row, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{prompt | question | instruction, completions | responses | answers: [{text, score}]}`: UltraFeedback, Nectar.

    The text may be called text, response, content or answer; the score: score, rating, overall_score or fine-grained_score,
    higher being better, or rank, lower being better. Or the answers are texts, and their scores stand in a column of their
    own, `scores`, `ratings`, `ranks` or `rank`. The pair is the best and the worst answer (the first of equals); answers whose
    score is null take no part. `min_score_ratio` applies to scores; ranks have no ratio.
    """
    prompt_column = config.prompt_field or first_present(row, PROMPT_COLUMNS) or PROMPT_COLUMNS[0]
    prompt, is_dialogue = _prompt(row, prompt_column, config)
    column = first_present(row, ANSWER_COLUMNS)
    if column is None or not isinstance(row[column], list):
        raise RowError(f"no list of answers in any of the columns {', '.join(ANSWER_COLUMNS)} (columns: {column_names(row)})")
    rated, are_ranks = _rated_answers(row, column)
    if len(rated) < 2:
        return "one_answer"
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        return "tie"
    if not are_ranks and _ratio(best[0], worst[0]) < config.min_score_ratio:
        return "score_ratio"
    return _text_pair(prompt, *(text.strip() if is_dialogue else text for _, text in (best, worst)))


def _rated_answers(row: Row, column: str) -> tuple[list[tuple[float, str]], bool]:
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


# Parts


def _pair(chosen: list[Message], rejected: list[Message]) -> PairRow | str:
    """A pair from two chats, each ending with its answer."""
    prompt, answers = chosen[:-1], (chosen[-1], rejected[-1])
    differ = prompt_text(prompt) != prompt_text(rejected[:-1])
    # prompts that differ often do so in their last turns: which fault counts is then for the checks to say
    asks = bool(prompt) and (differ or prompt[-1]["role"] in ("user", "tool"))
    if not asks or any(answer["role"] != "assistant" for answer in answers):
        return "turns_out_of_order"
    if any("tool_calls" in answer for answer in answers):
        return "answer_calls_tools"
    return PairRow(Pair(prompt, chosen[-1]["content"], rejected[-1]["content"]), differ)


def _text_pair(prompt: list[Message], chosen: str, rejected: str) -> PairRow | str:
    return _pair(*([*prompt, {"role": "assistant", "content": answer}] for answer in (chosen, rejected)))


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _prompt(row: Row, column: str, config: PreferenceDatasetConfig) -> tuple[list[Message], bool]:
    """The prompt column below the system column, and whether it was an HH-RLHF dialogue that waits for an answer."""
    if isinstance(row.get(column), list):
        return with_system(row, messages_column(row, column)), False
    material = MATERIAL_COLUMNS.get(column, ()) if config.prompt_field is None else ("input",) * (column == "instruction")
    text = asked_text(row, column, material, "set prompt_field to the column of the prompt")
    turns = dialogue(text)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        return [*system_turn(row), *merged(turns[:-1])], True
    return [*system_turn(row), *_user(text)], False


def _sides(config: PreferenceDatasetConfig) -> list[tuple[str, str]]:
    """The columns of the better and of the worse answer, each with what to do where it is missing."""
    named = {"chosen_field": config.chosen_field, "rejected_field": config.rejected_field}
    answers = {"chosen_field": "better", "rejected_field": "worse"}
    return [(name, f"set {field} to the column of the {answers[field]} answer") for field, name in named.items()]


def _side(row: Row, name: str, remedy: str, strip: bool = False) -> list[Message]:
    """The turns of one side, its answer last."""
    value, place = value_of(row, name, remedy), f"column '{name}'"
    if isinstance(value, Mapping):
        return [read_message(value, place)]
    if isinstance(value, list):
        if not value:
            raise RowError(f"{place} is an empty list: it must be text or a list of messages")
        return read_messages(value, place)
    text = checked_text(value, place)
    return [{"role": "assistant", "content": text.strip() if strip else text}]


def _whole(prompt: list[Message], side: list[Message], row: Row) -> list[Message]:
    """Prompt and answer of a side that may carry the prompt, or its end, already."""
    before = side[:-1]
    if not before or before[0]["role"] not in ("system", "user"):
        return [*prompt, *side]
    if prompt_text(prompt[-len(before) :]) == prompt_text(before):
        return [*prompt, side[-1]]  # the column may have a system turn too
    return with_system(row, side)


def _number(value: Any, place: str) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise RowError(f"{place} must be a finite number, not {value!r:.20}")
    return value


def _ratio(better: float | None, other: float | None) -> float:
    """How many times the other score the better one is. Scores of zero or less have no ratio: above them everything
    positive is infinitely better, and the rest, as where a score is missing, is not better at all.
    """
    if better is None or other is None:
        return 1.0
    if other > 0:
        return better / other
    return math.inf if better > 0 else 1.0


# Recognition


def _names_its_sides(config: PreferenceDatasetConfig) -> bool:
    return (config.chosen_field, config.rejected_field) != ("chosen", "rejected")


def _has_sides(row: Row, config: PreferenceDatasetConfig, *kinds: type) -> bool:
    return all(isinstance(row.get(side), kinds) for side in (config.chosen_field, config.rejected_field))


def _conversation_column(row: Row, config: PreferenceDatasetConfig) -> str | None:
    return config.prompt_field or first_present(row, (*CONVERSATION_COLUMNS, "messages"))


def _is_sharegpt_pair(row: Row, config: PreferenceDatasetConfig) -> bool:
    """`messages` next to lists is a copy of the chosen side (UltraFeedback binarized), no prompt."""
    column = _conversation_column(row, config)
    kinds = (Mapping, str) if column in CONVERSATION_COLUMNS else (Mapping,)
    return column is not None and isinstance(row.get(column), list) and _has_sides(row, config, *kinds)


def _is_prompt_pair(row: Row, config: PreferenceDatasetConfig) -> bool:
    if config.chosen_field not in row or config.rejected_field not in row:
        return False
    return config.prompt_field in row or first_present(row, PROMPT_COLUMNS) is not None or not _has_sides(row, config, str)


def _is_hh(row: Row, config: PreferenceDatasetConfig) -> bool:
    return config.prompt_field is None and first_present(row, PROMPT_COLUMNS) is None and _has_sides(row, config, str)


def _is_rated(row: Row, config: PreferenceDatasetConfig) -> bool:
    prompt, answers = config.prompt_field or first_present(row, PROMPT_COLUMNS), first_present(row, ANSWER_COLUMNS)
    return prompt in row and answers is not None and isinstance(row[answers], list) and not _names_its_sides(config)


def _has_all(*names: str) -> Callable[[Row, PreferenceDatasetConfig], bool]:
    """Recognises rows by columns of fixed names, unless `config` names others."""
    return lambda row, config: (
        config.prompt_field is None and not _names_its_sides(config) and all(name in row for name in names)
    )


PREFERENCE_ADAPTERS: dict[PreferenceAdapterName, PreferenceAdapter] = {
    "sharegpt_pair": PreferenceAdapter("conversations + chosen + rejected", _is_sharegpt_pair, adapt_sharegpt_pair),
    "prompt_pair": PreferenceAdapter("prompt, question or instruction + chosen + rejected", _is_prompt_pair, adapt_prompt_pair),
    "hh": PreferenceAdapter("chosen + rejected as 'Human:'/'Assistant:' dialogues", _is_hh, adapt_hh),
    "shp": PreferenceAdapter(
        "history + human_ref_A + human_ref_B + labels", _has_all("history", "human_ref_A", "human_ref_B", "labels"), adapt_shp
    ),
    "stack_exchange": PreferenceAdapter(
        "question + response_j + response_k", _has_all("question", "response_j", "response_k"), adapt_stack_exchange
    ),
    "rated": PreferenceAdapter("prompt + completions, responses or answers with scores", _is_rated, adapt_rated),
}
