"""Demonstrations: every known layout reads the same, only answers count, cuts and drops are counted."""

from pathlib import Path
from typing import Any

import pytest
from helpers import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.config import InstructionDatasetConfig, UserError
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import held_out_rows, prepare_instructions
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.layout import num_scored

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("instructions")


def prepared(folder: Path, encoder: ChatEncoder, rows: list[dict[str, Any]], **fields: Any) -> PreparedData:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return prepare_instructions(InstructionDatasetConfig(dataset_name=str(path), **fields), encoder)


def read(encoder: ChatEncoder, example: Example, scored: bool | None = None) -> str:
    """The text of a sample, or of the part that counts (or doesn't)."""
    (segment,) = example.segments
    ids = segment.ids if scored is None else segment.ids[segment.scored == scored]
    return encoder.tokenizer.decode(ids)


def chat(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(words)]


# Layouts


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": chat("Who bakes?", "Anna.")}, {}),
        ({"prompt": "Who bakes?", "completion": "Anna."}, {}),
        ({"prompt": "Who bakes?", "response": "Anna."}, {}),
        ({"instruction": "Who bakes?", "output": "Anna."}, {}),
        ({"instruction": "Who bakes?", "input": "", "output": "Anna."}, {}),
        ({"instruction": "Who bakes?", "input": None, "response": "Anna.", "id": 3}, {}),
        ({"question": "Who bakes?", "answer": "Anna."}, {}),
        ({"title": "Who bakes?", "body": "Anna."}, {"prompt_field": "title", "response_field": "body"}),
        ({"messages": [], "title": "Who bakes?", "response": "Anna."}, {"prompt_field": "title", "response_field": "response"}),
    ],
)
def test_every_layout_becomes_the_same_chat(folder, encoder, row, fields) -> None:
    (example,) = prepared(folder, encoder, [row], **fields).train
    assert read(encoder, example) == "<|im_start|>user\nWho bakes?<|im_end|>\n<|im_start|>assistant\nAnna.<|im_end|>"
    assert read(encoder, example, scored=True) == "Anna.<|im_end|>"


def test_an_input_stands_below_its_instruction(folder, encoder) -> None:
    (example,) = prepared(folder, encoder, [{"instruction": "Add.", "input": "1, 2", "output": "3"}]).train
    assert "user\nAdd.\n\n1, 2<|im_end|>" in read(encoder, example, scored=False)


def test_in_a_chat_of_many_turns_every_answer_counts_and_nothing_else(folder, encoder) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat("Who bakes?", "Anna.", "Who sings?", "Bob.")]
    (example,) = prepared(folder, encoder, [{"messages": messages}]).train
    assert read(encoder, example, scored=True) == "Anna.<|im_end|>Bob.<|im_end|>"


def test_a_chat_that_ends_with_a_question_is_cut_back_to_its_last_answer(folder, encoder) -> None:
    (example,) = prepared(folder, encoder, [{"messages": chat("Who bakes?", "Anna.", "Who sings?")}]).train
    assert read(encoder, example).endswith("Anna.<|im_end|>")


# Cuts and drops (traps 16, 18)


def test_a_cut_sample_learns_no_false_end_and_is_counted(folder, encoder) -> None:
    row = {"prompt": "Who?", "completion": "Anna bakes all the bread of the village."}
    (whole,) = prepared(folder, encoder, [row]).train
    length = len(whole.segments[0])
    fitting = prepared(folder, encoder, [row], max_length=length)
    assert "cut_end" not in fitting.report
    assert fitting.fingerprint() == prepared(folder, encoder, [row]).fingerprint()
    for max_length in (length - 1, length - 5):
        data = prepared(folder, encoder, [row], max_length=max_length)
        (cut,) = data.train
        assert cut.segments[0].ids.tolist() == whole.segments[0].ids[:max_length].tolist()
        assert encoder.end_token_id not in cut.segments[0].ids[cut.segments[0].scored]
        assert data.report["cut_end"] == 1


def test_rows_without_an_answer_to_learn_from_are_dropped_and_counted_by_reason(folder, encoder) -> None:
    rows = [
        {"messages": chat("Who bakes?")},
        {"messages": chat("Who bakes?", " \n")},
        {"messages": []},
        {"messages": chat("Who bakes all the bread of this village? " * 3, "Anna.")},
        {"messages": chat("Who?", "Anna.")},
    ]
    data = prepared(folder, encoder, rows, max_length=32)
    assert [example.row for example in data.train] == [4]
    assert data.report["rows_read"] == 5
    assert data.report["dropped_because_no_answer"] == 2
    assert data.report["dropped_because_no_question"] == 1
    assert data.report["dropped_because_prompt_fills_max_length"] == 1
    assert data.report["examples"] == 1


def test_text_that_was_rendered_already_is_counted_with_the_place_of_the_first_row(folder, encoder) -> None:
    rendered = {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "completion": "yo<|im_end|>"}
    data = prepared(folder, encoder, [{"prompt": "hi", "completion": "yo"}, rendered, rendered])
    assert data.report["found_control_tokens_in_text"] == 2
    assert data.report["first_control_tokens_in_text"].endswith("rows.jsonl, line 2")
    again = prepared(folder, encoder, [{"prompt": "hi", "completion": "yo"}, rendered, rendered])  # from the cache
    assert again.report == data.report


def test_what_a_row_leaves_out_is_in_the_report(folder, encoder) -> None:
    greeting = [{"role": "assistant", "content": "Hello!"}, *chat("q", "a", "bye")]
    rows = [{"messages": greeting, "label": False}, {"messages": chat("q", "", "q", "a"), "label": True}]
    rows += [{"messages": [*chat("q"), {"role": "assistant", "content": "a", "train": False}]}]
    report = prepared(folder, encoder, rows).report
    assert {name: n for name, n in report.items() if name.startswith(("found", "ignored", "dropped"))} == {
        "ignored_label": 2,
        "found_answer_before_the_first_question": 1,
        "found_question_at_the_end": 1,
        "found_empty_answer": 1,
        "dropped_because_no_turn_counts": 1,
    }


def test_flat_messages_whose_first_has_no_parent_are_put_together(folder, encoder) -> None:
    rows = [
        {"message_id": "q", "parent_id": None, "text": "Who bakes?", "role": "prompter", "rank": None},
        {"message_id": "a", "parent_id": "q", "text": "Anna.", "role": "bot", "rank": 0},
    ]
    (example,) = prepared(folder, encoder, rows, roles={"bot": "assistant"}).train
    assert read(encoder, example, scored=True) == "Anna.<|im_end|>"


def test_each_source_has_a_layout_columns_and_roles_of_its_own(folder, encoder) -> None:
    plain = write_jsonl(folder / "plain.jsonl", [{"prompt": "Who?", "completion": "Anna.", "instruction": "x", "output": "y"}])
    dialog = [{"who": "q", "role": "human", "content": "Why?"}, {"role": "bot", "content": "So."}]
    other = write_jsonl(folder / "other.jsonl", [{"dialog": dialog}])
    config = InstructionDatasetConfig(
        dataset_name={
            str(plain): {"adapter": "prompt_completion"},
            str(other): {"columns": {"messages": "dialog"}, "roles": {"human": "user", "bot": "assistant"}},
        }
    )
    data = prepare_instructions(config, encoder)
    assert [read(encoder, example, scored=True) for example in data.train] == ["Anna.<|im_end|>", "So.<|im_end|>"]
    assert data.report["ignored_who"] == 1
    other_layout = prepare_instructions(InstructionDatasetConfig(dataset_name=str(plain)), encoder)  # no cache of the other
    assert [read(encoder, example, scored=True) for example in other_layout.train] == ["y<|im_end|>"]


def test_held_out_rows_of_a_source_are_read_by_its_own_columns(folder, encoder) -> None:
    path = write_jsonl(folder / "own.jsonl", [{"dialog": chat("q", "a"), "messages": "two"}])
    config = InstructionDatasetConfig(dataset_name={str(path): {"columns": {"messages": "dialog"}}}, eval_fraction=0.999999)
    assert [row["dialog"] for row in held_out_rows(config, encoder)] == [chat("q", "a")]


def test_which_answers_count_is_part_of_the_cache_key(folder, encoder, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(ChatEncoder, "plan", lambda self, chat, plan=ChatEncoder.plan: seen.append(chat) or plan(self, chat))
    rows = [{"messages": chat("key?", "a", "b?", "c")}]
    for train_on in ("all", "last", "all"):
        prepared(folder, encoder, rows, train_on=train_on)
    assert [[m.get("train") for m in found.messages] for found in seen] == [[None] * 4, [None, False, None, None]]


def test_a_dropped_row_is_not_counted_as_cut(folder, encoder) -> None:
    """The report adds up: every row is an example or dropped for one reason, and a cut row is an example."""
    rows = [{"messages": chat("Who bakes all the bread of this village? " * 3, "Anna.")}, {"messages": chat("Who?", "Anna.")}]
    data = prepared(folder, encoder, rows, max_length=32)
    assert data.report["dropped_because_prompt_fills_max_length"] == 1
    assert "cut_end" not in data.report


def test_nothing_left_to_train_on_is_refused_with_the_counts(folder, encoder) -> None:
    with pytest.raises(UserError, match=r"no example is left to train on \(rows_read=1, dropped_because_no_answer=1"):
        prepared(folder, encoder, [{"messages": chat("Who bakes?")}])


@PROPERTY
@given(
    words=st.lists(st.text("ab \n<|im_end>", max_size=12), min_size=2, max_size=6),
    max_length=st.integers(1, 80),
)
def test_whatever_the_length_the_report_adds_up_and_every_example_has_something_to_learn(
    folder, encoder, words, max_length
) -> None:
    rows = [{"messages": chat(*words)}, {"messages": chat("a", "b")}]
    try:
        data = prepared(folder, encoder, rows, max_length=max_length)
    except UserError:  # nothing is left, not even of the second row
        assert max_length <= len(encoder.prompt(chat("a")))
        return
    dropped = sum(count for name, count in data.report.items() if name.startswith("dropped_because"))
    assert data.report["examples"] + dropped == data.report["rows_read"] == 2
    for example in data.train:
        (segment,) = example.segments
        assert len(segment) <= max_length
        assert num_scored(segment) > 0
    assert data.report["tokens"] == sum(len(example.segments[0]) for example in data.train)
    assert data.report["scored_tokens"] == sum(num_scored(example.segments[0]) for example in data.train)


# Holding out (trap 36)


@PROPERTY
@given(questions=st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=12), fraction=st.floats(0.05, 0.9))
def test_no_question_is_on_both_sides_whatever_follows_it(folder, encoder, questions, fraction) -> None:
    rows = [
        {"messages": chat(question + " " * (n % 2), f"answer {n}", *(["more", "yes"] if n % 3 else []))}
        for n, question in enumerate(questions)
    ]
    path = write_jsonl(folder / "split.jsonl", rows)
    config = InstructionDatasetConfig(dataset_name=str(path), eval_fraction=fraction)
    held_out = {row["messages"][0]["content"].strip() for row in held_out_rows(config, encoder)}
    try:
        data = prepare_instructions(config, encoder)
    except UserError:
        assert held_out == set(questions)
        return
    trained_on = {questions[example.row] for example in data.train}
    assert not trained_on & held_out
    assert trained_on | held_out == set(questions)
    assert {questions[example.row] for example in data.evaluation} == held_out
    assert len(data.train) + len(data.evaluation) == len(rows) == data.report["rows_read"]


def test_a_question_of_the_eval_split_is_not_trained_on(tmp_path, encoder) -> None:
    from datasets import Dataset, DatasetDict

    parts = {"train": "abc", "test": "cd"}
    rows = {name: [{"question": q, "answer": f"{name} {q}"} for q in questions] for name, questions in parts.items()}
    DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()}).save_to_disk(tmp_path)
    config = InstructionDatasetConfig(dataset_name=str(tmp_path), eval_split="test")
    data = prepare_instructions(config, encoder)
    assert [rows["train"][example.row]["question"] for example in data.train] == ["a", "b"]
    assert [rows["test"][example.row]["question"] for example in data.evaluation] == ["c", "d"]
    assert data.report["dropped_because_held_out_too"] == 1
    assert data.report["eval_examples"] == 2


# Real files


def test_real_instructions_with_inputs_go_through(shared_data, encoder) -> None:
    """GPTeacher's role play: {instruction, input, response}. Counted with `json` alone: 1,923 rows, no empty response."""
    path = shared_data / "instruction/gpteacher/roleplay-simple-deduped-roleplay-instruct.json.gz"
    data = prepare_instructions(InstructionDatasetConfig(dataset_name=str(path), max_length=4096), encoder)
    assert data.report["rows_read"] == data.report["examples"] == 1923
    assert "cut_end" not in data.report
    ends = [example.segments[0].ids[example.segments[0].scored].tolist().count(encoder.end_token_id) for example in data.train]
    assert set(ends) == {1}


def test_real_questions_and_answers_go_through(shared_data, encoder) -> None:
    """GSM8K: {question, answer}; `zcat train.jsonl.gz | wc -l` gives 7473."""
    path = shared_data / "instruction/gsm8k-train/train.jsonl.gz"
    config = InstructionDatasetConfig(dataset_name=str(path), max_rows=500, eval_fraction=0.1)
    data = prepare_instructions(config, encoder)
    assert data.report["rows_read"] == len(data.train) + len(data.evaluation) == 500
    assert 25 < len(data.evaluation) < 75
