"""Learning rates of groups of parameters: each weight moves by the rate of its group, and wrong groups are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_loop, metric_lines, random_examples, snapshot, tiny_model
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.config import LanguageModelingDatasetConfig, ModelConfig, TrainingConfig, UserError, resolve
from modern_llm.training.optim import Optimizer, ParameterGroups
from modern_llm.training.train_lm import run_training

CPU = torch.device("cpu")
RATES: dict[Any, float] = {"embeddings": 1e-3, "head": 2e-3, "vectors": 3e-3, "matrices": 4e-3, "experts": 5e-3}
EXAMPLES = random_examples((40, 40, 40))


def first_step(model: PreTrainedModel, folder: Path, **settings: Any) -> dict[str, float]:
    """The furthest that an element of each parameter moved in one step.

    AdamW's first step moves an element by the learning rate, whatever its gradient: both moments are of that one gradient, so
    their quotient is its sign.
    """
    before = snapshot(model)
    loop = make_loop(
        model, EXAMPLES, folder, batch_size=3, micro_batch_size=3, max_steps=1, lr_schedule="constant", weight_decay=0.0,
        adam_epsilon=1e-12, max_grad_norm=None, **settings,
    )  # fmt: skip
    loop.run()
    return {name: float((weight - before[name]).abs().max()) for name, weight in snapshot(model).items()}


def group_by_hand(name: str, tied: bool) -> str:
    if "embed_tokens" in name:
        return "embeddings"
    if "lm_head" in name:
        return "embeddings" if tied else "head"
    if "norm" in name or "bias" in name or "sinks" in name:
        return "vectors"
    return "experts" if ".experts." in name else "matrices"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_each_weight_moves_by_the_rate_of_its_group(
    architecture: str, tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(tokenizer, architecture=architecture, tie_embeddings=tied)
    missing = ({"head"} if tied else set()) | ({"experts"} if architecture == "qwen3" else set())
    rates = {name: rate for name, rate in RATES.items() if name not in missing}
    moved = first_step(model, tmp_path, learning_rates=rates, learning_rate=1.0)
    assert {group_by_hand(name, tied) for name in moved} == rates.keys()
    for name, distance in moved.items():
        assert distance == pytest.approx(RATES[group_by_hand(name, tied)], rel=1e-3), name


def test_groups_without_a_rate_of_their_own_take_the_common_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    moved = first_step(tiny_model(tokenizer), tmp_path, learning_rates={"vectors": 5e-3}, learning_rate=1e-3)
    for name, distance in moved.items():
        assert distance == pytest.approx(5e-3 if "norm" in name else 1e-3, rel=1e-3), name


def test_with_muon_the_groups_rates_are_those_of_the_adamw_part(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Muon's update of a square matrix has singular values of about 1, so no element of it can move by more than about 1."""
    rates = {"embeddings": 0.2, "vectors": 0.3}
    moved = first_step(
        tiny_model(tokenizer), tmp_path, optimizer="muon", muon_learning_rate=1e-4, learning_rates=rates, learning_rate=0.5
    )
    for name, distance in moved.items():
        wanted = {"embeddings": 0.2, "vectors": 0.3}.get(group_by_hand(name, tied=True))
        assert distance == pytest.approx(wanted, rel=1e-3) if wanted else 0 < distance < 2e-4, name


def test_the_schedule_scales_every_group(tokenizer: PreTrainedTokenizerFast) -> None:
    config = resolve(TrainingConfig(optimizer="adamw", learning_rate=1.0, learning_rates={"vectors": 3.0}), "sft", 1, 10)
    optimizer = Optimizer(tiny_model(tokenizer), config, CPU)
    optimizer.begin_step(0.25)
    assert sorted(group["lr"] for part in optimizer.parts for group in part.param_groups) == [0.25, 0.25, 0.75]


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, {}),
        ({"learning_rates": {"vectors": 3e-3, "embeddings": 1e-2}}, {"lr/embeddings": 1e-2, "lr/vectors": 3e-3}),
        ({"learning_rates": {"vectors": 1e-3}}, {}),  # the common one
        ({"optimizer": "muon", "muon_learning_rate": 0.02}, {"lr/matrices": 0.02}),
        (
            {"optimizer_in_backward": True, "learning_rates": {"matrices": 2e-3}, "max_grad_norm": None},
            {"lr/matrices": 2e-3},
        ),
    ],
)
def test_the_log_has_the_rate_of_every_group_that_has_another(
    settings: dict[str, Any], own: dict[str, float], tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Half of the peak at the first of two steps of warmup, and all of it at the second."""
    make_loop(
        tiny_model(tokenizer), EXAMPLES, tmp_path, batch_size=3, max_steps=2, warmup_steps=2, learning_rate=1e-3, **settings
    ).run()
    lines = [{name: value for name, value in line.items() if name.startswith("lr")} for line in metric_lines(tmp_path)]
    assert [line for line in lines if line] == [
        pytest.approx({name: share * peak for name, peak in {"lr": 1e-3, **own}.items()}) for share in (0.5, 1.0)
    ]
    printed = capsys.readouterr().out
    assert "lr=1.000e-03" in printed
    assert "lr/" not in printed


def test_a_tied_head_keeps_its_bias_among_the_vectors() -> None:
    config = GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, tie_word_embeddings=True)
    tied = ParameterGroups(GPTJForCausalLM(config))
    assert not tied.named["head"]
    assert "lm_head.bias" in tied.named["vectors"]
    config.tie_word_embeddings = False
    assert ParameterGroups(GPTJForCausalLM(config)).named["head"].keys() == {"lm_head.weight", "lm_head.bias"}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("head", "the 'head' of this model is tied to its embeddings: set 'embeddings'"),
        ("experts", r"this model trains no 'experts' \(it has embeddings, vectors, matrices\): leave it out"),
    ],
)
def test_a_group_that_the_model_lacks_is_refused_before_anything_is_written(
    group: Any, message: str, start: Path, tmp_path: Path
) -> None:
    settings = TrainingConfig(output_dir=tmp_path / "run", max_steps=1, batch_size=1, learning_rates={group: 1e-3})
    data = LanguageModelingDatasetConfig(dataset_name="builtin:village", max_rows=4)
    with pytest.raises(UserError, match=message):
        run_training(ModelConfig(d_model=32, n_layers=1, n_heads=2, max_seq_len=32), settings, data, str(start))
    assert not (tmp_path / "run").exists()


def test_a_second_rate_for_the_matrices_of_muon_is_refused() -> None:
    with pytest.raises(ValueError, match="Muon trains the matrices: give muon_learning_rate in place of 'matrices'"):
        TrainingConfig(optimizer="muon", learning_rates={"matrices": 1e-3})
    with pytest.raises(UserError, match="give muon_learning_rate in place of 'matrices'"):
        resolve(TrainingConfig(learning_rates={"matrices": 1e-3}), "pretrain")  # muon is the stage's default
    resolve(TrainingConfig(learning_rates={"matrices": 1e-3}), "sft")


def test_a_group_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="embeddings"):
        TrainingConfig(learning_rates={"embedings": 1e-3})  # type: ignore[dict-item]
