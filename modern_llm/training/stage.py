"""Opening and closing a run: what it is made of, whether it is done or begun, and what it leaves behind."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from modern_llm import distributed
from modern_llm.allocator import steady_memory
from modern_llm.checkpoint import DamagedError, load_state, verify
from modern_llm.config import DPOConfig, TrainingConfig, UserError, resolve
from modern_llm.config.data import DatasetConfig
from modern_llm.config.io import plain
from modern_llm.config.training import Z_LOSS_OF_PAIRS, Stage
from modern_llm.data.prepared import PreparedData
from modern_llm.data.tokenizer import checkpoint_tokenizer, tokenizer_fingerprint
from modern_llm.exit_codes import Stopped, StorageError
from modern_llm.lock import only_writer
from modern_llm.metrics import RunLog
from modern_llm.models.adapter_folders import load_adapter_weights
from modern_llm.models.adapters import adapter_layers, add_adapter, keep_frozen_in
from modern_llm.models.build import grow_vocabulary, load_model, refuse_pickles, start_hash
from modern_llm.models.compilation import compile_layers
from modern_llm.models.policy import Policy, context_length, disable_dropout, refuse_random_training
from modern_llm.models.recomputation import recompute_activations
from modern_llm.models.routing import check_routed
from modern_llm.objectives import Objective
from modern_llm.precision import choose_precision
from modern_llm.training.contract import check_contract, contract
from modern_llm.training.inputs import key_of
from modern_llm.training.loop import Loop
from modern_llm.training.optim import ParameterGroups
from modern_llm.training.preflight import preflight
from modern_llm.training.resume import agreed_checkpoint
from modern_llm.training.saving import Saver
from modern_llm.training.speed import foreseen_seconds
from modern_llm.training.stopping import StopRequest

Dataset = TypeVar("Dataset", bound=DatasetConfig)


def check_early(stage: Stage, config: TrainingConfig) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        UserError: the batch arithmetic is wrong, adapters on random weights, a z-loss of pairs, or the run's folder is a file.
    """
    if stage == "pretrain" and config.adapter is not None:
        raise UserError("adapter leaves the weights as they are, and in pretraining they are random: leave it out")
    if stage == "dpo" and config.z_loss:
        raise UserError(Z_LOSS_OF_PAIRS)
    resolved = resolve(config, stage, distributed.world_size())
    assert resolved.output_dir is not None
    if resolved.output_dir.exists() and not resolved.output_dir.is_dir():
        raise UserError(f"output_dir={str(resolved.output_dir)!r} is a file: give a folder")


def dataset_or_default(given: Dataset | None, config: TrainingConfig, kind: type[Dataset]) -> Dataset:
    """The data set config that was given, or one built from `train_config.dataset_name`.

    Raises:
        UserError: neither names a data set, or they name two.
    """
    if given is None:
        if config.dataset_name is None:
            raise UserError("dataset_name is required: set it in the training config or give a data set config")
        return kind(dataset_name=config.dataset_name)
    if config.dataset_name not in (None, given.dataset_name):
        raise UserError(
            f"dataset_name={config.dataset_name!r} in the training config and {given.dataset_name!r} in the data set config "
            f"differ: give one of them"
        )
    return given


@distributed.together  # a rank that cannot read it ends the others too
def open_checkpoint(
    checkpoint: Path | str, tokenizer_name: str | None, field: str, config: TrainingConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, str]:
    """Model, tokenizer and the tokenizer's recorded name of a starting checkpoint; one of ours is checked file by file.

    Where the tokenizer has more tokens than the model has embeddings (a chat template was added to a base model), the new
    rows get the mean of the old ones, to be trained.

    Raises:
        UserError: missing, damaged, a pickle, with another tokenizer than the one asked for, or with too few embeddings for
            adapters (`config`), which train none.
    """
    refuse_pickles(checkpoint, field)
    try:
        manifest = verify(checkpoint)
    except DamagedError as error:
        raise DamagedError(f"{field}={str(checkpoint)!r} is damaged: {error}: use another checkpoint") from None
    model = load_model(checkpoint, field)
    tokenizer, recorded_name = checkpoint_tokenizer(checkpoint, tokenizer_name, field)
    check_contract(manifest, model, tokenizer, f"{field}={str(checkpoint)!r}")
    lacking = grow_vocabulary(model, len(tokenizer))
    if lacking and config is not None and config.adapter is not None:
        raise UserError(
            f"{field}={str(checkpoint)!r} has no embeddings for {lacking} tokens of its tokenizer and chat template, and an "
            f"adapter leaves new rows all alike: train once without it, or give the tokenizer a chat_template of tokens it has"
        )
    return model, tokenizer, recorded_name


def open_reference(dpo: DPOConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel | None:
    """The model of `reference_checkpoint`, which must have the same tokenizer; None where the start is the reference."""
    if dpo.reference_checkpoint is None:
        return None
    model, own, _ = open_checkpoint(dpo.reference_checkpoint, None, "reference_checkpoint")
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"reference_checkpoint={str(dpo.reference_checkpoint)!r} has another tokenizer ({len(own)} tokens) than the "
            f"starting checkpoint ({len(tokenizer)} tokens)"
        )
    return model


Prepare = Callable[[Policy, PreparedData, torch.dtype, RunLog], PreparedData]
"""What a stage does with the policy before its first step: (policy at the start, data, precision, log) → data."""
Conclude = Callable[[Loop], dict[str, float]]
"""What a stage measures at the end, its result on disk: (loop without optimizer state, the final weights in it) → metrics."""


def train_stage(
    stage: Stage,
    config: TrainingConfig,
    sections: Mapping[str, BaseModel],
    inputs: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_name: str,
    data: PreparedData,
    objective: Objective,
    parent: Path | str | None = None,
    drop_out: bool = True,
    prepare: Prepare | None = None,
    conclude: Conclude | None = None,
    reference_weights: str | None = None,
) -> Path:
    """Train a model on prepared data and return the final checkpoint's folder.

    The same output folder with the same inputs resumes, or returns the finished checkpoint.

    Args:
        stage: which stage this is.
        config: not resolved.
        sections: the stage's other configs by name.
        inputs: of `modern_llm.training.inputs.stage_inputs`, for the record.
        model: where training starts, in fp32.
        tokenizer: travels with the checkpoint.
        tokenizer_name: what to record as its name.
        data: examples.
        objective: what is optimised.
        parent: the starting checkpoint, for the record.
        drop_out: whether the model's dropout is on.
        prepare: what to do before the first step, also of a resumed run; None: nothing.
        conclude: what to measure at the end; None: nothing.
        reference_weights: hash of another reference than the start, for the record.

    Raises:
        UserError: the output folder holds a run with other inputs; the difference is named.
    """
    began = time.monotonic()
    config = resolve(config, stage, distributed.world_size(), rows_per_epoch=data.train.epoch_size)
    if config.max_steps is None:
        raise UserError("max_steps is required with streaming: how long a pass over the data is shows only at its end")
    device = distributed.device()
    if device.type == "cpu":
        steady_memory()
    precision, why = choose_precision(config.mixed_precision, device)
    record = {
        **_inputs(stage, {"train": config, **sections}, model, data, tokenizer, parent, precision),
        "reference": reference_weights,
        "tokenizer_name": tokenizer_name,
    }
    assert config.output_dir is not None
    _check_model(model, data, config)
    final = config.output_dir / f"{config.run_name}_final"
    with ExitStack() as lock:
        distributed.on_main(lock.enter_context)(only_writer(config.output_dir))
        found, damaged = agreed_checkpoint(final, record)
        if found == final:
            print(f"{config.run_name}: finished already: {final}", flush=True)
            return final
        state = None if found is None else load_state(found)
        policy = _make_policy(model, config, device, drop_out, precision)
        with _open_log(config, 0 if state is None else state["step"]) as log:
            _describe(log, policy, data, config, f"{device} {why}", found, damaged)
            log.message(_compile(policy, stage, config, data, precision))
            data = data if prepare is None else prepare(policy, data, precision, log)
            if found is not None:
                _load_weights(model, found)
            saver = Saver(model, tokenizer, {**record, "inputs": inputs, "key": key_of(inputs)}, config, log, found)
            loop = Loop(policy, objective, data, config, precision, log, saver.checkpoint, saver.check)
            if state is None:
                preflight(policy, loop.objective, data, tokenizer, precision, config, log)
            else:
                loop.load(state)
            with saver, StopRequest(config.max_minutes, began) as stop:
                _run(loop, saver, final, stop, conclude)
    return final


def _open_log(config: TrainingConfig, start: int) -> RunLog:
    assert config.output_dir is not None
    assert config.run_name is not None
    assert config.max_steps is not None
    lenient = config.on_save_error == "warn"
    return RunLog(config.output_dir, config.run_name, config.max_steps, start, config.report_to, lenient)


def _run(loop: Loop, saver: Saver, final: Path, stop: StopRequest, conclude: Conclude | None) -> None:
    """Train to the end, or to where the run is asked to stop; what is to be saved then is on disk when this is left."""
    try:
        try:
            loop.run(stop)
        except Stopped as stopped:
            distributed.together(saver.finish)(must=True)  # a launcher ends all ranks as soon as one is gone
            loop.log.message(f"{stopped}: saved {saver.last_saved}; the same command goes on from there")
            raise
        with loop.averaged_weights():
            saver.final(final)
            loop.log.message(f"saved {final}")
            if conclude is not None:
                loop.release()
                loop.log.log(loop.step, {f"eval/{name}": value for name, value in conclude(loop).items()})
    except StorageError as error:
        raise StorageError(f"{error}; {saver.what_is_there()}: make room there, and run the same again") from error


def _inputs(
    stage: Stage,
    sections: Mapping[str, BaseModel],
    model: PreTrainedModel,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerFast,
    parent: Path | str | None,
    precision: torch.dtype,
) -> dict[str, Any]:
    """What decides a run's result, for the record."""
    start_weights = start_hash(parent, model)
    return {
        "stage": stage,
        "config": {name: plain(section) for name, section in sections.items()},
        "parent": None if parent is None else {"checkpoint": str(parent), "weights": start_weights},
        "start_weights": start_weights,
        "data": data.fingerprint(),
        # a stream's documents are dealt out to the ranks, so a position in it means something else with another number of them
        "ranks": distributed.world_size() if data.train.epoch_size is None else None,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "contract": contract(model, tokenizer),
        "precision": str(precision).removeprefix("torch."),
    }


def _check_model(model: PreTrainedModel, data: PreparedData, config: TrainingConfig) -> None:
    """Refuse what this model cannot do: settings of parts that it lacks, samples that are too long for it."""
    ParameterGroups(model).check(config)
    if config.balance_loss:
        check_routed(model)
    _check_lengths(model, data)


def _check_lengths(model: PreTrainedModel, data: PreparedData) -> None:
    """Refuse samples that are longer than what the model is made for."""
    limit, longest, turns = context_length(model), data.longest, _angles_change_beyond(model.config)
    if turns is not None and longest > turns:
        raise UserError(
            f"max_length: a sample has {longest} tokens, but the angles of this model's positions change for all samples of a "
            f"row where one has more than {turns}: set it to that"
        )
    if limit is not None and longest > limit:
        raise UserError(
            f"max_length: a sample has {longest} tokens, but the context length of the model is {limit} "
            f"(max_position_embeddings): set it to that"
        )


def _angles_change_beyond(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which a sample changes the angles of all others in its batch (RoPE types dynamic and longrope)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    turning = [p for p in kinds if p.get("rope_type") in ("dynamic", "longrope")]
    return min((p.get("original_max_position_embeddings") or config.max_position_embeddings for p in turning), default=None)


def _add_adapter(model: PreTrainedModel, config: TrainingConfig, drop_out: bool) -> None:
    """Put the run's adapters into the model.

    Raises:
        UserError: a setting that would have no effect with them.
    """
    assert config.adapter is not None
    if config.adapter.dropout and not drop_out:
        raise UserError(
            f"adapter.dropout={config.adapter.dropout} has no effect where disable_dropout switches all dropout off: leave it "
            f"out, or set dpo_config.disable_dropout: false"
        )
    add_adapter(model, config.adapter, config.seed)
    ParameterGroups(model).check(config)


def _load_weights(model: PreTrainedModel, found: Path) -> None:
    """What trains, from a periodic checkpoint."""
    if adapter_layers(model):
        load_adapter_weights(model, found)
    else:
        model.load_state_dict(load_model(found).state_dict())


def _make_policy(
    model: PreTrainedModel, config: TrainingConfig, device: torch.device, drop_out: bool, precision: torch.dtype
) -> Policy:
    if config.adapter is not None:
        _add_adapter(model, config, drop_out)
    model.to(device)  # type: ignore[arg-type]
    if not drop_out:
        disable_dropout(model)
    policy = Policy(model, config.attention)
    if not drop_out:
        refuse_random_training(policy)
    if config.gradient_checkpointing:
        recompute_activations(model, config.checkpointed_share)
    if config.adapter is not None and precision != torch.float32:
        keep_frozen_in(model, precision)  # last: the checks above run without autocast
    return policy


def _compile(policy: Policy, stage: Stage, config: TrainingConfig, data: PreparedData, precision: torch.dtype) -> str:
    """Compile the layers where that is wanted, on all ranks or on none; a sentence for the log."""
    if stage == "dpo" and config.compile == "auto":
        return "compile: off (auto: compiled layers round otherwise than those that the reference on disk was computed with)"
    foreseen = foreseen_seconds(policy, data, config, precision)
    note = distributed.main_decides(compile_layers)(policy, config.compile, foreseen)
    if not distributed.is_main():
        compile_layers(policy, "on" if note.startswith("compile: on") else "off", foreseen)
    return note


def _describe(
    log: RunLog,
    policy: Policy,
    data: PreparedData,
    config: TrainingConfig,
    where: str,
    resumed: Path | None,
    damaged: list[str],
) -> None:
    """What is about to run, in a few lines."""
    for line in damaged:
        log.message(f"WARNING: {line}")
    parameters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    if policy.note is not None:
        log.message(policy.note)
    log.message(f"{type(policy.model).__name__} {parameters / 1e6:.2f}M parameters on {where}")
    if config.adapter is not None:
        log.message(f"they are those of {len(adapter_layers(policy.model))} adapters; the rest of the model stays as it is")
    log.message("data " + " ".join(f"{name}={count}" for name, count in data.report.items() if count))
    if config.micro_batch_tokens is not None:
        log.message(f"{config.max_steps} steps of {config.batch_size}, in micro-batches of {config.micro_batch_tokens} tokens")
    else:
        parts = (config.micro_batch_size or 1, config.gradient_accumulation_steps or 1, distributed.world_size())
        log.message(
            f"{config.max_steps} steps of {config.batch_size} {'=' if math.prod(parts) == config.batch_size else '≤'} "
            f"{' × '.join(map(str, parts))} (micro-batch × accumulation × ranks)"
        )
    if resumed is not None:
        log.message(f"resuming from {resumed}")
    elif damaged:
        log.message("no whole checkpoint is left: starting anew")
