"""Data of a Python script as a data set: named by its content, usable wherever a file is, known to its own process alone."""

import datetime
import subprocess
import sys
from typing import Any

import datasets
import numpy as np
import pytest
from pydantic import ValidationError

from modern_llm.config import InstructionDatasetConfig, LanguageModelingDatasetConfig, TrainingConfig, UserError
from modern_llm.config.early import check_settings
from modern_llm.config.io import dump_yaml, load_config
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.readers import BadRows
from modern_llm.data.sources import open_source
from modern_llm.training.inputs import content_of

ROWS = [{"prompt": f"What is {n}?", "completion": f"A number, {n}."} for n in range(5)]
TABLES = {
    "rows": ROWS,
    "Dataset": datasets.Dataset.from_list(ROWS),
    "other order of columns": datasets.Dataset.from_list(ROWS).select_columns(["completion", "prompt"]),
    "other form": datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "DatasetDict": datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
}


def rows_of(config: InstructionDatasetConfig) -> list[dict[str, Any]]:
    ((name, source),) = config.sources().items()
    return [row.values for row in open_source(name, source, "instructions").rows(BadRows(skip=False))]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_equal_content_has_one_name_and_is_read_as_it_was_given(tmp_path, encoder, table) -> None:
    config = InstructionDatasetConfig(dataset_name=table)
    assert config.dataset_name == InstructionDatasetConfig(dataset_name=[dict(row) for row in ROWS]).dataset_name
    assert str(config.dataset_name).startswith("memory:")
    assert rows_of(config) == ROWS
    assert rows_of(InstructionDatasetConfig(dataset_name=table, split="train[1:3]")) == ROWS[1:3]
    assert rows_of(InstructionDatasetConfig(dataset_name=table, max_rows=2)) == ROWS[:2]
    assert len(prepare_instructions(config, encoder).train) == len(ROWS)
    (tmp_path / "a.yaml").write_text(dump_yaml(config))
    again = load_config(InstructionDatasetConfig, tmp_path / "a.yaml")
    assert again == config
    assert content_of(again, "instructions") == content_of(config, "instructions")


def test_other_content_has_another_name_and_key() -> None:
    configs = [InstructionDatasetConfig(dataset_name=rows) for rows in (ROWS, ROWS[1:], ROWS[::-1], [*ROWS[:4], {"a": None}])]
    assert len({config.dataset_name for config in configs}) == 4
    assert len({str(content_of(config, "instructions")) for config in configs}) == 4


def test_what_the_script_does_with_its_rows_later_changes_nothing() -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}]
    config = InstructionDatasetConfig(dataset_name=rows)
    rows[0]["messages"][0]["content"] = "Bye"
    rows.append({"messages": []})
    assert rows_of(config) == [{"messages": [{"role": "user", "content": "Hi"}]}]


def test_the_splits_of_a_dict_are_found_and_named() -> None:
    table = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS[:n]) for name, n in (("train", 3), ("test", 2))})
    config = InstructionDatasetConfig(dataset_name=table, eval_split="test")
    assert rows_of(config) == ROWS[:3]
    ((name, source),) = (config.eval_sources() or {}).items()
    found = list(open_source(name, source, "instructions").rows(BadRows(skip=False)))
    assert [row.place for row in found] == [f"{name}[test] row 0", f"{name}[test] row 1"]
    with pytest.raises(UserError, match=r"^split='dev': memory:.* has \['test', 'train'\]$"):
        rows_of(InstructionDatasetConfig(dataset_name=table, split="dev"))


def test_data_in_memory_mixes_and_holds_out_and_streams(encoder) -> None:
    mixed = InstructionDatasetConfig(dataset_name=[datasets.Dataset.from_list(ROWS), "builtin:village"], max_rows=4)
    assert prepare_instructions(mixed, encoder).report["rows_read"] == 8
    weighted = InstructionDatasetConfig(dataset_name={mixed.dataset_name[0]: 2.0}, eval_dataset=ROWS[:2])
    prepared = prepare_instructions(weighted, encoder)
    assert (len(prepared.train), len(prepared.evaluation)) == (3, 2)
    documents = [{"text": f"Document {n} is here."} for n in range(9)]
    config = LanguageModelingDatasetConfig(dataset_name=documents, streaming=True, shuffle_window=4)
    stream = prepare_documents(config, encoder.encoder, 256, 0).train
    texts = [encoder.tokenizer.decode(s.ids) for e in next(stream.windows(0, 0, 1))[1] for s in e.segments]
    assert any("Document 3" in text for text in texts)


def test_a_training_config_takes_it_too() -> None:
    config = check_settings("sft", TrainingConfig(dataset_name=ROWS), None, InstructionDatasetConfig, 1)
    assert rows_of(config) == ROWS


def test_values_of_arrow_and_numpy_are_kept() -> None:
    row = {"prompt": "a", "day": datetime.date(2024, 1, 2), "raw": b"\xff", "score": np.float32(0.5), "ids": np.arange(2000)}
    (found,) = rows_of(InstructionDatasetConfig(dataset_name=[row]))
    assert found["day"] == row["day"]
    changed = {**row, "ids": np.where(row["ids"] == 1000, 0, row["ids"])}  # where numpy prints dots
    names = {InstructionDatasetConfig(dataset_name=[r]).dataset_name for r in (row, dict(row), changed)}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"a": 1}, 3], "row 1 must be a dict, not int"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "valid string"),
        ([], "names no data set"),
    ],
)
def test_what_cannot_be_named_by_its_content_is_refused(value, message) -> None:
    with pytest.raises(ValidationError, match=message):
        InstructionDatasetConfig(dataset_name=value)


def test_another_process_does_not_have_it() -> None:
    name = InstructionDatasetConfig(dataset_name=ROWS).dataset_name
    code = (
        "from modern_llm.config import InstructionDatasetConfig, UserError\n"
        "from modern_llm.data.sources import open_source\n"
        f"((name, source),) = InstructionDatasetConfig(dataset_name={name!r}).sources().items()\n"
        "try: open_source(name, source, 'instructions')\n"
        "except UserError as error: print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == f"dataset_name={name!r} is data of a Python script, not of this process: save it to a file\n"
