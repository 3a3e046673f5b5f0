"""Arguments of the commands, as they stand in a YAML file or on the command line."""

from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt

from modern_llm.config.base import StrictModel, UserError
from modern_llm.config.data import InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.model import ModelConfig
from modern_llm.config.paths import FolderPath, Name
from modern_llm.config.pipeline import DPOStageConfig, PipelineConfig, PretrainStageConfig, SFTStageConfig
from modern_llm.config.training import Stage, TrainingConfig


class PretrainArguments(StrictModel):
    """Pretraining from random weights."""

    model: ModelConfig = Field(default=ModelConfig(), alias="model_config")
    """Shape of the model."""
    train_config: TrainingConfig = TrainingConfig()
    """How to train."""
    dataset_config: LanguageModelingDatasetConfig | None = None
    """The documents; left out: `train_config.dataset_name`."""
    tokenizer_name: Name | None = None
    """Folder or hub id of the tokenizer; left out: one is trained on the documents."""


class SFTArguments(StrictModel):
    """Supervised fine-tuning."""

    pretrain_checkpoint: Name
    """Model to start from: a folder or a hub id."""
    train_config: TrainingConfig = TrainingConfig()
    """How to train."""
    dataset_config: InstructionDatasetConfig | None = None
    """The demonstrations; left out: `train_config.dataset_name`."""
    tokenizer_name: Name | None = None
    """Left out: the checkpoint's own tokenizer."""


class DPOArguments(StrictModel):
    """Preference training."""

    sft_checkpoint: Name
    """Model to start from: a folder or a hub id."""
    train_config: TrainingConfig = TrainingConfig()
    """How to train."""
    dpo_config: DPOConfig = DPOConfig()
    """What to optimise."""
    preference_config: PreferenceDatasetConfig | None = None
    """The pairs; left out: `train_config.dataset_name`."""
    tokenizer_name: Name | None = None
    """Left out: the checkpoint's own tokenizer."""


class CompareArguments(StrictModel):
    """One start, one order of the pairs, one reference, several preference losses."""

    losses: str = "sigmoid,ipo,apo_zero"
    """Losses by comma; an option of one of them behind a colon: `sigmoid,ipo:beta=0.5,exo_pair:label_smoothing=0.001`."""
    seeds: tuple[NonNegativeInt, ...] = (0,)
    """Seeds of the order of the pairs, each a run of every loss."""


ExportType = Literal["bf16", "fp16", "fp32"]
"""Type of exported weights."""


class ExportArguments(StrictModel):
    """A checkpoint as one plain model folder, adapters merged."""

    output_dir: FolderPath
    """Folder to write it to."""
    dtype: ExportType = "bf16"
    """Type of the weights: half the size of training's fp32 in `bf16` and `fp16`."""


class VerifyArguments(StrictModel):
    """Whether a checkpoint and all that it was made from are what they were."""


class DiffArguments(StrictModel):
    """Why two checkpoints differ."""


class SchemaArguments(StrictModel):
    """The JSON Schema of a pipeline file."""


class ReplayArguments(StrictModel):
    """A batch that was skipped, run again."""

    checkpoint: Name
    """The model to run it through: a folder or a hub id."""


class TokenizerArguments(StrictModel):
    """Training a byte-level BPE tokenizer."""

    dataset_config: LanguageModelingDatasetConfig
    """The documents."""
    vocab_size: PositiveInt = 8192
    """Tokens, with the 256 bytes and the control tokens."""
    output_dir: FolderPath
    """Folder to write it to."""


class InspectArguments(StrictModel):
    """What the data of a pipeline becomes."""

    stage: Stage | None = None
    """Only this stage; left out: all."""
    rows: NonNegativeInt = 3
    """Rows to show of each stage."""
    as_json: bool = False
    """Print the counts as one JSON object."""


class BenchArguments(StrictModel):
    """What this machine can do."""

    as_json: bool = False
    """Print one JSON object."""
    seconds: PositiveFloat = 1.0
    """How long each measurement is repeated."""


class PlanArguments(StrictModel):
    """What a run will need, before anything runs."""

    fit: bool = False
    """Choose the largest micro-batch that fits into the memory of this machine; it never changes the result."""
    no_measure: bool = False
    """Leave the measured optimizer steps out: no expected time, and memory from shapes alone."""
    ranks: PositiveInt = 1
    """Processes that will train together; memory is that of each."""
    as_json: bool = False
    """Print one JSON object."""


def kind_of_file(content: dict[str, Any]) -> type[BaseModel]:
    """Whether a file holds a whole pipeline, or the arguments of one stage; by its keys."""
    if content.keys() & {"sft_checkpoint", "dpo_config", "preference_config"}:
        return DPOArguments
    if "pretrain_checkpoint" in content:
        return SFTArguments
    return PretrainArguments if content.keys() & {"model_config", "train_config", "dataset_config"} else PipelineConfig


def command_of_file(content: dict[str, Any], wanted: type[BaseModel]) -> str | None:
    """The command that a file is for, where it is another than the one that reads `wanted`; by keys that only it knows."""
    commands = {PipelineConfig: "run", PretrainArguments: "pretrain", SFTArguments: "sft", DPOArguments: "dpo"}
    kind = kind_of_file(content)
    its_own = content.keys() & ({"pretrain", "sft", "dpo", "start_checkpoint"} if kind is PipelineConfig else _keys(kind))
    return commands[kind] if wanted in commands and kind is not wanted and its_own - _keys(wanted) else None


def _keys(kind: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in kind.model_fields.items()}


def as_pipeline(arguments: BaseModel) -> PipelineConfig:
    """A stage's arguments as a pipeline of that stage alone; a pipeline as it is.

    Raises:
        UserError: no data set is named.
    """
    if isinstance(arguments, PipelineConfig):
        return arguments
    assert isinstance(arguments, PretrainArguments | SFTArguments | DPOArguments)
    train = arguments.train_config
    if arguments.tokenizer_name is not None:
        train = train.model_copy(update={"tokenizer_name": arguments.tokenizer_name})
    given = arguments.preference_config if isinstance(arguments, DPOArguments) else arguments.dataset_config
    if given is None and train.dataset_name is None:
        raise UserError("dataset_name is required: set it in the training config or give a data set config")
    data: Any = given or {"dataset_name": train.dataset_name}
    if isinstance(arguments, PretrainArguments):
        return PipelineConfig(pretrain=PretrainStageConfig(model=arguments.model, train=train, data=data))
    if isinstance(arguments, SFTArguments):
        return PipelineConfig(start_checkpoint=arguments.pretrain_checkpoint, sft=SFTStageConfig(train=train, data=data))
    stage = DPOStageConfig(train=train, dpo=arguments.dpo_config, data=data)
    return PipelineConfig(start_checkpoint=arguments.sft_checkpoint, dpo=stage)
