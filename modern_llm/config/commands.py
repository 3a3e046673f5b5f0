"""Arguments of the commands, as they stand in a YAML file or on the command line."""

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.fields import FieldInfo

from modern_llm.config.base import StrictModel
from modern_llm.config.data import InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.early import check_settings
from modern_llm.config.model import ModelConfig
from modern_llm.config.paths import FolderPath, Name
from modern_llm.config.pipeline import DPOStageConfig, PipelineConfig, PretrainStageConfig, SFTStageConfig
from modern_llm.config.training import Stage, TrainingConfig

USAGE = """usage: modern-llm COMMAND [--config FILE] [--option VALUE | option=VALUE ...]

  run FILE   the whole pipeline of a YAML file: pretrain, SFT, DPO, and a table of what each learned; what is there already is
             reused (--dry-run: only say what would run, and why)
  pretrain   train a model from random weights on documents
  sft        fine-tune a checkpoint on demonstrations
  dpo        train a checkpoint on preference pairs
  plan FILE  what a run will need: parameters, tokens, FLOPs, memory, disk, time; nothing is trained
  bench      what this machine can do: matrix products and copies
  compare-losses FILE   train one start with several preference losses, and put them in one table
  inspect FILE   what the data of a pipeline file becomes: counts, and rows as colours
  verify CHECKPOINT   hash a checkpoint, its ancestors and their data again, and print the chain
  diff CHECKPOINT CHECKPOINT   why two checkpoints differ
  replay BATCH   run a batch that was skipped through a checkpoint: which rows are not finite
  export CHECKPOINT   one plain model folder from a checkpoint: adapters merged, weights in bf16
  tokenizer  train a tokenizer on documents
  schema     print the JSON Schema of a pipeline file, for editors

  modern-llm COMMAND --help lists every option with its meaning."""


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
    seconds: PositiveFloat = 20.0
    """How long the measured steps of all stages may take together, from when model and data are loaded."""
    ranks: PositiveInt = 1
    """Processes that will train together; memory is that of each."""
    as_json: bool = False
    """Print one JSON object."""


def is_mapping(field: FieldInfo) -> bool:
    """True for a field that is a dict."""
    return get_origin(field.annotation) is dict


def options_of(kind: type[BaseModel], prefix: str = "--") -> dict[str, FieldInfo]:
    """Every option of a config class, nested ones with a dot, and its field."""
    found: dict[str, FieldInfo] = {}
    for name, field in kind.model_fields.items():
        option = prefix + (field.alias or name).replace("_", "-")
        members: list[Any] = [field.annotation, *get_args(field.annotation)]
        inner = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        for model in inner:
            found |= options_of(model, option + ".")
        if not inner:
            found[option] = field
    return found


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


def check_pipeline(config: PipelineConfig, ranks: int) -> None:
    """Refuse what the settings of any stage of a pipeline make impossible.

    Raises:
        UserError: see `check_settings`.
    """
    for stage in config.stages():
        data = getattr(config, stage).data
        check_settings(stage, config.training(stage), data, type(data), ranks, f"{stage}.train")


def as_pipeline(arguments: BaseModel, ranks: int = 1) -> PipelineConfig:
    """Check the settings of a command, and return a stage's as a pipeline of that stage alone.

    Args:
        arguments: of the command, or a whole pipeline.
        ranks: processes that train together.

    Raises:
        UserError: see `check_settings`.
    """
    a = arguments
    if isinstance(a, PipelineConfig):
        check_pipeline(a, ranks)
        return a
    assert isinstance(a, PretrainArguments | SFTArguments | DPOArguments)
    train = a.train_config.model_copy(update={"tokenizer_name": a.tokenizer_name} if a.tokenizer_name else {})
    if isinstance(a, PretrainArguments):
        documents = check_settings("pretrain", train, a.dataset_config, LanguageModelingDatasetConfig, ranks)
        return PipelineConfig(pretrain=PretrainStageConfig(model=a.model, train=train, data=documents))
    if isinstance(a, SFTArguments):
        chats = check_settings("sft", train, a.dataset_config, InstructionDatasetConfig, ranks)
        return PipelineConfig(start_checkpoint=a.pretrain_checkpoint, sft=SFTStageConfig(train=train, data=chats))
    pairs = check_settings("dpo", train, a.preference_config, PreferenceDatasetConfig, ranks)
    return PipelineConfig(start_checkpoint=a.sft_checkpoint, dpo=DPOStageConfig(train=train, dpo=a.dpo_config, data=pairs))
