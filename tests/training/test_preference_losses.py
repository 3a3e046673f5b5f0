"""Every preference loss through a whole run: before the first update policy and reference agree, so its value is known."""

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import logged, write_jsonl

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.dpo import LOSS_OPTIONS
from modern_llm.training.train_dpo import run_dpo

LN2 = math.log(2)
BETA = 0.25
AT_THE_START = {  # all log-ratios are 0, σ(0) = ½, 1/(2β) = 2
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "hinge": 1.0,
    "ipo": 4.0,
    "exo_pair": -LN2 - math.log(0.9) / 2 - math.log(0.1) / 2,
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "sppo_hard": 8.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": LN2 / 2 + 1 / 2,
}
OPTIONS: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_a_run_starts_at_the_known_value_and_the_loss_falls(name: str, start: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Who {n}?", "chosen": f"Anna {n}.", "rejected": "Nobody at all."} for n in range(4)]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    settings = TrainingConfig(
        output_dir=tmp_path / "run", batch_size=4, max_steps=4, warmup_steps=0, learning_rate=1e-3, log_every=1,
        mixed_precision="fp32",
    )  # fmt: skip
    run_dpo(start, settings, DPOConfig(loss_type=name, beta=BETA, **OPTIONS.get(name, {})), pairs)  # type: ignore[arg-type]
    losses = logged(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(AT_THE_START[name], abs=1e-5)
    assert losses[-1] < losses[0]
