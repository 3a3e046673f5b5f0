"""Pairs of answers to one prompt: both sides carry the same prompt ids, and only the answers count."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from modern_llm.config import UserError
from modern_llm.config.data import PreferenceDatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.data.chat import ChatEncoder, Message
from modern_llm.data.messages import (
    checked_messages,
    first_present,
    hh_messages,
    instruction_text,
    prompt_text,
    user_message,
)
from modern_llm.data.prepared import Example, PreparedData, finish, segment, split_rows, text_column
from modern_llm.data.sources import Rows, prompt_hash
from modern_llm.layout import Segment

__all__ = ["Pair", "PreferenceDatasetConfig", "prepare_preferences", "read_pair"]

PROMPT_COLUMNS = ("prompt", "question", "instruction")


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it, as text."""

    prompt: list[Message]
    chosen: str
    rejected: str


def read_pair(rows: Rows, i: int, config: PreferenceDatasetConfig) -> Pair | str:
    """One row as a pair, or the reason why it is none.

    Raises:
        UserError: a column is missing or of the wrong kind, by file, line and field.
    """
    row = rows.rows[i]
    prompt_field = config.prompt_field or first_present(row, PROMPT_COLUMNS)
    chosen, rejected = (_side(rows, i, field, prompt_field) for field in (config.chosen_field, config.rejected_field))
    if prompt_field is None:
        prompt = chosen[:-1]
        if prompt_text(prompt) != prompt_text(rejected[:-1]):
            return "prompts_differ"
    elif prompt_field in row and isinstance(row[prompt_field], list):
        prompt = checked_messages(rows, i, prompt_field)
    else:
        prompt = user_message(instruction_text(rows, i, prompt_field))
    if not prompt or prompt[-1]["role"] != "user" or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return "turns_out_of_order"
    if not chosen[-1]["content"].strip() or not rejected[-1]["content"].strip():
        return "answer_empty"
    if chosen[-1]["content"] == rejected[-1]["content"]:
        return "answers_identical"
    return Pair(prompt, chosen[-1]["content"], rejected[-1]["content"])


def _side(rows: Rows, i: int, field: str, prompt_field: str | None) -> list[Message]:
    """The turns of one side, its answer last."""
    row = rows.rows[i]
    if field not in row:
        raise UserError(f"{rows.place(i)}: no column '{field}' (columns: {', '.join(map(str, row)) or 'none'})")
    if isinstance(row[field], list):
        if not row[field]:
            raise UserError(f"{rows.place(i)}: '{field}' is an empty list: it must be text or a list of messages")
        return checked_messages(rows, i, field)
    if isinstance(row[field], str):
        text = text_column(rows, i, field)
        if prompt_field is not None:
            return [{"role": "assistant", "content": text}]
        messages = hh_messages(text)
        if messages:
            return messages
        raise UserError(
            f"{rows.place(i)}: no prompt: '{field}' is no 'Human:'/'Assistant:' dialogue and there is none of the columns "
            f"{', '.join(PROMPT_COLUMNS)}: set prompt_field"
        )
    raise UserError(f"{rows.place(i)}: '{field}' must be text or a list of messages, not {type(row[field]).__name__}")


def pair_key(i: int, rows: Rows, config: PreferenceDatasetConfig) -> int:
    """Hash of the prompt of row i."""
    pair = read_pair(rows, i, config)
    return prompt_hash(prompt_text(pair.prompt) if isinstance(pair, Pair) else f"row {i}")


def prepare_preferences(config: PreferenceDatasetConfig, dpo: DPOConfig, encoder: ChatEncoder) -> PreparedData:
    """Every pair as two segments, chosen first, within the limits of `DPOConfig`."""
    report: Counter[str] = Counter()
    rows, used, eval_rows, eval_used = split_rows(config, "preferences", lambda i, r: pair_key(i, r, config), report)
    train = _examples(rows, used, config, dpo, encoder, report)
    evaluation = _examples(eval_rows, eval_used, config, dpo, encoder, Counter())
    return finish(config, train, evaluation, report)


def held_out_pairs(config: PreferenceDatasetConfig) -> list[Pair]:
    """The pairs of the evaluation part, as text."""
    _, _, rows, used = split_rows(config, "preferences", lambda i, r: pair_key(i, r, config), Counter())
    return [pair for pair in (read_pair(rows, i, config) for i in used) if isinstance(pair, Pair)]


def _examples(
    rows: Rows,
    used: list[int],
    config: PreferenceDatasetConfig,
    dpo: DPOConfig,
    encoder: ChatEncoder,
    report: Counter[str],
) -> list[Example]:
    examples = []
    for i in used:
        pair = read_pair(rows, i, config)
        if isinstance(pair, str):
            report[f"dropped_because_{pair}"] += 1
            continue
        segments, cut = encode_pair(pair, dpo, encoder)
        if np.array_equal(segments[0].ids, segments[1].ids):
            report["dropped_because_answers_identical_up_to_the_cut"] += 1
            continue
        report["answers_cut"] += cut
        examples.append(Example(segments, row=i))
    return examples


def encode_pair(pair: Pair, dpo: DPOConfig, encoder: ChatEncoder) -> tuple[tuple[Segment, Segment], int]:
    """The two segments of a pair, chosen first, and how many of its answers were cut.

    Where prompt and longest answer exceed `max_length`, the prompt first loses its beginning, down to half of `max_length`;
    then answers lose their end, and with it the end token. So no answer is ever empty and both sides keep one prompt.
    """
    prompt_parts, chosen = encoder.prompt_and_answer(pair.prompt, pair.chosen)
    _, rejected = encoder.prompt_and_answer(pair.prompt, pair.rejected)
    prompt = [i for part in prompt_parts for i in part.ids]
    if dpo.max_prompt_length is not None:
        prompt = prompt[-dpo.max_prompt_length :]
    most = dpo.max_completion_length or dpo.max_length
    longest = min(most, max(len(chosen), len(rejected)))
    prompt = prompt[-max(dpo.max_length - longest, dpo.max_length // 2) :]
    room = min(most, dpo.max_length - len(prompt))
    sides = (segment([(prompt, False), (chosen[:room], True)]), segment([(prompt, False), (rejected[:room], True)]))
    return sides, (len(chosen) > room) + (len(rejected) > room)
