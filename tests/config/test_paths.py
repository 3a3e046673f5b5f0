"""`~` and environment variables are expanded in every field that names a file or a folder, and in no other."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    PipelineConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    UserError,
)
from modern_llm.config.commands import DPOArguments, ExportArguments, PretrainArguments, SFTArguments, TokenizerArguments
from modern_llm.config.io import dump_yaml, load_config
from modern_llm.config.paths import expanded

VILLAGE = {"dataset_name": "builtin:village"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", "/big/runs")
    monkeypatch.delenv("NO_SUCH", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("kind", "field", "more"),
    [
        (TrainingConfig, "output_dir", {}),
        (TrainingConfig, "dataset_name", {}),
        (TrainingConfig, "tokenizer_name", {}),
        (DPOConfig, "reference_checkpoint", {}),
        (LanguageModelingDatasetConfig, "dataset_name", {}),
        (InstructionDatasetConfig, "dataset_name", {}),
        (PreferenceDatasetConfig, "dataset_name", {}),
        (PipelineConfig, "output_dir", {"start_checkpoint": "x", "sft": {"data": VILLAGE}}),
        (PipelineConfig, "start_checkpoint", {"sft": {"data": VILLAGE}}),
        (PretrainArguments, "tokenizer_name", {}),
        (SFTArguments, "pretrain_checkpoint", {}),
        (DPOArguments, "sft_checkpoint", {}),
        (DPOArguments, "tokenizer_name", {"sft_checkpoint": "x"}),
        (ExportArguments, "output_dir", {}),
        (TokenizerArguments, "output_dir", {"dataset_config": VILLAGE}),
    ],
)
def test_every_path_field_expands_and_an_unset_variable_is_an_error(
    kind: type[BaseModel], field: str, more, home: Path
) -> None:
    for given, expected in (
        ("~/x", f"{home}/x"),
        ("$RUNS/a", "/big/runs/a"),
        ("${RUNS}/a b", "/big/runs/a b"),
        ("~/$RUNS", f"{home}//big/runs"),
        ("somebody/model", "somebody/model"),
        ("data/~x", "data/~x"),
    ):
        value = getattr(kind(**more, **{field: given}), field)
        assert value == type(value)(expected)
    with pytest.raises(ValidationError, match=r"the environment variable \$NO_SUCH is not set"):
        kind(**more, **{field: "$NO_SUCH/x"})
    with pytest.raises(ValidationError, match="no home folder of ~nobody-of-that-name is known"):
        kind(**more, **{field: "~nobody-of-that-name/x"})


def test_sources_of_a_mixture_expand(home: Path) -> None:
    config = InstructionDatasetConfig(dataset_name={"~/a.jsonl": 1.0, "${RUNS}/b.jsonl": {"weight": 0.5}})
    assert list(config.sources()) == [f"{home}/a.jsonl", "/big/runs/b.jsonl"]


def test_a_file_whose_name_holds_a_dollar_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$NO_SUCH.jsonl").touch()
    assert expanded("$NO_SUCH.jsonl") == "$NO_SUCH.jsonl"
    with pytest.raises(UserError, match=r"^dataset_name='\$NO_SUCH/b': the environment variable \$NO_SUCH is not set"):
        expanded("$NO_SUCH/b", "dataset_name")


def test_an_expanded_config_is_written_and_read_as_it_is(home: Path, tmp_path) -> None:
    config = TrainingConfig(output_dir=Path("~/runs"))
    (tmp_path / "train.yaml").write_text(dump_yaml(config))
    assert load_config(TrainingConfig, tmp_path / "train.yaml") == config
    assert config.output_dir == home / "runs"
