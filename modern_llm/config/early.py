"""What can be refused by the settings alone, before anything is imported or loaded."""

from typing import TypeVar

from modern_llm.config.base import UserError
from modern_llm.config.data import DatasetConfig
from modern_llm.config.resolve import resolve
from modern_llm.config.training import METRICS, Z_LOSS_OF_PAIRS, Stage, TrainingConfig

Dataset = TypeVar("Dataset", bound=DatasetConfig)


def check_settings(
    stage: Stage, config: TrainingConfig, given: Dataset | None, kind: type[Dataset], ranks: int, place: str = "train_config"
) -> Dataset:
    """Return the data set config that was given, or one built from `train_config.dataset_name`.

    Args:
        stage: which stage.
        config: how it trains.
        given: its data set config, if there is one.
        kind: class of the data set config.
        ranks: processes that train together.
        place: where the training config stands, for errors.

    Raises:
        UserError: the batch arithmetic is wrong, adapters on random weights, a z-loss of pairs, no data set or two, a stream of
            no length, evaluations with nothing held out, or the run's folder is a file.
    """
    try:
        if stage == "pretrain" and config.adapter is not None:
            raise UserError("adapter leaves the weights as they are, and in pretraining they are random: leave it out")
        if stage == "dpo" and config.z_loss:
            raise UserError(Z_LOSS_OF_PAIRS)
        folder = resolve(config, stage, ranks).output_dir
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"output_dir={str(folder)!r} is a file: give a folder")
        if given is None and config.dataset_name is None:
            raise UserError("dataset_name is required: set it, or give a data set config")
        data = kind(dataset_name=config.dataset_name or "") if given is None else given
        if config.dataset_name not in (None, data.dataset_name):
            raise UserError(
                f"dataset_name={config.dataset_name!r} and {data.dataset_name!r} of the data set config differ: give one"
            )
        if config.keep_best is not None and config.keep_best not in METRICS[stage]:
            raise UserError(f"keep_best={config.keep_best!r} is no metric of {stage}: it has {', '.join(METRICS[stage])}")
        if getattr(data, "streaming", False) and config.max_steps is None:
            raise UserError("max_steps is required with streaming: how long a pass over the data is shows only at its end")
        for name in ("eval_every", "eval_at_start", "answer_prompts"):
            if (value := getattr(config, name)) and not (data.eval_fraction or data.eval_sources()):
                raise UserError(
                    f"{name}={value}, and nothing is held out to evaluate on: set eval_fraction, eval_split or eval_dataset of "
                    f"the data set config, or leave {name} out"
                )
        for name in ("eval_every", "save_every", "log_every"):
            if isinstance(value := getattr(config, name), str) and getattr(data, "streaming", False):
                raise UserError(f"{name}={value!r}: how long a stream is shows only at its end: give optimizer steps")
    except UserError as error:
        raise UserError(f"{place}.{error}") from None
    return data
