"""The average of the weights: its arithmetic, where it is used, and that a resumed run has the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ANSWERS,
    QUESTIONS,
    SENTENCES,
    WRONG,
    identical,
    largest_difference,
    logged,
    make_loop,
    metric_lines,
    random_examples,
    recorded_loops,
    snapshot,
    stopped_after_first_save,
    tiny_model,
    weights,
    write_jsonl,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from modern_llm.checkpoint import load_state
from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ModelConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.data.lm_datasets import held_out_blocks
from modern_llm.data.loader import MicroBatch
from modern_llm.data.tokenizer import TextEncoder
from modern_llm.initial.checkpoint import load_model
from modern_llm.models.policy import Policy
from modern_llm.objectives import LanguageModelingObjective, Outcome
from modern_llm.training.ema import WeightAverage
from modern_llm.training.optim import Optimizer
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

SHAPE = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
DECAY = 0.75


@contextmanager
def recorded_weights() -> Iterator[list[dict[str, Tensor]]]:
    """All trainable weights after each optimizer step taken inside."""
    seen: list[dict[str, Tensor]] = []
    original = Optimizer.step

    def step(self: Optimizer) -> None:
        original(self)
        seen.append({name: parameter.detach().clone() for name, parameter in self.groups.all.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", step)
        yield seen


def average_by_hand(start: dict[str, Tensor], steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """In float64."""
    average = {name: start[name].double() for name in start}
    for step in steps:
        average = {name: decay * average[name] + (1 - decay) * step[name].double() for name in average}
    return average


def run(stage: str, start: Path, folder: Path, **changes: Any) -> Path:
    settings = TrainingConfig(
        output_dir=folder / "run", run_name="run", batch_size=2, micro_batch_size=1, max_steps=4, warmup_steps=0, log_every=1,
        learning_rate=1e-2, mixed_precision="fp32", ema_decay=DECAY, **changes,
    )  # fmt: skip
    if stage == "pretrain":
        data = write_jsonl(folder / "rows.jsonl", [{"text": text} for text in SENTENCES])
        documents = LanguageModelingDatasetConfig(dataset_name=str(data), max_length=32, eval_fraction=0.3)
        return run_training(SHAPE, settings, documents, str(start))
    rows = zip(QUESTIONS, ANSWERS, WRONG, strict=True)
    if stage == "sft":
        data = write_jsonl(folder / "rows.jsonl", [{"question": q, "answer": a} for q, a, _ in rows])
        return run_sft(start, settings, InstructionDatasetConfig(dataset_name=str(data)))
    data = write_jsonl(folder / "rows.jsonl", [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in rows])
    return run_dpo(start, settings, DPOConfig(), PreferenceDatasetConfig(dataset_name=str(data)))


def test_the_average_by_hand() -> None:
    """From 8 with decay ¾: after weights 4 and 0 it is ¾·8 + ¼·4 = 7, then ¾·7 = 5.25."""
    weight = nn.Parameter(torch.tensor([8.0]))
    average = WeightAverage({"weight": weight}, decay=0.75)
    values = []
    for new in (4.0, 0.0):
        with torch.no_grad():
            weight.fill_(new)
        average.update()
        values.append(float(average.averages["weight"]))
    assert values == [7.0, 5.25]
    with average.in_place():
        assert float(weight.detach()) == 5.25
    assert float(weight.detach()) == 0.0
    assert float(average.averages["weight"]) == 5.25


def test_weights_come_back_to_the_last_bit_and_stay_where_they_are_also_after_an_error() -> None:
    weight = nn.Parameter(torch.randn(50))
    before, place = weight.detach().clone(), weight.data_ptr()
    average = WeightAverage({"weight": weight}, decay=0.9)
    average.averages["weight"].mul_(1 / 3)
    kept = average.averages["weight"].clone()

    def evaluate_and_fail() -> None:
        with average.in_place():
            assert torch.equal(weight, kept)
            assert weight.data_ptr() == place
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_and_fail()
    assert torch.equal(weight, before)
    assert torch.equal(average.averages["weight"], kept)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_every_stage_ends_with_the_average_of_its_steps(stage: str, start: Path, tmp_path: Path) -> None:
    with recorded_weights() as steps, recorded_loops() as loops:
        final = run(stage, start, tmp_path, save_every=1)
    assert len(steps) == 4
    first = load_state(tmp_path / "run/checkpoints/step-000001")["weight_average"]
    began = {name: (value - (1 - DECAY) * steps[0][name]) / DECAY for name, value in first.items()}
    assert largest_difference(weights(final), average_by_hand(began, steps, DECAY)) <= 1e-6
    assert largest_difference(weights(final), steps[-1]) > 1e-3, "the last step's own weights are others"
    assert identical(snapshot(loops[0].policy.model), steps[-1]), "the loop has its own weights back"
    if stage == "sft":  # the average begins with the start's weights
        assert largest_difference(began, weights(start)) <= 1e-6
    if stage == "dpo":
        assert logged(tmp_path / "run", "rewards/margins")[0] == pytest.approx(0, abs=1e-5), "the reference is the start"


def test_periodic_checkpoints_keep_the_weights_themselves_and_the_average_beside_them(start: Path, tmp_path: Path) -> None:
    with recorded_weights() as steps:
        run("sft", start, tmp_path, save_every=2)
    saved = tmp_path / "run/checkpoints/step-000002"
    assert identical(weights(saved), steps[1])
    average = load_state(saved)["weight_average"]
    assert "lm_head.weight" not in average, "a tied weight is kept once"
    assert largest_difference(average, average_by_hand(weights(start), steps[:2], DECAY)) <= 1e-6


def test_a_resumed_run_is_bit_identical(start: Path, tmp_path: Path) -> None:
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = run("pretrain", start, tmp_path / "straight", save_every=2, eval_every=1)
    with stopped_after_first_save():
        run("pretrain", start, tmp_path / "stopped", save_every=2, eval_every=1)
    resumed = run("pretrain", start, tmp_path / "stopped", save_every=2, eval_every=1)
    assert identical(weights(resumed), weights(straight))
    wanted = metric_lines(tmp_path / "straight/run")
    assert metric_lines(tmp_path / "stopped/run") == wanted


def test_evaluations_are_of_the_average(start: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The last evaluation's loss is that of the final checkpoint."""
    final = run("pretrain", start, tmp_path, eval_every=1)
    with_average = logged(tmp_path / "run", "eval/loss")[-1]
    data = LanguageModelingDatasetConfig(dataset_name=str(tmp_path / "rows.jsonl"), max_length=32, eval_fraction=0.3)
    blocks = held_out_blocks(data, TextEncoder(tokenizer), 32)
    loop = make_loop(load_model(final), random_examples((5,)), tmp_path / "other", batch_size=1, max_steps=1)
    assert loop.evaluate(blocks)["loss"] == pytest.approx(with_average, abs=1e-6)


def test_a_skipped_step_does_not_move_the_average(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    class Spoiled(LanguageModelingObjective):
        calls = 0

        def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
            outcome = super().__call__(policy, batch)
            self.calls += 1
            if self.calls == 2:
                outcome.terms["nll"] = replace(outcome.terms["nll"], total=outcome.terms["nll"].total * float("nan"))
            return outcome

    seen: list[dict[str, Tensor]] = []

    def save(step: int, state: dict[str, Any]) -> None:
        seen.append({name: value.clone() for name, value in state["weight_average"].items()})

    model = tiny_model(tokenizer)
    loop = make_loop(
        model, random_examples((5, 6, 7, 8)), tmp_path, objective=Spoiled(), save=save, save_every=1, batch_size=1,
        micro_batch_size=1, max_steps=4, learning_rate=1e-2, ema_decay=DECAY,
    )  # fmt: skip
    loop.run()
    assert identical(seen[1], seen[0])
    assert not identical(seen[2], seen[1])


def test_what_does_not_train_has_no_average(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_model(tokenizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    loop = make_loop(model, random_examples((5,)), tmp_path, batch_size=1, max_steps=1, ema_decay=DECAY)
    assert loop.average is not None
    assert loop.average.averages.keys() == {name for name, _ in model.named_parameters() if "layers.1" in name}
