"""Another data set as the evaluation set: all of it is held out, its prompts are not trained on, its name does not count."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import write_jsonl
from pydantic import ValidationError

from modern_llm.config import DPOConfig, InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import held_out_rows, prepare_instructions
from modern_llm.data.lm_datasets import held_out_blocks, prepare_documents, training_texts
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import PreparedData
from modern_llm.training.inputs import content_of, deciding

KINDS = {
    "text": LanguageModelingDatasetConfig,
    "instructions": InstructionDatasetConfig,
    "preferences": PreferenceDatasetConfig,
}


def row(kind: str, n: int) -> dict[str, str]:
    if kind == "text":
        return {"text": f"w{n}q and more"}
    answers = {"completion": "yes"} if kind == "instructions" else {"chosen": "yes", "rejected": "no"}
    return {"prompt": f"w{n}q", **answers}


def prepare(config: Any, encoder: ChatEncoder) -> PreparedData:
    if isinstance(config, LanguageModelingDatasetConfig):
        return prepare_documents(config, encoder.encoder, 32, 0)
    if isinstance(config, InstructionDatasetConfig):
        return prepare_instructions(config, encoder)
    return prepare_preferences(config, DPOConfig(), encoder)


def words(examples: Any, encoder: ChatEncoder) -> set[int]:
    """The numbers of the rows that examples show."""
    text = " ".join(encoder.tokenizer.decode(segment.ids) for example in examples for segment in example.segments)
    return {n for n in range(100) if f"w{n}q" in text}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path, kind) -> Path:
    write_jsonl(tmp_path / "a.jsonl", [row(kind, n) for n in range(6)])
    write_jsonl(tmp_path / "b.jsonl", [row(kind, n) for n in range(3, 9)])
    (tmp_path / "held").mkdir()
    write_jsonl(tmp_path / "held" / "test.jsonl", [row(kind, n) for n in (4, 20, 21)])
    write_jsonl(tmp_path / "held" / "train.jsonl", [row(kind, 30)])
    return tmp_path


@pytest.mark.parametrize("names", [["a.jsonl"], ["a.jsonl", "b.jsonl"]], ids=["one source", "two sources"])
@pytest.mark.parametrize("given", ["held/test.jsonl", {"held": {"split": "test"}}], ids=["file", "split"])
def test_all_of_it_is_held_out_and_none_of_its_prompts_is_trained_on(folder, kind, encoder, names, given, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    config = KINDS[kind](dataset_name=names, eval_dataset=given)
    data = prepare(config, encoder)
    trained = {0, 1, 2, 3, 5} if len(names) == 1 else {0, 1, 2, 3, 5, 6, 7, 8}
    assert words([data.train[i] for i in range(len(data.train))], encoder) == trained  # type: ignore[arg-type]
    assert words(data.evaluation, encoder) == {4, 20, 21}
    assert data.report["dropped_because_held_out_too"] == len(names)
    assert data.report["eval_rows_read"] == 3
    assert data.report.get("eval_files_of_other_splits") == (None if isinstance(given, str) else 1)
    if kind == "text":
        assert words(held_out_blocks(config, encoder.encoder, 32), encoder) == {4, 20, 21}
        assert {int(text.split("q")[0][1:]) for text in training_texts(config)} == trained
    elif kind == "instructions":
        assert held_out_rows(config, encoder) == [row(kind, n) for n in (4, 20, 21)]


def test_its_rows_count_and_its_name_does_not(folder, kind) -> None:
    def inputs(path: Path) -> str:
        config = KINDS[kind](dataset_name=str(folder / "a.jsonl"), eval_dataset=str(path))
        return json.dumps([deciding(config), content_of(config, kind)], sort_keys=True)  # type: ignore[arg-type]

    first = inputs(folder / "b.jsonl")
    shutil.copy(folder / "b.jsonl", folder / "c.jsonl")
    assert inputs(folder / "c.jsonl") == first
    write_jsonl(folder / "c.jsonl", [row(kind, 50)])
    assert inputs(folder / "c.jsonl") != first
    assert json.dumps(content_of(KINDS[kind](dataset_name=str(folder / "a.jsonl")), kind)) not in first  # type: ignore[arg-type]


def test_a_stream_holds_it_out(tmp_path, encoder) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row("text", n) for n in range(6)])
    write_jsonl(tmp_path / "b.jsonl", [row("text", n) for n in (4, 20)])
    config = LanguageModelingDatasetConfig(
        dataset_name=str(tmp_path / "a.jsonl"), eval_dataset=str(tmp_path / "b.jsonl"), streaming=True
    )
    data = prepare(config, encoder)
    assert words(next(data.train.windows(0, 0, 1))[1], encoder) == {0, 1, 2, 3, 5}  # type: ignore[union-attr]
    assert words(data.evaluation, encoder) == {4, 20}


def test_its_settings_are_its_own_and_a_text_column_is_shared(tmp_path, encoder) -> None:
    (tmp_path / "a.csv").write_text("story|n,1\nw1q|2\nw2q|3\n")
    write_jsonl(tmp_path / "b.jsonl", [{"story": f"w{n}q"} for n in (3, 4, 5)])
    config = LanguageModelingDatasetConfig(
        dataset_name=str(tmp_path / "a.csv"), eval_dataset={str(tmp_path / "b.jsonl"): {"split": "train[1:]"}},
        text_field="story", delimiter="|", split="train[:1]", max_rows=1,
    )  # fmt: skip
    data = prepare(config, encoder)
    assert words([data.train[0]], encoder) == {1}  # type: ignore[index]
    assert words(data.evaluation, encoder) == {4, 5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_split": "test"}, "eval_split and eval_dataset"),
        ({"eval_fraction": 0.1}, "eval_dataset and eval_fraction"),
        ({"eval_dataset": {"b.jsonl": {"weight": 2}}}, "a weight has no effect there"),
        ({"eval_dataset": {"b.jsonl": {}, "c.jsonl": {}}}, "eval_dataset is one data set"),
        ({"eval_dataset": {"b.jsonl": {"text_field": "a"}}}, "text_field is for documents"),
    ],
)
def test_what_contradicts_it_is_refused(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        InstructionDatasetConfig.model_validate({"dataset_name": "a.jsonl", "eval_dataset": "b.jsonl", **fields})
