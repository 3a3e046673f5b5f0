"""The runs that are disturbed: all three stages, with everything switched on that a resumed run must continue exactly."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import ANSWERS, QUESTIONS, SENTENCES, WRONG, save_start, tiny_model, tiny_tokenizer, write_jsonl

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "dropout": 0.1, "vocab_size": 300}
TRAINING = {
    "output_dir": "run",  # of the folder in which a run is started, so that the records of two runs are the same bytes
    "num_epochs": 2,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 0.01,
    "mixed_precision": "fp32",
    "compile": "off",
    "save_every": 1,
    "eval_every": 4,
    "log_every": 2,
}
LORA = {"rank": 64, "alpha": 32.0}  # so wide that the optimizer keeps a part of its state in 8 bits


@dataclass(frozen=True)
class Scenario:
    """A run of the command line."""

    name: str
    command: str
    config: dict[str, Any]
    run_name: str
    """Name of the final checkpoint's folder without `_final`, and of the run in `metrics.jsonl`."""

    def write(self, path: Path, changes: dict[str, Any]) -> None:
        """The config file, some of the training config's fields changed."""
        config = copy.deepcopy(self.config)
        config["train_config"].update(changes)
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML


def scenarios(folder: Path) -> dict[str, Scenario]:
    """All scenarios; their data and their start are written to a folder."""
    rows = range(14)
    first = [{"text": f"{SENTENCES[i % 8]} {SENTENCES[(3 * i + 1) % 8]} It was day {i}."} for i in rows]
    second = [{"text": f"Day {i}. {SENTENCES[(5 * i + 2) % 8]}"} for i in range(9)]
    asked = [f"{QUESTIONS[i % 6]} Say it for day {i}." for i in rows]
    chats = [{"prompt": asked[i], "completion": f"{ANSWERS[i % 6]} It was day {i}."} for i in rows]
    pairs = [{"prompt": asked[i], "chosen": ANSWERS[i % 6], "rejected": WRONG[(i + i // 6) % 6]} for i in rows]
    texts, more = write_jsonl(folder / "texts.jsonl", first), write_jsonl(folder / "more.jsonl", second)
    chats_file, pairs_file = write_jsonl(folder / "chats.jsonl", chats), write_jsonl(folder / "pairs.jsonl", pairs)
    tokenizer = tiny_tokenizer()
    start = str(save_start(tiny_model(tokenizer, seed=1, dropout=0.1, max_seq_len=128), tokenizer, folder / "start"))

    def pretrain(name: str, **changes: Any) -> Scenario:
        mixture = {str(texts): 0.5, str(more): 1.2}
        data = {"dataset_name": mixture, "max_length": 64, "eval_fraction": 0.15}
        config = {"model_config": SHAPE, "train_config": {**TRAINING, **changes}, "dataset_config": data}
        return Scenario(name, "pretrain", config, "pretrain")

    def sft(name: str, packing: bool, **changes: Any) -> Scenario:
        data = {"dataset_name": str(chats_file), "packing": packing, "max_length": 128, "eval_fraction": 0.2}
        config = {"pretrain_checkpoint": start, "train_config": {**TRAINING, **changes}, "dataset_config": data}
        return Scenario(name, "sft", config, "sft")

    def dpo(name: str, options: dict[str, Any], **changes: Any) -> Scenario:
        data = {"dataset_name": str(pairs_file), "eval_fraction": 0.2}
        train = {**TRAINING, **changes}
        config = {"sft_checkpoint": start, "train_config": train, "dpo_config": options, "preference_config": data}
        return Scenario(name, "dpo", config, "dpo")

    moving = {"sync_ref_model": True, "ref_model_sync_steps": 2, "disable_dropout": False}
    dropping = {**LORA, "dropout": 0.1}
    found = [
        pretrain("pretrain: a mixture, Muon, an average, z-loss", optimizer="muon", ema_decay=0.9, z_loss=1e-3),
        sft("sft: adapters, packs, 8 bits", True, optimizer="adamw_8bit", adapter=dropping, batch_size=2, micro_batch_size=1),
        sft("sft: all weights, 8 bits, an average", False, optimizer="adamw_8bit", ema_decay=0.9),
        dpo("dpo: adapters, a running mean", {"loss_type": "bco_pair"}, adapter=LORA, ema_decay=0.9),
        dpo("dpo: a moving reference", moving, optimizer="adamw", micro_batch_size=1),
    ]
    return {scenario.name: scenario for scenario in found}


NAMES = (
    "pretrain: a mixture, Muon, an average, z-loss",
    "sft: adapters, packs, 8 bits",
    "sft: all weights, 8 bits, an average",
    "dpo: adapters, a running mean",
    "dpo: a moving reference",
)
"""All of them, for tests that are made before any folder is there."""
ONE_OF_EACH_STAGE = (NAMES[0], NAMES[1], NAMES[3])
