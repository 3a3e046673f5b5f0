"""Every config class. Imports neither torch nor datasets, so `--help` answers at once."""

from modern_llm.config.adapter import AdapterConfig
from modern_llm.config.base import StrictModel, UserError
from modern_llm.config.data import InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.io import dump_yaml, load_config
from modern_llm.config.model import ModelConfig
from modern_llm.config.parallel import ParallelConfig
from modern_llm.config.pipeline import PipelineConfig
from modern_llm.config.resolve import resolve
from modern_llm.config.training import TrainingConfig

__all__ = [
    "AdapterConfig",
    "DPOConfig",
    "InstructionDatasetConfig",
    "LanguageModelingDatasetConfig",
    "ModelConfig",
    "ParallelConfig",
    "PipelineConfig",
    "PreferenceDatasetConfig",
    "StrictModel",
    "TrainingConfig",
    "UserError",
    "dump_yaml",
    "load_config",
    "resolve",
]
