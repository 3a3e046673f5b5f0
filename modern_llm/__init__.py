"""One typed pipeline from random weights to an aligned language model: pretrain, SFT, DPO.

The public names, loaded when first used, so that `import modern_llm` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modern_llm.config import (
        AdapterConfig,
        DPOConfig,
        InstructionDatasetConfig,
        LanguageModelingDatasetConfig,
        ModelConfig,
        ParallelConfig,
        PipelineConfig,
        PreferenceDatasetConfig,
        TrainingConfig,
        UserError,
        load_config,
    )
    from modern_llm.pipeline import PipelineResult, run_pipeline
    from modern_llm.training.train_dpo import run_dpo
    from modern_llm.training.train_lm import run_training
    from modern_llm.training.train_sft import run_sft

_HOME = {
    "AdapterConfig": "config",
    "DPOConfig": "config",
    "InstructionDatasetConfig": "config",
    "LanguageModelingDatasetConfig": "config",
    "ModelConfig": "config",
    "ParallelConfig": "config",
    "PipelineConfig": "config",
    "PipelineResult": "pipeline",
    "PreferenceDatasetConfig": "config",
    "TrainingConfig": "config",
    "UserError": "config",
    "load_config": "config",
    "run_dpo": "training.train_dpo",
    "run_pipeline": "pipeline",
    "run_sft": "training.train_sft",
    "run_training": "training.train_lm",
}

__all__ = [
    "AdapterConfig",
    "DPOConfig",
    "InstructionDatasetConfig",
    "LanguageModelingDatasetConfig",
    "ModelConfig",
    "ParallelConfig",
    "PipelineConfig",
    "PipelineResult",
    "PreferenceDatasetConfig",
    "TrainingConfig",
    "UserError",
    "load_config",
    "run_dpo",
    "run_pipeline",
    "run_sft",
    "run_training",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'modern_llm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"modern_llm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
