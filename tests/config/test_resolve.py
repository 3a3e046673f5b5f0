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


def names(values: tuple[int | None, ...]) -> dict[str, int]:
    """Fields by name; None is left out."""
    given_ = dict(zip(("batch_size", "micro_batch_size", "gradient_accumulation_steps"), values, strict=True))
    return {name: value for name, value in given_.items() if value is not None}


@PROPERTY
@given(stage=st.sampled_from(STAGES), batch=SIZES, micro=SIZES, accumulation=SIZES, ranks=st.integers(1, 16))
def test_every_rank_gets_through_its_share_in_the_passes_that_are_said_or_the_batch_is_refused(
    stage, batch, micro, accumulation, ranks
) -> None:
    fields = names((batch, micro, accumulation))
    whole = batch or (micro * accumulation if micro and accumulation else 32)
    share = math.ceil(whole / ranks)
    refused = micro is not None and micro > whole
    if accumulation is not None and not refused:  # what the share needs at least, and one rank alone at most
        refused = not math.ceil(share / (micro or share)) <= accumulation <= math.ceil(whole / (micro or 1))
    try:
        out = resolve(TrainingConfig(**fields), stage, ranks)
    except ValueError:
        assert refused
        return
    assert not refused
    assert out.batch_size == whole
    assert out.gradient_accumulation_steps == math.ceil(share / out.micro_batch_size) <= (accumulation or share)
    assert micro in (None, out.micro_batch_size)


@pytest.mark.parametrize(
    "written",
    [
        (None, None, None), (32, None, None), (20, None, None), (7, None, None), (1, None, None), (None, 8, None),
        (None, 5, None), (None, None, 16), (None, None, 5), (None, 2, 3), (48, 16, None), (10, 4, None), (48, None, 3),
        (10, None, 4), (32, 8, 4), (10, 4, 3),
    ],
)  # fmt: skip
@EACH_STAGE
def test_a_step_is_the_same_batch_on_1_to_64_ranks(stage, written) -> None:
    """Trap: a file that trains 32 on one process and 33 on three."""
    found = [resolve(TrainingConfig(**names(written)), stage, ranks) for ranks in range(1, 65)]
    assert {out.batch_size for out in found} == {found[0].batch_size}
    tokens = {resolve(TrainingConfig(micro_batch_tokens=64), stage, ranks).batch_size for ranks in range(1, 65)}
    assert tokens == {32}


@pytest.mark.parametrize(
    ("given_parts", "ranks", "expected"),  # (batch, micro-batch, accumulation)
    [
        ((None, None, None), 1, (32, 8, 4)),
        ((None, None, None), 4, (32, 8, 1)),
        ((None, None, None), 3, (32, 6, 2)),  # shares of 11, 11 and 10: 6 + 5
        ((None, None, None), 64, (32, 1, 1)),  # half of the ranks have none
        ((20, None, None), 1, (20, 7, 3)),  # 7 + 7 + 6
        ((20, None, None), 2, (20, 5, 2)),
        ((7, None, None), 1, (7, 7, 1)),
        ((1, None, None), 1, (1, 1, 1)),
        ((None, 5, None), 1, (32, 5, 7)),
        ((None, 5, None), 2, (32, 5, 4)),
        ((16, 16, None), 2, (16, 16, 1)),  # a share of 8 is less than a micro-batch
        ((None, None, 16), 1, (32, 2, 16)),
        ((None, 2, 3), 1, (6, 2, 3)),
        ((None, 2, 3), 2, (6, 2, 2)),
        ((12, 3, None), 2, (12, 3, 2)),
        ((12, None, 3), 2, (12, 2, 3)),
        ((16, 1, 16), 1, (16, 1, 16)),
    ],
)
def test_the_parts_of_a_batch_that_were_left_out(given_parts, ranks, expected) -> None:
    out = resolve(TrainingConfig(**names(given_parts)), "sft", ranks)
    assert (out.batch_size, out.micro_batch_size, out.gradient_accumulation_steps) == expected


def test_a_batch_that_does_not_multiply_out_is_refused_with_the_numbers() -> None:
    config = TrainingConfig(batch_size=16, micro_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(UserError, match=r"batch_size=16 is not .* 2 × 4 × 1 = 8"):
        resolve(config, "dpo")
    assert resolve(config, "dpo", world_size=2).batch_size == 16
    with pytest.raises(UserError, match=r"batch_size=4 is not .* 2 × 4 × 2 = 16"):
        resolve(TrainingConfig(batch_size=4, micro_batch_size=2, gradient_accumulation_steps=4), "dpo", world_size=2)


def test_a_micro_batch_larger_than_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size=4 is more than batch_size=3"):
        TrainingConfig(batch_size=3, micro_batch_size=4)
    with pytest.raises(UserError, match="micro_batch_size=64 is more than batch_size=32"):
        resolve(TrainingConfig(micro_batch_size=64), "sft")


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
    optional |= {"adapter", "keep_checkpoints", "max_minutes", "keep_best", "early_stopping"}
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
