"""How fast, and in how much memory, is pretraining? `run_training` against `transformers.Trainer`.

    make bench-pretrain
    make bench-pretrain ARGS="--text input.txt --tokenizer gpt2"

Both sides get the same random weights (a Qwen3 of 30M parameters with GPT-2's vocabulary of 50,257), the same rows of 512
tokens in the same order, 8 of them to a step, and AdamW with the same settings at a constant learning rate. Each runs in a
process of its own, one after the other, `--repeats` times, in bf16 and in fp32; what counts are medians. The first optimizer
step is not counted, nor is the preparation of data. Before any clock is read both must show the same token ids, the same
scored tokens, the same log-probs before the first step, and the same losses of the first three.

    rate_ratio               bf16 to bf16
    rate_ratio_fp32          fp32 to fp32
    rate_ratio_bf16_to_fp32  ours in bf16 to the peer in fp32
    memory_ratio             peak memory of the process in bf16, ours to the peer's
    matmul_limit_share       ours in bf16: needed arithmetic a second (`common/flops.py`) by what this machine can do
    matmul_limit_share_8k    the same with a vocabulary of 8,192 words, trained on the text

`--gpu` takes two models on the first GPU, 124M at 1,024 tokens and 1.3B at 2,048, in bf16 alone, and lets the peer choose
among the kernels that are installed, compiled or not. The last line is one JSON object.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.compare import (
    Sides,
    Tokens,
    compare,
    needed_flops,
    peer_settings,
    ratio,
    same_start,
    same_tokens,
    share_of_limit,
    summary,
    timed,
)
from common.flops import measured_limit
from common.job import Job, Precision
from common.machine import circumstances, load_now
from common.process import DATA, run_side, say_inputs
from sizes import SIZES, Plan

HERE = Path(__file__).resolve().parent
SIDES = Sides(HERE / "ours.py", HERE / "trainer_side.py", "transformers.Trainer", "tokens")
TEXT = DATA / "pretrain/tinyshakespeare/input.txt"
TOKENIZER = DATA / "tokenizers/gpt2"
GPU_START_RATE = 1e-4
"""Learning rate of the steps whose losses are compared, for the larger models."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps that are timed, on each side. Left out: 6, with --gpu 30")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, help="sequences of a step. Left out: the model's own")
    parser.add_argument("--compile", choices=["auto", "on", "off"], help="ours. Left out: the package's default")
    parser.add_argument("--peer-compile", action="store_true", help="also try the peer with torch_compile; on a GPU always")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="models. Left out: 30M and 30M-8k, with --gpu 124M and 1.3B")
    parser.add_argument("--quick", action="store_true", help="two steps, once")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers and few words, to try the benchmark itself")
    parser.add_argument("--text", type=Path, help=f"plain text. Left out: {TEXT}, if it is there, else the built-in world's")
    parser.add_argument(
        "--tokenizer", help=f"folder or hub id. Left out: {TOKENIZER}, if it is there, else one trained on the text"
    )
    parser.add_argument("--folder", type=Path, help="where to work, kept. Left out: a temporary folder")
    given = parser.parse_args()
    given.steps = given.steps or (30 if given.gpu else 6)
    if given.quick:
        given.steps, given.repeats = 2, 1
    if given.steps < 1 or given.repeats < 1:
        parser.error("--steps and --repeats must be at least 1")
    if not given.sizes:
        given.sizes = ["tiny", "tiny-8k"] if given.tiny else ["124M", "1.3B"] if given.gpu else ["30M", "30M-8k"]
    if not given.tiny:
        given.text = given.text or (TEXT if TEXT.is_file() else None)
        given.tokenizer = given.tokenizer or (str(TOKENIZER) if TOKENIZER.is_dir() else None)
    return given


def measure_size(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Prepare one model and its rows, and measure it; a model with a small vocabulary on our side alone."""
    size = SIZES[name]
    uncounted = 5 if given.gpu else 1
    job = Job(
        str(folder), micro_batch=given.micro_batch or size.micro_batch, max_length=size.max_length,
        steps=max(given.steps + uncounted, 3), uncounted=uncounted, gpu=given.gpu, compile=given.compile,
    )  # fmt: skip
    print(f"\n{name}: {job.micro_batch} × {job.max_length} tokens a step", flush=True)
    text = None if given.text is None else str(given.text.absolute())
    made = run_side(HERE / "rows.py", Plan(str(folder), name, job.micro_batch, job.steps, text, given.tokenizer), False, False)
    tokens = same_tokens(SIDES, job)
    found: dict[str, Any] = {"model": made["model"], "rows": made["rows"], "rows_that_differ": made["rows_that_differ"]}
    limits = [measured_limit(given.gpu)]
    if size.words is None:
        found |= measure_both(name, job, given, tokens)
    else:
        found["ours"] = summary([timed(SIDES, "ours", job, tokens) for _ in range(given.repeats)], SIDES.rate)
    limits.append(measured_limit(given.gpu))
    per_token = needed_flops(made["model"], tokens, job) / (job.micro_batch * job.max_length)
    found["limit"] = share_of_limit(per_token, found["ours"][SIDES.rate], limits, given.gpu)
    return {**found, "micro_batch": job.micro_batch, "max_length": job.max_length}


def measure_both(name: str, job: Job, given: argparse.Namespace, tokens: Tokens) -> dict[str, Any]:
    """Equality, then the rates: bf16 for `ours`, `peer` and `rate_ratio`; fp32 beside it on a CPU."""
    exact: tuple[Precision, ...] = () if name == "1.3B" else ("fp32",)
    rate = GPU_START_RATE if given.gpu else 1e-3
    equality = same_start(SIDES, job, tokens, (*exact, "bf16"), rate)
    settings = peer_settings(given.gpu, given.gpu or given.peer_compile)
    found = {"equality": equality, **compare(SIDES, job, given.repeats, settings, tokens)}
    if not given.gpu:
        plain = compare(SIDES, replace(job, precision="fp32"), given.repeats, settings, tokens)
        found["fp32"] = plain
        found["rate_ratio_fp32"], found["memory_ratio_fp32"] = plain["rate_ratio"], plain["memory_ratio"]
        found["rate_ratio_bf16_to_fp32"] = ratio(found["ours"][SIDES.rate], plain["peer"][SIDES.rate])
    return found


def show(sizes: dict[str, dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{'':34}{'ours':>12}{'Trainer':>12}{'ratio':>9}")
    for name, size in sizes.items():
        for precision, part in (("bf16", size), ("fp32", size.get("fp32"))):
            if part is None:
                continue
            for label, key in (("tokens/s", SIDES.rate), ("peak memory, GiB", "peak_gb")):
                mine, theirs = part["ours"][key], part["peer"][key] if "peer" in part else None
                rest = f"{'':>12}{'':>9}" if theirs is None else f"{theirs:12.3f}{mine / theirs:9.3f}"
                print(f"{name + ' ' + precision + ', ' + label:34}{mine:12.3f}{rest}")
        limit = size["limit"]
        print(
            f"{name} bf16: {size['ours'][SIDES.rate]:.0f} tokens/s × {limit['needed_gflops_per_unit']} GFLOP = "
            f"{limit['matmul_limit_share']:.1%} of {limit['matmul_limit_tflops']} TFLOP/s"
            + (f", {limit['mfu_of_989_tflops']:.1%} of 989" if limit["mfu_of_989_tflops"] is not None else "")
        )
    print()


def main() -> None:
    given = arguments()
    say_inputs(given.text, given.tokenizer or "trained on the text")
    load = load_now()
    folder = (given.folder or Path(tempfile.mkdtemp())).absolute()
    try:
        sizes: dict[str, dict[str, Any]] = {}
        for name in given.sizes:
            (folder / name).mkdir(parents=True)
            sizes[name] = measure_size(name, folder / name, given)
        first, *others = sizes.items()
        small = [size for name, size in sizes.items() if SIZES[name].words is not None]
        result = {
            "bench": "pretrain",
            **first[1],
            "size": first[0],
            "matmul_limit_share": first[1]["limit"]["matmul_limit_share"],
            "matmul_limit_share_8k": small[0]["limit"]["matmul_limit_share"] if small else None,
            "sizes": dict(others),
            "text": "builtin:village" if given.text is None else "/".join(given.text.parts[-2:]),
            "compile": given.compile,
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
