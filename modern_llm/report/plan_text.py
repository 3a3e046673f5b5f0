"""A plan as people read it, or as JSON."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from modern_llm.metrics import duration
from modern_llm.report.plan import Plan, StagePlan


def show(plan: Plan, as_json: bool, console: Console | None = None) -> None:
    """Print a plan.

    Args:
        plan: what was found.
        as_json: print one JSON object.
        console: where to print.
    """
    console = console or Console(soft_wrap=True)
    if as_json:
        whole = {"peak_bytes": plan.peak_bytes, "disk_bytes": plan.disk_bytes, "seconds": plan.seconds}
        console.print(json.dumps({**asdict(plan), **whole}), soft_wrap=True, highlight=False, markup=False)
        return
    console.print(
        f"{plan.device}: {gigabytes(plan.machine.total)} of memory, {gigabytes(plan.machine.available)} of it free; "
        f"{gigabytes(plan.disk_free_bytes)} of disk free; limit {plan.limit / 1e9:,.0f} GFLOP/s {plan.precision}",
        highlight=False,
    )
    for stage in plan.stages:
        table = Table(title=f"\n{stage.stage}", title_justify="left", show_header=False)
        for name, text in lines(stage, plan.ranks).items():
            table.add_row(name, text)
        console.print(table)
    verdict = "fits" if all(stage.fits for stage in plan.stages) else "[bold red]does not fit[/bold red]"
    spent = "" if plan.seconds is None else f", {duration(plan.seconds)}"
    console.print(
        f"together: {gigabytes(plan.peak_bytes)} at most, {gigabytes(plan.disk_bytes)} of disk{spent}; {verdict}",
        highlight=False,
    )
    if plan.disk_bytes > plan.disk_free_bytes:
        console.print(
            "[bold red]the disk is too small[/bold red]: set keep_checkpoints (for example 2), or raise save_every",
            highlight=False,
        )


def lines(stage: StagePlan, ranks: int) -> dict[str, str]:
    """What is said of a stage: subject → sentence."""
    trained = (
        "" if stage.trained_parameters == stage.parameters else f", {stage.trained_parameters / 1e6:,.2f}M of them trained"
    )
    epoch = "a stream" if stage.examples is None else f"{stage.examples:,} examples an epoch"
    micro = "as many as fit" if stage.micro_batch_size is None else f"{stage.micro_batch_size}"
    said = {
        "model": f"{stage.model}, {stage.parameters / 1e6:,.2f}M parameters{trained}",
        "data": f"{epoch}, {stage.tokens:,} tokens in {stage.steps:,} steps of {stage.batch_size}",
        "micro-batch": f"{micro} on each of {ranks} processes, at most {stage.largest_micro_batch_tokens:,} tokens",
        "work": f"{stage.flops / 1e12:,.2f} TFLOP",
        "memory": f"{gigabytes(stage.peak_bytes)} at its highest: {_parts(stage.memory, gigabytes)}",
        "disk": f"{gigabytes(sum(stage.disk.values()))} of checkpoints: {_parts(stage.disk, gigabytes)}",
    }
    if stage.seconds:
        said["time"] = f"{duration(sum(stage.seconds.values()))}, mfu {stage.mfu or 0:.1%}: {_parts(stage.seconds, duration)}"
    else:
        said["time"] = f"not measured: {stage.not_measured}"
    if not stage.fits:
        ways = [f"{setting} ({gigabytes(size)})" for setting, size in stage.ways_out.items()]
        said["too large"] = "one of: " + "; ".join([*ways, "a smaller max_length", "adapter, in sft and dpo"])
    return said


def gigabytes(size: float) -> str:
    """Of 2^30 bytes."""
    return f"{size / 2**30:.2f} GiB"


def _parts(parts: dict, unit) -> str:
    return ", ".join(f"{name} {unit(value)}" for name, value in parts.items() if value)
