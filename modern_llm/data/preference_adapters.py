"""From a row of preferences to a pair: one pure function for each layout that public data sets come in.

Whether a pair is worth training on (identical answers, an empty one, prompts that differ) is not decided here. Reasons are
given only where there is no pair: `turns_out_of_order` (a prompt that does not end with the user's turn, or a side that does
not end with the assistant's), `no_turn_counts` (an answer is marked as not counting), `tie`, `one_answer`, `no_post` and
`score_ratio`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modern_llm.config.data import PreferenceAdapterName, PreferenceDatasetConfig
from modern_llm.data.columns import Columns, RowError, checked_list, checked_text
from modern_llm.data.messages import (
    Message,
    Pair,
    dialogue,
    from_first_question,
    history,
    merged,
    messages_column,
    prompt_text,
    read_message,
    read_messages,
    read_tools,
    system_turn,
    with_system,
)
from modern_llm.data.preference_scores import Scores, rated_answers, score_ratio, side_scores

PROMPT_COLUMNS = ("prompt", "question", "instruction")
MATERIAL_COLUMNS = {"question": ("context",), "instruction": ("input", "context")}
SHORT_QUESTION = 20
"""Letters of a question that answers may begin with by chance ("Hello")."""
CONVERSATION_COLUMNS = ("conversations", "conversation")
ANSWER_COLUMNS = ("completions", "responses", "answers")


@dataclass(frozen=True)
class PairRow:
    """A pair as its row has it."""

    pair: Pair
    doubts: tuple[str, ...] = ()
    """Fields of `LintConfig`: `prompts_differ` (the pair has the chosen side's prompt), `scores_disagree`."""
    found: tuple[str, ...] = ()
    """Names of counts for the report: what was noticed in the row."""


@dataclass(frozen=True)
class PreferenceAdapter:
    """Reads the rows of one layout."""

    columns: str
    """What the layout looks like, for errors."""
    recognises: Callable[[Columns, PreferenceDatasetConfig], bool]
    adapt: Callable[[Columns, PreferenceDatasetConfig], PairRow | str]
    """A pair, or the reason why the row holds none. Raises `RowError`."""


def read_pair(row: Mapping[str, Any], config: PreferenceDatasetConfig) -> PairRow | str:
    """One row as a pair, or the reason why it holds none.

    `config` names the layout (`adapter`), or the first one that recognises the row's columns reads it.

    Raises:
        RowError: the row is of no known layout, or not as its layout wants it.
    """
    columns = Columns.standard(row, config)
    pair = _read(columns, config)
    return pair if isinstance(pair, str) else replace(pair, found=columns.findings())


def _read(row: Columns, config: PreferenceDatasetConfig) -> PairRow | str:
    if config.adapter is not None:
        return PREFERENCE_ADAPTERS[config.adapter].adapt(row, config)
    for adapter in PREFERENCE_ADAPTERS.values():
        if adapter.recognises(row, config):
            return adapter.adapt(row, config)
    has_one_side = config.chosen_field in row or config.rejected_field in row
    if has_one_side or config.prompt_field is not None or _names_its_sides(config):
        return adapt_prompt_pair(row, config)  # says which column is missing
    layouts = "; ".join(f"{name}: {adapter.columns}" for name, adapter in PREFERENCE_ADAPTERS.items())
    one_sided = row.first(("label", "kto_tag"))
    hint = f"; rows with one answer and a verdict ('{one_sided}'), as for KTO, are no pairs" if one_sided else ""
    raise RowError(
        f"columns {row.names()} are no preference layout that is known ({layouts}): "
        f"set adapter, or prompt_field, chosen_field and rejected_field{hint}"
    )


# Two sides


def adapt_prompt_pair(row: Columns, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{prompt | question | instruction (+ input), chosen, rejected, system? | system_prompt?}`: UltraFeedback binarized,
    Intel's Orca pairs, Argilla's mixes, TRL. `history` may stand beside a prompt that is text.

    The prompt is text or a list of messages; so is each side, which may also be one message. A side that begins with a user's
    or a system turn carries the whole prompt, all but its last turn: the prompt column only repeats it. A side that begins
    with an assistant's turn goes on from the prompt column. Without such a column both sides must carry the prompt. A prompt
    of the form `\\n\\nHuman: … \\n\\nAssistant:` (Dahoas' HH) is split into turns.
    """
    column = config.prompt_field or row.first(PROMPT_COLUMNS)
    prompt, is_dialogue = ([], False) if column is None else _prompt(row, column, config)
    chosen, rejected = (_side(row, name, remedy, is_dialogue) for name, remedy in _sides(config))
    if column is None and not _has_sides(row, config, list):
        raise RowError(f"no prompt: there is none of the columns {', '.join(PROMPT_COLUMNS)}: set prompt_field")
    return _pair(row, config, _whole(prompt, chosen, row), _whole(prompt, rejected, row))


def adapt_hh(row: Columns, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{chosen, rejected}`, each `\\n\\nHuman: … \\n\\nAssistant: …`: Anthropic's HH-RLHF.

    The prompt is everything up to the last `Assistant:`. Its turns of one speaker in a row are joined by a blank line.
    """
    sides = []
    for name, remedy in _sides(config):
        turns = dialogue(row.text(name, remedy))
        if turns is None:
            raise RowError(
                f"no prompt: column '{name}' is no 'Human:'/'Assistant:' dialogue and there is none of the columns "
                f"{', '.join(PROMPT_COLUMNS)}: set prompt_field"
            )
        sides.append([*system_turn(row), *merged(turns[:-1]), turns[-1]])
    return _pair(row, config, *sides)


def adapt_sharegpt_pair(row: Columns, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}, system?}`: LLaMA-Factory's
    DPO-En-Zh-20k. Sides may be text; `role` and `content` are read as well. The conversation begins with the user's first
    turn, and turns of one speaker are joined, as in `instruction_adapters.adapt_sharegpt`.
    """
    column = _conversation_column(row, config) or "conversations"
    prompt = merged(from_first_question(with_system(row, messages_column(row, column)), row))
    chosen, rejected = (_side(row, name, remedy) for name, remedy in _sides(config))
    return _pair(row, config, _whole(prompt, chosen, row), _whole(prompt, rejected, row))


# Two answers of other names


def adapt_shp(row: Columns, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{history, human_ref_A, human_ref_B, labels, score_A, score_B, score_ratio?}`: Stanford Human Preferences. `labels` is 1
    where A is better, 0 where B is. `min_score_ratio` applies.
    """
    label = row.get("labels")
    if isinstance(label, bool) or label not in (0, 1):
        raise RowError(f"column 'labels' must be 1 (A is better) or 0 (B is better), not {label!r}")
    better, worse = ("A", "B") if label else ("B", "A")
    answers = (row.text(f"human_ref_{side}") for side in (better, worse))
    prompt = [*system_turn(row), *_user(row.text("history"))]
    return _text_pair(row, config, prompt, *answers, scores=side_scores(row, config, (better, worse)))


def adapt_stack_exchange(row: Columns, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{question, response_j, response_k}`: stack-exchange-paired. `response_j` is the better one."""
    prompt, _ = _prompt(row, config.prompt_field or "question", config)
    return _text_pair(row, config, prompt, row.text("response_j"), row.text("response_k"))


def adapt_tldr(row: Columns, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{info: {subreddit, title, post}, summaries: [{text}, {text}], choice}`: the comparisons of OpenAI's
    summarize_from_feedback, on which the DPO paper trained; `choice` is the number of the better summary.

    The prompt is that of Stiennon et al. 2020 (table of hyperparameters, "query format"). Its articles of CNN/DM have no post:
    `no_post`.
    """
    info, summaries, choice = (row.required(name) for name in ("info", "summaries", "choice"))
    summaries = checked_list(summaries, "column 'summaries'", "two summaries")
    if not isinstance(info, Mapping) or len(summaries) != 2 or not all(isinstance(summary, Mapping) for summary in summaries):
        raise RowError("column 'info' must be a mapping with 'post', and 'summaries' two mappings with 'text'")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise RowError(f"column 'choice' must be 0 or 1, the number of the better summary, not {choice!r}")
    if info.get("post") is None:
        return "no_post"
    subreddit, title, post = (checked_text(info.get(key), f"column 'info': '{key}'") for key in ("subreddit", "title", "post"))
    texts = [
        checked_text(summary.get("text"), f"column 'summaries' {n}: 'text'").strip() for n, summary in enumerate(summaries)
    ]
    prompt = _user(f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:")
    return _text_pair(row, config, prompt, texts[choice], texts[1 - choice])


def adapt_rated(row: Columns, config: PreferenceDatasetConfig) -> PairRow | str:
    """`{prompt | question | instruction, completions | responses | answers: [{text, score}]}`: UltraFeedback, Nectar.

    The text may be called text, response, content or answer; the score: score, rating, overall_score or fine-grained_score,
    higher being better, or rank, lower being better. Or the answers are texts, and their scores stand in a column of their
    own, `scores`, `ratings`, `ranks` or `rank`. The pair is the best and the worst answer (the first of equals); answers whose
    score is null take no part. Ranks have no ratio: `min_score_ratio` is refused.
    """
    prompt_column = config.prompt_field or row.first(PROMPT_COLUMNS) or PROMPT_COLUMNS[0]
    prompt, is_dialogue = _prompt(row, prompt_column, config)
    column = row.first(ANSWER_COLUMNS)
    if column is None or not isinstance(row[column], list):
        raise RowError(f"no list of answers in any of the columns {', '.join(ANSWER_COLUMNS)} (columns: {row.names()})")
    rated, are_ranks = rated_answers(row, column)
    if len(rated) < 2:
        return "one_answer"
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        return "tie"
    answers = (text.strip() if is_dialogue else text for _, text in (best, worst))
    return _text_pair(row, config, prompt, *answers, scores=None if are_ranks else (best[0], worst[0]))


# Parts


def _pair(
    row: Columns, config: PreferenceDatasetConfig, chosen: list[Message], rejected: list[Message], scores: Scores | None = None
) -> PairRow | str:
    """A pair from two chats, each ending with its answer. `scores` are those of the row's columns, if none are given."""
    prompt, answers = chosen[:-1], (chosen[-1], rejected[-1])
    differ = prompt != rejected[:-1] and prompt_text(prompt) != prompt_text(rejected[:-1])
    # prompts that differ often do so in their last turns: which fault counts is then for the checks to say
    asks = bool(prompt) and (differ or prompt[-1]["role"] in ("user", "tool"))
    if not asks or any(answer["role"] != "assistant" for answer in answers):
        return "turns_out_of_order"
    if any(answer.get("train") is False for answer in answers):
        return "no_turn_counts"
    question = prompt[-1]["content"].strip()
    if len(question) > SHORT_QUESTION and all(
        answer["content"].lstrip().startswith((question, "Human:")) for answer in answers
    ):
        row.found.add("found_prompt_in_both_answers")
    scores = scores or side_scores(row, config, (config.chosen_field, config.rejected_field))
    if scores is not None and config.min_score_ratio > 0 and score_ratio(*scores) < config.min_score_ratio:
        return "score_ratio"
    disagree = scores is not None and None not in scores and scores[0] < scores[1]  # type: ignore[operator]
    doubts = {"prompts_differ": differ, "scores_disagree": disagree}
    return PairRow(Pair(prompt, *answers, read_tools(row)), tuple(name for name, holds in doubts.items() if holds))


def _text_pair(
    row: Columns, config: PreferenceDatasetConfig, prompt: list[Message], chosen: str, rejected: str, **scores: Any
) -> PairRow | str:
    better, worse = ([*prompt, {"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    return _pair(row, config, better, worse, **scores)


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _prompt(row: Columns, column: str, config: PreferenceDatasetConfig) -> tuple[list[Message], bool]:
    """The prompt column below the system column, and whether it was an HH-RLHF dialogue that waits for an answer."""
    if isinstance(row.get(column), list):
        return with_system(row, messages_column(row, column)), False
    material = MATERIAL_COLUMNS.get(column, ()) if config.prompt_field is None else ("input",) * (column == "instruction")
    text = row.asked_text(column, material, "set prompt_field to the column of the prompt")
    turns = dialogue(text)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        return [*system_turn(row), *merged(turns[:-1])], True
    return with_system(row, [*history(row), *_user(text)]), False


def _sides(config: PreferenceDatasetConfig) -> list[tuple[str, str]]:
    """The columns of the better and of the worse answer, each with what to do where it is missing."""
    named = {"chosen_field": config.chosen_field, "rejected_field": config.rejected_field}
    answers = {"chosen_field": "better", "rejected_field": "worse"}
    return [(name, f"set {field} to the column of the {answers[field]} answer") for field, name in named.items()]


def _side(row: Columns, name: str, remedy: str, strip: bool = False) -> list[Message]:
    """The turns of one side, its answer last."""
    value, place = row.required(name, remedy), f"column '{name}'"
    if isinstance(value, Mapping):
        return [read_message(value, place, row)]
    if isinstance(value, list):
        if not value:
            raise RowError(f"{place} is an empty list: it must be text or a list of messages")
        return read_messages(value, place, row)
    text = checked_text(value, place)
    return [{"role": "assistant", "content": text.strip() if strip else text}]


def _whole(prompt: list[Message], side: list[Message], row: Columns) -> list[Message]:
    """Prompt and answer of a side that may carry the prompt, or its end, already. What the side says goes before the column."""
    before = side[:-1]
    if not before or before[0]["role"] not in ("system", "user"):
        return [*prompt, *side]
    if prompt_text(prompt[-len(before) :]) == prompt_text(before):
        return [*prompt, side[-1]]  # the column may have a system turn too
    asked = [message["content"].strip() for message in before]
    if any(m["content"].strip() not in asked for m in prompt if m["role"] == "user"):
        row.found.add("found_prompt_column_unlike_the_sides")
    return with_system(row, side)


# Recognition


def _names_its_sides(config: PreferenceDatasetConfig) -> bool:
    return (config.chosen_field, config.rejected_field) != ("chosen", "rejected")


def _has_sides(row: Columns, config: PreferenceDatasetConfig, *kinds: type) -> bool:
    return all(isinstance(row.get(side), kinds) for side in (config.chosen_field, config.rejected_field))


def _conversation_column(row: Columns, config: PreferenceDatasetConfig) -> str | None:
    return config.prompt_field or row.first((*CONVERSATION_COLUMNS, "messages"))


def _is_sharegpt_pair(row: Columns, config: PreferenceDatasetConfig) -> bool:
    """`messages` next to lists is a copy of the chosen side (UltraFeedback binarized), no prompt."""
    column = _conversation_column(row, config)
    kinds = (Mapping, str) if column in CONVERSATION_COLUMNS else (Mapping,)
    return column is not None and isinstance(row.get(column), list) and _has_sides(row, config, *kinds)


def _is_prompt_pair(row: Columns, config: PreferenceDatasetConfig) -> bool:
    if config.chosen_field not in row or config.rejected_field not in row:
        return False
    return config.prompt_field in row or row.first(PROMPT_COLUMNS) is not None or not _has_sides(row, config, str)


def _is_hh(row: Columns, config: PreferenceDatasetConfig) -> bool:
    return config.prompt_field is None and row.first(PROMPT_COLUMNS) is None and _has_sides(row, config, str)


def _is_rated(row: Columns, config: PreferenceDatasetConfig) -> bool:
    prompt, answers = config.prompt_field or row.first(PROMPT_COLUMNS), row.first(ANSWER_COLUMNS)
    return prompt in row and answers is not None and isinstance(row[answers], list) and not _names_its_sides(config)


def _has_all(*names: str) -> Callable[[Columns, PreferenceDatasetConfig], bool]:
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
    "tldr": PreferenceAdapter("info + summaries + choice", _has_all("info", "summaries", "choice"), adapt_tldr),
    "rated": PreferenceAdapter("prompt + completions, responses or answers with scores", _is_rated, adapt_rated),
}
