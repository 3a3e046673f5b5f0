"""Pretrain → SFT → DPO in one call: each stage starts from the checkpoint of the one before, then all are measured."""

import time
from dataclasses import dataclass
from pathlib import Path

from modern_llm import distributed
from modern_llm.config import PipelineConfig
from modern_llm.config.io import plain
from modern_llm.config.training import Stage
from modern_llm.evaluation.stages import held_out, measure
from modern_llm.report.table import show, write_report
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

__all__ = ["PipelineConfig", "PipelineResult", "run_pipeline"]


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline leaves behind."""

    checkpoints: dict[Stage, Path]
    """Final checkpoint of every stage that ran."""
    metrics: dict[str, dict[str, float]]
    """Stage → metric → value, on held-out data; on the main rank."""
    report: Path
    """The table as Markdown; `results.json` beside it holds everything."""


def run_pipeline(pipeline_config: PipelineConfig) -> PipelineResult:
    """Run every stage of the config in order, measure each checkpoint, print a table.

    A stage whose checkpoint exists with the same inputs is not run again.

    Raises:
        UserError: a config, file or name that the user can put right.
    """
    with distributed.process_group():  # joined once for all stages
        return _run(pipeline_config)


def _run(config: PipelineConfig) -> PipelineResult:
    start: Path | str | None = config.start_checkpoint
    checkpoints: dict[Stage, Path] = {}
    began = time.perf_counter()
    if config.pretrain is not None:
        train = config.training("pretrain")
        checkpoints["pretrain"] = start = run_training(config.pretrain.model, train, config.pretrain.data)
    assert start is not None, "the config demands pretraining or a start"
    if config.sft is not None:
        train = config.training("sft")
        checkpoints["sft"] = start = run_sft(start, train, config.sft.data)
    before_dpo = start
    if config.dpo is not None:
        train = config.training("dpo")
        checkpoints["dpo"] = run_dpo(start, train, config.dpo.dpo, config.dpo.data)
    training_seconds = time.perf_counter() - began
    return _measure_all(config, checkpoints, before_dpo, training_seconds)


def _measure_all(
    config: PipelineConfig, checkpoints: dict[Stage, Path], before_dpo: Path | str, training_seconds: float
) -> PipelineResult:
    """Measure every checkpoint and write the report, on the main rank."""
    metrics: dict[str, dict[str, float]] = {}
    report = config.output_dir / "results.md"
    if distributed.is_main():
        data = held_out(config, next(iter(checkpoints.values())))  # one tokenizer for the whole chain
        for stage, checkpoint in checkpoints.items():
            metrics[stage] = measure(checkpoint, None if stage == "pretrain" else before_dpo, data, config)
        show(metrics)
        write_report(
            report,
            {
                "config": plain(config),
                "checkpoints": {stage: str(path) for stage, path in checkpoints.items()},
                "stages": metrics,
                "baselines": data.baselines,
                "training_seconds": round(training_seconds, 1),
            },
        )
        for stage, path in checkpoints.items():
            print(f"{stage:>9}  {path}")
        print(f"{'table':>9}  {report}")
    distributed.barrier()
    return PipelineResult(checkpoints, metrics, report)
