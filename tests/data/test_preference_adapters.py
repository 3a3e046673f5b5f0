"""Preferences: every public layout becomes the pair that it means, and a row that is wrong says in which column."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import PreferenceDatasetConfig
from modern_llm.data.columns import RowError
from modern_llm.data.messages import Pair
from modern_llm.data.preference_adapters import PREFERENCE_ADAPTERS, PairRow, read_pair

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def read(row: dict[str, Any], **fields: Any) -> PairRow | str:
    return read_pair(row, PreferenceDatasetConfig(dataset_name="rows.jsonl", **fields))


def pair(row: dict[str, Any], **fields: Any) -> tuple[list[tuple[str, str]], str, str]:
    """Prompt (role and content of each turn), chosen and rejected answer of a row whose sides share their prompt."""
    found = read(row, **fields)
    assert isinstance(found, PairRow), found
    assert "prompts_differ" not in found.doubts
    prompt = [(turn["role"], turn["content"]) for turn in found.pair.prompt]
    return prompt, found.pair.chosen["content"], found.pair.rejected["content"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def speaks(speaker: str, value: str) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def hh(*words: str) -> str:
    """A dialogue of HH-RLHF, the human first."""
    return "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {text}" for n, text in enumerate(words))


def refusal(row: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(RowError) as caught:
        read(row, **fields)
    return str(caught.value)


TOOL = {"name": "find_baker", "parameters": {"type": "object", "properties": {}}}
SIDES = {"chosen": "Anna.", "rejected": "Nobody."}
PAIR = ([("user", "Who bakes?")], "Anna.", "Nobody.")
SYSTEM_PAIR = ([("system", "Be brief."), ("user", "Who bakes?")], "Anna.", "Nobody.")
MATERIAL_PAIR = ([("user", "Who bakes?\n\nAnna has an oven.")], "Anna.", "Nobody.")
LONG_PAIR = ([("user", "Who sings?"), ("assistant", "Ben."), ("user", "Who bakes?")], "Anna.", "Nobody.")
LONG_PROMPT = [user("Who sings?"), assistant("Ben."), user("Who bakes?")]
SHP = {
    "post_id": "qt3nxl",
    "domain": "askbaking_train",
    "history": "Who bakes?",
    "human_ref_A": "Nobody.",
    "human_ref_B": "Anna.",
    "labels": 0,
    "score_A": 10,
    "score_B": 25,
    "score_ratio": 2.5,
}
ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Who bakes?",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "Someone.", "overall_score": 6.0, "fine-grained_score": 3.5, "annotations": {}},
        {"model": "b", "response": "Nobody.", "overall_score": 4.0, "fine-grained_score": 2.0, "annotations": {}},
        {"model": "c", "response": "Anna.", "overall_score": 8.0, "fine-grained_score": 4.75, "annotations": {}},
    ],
}


def both(*turns: dict[str, Any]) -> dict[str, Any]:
    """Sides as lists of messages that begin with these turns."""
    return {"chosen": [*turns, assistant("Anna.")], "rejected": [*turns, assistant("Nobody.")]}


# Layouts


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"prompt": "Who bakes?", **SIDES}, PAIR, id="strings"),
        pytest.param({"question": "Who bakes?", **SIDES}, PAIR, id="question"),
        pytest.param({"instruction": "Who bakes?", "input": "", "output": "Anna.", **SIDES}, PAIR, id="instruction"),
        pytest.param({"instruction": "Who bakes?", "input": "Anna has an oven.", **SIDES}, MATERIAL_PAIR, id="input"),
        pytest.param({"system": "", "question": "Who bakes?", **SIDES}, PAIR, id="orca, no system"),
        pytest.param({"system": "Be brief.", "question": "Who bakes?", **SIDES}, SYSTEM_PAIR, id="orca"),
        pytest.param({"system_prompt": "Be brief.", "prompt": "Who bakes?", **SIDES}, SYSTEM_PAIR, id="system_prompt"),
        pytest.param({"prompt": [user("Who bakes?")], **both()}, PAIR, id="trl, explicit prompt"),
        pytest.param({"prompt": "Who bakes?", **both()}, PAIR, id="text and one-message sides"),
        pytest.param({"prompt": LONG_PROMPT, **SIDES}, LONG_PAIR, id="messages and text sides"),
        pytest.param(
            {"prompt": "Who bakes?", "chosen": assistant("Anna."), "rejected": assistant("Nobody.")}, PAIR, id="message sides"
        ),
        pytest.param(both(user("Who bakes?")), PAIR, id="trl, implicit prompt"),
        pytest.param(both(*LONG_PROMPT), LONG_PAIR, id="trl, implicit prompt of many turns"),
        pytest.param(both(system("Be brief."), user("Who bakes?")), SYSTEM_PAIR, id="trl, implicit prompt with a system turn"),
        pytest.param(
            {
                "prompt": "Who bakes?",
                "prompt_id": "1f",
                **both(user("Who bakes?")),
                "messages": [user("Who bakes?"), assistant("Anna.")],
                "score_chosen": 8.5,
                "score_rejected": 5.0,
            },
            PAIR,
            id="ultrafeedback binarized",
        ),
        pytest.param(
            {"prompt": "Who sings?", **both(*LONG_PROMPT)}, LONG_PAIR, id="sides of many turns, prompt repeats the first"
        ),
        pytest.param({"prompt": LONG_PROMPT, **both(*LONG_PROMPT)}, LONG_PAIR, id="sides repeat a prompt of messages"),
        pytest.param(
            {"prompt": [user("Who sings?")], **both(assistant("Ben."), user("Who bakes?"))},
            LONG_PAIR,
            id="sides go on from the prompt",
        ),
        pytest.param(
            {"system": "Be brief.", "prompt": "Who bakes?", **both(user("Who bakes?"))}, SYSTEM_PAIR, id="system, then sides"
        ),
        pytest.param(
            {"prompt": [system("Be brief."), user("Who bakes?")], **both(user("Who bakes?"))},
            SYSTEM_PAIR,
            id="the prompt's system turn stays where sides repeat only the question",
        ),
        pytest.param({"chosen": hh("Who bakes?", "Anna."), "rejected": hh("Who bakes?", "Nobody.")}, PAIR, id="hh"),
        pytest.param(
            {
                "chosen": hh("Who sings?", "Ben.", "Who bakes?", "Anna."),
                "rejected": hh("Who sings?", "Ben.", "Who bakes?", "Nobody."),
            },
            LONG_PAIR,
            id="hh of many turns",
        ),
        pytest.param(
            {
                "prompt": hh("Who sings?", "Ben.", "Who bakes?") + "\n\nAssistant:",
                "response": " Anna.",
                "chosen": " Anna.",
                "rejected": " Nobody.",
            },
            LONG_PAIR,
            id="hh with its prompt in a column",
        ),
        pytest.param(SHP, PAIR, id="shp, B is better"),
        pytest.param(SHP | {"human_ref_A": "Anna.", "human_ref_B": "Nobody.", "labels": 1}, PAIR, id="shp, A is better"),
        pytest.param(
            {"qid": 1, "question": "Who bakes?", "date": "2012/01/01", "response_j": "Anna.", "response_k": "Nobody."},
            PAIR,
            id="stack exchange",
        ),
        pytest.param(
            {
                "conversations": [speaks("human", "Who bakes?")],
                "chosen": speaks("gpt", "Anna."),
                "rejected": speaks("gpt", "Nobody."),
            },
            PAIR,
            id="llama-factory",
        ),
        pytest.param(
            {
                "conversations": [speaks("human", "Who sings?"), speaks("gpt", "Ben."), speaks("human", "Who bakes?")],
                "chosen": speaks("gpt", "Anna."),
                "rejected": speaks("gpt", "Nobody."),
            },
            LONG_PAIR,
            id="llama-factory, many turns",
        ),
        pytest.param(
            {"system": "Be brief.", "conversations": [speaks("human", "Who bakes?")], **SIDES}, SYSTEM_PAIR, id="shared, texts"
        ),
        pytest.param(
            {"messages": LONG_PROMPT, "chosen": assistant("Anna."), "rejected": assistant("Nobody.")},
            LONG_PAIR,
            id="messages, message sides",
        ),
        pytest.param(ULTRAFEEDBACK, PAIR, id="ultrafeedback"),
        pytest.param(
            {
                "prompt": hh("Who bakes?") + "\n\nAssistant: ",
                "answers": [
                    {"answer": "Anna.", "model": "a", "rank": 1.0},
                    {"answer": "Someone.", "model": "b", "rank": 2.0},
                    {"answer": "Nobody.", "model": "c", "rank": 7.0},
                ],
            },
            PAIR,
            id="nectar",
        ),
        pytest.param(
            {"prompt": "Who bakes?", "responses": ["Nobody.", "Ben.", "Anna."], "scores": [1, 2, 3.5]}, PAIR, id="scores"
        ),
        pytest.param({"prompt": "Who bakes?", "completions": ["Anna.", "Nobody."], "ratings": [5, 4]}, PAIR, id="ratings"),
        pytest.param({"prompt": "Who bakes?", "answers": ["Nobody.", "Anna."], "rank": [2, 1]}, PAIR, id="rank"),
    ],
)
def test_a_layout_is_recognised_by_its_columns(row, expected) -> None:
    assert pair(row) == expected


def test_columns_of_other_names_are_read() -> None:
    row = {"query": "Who bakes?", "better": "Anna.", "worse": "Nobody."}
    assert pair(row, prompt_field="query", chosen_field="better", rejected_field="worse") == PAIR


def test_hh_sides_of_other_names_are_read() -> None:
    row = {"better": hh("Who bakes?", "Anna."), "worse": hh("Who bakes?", "Nobody.")}
    assert pair(row, chosen_field="better", rejected_field="worse") == PAIR


def test_a_conversation_of_another_name_is_read() -> None:
    row = {"dialog": [speaks("human", "Who bakes?")], "better": speaks("gpt", "Anna."), "worse": speaks("gpt", "Nobody.")}
    assert pair(row, prompt_field="dialog", chosen_field="better", rejected_field="worse") == PAIR


def test_rated_answers_to_a_prompt_of_another_name_are_read() -> None:
    assert pair({"query": "Who bakes?", "responses": ["Anna.", "Nobody."], "scores": [2, 1]}, prompt_field="query") == PAIR


def test_a_named_layout_is_the_only_one_tried() -> None:
    answers = {"question": "Who bakes?", "response_j": "Anna.", "response_k": "Nobody."}
    row = {**answers, "prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert pair(row) == ([("user", "Why?")], "So.", "No.")
    assert pair(row, adapter="stack_exchange") == PAIR
    assert (
        refusal({"prompt": "Why?", **SIDES}, adapter="stack_exchange")
        == "no column 'question' (columns: prompt, chosen, rejected): set prompt_field to the column of the prompt"
    )


def test_every_name_of_a_layout_has_an_adapter() -> None:
    names = str(PreferenceDatasetConfig.model_fields["adapter"].annotation)
    assert all(f"'{name}'" in names for name in PREFERENCE_ADAPTERS)
    assert names.count("'") == 2 * len(PREFERENCE_ADAPTERS)


# Prompts


def test_prompts_that_differ_are_said_and_the_chosen_sides_is_used() -> None:
    for row in (
        {"chosen": hh("Who bakes?", "Anna."), "rejected": hh("Who sings?", "Nobody.")},
        {"chosen": both(user("Who bakes?"))["chosen"], "rejected": both(user("Who sings?"))["rejected"]},
    ):
        assert read(row) == PairRow(Pair([user("Who bakes?")], assistant("Anna."), assistant("Nobody.")), ("prompts_differ",))


def test_prompts_that_differ_in_their_number_of_turns_are_said() -> None:
    row = {"chosen": hh("Who?", "Well") + "\n\nAssistant: Anna.", "rejected": hh("Who?", "Nobody.")}
    found = read(row)
    assert isinstance(found, PairRow)
    assert found.doubts == ("prompts_differ",)


def test_white_space_around_a_turn_is_no_difference() -> None:
    row = {"chosen": both(user("Who bakes?"))["chosen"], "rejected": both(user(" Who bakes?\n"))["rejected"]}
    assert pair(row) == PAIR


def test_turns_of_one_speaker_are_joined_in_a_dialogue() -> None:
    before = "\n\nHuman: Hi.\n\nAssistant: Well.\n\nAssistant: Hello."
    row = {"chosen": before + hh("Who?", "Anna."), "rejected": before + hh("Who?", "Nobody.")}
    assert pair(row)[0] == [("user", "Hi."), ("assistant", "Well.\n\nHello."), ("user", "Who?")]


def test_what_a_shared_conversation_says_before_the_first_question_is_left_out() -> None:
    row = {"conversations": [speaks("gpt", "Hello!"), speaks("human", "Who"), speaks("human", "bakes?")], **SIDES}
    assert pair(row)[0] == [("user", "Who\n\nbakes?")]


def test_a_text_that_only_looks_a_little_like_a_dialogue_is_one_turn() -> None:
    text = "Finish this:\n\nHuman: Hi\n\nAssistant:"
    assert pair({"prompt": text, **SIDES})[0] == [("user", text)]


# Rows that are no pair


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": hh("Who?", "Anna.", "So?"), "rejected": hh("Who?", "Anna.", "No?")},
        {"chosen": [assistant("Anna.")], "rejected": [assistant("Nobody.")]},
        {"prompt": [user("Who?"), assistant("Hm.")], **SIDES},
        {"prompt": "Who?", "chosen": [user("Who?")], "rejected": [user("Who?")]},
        {"conversations": [speaks("human", "Who?"), speaks("gpt", "Hm.")], **SIDES},
        {"conversations": [], **SIDES},
    ],
)
def test_turns_out_of_order_are_a_reason(row) -> None:
    assert read(row) == "turns_out_of_order"


def test_an_answer_may_call_a_tool() -> None:
    call = speaks("function_call", '{"name": "find_baker", "arguments": {}}')
    row = {"conversations": [speaks("human", "Who?")], "chosen": call, "rejected": speaks("gpt", "Nobody."), "tools": [TOOL]}
    calls = [{"type": "function", "function": {"name": "find_baker", "arguments": {}}}]
    chosen = {"role": "assistant", "content": "", "tool_calls": calls}
    assert read(row) == PairRow(Pair([user("Who?")], chosen, assistant("Nobody."), [TOOL]))


def test_an_answer_to_a_tools_result_is_a_pair() -> None:
    asked = [user("Who?"), {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "{}"}]}]
    assert isinstance(read({"prompt": [*asked, {"role": "tool", "content": "Anna"}], **SIDES}), PairRow)


@pytest.mark.parametrize(("chosen", "rejected"), [("Anna.", "Anna."), ("", "Nobody."), ("Anna.", " ")])
def test_identical_and_empty_answers_come_through(chosen, rejected) -> None:
    assert pair({"prompt": "Who bakes?", "chosen": chosen, "rejected": rejected})[1:] == (chosen, rejected)


def test_an_empty_last_answer_of_a_dialogue_comes_through() -> None:
    assert pair({"chosen": hh("Who?", "Anna."), "rejected": hh("Who?") + "\n\nAssistant:"})[1:] == ("Anna.", "")


def test_answers_of_one_score_are_a_tie() -> None:
    assert read({"prompt": "Who?", "responses": ["Anna.", "Ben."], "scores": [3, 3.0]}) == "tie"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who?", "responses": ["Anna."], "scores": [3]},
        {"prompt": "Who?", "responses": ["Anna.", "Ben."], "scores": [3, None]},
        {"prompt": "Who?", "responses": [], "scores": []},
        {
            "prompt": "Who?",
            "completions": [{"response": "Anna.", "overall_score": 3}, {"response": "Ben.", "overall_score": None}],
        },
    ],
)
def test_less_than_two_rated_answers_are_a_reason(row) -> None:
    assert read(row) == "one_answer"


@pytest.mark.parametrize(
    ("row", "ratio"),
    [
        (SHP, 2.5),
        ({"prompt": "Who bakes?", **SIDES, "score_chosen": 5.0, "score_rejected": 2.0}, 2.5),
        ({"prompt": "Who bakes?", "responses": ["Nobody.", "Anna."], "scores": [2, 5]}, 2.5),
        (ULTRAFEEDBACK, 2.0),
    ],
)
def test_a_pair_below_the_least_score_ratio_is_left_out(row, ratio) -> None:
    assert pair(row, min_score_ratio=ratio) == PAIR
    assert read(row, min_score_ratio=ratio + 0.01) == "score_ratio"


@pytest.mark.parametrize(("better", "other", "is_pair"), [(3, 0, True), (3, -1, True), (0, -2, False), (-1, -2, False)])
def test_scores_of_zero_or_less_have_no_ratio(better, other, is_pair) -> None:
    row = {"prompt": "Who?", "responses": ["Anna.", "Ben."], "scores": [better, other]}
    assert isinstance(read(row, min_score_ratio=2.0), PairRow) == is_pair


def test_ranks_have_no_ratio() -> None:
    row = {"prompt": "Who bakes?", "answers": ["Nobody.", "Anna."], "rank": [2, 1]}
    assert pair(row) == PAIR
    assert refusal(row, min_score_ratio=2.0).startswith("min_score_ratio needs a score of each side")


@pytest.mark.parametrize(
    "names", ["score_{}", "{}_score", "{}_rating", "rating_{}", "{}-rating", "{}_avg_rating", "reward_{}", "{}_reward"]
)
def test_scores_of_the_sides_have_many_names(names) -> None:
    row = {"prompt": "Who bakes?", **SIDES, names.format("chosen"): 2, names.format("rejected"): 2.0}
    assert read(row, min_score_ratio=1.5) == "score_ratio"
    assert pair(row | {names.format("chosen"): "4"}, min_score_ratio=1.5) == PAIR  # out of a CSV file
    assert read(row | {names.format("chosen"): None}, min_score_ratio=1.5) == "score_ratio"
    assert read(row | {names.format("chosen"): 1}).doubts == ("scores_disagree",)  # type: ignore[union-attr]
    assert read(row).doubts == ()  # type: ignore[union-attr]


def test_scores_may_have_the_names_of_named_sides() -> None:
    row = {"prompt": "Who bakes?", "good": "Anna.", "bad": "Nobody.", "score_good": 3, "score_bad": 4}
    fields = {"chosen_field": "good", "rejected_field": "bad"}
    assert read(row, **fields).doubts == ("scores_disagree",)  # type: ignore[union-attr]
    assert read(row, min_score_ratio=1.5, **fields) == "score_ratio"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who bakes?", **SIDES},
        {"chosen": hh("Who bakes?", "Anna."), "rejected": hh("Who bakes?", "Nobody.")},
        {"question": "Who bakes?", "response_j": "Anna.", "response_k": "Nobody."},
        {"conversations": [speaks("human", "Who bakes?")], **SIDES},
    ],
)
def test_a_least_score_ratio_needs_scores_in_every_layout(row) -> None:
    assert pair(row) == PAIR
    assert "min_score_ratio needs a score of each side" in refusal(row, min_score_ratio=2.0)
    assert pair(row | {"score_chosen": 4, "score_rejected": 2}, min_score_ratio=2.0) == PAIR


def test_shp_whose_scores_disagree_with_its_label_is_doubtful() -> None:
    assert read(SHP | {"labels": 1}).doubts == ("scores_disagree",)  # type: ignore[union-attr]


def test_scores_that_are_no_numbers_are_missing() -> None:
    row = {"prompt": "Who bakes?", **SIDES, "score_chosen": "high", "score_rejected": "low"}
    assert pair(row) == PAIR
    assert read(row, min_score_ratio=2.0) == "score_ratio"


# What goes with a prompt


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who bakes?", **SIDES},
        {"chosen": hh("Who bakes?", "Anna."), "rejected": hh("Who bakes?", "Nobody.")},
        {"question": "Who bakes?", "response_j": "Anna.", "response_k": "Nobody."},
        {"prompt": "Who bakes?", "responses": ["Nobody.", "Anna."], "scores": [2, 5]},
        SHP,
    ],
)
def test_tools_and_a_system_prompt_go_with_every_layout(row) -> None:
    found = read(row | {"tools": json.dumps([TOOL]), "system": "Be brief."})
    assert isinstance(found, PairRow)
    assert found.pair.tools == [{"type": "function", "function": TOOL}]
    assert found.pair.prompt == [system("Be brief."), user("Who bakes?")]
    assert found.found == ()


@pytest.mark.parametrize("history", [[["Who sings?", "Ben."]], [user("Who sings?"), assistant("Ben.")]])
@pytest.mark.parametrize(
    "row", [{"prompt": "Who bakes?", **SIDES}, {"prompt": "Who bakes?", "responses": ["Nobody.", "Anna."], "scores": [2, 5]}]
)
def test_history_goes_before_the_question(row, history) -> None:
    assert pair(row | {"history": history}) == LONG_PAIR


def test_an_answer_that_does_not_count_is_a_reason() -> None:
    row = {"prompt": "Who?", "chosen": {**assistant("Anna."), "train": False}, "rejected": "Nobody."}
    assert read(row) == "no_turn_counts"


def test_a_prompt_column_that_the_sides_contradict_is_counted() -> None:
    row = {"prompt": "Who sings?", **both(user("Who bakes?"))}
    assert pair(row) == PAIR
    assert read(row).found == ("found_prompt_column_unlike_the_sides",)  # type: ignore[union-attr]
    assert read({"prompt": "Who bakes?", **both(*LONG_PROMPT)}).found == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_that_are_written_as_text_are_messages(write) -> None:
    row = {"prompt": "Who bakes?", **{side: write(turns) for side, turns in both(user("Who bakes?")).items()}}
    assert pair(row) == PAIR
    assert read(row).found == ("found_messages_as_text",)  # type: ignore[union-attr]
    assert pair({"prompt": write([user("Who bakes?")]), **{s: write(assistant(SIDES[s])) for s in SIDES}}) == PAIR


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1, 2]", ()),
        ('{"name": "Anna"}', ()),
        ("[Anna]", ()),
        ("[[1, 2], [3, 4]]", ()),
        ('{"from": "Berlin", "value": 3}', ()),
        ('[{"role": "admin", "content": "x"}]', ()),
        ('[{"role": "user", "content": "q"} {"role"', ("found_text_like_messages",)),
    ],
)
def test_other_text_stays_text(text, found) -> None:
    row = {"prompt": "Who?", "chosen": text, "rejected": "No."}
    assert pair(row)[1] == text
    assert read(row).found == found  # type: ignore[union-attr]


# Summaries

TLDR = {
    "info": {"id": "t3_x", "subreddit": "baking", "title": "Who?", "post": "Who bakes here?"},
    "summaries": [{"text": " Nobody.", "policy": "sup1"}, {"text": " Anna.", "policy": "ref"}],
    "choice": 1,
    "worker": "w",
    "split": "train",
}


def test_summaries_of_the_dpo_paper_are_pairs() -> None:
    prompt = "SUBREDDIT: r/baking\n\nTITLE: Who?\n\nPOST: Who bakes here?\n\nTL;DR:"
    assert pair(TLDR) == ([("user", prompt)], "Anna.", "Nobody.")
    assert pair(TLDR | {"choice": 0})[1:] == ("Nobody.", "Anna.")
    assert read(TLDR | {"info": {"article": "x", "post": None}}) == "no_post"
    assert refusal({"info": {}}, adapter="tldr") == "no column 'summaries' (columns: info)"
    assert refusal(TLDR | {"choice": 2}).startswith("column 'choice' must be 0 or 1")
    assert refusal(TLDR | {"summaries": [{"text": "x"}]}).startswith("column 'info' must be a mapping with 'post'")
    assert refusal(TLDR | {"info": {"post": "x"}}).startswith("column 'info': 'subreddit' must be text, not NoneType")


# Errors


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "Who?", "chosen": 3, "rejected": "No."}, "column 'chosen' must be text, not int"),
        (
            {"prompt": "Who?", "chosen": "So.", "rejected": None},
            "column 'rejected' is null: set rejected_field to the column of the worse answer",
        ),
        ({"prompt": "Who?", "chosen": [], "rejected": "No."}, "column 'chosen' is an empty list: it must be text or a list of"),
        ({"prompt": 3, **SIDES}, "column 'prompt' must be text, not int"),
        ({"prompt": "Who?", "chosen": "Anna\udce9", "rejected": "No."}, "column 'chosen' holds half a character ('\\udce9')"),
        (
            {"prompt": "Who?", "chosen": [{"role": "bot", "content": "x"}], "rejected": "No."},
            "column 'chosen' message 0: 'role' must",
        ),
        ({**SIDES}, "no prompt: column 'chosen' is no 'Human:'/'Assistant:' dialogue and there is none of the columns prompt,"),
        (
            {"chosen": [assistant("Anna.")], "rejected": "No."},
            "no prompt: there is none of the columns prompt, question, instruction",
        ),
        ({"conversations": [speaks("narrator", "Once.")], **SIDES}, "column 'conversations' message 0: 'from' must be one of"),
        (SHP | {"labels": 2}, "column 'labels' must be 1 (A is better) or 0 (B is better), not 2"),
        (
            SHP | {"labels": None},
            "columns post_id, domain, history, human_ref_A, human_ref_B, score_A, score_B, score_ratio; null: ",
        ),
        (
            {"prompt": "Who?", "responses": ["a", "b"]},
            "column 'responses' needs a list of as many scores, in one of the columns",
        ),
        ({"prompt": "Who?", "responses": ["a", "b"], "scores": [1]}, "column 'responses' needs a list of as many scores"),
        (
            {"prompt": "Who?", "responses": ["a", "b"], "scores": [1, "2"]},
            "column 'responses' answer 1: its 'scores' must be a finite",
        ),
        (
            {"prompt": "Who?", "answers": [{"text": "a"}, {"text": "b"}]},
            "column 'answers': no answer has a score out of score, rating",
        ),
        ({"prompt": "Who?", "answers": [{"score": 1}, {"score": 2}]}, "column 'answers' answer 0 must be text, not NoneType"),
    ],
)
def test_a_wrong_row_says_in_which_column(row, error) -> None:
    assert refusal(row).startswith(error)


def test_a_missing_named_column_is_named() -> None:
    row = {"prompt": "Who?", **SIDES}
    assert (
        refusal(row, chosen_field="better")
        == "no column 'better' (columns: prompt, chosen, rejected): set chosen_field to the column of the better answer"
    )
    assert refusal(row, rejected_field="worse").endswith("): set rejected_field to the column of the worse answer")
    assert refusal({"chosen": "\n\nHuman: a\n\nAssistant: b"}, adapter="hh").endswith(
        "no column 'rejected' (columns: chosen): set rejected_field to the column of the worse answer"
    )
    assert (
        refusal(SIDES, prompt_field="query")
        == "no column 'query' (columns: chosen, rejected): set prompt_field to the column of the prompt"
    )


def test_a_least_score_ratio_without_scores_is_refused() -> None:
    row = {name: value for name, value in SHP.items() if name not in ("score_A", "score_B")}
    assert pair(row) == PAIR
    assert refusal(row, min_score_ratio=2.0).startswith(
        "min_score_ratio needs a score of each side, such as score_B and score_A (columns: post_id,"
    )


def test_unknown_columns_are_listed_with_what_was_expected() -> None:
    error = refusal({"text": "Once.", "url": "x"})
    assert error.startswith("columns text, url are no preference layout that is known (sharegpt_pair: conversations + chosen")
    assert error.endswith("set adapter, or prompt_field, chosen_field and rejected_field")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Who?"), assistant("Anna.")], "label": True},
        {"prompt": "Who?", "completion": "Anna.", "label": False},
        {"instruction": "Who?", "input": "", "output": "Anna.", "kto_tag": True},
    ],
)
def test_one_answer_with_a_verdict_is_no_pair(row) -> None:
    assert "as for KTO, are no pairs" in refusal(row)


# Real files


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.split("\n") if line]
    return json.loads(text)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("hh-rlhf-harmless-base/test.jsonl.gz", {"pairs": 2312, "prompt_turns": 9204, "prompts_differ": 5, "empty": 4}),
        ("llamafactory-demos/dpo_en_demo.json", {"pairs": 300, "prompt_turns": 906}),
        ("rasbt-ch07/instruction-data-with-preference.json", {"pairs": 1100, "prompt_turns": 1100, "identical": 6}),
        ("torchtune-tiny/stack_exchange_paired_tiny.json", {"pairs": 25, "prompt_turns": 25}),
        ("ultrafeedback-sample/train.jsonl.gz", {"pairs": 1000, "prompt_turns": 1000, "identical": 4, "empty": 2}),
        ("ultrafeedback-sample/train.messages.jsonl.gz", {"pairs": 1000, "prompt_turns": 1000, "identical": 4, "empty": 2}),
        ("ultrafeedback-sample/eval.jsonl.gz", {"pairs": 200, "prompt_turns": 200, "identical": 1}),
        ("ultrafeedback-sample/eval.messages.jsonl.gz", {"pairs": 200, "prompt_turns": 200, "identical": 1}),
    ],
)
def test_real_rows_are_read(name, counts) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    found: Counter[str] = Counter()
    for row in rows_of(SHARED_DATA / "preference" / name):
        read_row = read(row)
        if isinstance(read_row, str):
            found[read_row] += 1
            continue
        sides = (read_row.pair.chosen["content"], read_row.pair.rejected["content"])
        found["pairs"] += 1
        found["prompt_turns"] += len(read_row.pair.prompt)
        found["prompts_differ"] += "prompts_differ" in read_row.doubts
        found["identical"] += sides[0] == sides[1]
        found["empty"] += not all(side.strip() for side in sides)
    assert +found == Counter(counts)


def test_both_forms_of_the_real_ultrafeedback_rows_read_the_same() -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    folder = SHARED_DATA / "preference/ultrafeedback-sample"
    texts, messages = (rows_of(folder / name) for name in ("train.jsonl.gz", "train.messages.jsonl.gz"))
    assert [read(row) for row in texts] == [read(row) for row in messages]
