"""What a run will need before anything is trained: parameters, tokens, FLOPs, memory, disk, time. `modern-llm plan`."""

import math
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from modern_llm import distributed
from modern_llm.config import PipelineConfig, TrainingConfig, UserError, resolve
from modern_llm.config.commands import DPOArguments, PretrainArguments, SFTArguments
from modern_llm.config.training import Stage
from modern_llm.data.tokenizer import save_tokenizer
from modern_llm.limits import matmul_limit
from modern_llm.models.flops import training_cost
from modern_llm.precision import choose_precision
from modern_llm.report.memory import NOT_MEASURED, Bytes, Correction, Estimate, Machine, machine_memory, resident_bytes
from modern_llm.report.rehearsal import (
    NotMeasuredError,
    Rehearsed,
    arguments_for_rehearsal,
    asks_reference,
    prepare,
    rehearse,
    rows_for,
)
from modern_llm.report.rows import pipeline_tokenizer
from modern_llm.report.survey import Survey, model_of_shapes

ROOM = 0.9
"""Share of the free memory that `fit` fills: the rest is for what no count of tensors knows."""
SECONDS = 20.0
"""How long the measurements of all stages may take, from when model and data are loaded."""
LEAST_STEPS, MOST_STEPS = 6, 60
"""Optimizer steps that are tried, of which the second half is measured; fewer where the time ends before."""
TRIED_SECONDS = 8.0
"""How long they should take together, where there is more time."""
CHECKED_ROWS = 3
"""Passes over an example before the first step: checks of the model's path, and the trial batch."""
EXPECTED_SHARE = 0.3
"""Share of the machine's limit by which all that is foreseen."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage will need."""

    stage: Stage
    model: str
    """Its class."""
    parameters: int
    trained_parameters: int
    examples: int | None
    """Sequences or pairs of an epoch. None: a stream."""
    tokens: int
    """That go through the model, over all ranks; a shared prompt counts once."""
    steps: int
    """Optimizer steps."""
    batch_size: int
    micro_batch_size: int | None
    """None: `micro_batch_tokens` decides."""
    largest_micro_batch_tokens: int
    flops: float
    """Needed for training, over all ranks."""
    peak_bytes: int
    """Memory of each process at its highest point."""
    peak_bytes_by_shapes: int
    """The same without measurement."""
    memory: Bytes
    """Part → bytes at that point, adding up to `peak_bytes`."""
    fits: bool
    ways_out: dict[str, int]
    """Where it does not fit: setting → the bytes it would come to."""
    disk: Bytes
    """Part → bytes that checkpoints take where most of them are there."""
    seconds: dict[str, float]
    """Part → expected seconds; empty where nothing was measured."""
    mfu: float | None
    """Of the measured steps."""
    not_measured: str | None
    """Why not."""
    measured_rows: int = 0
    """Examples of the measured steps."""
    measured_steps: int = 0
    """How many steps those were."""
    spread: float | None = None
    """Half of the range of their rates, over the mean. None: of one step, or of none."""


@dataclass(frozen=True)
class Plan:
    """What a pipeline will need, on this machine."""

    device: str
    ranks: int
    machine: Machine
    disk_free_bytes: int
    precision: str
    limit: float
    """FLOP/s of the best matrix product."""
    stages: list[StagePlan] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """Memory of the stage that takes most."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """Of all checkpoints."""
        return sum(sum(stage.disk.values()) for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Expected seconds of all stages. None: not all were measured."""
        return sum(sum(s.seconds.values()) for s in self.stages) if all(s.seconds for s in self.stages) else None


def plan(config: PipelineConfig, measure: bool = True, fit: bool = False, ranks: int = 1, seconds: float = SECONDS) -> Plan:
    """Plan every stage of a pipeline. Its data is prepared and kept for the run; nothing else is left behind.

    Args:
        config: the pipeline.
        measure: run some optimizer steps of each stage on the first rows of its data, in a process of their own. Where the
            memory that the shapes foresee is not there, they are left out.
        fit: choose each stage's `micro_batch_size` anew: the largest that fits.
        ranks: processes that will train together. Only one is measured, without what they say to each other.
        seconds: how long the measurements may take together, from when model and data are loaded.

    Raises:
        UserError: a config, file or name that the user can put right.
    """
    device = distributed.device()
    stages: list[Stage] = [name for name in ("pretrain", "sft", "dpo") if getattr(config, name) is not None]  # type: ignore
    precision, _ = choose_precision(config.training(stages[0]).mixed_precision, device)
    place = config.output_dir.absolute()
    while not place.exists():
        place = place.parent
    whole = Plan(
        device=str(device),
        ranks=ranks,
        machine=machine_memory(device),
        disk_free_bytes=shutil.disk_usage(place).free,
        precision=str(precision).removeprefix("torch."),
        limit=matmul_limit(device, precision),
    )
    with tempfile.TemporaryDirectory(prefix="modern-llm-plan-") as folder:
        scratch = Path(folder)
        began = time.perf_counter()
        tokenizer = pipeline_tokenizer(config)
        trains_tokenizer = config.pretrain is not None and config.pretrain.train.tokenizer_name is None
        tokenizer_seconds = time.perf_counter() - began if trains_tokenizer else 0.0
        save_tokenizer(tokenizer, scratch / "tokenizer")
        start = None if config.start_checkpoint is None else str(config.start_checkpoint)
        for stage in stages:
            planner = _Planner(config, stage, tokenizer, scratch, start, whole)
            found = planner.plan(measure, fit, seconds / len(stages))
            if stage == "pretrain" and found.seconds:
                found.seconds["opening"] += tokenizer_seconds
            whole.stages.append(found)
            start = planner.checkpoint or start
    return whole


class _Planner:
    """One stage of a pipeline."""

    def __init__(
        self,
        config: PipelineConfig,
        stage: Stage,
        tokenizer: PreTrainedTokenizerFast,
        scratch: Path,
        start: str | None,
        whole: Plan,
    ) -> None:
        self.stage: Stage = stage
        self.start, self.scratch, self.whole = start, scratch / stage, whole
        self.checkpoint: str | None = None
        """Where the measured steps left one."""
        section = getattr(config, stage)
        given = config.training(stage)
        self.arguments = _arguments(stage, section, given, start or "", str(scratch / "tokenizer"))
        self.data = prepare(stage, self.arguments, tokenizer)
        self.data_config = section.data
        self.config = resolve(given, stage, whole.ranks, self.data.train.epoch_size)
        if self.config.micro_batch_size is not None:  # no pass is larger than what one process has of a step
            self.config = self._with_micro_batch(min(self.config.micro_batch_size, self._share()))
        if self.config.max_steps is None:
            raise UserError("max_steps is required with streaming: how long a pass over the data is shows only at its end")
        device = distributed.device()
        self.precision, _ = choose_precision(self.config.mixed_precision, device)
        self.limit = matmul_limit(device, self.precision)
        self.model = model_of_shapes(config, tokenizer, self.config, self.precision)
        self.survey = Survey(self.data, self.config, training_cost(self.model))
        self.process = 0 if device.type == "cuda" else resident_bytes()
        self.asks_reference = stage == "dpo" and asks_reference(section.dpo)
        self.second_model = stage == "dpo" and (section.dpo.sync_ref_model or section.dpo.reference_checkpoint is not None)

    def plan(self, measure: bool, fit: bool, seconds: float) -> StagePlan:
        """The whole of it."""
        tries = 3 if fit else 1
        if fit and self.config.micro_batch_tokens is not None:
            raise UserError(f"micro_batch_tokens={self.config.micro_batch_tokens} decides the micro-batches: leave out --fit")
        correction, rehearsed, reason = NOT_MEASURED, None, None if measure else "asked to leave it out"
        if fit:
            self.config = self._with_micro_batch(self._largest_that_fits(correction))
        for attempt in range(tries if measure else 0):
            rehearsed, reason = self._rehearse(self.scratch / str(attempt), seconds / tries)
            if rehearsed is None:
                break
            correction = self._correction(rehearsed)
            better = self._largest_that_fits(correction) if fit else self.config.micro_batch_size
            if better == self.config.micro_batch_size:
                break
            self.config = self._with_micro_batch(better)
        return self._summary(correction, rehearsed, reason)

    def _share(self) -> int:
        """The most sequences or pairs of a step that one process has."""
        assert self.config.batch_size is not None
        return math.ceil(self.config.batch_size / self.whole.ranks)

    def _with_micro_batch(self, size: int | None, **changes: Any) -> TrainingConfig:
        """The same run in other micro-batches."""
        assert size is not None
        steps = math.ceil(self._share() / size)
        return self.config.model_copy(update={"micro_batch_size": size, "gradient_accumulation_steps": steps, **changes})

    def _estimate(self, config: TrainingConfig) -> Estimate:
        return Estimate(self.model, config, self.precision, self.process, self.second_model)

    def _memory(self, config: TrainingConfig, correction: Correction) -> Bytes:
        """What is in memory at the highest point."""
        estimate = self._estimate(config)
        load = self.survey.largest(config.micro_batch_size, config.gradient_accumulation_steps or 1, self.stage == "dpo")
        copies = self._periodic_checkpoints() or self.config.keep_best
        is_copied = copies and distributed.device().type == "cpu"  # a GPU's is copied to the host
        return {**estimate.during_pass(load, correction), "checkpoint": estimate.copy_bytes if is_copied else 0}

    def _peak(self, config: TrainingConfig, correction: Correction) -> int:
        return sum(self._memory(config, correction).values())

    def _periodic_checkpoints(self) -> int:
        assert self.config.max_steps is not None
        assert isinstance(self.config.save_every, int)
        return (self.config.max_steps - 1) // self.config.save_every

    def _largest_that_fits(self, correction: Correction) -> int:
        """The largest micro-batch that divides the process's share of the batch and fits; 1 if none does."""
        share, room = self._share(), ROOM * self.whole.machine.available
        sizes = [size for size in range(share, 0, -1) if share % size == 0]
        return next((size for size in sizes if self._peak(self._with_micro_batch(size), correction) <= room), 1)

    def _rehearse(self, folder: Path, seconds: float) -> tuple[Rehearsed | None, str | None]:
        """Measure some optimizer steps, or say why not."""
        if self._peak(self.config, NOT_MEASURED) > self.whole.machine.available:
            return None, "it does not fit, as far as its shapes tell"
        if self.stage != "pretrain" and not self.start:
            return None, "the stage that it starts from was not measured"
        share = self._share()
        micro = self.config.micro_batch_size
        if micro is None:
            micro = max(1, int((self.config.micro_batch_tokens or 0) / self.survey.mean_tokens))
        accumulation = -(-share // micro)
        row_seconds = self.survey.flops / (self.limit * EXPECTED_SHARE) * (4 / 3 if self.asks_reference else 1)
        affordable = max(1, int(seconds / row_seconds) - CHECKED_ROWS)
        micro = min(micro, max(1, affordable // LEAST_STEPS))
        batch_size = min(share, micro * min(accumulation, max(1, affordable // (LEAST_STEPS * micro))))
        foreseen = batch_size * row_seconds
        steps = min(max(math.ceil(min(TRIED_SECONDS, seconds / 2) / foreseen), LEAST_STEPS), MOST_STEPS)
        steps = min(steps, max(2, affordable // batch_size))
        rows = rows_for(steps * batch_size, self.data, list(self.data_config.sources()))
        config = self.config if self.config.micro_batch_size is None else self._with_micro_batch(micro)
        short = arguments_for_rehearsal(self.arguments, config, self.data_config, rows, folder, steps, batch_size)
        try:
            rehearsed = rehearse(self.stage, short, folder, seconds)
        except NotMeasuredError as error:
            return None, str(error)
        self.checkpoint = str(folder / "run" / f"{self.stage}_final")
        return rehearsed, None

    def _correction(self, rehearsed: Rehearsed) -> Correction:
        """Learn from what was measured."""
        self.process = rehearsed.process_bytes
        tokens = rehearsed.largest_tokens
        load = self.survey.largest(rehearsed.micro_batch_size, 1, self.stage == "dpo")
        seen = type(load)(
            tokens, round(tokens * self.survey.predicted_share), load.longest, rehearsed.several, self.stage == "dpo"
        )
        return self._estimate(self.config).correction(seen, rehearsed.peak_bytes)

    def _summary(self, correction: Correction, rehearsed: Rehearsed | None, reason: str | None) -> StagePlan:
        assert self.config.batch_size is not None
        assert self.config.max_steps is not None
        memory = self._memory(self.config, correction)
        peak = sum(memory.values())
        fits = peak <= self.whole.machine.available
        load = self.survey.largest(self.config.micro_batch_size, self.config.gradient_accumulation_steps or 1, False)
        parameters = list(self.model.parameters())
        return StagePlan(
            stage=self.stage,
            model=type(self.model).__name__,
            parameters=sum(p.numel() for p in parameters),
            trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            examples=self.survey.epoch_size,
            tokens=round(self.survey.drawn * self.survey.mean_tokens),
            steps=self.config.max_steps,
            batch_size=self.config.batch_size,
            micro_batch_size=self.config.micro_batch_size,
            largest_micro_batch_tokens=load.tokens,
            flops=self.survey.drawn * self.survey.flops,
            peak_bytes=peak,
            peak_bytes_by_shapes=self._peak(self.config, NOT_MEASURED),
            memory={part: size for part, size in memory.items() if size},
            fits=fits,
            ways_out={} if fits else self._ways_out(correction),
            disk=self._disk(rehearsed),
            seconds={} if rehearsed is None else self._seconds(rehearsed),
            mfu=None if rehearsed is None else rehearsed.flops_per_second / self.limit,
            not_measured=reason,
            measured_rows=0 if rehearsed is None else rehearsed.rows,
            measured_steps=0 if rehearsed is None else rehearsed.steps,
            spread=None if rehearsed is None else rehearsed.spread,
        )

    def _ways_out(self, correction: Correction) -> dict[str, int]:
        """Settings that take less memory, one at a time, and what each would come to."""
        config = self.config
        found: dict[str, TrainingConfig] = {}
        if config.micro_batch_tokens is None and (size := self._largest_that_fits(correction)) != config.micro_batch_size:
            found[f"micro_batch_size: {size}"] = self._with_micro_batch(size)
        if not config.gradient_checkpointing:
            found["gradient_checkpointing: true"] = config.model_copy(update={"gradient_checkpointing": True})
        if config.optimizer != "adamw_8bit":
            found["optimizer: adamw_8bit"] = config.model_copy(update={"optimizer": "adamw_8bit"})
        if config.micro_batch_tokens is None and not config.gradient_checkpointing:
            together = {"gradient_checkpointing": True, "optimizer": "adamw_8bit"}
            found["micro_batch_size: 1, gradient_checkpointing: true, optimizer: adamw_8bit"] = self._with_micro_batch(
                1, **together
            )
        return {setting: self._peak(changed, correction) for setting, changed in found.items()}

    def _disk(self, rehearsed: Rehearsed | None) -> Bytes:
        """What checkpoints take at most: weights (of adapters, only theirs), and, to resume from, the training state."""
        held = self._estimate(self.config).held
        final = 4 * sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        final = held["weights"] if self.config.adapter is None else final
        if rehearsed is not None:
            final = rehearsed.checkpoint_bytes
        there = self._periodic_checkpoints()
        if self.config.keep_checkpoints is not None:
            there = min(there, self.config.keep_checkpoints + 1)  # the oldest goes when the new one is whole
        best = {} if self.config.keep_best is None else {"best": final}
        return {"final": final, **best, "periodic": there * (final + held["optimizer"] + held["average"])}

    def _seconds(self, rehearsed: Rehearsed) -> dict[str, float]:
        """Part → seconds. A pass without gradient takes a third of one with it."""
        ranks, rate, survey = self.whole.ranks, rehearsed.flops_per_second, self.survey
        evaluations = 0
        if survey.evaluated:
            assert self.config.max_steps is not None
            every = self.config.eval_every if isinstance(self.config.eval_every, int) else self.config.max_steps
            evaluations = -(-self.config.max_steps // every) + self.config.eval_at_start
        held = self._estimate(self.config).held
        state = (held["optimizer"] + held["average"]) / max(1, rehearsed.checkpoint_bytes)
        found = {
            "opening": rehearsed.opening_seconds,
            "steps": survey.drawn * survey.mean_tokens / rehearsed.tokens_per_second / ranks,
            "evaluations": evaluations * survey.evaluated * survey.flops / 3 / rate,
            "checkpoints": rehearsed.saving_seconds * (1 + self._periodic_checkpoints() * (1 + state)),
        }
        if self.asks_reference:
            asked = min(survey.epoch_size or 0, survey.drawn) + survey.evaluated
            found["reference"] = rehearsed.reference_seconds * asked / ranks
        return found


def _arguments(stage: Stage, section: Any, train: TrainingConfig, start: str, tokenizer: str) -> BaseModel:
    """A pipeline's section as the arguments of its stage."""
    if stage == "pretrain":
        model = section.model
        if train.tokenizer_name is None:
            model = model.model_copy(update={"vocab_size": None})  # small texts fill a smaller vocabulary
        given = {"model_config": model, "train_config": train, "dataset_config": section.data, "tokenizer_name": tokenizer}
        return PretrainArguments.model_validate(given)
    if stage == "sft":
        return SFTArguments(pretrain_checkpoint=start, train_config=train, dataset_config=section.data)
    return DPOArguments(sft_checkpoint=start, train_config=train, dpo_config=section.dpo, preference_config=section.data)
