"""The schedule of the learning rate: warmup–stable–decay by hand, and what every schedule has in common."""

from typing import Any, get_args

import pytest
from helpers import logged, make_loop, random_examples, tiny_model
from hypothesis import assume, given
from hypothesis import strategies as st

from modern_llm.config import TrainingConfig, UserError, resolve
from modern_llm.training.optim import learning_rate_factor

SCHEDULES = get_args(get_args(TrainingConfig.model_fields["lr_schedule"].annotation)[0])


def factors(schedule: Any, steps: int, **more: Any) -> list[float]:
    config = resolve(TrainingConfig(lr_schedule=schedule, max_steps=steps, **more), "pretrain")
    return [learning_rate_factor(step, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("steps", "warmup", "ratio", "least", "wanted"),
    [
        # 0.4 of 10 steps decay: k = 1 … 4 of 4 done, 1 − √(k/4) = ½, 1 − 1/√2, 1 − √3/2, 0
        (10, 2, 0.4, 0.0, [0.5, 1, 1, 1, 1, 1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0]),
        # the same shape over what lies above a tenth: 0.1 + 0.9 · ½, and so on
        (4, 0, 1.0, 0.1, [0.55, 0.1 + 0.9 * (1 - 0.5**0.5), 0.1 + 0.9 * (1 - 0.75**0.5), 0.1]),
        # a fifth of 4 steps is rounded to one
        (4, 1, None, 0.25, [1, 1, 1, 0.25]),
        # never less than one step, and of one step the decay is all
        (1, 0, 0.1, 0.5, [0.5]),
        # warmup and decay meet
        (4, 2, 0.5, 0.0, [0.5, 1, 1 - 0.5**0.5, 0.0]),
    ],
)
def test_warmup_stable_decay_against_hand_arithmetic(
    steps: int, warmup: int, ratio: float | None, least: float, wanted: list[float]
) -> None:
    got = factors("wsd", steps, warmup_steps=warmup, decay_ratio=ratio, min_lr_ratio=least)
    assert got == pytest.approx(wanted, abs=1e-12)


@given(schedule=st.sampled_from(SCHEDULES), steps=st.integers(1, 300), warmup=st.integers(0, 200), least=st.floats(0, 1))
def test_every_schedule_rises_to_the_peak_stays_below_it_and_ends_at_the_minimum(
    schedule: str, steps: int, warmup: int, least: float
) -> None:
    assume(warmup + max(1, round(0.2 * steps)) <= steps)
    got = factors(schedule, steps, warmup_steps=warmup, min_lr_ratio=least)
    assert got[:warmup] == sorted(got[:warmup])
    assert got[warmup:] == sorted(got[warmup:], reverse=True)
    assert all(0 <= factor <= 1 for factor in got)
    assert got[-1] == pytest.approx(1.0 if schedule == "constant" else least)


def test_the_decay_is_a_fifth_of_the_steps_unless_told_otherwise() -> None:
    assert factors("wsd", 100, warmup_steps=0)[:80] == [1.0] * 80
    assert factors("wsd", 100, warmup_steps=0)[80] < 1
    assert resolve(TrainingConfig(lr_schedule="wsd", max_steps=100), "sft").decay_ratio == 0.2
    assert resolve(TrainingConfig(max_steps=100), "sft").decay_ratio is None


def test_a_decay_where_nothing_decays_so_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay_ratio=0\.1 has no meaning for lr_schedule='linear': leave it out"):
        TrainingConfig(lr_schedule="linear", decay_ratio=0.1)
    with pytest.raises(UserError, match=r"decay_ratio=0\.1 has no meaning for lr_schedule='cosine'"):
        resolve(TrainingConfig(decay_ratio=0.1), "pretrain")  # cosine is the stage's default


def test_a_decay_that_would_begin_before_the_warmup_ends_is_refused() -> None:
    config = TrainingConfig(lr_schedule="wsd", max_steps=10, warmup_steps=7, decay_ratio=0.4)
    with pytest.raises(UserError, match=r"warmup_steps=7 and the decay of decay_ratio=0.4 \(4 steps\) .* the run's 10"):
        resolve(config, "pretrain")
    resolve(TrainingConfig(lr_schedule="wsd", max_steps=10, warmup_steps=6, decay_ratio=0.4), "pretrain")


def test_a_run_takes_the_rates_of_the_schedule(tokenizer, tmp_path) -> None:
    loop = make_loop(
        tiny_model(tokenizer), random_examples((9,)), tmp_path, batch_size=1, max_steps=5, warmup_steps=1, lr_schedule="wsd",
        decay_ratio=0.4, min_lr_ratio=0.0, learning_rate=1e-3,
    )  # fmt: skip
    loop.run()
    assert logged(tmp_path, "lr") == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3 * (1 - 0.5**0.5), 0.0])
