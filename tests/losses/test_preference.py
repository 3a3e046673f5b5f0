"""Preference losses against hand arithmetic in float64."""

import math

import pytest
import torch
from torch import Tensor

from modern_llm.losses import preference


def pairs(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_sigmoid_against_hand_arithmetic() -> None:
    """βD = ln 3 and −ln 3, so that σ(βD) = 3/(3 + 1) = ¾ and ¼.

    With β = ½: D = 2 ln 3 as 5 ln 3 − 3 ln 3, and D = −2 ln 3 as 0 − 2 ln 3. The losses are −ln ¾ = ln(4/3) and −ln ¼ = ln 4.
    """
    ln3 = math.log(3)
    losses = preference.sigmoid(pairs(5 * ln3, 0.0), pairs(3 * ln3, 2 * ln3), beta=0.5, label_smoothing=0.0)
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], abs=1e-15)


def test_label_smoothing_against_hand_arithmetic() -> None:
    """βD = ln 3 again, e = ¼: −¾ ln ¾ − ¼ ln ¼ = ¾ ln(4/3) + ¼ ln 4."""
    losses = preference.sigmoid(pairs(math.log(3)), pairs(0.0), beta=1.0, label_smoothing=0.25)
    assert losses.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_sigmoid_is_ln_2_where_policy_and_reference_agree(smoothing: float) -> None:
    losses = preference.sigmoid(pairs(0.0, 2.5), pairs(0.0, 2.5), beta=0.1, label_smoothing=smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)


def test_sigmoid_gradient_against_hand_arithmetic() -> None:
    """d/dD [−(1−e)·lnσ(βD) − e·lnσ(−βD)] = −β·(1−e)·(1−σ(βD)) + β·e·σ(βD).

    At βD = ln 3, β = ½, e = 0.1: −½·0.9·¼ + ½·0.1·¾ = −0.1125 + 0.0375 = −0.075; the rejected ratio gets the opposite.
    """
    chosen, rejected = pairs(2 * math.log(3)), pairs(0.0)
    preference.sigmoid(chosen, rejected, beta=0.5, label_smoothing=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.075, abs=1e-15)
    assert rejected.grad.item() == pytest.approx(0.075, abs=1e-15)


def test_label_smoothing_is_least_where_the_odds_equal_the_labels() -> None:
    """The conservative loss has its minimum at σ(βD) = 1 − e, here βD = ln 9 for e = 0.1: no pull beyond it."""
    chosen = pairs(math.log(9))
    preference.sigmoid(chosen, pairs(0.0), beta=1.0, label_smoothing=0.1).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-15)


def test_sigmoid_stays_finite_where_the_exponential_would_overflow() -> None:
    losses = preference.sigmoid(torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0]), beta=1.0, label_smoothing=0.0)
    assert losses.tolist() == [1e4, 0.0]
