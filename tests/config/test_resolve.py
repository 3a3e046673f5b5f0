"""`resolve` fills what depends on stage, ranks and data, keeps what the user gave, and checks the arithmetic."""

import math
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.config import TrainingConfig, UserError, resolve
from modern_llm.config.training import Stage

STAGES = get_args(Stage)
EACH_STAGE = pytest.mark.parametrize("stage", STAGES)
PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
SIZES = st.none() | st.integers(1, 48)


# Batches


@PROPERTY
@given(stage=st.sampled_from(STAGES), batch=SIZES, micro=SIZES, accumulation=SIZES, ranks=st.integers(1, 16))
def test_a_batch_is_micro_times_accumulation_times_ranks_or_refused(stage, batch, micro, accumulation, ranks) -> None:
    given_product = (micro or 1) * (accumulation or 1) * ranks
    if batch is None:
        solvable = True
    elif micro is not None and accumulation is not None:
        solvable = batch == given_product
    else:
        solvable = batch % given_product == 0
    fields = {"batch_size": batch, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
    try:
        out = resolve(TrainingConfig(**fields), stage, ranks)
    except ValueError:
        assert not solvable
        return
    assert solvable
    assert out.batch_size == out.micro_batch_size * out.gradient_accumulation_steps * ranks
    for name, value in fields.items():
        assert value in (None, getattr(out, name))


@pytest.mark.parametrize(
    ("given_parts", "ranks", "expected"),  # (batch, micro-batch, accumulation)
    [
        ((None, None, None), 1, (32, 8, 4)),
        ((None, None, None), 4, (32, 8, 1)),
        ((None, None, None), 3, (33, 1, 11)),  # rounded up to what three ranks share
        ((None, None, None), 64, (64, 1, 1)),
        ((20, None, None), 1, (20, 5, 4)),  # the largest divisor of 20 up to 8
        ((20, None, None), 2, (20, 5, 2)),
        ((7, None, None), 1, (7, 7, 1)),
        ((1, None, None), 1, (1, 1, 1)),
        ((None, 5, None), 1, (35, 5, 7)),
        ((None, 5, None), 2, (40, 5, 4)),
        ((None, None, 16), 1, (32, 2, 16)),
        ((None, 2, 3), 1, (6, 2, 3)),
        ((None, 2, 3), 2, (12, 2, 3)),
        ((12, 3, None), 2, (12, 3, 2)),
        ((12, None, 3), 2, (12, 2, 3)),
        ((16, 1, 16), 1, (16, 1, 16)),
    ],
)
def test_the_parts_of_a_batch_that_were_left_out(given_parts, ranks, expected) -> None:
    names = ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
    out = resolve(TrainingConfig(**dict(zip(names, given_parts, strict=True))), "sft", ranks)
    assert tuple(getattr(out, name) for name in names) == expected


def test_a_batch_that_does_not_multiply_out_is_refused_with_the_numbers() -> None:
    config = TrainingConfig(batch_size=16, micro_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(UserError, match=r"batch_size=16 is not .* 2 × 4 × 1 = 8"):
        resolve(config, "dpo")
    assert resolve(config, "dpo", world_size=2).batch_size == 16


def test_a_batch_smaller_than_the_number_of_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size=3 is not"):
        resolve(TrainingConfig(batch_size=3), "dpo", world_size=4)


# Length


@pytest.mark.parametrize(
    ("num_epochs", "rows", "steps"),
    [
        (None, 100, 4),  # one epoch: 32 + 32 + 32 + 4
        (1, 96, 3),
        (2, 100, 8),
        (0.5, 100, 2),  # 50 rows: 32 + 18
        (1.5, 100, 6),
        (0.001, 100, 1),
        (1, 5, 1),
        (3, 5, 3),
        (0.1, 960, 3),  # 96 rows; 0.1 × 960 / 32 is not exactly 3 in floating point
    ],
)
def test_epochs_become_optimizer_steps(num_epochs, rows, steps) -> None:
    out = resolve(TrainingConfig(num_epochs=num_epochs, batch_size=32), "sft", rows_per_epoch=rows)
    assert (out.max_steps, out.num_epochs) == (steps, None)


@PROPERTY
@given(epochs=st.integers(1, 9), rows=st.integers(1, 10_000), batch=st.integers(1, 64))
def test_whole_epochs_end_with_the_data(epochs, rows, batch) -> None:
    """An epoch's last step holds what is left of it, so every epoch has the same number of steps."""
    out = resolve(TrainingConfig(num_epochs=epochs, batch_size=batch), "dpo", rows_per_epoch=rows)
    assert out.max_steps == epochs * math.ceil(rows / batch)


def test_before_the_rows_are_known_the_length_stays_open() -> None:
    out = resolve(TrainingConfig(), "sft")
    assert (out.max_steps, out.warmup_steps, out.num_epochs) == (None, None, 1.0)


def test_max_steps_decides_whatever_the_number_of_rows() -> None:
    assert resolve(TrainingConfig(max_steps=7), "sft", rows_per_epoch=3).max_steps == 7


@pytest.mark.parametrize(("stage", "most"), [("pretrain", 200), ("sft", 100), ("dpo", 150)])
def test_warmup_is_a_tenth_of_the_steps_and_at_most_the_stages_own(stage, most) -> None:
    assert resolve(TrainingConfig(max_steps=100), stage).warmup_steps == 10
    assert resolve(TrainingConfig(max_steps=5), stage).warmup_steps == 0
    assert resolve(TrainingConfig(max_steps=10_000), stage).warmup_steps == most


@EACH_STAGE
def test_more_warmup_than_steps_is_refused(stage) -> None:
    """Trap 34, where the length is given in steps and where it follows from the data."""
    with pytest.raises(ValueError, match="warmup_steps=11 exceeds max_steps=10"):
        TrainingConfig(max_steps=10, warmup_steps=11)
    with pytest.raises(UserError, match="warmup_steps=11 exceeds the run's 4 optimizer steps"):
        resolve(TrainingConfig(num_epochs=1, batch_size=32, warmup_steps=11), stage, rows_per_epoch=100)
    assert resolve(TrainingConfig(num_epochs=1, batch_size=32, warmup_steps=4), stage, rows_per_epoch=100).warmup_steps == 4


# Defaults


@EACH_STAGE
def test_nothing_that_a_run_needs_stays_open(stage) -> None:
    out = resolve(TrainingConfig(), stage, rows_per_epoch=1000)
    optional = {"num_epochs", "eval_every", "dataset_name", "tokenizer_name", "micro_batch_tokens", "ema_decay"}
    optional |= {"decay_ratio", "checkpointed_share"}  # for `wsd`, and for gradient checkpointing
    optional |= {"adapter", "keep_checkpoints", "max_minutes"}
    optional |= {"muon_learning_rate"} if out.optimizer != "muon" else set()
    assert {name for name, value in out if value is None} == optional


def test_the_stages_own_defaults() -> None:
    pretrain, sft, dpo = (resolve(TrainingConfig(max_steps=10_000), stage) for stage in STAGES)
    assert (pretrain.optimizer, pretrain.lr_schedule, pretrain.weight_decay) == ("muon", "cosine", 0.1)
    assert (sft.optimizer, sft.lr_schedule, sft.learning_rate) == ("adamw", "cosine", 2e-5)
    # arXiv 2305.18290, appendix B: batch 64 or 32, learning rate 1e-6, 150 steps of warmup from 0, then constant
    assert (dpo.lr_schedule, dpo.learning_rate, dpo.warmup_steps, dpo.weight_decay) == ("constant", 1e-6, 150, 0.0)


@EACH_STAGE
def test_the_run_is_named_after_its_stage_and_written_under_its_name(stage) -> None:
    assert resolve(TrainingConfig(), stage).output_dir == Path("experiments/runs") / stage
    assert resolve(TrainingConfig(run_name="mine"), stage).output_dir == Path("experiments/runs/mine")
    assert resolve(TrainingConfig(run_name="mine", output_dir=Path("there")), stage).output_dir == Path("there")


GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "run_name": st.sampled_from(["a", "run-2", "3.1"]),
        "output_dir": st.sampled_from([Path("x"), Path("/tmp/y")]),
        "optimizer": st.sampled_from(["adamw", "rmsprop", "muon", "adamw_8bit"]),
        "learning_rate": st.floats(1e-8, 1.0),
        "weight_decay": st.floats(0.0, 1.0),
        "lr_schedule": st.sampled_from(["constant", "linear", "cosine"]),
        "warmup_steps": st.integers(0, 3),
        "max_steps": st.integers(3, 9),
        "save_every": st.integers(1, 9),
        "seed": st.integers(0, 9),
    },
)


@PROPERTY
@given(stage=st.sampled_from(STAGES), values=GIVEN, ranks=st.integers(1, 4))
def test_resolve_keeps_what_was_given_changes_nothing_and_is_its_own_fixed_point(stage, values, ranks) -> None:
    config = TrainingConfig(**values)
    before = config.model_dump()
    out = resolve(config, stage, ranks, rows_per_epoch=200)
    assert {name: getattr(out, name) for name in values} == values
    assert config.model_dump() == before
    assert resolve(config, stage, ranks, rows_per_epoch=200) == out
    assert resolve(out, stage, ranks, rows_per_epoch=200) == out
    assert resolve(out, stage, ranks, rows_per_epoch=77) == out


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_option_of_an_optimizer_that_the_stage_does_not_use_is_refused(stage) -> None:
    with pytest.raises(UserError, match="muon_learning_rate"):
        resolve(TrainingConfig(muon_learning_rate=0.01), stage)
    assert resolve(TrainingConfig(muon_learning_rate=0.01, optimizer="muon"), stage).muon_learning_rate == 0.01


def test_micro_batches_of_tokens_still_share_the_batch_evenly() -> None:
    """A stream gives each rank its share, so 10 examples on 4 ranks would be 8, and 2 on 4 none."""
    assert resolve(TrainingConfig(batch_size=8, micro_batch_tokens=100), "sft", world_size=4).batch_size == 8
    for batch_size in (2, 10):
        with pytest.raises(UserError, match=f"batch_size={batch_size} is not a multiple of the 4 ranks"):
            resolve(TrainingConfig(batch_size=batch_size, micro_batch_tokens=100), "sft", world_size=4)
