"""How fast, and in how much memory, is preference training? `run_dpo` against TRL's DPOTrainer.

    make bench-dpo
    make bench-dpo ARGS="--pairs harmless-base/test.jsonl.gz --tokenizer gpt2"   # of Anthropic/hh-rlhf

Both sides get one random Qwen3 of 30M parameters with GPT-2's vocabulary, the same rows in the same order, bf16 and AdamW, with
gradient checkpointing off. Each runs in a process of its own, one after the other, `--repeats` times; what counts are medians.
The first optimizer step is not counted, nor is the preparation of data. Before any clock is read both must show the same token
ids for every row, the same log-probs before the first step, and the same loss after one step.

Both sides get the environment as it is: with THP_MEM_ALLOC_ENABLE=1 in it, large tensors of both are in huge pages.

    rate_ratio               ours with its pass of the reference counted, TRL with its reference in every step
    rate_ratio_precomputed   both with the reference asked before, and that counted
    rate_ratio_cached        both with the reference asked before, and that left out
    memory_ratio             peak memory of the process, ours to TRL's with its reference in every step
    matmul_limit_share       ours at a micro-batch of 32: needed arithmetic a second by what this machine can do (`flops.py`)

`--lengths` adds ours with a prompt laid once for both answers against ours with the prompt laid twice. `--gpu` takes a model in
the shape of Qwen2.5-0.5B, and one of 1.7B parameters (Qwen3-1.7B) with LoRA on both sides; `--lora` adds LoRA elsewhere. The
last line is one JSON object.
"""

import argparse
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

from check import same_start, same_steps, same_tokens
from common.flops import measured_limit
from common.machine import circumstances, load_now
from common.process import DATA, say_inputs
from flops import needed
from job import Job, Plan, run_side

LARGE = 32
"""Pairs of a micro-batch at which the share of the machine's limit is taken."""
LENGTHS = {"long_prompts": (350, 40), "short_prompts": (20, 200)}
"""Tokens of a prompt and of an answer."""
PAIRS = DATA / "preference/hh-rlhf-harmless-base/test.jsonl.gz"
TOKENIZER = DATA / "tokenizers/gpt2"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps that are timed, on each side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--quick", action="store_true", help="three steps, once")
    parser.add_argument("--lengths", action="store_true", help="also: a prompt laid once against twice, long and short")
    parser.add_argument("--lora", action="store_true", help="also: both sides with low-rank adapters")
    parser.add_argument("--gpu", action="store_true", help="a 0.5B model on the first GPU")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers and few words, to try the benchmark itself")
    parser.add_argument(
        "--pairs",
        type=Path,
        help=f"HH-RLHF as .jsonl or .jsonl.gz. Left out: {PAIRS}, if it is there, else the built-in world's pairs",
    )
    parser.add_argument(
        "--tokenizer", help=f"folder or hub id. Left out: {TOKENIZER}, if it is there, else one trained on the built-in world"
    )
    parser.add_argument("--folder", type=Path, help="where to work, kept. Left out: a temporary folder")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.repeats = 3, 1
    if given.steps < 1 or given.repeats < 1:
        parser.error("--steps and --repeats must be at least 1")
    if not given.tiny:
        given.pairs = given.pairs or (PAIRS if PAIRS.is_file() else None)
        given.tokenizer = given.tokenizer or (str(TOKENIZER) if TOKENIZER.is_dir() else None)
    return given


def peer_settings(job: Job) -> list[Job]:
    """TRL as it can be set up here: on a GPU also with the attention and the layers' kernels that are installed."""
    found = [job]
    if job.gpu:
        kernels = {"flash_attn": "flash_attention_2", "flash_attn_interface": "flash_attention_3"}
        found += [replace(job, attention=name) for module, name in kernels.items() if find_spec(module)]
        found += [replace(each, liger=True) for each in found if find_spec("liger_kernel")]
    return found


def middle(runs: list[dict[str, Any]], name: str) -> float:
    return round(statistics.median(run[name] for run in runs), 4)


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over repeats."""
    names = ("pairs_per_second", "pairs_per_second_with_reference", "peak_gb", "reference_seconds")
    spread = [round(run["pairs_per_second"], 4) for run in runs]
    return {**{name: middle(runs, name) for name in names}, "pairs_per_second_of_each": spread}  # type: ignore[dict-item]


def ratio(over: float, under: float) -> float:
    return round(over / under, 3)


def timed(side: str, job: Job) -> dict[str, Any]:
    """One run; ours must have taken the rows of each step that the peer takes."""
    run = run_side(side, job)
    if side == "ours":
        same_steps(run["step_rows"], job)
    print(f"  {side:8} {'precomputed' if job.precompute else '':11} {run['pairs_per_second']:.4f} pairs/s", flush=True)
    return run


def measure(job: Job, repeats: int) -> dict[str, Any]:
    """Both sides in turn; of the peer's settings the fastest counts."""
    ours: list[dict[str, Any]] = []
    settings = peer_settings(job)
    live: list[list[dict[str, Any]]] = [[] for _ in settings]
    asked_before: list[list[dict[str, Any]]] = [[] for _ in settings]
    for _ in range(repeats):
        ours.append(timed("ours", job))
        for place, setting in enumerate(settings):
            live[place].append(timed("trl_side", setting))
            asked_before[place].append(timed("trl_side", replace(setting, precompute=True)))
    peers = [
        {
            "settings": {"attention": setting.attention, "liger": setting.liger, "gradient_checkpointing": False},
            **summary(live[place]),
            "precomputed": summary(asked_before[place]),
        }
        for place, setting in enumerate(settings)
    ]
    mine, best = summary(ours), max(peers, key=lambda peer: peer["pairs_per_second"])
    best_before = max((peer["precomputed"] for peer in peers), key=lambda peer: peer["pairs_per_second"])
    return {
        "ours": mine,
        "peer": {"name": "trl", **best},
        "peers": peers,
        "rate_ratio": ratio(mine["pairs_per_second_with_reference"], best["pairs_per_second"]),
        "rate_ratio_precomputed": ratio(
            mine["pairs_per_second_with_reference"], best_before["pairs_per_second_with_reference"]
        ),
        "rate_ratio_cached": ratio(mine["pairs_per_second"], best_before["pairs_per_second"]),
        "memory_ratio": ratio(mine["peak_gb"], best["peak_gb"]),
        "memory_ratio_precomputed": ratio(mine["peak_gb"], best_before["peak_gb"]),
    }


def measure_share(job: Job, repeats: int, model: dict[str, int], rows: list[list[list[int]]]) -> dict[str, Any]:
    """Ours at a large micro-batch, as a share of what this machine can do."""
    runs, limits = [], []
    for _ in range(repeats):
        limits.append(measured_limit(job.gpu))
        runs.append(timed("ours", job))
    counted = rows[job.micro_batch : job.micro_batch * job.steps]
    flops = statistics.mean(needed(model, *map(len, row)) for row in counted)
    by_size = {size: max(limit[size] for limit in limits) for size in limits[0]}
    limit = max(by_size.values())
    rate = middle(runs, "pairs_per_second")
    return {
        "matmul_limit_share": round(flops * rate / limit, 4),
        "matmul_limit_tflops": round(limit / 1e12, 4),
        "large_micro_batch": {
            "micro_batch": job.micro_batch,
            "pairs_per_second": rate,
            "peak_gb": middle(runs, "peak_gb"),
            "needed_gflops_per_pair": round(flops / 1e9, 2),
            "matmul_tflops_by_size": {size: round(rate / 1e12, 4) for size, rate in by_size.items()},
        },
    }


def measure_lengths(job: Job, repeats: int) -> dict[str, Any]:
    """A prompt laid once for both answers against a prompt laid with each."""
    found: dict[str, Any] = {}
    for name, (prompt, answer) in LENGTHS.items():
        print(f"{name}: {prompt} + {answer} tokens; the prompt once, then twice")
        runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for _ in range(repeats):
            for separate, kept in runs.items():
                kept.append(timed("ours", replace(job, rows=name, separate=separate)))
        once, twice = (summary(kept) for kept in runs.values())
        found[name] = {"once": once, "twice": twice, "rate_ratio": ratio(once["pairs_per_second"], twice["pairs_per_second"])}
    found["no_case_slower"] = all(found[name]["rate_ratio"] >= 1 for name in LENGTHS)
    return found


def show(result: dict[str, Any], given: argparse.Namespace) -> None:
    """The table."""
    ours, peer, before = result["ours"], result["peer"], result["peer"]["precomputed"]
    rows = [
        ("pairs/s, reference counted", ours["pairs_per_second_with_reference"], peer["pairs_per_second"], result["rate_ratio"]),
        (
            "the same, TRL precomputes it",
            ours["pairs_per_second_with_reference"],
            before["pairs_per_second_with_reference"],
            result["rate_ratio_precomputed"],
        ),
        ("pairs/s, reference not counted", ours["pairs_per_second"], before["pairs_per_second"], result["rate_ratio_cached"]),
        ("peak memory, GiB", ours["peak_gb"], peer["peak_gb"], result["memory_ratio"]),
        ("the same, TRL precomputes", ours["peak_gb"], before["peak_gb"], result["memory_ratio_precomputed"]),
    ]
    print(f"\n{'micro-batch ' + str(given.micro_batch):32}{'ours':>10}{'TRL':>10}{'ratio':>10}")
    for name, mine, theirs, by in rows:
        print(f"{name:32}{mine:10.3f}{theirs:10.3f}{by:10.3f}")
    share = result["large_micro_batch"]
    print(
        f"micro-batch {LARGE}: {share['pairs_per_second']:.3f} pairs/s × {share['needed_gflops_per_pair']} GFLOP = "
        f"{result['matmul_limit_share']:.1%} of {result['matmul_limit_tflops']} TFLOP/s"
    )
    if given.lengths:
        for name, (prompt, answer) in LENGTHS.items():
            print(f"{prompt} + {answer} tokens, the prompt once against twice: {result['lengths'][name]['rate_ratio']:.3f}")
    if result["lora"] is not None:
        mine, theirs = (result["lora"][side]["pairs_per_second"] for side in ("ours", "peer"))
        ratios = f"ratio {result['lora']['rate_ratio']:.3f} with ours' reference, memory {result['lora']['memory_ratio']:.3f}"
        print(f"with LoRA: {mine:.3f} against {theirs:.3f} pairs/s, {ratios}")
    print()


def measure_lora(plan: Plan, job: Job, given: argparse.Namespace) -> dict[str, Any]:
    """Both sides with low-rank adapters: on a GPU a model of 1.7B parameters, else the same one.

    Adapters begin at random on each side, so losses after a step differ; the tokens and the first weights are compared above.
    """
    print("with LoRA")
    if not given.gpu:
        return measure(replace(job, lora=True), given.repeats)
    with tempfile.TemporaryDirectory() as folder:
        larger = replace(plan, folder=folder, shape="1.7B", lengths={})
        made = run_side("rows", larger)
        return {"model": made["model"], **measure(replace(job, folder=folder, lora=True), given.repeats)}


def main() -> None:
    given = arguments()
    say_inputs(given.pairs, given.tokenizer or "trained on the built-in world")
    load = load_now()
    folder = (given.folder or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        large_steps = 1 + max(1, given.steps // 2)
        sets = {"few": 8, "timed": given.micro_batch * (given.steps + 1), "large": LARGE * large_steps}
        plan = Plan(
            folder=str(folder),
            sets=sets,
            tokenizer=given.tokenizer,
            pairs=None if given.pairs is None else str(given.pairs.absolute()),
            shape="tiny" if given.tiny else "0.5B" if given.gpu else "30M",
            lengths=LENGTHS if given.lengths else {},
        )
        made = run_side("rows", plan)
        print(f"rows left out: {made['left_out']}")
        job = Job(str(folder), "timed", micro_batch=given.micro_batch, steps=given.steps + 1, gpu=given.gpu)
        rows = same_tokens(replace(job, task="tokens", rows=",".join(sets)))
        equality = same_start(replace(job, task="start", rows="few", micro_batch=8, steps=2))
        result: dict[str, Any] = {"bench": "dpo", **measure(job, given.repeats)}
        result |= measure_share(
            replace(job, rows="large", micro_batch=LARGE, steps=large_steps), given.repeats, made["model"], rows["large"]
        )
        result["lengths"] = measure_lengths(job, given.repeats) if given.lengths else None
        result["lora"] = measure_lora(plan, job, given) if given.lora or given.gpu else None
        result |= {
            "equality": equality,
            "model": {"shape": plan.shape, **made["model"]},
            "rows": {
                "source": "builtin:village" if given.pairs is None else "/".join(given.pairs.parts[-2:]),
                **sets,
                "left_out": made["left_out"],
            },
            "micro_batch": given.micro_batch,
            "steps": given.steps,
            "repeats": given.repeats,
            **circumstances(given.gpu, load),
        }
        show(result, given)
        print(json.dumps(result))
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
