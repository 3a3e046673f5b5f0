"""Every preference loss through a whole run: it starts at a value that is known by hand, falls, and is the same on two ranks.

The start gives every token the probability 1/V: all log-ratios are 0, and n tokens have the log-prob −n ln V.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    identical,
    largest_difference,
    logged,
    made_once,
    metric_lines,
    save_start,
    tiny_model,
    weights,
    write_jsonl,
)
from tolerances import FP32_ROUNDING, LOSS, SPLIT_WEIGHT
from transformers import PreTrainedTokenizerFast
from two_ranks import PREFERENCES, prefer, prefer_on_both, preference_inputs

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.dpo import LOSS_OPTIONS
from modern_llm.training.train_dpo import run_dpo

LN2 = math.log(2)
BETA = 0.25
CHOSEN, REJECTED = "Anna.", "Nobody at all."
OPTIONS: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "simpo": {"simpo_gamma": 0.75},
    "orpo": {"orpo_lambda": 0.5},
    "cpo": {"cpo_alpha": 0.5},
    "sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
}


def at_the_start(tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """σ(0) = ½ and 1/(2β) = 2; m tokens more in the rejected answer make p_w − p_l = m ln V."""
    token = math.log(len(tokenizer))
    more = len(tokenizer.encode(REJECTED)) - len(tokenizer.encode(CHOSEN))
    return {
        "sigmoid": LN2,
        "sigmoid_norm": LN2,
        "hinge": 1.0,
        "ipo": 4.0,
        "exo_pair": -LN2 - math.log(0.9) / 2 - math.log(0.1) / 2,
        "nca_pair": 2 * LN2,
        "robust": LN2,
        "bco_pair": 2 * LN2,
        "sppo_hard": 8.0,
        "aot": LN2,
        "aot_unpaired": LN2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": LN2 / 2 + 1 / 2,
        "simpo": math.log1p(math.exp(0.75)),
        "orpo": 0.5 * LN2 + token,
        "cpo": math.log1p(math.exp(-BETA * more * token)) + 0.5 * token,
        "sft": LN2 + 0.1 * token,
    }


@pytest.fixture(scope="module")
def uniform_start(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(tokenizer, seed=1, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return save_start(model, tokenizer, tmp_path_factory.mktemp("uniform"))


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_a_run_starts_at_the_known_value_and_the_loss_falls(
    name: str, uniform_start: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Who {n}?", "chosen": CHOSEN, "rejected": REJECTED} for n in range(4)]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    settings = TrainingConfig(
        output_dir=tmp_path / "run", batch_size=4, micro_batch_size=2, max_steps=4, warmup_steps=0, learning_rate=1e-3,
        log_every=1, mixed_precision="fp32",
    )  # fmt: skip
    beta = {"beta": BETA} if name == "sft" or "beta" in LOSS_OPTIONS[name] else {}
    run_dpo(uniform_start, settings, DPOConfig(**{"loss_type": name, **beta, **OPTIONS.get(name, {})}), pairs)
    losses = logged(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(at_the_start(tokenizer)[name], abs=1e-5)
    assert losses[-1] < losses[0]


# Two ranks with unequal numbers of pairs


@pytest.fixture(scope="module")
def two_ranks(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "preference_ranks", lambda folder: prefer_on_both(folder, start))


@pytest.mark.parametrize("name", PREFERENCES)
def test_two_ranks_with_unequal_numbers_of_pairs_equal_one_rank(
    name: str, two_ranks: Path, start: Path, tmp_path: Path
) -> None:
    preference_inputs(tmp_path)
    prefer(start, tmp_path, name)
    assert largest_difference(weights(two_ranks / name / "run_final"), weights(tmp_path / name / "run_final")) <= SPLIT_WEIGHT
    together, alone = metric_lines(two_ranks / name), metric_lines(tmp_path / name)
    assert len(logged(tmp_path / name, "loss")) == 5
    assert len(logged(tmp_path / name, "eval/kl")) == int(name == "held-out pairs")
    for line, wanted in zip(together, alone, strict=True):
        assert line.pop("run") == wanted.pop("run")
        rounding = 4 * FP32_ROUNDING * max(map(abs, wanted.values()))  # a margin is made of four sums of log-probs
        assert line == pytest.approx(wanted, abs=LOSS + rounding, rel=LOSS)


def test_a_resumed_whole_step_run_on_two_ranks_is_bit_identical_to_a_straight_one(two_ranks: Path) -> None:
    """The shift of `bco_pair` is saved by the first rank and read by both."""
    assert identical(weights(two_ranks / "resumed/run_final"), weights(two_ranks / "bco_pair/run_final"))
    assert metric_lines(two_ranks / "resumed") == metric_lines(two_ranks / "bco_pair")
