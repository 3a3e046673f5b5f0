"""`run_dpo` against the oracle: every preference loss and option, every layout, fp32 and bf16.

Policy and reference are sharpened models of different weights where a case does not say otherwise, so that no log-ratio is 0
and no two answers are equally likely. Six pairs in steps of four: the second step holds two, the third begins an epoch.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import oracle
import pytest
import torch
from condition import Plain, loss_rounding
from helpers import (
    chat,
    largest_difference,
    logged,
    recorded_gradients,
    relative_error,
    save_start,
    sharpened,
    tiny_model,
    weights,
    write_jsonl,
)
from tolerances import GRADIENT, LOSS, TIMES_OWN, TIMES_OWN_NORM, WEIGHT
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.dpo import LOSS_OPTIONS, OPTIONS
from modern_llm.data.loader import epoch_order
from modern_llm.training.train_dpo import run_dpo

SEED, STEPS, BATCH = 3, 3, 4
RATE, DECAY, MAX_NORM, BETAS = 3e-3, 0.1, 0.5, (0.9, 0.95)
EPSILON = 1e-3
"""As in `test_oracle.py`: it keeps the update a smooth function of the gradient."""
BETA = 0.3
TRIPLES = (
    ("Who sat?", "The cat.", "A dog sat."),
    ("Where did the dog run?", "on the roof", "Eight swans"),
    ("What does he bake?", "Cakes", "Bread"),
    ("Did it rain?", "It rained.", "back again"),
    ("Why?", "No one knows", "She sells bread"),
    ("How many swans?", "Eight swans, at dawn", "She sells bread"),
)
"""Answers of like length, so that policy and reference put the pairs in another order, which `aot` is about."""
SHAPE = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
Split = int | str
"""Pairs of a micro-batch, or how many tokens it may hold."""
SPLITS: tuple[Split, ...] = (1, 2, BATCH, "110 tokens")


@dataclass(frozen=True)
class Case:
    """A config, and which model the reference is."""

    losses: dict[str, float]
    options: dict[str, Any] = field(default_factory=dict)
    reference: Literal["other", "start", "none"] = "other"


def case(*losses: str, reference: Any = "other", **options: Any) -> Case:
    return Case(dict.fromkeys(losses, 1.0), {"beta": BETA, **options}, reference)


SMOOTHED = {"label_smoothing": 0.1}
CASES: dict[str, Case] = {
    # every loss
    "sigmoid": case("sigmoid"),
    "sigmoid_norm": case("sigmoid_norm", beta=2.0),
    "hinge": case("hinge"),
    "ipo": case("ipo"),
    "exo_pair": case("exo_pair", **SMOOTHED),
    "nca_pair": case("nca_pair"),
    "robust": case("robust", **SMOOTHED),
    "bco_pair": case("bco_pair"),
    "sppo_hard": case("sppo_hard"),
    "aot": case("aot"),
    "aot_unpaired": case("aot_unpaired"),
    "apo_zero": case("apo_zero"),
    "apo_down": case("apo_down"),
    "discopop": case("discopop", discopop_tau=0.5),
    "simpo": case("simpo", reference="none", beta=2.0, simpo_gamma=0.7),
    "orpo": Case({"orpo": 1.0}, {"orpo_lambda": 0.5}, "none"),
    "cpo": case("cpo", reference="none", cpo_alpha=0.5),
    "sigmoid+sft": case("sigmoid", "sft"),
    # the start is the reference: all log-ratios of step 1 are 0
    "sigmoid, start": case("sigmoid", reference="start"),
    "ipo, start": case("ipo", reference="start"),
    "bco_pair, start": case("bco_pair", reference="start"),
    "aot_unpaired, start": case("aot_unpaired", reference="start"),
    "discopop, start": case("discopop", reference="start"),
    # parameters
    "conservative": case("sigmoid", **SMOOTHED),
    "smoothed aot": case("aot", **SMOOTHED),
    "smoothed aot_unpaired": case("aot_unpaired", **SMOOTHED),
    "bco_pair without shift": case("bco_pair", bco_running_mean=False),
    "default parameters of simpo": case("simpo", reference="none"),
    "default parameters of orpo": Case({"orpo": 1.0}, {}, "none"),
    "default parameters of cpo": case("cpo", reference="none"),
    # f-divergences
    "sigmoid, forward_kl": case("sigmoid", f_divergence_type="forward_kl"),
    "sigmoid, js": case("sigmoid", f_divergence_type="js_divergence"),
    "sigmoid, alpha": case("sigmoid", f_divergence_type="alpha_divergence"),
    "sigmoid, alpha below 0": case("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=-0.2),
    "sigmoid, alpha above 1": case("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.3),
    "sigmoid_norm, js": case("sigmoid_norm", f_divergence_type="js_divergence"),
    "hinge, forward_kl": case("hinge", f_divergence_type="forward_kl"),
    "ipo, alpha": case("ipo", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
    "exo_pair, js": case("exo_pair", f_divergence_type="js_divergence", **SMOOTHED),
    "robust, forward_kl": case("robust", f_divergence_type="forward_kl", **SMOOTHED),
    "discopop, js": case("discopop", f_divergence_type="js_divergence", discopop_tau=0.5),
    # pairs weighted by how likely they are
    "sigmoid, weighted": case("sigmoid", use_weighting=True),
    "simpo, weighted": case("simpo", reference="none", use_weighting=True),
    "cpo, weighted": case("cpo", reference="none", use_weighting=True),
    # the longer answer's last tokens count less
    "sigmoid, ld 0": case("sigmoid", ld_alpha=0.0),
    "aot, ld": case("aot", ld_alpha=0.3),
    "bco_pair, ld": case("bco_pair", ld_alpha=0.3),
    "cpo, ld": case("cpo", reference="none", ld_alpha=0.3),
    "discopop, ld, start": case("discopop", reference="start", ld_alpha=0.5),
    "hinge, ld, js, weighted": case("hinge", ld_alpha=0.5, f_divergence_type="js_divergence", use_weighting=True),
    # no reference at all
    "sigmoid, free": case("sigmoid", reference="none", reference_free=True),
    "bco_pair, free": case("bco_pair", reference="none", reference_free=True),
    "smoothed aot_unpaired, free": case("aot_unpaired", reference="none", reference_free=True, **SMOOTHED),
    # the reference follows the policy
    "sigmoid, sync": case("sigmoid", reference="start", sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.4),
    "aot, sync": case("aot", reference="start", sync_ref_model=True, ref_model_sync_steps=2),
    # mixtures
    "bco_pair+sigmoid+sft": Case({"bco_pair": 0.5, "sigmoid": 1.5, "sft": 0.2}, {"beta": BETA}),
    "aot+simpo+orpo": Case({"aot": 0.7, "simpo": 0.4, "orpo": 2.0}, {"beta": BETA}),
    "cpo+nca_pair+sft": Case({"cpo": 0.6, "nca_pair": 0.3, "sft": 0.1}, {"beta": BETA, "ld_alpha": 0.4}),
    "sigmoid+sft, weighted": Case({"sigmoid": 1.0, "sft": 0.5}, {"beta": BETA, "use_weighting": True}),
}
SPLIT_CASES = ("hinge, ld, js, weighted", "aot, ld", "bco_pair+sigmoid+sft")
BF16_CASES = ("sigmoid", "ipo", "orpo", "aot, ld", "bco_pair+sigmoid+sft", "sigmoid, weighted", "sigmoid, sync")


@dataclass
class Truth:
    """What the oracle says of a case."""

    losses: list[float]
    gradients: dict[str, Tensor]
    """Of step 1, clipped."""
    weights: dict[str, Tensor]
    loss_rounding: float
    """What the losses of the same training may be off by in fp32, over a floor."""


class World:
    """Two models, six pairs, and what the oracle said of the cases so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        self.folder = folder
        self.model, self.other = (sharpened(tiny_model(tokenizer, seed=seed, **SHAPE), 12.0) for seed in (1, 2))
        self.start, self.other_start = (
            save_start(model, tokenizer, folder / name) for model, name in ((self.model, "start"), (self.other, "other"))
        )
        rows = [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in TRIPLES]
        self.data = PreferenceDatasetConfig(dataset_name=str(write_jsonl(folder / "rows.jsonl", rows)))
        pairs = [(chat(tokenizer, q, a), chat(tokenizer, q, w)) for q, a, w in TRIPLES]
        assert BATCH < len(pairs) < 2 * BATCH, "step 2 must hold fewer pairs than step 1, and step 3 begin the second epoch"
        orders = [epoch_order(len(pairs), SEED, epoch) for epoch in (0, 1)]
        self.batches = [[pairs[i] for i in part] for part in (orders[0][:BATCH], orders[0][BATCH:], orders[1][:BATCH])]
        self.truths: dict[str, Truth] = {}

    def truth(self, name: str) -> Truth:
        if name not in self.truths:
            self.truths[name] = self._ask_oracle(CASES[name])
        return self.truths[name]

    def _ask_oracle(self, case: Case) -> Truth:
        losses, gradients, slow = self.train(case, torch.float64)
        plain, _, _ = self.train(case, torch.float32)
        scale = oracle.clip_scale(gradients, MAX_NORM)
        final = {name: p.detach() for name, p in slow.named_parameters()}
        rounding = max(abs(rounded - exact) for rounded, exact in zip(plain, losses, strict=True))
        return Truth(losses, {name: g * scale for name, g in gradients.items()}, final, TIMES_OWN * rounding)

    def train(self, case: Case, precision: torch.dtype) -> tuple[list[float], dict[str, Tensor], Any]:
        """Losses, gradients of step 1 and the model after the oracle's steps; in less than float64 with the plain model."""
        model, loss = self.policy_and_loss(case, precision)
        decayed = {name for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name}
        rates = [oracle.learning_rate(s, RATE, 2, STEPS, "linear", TrainingConfig().min_lr_ratio) for s in range(1, STEPS + 1)]
        optimizer = oracle.AdamW(model, decayed, DECAY, BETAS, EPSILON)
        return *oracle.train(model, loss, self.batches, optimizer, rates, MAX_NORM), model

    def policy_and_loss(self, case: Case, precision: torch.dtype) -> tuple[Any, Callable[[Any, list[Any]], Tensor]]:
        """The reference is float64: ours rounds otherwise than the policy, so that errors of the two do not cancel."""
        rewards, options = oracle_options(case)
        every, share = case.options.get("ref_model_sync_steps"), case.options.get("ref_model_mixup_alpha", 0.6)
        slow = oracle.float64_copy(self.model)
        policy = slow if precision == torch.float64 else Plain(slow.float(), precision)
        reference = {"other": self.other, "start": self.model, "none": None}[case.reference]
        reference = None if reference is None else oracle.float64_copy(reference)
        steps_done = 0

        def loss(model: Any, batch: list[Any]) -> Tensor:
            nonlocal steps_done
            if every and steps_done and steps_done % every == 0:  # TR-DPO, arXiv 2404.09656, at the end of the step before
                for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):  # type: ignore[union-attr]
                    theirs.data = share * ours.detach() + (1 - share) * theirs.data
            steps_done += 1
            return oracle.preference_loss(model, reference, batch, case.losses, rewards=rewards, **options)

        return policy, loss

    def run(self, name: str, split: Split, precision: Any = "fp32") -> tuple[Path, list[dict[str, Tensor]]]:
        """(output folder, gradients of each step) of a real run."""
        case, folder = CASES[name], self.folder / f"{name} {split} {precision}"
        batching: Any = {"micro_batch_size": split} if isinstance(split, int) else {"micro_batch_tokens": int(split.split()[0])}
        config = TrainingConfig(
            output_dir=folder, run_name="run", batch_size=BATCH, **batching, max_steps=STEPS, warmup_steps=2,
            lr_schedule="linear", optimizer="adamw", learning_rate=RATE, weight_decay=DECAY, max_grad_norm=MAX_NORM,
            adam_betas=BETAS, adam_epsilon=EPSILON, seed=SEED, log_every=1, mixed_precision=precision,
        )  # fmt: skip
        other = {"reference_checkpoint": self.other_start} if case.reference == "other" else {}
        with recorded_gradients() as steps:
            losses: Any = {"loss_type": list(case.losses), "loss_weights": list(case.losses.values())}
            run_dpo(self.start, config, DPOConfig(**losses, **case.options, **other), self.data)
        return folder, steps


def oracle_options(case: Case) -> tuple[list[float] | None, dict[str, Any]]:
    """Where the oracle puts the rewards of each step (None: it shifts nothing), and its arguments."""
    others = ("bco_running_mean", "reference_free", "sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")
    arguments = {name: value for name, value in case.options.items() if name not in others}
    return ([] if case.options.get("bco_running_mean", True) else None), arguments


@pytest.fixture(scope="module")
def world(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tokenizer, tmp_path_factory.mktemp("world"))


def assert_equal(world: World, name: str, split: Split) -> None:
    truth = world.truth(name)
    folder, gradients = world.run(name, split)
    for found, wanted in zip(logged(folder, "loss"), truth.losses, strict=True):
        assert abs(found - wanted) <= LOSS * max(wanted, 1.0) + truth.loss_rounding
    assert relative_error(gradients[0], truth.gradients) <= GRADIENT
    assert largest_difference(weights(folder / "run_final"), truth.weights) <= WEIGHT


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_equal_the_oracle(world: World, name: str) -> None:
    assert_equal(world, name, 2)


@pytest.mark.parametrize("split", [split for split in SPLITS if split != 2])
@pytest.mark.parametrize("name", SPLIT_CASES)
def test_every_layout_equals_the_oracle(world: World, name: str, split: Split) -> None:
    assert_equal(world, name, split)


@pytest.mark.parametrize("name", BF16_CASES)
def test_bf16_losses_are_as_far_from_the_oracle_as_the_plain_models(world: World, name: str) -> None:
    truth = world.truth(name)
    folder, _ = world.run(name, 2, "bf16")
    slow, loss = world.policy_and_loss(CASES[name], torch.float64)
    spread = max(loss_rounding(loss, slow, batch, torch.bfloat16) for batch in world.batches)
    assert logged(folder, "loss") == pytest.approx(truth.losses, abs=LOSS + TIMES_OWN_NORM * spread)
    assert logged(folder, "loss") != pytest.approx(truth.losses, rel=1e-6), "this did not run in bf16"


def test_every_option_of_the_table_changes_the_loss(world: World) -> None:
    """So no equality above would hold without it. By the oracle, over one step, with the other model as reference."""
    reference, slow = (oracle.float64_copy(model) for model in (world.other, world.model))
    found = {}
    with torch.no_grad():
        for name, case in CASES.items():
            rewards, options = oracle_options(case)
            if case.reference != "start":
                theirs = None if case.reference == "none" else reference
                found[name] = float(
                    oracle.preference_loss(slow, theirs, world.batches[0], case.losses, rewards=rewards, **options)
                )
    for (one, value), (other, another) in itertools.combinations(found.items(), 2):
        assert abs(value / another - 1) > 1e-3, f"{one} is as good as {other}"


def test_the_table_has_every_loss_and_every_option() -> None:
    assert {name for case in CASES.values() for name in case.losses} == LOSS_OPTIONS.keys()
    assert {name for case in CASES.values() for name in case.options} >= OPTIONS.keys() - {"reference_checkpoint"}
