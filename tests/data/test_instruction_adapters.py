"""Demonstrations: every public layout becomes the chat that it means, and a row that is wrong says in which column."""

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import InstructionDatasetConfig
from modern_llm.data.columns import RowError
from modern_llm.data.instruction_adapters import INSTRUCTION_ADAPTERS, needs_regrouping, read_chat, threads
from modern_llm.data.messages import Chat, prompt_text

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def read(row: dict[str, Any], **fields: Any) -> Chat | str:
    return read_chat(row, InstructionDatasetConfig(dataset_name="rows.jsonl", **fields))


def turns(row: dict[str, Any], **fields: Any) -> list[tuple[str, str]]:
    """Role and content of each message."""
    chat = read(row, **fields)
    assert isinstance(chat, Chat), chat
    return [(message["role"], message["content"]) for message in chat.messages]


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def speaks(speaker: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value, **more}


def refusal(row: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(RowError) as caught:
        read(row, **fields)
    return str(caught.value)


ASKED = [("user", "Who bakes?"), ("assistant", "Anna.")]
ASKED_MESSAGES = [says("user", "Who bakes?"), says("assistant", "Anna.")]
UNDER_A_TEXT = [("user", "Who bakes?\n\nAnna has an oven."), ("assistant", "Anna.")]
WITH_SYSTEM = [("system", "Be brief."), *ASKED]
TOOL = {"name": "find_baker", "description": "Who bakes in a street.", "parameters": {"type": "object", "properties": {}}}
WRAPPED_TOOL = {"type": "function", "function": TOOL}
CALL = {"type": "function", "function": {"name": "find_baker", "arguments": {"street": "Mill Lane"}}}


# Layouts


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"messages": ASKED_MESSAGES}, ASKED, id="messages"),
        pytest.param({"prompt": "Who?", "prompt_id": "1f", "messages": ASKED_MESSAGES}, ASKED, id="ultrachat"),
        pytest.param({"messages": [says("developer", "Be brief."), *ASKED_MESSAGES]}, WITH_SYSTEM, id="developer"),
        pytest.param(
            {"id": "x_0", "conversations": [speaks("human", "Who bakes?"), speaks("gpt", "Anna.")]}, ASKED, id="sharegpt"
        ),
        pytest.param(
            {"conversations": [speaks("user", "Who bakes?"), speaks("chatgpt", "Anna.")], "system": "Be brief."},
            WITH_SYSTEM,
            id="sharegpt with a system column",
        ),
        pytest.param(
            {
                "conversations": [
                    speaks("system", "Be brief.", weight=None),
                    speaks("human", "Who bakes?", weight=0.0),
                    speaks("gpt", "Anna.", weight=1.0),
                ]
            },
            WITH_SYSTEM,
            id="slimorca",
        ),
        pytest.param({"conversation_hash": "9a", "conversation": ASKED_MESSAGES}, ASKED, id="wildchat"),
        pytest.param({"instruction": "Who bakes?", "input": "", "output": "Anna."}, ASKED, id="alpaca"),
        pytest.param(
            {"instruction": "Who bakes?", "input": "Anna has an oven.", "output": "Anna.", "text": "Below is"},
            UNDER_A_TEXT,
            id="alpaca with an input",
        ),
        pytest.param({"instruction": "Who bakes?", "input": "", "response": "Anna."}, ASKED, id="gpteacher"),
        pytest.param(
            {"instruction": "Who bakes?", "input": None, "output": "Anna.", "system": "Be brief.", "history": []},
            WITH_SYSTEM,
            id="llama-factory",
        ),
        pytest.param(
            {"instruction": "Who bakes?", "context": "Anna has an oven.", "response": "Anna.", "category": "closed_qa"},
            UNDER_A_TEXT,
            id="dolly",
        ),
        pytest.param(
            {"instruction": "Who bakes?", "context": "", "response": "Anna.", "category": "open_qa"},
            ASKED,
            id="dolly, no context",
        ),
        pytest.param({"question": "Who bakes?", "answer": "Anna."}, ASKED, id="gsm8k"),
        pytest.param(
            {"id": "flan.1", "system_prompt": "Be brief.", "question": "Who bakes?", "response": "Anna."},
            WITH_SYSTEM,
            id="openorca",
        ),
        pytest.param({"system_prompt": "", "question": "Who bakes?", "response": "Anna."}, ASKED, id="openorca, no system"),
        pytest.param(
            {"question": "Who bakes?", "context": "Anna has an oven.", "answer": "Anna."}, UNDER_A_TEXT, id="question on a text"
        ),
        pytest.param({"prompt": "Who bakes?", "completion": "Anna."}, ASKED, id="trl"),
        pytest.param({"prompt": "Who bakes?", "response": "Anna."}, ASKED, id="dolly_hhrlhf"),
        pytest.param({"prompt": ASKED_MESSAGES[:1], "completion": ASKED_MESSAGES[1:]}, ASKED, id="trl conversational"),
    ],
)
def test_a_layout_is_recognised_by_its_columns(row, expected) -> None:
    assert turns(row) == expected


def test_a_named_layout_is_the_only_one_tried() -> None:
    row = {"messages": ASKED_MESSAGES, "question": "Why?", "answer": "So."}
    assert turns(row, adapter="question_answer") == [("user", "Why?"), ("assistant", "So.")]
    assert refusal({"messages": ASKED_MESSAGES}, adapter="alpaca") == "no column 'instruction' (columns: messages)"


def test_named_columns_go_before_every_layout() -> None:
    row = {"messages": ASKED_MESSAGES, "query": "Why?", "reply": "So."}
    assert turns(row, prompt_field="query", response_field="reply") == [("user", "Why?"), ("assistant", "So.")]


def test_a_named_instruction_keeps_its_input() -> None:
    row = {"instruction": "Who bakes?", "input": "Anna has an oven.", "reply": "Anna."}
    assert turns(row, prompt_field="instruction", response_field="reply") == UNDER_A_TEXT


def test_the_history_of_an_instruction_comes_before_it() -> None:
    row = {"instruction": "Who bakes?", "input": "", "output": "Anna.", "history": [["Who sings?", "Ben."]]}
    assert turns(row) == [("user", "Who sings?"), ("assistant", "Ben."), *ASKED]


def test_every_name_of_a_layout_has_an_adapter() -> None:
    names = InstructionDatasetConfig.model_fields["adapter"].annotation
    assert all(f"'{name}'" in str(names) for name in INSTRUCTION_ADAPTERS)
    assert str(names).count("'") == 2 * len(INSTRUCTION_ADAPTERS)


# What a chat is


def test_what_follows_the_last_answer_is_left_out() -> None:
    assert turns({"messages": [*ASKED_MESSAGES, says("user", "Really?")]}) == ASKED


def test_answers_before_the_first_question_are_left_out() -> None:
    row = {"conversations": [speaks("gpt", "And so on."), speaks("human", "Who bakes?"), speaks("gpt", "Anna.")]}
    assert turns(row) == ASKED
    assert turns({"messages": [says("assistant", "Hello!"), *ASKED_MESSAGES]}) == ASKED


def test_named_columns_keep_the_system_column_and_the_tools_as_known_ones_do() -> None:
    row = {"system": "Be brief.", "q": "Who bakes?", "a": "Anna.", "question": "Who bakes?", "response": "Anna."}
    assert turns(row, prompt_field="q", response_field="a") == WITH_SYSTEM


def test_the_system_message_stays_where_answers_before_the_first_question_go() -> None:
    assert turns({"messages": [says("system", "Be brief."), says("assistant", "Hello!"), *ASKED_MESSAGES]}) == WITH_SYSTEM


def test_a_system_turn_goes_before_the_system_column() -> None:
    row = {"conversations": [speaks("system", "Sing."), speaks("human", "Who?"), speaks("gpt", "Anna.")], "system": "Be brief."}
    assert turns(row)[0] == ("system", "Sing.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [speaks("gpt", "And so on.")]}, "no_question"),
        ({"conversations": [speaks("gpt", "And"), speaks("gpt", "so on.")]}, "no_question"),
        ({"messages": []}, "no_question"),
        ({"messages": ASKED_MESSAGES[:1]}, "no_answer"),
        ({"messages": [ASKED_MESSAGES[0], says("assistant", " \n")]}, "no_answer"),
        ({"messages": [says("assistant", "Hello!"), says("user", "Who bakes?")]}, "no_answer"),
        ({"question": "Who bakes?", "answer": ""}, "no_answer"),
    ],
)
def test_a_row_without_an_answered_question_gives_a_reason(row, reason) -> None:
    assert read(row) == reason


def test_shared_turns_of_one_speaker_are_joined() -> None:
    speakers = [
        ("human", "Who"),
        ("human", "bakes?"),
        ("gpt", "Anna."),
        ("gpt", "Each day."),
        ("human", "Why?"),
        ("gpt", "So."),
    ]
    row = {"conversations": [speaks(*turn) for turn in speakers]}
    expected = [("user", "Who\n\nbakes?"), ("assistant", "Anna.\n\nEach day."), ("user", "Why?"), ("assistant", "So.")]
    assert turns(row) == expected


def test_turns_of_one_role_in_messages_stay_apart() -> None:
    row = {"messages": [says("user", "Who"), says("user", "bakes?"), says("assistant", "Anna.")]}
    assert turns(row) == [("user", "Who"), ("user", "bakes?"), ("assistant", "Anna.")]


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "value": "bakes?"}]
    assert turns({"messages": [says("user", parts), ASKED_MESSAGES[1]]}) == ASKED


# Tools


def test_a_call_in_messages_has_its_arguments_as_a_mapping() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "find_baker", "arguments": '{"street": "Mill Lane"}'}}
    answer = says("tool", "Anna", name="find_baker", tool_call_id="call_1")
    chat = read({"messages": [ASKED_MESSAGES[0], says("assistant", None, tool_calls=[call]), answer, ASKED_MESSAGES[1]]})
    assert isinstance(chat, Chat)
    assert chat.messages[1:3] == [
        says("assistant", "", tool_calls=[CALL | {"id": "call_1"}]),
        says("tool", "Anna", name="find_baker", tool_call_id="call_1"),
    ]
    assert prompt_text(chat.messages[1:2]) == prompt_text([says("assistant", "", tool_calls=[CALL])])  # an id asks nothing


def test_a_chat_may_end_with_a_call() -> None:
    chat = read({"messages": [ASKED_MESSAGES[0], says("assistant", "", tool_calls=[CALL])]})
    assert isinstance(chat, Chat)
    assert chat.messages[-1]["tool_calls"] == [CALL]


def test_columns_that_are_null_are_no_calls() -> None:
    """Tables fill what a message does not have with nulls."""
    row = {"messages": [says("user", "Who bakes?", tool_calls=None, name=None), says("assistant", "Anna.", tool_calls=None)]}
    assert read(row) == Chat(ASKED_MESSAGES)


def test_a_shared_function_call_is_an_assistants_call() -> None:
    called = json.dumps({"name": "find_baker", "arguments": {"street": "Mill Lane"}})
    speakers = [("human", "Who bakes?"), ("function_call", called), ("observation", '{"name": "Anna"}'), ("gpt", "Anna.")]
    chat = read({"conversations": [speaks(*turn) for turn in speakers], "tools": json.dumps([TOOL])})
    expected = [
        ASKED_MESSAGES[0],
        says("assistant", "", tool_calls=[CALL]),
        says("tool", '{"name": "Anna"}'),
        ASKED_MESSAGES[1],
    ]
    assert chat == Chat(expected, [WRAPPED_TOOL])


def test_words_and_the_call_behind_them_are_one_message() -> None:
    called = json.dumps({"name": "find_baker", "arguments": {"street": "Mill Lane"}})
    chat = read({"conversations": [speaks("human", "Who?"), speaks("gpt", "I look."), speaks("function_call", called)]})
    assert isinstance(chat, Chat)
    assert chat.messages[1:] == [says("assistant", "I look.", tool_calls=[CALL])]


def test_words_behind_a_call_stay_behind_it() -> None:
    called = json.dumps({"name": "find_baker", "arguments": {"street": "Mill Lane"}})
    chat = read({"conversations": [speaks("human", "Who?"), speaks("function_call", called), speaks("gpt", "I looked.")]})
    assert isinstance(chat, Chat)
    assert chat.messages[1:] == [says("assistant", "", tool_calls=[CALL]), says("assistant", "I looked.")]


def test_results_of_two_calls_stay_apart() -> None:
    called = json.dumps([CALL["function"], CALL["function"]])
    speakers = [("human", "Who?"), ("function_call", called), ("observation", "Anna"), ("observation", "Ben"), ("gpt", "Both.")]
    chat = read({"conversations": [speaks(*turn) for turn in speakers]})
    assert isinstance(chat, Chat)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"] == [CALL, CALL]


@pytest.mark.parametrize("tools", [[TOOL], [WRAPPED_TOOL], json.dumps([TOOL]), json.dumps(WRAPPED_TOOL)])
def test_tools_are_wrapped_whatever_their_form(tools) -> None:
    as_given = [TOOL] if tools == [TOOL] else [WRAPPED_TOOL]
    assert read({"messages": ASKED_MESSAGES, "tools": tools}) == Chat(ASKED_MESSAGES, as_given)


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_none(tools) -> None:
    assert read({"messages": ASKED_MESSAGES, "tools": tools}) == Chat(ASKED_MESSAGES)


def test_prompts_with_other_calls_are_other_prompts() -> None:
    other = {"type": "function", "function": {"name": "find_baker", "arguments": {"street": "Ash Row"}}}
    first, second = ([says("assistant", "", tool_calls=[call])] for call in (CALL, other))
    assert prompt_text(first) != prompt_text(second)


# OpenAssistant


def flat(name: str, parent: str | None, text: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    role = "assistant" if name.startswith("a") else "prompter"
    fields = {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, "message_tree_id": "q1"}
    return {**fields, "lang": "en", "deleted": False, "synthetic": False, **more}


FLAT_TREE = [
    flat("q1", None, "Who bakes?"),
    flat("a1", "q1", "No idea.", rank=1),
    flat("a2", "q1", "Anna.", rank=0),
    flat("q2", "a2", "Why?"),
    flat("a3", "q2", "Unranked."),
    flat("a4", "q2", "So.", rank=2),
    flat("q3", "a1", "Lost."),
]
BEST_THREAD = [*ASKED, ("user", "Why?"), ("assistant", "So.")]


def node(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "replies": [node(reply) for reply in FLAT_TREE if reply["parent_id"] == message["message_id"]]}


def test_the_best_thread_of_a_tree_is_read() -> None:
    assert turns({"message_tree_id": "q1", "tree_state": "ready_for_export", "prompt": node(FLAT_TREE[0])}) == BEST_THREAD


def test_flat_messages_are_put_together_in_any_order() -> None:
    for rows in (FLAT_TREE, FLAT_TREE[::-1]):
        found = list(threads((row["message_id"], row) for row in rows))
        assert [place for place, _ in found] == ["q1"]
        assert turns(dict(found[0][1])) == BEST_THREAD
        assert turns(dict(found[0][1]), adapter="oasst") == BEST_THREAD


def test_trees_come_in_the_order_of_their_first_messages() -> None:
    rows = [flat("q1", None, "Who?"), flat("q9", None, "Why?"), flat("a9", "q9", "So."), flat("a1", "q1", "Anna.")]
    found = list(threads(enumerate(rows)))
    assert [(place, turns(dict(row))) for place, row in found] == [
        (0, [("user", "Who?"), ("assistant", "Anna.")]),
        (1, [("user", "Why?"), ("assistant", "So.")]),
    ]


def test_a_deleted_reply_is_never_chosen() -> None:
    rows = [flat("q1", None, "Who bakes?"), flat("a1", "q1", "Spam.", rank=0, deleted=True), flat("a2", "q1", "Anna.", rank=1)]
    assert turns(dict(next(threads(enumerate(rows)))[1])) == ASKED


def test_a_tree_whose_first_message_is_deleted_gives_a_reason() -> None:
    assert read(dict(next(threads([(0, flat("q1", None, "Who?", deleted=True))]))[1])) == "no_question"
    assert read({"message_tree_id": "q1", "prompt": {**node(FLAT_TREE[0]), "deleted": True}}) == "no_question"


def test_ids_that_lead_in_a_circle_end() -> None:
    rows = [
        flat("q1", None, "Who bakes?"),
        flat("a1", "q1", "Anna."),
        flat("q1", "a1", "Who bakes?"),
        flat("a1", "q1", "Anna."),
    ]
    assert turns(dict(next(threads(enumerate(rows)))[1])) == ASKED


def test_flat_messages_are_known_by_their_columns() -> None:
    assert needs_regrouping(FLAT_TREE[0])
    assert not needs_regrouping({"messages": ASKED_MESSAGES})


def test_a_row_that_is_no_message_comes_through_and_is_refused() -> None:
    bad = flat("q1", None, "Who?") | {"message_id": 7}
    assert list(threads([("line 3", bad)])) == [("line 3", bad)]
    assert "needs a text 'message_id'" in refusal(bad)


# Keys and columns that change the meaning


@pytest.mark.parametrize("history", [[["Who sings?", "Ben."]], [says("user", "Who sings?"), says("assistant", "Ben.")]])
@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "Who bakes?", "response": "Anna."}, {}),
        ({"instruction": "Who bakes?", "output": "Anna."}, {}),
        ({"instruction": "Who bakes?", "context": "", "response": "Anna."}, {}),
        ({"question": "Who bakes?", "answer": "Anna."}, {}),
        ({"query": "Who bakes?", "reply": "Anna."}, {"prompt_field": "query", "response_field": "reply"}),
    ],
)
def test_history_goes_before_every_question(row, fields, history) -> None:
    before = [("user", "Who sings?"), ("assistant", "Ben.")]
    assert turns({**row, "history": history, "system": "Be brief."}, **fields) == [("system", "Be brief."), *before, *ASKED]
    assert turns({**row, "history": None}, **fields) == ASKED
    assert read({**row, "tools": [TOOL]}, **fields) == Chat(ASKED_MESSAGES, [TOOL])


@pytest.mark.parametrize(
    "flag",
    [{key: value} for key in ("train", "trainable", "training", "loss", "loss_mask") for value in (False, 0)]
    + [{"weight": 0}, {"weight": 0.0}, {"loss_weight": 0}, {"masked": True}, {"train": True, "weight": 0}],
)
def test_an_answer_that_is_marked_does_not_count(flag) -> None:
    wrong = says("assistant", "Nobody.", **flag)
    chat = read({"messages": [says("user", "Who?"), wrong, *ASKED_MESSAGES]})
    assert chat == Chat([says("user", "Who?"), says("assistant", "Nobody.", train=False), *ASKED_MESSAGES])
    assert read({"messages": [*ASKED_MESSAGES, says("user", "Sure?"), wrong]}) == Chat(
        ASKED_MESSAGES
    )  # nothing is lost by that
    assert read({"messages": [says("user", "Who?"), wrong]}) == "no_turn_counts"


@pytest.mark.parametrize("flag", [{"train": True}, {"weight": 1.0}, {"loss": None}, {"masked": 0}, {"loss_mask": 1}])
def test_an_answer_that_is_marked_as_counting_counts(flag) -> None:
    assert read({"messages": [ASKED_MESSAGES[0], says("assistant", "Anna.", **flag)]}) == Chat(ASKED_MESSAGES)


def test_turns_of_which_one_does_not_count_are_not_joined() -> None:
    speakers = [speaks("human", "Who?"), speaks("gpt", "Nobody.", weight=0), speaks("gpt", "Anna."), speaks("gpt", "She does.")]
    chat = read({"conversations": speakers})
    assert isinstance(chat, Chat)
    assert chat.messages[1:] == [says("assistant", "Nobody.", train=False), says("assistant", "Anna.\n\nShe does.")]


def test_only_the_last_answer_counts_where_that_is_asked_for() -> None:
    row = {"messages": [*ASKED_MESSAGES, *ASKED_MESSAGES, says("user", "Why?"), says("assistant", "Hm.", train=False)]}
    expected = Chat([ASKED_MESSAGES[0], says("assistant", "Anna.", train=False), *ASKED_MESSAGES])
    assert read(row, train_on="last") == expected
    assert read(row, train_on="all") == Chat([*ASKED_MESSAGES, *ASKED_MESSAGES])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_go_with_the_answer(key) -> None:
    row = {"messages": [ASKED_MESSAGES[0], says("assistant", "Anna.", **{key: "Only she can."})]}
    assert read(row) == Chat([ASKED_MESSAGES[0], says("assistant", "Anna.", reasoning_content="Only she can.")])
    assert read({"messages": [ASKED_MESSAGES[0], says("assistant", "Anna.", **{key: ""})]}) == Chat(ASKED_MESSAGES)


def test_a_refusal_is_what_the_assistant_said() -> None:
    said = [says("assistant", None, refusal="No."), says("assistant", [{"type": "refusal", "refusal": "No."}])]
    for answer in said:
        assert turns({"messages": [says("user", "Who?"), answer]}) == [("user", "Who?"), ("assistant", "No.")]


def test_calls_of_the_old_api_are_calls() -> None:
    call = says("assistant", None, function_call={"name": "find_baker", "arguments": '{"street": "Mill Lane"}'})
    chat = read({"messages": [ASKED_MESSAGES[0], call, says("function", "Anna", name="find_baker"), ASKED_MESSAGES[1]]})
    assert isinstance(chat, Chat)
    assert chat.messages[1:3] == [says("assistant", "", tool_calls=[CALL]), says("tool", "Anna", name="find_baker")]
    row = {"messages": ASKED_MESSAGES, "functions": [TOOL]}
    assert read(row) == Chat(ASKED_MESSAGES, [WRAPPED_TOOL])


def found(row: dict[str, Any], **fields: Any) -> tuple[str, ...]:
    chat = read(row, **fields)
    assert isinstance(chat, Chat), chat
    return chat.found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": ASKED_MESSAGES, "id": 7, "source": "x", "prompt": "Who?", "lang": "en", "score": 3}, ()),
        ({"messages": ASKED_MESSAGES, "label": False}, ("ignored_label",)),
        ({"messages": ASKED_MESSAGES, "history": [["a", "b"]]}, ("ignored_history",)),
        ({"messages": ASKED_MESSAGES, "history": [], "label": None, "context": ""}, ()),
        ({"question": "Who?", "answer": "Anna.", "input": "Mill Lane"}, ("ignored_input",)),
        ({"prompt": "Who?", "completion": "Anna.", "context": "Mill Lane", "weight": 0}, ("ignored_context", "ignored_weight")),
        ({"messages": [says("system", "Brief."), *ASKED_MESSAGES], "system": "Long."}, ("ignored_system",)),
        ({"messages": [says("user", "Who?", name="Ben", id=3), says("assistant", "Anna.", model="m")]}, ("ignored_name",)),
        ({"messages": [says("user", "Who?", train=True), ASKED_MESSAGES[1]]}, ("ignored_train",)),
        ({"messages": [says("user", "Who?", weight=0), says("assistant", "Anna.", style="rude")]}, ("ignored_style",)),
        ({"messages": [says("assistant", "Hello!"), *ASKED_MESSAGES]}, ("found_answer_before_the_first_question",)),
        ({"conversations": [speaks("gpt", "Hi"), *ASKED_MESSAGES]}, ("found_answer_before_the_first_question",)),
        ({"messages": [*ASKED_MESSAGES, says("user", "Why?")]}, ("found_question_at_the_end",)),
        ({"messages": [says("user", "Who?"), says("assistant", " "), *ASKED_MESSAGES]}, ("found_empty_answer",)),
    ],
)
def test_what_is_left_out_is_counted(row, expected) -> None:
    assert found(row) == expected


# Nulls


@pytest.mark.parametrize(
    "row",
    [
        {"messages": None, "prompt": "Who bakes?", "completion": "Anna."},
        {"conversations": None, "messages": None, "instruction": None, "question": "Who bakes?", "answer": "Anna."},
        {"prompt": None, "completion": None, "messages": [m | {"from": None, "value": None} for m in ASKED_MESSAGES]},
        {"conversations": [{"from": None, "value": None, "weight": None} | m for m in ASKED_MESSAGES], "history": None},
    ],
)
def test_what_is_null_is_absent(row) -> None:
    assert read(row) == Chat(ASKED_MESSAGES)


def test_nulls_that_tables_fill_in_are_left_out_of_calls_and_tools() -> None:
    arguments = {"street": "Mill Lane", "town": None, "near": {"x": 1, "y": None}}
    call = {"type": "function", "function": {"name": "find_baker", "arguments": arguments}}
    row = {"messages": [ASKED_MESSAGES[0], says("assistant", "", tool_calls=[call])], "tools": [WRAPPED_TOOL | {"x": None}]}
    row["tools"][0]["function"] = TOOL | {"strict": None}
    chat = read(row)
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"street": "Mill Lane", "near": {"x": 1}}
    assert chat.tools == [WRAPPED_TOOL]
    assert chat.found == ("found_nulls_in_arguments", "found_nulls_in_tools")
    call["function"]["arguments"] = json.dumps(arguments)  # nobody but its author wrote the nulls of a text
    chat = read(row)
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


# Other names


def test_columns_and_roles_of_other_names_are_read() -> None:
    row = {"dialog": [says("human", "Who bakes?"), says("bot", "Anna.")], "sys": "Be brief.", "messages": "7 of them"}
    fields = {"columns": {"messages": "dialog", "system": "sys"}, "roles": {"human": "user", "bot": "assistant"}}
    assert turns(row, **fields) == WITH_SYSTEM
    assert refusal({"dialogue": []}, **fields) == "no column 'dialog', which 'columns' of the config names (columns: dialogue)"


def test_columns_may_trade_names() -> None:
    row = {"question": "Anna.", "answer": "Who bakes?"}
    assert turns(row, columns={"question": "answer", "answer": "question"}) == ASKED


def test_a_named_column_that_no_layout_reads_is_counted() -> None:
    assert found({"messages": ASKED_MESSAGES, "sys": "Be brief."}, columns={"sistem": "sys"}) == ("ignored_sistem",)


def test_messages_that_are_written_as_text_are_messages() -> None:
    for write in (json.dumps, repr):
        row = {"messages": write(ASKED_MESSAGES)}
        assert turns(row) == ASKED
        assert found(row) == ("found_messages_as_text",)
        assert turns({"prompt": write(ASKED_MESSAGES[:1]), "completion": write(ASKED_MESSAGES[1:])}) == ASKED
    assert turns({"prompt": "Who bakes?", "response": "Anna.", "history": "[]"}) == ASKED
    assert turns({"prompt": "Who bakes?", "response": "Anna.", "history": '[["Who?", "Ben."]]'})[:2] == [
        ("user", "Who?"),
        ("assistant", "Ben."),
    ]


# Errors

UNKNOWN_ROLE = (
    "column 'messages' message 0: 'role' must be one of system, developer, user, assistant, tool, function, not 'human'"
)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"messages": "Who?"}, "column 'messages' must be a list of messages, not str"),
        (
            {"messages": ["Who?"]},
            "column 'messages' message 0 must have 'role' and 'content', or 'from' and 'value', not be str",
        ),
        ({"messages": [says("human", "Who?")]}, UNKNOWN_ROLE),
        ({"messages": [{"role": "user"}]}, "column 'messages' message 0: 'content' must be text, not NoneType"),
        ({"messages": [says("assistant", None)]}, "column 'messages' message 0: 'content' must be text, not NoneType"),
        (
            {"messages": [says("user", [{"type": "image_url", "image_url": {}}])]},
            "column 'messages' message 0: 'content' part 0 must be of type 'text', not 'image_url'",
        ),
        (
            {"messages": [says("user", "Who?"), says("assistant", "Anna.", weight=0.5)]},
            "column 'messages' message 1: 'weight' is 0.5: an answer counts as a whole (1, true) or not at all (0, false)",
        ),
        (
            {"messages": [says("user", "Who?"), says("assistant", "Anna.", train="no")]},
            "column 'messages' message 1: 'train' is 'no': an answer counts as a whole (1, true) or not at all (0, false)",
        ),
        (
            {"messages": [says("user", "Who?"), says("assistant", "Anna.", mask=True)]},
            "column 'messages' message 1: 'mask' has two meanings: rename it to 'train' (true: it counts) or 'masked'",
        ),
        (
            {"messages": [says("user", "Who?"), says("assistant", "Anna.", refusal="No.")]},
            "column 'messages' message 1: 'content' and 'refusal' say different things: leave one of them out",
        ),
        (
            {"messages": [says("user", "Who?"), says("assistant", "Anna.", thinking="a", reasoning="b")]},
            "column 'messages' message 1: 'reasoning' and 'thinking' say different things: leave one of them out",
        ),
        (
            {"messages": [says("user", "Who?", images=["a.png"]), says("assistant", "Anna.")]},
            "column 'messages' message 0: 'images' is no text, and only text can be trained on",
        ),
        ({"messages": ASKED_MESSAGES, "images": ["a.png"]}, "column 'images' belongs to the row's words"),
        (
            {"prompt": "<image> Who?", "completion": "Anna.", "image": None},
            "column 'image' belongs to the row's words",
        ),
        (
            {"prompt": "<audio> Who?", "completion": "Anna.", "audios": []},
            "column 'audios' belongs to the row's words",
        ),
        (
            {"prompt": "Who?", "completion": "Anna.", "history": [{"role": "bot", "content": "x"}]},
            "column 'history' entry 0: 'role' must be one of",
        ),
        (
            {"messages": [says("user", "Who?", tool_calls=[CALL])]},
            "column 'messages' message 0: only an assistant has 'tool_calls', not 'user'",
        ),
        (
            {"messages": [says("assistant", "", tool_calls=[{"name": "f", "arguments": "{"}])]},
            "column 'messages' message 0 call 0: 'arguments' is no JSON: ",
        ),
        (
            {"messages": [says("assistant", "", tool_calls=[{"name": "f", "arguments": [1]}])]},
            "column 'messages' message 0 call 0: 'arguments' must be a mapping, not list",
        ),
        (
            {"messages": [says("user", "Who\ud83d?")]},
            "column 'messages' message 0: 'content' holds half a character ('\\ud83d')",
        ),
        (
            {"conversations": [speaks("narrator", "Once.")]},
            "column 'conversations' message 0: 'from' must be one of system, human",
        ),
        ({"conversations": [speaks("function_call", "find()")]}, "column 'conversations' message 0: 'value' is no JSON: "),
        ({"messages": ASKED_MESSAGES, "tools": "find()"}, "column 'tools' is no JSON: "),
        (
            {"messages": ASKED_MESSAGES, "tools": [{"title": "x"}]},
            "column 'tools' must be a list of functions, each with a text",
        ),
        ({"messages": ASKED_MESSAGES, "tools": 3}, "column 'tools' must be a list of functions, not int"),
        ({"question": "Why?", "answer": 3}, "column 'answer' must be text, not int"),
        ({"instruction": "Why?", "input": ["a"], "output": "So."}, "column 'input' must be text, not list"),
        ({"instruction": "Why?", "output": "So.", "history": [["Who?"]]}, "column 'history' entry 0 must be a question and an"),
        ({"instruction": "Why?", "output": "So.", "history": "Who?"}, "column 'history' must be a list of [question, answer]"),
        ({"message_tree_id": "t", "prompt": node(FLAT_TREE[0]) | {"rank": "1"}}, "column 'prompt' must be a tree of messages"),
        ({"message_tree_id": "t", "prompt": node(FLAT_TREE[0]) | {"replies": 1}}, "column 'prompt': 'replies' must be a list"),
        ({"message_tree_id": "t", "prompt": {"text": "Hi", "role": "bot"}}, "column 'prompt' message 0: 'role' must be one of"),
    ],
)
def test_a_wrong_row_says_in_which_column(row, error) -> None:
    assert refusal(row).startswith(error)


def test_unknown_columns_are_listed_with_what_was_expected() -> None:
    error = refusal({"text": "Once.", "url": "x"})
    assert error.startswith("columns text, url are no instruction layout that is known (messages: messages; sharegpt:")
    assert error.endswith("set adapter, or prompt_field and response_field")


def test_a_missing_named_column_is_named() -> None:
    assert refusal({"query": "Why?"}, prompt_field="query", response_field="reply") == "no column 'reply' (columns: query)"


# Real files


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.split("\n") if line]
    return json.loads(text)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("dolly-hhrlhf-1k/dolly_hhrlhf_train_small.jsonl", {"chats": 1000, "turns": 2000}),
        ("gpteacher/codegen-instruct.json.gz", {"chats": 4535, "turns": 9070}),
        ("gpteacher/roleplay-simple-deduped-roleplay-instruct.json.gz", {"chats": 1923, "turns": 3846}),
        ("gsm8k-train/train.jsonl.gz", {"chats": 7473, "turns": 14946}),
        ("llamafactory-demos/alpaca_en_demo.json", {"chats": 999, "turns": 1998}),
        ("llamafactory-demos/glaive_toolcall_en_demo.json", {"chats": 300, "turns": 1914, "with_tools": 191, "calls": 211}),
        ("sharegpt-sample/sharegpt_sample.jsonl.gz", {"chats": 991, "turns": 7049, "shortened": 330, "no_question": 9}),
    ],
)
def test_real_rows_are_read(name, counts) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    found: Counter[str] = Counter()
    rows = rows_of(SHARED_DATA / "instruction" / name)
    for row in rows:
        chat = read(row)
        if isinstance(chat, str):
            found[chat] += 1
            continue
        roles = [message["role"] for message in chat.messages]
        assert roles[0] in ("system", "user")
        assert roles[-1] == "assistant"
        found["chats"] += 1
        found["turns"] += len(roles)
        found["with_tools"] += chat.tools is not None
        found["calls"] += sum("tool_calls" in message for message in chat.messages)
        found["shortened"] += "conversations" in row and len(roles) < len(row["conversations"])
    assert +found == Counter(counts)
    assert len(rows) == found["chats"] + found["no_question"]


def test_the_real_chats_that_begin_with_an_answer_or_do_not_alternate() -> None:
    """338 begin with an answer, 9 of which are nothing else; 5 do not alternate, 4 of them among those."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    rows = rows_of(SHARED_DATA / "instruction/sharegpt-sample/sharegpt_sample.jsonl.gz")
    speakers = [[turn["from"] for turn in row["conversations"]] for row in rows]
    assert sum(turn[0] == "gpt" for turn in speakers) == 338
    assert sum(any(a == b for a, b in itertools.pairwise(turn)) for turn in speakers) == 5
    for row in rows:
        chat = read(row)
        roles = [message["role"] for message in chat.messages] if isinstance(chat, Chat) else []
        assert all(a != b for a, b in itertools.pairwise(roles))
