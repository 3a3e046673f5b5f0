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
        f"{plan.device}: {memory_size(plan.machine.total)} of memory, {memory_size(plan.machine.available)} of it free; "
        f"{memory_size(plan.disk_free_bytes)} of disk free; limit {plan.limit / 1e9:,.0f} GFLOP/s {plan.precision}",
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
        f"together: {memory_size(plan.peak_bytes)} at most, {memory_size(plan.disk_bytes)} of disk{spent}; {verdict}",
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
        "memory": f"{memory_size(stage.peak_bytes)} at its highest: {_parts(stage.memory, memory_size)}",
        "disk": f"{memory_size(sum(stage.disk.values()))} of checkpoints: {_parts(stage.disk, memory_size)}",
    }
    if stage.seconds:
        said["time"] = f"{duration(sum(stage.seconds.values()))}, mfu {stage.mfu or 0:.1%}: {_parts(stage.seconds, duration)}"
        within = "one step: may be far off" if stage.spread is None else f"their rates within {stage.spread:.0%} of the mean"
        said["measured"] = f"{stage.measured_rows} examples in {stage.measured_steps} steps, {within}"
    else:
        said["time"] = "not measured"
        said["measured"] = f"from shapes only: {stage.not_measured}"
    if not stage.fits:
        ways = [f"{setting} ({memory_size(size)})" for setting, size in stage.ways_out.items()]
        said["too large"] = "one of: " + "; ".join([*ways, "a smaller max_length", "adapter, in sft and dpo"])
    return said


def memory_size(size: float) -> str:
    """Of 2^30 bytes, or of 2^20 where that is little."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _parts(parts: dict, unit) -> str:
    return ", ".join(f"{name} {unit(value)}" for name, value in parts.items() if value)
