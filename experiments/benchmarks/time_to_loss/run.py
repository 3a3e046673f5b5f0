"""How soon is a validation loss reached? `run_training` with its default recipe against `transformers.Trainer`, tuned.

    make bench-time-to-loss
    make bench-time-to-loss ARGS="--plot docs/images/time-to-loss.png"

Both sides get the same random weights for each seed (6 layers × 256), the same stories, tokenizer (6,400 words) and held-out
stories, as many blocks of as many tokens to a step, and bf16. The peer is `transformers.Trainer` with AdamW, warmup and cosine;
its learning rate is the best of three on the first seed. It trains for `--minutes-per-run`, and its schedule fits that. Ours
trains for `--our-share` of that with its default optimizer and schedule.

T is the peer's time to its own best validation loss, t is ours to that loss or below, each at the first evaluation that shows
it. Time is that of training: it stands while a side evaluates; the first step and compilation count.

    time_ratio     t / T, the median over seeds; none unless every seed reaches it
    rate_ratio     T / t, likewise
    memory_ratio   peak memory of the process, ours to the peer's

How many steps fit into the minutes is found by a few steps of each side; `--peer-steps` and `--our-steps` set them. Before that
both sides must show the same validation loss of the first weights in fp32. The last line is one JSON object.
"""

import argparse
import itertools
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import circumstances, load_now
from common.process import DATA, run_side, say_inputs
from picture import draw
from plan import SMALL, TINY, Plan, Run

HERE = Path(__file__).resolve().parent
SCRIPTS = {"ours": HERE / "ours.py", "peer": HERE / "trainer_side.py"}
PEER = "transformers.Trainer"
TEXT = DATA / "pretrain/tinystories-10k-lines/tinystories_10k.txt"
START_LIMIT = 1e-5
"""Largest difference of the first validation losses in fp32, as a share of them."""
PROBE_STEPS = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes-per-run", type=float, default=2.5, help="training time of one run of the peer")
    parser.add_argument("--our-share", type=float, default=0.3, help="training time of a run of ours by the peer's")
    parser.add_argument("--peer-steps", type=int, help="optimizer steps of the peer, in place of --minutes-per-run")
    parser.add_argument("--our-steps", type=int, help="optimizer steps of ours, in place of --our-share")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one tunes the peer")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="the peer's choice")
    parser.add_argument("--batch", type=int, default=8, help="blocks of a step, on both sides")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--evaluations", type=int, default=12, help="of each run")
    parser.add_argument("--held-out", type=int, default=64, help="stories")
    parser.add_argument("--compile", choices=["auto", "on", "off"], help="ours. Left out: the package's default")
    parser.add_argument("--peer-compile", action="store_true", help="the peer with torch_compile")
    parser.add_argument("--plot", type=Path, help="draw the curves: .png, .svg or .pdf")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers and few words, to try the benchmark itself")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU")
    parser.add_argument(
        "--text",
        type=Path,
        help=f"stories with <|endoftext|> between them. Left out: {TEXT}, if it is there, else the built-in world's",
    )
    parser.add_argument("--folder", type=Path, help="where to work, kept. Left out: a temporary folder")
    given = parser.parse_args()
    if given.quick:
        given.peer_steps, given.our_steps, given.evaluations, given.seeds = 12, 8, 4, given.seeds[:1]
    if given.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -e '.[plots]' in the repository's folder")
    if not given.tiny:
        given.text = given.text or (TEXT if TEXT.is_file() else None)
    return given


def same_start(run: Run) -> dict[str, float]:
    """The validation loss of the first weights in fp32, equal on both sides."""
    ours, peer = (
        run_side(script, replace(run, task="start", steps=1), run.gpu)["first_loss"][0] for script in SCRIPTS.values()
    )
    print(f"validation loss of the first weights: ours {ours}, {PEER} {peer}", flush=True)
    if not abs(ours - peer) <= START_LIMIT * peer:
        raise SystemExit("the two sides do not compute the same validation loss")
    return {"ours": ours, "peer": peer}


def steps_in(side: str, run: Run, seconds: float) -> int:
    """How many optimizer steps of a side take so long, the first with what it compiles included."""
    ends = run_side(SCRIPTS[side], replace(run, task="probe", steps=PROBE_STEPS), run.gpu)["step_ends"]
    per_step = statistics.median(after - before for before, after in itertools.pairwise(ends[1:]))
    steps = 1 + max(1, round((seconds - ends[0]) / per_step))
    print(f"{side}: first step {ends[0]:.2f} s, then {per_step:.3f} s each: {steps} steps take {seconds:.0f} s", flush=True)
    return steps


def train(side: str, run: Run) -> dict[str, Any]:
    found = run_side(SCRIPTS[side], run, run.gpu)
    best, last = min(found["curve"], key=lambda point: point["loss"]), found["curve"][-1]
    rate = "" if side == "ours" else f" lr {run.learning_rate:g}"
    print(
        f"  {side:5} seed {run.seed}{rate}: best {best['loss']:.4f} after {best['seconds']:.1f} s, "
        f"last {last['loss']:.4f} after {last['seconds']:.1f} s, {found['peak_gb']:.2f} GiB",
        flush=True,
    )
    return {"curve": found["curve"], "peak_gb": round(found["peak_gb"], 3), "best": best}


def tune(run: Run, rates: list[float]) -> tuple[float, dict[str, Any], list[dict[str, float]]]:
    """The learning rate with the lowest validation loss, its run, and what every one reached."""
    runs = {rate: train("peer", replace(run, learning_rate=rate)) for rate in rates}
    best = min(runs, key=lambda rate: runs[rate]["best"]["loss"])
    return best, runs[best], [{"learning_rate": rate, "best_loss": found["best"]["loss"]} for rate, found in runs.items()]


def compare(seed: int, ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """When ours had the peer's best loss; None: never."""
    target, peer_seconds = peer["best"]["loss"], peer["best"]["seconds"]
    reached = next((point for point in ours["curve"] if point["loss"] <= target), None)
    return {
        "seed": seed,
        "target": target,
        "peer_seconds": peer_seconds,
        "our_seconds": None if reached is None else reached["seconds"],
        "our_loss": None if reached is None else reached["loss"],
        "time_ratio": None if reached is None else round(reached["seconds"] / peer_seconds, 4),
        "memory_ratio": round(ours["peak_gb"] / peer["peak_gb"], 3),
        "ours": ours,
        "peer": peer,
    }


def show(seeds: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{'seed':>4}{'best loss of the peer':>24}{'T, s':>9}{'t, s':>9}{'t / T':>9}")
    for seed in seeds:
        reached = seed["our_seconds"] is not None
        mine = f"{seed['our_seconds']:9.1f}{seed['time_ratio']:9.3f}" if reached else f"{'not reached':>18}"
        print(f"{seed['seed']:4}{seed['target']:24.4f}{seed['peer_seconds']:9.1f}{mine}")
    print()


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    text = None if given.text is None else str(given.text.absolute())
    words, model = (600, TINY) if given.tiny else (6400, SMALL)
    plan = Plan(str(folder), text, words, model, given.max_length, given.held_out, given.seeds)
    made = run_side(HERE / "rows.py", plan, gpu=False, offline=False)
    print(f"{made['stories']} stories, {made['tokens']} tokens; {made['held_out_tokens']} held-out tokens are scored")
    run = Run(
        str(folder), "train", given.seeds[0], 1, given.batch, given.max_length, given.evaluations, given.learning_rates[0],
        given.gpu, given.compile, given.peer_compile,
    )  # fmt: skip
    first_loss = same_start(run)
    seconds = 60 * given.minutes_per_run
    peer_run = replace(run, steps=given.peer_steps or steps_in("peer", run, seconds))
    our_run = replace(run, steps=given.our_steps or steps_in("ours", run, given.our_share * seconds))
    learning_rate, tuned, tried = tune(peer_run, given.learning_rates)
    seeds = []
    for seed in given.seeds:
        again = replace(peer_run, seed=seed, learning_rate=learning_rate)
        peer = tuned if seed == given.seeds[0] else train("peer", again)
        seeds.append(compare(seed, train("ours", replace(our_run, seed=seed)), peer))
    show(seeds)
    ratios = [seed["time_ratio"] for seed in seeds]
    ratio = None if None in ratios else round(statistics.median(ratios), 4)
    return {
        "ours": {"steps": our_run.steps, "seconds": None if None in ratios else median_of(seeds, "our_seconds")},
        "peer": {
            "name": PEER, "steps": peer_run.steps, "seconds": median_of(seeds, "peer_seconds"), "learning_rate": learning_rate,
            "tried": tried, "compiled": given.peer_compile,
        },
        "time_ratio": ratio,
        "rate_ratio": None if ratio is None else round(1 / ratio, 3),
        "memory_ratio": median_of(seeds, "memory_ratio"),
        "seeds_that_reach_it": sum(found is not None for found in ratios),
        "first_loss_fp32": first_loss,
        "tokens_per_step": given.batch * given.max_length,
        "data": {**made, "source": "builtin:village" if given.text is None else "/".join(given.text.parts[-2:])},
        "seeds": seeds,
    }  # fmt: skip


def median_of(seeds: list[dict[str, Any]], name: str) -> float:
    return round(statistics.median(seed[name] for seed in seeds), 4)


def main() -> None:
    given = arguments()
    say_inputs(given.text, "trained on the text")
    load = load_now()
    folder = (given.folder or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(folder, given)
        if given.plot is not None:
            draw(found["seeds"], given.plot, PEER)
        result = {"bench": "time_to_loss", **found, "compile": given.compile, **circumstances(given.gpu, load)}
        print(json.dumps(result))
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
