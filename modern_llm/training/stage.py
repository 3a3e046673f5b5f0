"""Opening and closing a run: what it is made of, whether it is done or begun, and what it leaves behind."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from modern_llm import distributed
from modern_llm.allocator import steady_memory
from modern_llm.checkpoint import load_state
from modern_llm.config import DPOConfig, TrainingConfig, UserError, resolve
from modern_llm.config.early import Dataset, check_settings
from modern_llm.config.io import plain
from modern_llm.config.training import Stage
from modern_llm.data.prepared import PreparedData
from modern_llm.data.tokenizer import tokenizer_fingerprint
from modern_llm.exit_codes import Stopped, StorageError
from modern_llm.initial.checkpoint import load_model, read_initial
from modern_llm.initial.handoff import contract
from modern_llm.initial.opened import Opened, open_checkpoint
from modern_llm.lock import only_writer
from modern_llm.metrics import RunLog, check_trackers
from modern_llm.models.adapter_folders import load_adapter_weights
from modern_llm.models.adapters import adapter_layers, add_adapter, describe_left_out, keep_frozen_in
from modern_llm.models.compilation import compile_layers
from modern_llm.models.idle_adapters import take_out_idle_adapters
from modern_llm.models.policy import Policy, context_length, disable_dropout, refuse_random_training, vocabulary_rows
from modern_llm.models.recomputation import recompute_activations
from modern_llm.models.routing import check_routed
from modern_llm.objectives import Objective
from modern_llm.precision import choose_precision
from modern_llm.training.inputs import key_of
from modern_llm.training.loop import Loop
from modern_llm.training.optim import ParameterGroups
from modern_llm.training.preflight import longest_rows, preflight
from modern_llm.training.resume import agreed_checkpoint
from modern_llm.training.saving import Saver
from modern_llm.training.speed import foreseen_seconds
from modern_llm.training.stopping import StopRequest


def check_early(stage: Stage, config: TrainingConfig, given: Dataset | None, kind: type[Dataset]) -> Dataset:
    """Refuse what can be refused before anything is loaded; return the data set config, see `check_settings`.

    Raises:
        UserError: a setting, a folder, or a tracker that is not installed or has no login.
    """
    data = check_settings(stage, config, given, kind, distributed.world_size())
    distributed.on_main(check_trackers)(config.report_to)
    return data


def open_reference(dpo: DPOConfig, tokenizer: PreTrainedTokenizerFast, tokenizer_name: str) -> PreTrainedModel | None:
    """The model of `reference_checkpoint`, which must have the same tokenizer; None where the start is the reference.

    Args:
        dpo: of the run.
        tokenizer: of the policy.
        tokenizer_name: its name, for a reference that comes without one.
    """
    if dpo.reference_checkpoint is None:
        return None
    field = "reference_checkpoint"
    has_own = read_initial(dpo.reference_checkpoint, field).has_tokenizer
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    opened = open_checkpoint(dpo.reference_checkpoint, None if has_own else tokenizer_name, field, chat_template=template)
    if tokenizer_fingerprint(opened.tokenizer) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{field}={str(dpo.reference_checkpoint)!r} has another tokenizer ({len(opened.tokenizer)} tokens) than the "
            f"starting checkpoint ({len(tokenizer)} tokens)"
        )
    return opened.model


Prepare = Callable[[Policy, PreparedData, torch.dtype, RunLog], PreparedData]
"""What a stage does with the policy before its first step: (policy at the start, data, precision, log) → data."""
Conclude = Callable[[Loop], dict[str, float]]
"""What a stage measures at the end, its result on disk: (loop without optimizer state, the final weights in it) → metrics."""


def train_stage(
    stage: Stage,
    config: TrainingConfig,
    sections: Mapping[str, BaseModel],
    inputs: dict[str, Any],
    opened: Opened,
    data: PreparedData,
    objective: Objective,
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
        opened: where training starts.
        data: examples.
        objective: what is optimised.
        drop_out: whether the model's dropout is on.
        prepare: what to do before the first step, also of a resumed run; None: nothing.
        conclude: what to measure at the end; None: nothing.
        reference_weights: hash of another reference than the start, for the record.

    Raises:
        UserError: the output folder holds a run with other inputs; the difference is named.
    """
    began = time.monotonic()
    config = resolve(config, stage, distributed.world_size(), rows_per_epoch=data.train.epoch_size)
    assert config.max_steps is not None, "check_early has refused a stream without it"
    device = distributed.device()
    if device.type == "cpu":
        steady_memory()
    precision, why = choose_precision(config.mixed_precision, device)
    model, tokenizer = opened.model, opened.tokenizer
    record = {
        **_inputs(stage, {"train": config, **sections}, opened, data, precision),
        "reference": reference_weights,
        "tokenizer_name": opened.tokenizer_name,
    }
    assert config.output_dir is not None
    _check_model(stage, model, data, config)
    final = config.output_dir / f"{config.run_name}_final"
    with ExitStack() as lock:
        distributed.on_main(lock.enter_context)(only_writer(config.output_dir))
        found, damaged = agreed_checkpoint(final, record)
        if found == final:
            print(f"{config.run_name}: finished already: {final}", flush=True)
            return final
        state = None if found is None else load_state(found)
        policy, left_out = _make_policy(opened, config, data, device, drop_out, precision)
        with _open_log(config, 0 if state is None else state["step"]) as log:
            for note in (*(() if opened.initial is None else opened.initial.notes), *opened.notes):
                log.message(note)
            _describe(log, policy, data, config, f"{device} {why}", found, damaged)
            for line in describe_left_out(left_out):
                log.message(line)
            log.message(_compile(policy, stage, config, data, precision))
            data = data if prepare is None else prepare(policy, data, precision, log)
            if found is not None:
                _load_weights(model, found)
            manifest = {**record, "inputs": inputs, "key": key_of(inputs)}
            saver = Saver(model, tokenizer, manifest, config, log, opened.adapter_base, found)
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
            if conclude is not None:
                loop.release()
                try:
                    values = conclude(loop)
                except Exception:
                    saver.final(final)  # what cannot be measured is kept all the same
                    raise
                # before the final checkpoint: a run that is killed in between measures again, one that has it is finished
                loop.log.log(loop.step, {f"eval/{name}": value for name, value in values.items()})
            saver.final(final)
            loop.log.message(f"saved {final}")
    except StorageError as error:
        raise StorageError(f"{error}; {saver.what_is_there()}: make room there, and run the same again") from error


def _inputs(
    stage: Stage,
    sections: Mapping[str, BaseModel],
    opened: Opened,
    data: PreparedData,
    precision: torch.dtype,
) -> dict[str, Any]:
    """What decides a run's result, for the record."""
    parent = opened.initial
    return {
        "stage": stage,
        "config": {name: plain(section) for name, section in sections.items()},
        "parent": None if parent is None else {"checkpoint": parent.name, "weights": opened.weights},
        "start_weights": opened.weights,
        "data": data.fingerprint(),
        # a stream's documents are dealt out to the ranks, so a position in it means something else with another number of them
        "ranks": distributed.world_size() if data.train.epoch_size is None else None,
        "tokenizer": tokenizer_fingerprint(opened.tokenizer),
        "contract": contract(opened.model, opened.tokenizer),
        "precision": str(precision).removeprefix("torch."),
    }


def _check_model(stage: Stage, model: PreTrainedModel, data: PreparedData, config: TrainingConfig) -> None:
    """Refuse what this model cannot do: settings of parts that it lacks, samples that are too long for it."""
    ParameterGroups(model).check(config)
    if config.balance_loss:
        check_routed(model)
    section = "dpo" if stage == "dpo" else "data"
    place = "dpo_config" if stage == "dpo" else "dataset_config"
    _check_lengths(model, data, f"{place}.max_length (in a pipeline file {stage}.{section}.max_length)")


def _check_lengths(model: PreTrainedModel, data: PreparedData, setting: str) -> None:
    """Refuse samples that are longer than what the model is made for; `setting` is what to change."""
    limit, longest, turns = context_length(model), data.longest, _angles_change_beyond(model.config)
    if turns is not None and longest > turns:
        raise UserError(
            f"{setting}: a sample has {longest} tokens, but the angles of this model's positions change for all samples of a "
            f"row where one has more than {turns}: lower it to {turns}"
        )
    if limit is not None and longest > limit:
        raise UserError(
            f"{setting}: a sample has {longest} tokens, but the context length of the model is {limit} "
            f"(max_position_embeddings): lower it to {limit}"
        )


def _angles_change_beyond(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which a sample changes the angles of all others in its batch (RoPE types dynamic and longrope)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    turning = [p for p in kinds if p.get("rope_type") in ("dynamic", "longrope")]
    return min((p.get("original_max_position_embeddings") or config.max_position_embeddings for p in turning), default=None)


def _add_adapter(opened: Opened, config: TrainingConfig, drop_out: bool) -> dict[str, str]:
    """Put the run's adapters into the model, and return the layers that get none, each with the reason.

    Raises:
        UserError: a setting that would have no effect with them.
    """
    assert config.adapter is not None
    assert opened.adapter is not None
    if config.adapter.dropout and not drop_out:
        raise UserError(
            f"adapter.dropout={config.adapter.dropout} has no effect where disable_dropout switches all dropout off: leave it "
            f"out, or set dpo_config.disable_dropout: false"
        )
    left_out = add_adapter(opened.model, opened.adapter, config.seed, opened.token_rows)
    ParameterGroups(opened.model).check(config)
    return left_out


def _load_weights(model: PreTrainedModel, found: Path) -> None:
    """What trains, from a periodic checkpoint."""
    if adapter_layers(model):
        load_adapter_weights(model, found)
    else:
        model.load_state_dict(load_model(found).state_dict())


def _make_policy(
    opened: Opened,
    config: TrainingConfig,
    data: PreparedData,
    device: torch.device,
    drop_out: bool,
    precision: torch.dtype,
) -> tuple[Policy, dict[str, str]]:
    """The model as it trains, and the layers that are asked for and get no adapter, each with the reason."""
    model = opened.model
    left_out = {} if config.adapter is None else _add_adapter(opened, config, drop_out)
    model.to(device)  # type: ignore[arg-type]
    if not drop_out:
        disable_dropout(model)
    policy = Policy(model, config.attention)
    policy.check_rows(longest_rows(data, config, vocabulary_rows(model)))
    if not drop_out:
        refuse_random_training(policy)
    if opened.adapter is not None:
        left_out |= take_out_idle_adapters(policy, opened.adapter, data.longest)
    if opened.continued is not None:
        load_adapter_weights(model, opened.continued)
    if config.gradient_checkpointing:
        recompute_activations(model, config.checkpointed_share)
    if config.adapter is not None and precision != torch.float32:
        keep_frozen_in(model, precision)  # last: the checks above run without autocast
    return policy, left_out


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
