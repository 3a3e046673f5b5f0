"""Do SFT and DPO with LoRA compute what TRL computes? The losses of five steps from one adapter, side by side.

    make parity-trl
    make parity-trl ARGS="--model models/smollm2-135m-instruct"

An adapter is trained for two steps by `run_sft`, so that neither A nor B is zero, and saved. Both sides continue with that
folder: `run_sft` and `run_dpo` with `adapter.continue_training`, TRL's trainers with the folder loaded by peft. TRL gets the
token ids and labels of our rows in the order in which our loader draws them; its own tokenizing would also score the line
break that ChatML puts behind an answer. Every other setting is the same; the printed table has those whose defaults differ.

Limits, on each step's loss:

- fp32: 1e-4 of the loss.
- bf16: the rounding of log-probs. d is the root mean square, over the scored tokens of the first step, of the difference
  between a token's log-prob in bf16 and in fp32, measured with the plain `transformers` model. The SFT loss is a mean over n
  tokens, so the sides differ by √2·d/√n; a DPO margin sums the log-probs of both answers twice (policy and reference), so the
  mean over p pairs of n tokens in all differs by √2·β/2·d·√(2n)/p. The limit is four times that, and 2⁻⁸ of the loss (the
  spacing of bf16 at 1) for updates that were computed from rounded gradients.

Without `--model` a tiny random model is made. Data sets that are not given are those of the built-in world. Exit code 1 if a
loss is outside its limit; the last line is one JSON object.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig as TRLDPOConfig  # type: ignore - TRL exports lazily
from trl import DPOTrainer, SFTConfig, SFTTrainer  # type: ignore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.models import config_of, get_tokenizer
from common.ours import rows_of, watch
from common.peer import UNSCORED, keep_losses

from modern_llm import DPOConfig, TrainingConfig, run_dpo, run_sft
from modern_llm.config import AdapterConfig, InstructionDatasetConfig, PreferenceDatasetConfig
from modern_llm.config.resolve import resolve
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.loader import steps
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import Example
from modern_llm.data.tokenizer import load_tokenizer

STEPS, BATCH, SEED, BETA = 5, 4, 0, 0.1
RATE, TINY_RATE = 3e-4, 1e-2
"""Learning rates at which five steps move the losses of a real and of the tiny model by much more than the limits."""
FP32_LIMIT = 1e-4
SIGMAS, BF16_SPACING = 4, 2.0**-8
TRL_NAMES = {
    "learning_rate": "learning_rate", "lr_schedule": "lr_scheduler_type", "warmup_steps": "warmup_steps", "batch_size":
    "per_device_train_batch_size", "adam_betas": "adam_beta2", "weight_decay": "weight_decay", "max_grad_norm":
    "max_grad_norm", "mixed_precision": "bf16", "gradient_checkpointing": "gradient_checkpointing",
}  # fmt: skip
"""Settings of `TrainingConfig` and what TRL calls them."""
Row = dict[str, list[int]]


def tiny_model(folder: Path) -> Path:
    """Save a small random model with a tokenizer of the built-in world."""
    tokenizer = get_tokenizer(None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of("tiny", tokenizer), dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def training(out: Path, precision: Any, adapter: AdapterConfig, rate: float, max_steps: int = STEPS) -> TrainingConfig:
    return TrainingConfig(
        output_dir=out, seed=SEED, batch_size=BATCH, micro_batch_size=BATCH, max_steps=max_steps, learning_rate=rate,
        lr_schedule="constant", warmup_steps=0, optimizer="adamw", adam_betas=(0.9, 0.999), adam_epsilon=1e-8,
        weight_decay=0.0, max_grad_norm=1.0, mixed_precision=precision, adapter=adapter, log_every=1, compile="off",
    )  # fmt: skip


def peer_settings(out: Path, precision: str, rate: float) -> dict[str, Any]:
    """`training`, in TRL's names."""
    return {
        "output_dir": str(out), "seed": SEED, "per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": rate,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_epsilon": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": precision == "bf16",
        "gradient_checkpointing": False, "train_sampling_strategy": "sequential", "use_cpu": True, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


class Parity:
    """One start, and the data of both stages as each side gets them."""

    def __init__(self, folder: Path, model: Path, given: argparse.Namespace) -> None:
        self.folder, self.model, self.rate = folder, model, RATE if given.model else TINY_RATE
        limits: dict[str, Any] = {"max_rows": BATCH * (STEPS + 2)}  # some rows may be dropped
        self.instructions = InstructionDatasetConfig(dataset_name=given.demonstrations, max_length=given.max_length, **limits)
        self.pairs = PreferenceDatasetConfig(dataset_name=given.pairs, **limits)
        self.dpo = DPOConfig(beta=BETA, max_length=given.max_length)
        encoder = ChatEncoder(load_tokenizer(model))
        data = {
            "sft": prepare_instructions(self.instructions, encoder),
            "dpo": prepare_preferences(self.pairs, self.dpo, encoder),
        }
        self.drawn = {stage: drawn(prepared.train) for stage, prepared in data.items()}
        adapter = AdapterConfig(rank=8, alpha=16)
        self.start = run_sft(model, training(folder / "start", "fp32", adapter, 1e-3, max_steps=2), self.instructions)

    def ours(self, stage: str, precision: str) -> list[float]:
        """Losses of our steps; the rows that they held must be those that TRL gets."""
        out, seen = self.folder / f"{stage}-{precision}", []
        config = training(out, precision, AdapterConfig(continue_training=True), self.rate)
        watch(on_batch=lambda batch: seen.extend(rows_of(batch)))
        if stage == "sft":
            run_sft(self.start, config, self.instructions)
        else:
            run_dpo(self.start, config, self.dpo, self.pairs)
        assert seen[: BATCH * STEPS] == [example.row for example in self.drawn[stage]], "both sides train on the same rows"
        entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [entry["loss"] for entry in entries if "loss" in entry]

    def peer(self, stage: str, precision: str) -> list[float]:
        """Losses of TRL's steps on the same rows."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        settings = peer_settings(self.folder / f"trl-{stage}-{precision}", precision, self.rate)
        make = _sft_trainer if stage == "sft" else _dpo_trainer
        rows = Dataset.from_list([*map(sft_row if stage == "sft" else dpo_row, self.drawn[stage])])
        trainer = make(self.loaded(), settings, rows, tokenizer)
        losses = keep_losses(trainer)
        trainer.train()
        return losses

    def loaded(self) -> PeftModel:
        """The start as peft loads it."""
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, attn_implementation="sdpa")
        return PeftModel.from_pretrained(base, self.start, is_trainable=True)

    @torch.no_grad()
    def bf16_noise(self, stage: str) -> tuple[float, int]:
        """Root mean square of a log-prob's rounding in bf16 over the scored tokens of the first step, and their number."""
        model, found = self.loaded().eval(), []
        for segment in (segment for example in self.drawn[stage][:BATCH] for segment in example.segments):
            ids, scored = torch.tensor(segment.ids.tolist()), torch.tensor(segment.scored.tolist())[1:]
            said = []
            for enabled in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                said.append(logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0][scored])
            found.append(said[1] - said[0])
        noise = torch.cat(found)
        return float(noise.square().mean().sqrt()), len(noise)

    def limits(self, stage: str, precision: str, losses: list[float]) -> list[float]:
        """Largest difference of each step's loss, in nats; the docstring of this file derives it."""
        if precision == "fp32":
            return [FP32_LIMIT * loss for loss in losses]
        noise, tokens = self.bf16_noise(stage)
        of_loss = noise / math.sqrt(tokens) if stage == "sft" else BETA / 2 * noise * math.sqrt(2 * tokens) / BATCH
        return [SIGMAS * math.sqrt(2) * of_loss + BF16_SPACING * loss for loss in losses]


def drawn(train: Any) -> list[Example]:
    """The rows of the steps, in the order in which our loader draws them."""
    by_row = {train[i].row: train[i] for i in range(len(train))}
    return [by_row[row] for step in itertools.islice(steps(train, BATCH, BATCH, SEED), STEPS) for row in rows_of(step)]


def sft_row(example: Example) -> Row:
    (segment,) = example.segments
    ids, scored = segment.ids.tolist(), [False, *segment.scored.tolist()[1:]]
    return {"input_ids": ids, "labels": [token if counts else UNSCORED for token, counts in zip(ids, scored, strict=True)]}


def dpo_row(example: Example) -> Row:
    chosen, rejected = example.segments
    prompt = int(chosen.scored.argmax())
    assert all(segment.scored[prompt:].all() for segment in example.segments), "every token of an answer counts"
    sides = {"chosen_ids": chosen.ids[prompt:].tolist(), "rejected_ids": rejected.ids[prompt:].tolist()}
    return {"prompt_ids": chosen.ids[:prompt].tolist(), **sides}


class _PreparedDPOTrainer(DPOTrainer):
    """TRL 1.16 tokenizes pairs always; these are token ids already."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def _sft_trainer(model: Any, settings: dict[str, Any], rows: Dataset, tokenizer: Any) -> Any:
    config = SFTConfig(**settings, max_length=None, packing=False)
    return SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def _dpo_trainer(model: Any, settings: dict[str, Any], rows: Dataset, tokenizer: Any) -> Any:
    config = TRLDPOConfig(**settings, max_length=None, beta=BETA, label_smoothing=0.0, disable_dropout=True)
    return _PreparedDPOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def show_defaults(rate: float) -> None:
    """Print the settings whose defaults differ, and what both sides have here."""
    print(f"\n{'setting':24}{'our default':>16}{'TRL default':>16}   here")
    here = training(Path(), "fp32", AdapterConfig(), rate)
    for stage, kind in (("sft", SFTConfig), ("dpo", TRLDPOConfig)):
        ours = resolve(TrainingConfig(adapter=AdapterConfig()), stage)  # type: ignore[arg-type]
        theirs = kind(output_dir="unused", use_cpu=True, bf16=None)
        for name, peer in TRL_NAMES.items():
            mine, other = getattr(ours, name), getattr(theirs, peer)
            other = getattr(other, "value", other)
            if name == "adam_betas":
                mine, other = list(mine), [theirs.adam_beta1, other]
            if mine != other:
                mine = "a tenth" if name == "warmup_steps" and mine is None else mine
                print(f"{stage + '.' + name:24}{mine!s:>16}{other!s:>16}   {getattr(here, name)}")
    print(
        "the same by default: β 0.1, no label smoothing, no dropout in DPO, the reference (the adapter's own start), Adam's ε"
    )


def compare(parity: Parity, stage: str, precision: str) -> dict[str, Any]:
    """Train both sides, print the losses, and return them with what they may differ by."""
    began = time.perf_counter()
    ours, peer = parity.ours(stage, precision), parity.peer(stage, precision)
    limits = parity.limits(stage, precision, peer)
    print(f"\n{stage} in {precision} ({time.perf_counter() - began:.0f} s)")
    print(f"{'step':>4}{'ours':>14}{'TRL':>14}{'relative':>12}{'limit':>12}")
    for step, (mine, theirs, limit) in enumerate(zip(ours, peer, limits, strict=True), start=1):
        print(f"{step:4}{mine:14.8f}{theirs:14.8f}{abs(mine - theirs) / theirs:12.2e}{limit / theirs:12.2e}", flush=True)
    within = len(ours) == STEPS and all(abs(a - b) <= limit for a, b, limit in zip(ours, peer, limits, strict=True))
    largest = max(abs(a - b) / b for a, b in zip(ours, peer, strict=True))
    return {"ours": ours, "trl": peer, "largest_relative": largest, "limits": limits, "within": within}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder with a chat template. Left out: a tiny random model")
    parser.add_argument("--demonstrations", default="builtin:village", help="a file or hub id")
    parser.add_argument("--pairs", default="builtin:village", help="a file or hub id")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a sequence; longer ones are cut")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    folder = Path(tempfile.mkdtemp())
    try:
        parity = Parity(folder, (given.model or tiny_model(folder / "model")).absolute(), given)
        show_defaults(parity.rate)
        found = {f"{s}_{p}": compare(parity, s, p) for s in ("sft", "dpo") for p in ("fp32", "bf16")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    within = all(run["within"] for run in found.values())
    print(json.dumps({"bench": "parity_trl", "model": given.model.name if given.model else "tiny", "within": within, **found}))
    raise SystemExit(0 if within else 1)


if __name__ == "__main__":
    main()
