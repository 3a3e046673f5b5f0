"""Several preference losses from one start: the same pairs in the same order, one reference, one table and one plot."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from modern_llm.checkpoint import write_text
from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig, UserError
from modern_llm.config.base import explain
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.held_out import by_source
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import Example
from modern_llm.evaluation.heldout import interval_over_pairs, length_baselines, log_ratios, longer_by, win
from modern_llm.initial.checkpoint import load_model
from modern_llm.initial.opened import open_checkpoint
from modern_llm.models.policy import Policy, frozen
from modern_llm.secrets import record_without_secrets
from modern_llm.training.checks import check_early
from modern_llm.training.train_dpo import run_dpo

OUTPUT = Path("experiments/runs/compare-losses")


@dataclass(frozen=True)
class Comparison:
    """What one loss came to, over all seeds."""

    loss: str
    pairs: int
    """Held-out pairs, each judged once by every seed."""
    accuracy: float
    """Share of them in which the policy moved towards the chosen answer more than towards the rejected one; ties count ½."""
    interval: tuple[float, float]
    """95 % of `accuracy`, over pairs (`interval_over_pairs`)."""
    chosen: float
    """Mean change of the chosen answers' log-prob, nats an answer."""
    rejected: float
    """The same of the rejected ones."""
    kl: float
    """KL divergence from the reference on held-out prompts, nats per token of the policy's answers; mean over seeds."""
    where_longer: float | None
    """Accuracy on pairs whose chosen answer is the longer one; None without such a pair."""
    where_shorter: float | None
    """Accuracy on pairs whose chosen answer is the shorter one."""
    sources: dict[str, float] = field(default_factory=dict)
    """Accuracy on the pairs of each source, where there are several."""


def parse_losses(text: str, base: DPOConfig) -> dict[str, DPOConfig]:
    """`sigmoid,ipo:beta=0.5` as configs by name; what the text does not say is as in `base`.

    Raises:
        UserError: a loss or an option is not there, or they do not go together.
    """
    found: dict[str, DPOConfig] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        loss, *options = word.split(":")
        given: dict[str, str] = {}
        for option in options:
            name, _, given[name] = option.partition("=")
        try:
            found[word] = DPOConfig.model_validate({**base.model_dump(), "loss_type": loss, "loss_weights": None, **given})
        except ValidationError as error:
            raise UserError(explain(error, source=f"losses: {word}")) from None
    if not found:
        raise UserError("losses: name at least one, e.g. sigmoid,ipo,apo_zero")
    return found


def compare_losses(
    start: str,
    train_config: TrainingConfig,
    dpo_config: DPOConfig,
    preference_config: PreferenceDatasetConfig | None,
    tokenizer_name: str | None,
    losses: str,
    seeds: Sequence[int] = (0,),
) -> list[Comparison]:
    """Train a start with every loss and seed, and measure each on the pairs that are held out.

    Args:
        start: checkpoint that every run starts from.
        train_config: how to train; `output_dir` holds a folder for each run, and `compare.json`, `compare.md`, `compare.png`.
        dpo_config: options of all losses.
        preference_config: the pairs; some must be held out (`eval_fraction`, `eval_split` or `eval_dataset`).
        tokenizer_name: None: the start's own.
        losses: see `parse_losses`.
        seeds: one run of each loss for each.

    Raises:
        UserError: a config is wrong, or no pair is held out.
    """
    configs = parse_losses(losses, dpo_config)
    data = check_early("dpo", train_config, preference_config, PreferenceDatasetConfig)
    tokenizer_name = tokenizer_name or train_config.tokenizer_name
    opened = open_checkpoint(start, tokenizer_name, "sft_checkpoint", chat_template=data.chat_template)
    encoder = ChatEncoder(opened.tokenizer)
    if not (data.eval_fraction or data.eval_sources()) or not prepare_preferences(data, dpo_config, encoder).evaluation:
        raise UserError("preference_config.eval_fraction: hold out some pairs, e.g. 0.1, for the losses to be compared on")
    folder = train_config.output_dir or OUTPUT
    reference = frozen(Policy(opened.model, train_config.attention))
    results: list[Comparison] = []
    curves: dict[str, list[list[tuple[int, float]]]] = {word: [] for word in configs}
    for word, config in configs.items():
        pairs = prepare_preferences(data, config, encoder).evaluation  # a loss may have limits of its own
        ratios: list[np.ndarray] = []
        drift: list[float] = []
        for seed in seeds:
            name = f"{re.sub('[^A-Za-z0-9._-]', '-', word)}-seed{seed}"
            settings = train_config.model_copy(update={"output_dir": folder / name, "run_name": name, "seed": seed})
            final = run_dpo(start, settings, config, data, tokenizer_name)
            policy = frozen(Policy(load_model(final), train_config.attention))
            ratios.append(log_ratios(policy, reference, pairs, batch_size=16))
            curves[word].append(curve(folder / name / "metrics.jsonl", "eval/rewards/accuracies"))
            drift += [kl for _, kl in curve(folder / name / "metrics.jsonl", "eval/kl")]
        results.append(summarize(word, np.stack(ratios), pairs, drift))
    baselines = length_baselines(prepare_preferences(data, dpo_config, encoder).evaluation)
    content = {"start": str(start), "seeds": list(seeds), "baselines": baselines, "losses": [asdict(r) for r in results]}
    write_text(folder / "compare.json", json.dumps(record_without_secrets(content), indent=2) + "\n")
    write_text(folder / "compare.md", markdown(results, baselines))
    plot(folder / "compare.png", curves, baselines["shorter_wins"])
    show(results, baselines)
    return results


def summarize(loss: str, ratios: np.ndarray, pairs: Sequence[Example], drift: Sequence[float]) -> Comparison:
    """
    Args:
        loss: its name.
        ratios: (seeds, pairs, 2) log-ratios of the chosen and of the rejected answer.
        pairs: the held-out pairs.
        drift: KL divergence of each seed.
    """
    wins = np.array([[win(margin) for margin in seed] for seed in ratios[..., 0] - ratios[..., 1]])
    means, longer = wins.mean(0), longer_by(pairs)

    def share(chosen: np.ndarray) -> float | None:
        return float(means[chosen].mean()) if chosen.any() else None

    parts = by_source(pairs)
    ends = np.cumsum([len(part) for part in parts.values()])[:-1]
    each = {name: float(part.mean()) for name, part in zip(parts, np.split(means, ends), strict=True) if name}
    return Comparison(
        loss, len(means), float(means.mean()), interval_over_pairs(means, wins.size), float(ratios[..., 0].mean()),
        float(ratios[..., 1].mean()), float(np.mean(drift)), share(longer > 0), share(longer < 0), each,
    )  # fmt: skip


def curve(metrics: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every line of a run that has the metric."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


HEADINGS = ("loss", "held-out accuracy", "95 %", "chosen, nats", "rejected, nats", "KL", "where chosen is longer", "… shorter")


def cells(result: Comparison) -> list[str]:
    """A line of the table."""
    low, high = result.interval
    shares = ("–" if share is None else f"{share:.1%}" for share in (result.where_longer, result.where_shorter))
    changes = (f"{nats:+.2f}" for nats in (result.chosen, result.rejected))
    return [result.loss, f"{result.accuracy:.1%}", f"{low:.1%} to {high:.1%}", *changes, f"{result.kl:.3f}", *shares]


def markdown(results: Sequence[Comparison], baselines: dict[str, float]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    lines += ["| " + " | ".join(cells(result)) + " |" for result in results]
    return "\n".join(lines) + f"\n\nThe shorter answer wins: {baselines['shorter_wins']:.1%} of the same pairs.\n"


def show(results: Sequence[Comparison], baselines: dict[str, float]) -> None:
    """Print the table."""
    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=heading == "loss")
    for result in results:
        table.add_row(*cells(result))
    console = Console(width=120)
    console.print(table)
    console.print(f"{results[0].pairs} held-out pairs; the shorter answer wins in {baselines['shorter_wins']:.1%} of them")


def plot(path: Path, curves: dict[str, list[list[tuple[int, float]]]], shorter_wins: float) -> None:
    """Held-out accuracy over optimizer steps, the mean over seeds with the range behind it.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("compare-losses draws with matplotlib: pip install -e '.[plots]' in the repository's folder") from None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, (loss, seeds) in enumerate(curves.items()):
        steps = [step for step, _ in seeds[0]]
        values = np.array([[accuracy for _, accuracy in seed] for seed in seeds])
        style = ("-", "--", "-.")[number // 10 % 3]  # ten colours, then they come again
        (line,) = axes.plot(steps, values.mean(0), style, marker="o", markersize=3, label=loss)
        if len(seeds) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.12)
    axes.axhline(shorter_wins, color="gray", linestyle=":", label="the shorter answer wins")
    axes.axhline(0.5, color="gray", linewidth=0.5)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("accuracy on held-out pairs")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
