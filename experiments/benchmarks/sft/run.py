"""How fast, and in how much memory, is supervised fine-tuning? `run_sft` against TRL's SFTTrainer.

    make bench-sft
    make bench-sft ARGS="--demonstrations codegen-instruct.json.gz --tokenizer gpt2"   # of teknium1/GPTeacher

Both sides get one random Qwen3 of 30M parameters with GPT-2's vocabulary, the same prompts and answers in the Alpaca layout in
the same order, 8 to a step, and AdamW with the same settings at a constant learning rate; only answers count. Gradient
checkpointing is off. Each runs in a process of its own, one after the other, `--repeats` times; what counts are medians. The
first optimizer step is not counted, nor is the preparation of data. Before any clock is read both must show the same token ids,
the same scored tokens, the same log-probs before the first step, and the same losses of the first three, in fp32 and in bf16.

    rate_ratio               ours to TRL's
    memory_ratio             peak memory of the process, ours to TRL's
    matmul_limit_share       ours: needed arithmetic a second (`common/flops.py`) by what this machine can do

`--gpu` takes a model in the shape of Qwen2.5-0.5B on the first GPU and lets TRL choose among the kernels that are installed,
without padding where its attention can, compiled or not. The last line is one JSON object.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.compare import Sides, compare, needed_flops, peer_settings, same_start, same_tokens, share_of_limit
from common.flops import measured_limit
from common.job import Job
from common.machine import circumstances, load_now
from common.process import DATA, run_side, say_inputs
from plan import MAX_LENGTH, Plan

HERE = Path(__file__).resolve().parent
SIDES = Sides(HERE / "ours.py", HERE / "trl_side.py", "trl.SFTTrainer", "sequences")
DEMONSTRATIONS = DATA / "instruction/gpteacher/codegen-instruct.json.gz"
TOKENIZER = DATA / "tokenizers/gpt2"
GPU_START_RATE = 1e-5
"""Learning rate of the steps whose losses are compared, for the larger model."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps that are timed, on each side. Left out: 8, with --gpu 30")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=8, help="demonstrations of a step")
    parser.add_argument("--compile", choices=["auto", "on", "off"], help="ours. Left out: the package's default")
    parser.add_argument("--peer-compile", action="store_true", help="also try TRL with torch_compile; on a GPU always")
    parser.add_argument("--quick", action="store_true", help="two steps, once")
    parser.add_argument("--gpu", action="store_true", help="a 0.5B model on the first GPU")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers and few words, to try the benchmark itself")
    parser.add_argument(
        "--demonstrations",
        type=Path,
        help=f"GPTeacher as .json or .json.gz. Left out: {DEMONSTRATIONS}, if it is there, else the built-in world's",
    )
    parser.add_argument(
        "--tokenizer", help=f"folder or hub id. Left out: {TOKENIZER}, if it is there, else one trained on the built-in world"
    )
    parser.add_argument("--folder", type=Path, help="where to work, kept. Left out: a temporary folder")
    given = parser.parse_args()
    given.steps = given.steps or (30 if given.gpu else 8)
    if given.quick:
        given.steps, given.repeats = 2, 1
    if given.steps < 1 or given.repeats < 1:
        parser.error("--steps and --repeats must be at least 1")
    if not given.tiny:
        given.demonstrations = given.demonstrations or (DEMONSTRATIONS if DEMONSTRATIONS.is_file() else None)
        given.tokenizer = given.tokenizer or (str(TOKENIZER) if TOKENIZER.is_dir() else None)
    return given


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Prepare the rows, show that both sides do the same with them, and time both."""
    uncounted = 5 if given.gpu else 1
    job = Job(
        str(folder), micro_batch=given.micro_batch, max_length=MAX_LENGTH, steps=max(given.steps + uncounted, 3),
        uncounted=uncounted, gpu=given.gpu, compile=given.compile,
    )  # fmt: skip
    shape = "tiny" if given.tiny else "0.5B" if given.gpu else "30M"
    source = None if given.demonstrations is None else str(given.demonstrations.absolute())
    plan = Plan(str(folder), shape, job.micro_batch, job.steps, source, given.tokenizer)
    made = run_side(HERE / "rows.py", plan, gpu=False, offline=False)
    print(f"rows left out: {made['left_out']}")
    tokens = same_tokens(SIDES, job)
    equality = same_start(SIDES, job, tokens, ("fp32", "bf16"), GPU_START_RATE if given.gpu else 1e-3)
    limits = [measured_limit(given.gpu)]
    settings = peer_settings(given.gpu, given.gpu or given.peer_compile, padding_free=True)
    found = compare(SIDES, job, given.repeats, settings, tokens)
    limits.append(measured_limit(given.gpu))
    per_row = needed_flops(made["model"], tokens, job) / job.micro_batch
    return {
        **found,
        "equality": equality,
        "limit": share_of_limit(per_row, found["ours"][SIDES.rate], limits, given.gpu),
        "model": {"shape": shape, **made["model"]},
        "rows": {
            **{name: made[name] for name in ("left_out", "prompt_tokens", "answer_tokens")},
            "source": "builtin:village" if source is None else "/".join(Path(source).parts[-2:]),
        },
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    ours, peer, limit = result["ours"], result["peer"], result["limit"]
    print(f"\n{'':20}{'ours':>10}{'TRL':>10}{'ratio':>10}")
    for label, key, by in (("sequences/s", SIDES.rate, "rate_ratio"), ("peak memory, GiB", "peak_gb", "memory_ratio")):
        print(f"{label:20}{ours[key]:10.3f}{peer[key]:10.3f}{result[by]:10.3f}")
    print(
        f"{ours[SIDES.rate]:.2f} sequences/s × {limit['needed_gflops_per_unit']} GFLOP = "
        f"{limit['matmul_limit_share']:.1%} of {limit['matmul_limit_tflops']} TFLOP/s\n"
    )


def main() -> None:
    given = arguments()
    say_inputs(given.demonstrations, given.tokenizer or "trained on the built-in world")
    load = load_now()
    folder = (given.folder or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = {"bench": "sft", **measure(folder, given)}
        result |= {
            "matmul_limit_share": result["limit"]["matmul_limit_share"],
            "micro_batch": given.micro_batch,
            "compile": given.compile,
            "steps": given.steps,
            "repeats": given.repeats,
            **circumstances(given.gpu, load),
        }
        show(result)
        print(json.dumps(result))
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
