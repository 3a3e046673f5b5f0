"""What is doubtful in preference data is counted, and dropped, kept or refused as asked."""

import pytest
from helpers import write_jsonl

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, UserError
from modern_llm.data.preference_datasets import prepare_preferences

HH = "\n\nHuman: {}\n\nAssistant: {}"
ROWS = {
    "identical_answers": [{"prompt": "a", "chosen": "Anna.", "rejected": " Anna.\n"}],
    "empty_answer": [{"prompt": "a", "chosen": "Anna.", "rejected": "  "}],
    "prompts_differ": [{"chosen": HH.format("a", "b"), "rejected": HH.format("other", "c")}],
    "duplicate": [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a ", "chosen": "b", "rejected": "c\n"}],
    "contradiction": [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "c", "rejected": "b"}],
    "scores_disagree": [{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 2}],
    "over_limit": [{"prompt": "a", "chosen": "bread " * 40, "rejected": "cake " * 40}],
}
GOOD = {"prompt": "z", "chosen": "yes", "rejected": "no"}


def prepare(tmp_path, encoder, finding, verdict):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, *ROWS[finding]])
    config = PreferenceDatasetConfig(dataset_name=str(path), lint={finding: verdict})
    return prepare_preferences(config, DPOConfig(max_length=40), encoder)


@pytest.mark.parametrize("finding", ROWS)
def test_a_finding_is_dropped_and_counted(tmp_path, encoder, finding) -> None:
    data = prepare(tmp_path, encoder, finding, "drop")
    assert data.report[f"dropped_because_{finding}"] == 1
    assert [pair.row for pair in data.train] == list(range(len(ROWS[finding])))  # of two equal rows the first stays


@pytest.mark.parametrize("finding", ROWS)
def test_a_finding_is_kept_and_counted(tmp_path, encoder, finding) -> None:
    data = prepare(tmp_path, encoder, finding, "keep")
    assert data.report[f"found_{finding}"] == 1
    assert [pair.row for pair in data.train] == list(range(1 + len(ROWS[finding])))


@pytest.mark.parametrize("finding", ROWS)
def test_a_finding_stops_the_run_and_names_the_row(tmp_path, encoder, finding) -> None:
    with pytest.raises(UserError, match=rf"rows.jsonl, line {1 + len(ROWS[finding])}: {finding.replace('_', ' ')}"):
        prepare(tmp_path, encoder, finding, "fail")


def test_where_prompts_differ_the_chosen_sides_serves_both(tmp_path, encoder) -> None:
    pair = prepare(tmp_path, encoder, "prompts_differ", "keep").train[1]
    texts = [encoder.tokenizer.decode(segment.ids) for segment in pair.segments]
    assert all("user\na<|im_end|>" in text for text in texts)


def test_how_often_the_longer_answer_is_the_chosen_one_is_counted(tmp_path, encoder) -> None:
    rows = [
        {"prompt": "a", "chosen": "long answer here", "rejected": "no"},
        {"prompt": "b", "chosen": "no", "rejected": "long answer here"},
        {"prompt": "c", "chosen": "another long answer", "rejected": "no"},
    ]
    config = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    report = prepare_preferences(config, DPOConfig(), encoder).report
    assert (report["longer_answer_chosen"], report["shorter_answer_chosen"]) == (2, 1)


def test_a_row_that_was_dropped_makes_no_later_one_a_duplicate(tmp_path, encoder) -> None:
    rows = [
        {"chosen": HH.format("a", "b"), "rejected": HH.format("other", "c")},
        {"chosen": HH.format("a", "b"), "rejected": HH.format("a", "c")},
    ]
    config = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)), lint={"duplicate": "drop"})
    assert [pair.row for pair in prepare_preferences(config, DPOConfig(), encoder).train] == [1]


def test_a_contradiction_stays_one_however_often_it_is_said(tmp_path, encoder) -> None:
    one, other = {"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "a", "chosen": "y", "rejected": "x"}
    config = PreferenceDatasetConfig(
        dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", [one, other, other])), lint={"contradiction": "drop"}
    )
    data = prepare_preferences(config, DPOConfig(), encoder)
    assert [pair.row for pair in data.train] == [0]
    assert data.report["dropped_because_contradiction"] == 2


def test_what_a_row_leaves_out_is_in_the_report(tmp_path, encoder) -> None:
    side = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"prompt": "z", "chosen": "<|im_start|>yes", "rejected": "no", "context": "in the mill"},
        {"prompt": "other", "chosen": side, "rejected": [side[0], {"role": "assistant", "content": "c", "mood": "sad"}]},
    ]
    config = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    report = prepare_preferences(config, DPOConfig(), encoder).report
    assert {name: n for name, n in report.items() if name.startswith(("found", "ignored", "dropped"))} == {
        "found_control_tokens_in_text": 1,
        "ignored_context": 1,
        "found_prompt_column_unlike_the_sides": 1,
        "ignored_mood": 1,
    }
    assert report["first_control_tokens_in_text"].endswith("rows.jsonl, line 1")
