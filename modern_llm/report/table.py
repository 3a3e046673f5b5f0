"""The table at the end of a pipeline: one line for each stage."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modern_llm.checkpoint import write_text
from modern_llm.secrets import record_without_secrets

COLUMNS = {
    "perplexity": "perplexity, held-out text",
    "right_answers": "right answers",
    "preferred_form": "preferred form",
    "preference_accuracy": "preference accuracy",
    "kl_to_sft": "KL to SFT, nats/token",
}


def cell(metric: str, value: float | None) -> str:
    """A metric as people read it; an en dash where it was not measured."""
    if value is None:
        return "–"
    metric = metric.partition("/")[0]
    return f"{value:.2f}" if metric == "perplexity" else f"{value:.3f}" if metric == "kl_to_sft" else f"{value:.1%}"


def measured_columns(stages: dict[str, dict[str, float]]) -> dict[str, str]:
    """The columns in which at least one stage has a value; behind each those of its sources (`metric/NAME`)."""
    names = dict.fromkeys(name for values in stages.values() for name in values)
    return {
        name: title + name.removeprefix(metric).replace("/", ": ")
        for metric, title in COLUMNS.items()
        for name in names
        if name.partition("/")[0] == metric
    }


def markdown(stages: dict[str, dict[str, float]]) -> str:
    """The table as Markdown."""
    columns = measured_columns(stages)
    lines = ["| stage | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for stage, values in stages.items():
        lines.append(f"| {stage} | " + " | ".join(cell(metric, values.get(metric)) for metric in columns) + " |")
    return "\n".join(lines) + "\n"


def show(stages: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    columns = measured_columns(stages)
    table = Table("stage", *columns.values())
    for stage, values in stages.items():
        table.add_row(stage, *(cell(metric, values.get(metric)) for metric in columns))
    Console(width=120).print(table)


def write_report(path: Path, result: dict[str, Any]) -> None:
    """Write the table as Markdown, and everything as `results.json` beside it, without secrets."""
    write_text(path.with_name("results.json"), json.dumps(record_without_secrets(result), indent=2) + "\n")
    write_text(path, markdown(result["stages"]))
