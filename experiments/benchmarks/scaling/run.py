"""Does cost grow as it should? `run_training` on 1×, 4× and 16× as many rows, for the same number of steps.

    make bench-scaling

Rows are documents of 20 to 120 made-up words (`common/texts.py`); the smaller texts are the beginnings of the largest. Each is
prepared in one process, which is counted apart, and a small model is trained on it in another, `--repeats` times; what counts
are medians. Tokens a second and the peak of resident memory should not depend on how many rows there are. The last line is one
JSON object:

    rate_ratio     tokens a second on the most rows to those on the fewest
    memory_ratio   peak resident memory of training, likewise
    prepare_ratio  rows prepared a second, likewise
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import circumstances, load_now
from common.process import run_side
from plan import Run

SIDE = Path(__file__).resolve().parent / "ours.py"
MODEL = {"d_model": 128, "n_layers": 4, "n_heads": 4, "max_seq_len": 256, "vocab_size": 8192}
TINY = {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "vocab_size": 600}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16], help="how many times the rows of --megabytes")
    parser.add_argument("--megabytes", type=float, default=6.0, help="text of 1×")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps, two of which are not counted")
    parser.add_argument("--batch", type=int, default=8, help="blocks of a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few rows and steps, once")
    parser.add_argument("--tiny", action="store_true", help="a narrow model and few words, to try the benchmark itself")
    parser.add_argument("--gpu", action="store_true", help="train on the first GPU; the memory is that of the host")
    parser.add_argument("--folder", type=Path, help="where to work, kept. Left out: a temporary folder")
    given = parser.parse_args()
    if given.quick:
        given.megabytes, given.steps, given.repeats = 0.5, 6, 1
    if given.steps < 3 or given.repeats < 1:
        parser.error("--steps must be at least 3, --repeats at least 1")
    return given


def first_rows(source: Path, target: Path, count: int) -> None:
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as file:
        file.writelines(itertools.islice(lines, count))


def measure(run: Run, rows: int, repeats: int, cache: Path) -> dict[str, Any]:
    """Prepare one text and train on it."""
    prepared = run_side(SIDE, replace(run, task="prepare"), gpu=False, cache=cache)
    runs = [run_side(SIDE, run, run.gpu, cache=cache) for _ in range(repeats)]
    names = ("tokens_per_second", "resident_peak_gb", "seconds_to_first_step")
    return {
        "rows": rows,
        "tokens": prepared["tokens"],
        "prepare_seconds": round(prepared["seconds"], 2),
        "prepare_peak_gb": round(prepared["peak_gb"], 3),
        **{name: round(statistics.median(run[name] for run in runs), 4) for name in names},
        "tokens_per_second_of_each": [round(run["tokens_per_second"], 1) for run in runs],
    }


def show(sizes: dict[str, dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{'rows':>10}{'tokens':>12}{'prepared in, s':>16}{'tokens/s':>12}{'peak, GiB':>11}{'first step after, s':>21}")
    for size in sizes.values():
        print(
            f"{size['rows']:10}{size['tokens']:12}{size['prepare_seconds']:16.2f}{size['tokens_per_second']:12.0f}"
            f"{size['resident_peak_gb']:11.3f}{size['seconds_to_first_step']:21.2f}"
        )
    print()


def main() -> None:
    given = arguments()
    load = load_now()
    folder = (given.folder or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model, whole = TINY if given.tiny else MODEL, folder / "whole.jsonl"
        run = Run(
            str(folder), str(whole), "text", given.steps, given.batch, model["max_seq_len"], model,
            given.megabytes * max(given.times), given.gpu,
        )  # fmt: skip
        rows = run_side(SIDE, run, gpu=False)["rows"]
        sizes: dict[str, dict[str, Any]] = {}
        for times in sorted(given.times):
            text, count = folder / f"{times}.jsonl", rows * times // max(given.times)
            first_rows(whole, text, count)
            sizes[str(times)] = measure(replace(run, text=str(text), task="train"), count, given.repeats, folder / "cache")
            print(f"{times}×: {sizes[str(times)]}", flush=True)
        measured = list(sizes.values())
        fewest, most = measured[0], measured[-1]
        per_second = [size["rows"] / size["prepare_seconds"] for size in (fewest, most)]
        result = {
            "bench": "scaling",
            "ours": sizes,
            "peer": None,
            "rate_ratio": round(most["tokens_per_second"] / fewest["tokens_per_second"], 3),
            "memory_ratio": round(most["resident_peak_gb"] / fewest["resident_peak_gb"], 3),
            "prepare_ratio": round(per_second[1] / per_second[0], 3),
            "model": model,
            "steps": given.steps,
            "repeats": given.repeats,
            **circumstances(given.gpu, load),
        }
        show(sizes)
        print(json.dumps(result))
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
