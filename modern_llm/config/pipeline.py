"""A whole run in one file: three stages and what is measured after each."""

from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from modern_llm.config.base import StrictModel
from modern_llm.config.data import InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.model import ModelConfig
from modern_llm.config.training import Stage, TrainingConfig


class PretrainStageConfig(StrictModel):
    """Pretraining from random weights."""

    model: ModelConfig = ModelConfig()
    """The model to build."""
    train: TrainingConfig = TrainingConfig()
    """How to train it."""
    data: LanguageModelingDatasetConfig
    """The documents to train on."""


class SFTStageConfig(StrictModel):
    """Supervised fine-tuning."""

    train: TrainingConfig = TrainingConfig()
    """How to train."""
    data: InstructionDatasetConfig
    """The demonstrations to train on."""


class DPOStageConfig(StrictModel):
    """Preference training."""

    train: TrainingConfig = TrainingConfig()
    """How to train."""
    dpo: DPOConfig = DPOConfig()
    """What to optimise."""
    data: PreferenceDatasetConfig
    """The pairs to train on."""


class EvaluationConfig(StrictModel):
    """What is measured on the checkpoint of every stage, on data that no stage trained on."""

    max_blocks: PositiveInt = 100
    """Held-out blocks of documents for the perplexity."""
    max_questions: PositiveInt = 300
    """Held-out questions answered by greedy generation: those of the built-in world, else the prompts of held-out pairs."""
    max_pairs: PositiveInt = 500
    """Held-out pairs for the preference accuracy."""
    max_new_tokens: PositiveInt = 40
    """Tokens of a generated answer."""
    batch_size: PositiveInt = 32
    """Sequences of one evaluation forward pass."""


class PipelineConfig(StrictModel):
    """Pretrain → SFT → DPO. A stage that is left out is skipped; what comes after starts from `start_checkpoint`."""

    output_dir: Path = Path("experiments/runs/pipeline")
    """Folder of the whole run; each stage has a folder of its own in it."""
    seed: NonNegativeInt = 0
    """Seed of every stage that does not set its own."""
    start_checkpoint: Path | str | None = None
    """Model that the first stage starts from, where there is no pretraining: a folder or a hub id."""
    pretrain: PretrainStageConfig | None = None
    """Pretraining."""
    sft: SFTStageConfig | None = None
    """Supervised fine-tuning."""
    dpo: DPOStageConfig | None = None
    """Preference training."""
    evaluation: EvaluationConfig = Field(default=EvaluationConfig())
    """What is measured after each stage."""

    @field_validator("start_checkpoint")
    @classmethod
    def _path_as_text(cls, value: Path | str | None) -> str | None:
        return None if value is None else str(value)  # as YAML and the record hold it

    @model_validator(mode="after")
    def _check_chain(self) -> Self:
        if self.pretrain is None and self.sft is None and self.dpo is None:
            raise ValueError("nothing to do: give at least one of pretrain, sft, dpo")
        if (self.pretrain is None) == (self.start_checkpoint is None):
            raise ValueError("give either pretrain or start_checkpoint: the first stage starts from exactly one of them")
        return self

    def training(self, stage: Stage) -> TrainingConfig:
        """A stage's training config with the pipeline's folder and seed where it sets none of its own."""
        section = getattr(self, stage)
        assert section is not None, "the pipeline has the stage"
        train: TrainingConfig = section.train
        filled = {
            "output_dir": train.output_dir or self.output_dir / stage,
            "seed": train.seed if "seed" in train.model_fields_set else self.seed,
        }
        return train.model_copy(update=filled)
