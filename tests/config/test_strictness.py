"""Configs say no at once: unknown names, wrong kinds, values that contradict each other; and they never change."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ModelConfig,
    PipelineConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    UserError,
)
from modern_llm.config.base import explain
from modern_llm.config.io import json_schema
from modern_llm.config.pipeline import DPOStageConfig, EvaluationConfig, PretrainStageConfig, SFTStageConfig

SMALLEST = {
    ModelConfig: {},
    TrainingConfig: {},
    DPOConfig: {},
    EvaluationConfig: {},
    LanguageModelingDatasetConfig: {"dataset_name": "a.txt"},
    InstructionDatasetConfig: {"dataset_name": "a.jsonl"},
    PreferenceDatasetConfig: {"dataset_name": "a.jsonl"},
    PretrainStageConfig: {"data": {"dataset_name": "a.txt"}},
    SFTStageConfig: {"data": {"dataset_name": "a.jsonl"}},
    DPOStageConfig: {"data": {"dataset_name": "a.jsonl"}},
    PipelineConfig: {"pretrain": {"data": {"dataset_name": "a.txt"}}},
}
KINDS = pytest.mark.parametrize("kind", SMALLEST, ids=lambda kind: kind.__name__)


def only_error(refused: pytest.ExceptionInfo[ValidationError]) -> str:
    """The one line that a user reads."""
    assert refused.value.error_count() == 1
    line = explain(refused.value)
    assert "\n" not in line
    return line


@KINDS
def test_an_unknown_field_is_one_error_that_names_the_nearest(kind) -> None:
    real = next(iter(kind.model_fields))
    typo = real[:-1] + "_x"
    with pytest.raises(ValidationError) as refused:
        kind(**SMALLEST[kind], **{typo: 1})
    assert only_error(refused) == f"unknown field '{typo}' in {kind.__name__}; did you mean '{real}'?"


def test_an_unknown_field_with_nothing_near_lists_what_there_is() -> None:
    with pytest.raises(ValidationError) as refused:
        DPOConfig(zzz=1)
    names = ", ".join(sorted(DPOConfig.model_fields))
    assert only_error(refused) == f"unknown field 'zzz' in DPOConfig; known are: {names}"


def test_an_unknown_field_of_a_nested_section_is_named_with_its_place() -> None:
    with pytest.raises(ValidationError) as refused:
        PipelineConfig(pretrain={"data": {"dataset_name": "a.txt"}, "train": {"learning_rat": 1}})
    line = only_error(refused)
    assert line == "pretrain.train: unknown field 'learning_rat' in TrainingConfig; did you mean 'learning_rate'?"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValidationError) as refused:
        PipelineConfig(start_checkpoint="m", dpo={"data": {}})
    assert only_error(refused) == "dpo.data.dataset_name: is required and was not given"


def test_a_value_of_the_wrong_kind_is_shown() -> None:
    with pytest.raises(ValidationError) as refused:
        TrainingConfig(max_steps="many")
    assert "max_steps" in only_error(refused)
    assert "'many'" in only_error(refused)


def test_a_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)
    assert issubclass(ValidationError, ValueError)


@KINDS
def test_configs_are_frozen(kind) -> None:
    config = kind(**SMALLEST[kind])
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, next(iter(kind.model_fields)), None)


@KINDS
def test_every_field_has_its_help_in_the_json_schema(kind) -> None:
    schema = json.loads(json_schema(kind))
    for name, part in {kind.__name__: schema, **schema.get("$defs", {})}.items():
        assert part["description"], name
        for field, described in part["properties"].items():
            assert len(described.get("description", "")) > 10, f"{name}.{field}"


def test_a_partial_training_config_is_valid() -> None:
    config = TrainingConfig(learning_rate=5e-6, warmup_steps=50, max_steps=2000)
    assert (config.learning_rate, config.warmup_steps, config.max_steps) == (5e-6, 50, 2000)


def test_a_complete_dpo_training_config_is_valid() -> None:
    config = TrainingConfig(
        run_name="dpo-hh",
        dataset_name="Anthropic/hh-rlhf",
        tokenizer_name="gpt2",
        output_dir=Path("experiments/dpo"),
        batch_size=16,
        micro_batch_size=1,
        gradient_accumulation_steps=16,
        learning_rate=5e-6,
        max_steps=2000,
        warmup_steps=50,
        weight_decay=0.01,
        save_every=500,
        log_every=25,
        mixed_precision="bf16",
    )
    assert config.output_dir == Path("experiments/dpo")


DATA = {"dataset_name": "a.jsonl"}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainingConfig, {"learning_rate": 0}, "learning_rate"),
        (TrainingConfig, {"learning_rate": float("nan")}, "learning_rate"),
        (TrainingConfig, {"mixed_precision": "fp16"}, "mixed_precision"),
        (TrainingConfig, {"run_name": "a/b"}, "run_name"),
        (TrainingConfig, {"run_name": ".."}, "run_name"),
        (TrainingConfig, {"report_to": ["mlflow"]}, "report_to"),
        (TrainingConfig, {"max_steps": 1, "num_epochs": 1}, "max_steps=1 and num_epochs=1"),
        (TrainingConfig, {"max_steps": 10, "warmup_steps": 11}, "warmup_steps=11 exceeds max_steps=10"),
        (TrainingConfig, {"adam_betas": (0.9, 1.0)}, "adam_betas"),
        (TrainingConfig, {"optimizer": "adamw", "muon_learning_rate": 0.1}, "muon_learning_rate"),
        (TrainingConfig, {"batch_size": 3, "micro_batch_size": 4}, "micro_batch_size=4 is more than batch_size=3"),
        (TrainingConfig, {"parallel": {"timeout_minutes": 0}}, "timeout_minutes"),
        (ModelConfig, {"d_model": 30, "n_heads": 4}, "d_model=30 is not a multiple of n_heads=4"),
        (ModelConfig, {"d_model": 36, "n_heads": 4}, "must be even"),
        (ModelConfig, {"n_heads": 8, "n_kv_heads": 3}, "n_heads=8 is not a multiple of n_kv_heads=3"),
        (ModelConfig, {"n_experts": 8}, "n_experts has no meaning"),
        (ModelConfig, {"sliding_window": 8}, "sliding_window has no meaning"),
        (ModelConfig, {"architecture": "qwen3_moe", "n_experts_per_token": 5}, "exceeds n_experts=4"),
        (ModelConfig, {"architecture": "gpt2"}, "architecture"),
        (DPOConfig, {"max_length": 1}, "max_length must be at least 2"),
        (DPOConfig, {"max_length": 8, "max_prompt_length": 8}, "max_prompt_length=8 must be smaller than max_length=8"),
        (DPOConfig, {"max_length": 8, "max_completion_length": 9}, "max_completion_length=9 must be smaller"),
        (DPOConfig, {"beta": 0}, "beta"),
        (DPOConfig, {"loss_type": "sigmod"}, "loss_type"),
        (PreferenceDatasetConfig, {**DATA, "eval_split": "test", "eval_fraction": 0.1}, "eval_split and eval_fraction"),
        (PreferenceDatasetConfig, {**DATA, "eval_fraction": 1.0}, "eval_fraction"),
        (PipelineConfig, {"start_checkpoint": "m"}, "nothing to do"),
        (PipelineConfig, {"sft": {"data": DATA}}, "give either pretrain or start_checkpoint"),
        (
            PipelineConfig,
            {"start_checkpoint": "m", "dpo": {"data": DATA, "train": {"z_loss": 1e-4}}},
            "dpo.train.z_loss belongs to pretraining and SFT: leave it out",
        ),
        (PipelineConfig, {"pretrain": {"data": DATA}, "start_checkpoint": "m"}, "give either pretrain or start_checkpoint"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(kind, values, message) -> None:
    with pytest.raises(ValidationError) as refused:
        kind(**values)
    assert re.search(re.escape(message), only_error(refused))


@pytest.mark.parametrize("field", ["max_steps", "seed", "learning_rate", "save_every", "warmup_steps"])
def test_true_is_not_a_number(field) -> None:
    """`seed: yes` is True in YAML; taking it as 1 would be a silent conversion."""
    with pytest.raises(ValidationError, match=field):
        TrainingConfig(**{field: True})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"a.jsonl": 0.5, "b.jsonl": -1}, "dataset_name.b.jsonl: Input should be greater than 0 (got -1)"),
        ({"a.jsonl": {"wight": 2}}, "dataset_name.a.jsonl: unknown field 'wight' in SourceConfig; did you mean 'weight'?"),
        (["a.jsonl", "b.jsonl", "a.jsonl"], "dataset_name names a data set twice: give it a weight, {name: 2}"),
        ([{"text": "a"}, 3], "dataset_name: row 1 must be a dict, not int"),
        ({"a.jsonl": {"weight": 0}}, "dataset_name.a.jsonl.weight: Input should be greater than 0 (got 0)"),
    ],
)
def test_a_mistake_in_a_mixture_is_one_line_that_names_the_source(names, expected) -> None:
    with pytest.raises(ValidationError) as refused:
        LanguageModelingDatasetConfig(dataset_name=names)
    assert explain(refused.value) == expected


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        (LanguageModelingDatasetConfig, {"adapter": "alpaca"}, "dataset_name='a.jsonl': adapter is for chats and pairs"),
        (LanguageModelingDatasetConfig, {"columns": {"text": "t"}}, "dataset_name='a.jsonl': columns is for chats and pairs"),
        (InstructionDatasetConfig, {"text_field": "t"}, "dataset_name='a.jsonl': text_field is for documents"),
        (
            InstructionDatasetConfig,
            {"adapter": "hh"},
            "dataset_name='a.jsonl': adapter='hh' is no layout of this stage (messages",
        ),
        (PreferenceDatasetConfig, {"adapter": "alpaca"}, "adapter='alpaca' is no layout of this stage (prompt_pair, hh"),
        (
            PreferenceDatasetConfig,
            {"roles": {"bot": "robot"}},
            "roles.bot: Input should be 'system', 'user', 'assistant' or 'tool'",
        ),
    ],
)
def test_what_a_source_cannot_have_is_refused(kind, source, expected) -> None:
    with pytest.raises(ValidationError) as refused:
        kind(dataset_name={"a.jsonl": source, "b.jsonl": 1})
    assert expected in explain(refused.value)


def test_a_layout_of_one_source_and_named_columns_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="reads columns of its own: leave prompt_field and response_field out"):
        InstructionDatasetConfig(dataset_name={"a.jsonl": {"adapter": "alpaca"}}, prompt_field="q", response_field="a")


def test_a_wrong_kind_is_told_beside_a_problem_of_a_name_that_begins_the_same() -> None:
    with pytest.raises(ValidationError) as refused:
        LanguageModelingDatasetConfig.model_validate({"dataset_name": {"a": [1], "a.jsonl": -1}})
    assert "dataset_name.a: Input should be a valid number (got [1])" in explain(refused.value)
    assert "dataset_name.a.jsonl: Input should be greater than 0 (got -1)" in explain(refused.value)
