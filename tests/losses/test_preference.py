"""Preference losses against hand arithmetic in float64."""

import math

import pytest
import torch
from torch import Tensor

from modern_llm.config import DPOConfig
from modern_llm.config.dpo import LOSS_OPTIONS
from modern_llm.losses import preference
from modern_llm.losses.preference import PairScores


def ratios(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def scores(chosen: Tensor, rejected: Tensor, chosen_tokens: float = 1, rejected_tokens: float = 1) -> PairScores:
    ones = torch.ones_like(chosen)
    return PairScores(chosen, rejected, chosen_tokens * ones, rejected_tokens * ones)


def test_sigmoid_against_hand_arithmetic() -> None:
    """βD = ln 3 and −ln 3, so that σ(βD) = 3/(3 + 1) = ¾ and ¼.

    With β = ½: D = 2 ln 3 as 5 ln 3 − 3 ln 3, and D = −2 ln 3 as 0 − 2 ln 3. The losses are −ln ¾ = ln(4/3) and −ln ¼ = ln 4.
    """
    ln3 = math.log(3)
    losses = preference.sigmoid(scores(ratios(5 * ln3, 0.0), ratios(3 * ln3, 2 * ln3)), beta=0.5, label_smoothing=0.0)
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], abs=1e-15)


def test_label_smoothing_against_hand_arithmetic() -> None:
    """βD = ln 3 again, e = ¼: −¾ ln ¾ − ¼ ln ¼ = ¾ ln(4/3) + ¼ ln 4."""
    losses = preference.sigmoid(scores(ratios(math.log(3)), ratios(0.0)), beta=1.0, label_smoothing=0.25)
    assert losses.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_sigmoid_is_ln_2_where_policy_and_reference_agree(smoothing: float) -> None:
    losses = preference.sigmoid(scores(ratios(0.0, 2.5), ratios(0.0, 2.5)), beta=0.1, label_smoothing=smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)


def test_sigmoid_gradient_against_hand_arithmetic() -> None:
    """d/dD [−(1−e)·lnσ(βD) − e·lnσ(−βD)] = −β·(1−e)·(1−σ(βD)) + β·e·σ(βD).

    At βD = ln 3, β = ½, e = 0.1: −½·0.9·¼ + ½·0.1·¾ = −0.1125 + 0.0375 = −0.075; the rejected ratio gets the opposite.
    """
    chosen, rejected = ratios(2 * math.log(3)), ratios(0.0)
    preference.sigmoid(scores(chosen, rejected), beta=0.5, label_smoothing=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.075, abs=1e-15)
    assert rejected.grad.item() == pytest.approx(0.075, abs=1e-15)


def test_label_smoothing_is_least_where_the_odds_equal_the_labels() -> None:
    """The conservative loss has its minimum at σ(βD) = 1 − e, here βD = ln 9 for e = 0.1: no pull beyond it."""
    chosen = ratios(math.log(9))
    preference.sigmoid(scores(chosen, ratios(0.0)), beta=1.0, label_smoothing=0.1).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-15)


def test_sigmoid_stays_finite_where_the_exponential_would_overflow() -> None:
    losses = preference.sigmoid(scores(torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0])), beta=1.0, label_smoothing=0.0)
    assert losses.tolist() == [1e4, 0.0]


# Every loss. With β = ½, r_w = 2 ln 3, r_l = −2 ln 2, n_w = 4, n_l = 2: βr_w = ln 3, so σ(βr_w) = 3/4; βr_l = −ln 2, so
# σ(βr_l) = 1/3; D = 2 ln 6 and βD = ln 6, so σ(βD) = 6/7; 1/(2β) = 1; the means over tokens differ by ½ ln 3 + ln 2.
LN2, LN3 = math.log(2), math.log(3)
MEANS = LN3 / 2 + LN2
BY_HAND = {
    "sigmoid": math.log(7 / 6),
    "sigmoid_norm": math.log(1 + math.exp(-MEANS / 2)),
    "hinge": 0.0,  # 1 − ln 6 < 0
    "ipo": (MEANS - 1) ** 2,
    "exo_pair": 6 / 7 * (math.log(6 / 7) - math.log(0.75)) + 1 / 7 * (math.log(1 / 7) - math.log(0.25)),
    "nca_pair": math.log(4 / 3) + math.log(4) / 2 + math.log(3 / 2) / 2,
    "robust": (0.75 * math.log(7 / 6) - 0.25 * math.log(7)) / 0.5,
    "sppo_hard": (2 * LN3 - 1) ** 2 + (1 - 2 * LN2) ** 2,
    "apo_zero": 1 / 4 + 1 / 3,
    "apo_down": 3 / 4 + 1 / 7,
    "discopop": (1 - 36 / 37) * math.log(7 / 6) + 36 / 37 / 6,  # τ = ½: m = σ(2 ln 6) = 36/37
}
OPTIONS = {"exo_pair": {"label_smoothing": 0.25}, "robust": {"label_smoothing": 0.25}, "discopop": {"discopop_tau": 0.5}}


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_every_loss_against_hand_arithmetic(name: str) -> None:
    config = DPOConfig(loss_type=name, beta=0.5, **OPTIONS.get(name, {}))  # type: ignore[arg-type]
    batch = scores(ratios(2 * LN3), ratios(-2 * LN2), 4, 2)
    assert getattr(preference, name)(batch, **config.loss_arguments()).item() == pytest.approx(BY_HAND[name], abs=1e-14)


def test_hinge_counts_what_is_missing_to_the_margin() -> None:
    """βD = ½·(1 − 0.5) = ¼, so ¾ is missing."""
    assert preference.hinge(scores(ratios(1.0), ratios(0.5)), beta=0.5).item() == pytest.approx(0.75, abs=1e-15)


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_every_loss_prefers_the_chosen_answer(name: str) -> None:
    """From where policy and reference agree, the chosen answer is pulled up against the rejected one."""
    config = DPOConfig(loss_type=name, **OPTIONS.get(name, {}))  # type: ignore[arg-type]
    chosen, rejected = ratios(0.0), ratios(0.0)
    getattr(preference, name)(scores(chosen, rejected, 3, 5), **config.loss_arguments()).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() < rejected.grad.item()


@pytest.mark.parametrize("option", ["label_smoothing", "discopop_tau"])
@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_an_option_changes_the_loss_or_is_refused(name: str, option: str) -> None:
    """No option is ignored: the table of losses and options is walked as a whole."""
    fixed = {"exo_pair": {"label_smoothing": 0.25}}.get(name, {})

    def build(value: float) -> DPOConfig:
        return DPOConfig(loss_type=name, **{**fixed, option: value})  # type: ignore[arg-type]

    if option not in LOSS_OPTIONS[name]:
        with pytest.raises(ValueError, match=f"{option} has no meaning for loss_type='{name}'"):
            build(0.3)
        return
    batch = scores(ratios(2.0), ratios(-1.0), 4, 2)
    values = {getattr(preference, name)(batch, **build(value).loss_arguments()).item() for value in (0.1, 0.3)}
    assert len(values) == 2


def test_exo_without_smoothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'exo_pair' needs label_smoothing above 0"):
        DPOConfig(loss_type="exo_pair")


def test_a_twice_as_long_answer_counts_the_same_where_means_are_compared() -> None:
    """Trap 21: doubling sums and counts changes sums' losses and leaves means' losses alone."""
    short, long = scores(ratios(2.0), ratios(-1.0), 4, 2), scores(ratios(4.0), ratios(-2.0), 8, 4)
    for name in ("ipo", "sigmoid_norm"):
        assert torch.equal(getattr(preference, name)(short, beta=0.1), getattr(preference, name)(long, beta=0.1))
    assert preference.hinge(short, beta=0.1).item() != preference.hinge(long, beta=0.1).item()
