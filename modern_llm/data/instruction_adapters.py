"""From a row of demonstrations to a chat: one pure function for each layout that public data sets come in.

Whatever the layout, a chat begins with the user's first turn, behind system messages: assistant turns before it answer a
question that is not there. It ends with an assistant's turn that counts: a question at its end teaches nothing. Rows of which
nothing is left by that give a reason: `no_question` (no user turn), `no_answer` (no assistant turn with words or calls) or
`no_turn_counts` (none of those counts).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from modern_llm.config.data import InstructionAdapterName, InstructionDatasetConfig
from modern_llm.data.columns import Columns, RowError, checked_list
from modern_llm.data.messages import (
    Chat,
    Message,
    from_first_question,
    has_words,
    history,
    merged,
    messages_column,
    read_messages,
    read_tools,
    with_system,
)

Row = Mapping[str, Any]
Place = TypeVar("Place")

INSTRUCTION_ANSWERS = ("output", "response", "completion", "answer")
QUESTION_ANSWERS = ("answer", "response", "output", "completion")
PROMPT_ANSWERS = ("completion", "response", "output", "answer")
FLAT_OASST_COLUMNS = ("message_id", "parent_id", "text", "role")
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class InstructionAdapter:
    """Reads the rows of one layout."""

    columns: str
    """What the layout looks like, for errors."""
    recognises: Callable[[Columns], bool]
    adapt: Callable[[Columns], Chat | str]
    """A chat, or the reason why the row holds nothing to train on. Raises `RowError`."""


def read_chat(row: Row, config: InstructionDatasetConfig) -> Chat | str:
    """One row as a chat, or the reason why it holds nothing to train on.

    `config` names the columns (`prompt_field` and `response_field`) or the layout (`adapter`); else the first layout that
    recognises the row's columns reads it.

    Raises:
        RowError: the row is of no known layout, or not as its layout wants it.
    """
    columns = Columns.standard(row, config)
    chat = _read(columns, config)
    if isinstance(chat, str):
        return chat
    messages = chat.messages
    if config.train_on == "last":
        messages = [{**m, "train": False} if m["role"] == "assistant" else m for m in messages[:-1]] + messages[-1:]
    return Chat(messages, chat.tools, columns.findings())


def _read(row: Columns, config: InstructionDatasetConfig) -> Chat | str:
    if config.prompt_field is not None and config.response_field is not None:
        material = ("input",) if config.prompt_field == "instruction" else ()
        return _chat(row, [*_asked(row, config.prompt_field, material), *_answered(row, config.response_field)])
    if config.adapter is not None:
        return INSTRUCTION_ADAPTERS[config.adapter].adapt(row)
    for adapter in INSTRUCTION_ADAPTERS.values():
        if adapter.recognises(row):
            return adapter.adapt(row)
    layouts = "; ".join(f"{name}: {adapter.columns}" for name, adapter in INSTRUCTION_ADAPTERS.items())
    raise RowError(
        f"columns {row.names()} are no instruction layout that is known ({layouts}): "
        "set adapter, or prompt_field and response_field"
    )


# Lists of messages


def adapt_messages(row: Columns) -> Chat | str:
    """`{messages: [{role, content}], tools?}`: the layout of OpenAI, TRL, UltraChat, No Robots, Tulu.

    `role` is system (or developer), user, assistant or tool. `content` is text, a list of `{"type": "text"}` parts, or null
    next to `tool_calls`, whose arguments are a mapping or JSON of one. `tools` is a list of functions, or JSON of one. Turns
    stay as they are: two of one role in a row are the data set's own wish, which the chat template takes or refuses.
    """
    return _chat(row, messages_column(row, "messages"))


def adapt_sharegpt(row: Columns) -> Chat | str:
    """`{conversations: [{from, value}], system?, tools?}`: ShareGPT, OpenHermes, SlimOrca, LLaMA-Factory's Glaive.

    `from` is system, human or user, gpt (or assistant, chatgpt, bing, bard), function_call (`value` is JSON of
    `{name, arguments}`), or observation (or tool, function_response). The column may be called `conversation` and hold
    `role` and `content` (WildChat). `tools` is JSON of a list of functions. A system turn goes before the `system` column.

    Such chats were cut out of longer ones by machine: many begin with an answer, and some have turns of one speaker in a row.
    Answers before the first question are left out; turns of one speaker are joined by a blank line, as nothing is lost by that
    and most chat templates want speakers to alternate. A call that follows words becomes one message with them.
    """
    column = row.first(("conversations", "conversation")) or "conversations"
    return _chat(row, merged(messages_column(row, column)))


def adapt_prompt_completion(row: Columns) -> Chat | str:
    """`{prompt, completion | response, history?}`: TRL, MosaicML's dolly_hhrlhf, ChatGLM. Each is text or a list of messages;
    `tools` and a `system` column are optional. Assistant turns inside a prompt count like the answer.
    """
    return _chat(row, [*_asked(row, "prompt"), *_answered(row, _answer_column(row, PROMPT_ANSWERS))])


# Columns of text. Each may have `history` beside it, the turns that went before, whose answers count too; `system` and `tools`.


def adapt_alpaca(row: Columns) -> Chat | str:
    """`{instruction, input?, output | response, system?, history?}`: Alpaca, GPTeacher, LLaMA-Factory.

    `input` stands below the instruction, after a blank line.
    """
    return _chat(row, [*_asked(row, "instruction", ("input",)), *_answered(row, _answer_column(row, INSTRUCTION_ANSWERS))])


def adapt_dolly(row: Columns) -> Chat | str:
    """`{instruction, context, response, category?}`: databricks-dolly-15k. `context` stands below the instruction."""
    return _chat(row, [*_asked(row, "instruction", ("context",)), *_answered(row, "response")])


def adapt_question_answer(row: Columns) -> Chat | str:
    """`{question, answer | response, context?, system_prompt? | system?}`: GSM8K, OpenOrca. `context` stands below the
    question.
    """
    return _chat(row, [*_asked(row, "question", ("context",)), *_answered(row, _answer_column(row, QUESTION_ANSWERS))])


# OpenAssistant


def adapt_oasst_tree(row: Columns) -> Chat | str:
    """`{message_tree_id, prompt: {text, role, replies: [{text, role, rank, replies}]}}`: a tree of OpenAssistant.

    Its best thread: at each message the reply of lowest `rank`, unranked ones last, deleted ones never.
    """
    thread: list[Message] = []
    node = _best([row.get("prompt")])
    while node is not None:
        thread.append(_oasst_message(node))
        node = _best(node.get("replies") or [])
    return _chat(row, read_messages(thread, "column 'prompt'", row))


def adapt_oasst(row: Columns) -> Chat | str:
    """`{message_id, parent_id, text, role, rank, message_tree_id}`: OpenAssistant (oasst1, oasst2) as flat messages.

    One row is one message, so that `threads` must have put the rows together before.
    """
    if "messages" in row:
        return adapt_messages(row)
    raise RowError(
        "the row is no message of an OpenAssistant tree: it needs a text 'message_id', 'role' and 'text', a 'parent_id' (text, "
        "or null for the first message) and a 'rank' (a number or null)"
    )


def needs_regrouping(first_row: Row) -> bool:
    """Whether a data set that begins with this row is one of flat messages, for `threads`."""
    nulls = getattr(first_row, "nulls", ())  # a first message has no parent
    return all(column in first_row or column in nulls for column in FLAT_OASST_COLUMNS)


def threads(rows: Iterable[tuple[Place, Row]]) -> Iterator[tuple[Place, Row]]:
    """The best thread of each tree, chosen as in `adapt_oasst_tree`, as a row with `messages`.

    Args:
        rows: place (anything that names a row) and row of each flat message, in any order; all of them are held in memory.

    Yields:
        The place of a tree's first message, and its thread. Rows that are no messages are yielded as they are, so that
        `read_chat` refuses them by name. Messages without their tree's first message belong to no thread.
    """
    roots: list[tuple[Place, Row]] = []
    replies: defaultdict[str, list[Row]] = defaultdict(list)
    for place, row in rows:
        parent = row.get("parent_id")
        texts = (row.get("message_id"), row.get("role"), row.get("text"), "" if parent is None else parent)
        if not all(isinstance(text, str) for text in texts) or not _is_rank(row.get("rank")):
            yield place, row
        elif parent is None:
            roots.append((place, row))
        else:
            replies[parent].append(row)
    for place, root in roots:
        thread = []
        message = _best([root])
        while message is not None:
            thread.append(_oasst_message(message))
            # taken out, so that ids which lead in a circle end
            message = _best(replies.pop(message["message_id"], []))
        yield place, {"messages": thread}


def _oasst_message(fields: Row) -> Message:
    role = fields.get("role")
    return {"role": OASST_ROLES.get(role, role) if isinstance(role, str) else role, "content": fields.get("text")}


def _best(replies: Any) -> Row | None:
    """The reply of lowest rank, the first of equals; None if all are deleted."""
    for reply in checked_list(replies, "column 'prompt': 'replies'", "messages"):
        if not isinstance(reply, Mapping) or not _is_rank(reply.get("rank")):
            raise RowError("column 'prompt' must be a tree of messages, each with a 'rank' that is a number or null")
    alive = [reply for reply in replies if not reply.get("deleted")]
    return min(alive, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0), default=None)


def _is_rank(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


# Parts


def _chat(row: Columns, messages: list[Message]) -> Chat | str:
    """The chat of a row's messages, below its system column and with its tools."""
    kept = from_first_question(with_system(row, messages), row)
    if not any(message["role"] == "user" for message in kept):
        return "no_question"
    answers = [message for message in kept if message["role"] == "assistant"]
    if not any(map(has_words, answers)):
        return "no_answer"
    if not all(map(has_words, answers)):
        row.found.add("found_empty_answer")
    if kept[-1]["role"] != "assistant":
        row.found.add("found_question_at_the_end")
    while kept and (kept[-1]["role"] != "assistant" or kept[-1].get("train") is False):
        kept.pop()
    if not any(has_words(message) and message["role"] == "assistant" and message.get("train", True) for message in kept):
        return "no_turn_counts"
    return Chat(kept, read_tools(row))


def _asked(row: Columns, column: str, material: Sequence[str] = ()) -> list[Message]:
    if isinstance(row.get(column), list):
        return messages_column(row, column)
    return [*history(row), {"role": "user", "content": row.asked_text(column, material)}]


def _answered(row: Columns, column: str) -> list[Message]:
    if isinstance(row.get(column), list):
        return messages_column(row, column)
    return [{"role": "assistant", "content": row.text(column)}]


def _answer_column(row: Columns, names: Sequence[str]) -> str:
    return row.first(names) or names[0]


def _has(*needed: str | Sequence[str]) -> Callable[[Columns], bool]:
    """Recognises rows with all of these columns; of a group, with one of it."""
    groups = [(group,) if isinstance(group, str) else group for group in needed]
    return lambda row: all(row.first(group) is not None for group in groups)


# Order of trial: those with columns of their own first. UltraChat has `prompt` next to `messages`; Dolly is an Alpaca with
# `context`.
INSTRUCTION_ADAPTERS: dict[InstructionAdapterName, InstructionAdapter] = {
    "messages": InstructionAdapter("messages", _has("messages"), adapt_messages),
    "sharegpt": InstructionAdapter("conversations", _has(("conversations", "conversation")), adapt_sharegpt),
    "oasst_tree": InstructionAdapter(
        "message_tree_id + prompt with replies",
        lambda row: "message_tree_id" in row and isinstance(row.get("prompt"), Mapping),
        adapt_oasst_tree,
    ),
    "oasst": InstructionAdapter("message_id + parent_id + text + role", needs_regrouping, adapt_oasst),
    "dolly": InstructionAdapter("instruction + context + response", _has("instruction", "context", "response"), adapt_dolly),
    "alpaca": InstructionAdapter(
        "instruction + output or response (+ input)", _has("instruction", INSTRUCTION_ANSWERS), adapt_alpaca
    ),
    "question_answer": InstructionAdapter(
        "question + answer or response", _has("question", QUESTION_ANSWERS), adapt_question_answer
    ),
    "prompt_completion": InstructionAdapter(
        "prompt + completion or response", _has("prompt", PROMPT_ANSWERS), adapt_prompt_completion
    ),
}
