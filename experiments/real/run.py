"""Train a real pretrained model on real data, start to end, and measure what each stage changed.

    make real DATA=FOLDER                     # a folder with files sft.* (demonstrations) and dpo.* (pairs)
    make real DATA="SFT DPO"                  # or the two by name: files or hub ids
    python experiments/real/run.py --model FOLDER --data SFT DPO --rows 24 --steps 3       # to try it

Runs the two stages of `configs/real-smollm2.yaml` through `run_sft` and `run_dpo`; a run that was stopped resumes, and a
finished stage is not repeated. Prints, and writes to `results.md` and `results.json` in the output folder: the held-out loss
before and after SFT, the preference accuracy on held-out pairs with its 95 % Wilson interval, the KL divergence from the SFT
model, and the greedy answers to five prompts before SFT, after it and after DPO.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from modern_llm import PipelineConfig, load_config, run_dpo, run_sft
from modern_llm.config import UserError
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import PreparedData
from modern_llm.evaluation.generation import greedy_answers
from modern_llm.evaluation.heldout import perplexity, wilson_interval, win
from modern_llm.initial.checkpoint import load_model, read_initial
from modern_llm.models.policy import Policy, frozen
from modern_llm.precision import autocast

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "real-smollm2.yaml"
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short birthday greeting for a colleague who likes gardening.",
    "You are a pirate. Describe your ship.",
    "Give three tips for learning to swim as an adult.",
    "Write a Python function that returns the larger of two numbers.",
)
NEW_TOKENS = 64
Results = dict[str, Any]


def data_sets(given: list[str]) -> list[str]:
    """Demonstrations and pairs: two names, or those found in one folder.

    Raises:
        UserError: neither two names nor a folder with one file of each.
    """
    if len(given) == 2:
        return given
    folder = Path(given[0])
    found = [sorted(folder.glob(f"{stage}.*")) for stage in ("sft", "dpo")]
    if len(given) != 1 or [len(files) for files in found] != [1, 1]:
        raise UserError(
            f"--data {' '.join(given)}: give demonstrations and pairs, or a folder with one sft.* and one dpo.* file"
        )
    return [str(files[0]) for files in found]


def configured(arguments: argparse.Namespace) -> PipelineConfig:
    """The config file with what the command line changes."""
    changed = load_config(PipelineConfig, CONFIG).model_dump(exclude_unset=True)
    changed |= {"start_checkpoint": arguments.model, "output_dir": arguments.output_dir or changed["output_dir"]}
    for stage, name in zip(("sft", "dpo"), data_sets(arguments.data), strict=True):
        section = changed[stage]
        section["data"] |= {"dataset_name": name, "max_rows": round(arguments.rows / (1 - section["data"]["eval_fraction"]))}
        if arguments.steps is not None:
            section["train"] = {**section["train"], "num_epochs": None, "max_steps": arguments.steps}
    return PipelineConfig.model_validate(changed)


def encoder_of(checkpoint: Path | str) -> ChatEncoder:
    return ChatEncoder(read_initial(checkpoint).tokenizer().tokenizer)


@torch.no_grad()
def held_out_loss(checkpoint: Path | str, data: PreparedData) -> float:
    """Mean negative log-likelihood of the held-out answers, nats per token."""
    policy = frozen(Policy(load_model(checkpoint).eval()))
    with autocast(torch.bfloat16, policy.device):
        return math.log(perplexity(policy, data.evaluation, 8)["perplexity"])


def answers(checkpoint: Path | str) -> list[str]:
    """Greedy answers to the five prompts."""
    encoder = encoder_of(checkpoint)
    asked = [encoder.prompt([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    model = load_model(checkpoint).eval()
    return [answer.text.strip() for answer in greedy_answers(model, encoder, asked, NEW_TOKENS, len(asked))]


def measured(folder: Path | None, suffix: str = "") -> dict[str, float]:
    """Every metric of a stage at its last step, from `metrics.jsonl`."""
    assert folder is not None
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items() if name.startswith(suffix)}


def sft(config: PipelineConfig) -> tuple[Path, Results]:
    """Supervised fine-tuning, and the held-out loss before and after it."""
    assert config.sft is not None
    assert config.start_checkpoint is not None
    began = time.perf_counter()
    final = run_sft(config.start_checkpoint, config.training("sft"), config.sft.data)
    trained = time.perf_counter()
    data = prepare_instructions(config.sft.data, encoder_of(final))
    before, after = (held_out_loss(checkpoint, data) for checkpoint in (config.start_checkpoint, final))
    return final, {
        "rows": len(data.train),  # type: ignore[arg-type] - no stream
        "held_out_rows": len(data.evaluation),
        "loss_before": before,
        "loss_after": after,
        "training_seconds": trained - began,
        "measuring_seconds": time.perf_counter() - trained,
    }


def dpo(config: PipelineConfig, start: Path) -> tuple[Path, Results]:
    """Preference training, and what `run_dpo` measured on held-out pairs at its end."""
    assert config.dpo is not None
    began = time.perf_counter()
    final = run_dpo(start, config.training("dpo"), config.dpo.dpo, config.dpo.data)
    seconds = time.perf_counter() - began
    found = measured(config.training("dpo").output_dir, "eval/")
    data = prepare_preferences(config.dpo.data, config.dpo.dpo, encoder_of(final))
    lengths = [[int(segment.scored.sum()) for segment in pair.segments] for pair in data.evaluation]
    accuracy = found["eval/rewards/accuracies"]
    return final, {
        "pairs": len(data.train),  # type: ignore[arg-type] - no stream
        "held_out_pairs": len(lengths),
        "preference_accuracy": accuracy,
        "interval_95": wilson_interval(accuracy, len(lengths)),
        "longer_wins": sum(win(chosen - rejected) for chosen, rejected in lengths) / len(lengths),
        "loss": found["eval/loss"],
        "kl": found["eval/kl"],
        "training_seconds": seconds,
    }


def as_markdown(results: Results) -> str:
    """The table, and the answers below it."""
    sft, dpo = results["sft"], results["dpo"]
    low, high = dpo["interval_95"]
    rows = [
        ("SFT: held-out loss, nats/token", f"{sft['loss_before']:.4f}", f"{sft['loss_after']:.4f}", sft["held_out_rows"]),
        ("DPO: held-out loss, nats", f"{math.log(2):.4f}", f"{dpo['loss']:.4f}", dpo["held_out_pairs"]),
        (
            "DPO: preference accuracy (95 % interval)",
            "50 % (a tie)",
            f"{dpo['preference_accuracy']:.1%} ({low:.1%} to {high:.1%})",
            dpo["held_out_pairs"],
        ),
        ("to compare: the longer answer wins", "", f"{dpo['longer_wins']:.1%}", dpo["held_out_pairs"]),
        ("DPO: KL from the SFT model, nats/token", "0", f"{dpo['kl']:.4f}", min(dpo["held_out_pairs"], 32)),
    ]
    lines = ["| measured on held-out rows | before | after | rows |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    minutes = ", ".join(f"{stage} {results[stage]['training_seconds'] / 60:.1f}" for stage in ("sft", "dpo"))
    lines += [
        "",
        f"Trained on {sft['rows']} demonstrations and {dpo['pairs']} pairs. Minutes: {minutes}, all {results['minutes']:.1f}.",
    ]
    for n, prompt in enumerate(PROMPTS):
        lines += ["", f"**{prompt}**", ""]
        lines += [f"- {when}: {' '.join(said[n].split())}" for when, said in results["answers"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model to start from: a folder or a hub id")
    parser.add_argument("--data", nargs="+", required=True, help="demonstrations and pairs, or a folder with sft.* and dpo.*")
    parser.add_argument("--rows", type=int, default=200, help="rows that each stage trains on, about; as many are held out")
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage; left out: the config's epochs")
    parser.add_argument("--output-dir", type=Path, help="left out: the config's")
    began, config = time.perf_counter(), configured(parser.parse_args())
    assert config.start_checkpoint is not None
    tuned, of_sft = sft(config)
    preferred, of_dpo = dpo(config, tuned)
    checkpoints = {"before": config.start_checkpoint, "after SFT": tuned, "after DPO": preferred}
    said = {when: answers(checkpoint) for when, checkpoint in checkpoints.items()}
    results = {"sft": of_sft, "dpo": of_dpo, "answers": said, "minutes": (time.perf_counter() - began) / 60}
    (config.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (config.output_dir / "results.md").write_text(as_markdown(results), encoding="utf-8")
    print(f"\n{as_markdown(results)}\ntable: {config.output_dir / 'results.md'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
