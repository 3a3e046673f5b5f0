"""Demonstrations for supervised fine-tuning: only the assistant's words and their end token count."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from modern_llm.config import UserError
from modern_llm.config.data import InstructionDatasetConfig
from modern_llm.data.chat import ChatEncoder, Message
from modern_llm.data.messages import checked_messages, first_present, instruction_text, prompt_text, user_message
from modern_llm.data.prepared import Example, PreparedData, finish, segment, split_rows, text_column
from modern_llm.data.sources import Rows, prompt_hash
from modern_llm.layout import Segment, num_scored

__all__ = ["InstructionDatasetConfig", "prepare_instructions"]

PROMPT_COLUMNS = ("prompt", "instruction", "question")
RESPONSE_COLUMNS = ("completion", "response", "output", "answer")


def instruction_messages(rows: Rows, i: int, config: InstructionDatasetConfig) -> list[Message]:
    """One row as a chat.

    Raises:
        UserError: the columns are not of a layout that is known, by file, line and field.
    """
    row = rows.rows[i]
    if config.prompt_field is None and config.response_field is None and "messages" in row:
        return checked_messages(rows, i, "messages")
    prompt = config.prompt_field or first_present(row, PROMPT_COLUMNS)
    response = config.response_field or first_present(row, RESPONSE_COLUMNS)
    if prompt is None or response is None:
        columns = ", ".join(map(str, row)) or "none"
        raise UserError(
            f"{rows.place(i)}: columns {columns} are no instruction layout: expected messages, or one of "
            f"{', '.join(PROMPT_COLUMNS)} with one of {', '.join(RESPONSE_COLUMNS)}; or set prompt_field and response_field"
        )
    question = user_message(instruction_text(rows, i, prompt))
    return [*question, {"role": "assistant", "content": text_column(rows, i, response)}]


def prepare_instructions(config: InstructionDatasetConfig, encoder: ChatEncoder) -> PreparedData:
    """Every chat as one segment of at most `max_length` tokens."""
    report: Counter[str] = Counter()
    rows, used, eval_rows, eval_used = split_rows(config, "instructions", _key(config), report)
    train = _examples(rows, used, config, encoder, report)
    evaluation = _examples(eval_rows, eval_used, config, encoder, Counter())
    return finish(config, train, evaluation, report)


def held_out_rows(config: InstructionDatasetConfig) -> list[dict[str, Any]]:
    """The rows of the evaluation part as they are, for data sets whose answers can be judged."""
    _, _, rows, used = split_rows(config, "instructions", _key(config), Counter())
    return [rows.rows[i] for i in used]


def _key(config: InstructionDatasetConfig) -> Callable[[int, Rows], int]:
    """Hash of what is asked first: everything before the first answer."""

    def key(i: int, rows: Rows) -> int:
        messages = instruction_messages(rows, i, config)
        first_answer = next((n for n, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        return prompt_hash(prompt_text(messages[:first_answer]))

    return key


def _examples(
    rows: Rows, used: list[int], config: InstructionDatasetConfig, encoder: ChatEncoder, report: Counter[str]
) -> list[Example]:
    examples = []
    for i in used:
        messages = instruction_messages(rows, i, config)
        while messages and messages[-1]["role"] != "assistant":  # a chat that ends with a question teaches nothing there
            messages = messages[:-1]
        if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
            report["dropped_because_no_answer"] += 1
            continue
        whole = segment([(part.ids, part.scored) for part in encoder.chat(messages)])
        cut = Segment(whole.ids[: config.max_length], whole.scored[: config.max_length])
        if not num_scored(cut):
            report["dropped_because_prompt_fills_max_length"] += 1
            continue
        report["cut"] += len(cut) < len(whole)
        examples.append(Example((cut,), row=i))
    return examples
