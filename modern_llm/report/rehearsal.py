"""A few optimizer steps of a stage, for real: its own function on the first rows of its own data, in a folder that goes away.

They run in a process of their own (`python -m modern_llm.report.rehearsal`), so that its memory is that of such a run and of
nothing else, and a run that does not fit takes nothing with it.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modern_llm import distributed
from modern_llm.allocator import steady_memory
from modern_llm.config import DPOConfig, TrainingConfig, UserError
from modern_llm.config.commands import DPOArguments, PretrainArguments, SFTArguments
from modern_llm.config.data import DatasetConfig
from modern_llm.config.training import Stage
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.loader import StepBatch
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import PreparedData
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.data.tokenizer import TextEncoder, load_tokenizer
from modern_llm.initial.checkpoint import InitialCheckpoint, read_initial
from modern_llm.limits import matmul_limit
from modern_llm.models.policy import Policy
from modern_llm.precision import choose_precision
from modern_llm.report.memory import peak_resident_bytes, resident_bytes
from modern_llm.training import stage as stage_module
from modern_llm.training.best import Best
from modern_llm.training.loop import Loop
from modern_llm.training.stopping import StopRequest
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

KINDS: dict[Stage, type[BaseModel]] = {"pretrain": PretrainArguments, "sft": SFTArguments, "dpo": DPOArguments}
FOUND = "rehearsed "
"""Begins the line that a rehearsal answers with."""
ASKED = re.compile(r"reference log-probs of (\d+) pairs in ([\d.]+) s")
"""What preference training says of its reference."""
NEVER = 10**9
OUT_OF_TIME = 75
"""Exit code of a rehearsal that did no step in time."""


class NotMeasuredError(Exception):
    """A rehearsal gave no numbers, with the reason."""


class _OutOfTimeError(BaseException):
    """The time is over, and not one step is done. No part of a run may take it for an error of its own."""


class Rehearsed(BaseModel):
    """What some optimizer steps took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    process_bytes: int
    """Memory of the process before its first step, less that of its models."""
    peak_bytes: int
    """Memory at its largest: of the process, or of the GPU."""
    largest_tokens: int
    """Tokens of the largest micro-batch."""
    micro_batch_size: int | None
    """That it ran with."""
    rows: int
    """Examples of the measured steps."""
    steps: int
    """How many steps those were."""
    spread: float | None
    """Half of the range of their rates, over the mean. None: of one step."""
    several: bool
    """Whether a step had several micro-batches."""
    tokens_per_second: float
    """Of the measured steps."""
    flops_per_second: float
    """Needed FLOPs, of the measured steps."""
    opening_seconds: float
    """From the call of the stage function to its first step, with what the first steps take longer than the others."""
    reference_seconds: float = 0.0
    """For the reference's answers to one pair; 0 where none is asked."""
    saving_seconds: float
    """For the final checkpoint."""
    checkpoint_bytes: int
    """Size of it."""


def arguments_for_rehearsal(
    arguments: BaseModel, train: TrainingConfig, data: DatasetConfig, rows: int, folder: Path, num_steps: int, batch_size: int
) -> dict[str, Any]:
    """A stage's arguments for a few optimizer steps on the first rows of its data.

    Args:
        arguments: of the stage.
        train: resolved; what it sets besides length and folder stays.
        data: the stage's data set.
        rows: of each source.
        folder: where it may write.
        num_steps: at most.
        batch_size: sequences or pairs of a step.
    """
    short = {
        "batch_size": batch_size, "micro_batch_size": train.micro_batch_size and min(train.micro_batch_size, batch_size),
        "gradient_accumulation_steps": None, "max_steps": num_steps, "num_epochs": None,
        "warmup_steps": 0, "log_every": NEVER, "save_every": NEVER, "eval_every": None, "report_to": (), "run_name": None,
        "output_dir": folder / "run", "dataset_name": None, "eval_at_start": False, "keep_best": None, "early_stopping": None,
        "answer_prompts": 0, "report_answers": False,
    }  # fmt: skip
    sources = {
        name: source.model_copy(update={"max_rows": min(rows, source.max_rows or rows)})
        for name, source in data.sources().items()
    }
    nothing_held_out = {"eval_split": None, "eval_dataset": None, "eval_fraction": 0.0, "eval_fold": 0}
    sample = data.model_copy(update={"dataset_name": sources, "max_rows": None, **nothing_held_out})
    field = "preference_config" if isinstance(arguments, DPOArguments) else "dataset_config"
    changed = arguments.model_copy(update={"train_config": train.model_copy(update=short), field: sample})
    return changed.model_dump(mode="json", by_alias=True, exclude_unset=True)


def rehearse(stage: Stage, arguments: dict[str, Any], folder: Path, seconds: float) -> Rehearsed:
    """Run a stage in a process of its own.

    Args:
        stage: which.
        arguments: from `arguments_for_rehearsal`.
        folder: for all that it writes; the final checkpoint is `run/<stage>_final` in it.
        seconds: how long it may take from when model and data are loaded; no step begins that would not end in them.

    Raises:
        UserError: what the run itself would raise.
        NotMeasuredError: the system stopped the process, or no step was done in time.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment[CACHE_VARIABLE] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "modern_llm.report.rehearsal", stage, str(seconds)],
        input=json.dumps(arguments), env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == -9 or "torch.OutOfMemoryError" in done.stderr or "not enough memory" in done.stderr:
        raise NotMeasuredError("the system stopped the steps for want of memory")
    if done.returncode == OUT_OF_TIME:
        raise NotMeasuredError(f"the first step was not done in {seconds:g} s (--seconds)")
    if done.returncode == 2:
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError("\n".join(said))
    if done.returncode:
        raise RuntimeError(f"the rehearsal of {stage} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith(FOUND))
    found = Rehearsed.model_validate_json(line.removeprefix(FOUND))
    asked = ASKED.search(done.stdout)
    if asked is None:
        return found
    pairs, seconds = int(asked[1]), float(asked[2])
    opening = max(0.0, found.opening_seconds - seconds)
    return found.model_copy(update={"reference_seconds": seconds / pairs, "opening_seconds": opening})


def _perform(stage: Stage, arguments: Any, seconds: float) -> Rehearsed:
    """What the process does."""
    train: TrainingConfig = arguments.train_config
    _prepare_apart(stage, arguments)
    device = distributed.device()
    precision, _ = choose_precision(train.mixed_precision, device)
    if device.type == "cpu":
        steady_memory()  # as the stage will have it, before the first product
    matmul_limit(device, precision)  # measured before the clock starts
    _load_code(arguments)
    stage_module.Loop = _WatchedLoop  # type: ignore[misc] - this process does nothing else
    make_policy = stage_module._make_policy

    def loaded(*given: Any) -> Any:
        _WatchedLoop.deadline = time.monotonic() + seconds
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return make_policy(*given)

    stage_module._make_policy = loaded
    began = time.monotonic()
    if stage == "pretrain":
        final = run_training(arguments.model, train, arguments.dataset_config, arguments.tokenizer_name)
    elif stage == "sft":
        final = run_sft(arguments.pretrain_checkpoint, train, arguments.dataset_config, arguments.tokenizer_name)
    else:
        final = run_dpo(
            arguments.sft_checkpoint, train, arguments.dpo_config, arguments.preference_config, arguments.tokenizer_name
        )
    ended = time.monotonic()
    peak, process = peak_resident_bytes(), _WatchedLoop.held_before
    if device.type == "cuda":
        process, peak = 0, torch.cuda.max_memory_reserved(device)
    steps = _WatchedLoop.steps
    warm, measured = steps[: len(steps) // 2], steps[len(steps) // 2 :]  # of one step, that one
    tokens, flops, spent = (sum(values) for values in zip(*((s.tokens, s.flops, s.seconds) for s in measured), strict=True))
    rates = [step.flops / step.seconds for step in measured]
    excess = sum(step.seconds for step in warm) - sum(step.tokens for step in warm) * spent / tokens
    return Rehearsed(
        process_bytes=process,
        peak_bytes=peak,
        largest_tokens=max(step.largest for step in steps),
        micro_batch_size=train.micro_batch_size,
        rows=sum(step.rows for step in measured),
        steps=len(measured),
        spread=(max(rates) - min(rates)) / 2 / (flops / spent) if len(rates) > 1 else None,
        several=max(step.micro_batches for step in steps) > 1,
        tokens_per_second=tokens / spent,
        flops_per_second=flops / spent,
        opening_seconds=max(0.0, _WatchedLoop.began - began + excess),
        saving_seconds=ended - _WatchedLoop.ended,
        checkpoint_bytes=sum(path.stat().st_size for path in final.rglob("*") if path.is_file()),
    )


def _out_of_time(number: int, frame: FrameType | None) -> None:
    """Leave where not one step is done; else the loop looks at the time itself.

    Raises:
        _OutOfTimeError: none is.
    """
    if not _WatchedLoop.steps:
        raise _OutOfTimeError


def _prepare_apart(stage: Stage, arguments: Any) -> None:
    """Prepare the data in a process that ends: a run finds it prepared, and tokenizing may take more memory than its steps."""
    if child := os.fork():  # before torch has started any thread
        os.waitpid(child, 0)
        return
    try:
        prepare(stage, arguments, _tokenizer_of(arguments))
    finally:  # what goes wrong here goes wrong again, and is told, where the stage itself prepares its data
        os._exit(0)


def _tokenizer_of(arguments: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that a stage uses."""
    if isinstance(arguments, PretrainArguments):
        return load_tokenizer(arguments.tokenizer_name or "")
    data = arguments.preference_config if isinstance(arguments, DPOArguments) else arguments.dataset_config
    assert data is not None
    return _initial_of(arguments).tokenizer(arguments.tokenizer_name, data.chat_template).tokenizer


def _initial_of(arguments: Any) -> InitialCheckpoint:
    """What a stage begins from."""
    return read_initial(arguments.sft_checkpoint if isinstance(arguments, DPOArguments) else arguments.pretrain_checkpoint)


class _Step(NamedTuple):
    """What an optimizer step took."""

    rows: int
    tokens: int
    largest: int
    """Tokens of its largest micro-batch."""
    micro_batches: int
    flops: float
    seconds: float


class _UntilDeadline(Best):
    """Ends a run before a step that would not end in time."""

    @property
    def is_over(self) -> bool:
        steps = _WatchedLoop.steps
        return bool(steps) and time.monotonic() + max(s.seconds for s in steps[-3:]) > _WatchedLoop.deadline


class _WatchedLoop(Loop):
    """Looks at the memory before the first step, which opening a run leaves behind, and at the time of every step."""

    held_before = 0
    deadline = math.inf
    began = ended = 0.0
    steps: list[_Step] = []  # noqa: RUF012 - one loop runs in this process

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.best = _UntilDeadline(self.config)

    def _optimizer_step(self, batch: StepBatch) -> None:
        began, flops = time.monotonic(), self.speed.flops
        super()._optimizer_step(batch)
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        type(self).ended = time.monotonic()
        sizes = [micro_batch.row.num_tokens for micro_batch in batch.micro_batches]
        rows = sum(len(micro_batch.row_ids) for micro_batch in batch.micro_batches)
        spent = self.ended - began
        self.steps.append(_Step(rows, sum(sizes), max(sizes), len(sizes), self.speed.flops - flops, spent))

    def run(self, stop: StopRequest | None = None) -> None:
        second = getattr(self.objective, "live", None)
        models = [self.policy, *([second] if isinstance(second, Policy) else [])]
        tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
        type(self).began = time.monotonic()
        type(self).held_before = max(0, resident_bytes() - sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        super().run(stop)


def _load_code(arguments: Any) -> None:
    """Import what the model's class needs, so that it counts as the process and not as the model."""
    if isinstance(arguments, PretrainArguments):
        config = AutoConfig.for_model(arguments.model.architecture)
    else:
        config = _initial_of(arguments).config
    AutoModelForCausalLM._model_mapping[type(config)]  # type: ignore[attr-defined] - importing is all it does


def prepare(stage: Stage, arguments: Any, tokenizer: PreTrainedTokenizerFast) -> PreparedData:
    """The data of a stage, as its function prepares it.

    Args:
        stage: which.
        arguments: of the stage, with a data set.
        tokenizer: of the stage.
    """
    if isinstance(arguments, PretrainArguments):
        data = arguments.dataset_config
        assert data is not None
        return prepare_documents(
            data, TextEncoder(tokenizer), data.max_length or arguments.model.max_seq_len, arguments.train_config.seed
        )
    if isinstance(arguments, SFTArguments):
        assert arguments.dataset_config is not None
        return prepare_instructions(arguments.dataset_config, ChatEncoder(tokenizer))
    assert isinstance(arguments, DPOArguments)
    assert arguments.preference_config is not None
    return prepare_preferences(
        arguments.preference_config,
        arguments.dpo_config,
        ChatEncoder(tokenizer),
    )


def asks_reference(dpo: DPOConfig) -> bool:
    """Whether preference training asks a frozen reference for every pair before it begins."""
    return dpo.needs_reference and not dpo.sync_ref_model


def rows_for(examples: int, data: PreparedData, sources: Sequence[str]) -> int:
    """Rows of each source that surely hold so many examples."""
    rows, there = data.report.get("rows_read", 0), data.report.get("examples", 0)
    return math.ceil(1.5 * examples * max(1.0, rows / max(there, 1)) / len(sources)) + 8


def main() -> None:
    """`python -m modern_llm.report.rehearsal STAGE SECONDS`, with the arguments as JSON on standard input."""
    stage: Stage = sys.argv[1]  # type: ignore[assignment]
    try:
        found = _perform(stage, KINDS[stage].model_validate_json(sys.stdin.read()), float(sys.argv[2]))
    except _OutOfTimeError:
        os._exit(OUT_OF_TIME)  # a thread of torch may be at work
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # a shutdown takes the handler away, and then the alarm would kill
    print(FOUND + found.model_dump_json())


if __name__ == "__main__":
    main()
