"""Names of other trainers are answered with ours, wherever they are given."""

import dataclasses

import pytest
from pydantic import ValidationError

from modern_llm.config import (
    AdapterConfig,
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ParallelConfig,
    PipelineConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.base import explain
from modern_llm.config.foreign_names import _NAMES

DATA = (LanguageModelingDatasetConfig, InstructionDatasetConfig, PreferenceDatasetConfig)
SECTIONS = {"": TrainingConfig, "adapter": AdapterConfig, "parallel": ParallelConfig}


def said_of(kind: type, name: str) -> str:
    with pytest.raises(ValidationError) as refused:
        kind(**{name: 1})
    (line,) = explain(refused.value).splitlines()
    return line


def test_every_name_of_ours_is_a_setting() -> None:
    for answer in _NAMES["TrainingConfig"]:
        section, _, name = answer.split()[0].rpartition(".")
        assert name in SECTIONS[section].model_fields, answer
    for answer in _NAMES["DatasetConfig"]:
        assert any(answer.split()[0] in kind.model_fields for kind in DATA), answer


def test_no_name_stands_twice_or_is_a_setting_of_the_same_config() -> None:
    theirs = [name for names in _NAMES.values() for words in names.values() for name in words.split()]
    assert len(set(theirs)) == len(theirs)
    assert not set(theirs) & set(TrainingConfig.model_fields)


@pytest.mark.parametrize(
    ("kind", "name", "answer"),
    [
        (TrainingConfig, "save_steps", "it is save_every here"),
        (TrainingConfig, "num_train_epochs", "it is num_epochs here"),
        (TrainingConfig, "per_device_train_batch_size", "it is micro_batch_size here (batch_size is that of a whole step)"),
        (TrainingConfig, "bf16", "it is mixed_precision here (auto, bf16 or fp32)"),
        (TrainingConfig, "lora_r", "it is adapter.rank here"),
        (AdapterConfig, "r", "it is rank here"),
        (AdapterConfig, "lora_alpha", "it is alpha here"),
        (TrainingConfig, "max_seq_length", "it is max_length of DatasetConfig"),
        (DPOConfig, "max_seq_length", "it is max_length here"),
        (InstructionDatasetConfig, "lora_r", "it is adapter.rank of TrainingConfig"),
        (PipelineConfig, "save-steps", "it is save_every of TrainingConfig"),
        (PipelineConfig, "push_to_hub", "nothing is uploaded: use `modern-llm export`, then `hf upload`"),
        (TrainingConfig, "resume_from_checkpoint", "the same command resumes: leave it out"),
    ],
)
def test_a_foreign_name_is_answered_with_ours(kind, name, answer) -> None:
    assert said_of(kind, name) == f"unknown field '{name}' in {kind.__name__}: {answer}"


def test_names_that_the_installed_trainers_have_and_people_use_are_known() -> None:
    trl = pytest.importorskip("trl")
    fields = {field.name for kind in (trl.SFTConfig, trl.DPOConfig) for field in dataclasses.fields(kind)}
    theirs = {name for names in _NAMES.values() for words in names.values() for name in words.split()}
    used = {
        "save_steps", "eval_steps", "logging_steps", "num_train_epochs", "per_device_train_batch_size", "eval_strategy",
        "per_device_eval_batch_size", "gradient_checkpointing_kwargs", "bf16", "fp16", "lr_scheduler_type", "optim",
        "save_total_limit", "hub_model_id", "push_to_hub", "resume_from_checkpoint", "load_best_model_at_end", "save_strategy",
        "assistant_only_loss", "completion_only_loss", "dataset_text_field", "precompute_ref_log_probs", "padding_free",
    }  # fmt: skip
    assert used <= fields & theirs
