"""Optimizers and the schedule."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    SENTENCES,
    identical,
    logged,
    make_loop,
    metric_lines,
    random_examples,
    recorded_loops,
    stopped_after_first_save,
    tiny_model,
    weights,
    write_jsonl,
)
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.checkpoint import load_state
from modern_llm.config import (
    LanguageModelingDatasetConfig,
    ModelConfig,
    TrainingConfig,
    UserError,
    resolve,
)
from modern_llm.training.muon import Muon
from modern_llm.training.optim import Optimizer, ParameterGroups, learning_rate_factor
from modern_llm.training.train_lm import run_training

CPU = torch.device("cpu")
SHAPE = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
RATES: dict[Any, float] = {"adamw": 1e-2, "rmsprop": 3e-3, "muon": 1e-2, "adamw_8bit": 1e-2}


def documents(folder: Path) -> LanguageModelingDatasetConfig:
    rows = [{"text": text} for text in SENTENCES]
    return LanguageModelingDatasetConfig(dataset_name=str(write_jsonl(folder / "rows.jsonl", rows)), max_length=32)


def settings(optimizer: Any, folder: Path, **more: Any) -> TrainingConfig:
    return TrainingConfig(
        output_dir=folder, run_name="run", optimizer=optimizer, learning_rate=RATES[optimizer], batch_size=4,
        micro_batch_size=2, warmup_steps=2, log_every=1, mixed_precision="fp32", **more,
    )  # fmt: skip


def build(model: PreTrainedModel, optimizer: Any, **more: Any) -> Optimizer:
    config = TrainingConfig(optimizer=optimizer, learning_rate=1e-2, max_steps=10, warmup_steps=0, **more)
    return Optimizer(model, resolve(config, "pretrain", 1, 10), CPU)


@pytest.mark.parametrize("optimizer", RATES)
def test_training_lowers_the_loss(optimizer: Any, start: Path, tmp_path: Path) -> None:
    run_training(SHAPE, settings(optimizer, tmp_path / "run", max_steps=12), documents(tmp_path), str(start))
    losses = logged(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(math.log(300), abs=0.2), "random weights give every token about the same probability"
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("optimizer", RATES)
def test_a_resumed_run_is_bit_identical(optimizer: Any, start: Path, tmp_path: Path) -> None:
    data = documents(tmp_path)
    run_training(SHAPE, settings(optimizer, tmp_path / "straight", max_steps=5, save_every=3), data, str(start))
    resumed = settings(optimizer, tmp_path / "resumed", max_steps=5, save_every=3)
    with stopped_after_first_save():
        run_training(SHAPE, resumed, data, str(start))
    run_training(SHAPE, resumed, data, str(start))
    assert identical(weights(tmp_path / "resumed/run_final"), weights(tmp_path / "straight/run_final"))
    assert metric_lines(tmp_path / "resumed") == metric_lines(tmp_path / "straight")


def test_adamw_8bit_keeps_large_states_in_8_bits_in_the_checkpoint_too(start: Path, tmp_path: Path) -> None:
    """bitsandbytes keeps tensors below 4,096 elements in fp32; the embedding here is larger."""
    with stopped_after_first_save():
        config = settings("adamw_8bit", tmp_path / "run", max_steps=3, save_every=2)
        run_training(SHAPE, config, documents(tmp_path), str(start))
    state = load_state(tmp_path / "run/checkpoints/step-000002")["optimizer"]
    assert state["model.embed_tokens.weight"]["state1"].dtype == torch.uint8
    assert state["model.norm.weight"]["state1"].dtype == torch.float32


@pytest.mark.parametrize("optimizer", RATES)
def test_the_state_covers_every_parameter_by_name_and_survives_a_round_trip(
    optimizer: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    examples, run = random_examples((9, 12)), {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-2}
    loop = make_loop(tiny_model(tokenizer), examples, tmp_path, optimizer=optimizer, **run)
    loop.run()
    state = loop.optimizer.state()
    assert state.keys() == dict(loop.policy.model.named_parameters()).keys()
    other = make_loop(tiny_model(tokenizer), examples, tmp_path, optimizer=optimizer, **run)
    other.optimizer.load(state)
    for name, values in other.optimizer.state().items():
        assert values.keys() == state[name].keys()
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name][key])), (name, key)


def test_paged_adamw_8bit_is_refused_without_a_gpu(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="paged_adamw_8bit' needs a GPU: use adamw_8bit"):
        build(tiny_model(tokenizer), "paged_adamw_8bit")


@pytest.mark.parametrize(
    ("schedule", "steps", "warmup", "ratio", "wanted"),
    [
        # warmup 1/4 … 4/4 of the peak, then down to a tenth in four equal steps of 0.9/4 = 0.225
        ("linear", 8, 4, 0.1, [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1]),
        # ½ (1 + cos(π·k/4)) for k = 1 … 4: (2 + √2)/4, ½, (2 − √2)/4, 0
        ("cosine", 6, 2, 0.0, [0.5, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0]),
        # the same shape over what lies above the minimum of ½: ½ + ½·shape
        ("cosine", 4, 2, 0.5, [0.5, 1.0, 0.75, 0.5]),
        ("constant", 4, 2, 0.1, [0.5, 1.0, 1.0, 1.0]),
        # no warmup: the first step is one of four on the way down
        ("linear", 4, 0, 0.0, [0.75, 0.5, 0.25, 0.0]),
        # nothing but warmup: the peak is the last step
        ("cosine", 3, 3, 0.1, [1 / 3, 2 / 3, 1.0]),
        ("linear", 1, 1, 0.1, [1.0]),
    ],
)
def test_schedule_against_hand_arithmetic(schedule: Any, steps: int, warmup: int, ratio: float, wanted: list[float]) -> None:
    config = TrainingConfig(lr_schedule=schedule, max_steps=steps, warmup_steps=warmup, min_lr_ratio=ratio)
    assert [learning_rate_factor(step, config) for step in range(1, steps + 1)] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_muon_gets_every_matrix_of_the_layers_and_nothing_else(
    architecture: Any, tied: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(tokenizer, architecture=architecture, tie_embeddings=tied)
    muon, adamw = build(model, "muon").parts
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = ({names[id(p)] for g in part.param_groups for p in g["params"]} for part in (muon, adamw))
    assert isinstance(muon, Muon)
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or name.endswith(("mlp.gate", "mlp.router"))) and name != "lm_head"
    }
    assert by_muon == matrices
    assert "model.embed_tokens.weight" in by_adamw
    assert ("lm_head.weight" in by_adamw) != tied


def test_muon_steps_matrices_by_its_own_rate_and_the_rest_by_adamws(tokenizer: PreTrainedTokenizerFast) -> None:
    optimizer = build(tiny_model(tokenizer), "muon", muon_learning_rate=0.5)
    optimizer.set_learning_rate(0.1)
    muon, adamw = optimizer.parts
    assert [group["lr"] for group in muon.param_groups] == pytest.approx([0.05])
    assert {group["lr"] for group in adamw.param_groups} == {0.1 * 1e-2}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_muon_leaves_stacks_of_experts_to_adamw_and_says_so(
    architecture: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tokenizer, architecture=architecture)
    make_loop(model, random_examples((9,)), tmp_path, optimizer="muon", batch_size=1, max_steps=1)
    stacks = [p for p in model.parameters() if p.ndim == 3]
    assert len(stacks) == 4, "two layers with two stacks each"
    assert "muon trains matrices only: 4 stacks of experts go to AdamW" in capsys.readouterr().out
    optimizer = build(model, "muon", weight_decay=0.1)
    group = next(g for g in optimizer.parts[1].param_groups if any(p is stacks[0] for p in g["params"]))
    assert group["weight_decay"] == 0.1


def test_frozen_parameters_are_in_no_group(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    groups = ParameterGroups(model)
    assert groups.all.keys() == {name for name, _ in model.named_parameters() if "layers.1" in name}
    assert not groups.named["embeddings"]
    build(model, "adamw")


@pytest.mark.parametrize("optimizer", RATES)
def test_every_group_reaches_the_rate_that_the_log_shows(optimizer: Any, start: Path, tmp_path: Path) -> None:
    with recorded_loops() as loops:
        run_training(SHAPE, settings(optimizer, tmp_path / "run", max_steps=2), documents(tmp_path), str(start))
    adam = loops[0].optimizer.parts[-1]
    assert {group["lr"] for group in adam.param_groups} == {logged(tmp_path / "run", "lr")[-1]}
