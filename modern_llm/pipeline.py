"""Pretrain → SFT → DPO in one call: each stage starts from the checkpoint of the one before, and is measured when it is done.

It is a build system: a stage whose inputs are the same as those of a result that is there is not run again.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modern_llm import distributed
from modern_llm.checkpoint import write_text
from modern_llm.config import PipelineConfig, StrictModel, TrainingConfig
from modern_llm.config.commands import check_pipeline
from modern_llm.config.io import plain, read_json
from modern_llm.config.training import Stage
from modern_llm.evaluation.stages import HeldOut, held_out, measure
from modern_llm.exit_codes import GateError, Stopped
from modern_llm.initial.checkpoint import identity
from modern_llm.report.table import show, write_report
from modern_llm.reuse import Decision, decide, place_of, settle
from modern_llm.secrets import record_without_secrets
from modern_llm.training.inputs import KINDS, code_version, content_of, deciding, libraries, stage_inputs
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

__all__ = ["PipelineConfig", "PipelineResult", "plan_pipeline", "run_pipeline"]


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline leaves behind."""

    checkpoints: dict[Stage, Path]
    """Final checkpoint of every stage that ran."""
    metrics: dict[str, dict[str, float]]
    """Stage → metric → value, on held-out data; on the main rank."""
    report: Path
    """The table as Markdown; `results.json` beside it holds everything."""


@dataclass
class _Progress:
    """What a running pipeline has so far."""

    config: PipelineConfig
    began: float = field(default_factory=time.monotonic)
    training_seconds: float = 0.0
    checkpoints: dict[Stage, Path] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    data: HeldOut | None = None
    """Read when the first stage is measured: one tokenizer serves the whole chain."""


def run_pipeline(pipeline_config: PipelineConfig) -> PipelineResult:
    """Run every stage of the config in order, measure each checkpoint, print a table.

    A stage whose inputs are those of a checkpoint in its folder is not run again. What another config left there is put into
    `superseded/`.

    Raises:
        UserError: a config, file or name that the user can put right.
        GateError: a stage's metric is outside its limit; the report is written, later stages did not run.
        Stopped: the run was asked to stop; the same call goes on.
    """
    every = [pipeline_config.training(stage).parallel for stage in pipeline_config.stages()]
    longest = max(every, key=lambda parallel: parallel.timeout_minutes)
    with distributed.process_group(longest):  # joined once for all stages
        check_pipeline(pipeline_config, distributed.world_size())
        progress = _Progress(pipeline_config)
        start: Path | str | None = pipeline_config.start_checkpoint
        missed: list[str] = []
        for stage in pipeline_config.stages():
            if missed and not distributed.main_decides(_is_finished)(pipeline_config, stage, start):
                break  # rows of later stages that are there stay in the table
            before, start = start, _run_stage(progress, stage, start)
            missed += filter(None, [distributed.main_decides(_measure)(progress, stage, before)])
        distributed.on_main(_report)(progress)
        if missed:
            raise GateError("\n".join(missed))
        return PipelineResult(progress.checkpoints, progress.metrics, _report_file(progress))


def plan_pipeline(pipeline_config: PipelineConfig) -> list[Decision]:
    """What `run_pipeline` would do with each stage, and why. Nothing is changed."""
    start: Path | str | None = pipeline_config.start_checkpoint
    found: list[Decision] = []
    for stage in pipeline_config.stages():
        if found and found[-1].action != "reuse":
            first = found[-1].stage
            why = f"{first} runs first; a result that is there is reused if {first} ends as before"
            found.append(Decision(stage, "train", why))
            continue
        found.append(_decide(pipeline_config, stage, start))
        start = found[-1].found
    return found


def _decide(config: PipelineConfig, stage: Stage, start: Path | str | None) -> Decision:
    train = config.training(stage)
    inputs = stage_inputs(stage, train, sections_of(config, stage), start, _own_tokenizer(stage, train))
    return decide(stage, train, inputs, config.ignore_code_changes)


def _is_finished(config: PipelineConfig, stage: Stage, start: Path | str | None) -> str:
    return "yes" if _decide(config, stage, start).action == "reuse" else ""


def sections_of(config: PipelineConfig, stage: Stage) -> dict[str, StrictModel]:
    """The configs of a stage besides how it is trained, as its function gets them."""
    section = getattr(config, stage)
    return {name: getattr(section, name) for name in ("model", "dpo", "data") if hasattr(section, name)}


def _own_tokenizer(stage: Stage, train: TrainingConfig) -> str | None:
    return train.tokenizer_name if stage == "pretrain" else None


def _run_stage(progress: _Progress, stage: Stage, start: Path | str | None) -> Path:
    """The stage's final checkpoint: one that is there, or a new one."""
    config, began = progress.config, time.perf_counter()
    train = _within_time(progress, stage)

    def decided() -> str:
        decision = _decide(config, stage, start)
        print(decision, flush=True)
        return str(settle(decision, train) or "")

    found = distributed.main_decides(decided)()
    final = Path(found) if found else _train(config, stage, train, start)
    progress.training_seconds += time.perf_counter() - began
    progress.checkpoints[stage] = final
    return final


def _within_time(progress: _Progress, stage: Stage) -> TrainingConfig:
    """The stage's training config with what is left of the pipeline's time.

    Raises:
        Stopped: nothing is left.
    """
    train, limit = progress.config.training(stage), progress.config.max_minutes
    if limit is None:
        return train
    mine = limit - (time.monotonic() - progress.began) / 60
    left = float(distributed.main_decides(str)(mine))  # one clock, or a rank may stop where the others go on
    if left <= 0:
        raise Stopped(f"max_minutes={limit:g}: stopped before {stage}")
    return train.model_copy(update={"max_minutes": min(left, train.max_minutes or left)})


def _train(config: PipelineConfig, stage: Stage, train: TrainingConfig, start: Path | str | None) -> Path:
    if stage == "pretrain":
        assert config.pretrain is not None
        return run_training(config.pretrain.model, train, config.pretrain.data)
    assert start is not None, "the config demands pretraining or a start"
    if stage == "sft":
        assert config.sft is not None
        return run_sft(start, train, config.sft.data)
    assert config.dpo is not None
    return run_dpo(start, train, config.dpo.dpo, config.dpo.data)


def _measure(progress: _Progress, stage: Stage, start: Path | str | None) -> str:
    """Measure a stage's checkpoint, or find what was measured before; returns a line for each gate that it misses.

    Args:
        progress: of the pipeline.
        stage: which stage.
        start: what it started from.
    """
    config, checkpoint = progress.config, progress.checkpoints[stage]
    # preference training is measured against its start; what came before it, against itself
    anchor = None if stage == "pretrain" else start if stage == "dpo" else checkpoint
    file = place_of(stage, config.training(stage))[0] / "evaluation.json"
    measured = _measured_of(config, checkpoint, anchor)
    known = _known(file, measured)
    if known is None:
        if progress.data is None:
            progress.data = held_out(config, checkpoint)
        known = {"of": measured, **asdict(measure(checkpoint, anchor, progress.data, config))}
        write_text(file, json.dumps(known, indent=2) + "\n")
    progress.metrics[stage], progress.baselines = known["metrics"], known["baselines"]
    return "\n".join(config.missed(stage, known["metrics"]))


def _measured_of(config: PipelineConfig, checkpoint: Path, anchor: Path | str | None) -> dict[str, Any]:
    """Everything that decides a checkpoint's metrics."""
    data = {}
    for stage in config.stages():
        sections = sections_of(config, stage)
        rows = content_of(getattr(config, stage).data, KINDS[stage])
        data[stage] = {**{name: deciding(section) for name, section in sections.items()}, "rows": rows}
    measured = {
        "checkpoint": identity(checkpoint),
        "anchor": None if anchor is None else identity(anchor),
        "evaluation": plain(config.evaluation),
        "data": data,
        "code": {"modern_llm": code_version("evaluation.stages"), **libraries()},
    }
    return record_without_secrets(measured)


def _known(file: Path, measured: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured before of the same things; None: nothing was."""
    try:
        content = read_json(file)
        return content if content["of"] == measured else None
    except (ValueError, KeyError, TypeError):  # never written, or damaged: measured again
        return None


def _report_file(progress: _Progress) -> Path:
    return progress.config.output_dir / "results.md"


def _report(progress: _Progress) -> None:
    """Print the table of what was measured and write the report."""
    show(progress.metrics)
    write_report(
        _report_file(progress),
        {
            "config": plain(progress.config),
            "checkpoints": {stage: str(folder) for stage, folder in progress.checkpoints.items()},
            "stages": progress.metrics,
            "baselines": progress.baselines,
            "training_seconds": round(progress.training_seconds, 1),
        },
    )
    for stage, folder in progress.checkpoints.items():
        print(f"{stage:>9}  {folder}")
    print(f"{'table':>9}  {_report_file(progress)}")
