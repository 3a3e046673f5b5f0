"""A whole run in one file: three stages and what is measured after each."""

import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from modern_llm.config.base import StrictModel
from modern_llm.config.data import InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.model import ModelConfig
from modern_llm.config.paths import FolderPath, Name
from modern_llm.config.training import Z_LOSS_OF_PAIRS, Stage, TrainingConfig


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
    """Held-out blocks of documents for the perplexity; of several sources each gives its share."""
    max_questions: PositiveInt = 300
    """Held-out questions answered by greedy generation: those of the built-in world, else the prompts of held-out pairs."""
    max_pairs: PositiveInt = 500
    """Held-out pairs for the preference accuracy; of several sources each gives its share."""
    max_new_tokens: PositiveInt = 40
    """Tokens of a generated answer."""
    batch_size: PositiveInt = 32
    """Sequences of one evaluation forward pass."""


Metric = Literal["perplexity", "right_answers", "preferred_form", "preference_accuracy", "kl_to_sft"]
"""What is measured on held-out data after a stage."""

LIMIT = re.compile(r"^\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*$")
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class PipelineConfig(StrictModel):
    """Pretrain → SFT → DPO. A stage that is left out is skipped; what comes after starts from `start_checkpoint`."""

    output_dir: FolderPath = Path("experiments/runs/pipeline")
    """Folder of the whole run; each stage has a folder of its own in it."""
    seed: NonNegativeInt = 0
    """Seed of every stage that does not set its own."""
    start_checkpoint: Name | None = None
    """Model that the first stage starts from, where there is no pretraining: a folder or a hub id."""
    pretrain: PretrainStageConfig | None = None
    """Pretraining."""
    sft: SFTStageConfig | None = None
    """Supervised fine-tuning."""
    dpo: DPOStageConfig | None = None
    """Preference training."""
    evaluation: EvaluationConfig = Field(default=EvaluationConfig())
    """What is measured after each stage."""
    gates: dict[Stage, dict[Metric, str]] = Field(default={}, examples=[{"sft": {"right_answers": ">= 0.8"}}])
    """Limits that a stage's metrics must keep, such as `{sft: {right_answers: ">= 0.8"}}` (shares are from 0 to 1). A miss
    stops the pipeline before the next stage, with exit code 3."""
    max_minutes: PositiveFloat | None = None
    """Stop after so many minutes from the pipeline's beginning, as `train.max_minutes` does for one stage. None: no limit."""
    ignore_code_changes: bool = False
    """Reuse finished stages, and go on with begun ones, that another version of this package, torch or transformers made;
    configs and data must still be the same."""

    @field_validator("gates")
    @classmethod
    def _limits_can_be_read(cls, value: dict[Stage, dict[Metric, str]]) -> dict[Stage, dict[Metric, str]]:
        for stage, limits in value.items():
            for metric, limit in limits.items():
                _read_limit(f"{stage}.{metric}", limit)
        return value

    @model_validator(mode="after")
    def _check_chain(self) -> Self:
        if self.pretrain is None and self.sft is None and self.dpo is None:
            raise ValueError("nothing to do: give at least one of pretrain, sft, dpo")
        if (self.pretrain is None) == (self.start_checkpoint is None):
            raise ValueError("give either pretrain or start_checkpoint: the first stage starts from exactly one of them")
        if self.dpo is not None and self.dpo.train.z_loss:  # refused before the first stage, not hours later
            raise ValueError(f"dpo.train.{Z_LOSS_OF_PAIRS}")
        stages = self.stages()
        for stage in self.gates:
            if stage not in stages:
                raise ValueError(f"gates: there is no {stage} stage to measure: leave it out")
        folders = [os.path.normpath(self.training(stage).output_dir or stage) for stage in stages]
        for n, folder in enumerate(folders):
            if folder in folders[:n]:
                raise ValueError(f"output_dir={folder!r} is the folder of two stages: give each its own, or none")
        return self

    def stages(self) -> list[Stage]:
        """The stages that the pipeline has, in order."""
        return [stage for stage in get_args(Stage) if getattr(self, stage) is not None]

    def missed(self, stage: Stage, metrics: dict[str, float]) -> list[str]:
        """A sentence for each metric of a stage that is outside its limit, or was not measured."""
        found = []
        for metric, limit in self.gates.get(stage, {}).items():
            compare, bound = _read_limit(f"{stage}.{metric}", limit)
            value = metrics.get(metric)
            if value is None:
                found.append(f"gates.{stage}.{metric}: nothing of this pipeline's data measures it, and {limit} is wanted")
            elif not compare(value, bound):
                found.append(f"gates.{stage}.{metric}: {value:.6g}, and {limit} is wanted")
        return found

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


def _read_limit(name: str, limit: str) -> tuple[Callable[[float, float], bool], float]:
    found = LIMIT.match(limit)
    try:
        bound = float(found[2]) if found else None
    except ValueError:
        bound = None
    if found is None or bound is None:
        raise ValueError(f"{name}={limit!r} is no limit: write one of >=, <=, >, < and a number, such as '>= 0.8'")
    return COMPARE[found[1]], bound
