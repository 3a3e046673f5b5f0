"""Does a result hold over seeds? Runs a pipeline file once per seed and pools what was counted.

    python experiments/seeds/run.py configs/quickstart.yaml
    python experiments/seeds/run.py configs/real-small.yaml --seeds 0 1 2 --folds --plot docs/images/real-small.png

Seed s writes to `<output_dir>-seed<s>`; a finished run is not repeated. Prints one table per seed, then the pooled one: the
mean and the range of each metric, and for preference accuracy the 95 % interval over the pairs that there might be. With
`--folds` seed s holds out fold s of the pairs (cross-validation), so that up to the number of folds every judgement is of
another pair. Without it every seed judges the same held-out pairs, and what counts is each pair's mean over the seeds: 600
pairs judged by three seeds are 600. Either way the models are taken as they are; how much they differ is the range.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from modern_llm import PipelineConfig, load_config, run_pipeline
from modern_llm.evaluation.heldout import interval_over_pairs
from modern_llm.report.compare import curve, plot
from modern_llm.report.table import COLUMNS, cell


def folder_of(config: PipelineConfig, seed: int) -> Path:
    return config.output_dir.with_name(f"{config.output_dir.name}-seed{seed}")


def run_seed(config: PipelineConfig, seed: int, folds: int) -> dict:
    """Results of one seed, which holds out one of so many folds of the pairs."""
    changed = config.model_dump(exclude_unset=True) | {"seed": seed, "output_dir": folder_of(config, seed)}
    if folds > 1:
        changed["dpo"]["data"]["eval_fold"] = seed % folds
    result = run_pipeline(PipelineConfig.model_validate(changed))
    return json.loads((result.report.parent / "results.json").read_text(encoding="utf-8"))


def pooled(results: list[dict]) -> str:
    """The pooled table as Markdown."""
    lines = ["| stage | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for stage in results[0]["stages"]:
        cells = []
        for metric in COLUMNS:
            values = [r["stages"][stage][metric] for r in results if metric in r["stages"].get(stage, {})]
            if not values:
                cells.append("–")
                continue
            mean, low, high = sum(values) / len(values), min(values), max(values)
            cells.append(f"{cell(metric, mean)} ({cell(metric, low)} to {cell(metric, high)})")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wins_of_pairs(results: list[dict]) -> np.ndarray:
    """(pairs,) mean win of each held-out pair over the seeds that judged it: those that hold out the same fold."""
    folds: dict[int, list[list[float]]] = {}
    for result in results:
        measured = Path(result["checkpoints"]["dpo"]).parent / "evaluation.json"
        wins = json.loads(measured.read_text(encoding="utf-8"))["wins"]
        folds.setdefault(result["config"]["dpo"]["data"]["eval_fold"], []).append(wins)
    return np.concatenate([np.mean(seeds, axis=0) for seeds in folds.values()])


def held_out_curves(config: PipelineConfig, seeds: list[int]) -> list[list[tuple[int, float]]]:
    """Of each seed (step, preference accuracy on held-out pairs) of every evaluation during preference training."""
    metrics = [folder_of(config, seed) / "dpo" / "metrics.jsonl" for seed in seeds]
    return [curve(path, "eval/rewards/accuracies") for path in metrics]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a pipeline file")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: only pool --with")
    parser.add_argument("--with", type=Path, nargs="*", default=[], dest="finished", help="results.json of runs to pool too")
    parser.add_argument("--folds", action="store_true", help="hold out another fold of the pairs with each seed")
    parser.add_argument("--plot", type=Path, help="where to draw held-out accuracy over the steps of preference training")
    arguments = parser.parse_args()
    config = load_config(PipelineConfig, arguments.config)
    folds = config.dpo.data.folds if arguments.folds and config.dpo is not None else 1
    if arguments.folds and folds == 1:
        parser.error(f"--folds: {arguments.config} holds out no such share of dpo.data that there is another (eval_fraction)")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.finished]
    results += [run_seed(config, seed, folds) for seed in arguments.seeds]
    print(f"\n{arguments.config}, seeds {', '.join(str(r['config']['seed']) for r in results)}: mean (lowest to highest)\n")
    print(pooled(results))
    print("\nminutes of training: " + ", ".join(f"{r['training_seconds'] / 60:.1f}" for r in results))
    dpo = [r["stages"]["dpo"] for r in results if "dpo" in r["stages"]]
    if dpo:
        count = sum(int(stage["pairs"]) for stage in dpo)
        wins = wins_of_pairs(results)
        low, high = interval_over_pairs(wins, count)
        print(
            f"preference accuracy over {len(wins)} held-out pairs ({count} judgements): {wins.mean():.1%}, "
            f"95 % interval {low:.1%} to {high:.1%}"
        )
        baselines = {
            name: sum(r["baselines"][name] * r["stages"]["dpo"]["pairs"] for r in results) / count
            for name in results[0]["baselines"]
        }
        curves = held_out_curves(config, arguments.seeds)
        for seed, points in zip(arguments.seeds, curves, strict=True):
            print(f"seed {seed}, accuracy by step: " + ", ".join(f"{step}: {value:.1%}" for step, value in points))
        if arguments.plot:
            name = f"{config.output_dir.name}, {len(curves)} seeds"
            plot(arguments.plot, {name: curves}, baselines["shorter_wins"])
        print("baselines on the same pairs: " + ", ".join(f"{n} {v:.1%}" for n, v in baselines.items()))


if __name__ == "__main__":
    main()
