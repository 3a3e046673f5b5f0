"""Pairs: every known layout reads the same, both sides carry the same prompt, no answer is ever empty."""

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import encode_pair, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, UserError
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.messages import Pair
from modern_llm.data.preference_adapters import PairRow, read_pair
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.data.sources import is_held_out
from modern_llm.data.tokenizer import load_tokenizer

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("preferences")


def prepared(
    folder: Path, encoder: ChatEncoder, rows: list[dict[str, Any]], dpo: DPOConfig | None = None, **fields: Any
) -> PreparedData:
    path = write_jsonl(folder / "rows.jsonl", rows)
    return prepare_preferences(PreferenceDatasetConfig(dataset_name=str(path), **fields), dpo or DPOConfig(), encoder)


def read(encoder: ChatEncoder, pair: Example) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer as text; the prompts of both sides are equal."""
    prompts = [segment.ids[~segment.scored].tolist() for segment in pair.segments]
    assert prompts[0] == prompts[1]
    answers = [encoder.tokenizer.decode(segment.ids[segment.scored]) for segment in pair.segments]
    return encoder.tokenizer.decode(prompts[0]), answers[0], answers[1]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# Layouts

ONE_TURN = ("<|im_start|>user\nWho bakes?<|im_end|>\n<|im_start|>assistant\n", "Anna.<|im_end|>", "Nobody.<|im_end|>")


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "Who bakes?", "chosen": "Anna.", "rejected": "Nobody."}, {}),
        ({"question": "Who bakes?", "chosen": "Anna.", "rejected": "Nobody."}, {}),
        ({"instruction": "Who bakes?", "input": "", "output": "x", "rejected": "Nobody.", "chosen": "Anna."}, {}),
        ({"prompt": [user("Who bakes?")], "chosen": [assistant("Anna.")], "rejected": [assistant("Nobody.")]}, {}),
        (
            {
                "prompt": "Who bakes?",
                "chosen": [user("Who bakes?"), assistant("Anna.")],
                "rejected": [user("Who bakes?"), assistant("Nobody.")],
                "score_chosen": 8.5,
            },
            {},
        ),
        ({"chosen": [user("Who bakes?"), assistant("Anna.")], "rejected": [user("Who bakes?"), assistant("Nobody.")]}, {}),
        (
            {
                "chosen": "\n\nHuman: Who bakes?\n\nAssistant: Anna.",
                "rejected": "\n\nHuman: Who bakes?\n\nAssistant: Nobody.",
            },
            {},
        ),
        (
            {"question": "Who bakes?", "response_j": "Anna.", "response_k": "Nobody."},
            {"chosen_field": "response_j", "rejected_field": "response_k"},
        ),
        ({"prompt": "x", "ask": "Who bakes?", "chosen": "Anna.", "rejected": "Nobody."}, {"prompt_field": "ask"}),
    ],
    ids=["strings", "question", "rasbt", "messages", "ultrafeedback", "shared turns", "hh", "stack exchange", "own column"],
)
def test_every_layout_becomes_the_same_pair(folder, encoder, row, fields) -> None:
    (pair,) = prepared(folder, encoder, [row], **fields).train
    assert read(encoder, pair) == ONE_TURN


def test_an_hh_dialogue_of_many_turns_keeps_its_history_in_the_prompt(folder, encoder) -> None:
    history = "\n\nHuman: Who bakes?\n\nAssistant: Anna.\n\nHuman: Does she\n\nsing?\n\nAssistant:"
    (pair,) = prepared(folder, encoder, [{"chosen": f"{history} Yes.", "rejected": f"{history} No.\n\nNever."}]).train
    prompt, chosen, rejected = read(encoder, pair)
    assert prompt == (
        "<|im_start|>user\nWho bakes?<|im_end|>\n<|im_start|>assistant\nAnna.<|im_end|>\n"
        "<|im_start|>user\nDoes she\n\nsing?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (chosen, rejected) == ("Yes.<|im_end|>", "No.\n\nNever.<|im_end|>")


def test_a_prompt_of_messages_keeps_its_system_turn_and_history(folder, encoder) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, user("Who bakes?"), assistant("Anna."), user("Who sings?")]
    (pair,) = prepared(folder, encoder, [{"prompt": prompt, "chosen": "Bob.", "rejected": "No."}]).train
    assert read(encoder, pair)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho bakes?")
    assert all(segment.ids[segment.scored].tolist().count(encoder.end_token_id) == 1 for segment in pair.segments)


def test_rows_that_are_no_pair_are_dropped_and_counted_by_reason(folder, encoder) -> None:
    def hh(question: str, answer: str) -> str:
        return f"\n\nHuman: {question}\n\nAssistant: {answer}"

    rows = [
        {"chosen": hh("Who?", "Anna."), "rejected": hh("Who bakes?", "Nobody.")},
        {"chosen": hh("Who?", "Anna."), "rejected": hh("Who?", "")},
        {"chosen": hh("Who?", "Anna."), "rejected": hh("Who?", " Anna.\n")},
        {"chosen": hh("Who?", "Anna.") + "\n\nHuman: So?", "rejected": hh("Who?", "Anna.") + "\n\nHuman: No?"},
        {"chosen": hh("Who?", "Anna."), "rejected": hh("Who?", "Nobody.")},
    ]
    data = prepared(folder, encoder, rows)
    assert [pair.row for pair in data.train] == [4]
    reasons = ("prompts_differ", "empty_answer", "identical_answers", "turns_out_of_order")
    assert [data.report[f"dropped_because_{reason}"] for reason in reasons] == [1, 1, 1, 1]
    assert (data.report["rows_read"], data.report["examples"]) == (5, 1)


# Limits (trap 20)


@PROPERTY
@given(
    words=st.tuples(*[st.text("abcdefgh ", min_size=1, max_size=size) for size in (60, 40, 40)]),
    max_length=st.integers(2, 90),
    prompt_share=st.none() | st.floats(0, 1),
    answer_share=st.none() | st.floats(0, 1),
)
@example(words=("a" * 60, "b", "c"), max_length=2, prompt_share=None, answer_share=None)
@example(words=("a", "b" * 40, "c"), max_length=2, prompt_share=0.0, answer_share=0.0)
def test_cutting_keeps_one_prompt_and_two_answers_within_every_limit(
    encoder, words, max_length, prompt_share, answer_share
) -> None:
    def limit(share: float | None) -> int | None:
        return None if share is None else 1 + int(share * (max_length - 2))

    most_prompt, most_answer = limit(prompt_share), limit(answer_share)
    dpo = DPOConfig(max_length=max_length, max_prompt_length=most_prompt, max_completion_length=most_answer)
    pair = Pair([user(words[0])], assistant(words[1]), assistant(words[2]))
    prompt, chosen = encoder.prompt_and_answer(pair.prompt, words[1])
    _, rejected = encoder.prompt_and_answer(pair.prompt, words[2])
    sides = encode_pair(pair, dpo, encoder)
    kept_prompts = [side.ids[~side.scored].tolist() for side in sides]
    assert kept_prompts[0] == kept_prompts[1]
    kept_prompt = kept_prompts[0]
    assert kept_prompt == prompt[-len(kept_prompt) :]  # a prompt loses its beginning
    assert 1 <= len(kept_prompt) <= (most_prompt or max_length)
    for side, answer in zip(sides, (chosen, rejected), strict=True):
        kept = side.ids[side.scored].tolist()
        assert side.scored.tolist() == [False] * len(kept_prompt) + [True] * len(kept)
        assert kept == answer[: len(kept)]  # an answer loses its end, and with it the end token
        assert 1 <= len(kept) <= (most_answer or max_length)
        assert len(side) <= max_length
        if len(kept) < len(answer) and len(kept) != most_answer:
            assert len(side) == max_length  # nothing is cut that would have fitted
            assert len(kept_prompt) <= max_length // 2  # the prompt gives way first, down to a half
    if len(kept_prompt) < len(prompt) and len(kept_prompt) != most_prompt:
        assert max(len(side) for side in sides) == max_length
        assert len(kept_prompt) >= max_length // 2


def test_a_pair_that_fits_is_not_cut(folder, encoder) -> None:
    row = {"prompt": "Who bakes?", "chosen": "Anna.", "rejected": "Nobody at all."}
    (pair,) = prepared(folder, encoder, [row]).train
    longest = max(len(segment) for segment in pair.segments)
    exact = prepared(folder, encoder, [row], DPOConfig(max_length=longest))
    assert "cut_end" not in exact.report
    assert exact.fingerprint() == prepared(folder, encoder, [row]).fingerprint()
    assert prepared(folder, encoder, [row], DPOConfig(max_length=longest - 1)).fingerprint() != exact.fingerprint()


def test_cut_answers_are_counted_and_end_without_an_end_token(folder, encoder) -> None:
    rows = [
        {"prompt": "Who?", "chosen": "Anna bakes it all.", "rejected": "Nobody bakes it, ever."},
        {"prompt": "Who?", "chosen": "A.", "rejected": "B."},
        {"prompt": "Who?", "chosen": "A.", "rejected": "Bob bakes at night."},
    ]
    data = prepared(folder, encoder, rows, DPOConfig(max_completion_length=5))
    assert data.report["cut_end"] == 2
    assert data.report["end_token_share"] == 0.3333
    ends = [encoder.end_token_id in segment.ids[segment.scored] for pair in data.train for segment in pair.segments]
    assert ends == [False, False, True, True, True, False]


def test_answers_that_differ_only_behind_the_cut_are_dropped_and_counted(folder, encoder) -> None:
    """Both sides would be the same tokens: nothing to prefer."""
    rows = [
        {"prompt": "Who?", "chosen": "Anna bakes all the bread.", "rejected": "Anna bakes all the cake."},
        {"prompt": "Who?", "chosen": "A.", "rejected": "B."},
    ]
    data = prepared(folder, encoder, rows, DPOConfig(max_completion_length=5))
    assert [pair.row for pair in data.train] == [1]
    assert sum(count for name, count in data.report.items() if name.startswith("dropped_because")) == 1


# Holding out (trap 36)


@PROPERTY
@given(questions=st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=12), fraction=st.floats(0.05, 0.9))
def test_no_prompt_is_on_both_sides(folder, encoder, questions, fraction) -> None:
    rows = [
        {"prompt": question + " " * (n % 2), "chosen": f"yes {n}", "rejected": f"no {n}"}
        for n, question in enumerate(questions)
    ]
    path = write_jsonl(folder / "split.jsonl", rows)
    config = PreferenceDatasetConfig(dataset_name=str(path), eval_fraction=fraction)
    keys = {q: Pair([user(q)], assistant("a"), assistant("b")).prompt_key for q in questions}
    held_out = {question for question, key in keys.items() if is_held_out(key, config)}
    try:
        data = prepare_preferences(config, DPOConfig(), encoder)
    except UserError:
        assert held_out == set(questions)
        return
    trained_on = {questions[pair.row] for pair in data.train}
    assert not trained_on & held_out
    assert trained_on | held_out == set(questions)
    assert {questions[pair.row] for pair in data.evaluation} == held_out


def test_the_same_question_in_another_layout_is_held_out_too(folder, encoder) -> None:
    """What decides is the prompt, not how the row spells it."""
    path = write_jsonl(
        folder / "layouts.jsonl",
        [
            {"chosen": f"\n\nHuman: {q}?\n\nAssistant: Yes.", "rejected": f"\n\nHuman: {q}?\n\nAssistant: No."}
            if hh
            else {"chosen": [user(f"{q}?"), assistant("Yes.")], "rejected": [user(f"{q}?"), assistant("No.")]}
            for q in "abcdefghij"
            for hh in (True, False)
        ],
    )
    config = PreferenceDatasetConfig(dataset_name=str(path), eval_fraction=0.5)
    data = prepare_preferences(config, DPOConfig(), encoder)
    assert 0 < len(data.evaluation) < 20
    assert len({pair.row // 2 for pair in data.evaluation}) * 2 == len(data.evaluation)


def test_a_prompt_of_the_eval_split_is_not_trained_on(tmp_path, encoder) -> None:
    from datasets import Dataset, DatasetDict

    parts = {"train": "abc", "test": "cd"}
    rows = {name: [{"prompt": q, "chosen": f"{name} {q}", "rejected": "No."} for q in qs] for name, qs in parts.items()}
    DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()}).save_to_disk(tmp_path)
    config = PreferenceDatasetConfig(dataset_name=str(tmp_path), eval_split="test")
    data = prepare_preferences(config, DPOConfig(), encoder)
    assert [rows["train"][pair.row]["prompt"] for pair in data.train] == ["a", "b"]
    assert [rows["test"][pair.row]["prompt"] for pair in data.evaluation] == ["c", "d"]
    assert data.report["dropped_because_held_out_too"] == 1
    assert data.report["eval_examples"] == 2


# Real files


def test_real_dialogues_of_hh_rlhf_go_through(shared_data, encoder) -> None:
    """Against a reading of our own: split at the last `Assistant:` and compare. 2,312 rows give 2,303 pairs."""
    path = shared_data / "preference/hh-rlhf-harmless-base/test.jsonl.gz"
    config = PreferenceDatasetConfig(dataset_name=str(path))
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = []
    for row in rows:
        (prompt, chosen), (other, rejected) = (row[side].rsplit("\n\nAssistant:", 1) for side in ("chosen", "rejected"))
        found = read_pair(row, config)
        assert isinstance(found, PairRow)
        assert ("prompts_differ" in found.doubts) == (prompt.strip() != other.strip())
        assert (found.pair.chosen, found.pair.rejected) == (assistant(chosen.strip()), assistant(rejected.strip()))
        speakers = re.findall(r"\n\n(Human|Assistant):", prompt)
        assert len(found.pair.prompt) == sum(1 for _ in itertools.groupby(speakers))  # turns of one speaker in a row are one
        pairs.append(found.pair)
    assert len(pairs) == 2312
    data = prepare_preferences(config.model_copy(update={"max_rows": 100}), DPOConfig(max_length=4096), encoder)
    for encoded in data.train:
        pair = pairs[encoded.row]
        assert read(encoder, encoded)[1:] == tuple(f"{side['content']}<|im_end|>" for side in (pair.chosen, pair.rejected))
    assert "cut_end" not in data.report


def test_real_instructions_with_two_answers_go_through(shared_data, encoder) -> None:
    """rasbt's {instruction, input, output, rejected, chosen}: 1,100 rows, 6 of them with chosen == rejected."""
    path = shared_data / "preference/rasbt-ch07/instruction-data-with-preference.json"
    config = PreferenceDatasetConfig(dataset_name=str(path), eval_fraction=0.1)
    data = prepare_preferences(config, DPOConfig(), encoder)
    assert data.report["rows_read"] == 1100
    rows = json.loads(path.read_text(encoding="utf-8"))
    kept = {pair.row for pair in [*data.train, *data.evaluation]}
    assert {i for i in range(1100) if i not in kept} == {i for i, row in enumerate(rows) if row["chosen"] == row["rejected"]}
    assert len(kept) == 1094
    for pair in list(data.train)[::100]:
        row = rows[pair.row]
        prompt, chosen, rejected = read(encoder, pair)
        assert row["instruction"] in prompt
        assert row["input"] in prompt
        assert (chosen, rejected) == (f"{row['chosen']}<|im_end|>", f"{row['rejected']}<|im_end|>")


def test_a_pair_may_prefer_a_call_to_words_and_its_prompt_shows_the_tools(folder, shared_data) -> None:
    tools = [{"name": "find_baker", "description": "Who bakes.", "parameters": {"type": "object", "properties": {}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "find_baker", "arguments": {"street": "Mill Lane"}}]}
    row = {"prompt": "Who bakes?", "chosen": [call], "rejected": "No idea.", "tools": tools}
    encoder = ChatEncoder(load_tokenizer(shared_data / "tokenizers/minimind-6400"))
    data = prepared(folder, encoder, [row])
    chosen, rejected = (segment for segment in data.train[0].segments)
    assert "Who bakes." in encoder.tokenizer.decode(chosen.ids[~chosen.scored])
    assert chosen.ids[~chosen.scored].tolist() == rejected.ids[~rejected.scored].tolist()
    taught = [encoder.tokenizer.decode(side.ids[side.scored]) for side in (chosen, rejected)]
    assert '"find_baker"' in taught[0]
    assert "Mill Lane" in taught[0]
    assert "No idea." in taught[1]


def test_held_out_pairs_of_a_source_are_read_by_its_own_columns_and_roles(folder, encoder) -> None:
    rows = [
        {"asked": [{"role": "guest", "content": f"Who bakes {n}?"}], "good": "Anna.", "bad": "Nobody.", "chosen": "x"}
        for n in range(8)
    ]
    columns = {"prompt": "asked", "chosen": "good", "rejected": "bad"}
    path = write_jsonl(folder / "own.jsonl", rows)
    config = PreferenceDatasetConfig(
        dataset_name={str(path): {"columns": columns, "roles": {"guest": "user"}}}, eval_fraction=0.5
    )
    held_out = prepare_preferences(config, DPOConfig(), encoder).evaluation
    assert 0 < len(held_out) < 8
    for pair in held_out:
        prompt, chosen, rejected = read(encoder, pair)
        assert f"user\nWho bakes {pair.row}?<|im_end|>" in prompt
        assert (chosen, rejected) == ("Anna.<|im_end|>", "Nobody.<|im_end|>")
