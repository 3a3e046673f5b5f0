"""Opening and closing a run: what it is made of, whether it is done or begun, and what it leaves behind."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm import distributed
from modern_llm.allocator import steady_memory
from modern_llm.checkpoint import best_folder, load_state, verified
from modern_llm.config import DPOConfig, TrainingConfig, UserError, resolve
from modern_llm.config.io import plain
from modern_llm.config.training import Stage
from modern_llm.data.loader import visited
from modern_llm.data.prepared import Example, Mixture, PreparedData
from modern_llm.data.tokenizer import tokenizer_fingerprint
from modern_llm.exit_codes import Stopped, StorageError
from modern_llm.initial.checkpoint import load_model, read_initial
from modern_llm.initial.handoff import contract
from modern_llm.initial.opened import Opened, open_checkpoint
from modern_llm.lock import only_writer
from modern_llm.metrics import RunLog
from modern_llm.models.adapter_folders import load_adapter_weights
from modern_llm.models.adapters import adapter_layers, add_adapter, describe_left_out, keep_frozen_in
from modern_llm.models.compilation import compile_layers
from modern_llm.models.idle_adapters import take_out_idle_adapters
from modern_llm.models.policy import Policy, disable_dropout, refuse_random_training, vocabulary_rows
from modern_llm.models.recomputation import recompute_activations
from modern_llm.objectives import Objective
from modern_llm.precision import choose_precision
from modern_llm.training.answers import Answers
from modern_llm.training.checks import check_model, check_run
from modern_llm.training.inputs import key_of
from modern_llm.training.loop import Loop
from modern_llm.training.optim import ParameterGroups
from modern_llm.training.preflight import longest_rows, preflight, trial_examples
from modern_llm.training.resume import agreed_checkpoint
from modern_llm.training.saving import Saver
from modern_llm.training.speed import foreseen_seconds
from modern_llm.training.stopping import StopRequest


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


class Reference(Protocol):
    """What a stage compares its policy with."""

    def look(self, policy: Policy, examples: list[Example], precision: torch.dtype) -> list[Example]:
        """A few examples with what it says of them."""
        ...

    def ask(self, policy: Policy, data: PreparedData, visited: np.ndarray, precision: torch.dtype, log: RunLog) -> PreparedData:
        """The data with what it says of the training examples of these numbers and of all that are held out.

        The policy is as it begins.
        """
        ...


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
    reference: Reference | None = None,
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
        reference: asked before the first step, also of a resumed run. None: the objective needs none.
        conclude: what to measure at the end; None: nothing.
        reference_weights: hash of another reference than the start, for the record.

    Raises:
        UserError: the output folder holds a run with other inputs; the difference is named.
    """
    began = time.monotonic()
    config = resolve(config, stage, distributed.world_size(), rows_per_epoch=data.train.epoch_size)
    check_run(config, data)
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
    check_model(stage, model, data, config)
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
            log.messages(opened.all_notes)
            _describe(log, policy, data, config, f"{device} {why}", found, damaged)
            log.messages(describe_left_out(left_out))
            log.message(_compile(policy, stage, config, data, precision))
            manifest = {**record, "inputs": inputs, "key": key_of(inputs)}
            saver = Saver(model, tokenizer, manifest, config, log, opened.adapter_base, found)
            answer = partial(Answers(data, tokenizer, config, precision, log).write, policy)
            saves = (saver.checkpoint, saver.check, saver.best)
            loop = Loop(policy, objective, data, config, precision, log, *saves, answer)
            if state is None:
                trial = trial_examples(data, config)
                trial = reference.look(policy, trial, precision) if reference else trial
                preflight(policy, loop.objective, trial, tokenizer, precision, config, log)
            loop.data = reference.ask(policy, data, _visited(data, config), precision, log) if reference else data
            if found is not None and state is not None:
                _load_weights(model, found)
                loop.load(state)
            with saver, StopRequest(config.max_minutes, began) as stop:
                _run(loop, saver, final, stop, conclude)
    return final


def _visited(data: PreparedData, config: TrainingConfig) -> np.ndarray:
    """Numbers of the training examples that the run will draw, in order."""
    assert isinstance(data.train, Mixture)
    assert config.batch_size is not None
    assert config.max_steps is not None
    return visited(data.train, config.batch_size, config.seed, config.max_steps)


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
        with _chosen_weights(loop, saver) as step:
            if conclude is not None:
                loop.release()
                try:
                    values = conclude(loop)
                except Exception:
                    saver.final(final, step)  # what cannot be measured is kept all the same
                    raise
                # before the final checkpoint: a run that is killed in between measures again, one that has it is finished
                loop.log.log(step, {f"eval/{name}": value for name, value in values.items()})
            saver.final(final, step)
            loop.log.message(f"saved {final}")
    except StorageError as error:
        raise StorageError(f"{error}; {saver.what_is_there()}: make room there, and run the same again") from error


@contextmanager
def _chosen_weights(loop: Loop, saver: Saver) -> Iterator[int]:
    """Inside, the model has the weights that the run ends with: of its best evaluation, or the last (averaged) ones."""
    best = loop.best.step
    if loop.config.keep_best is None or best in (None, loop.step):
        with loop.averaged_weights():
            yield loop.step
        return
    saver.finish(must=True)
    folder = best_folder(saver.folder, best)
    distributed.together(verified)(folder)
    distributed.together(_load_weights)(loop.policy.model, folder)
    loop.log.message(f"the final checkpoint has the weights of step {best}, its best eval/{loop.best.metric}")
    yield best


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
