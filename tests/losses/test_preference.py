"""Preference losses against hand arithmetic in float64, their gradients, their limits, and every option with every loss."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modern_llm.config import DPOConfig
from modern_llm.config.dpo import LOSS_OPTIONS, OPTIONS, REFERENCE_LOSSES, WHOLE_STEP_LOSSES
from modern_llm.losses import preference
from modern_llm.losses.preference import EXPONENT_BOUND, Divergence, PairScores, bounded_exponents, ld_logprob, wpo_weights

PAIR_LOSSES = [name for name in LOSS_OPTIONS if name != "sft"]
REVERSE_KL = Divergence()
DIVERGENCES = [Divergence("forward_kl"), Divergence("js_divergence")] + [
    Divergence("alpha_divergence", alpha) for alpha in (-0.5, 0.5, 1.0, 1.3)
]
LOSSES_AND_DIVERGENCES = [
    (name, divergence)
    for name in PAIR_LOSSES
    for divergence in (REVERSE_KL, *(DIVERGENCES if "f_divergence_type" in LOSS_OPTIONS[name] else ()))
]
LN2, LN3 = math.log(2), math.log(3)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def scores(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: float = 1,
    rejected_tokens: float = 1,
    divergence: Divergence = REVERSE_KL,
) -> PairScores:
    """Pairs whose ratios are given: the reference's log-probs are 0."""
    zeros, ones = torch.zeros_like(chosen), torch.ones_like(chosen)
    return PairScores(chosen, rejected, zeros, zeros, chosen_tokens * ones, rejected_tokens * ones, divergence)


def configured(name: str, **changes: Any) -> DPOConfig:
    """A config of one loss, with what that loss cannot do without."""
    needed = {"label_smoothing": 0.25} if name == "exo_pair" else {}
    return DPOConfig(**{"loss_type": name, **needed, **changes})


def losses(name: str, pairs: PairScores, delta: float = 0.0, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = configured(name, **changes).loss_arguments(name)
    if name == "bco_pair":
        arguments["delta"] = delta
    return getattr(preference, name)(pairs, **arguments)


# By hand


def test_sigmoid_against_hand_arithmetic() -> None:
    """βD = ln 3 and −ln 3, so that σ(βD) = 3/(3 + 1) = ¾ and ¼.

    With β = ½: D = 2 ln 3 as 5 ln 3 − 3 ln 3, and D = −2 ln 3 as 0 − 2 ln 3. The losses are −ln ¾ = ln(4/3) and −ln ¼ = ln 4.
    """
    found = preference.sigmoid(scores(values(5 * LN3, 0.0), values(3 * LN3, 2 * LN3)), beta=0.5, label_smoothing=0.0)
    assert found.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], abs=1e-15)


def test_label_smoothing_against_hand_arithmetic() -> None:
    """βD = ln 3 again, ε = ¼: −¾ ln ¾ − ¼ ln ¼ = ¾ ln(4/3) + ¼ ln 4; for one pair the sorted losses are the same."""
    for name in ("sigmoid", "aot", "aot_unpaired"):
        found = losses(name, scores(values(LN3), values(0.0)), beta=1.0, label_smoothing=0.25)
        assert found.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=1e-15)


def test_sigmoid_gradient_against_hand_arithmetic() -> None:
    """d/dD [−(1−ε)·lnσ(βD) − ε·lnσ(−βD)] = −β·(1−ε)·(1−σ(βD)) + β·ε·σ(βD).

    At βD = ln 3, β = ½, ε = 0.1: −½·0.9·¼ + ½·0.1·¾ = −0.1125 + 0.0375 = −0.075; the rejected ratio gets the opposite.
    """
    chosen, rejected = values(2 * LN3), values(0.0)
    preference.sigmoid(scores(chosen, rejected), beta=0.5, label_smoothing=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.075, abs=1e-15)
    assert rejected.grad.item() == pytest.approx(0.075, abs=1e-15)


def test_label_smoothing_is_least_where_the_odds_equal_the_labels() -> None:
    """The conservative loss has its minimum at σ(βD) = 1 − ε, here βD = ln 9 for ε = 0.1: no pull beyond it."""
    chosen = values(math.log(9))
    preference.sigmoid(scores(chosen, values(0.0)), beta=1.0, label_smoothing=0.1).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-15)


# One pair for every loss. β = ½, n_w = 4, n_l = 2, and
#
#     p_w = 4 ln(3/4)   ref_w = 2 ln 3 − 8 ln 2   so r_w = 2 ln 3:   βr_w = ln 3,   σ(βr_w) = 3/4
#     p_l = −2 ln 2     ref_l = 0                 so r_l = −2 ln 2:  βr_l = −ln 2,  σ(βr_l) = 1/3
#
# Then D = 2 ln 6 and βD = ln 6, so σ(βD) = 6/7; 1/(2β) = 1; the means of r over tokens differ by ½ ln 3 + ln 2. Without the
# reference: p_w/n_w = ln(3/4) and p_l/n_l = ln(1/2) are odds of 3 and of 1 and differ by ln(3/2); p_w − p_l = 4 ln 3 − 6 ln 2.
# Of a single pair the sorted values are the values.
MEANS = LN3 / 2 + LN2
BY_HAND = {
    "sigmoid": math.log(7 / 6),
    "sigmoid_norm": math.log(1 + math.exp(-MEANS / 2)),
    "hinge": 0.0,  # 1 − ln 6 < 0
    "ipo": (MEANS - 1) ** 2,
    "exo_pair": 6 / 7 * (math.log(6 / 7) - math.log(0.75)) + 1 / 7 * (math.log(1 / 7) - math.log(0.25)),  # ε = ¼
    "nca_pair": math.log(4 / 3) + math.log(4) / 2 + math.log(3 / 2) / 2,
    "robust": (0.75 * math.log(7 / 6) - 0.25 * math.log(7)) / 0.5,  # ε = ¼
    "bco_pair": math.log(5 / 3) + math.log(5 / 4),  # δ = ln 2: σ(ln 3 − ln 2) = 3/5, σ(2 ln 2) = 4/5
    "sppo_hard": (2 * LN3 - 1) ** 2 + (1 - 2 * LN2) ** 2,
    "aot": math.log(7 / 6),
    "aot_unpaired": math.log(7 / 6),
    "apo_zero": 1 / 4 + 1 / 3,
    "apo_down": 3 / 4 + 1 / 7,
    "discopop": (1 - 36 / 37) * math.log(7 / 6) + 36 / 37 / 6,  # τ = ½: m = σ(2 ln 6) = 36/37
    "simpo": LN3,  # γ = ½ ln 6: ½ ln(3/2) − ½ ln 6 = −ln 2, σ = 1/3
    "orpo": math.log(4 / 3),  # ln 3 − ln 1 = ln 3, σ = 3/4
    "cpo": math.log(17 / 9),  # ½ (4 ln 3 − 6 ln 2) = ln(9/8), σ = 9/17
}
BY_HAND_OPTIONS: dict[str, dict[str, float]] = {
    "robust": {"label_smoothing": 0.25},
    "discopop": {"discopop_tau": 0.5},
    "simpo": {"simpo_gamma": math.log(6) / 2},
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_loss_against_hand_arithmetic(name: str) -> None:
    pairs = PairScores(
        chosen=values(4 * LN3 - 8 * LN2),
        rejected=values(-2 * LN2),
        reference_chosen=values(2 * LN3 - 8 * LN2),
        reference_rejected=values(0.0),
        chosen_tokens=values(4),
        rejected_tokens=values(2),
    )
    beta = {"beta": 0.5} if "beta" in LOSS_OPTIONS[name] else {}
    found = losses(name, pairs, delta=LN2, **beta, **BY_HAND_OPTIONS.get(name, {}))
    assert found.item() == pytest.approx(BY_HAND[name], abs=1e-14)


def test_hinge_counts_what_is_missing_to_the_margin() -> None:
    """βD = ½·(1 − 0.5) = ¼, so ¾ is missing."""
    assert preference.hinge(scores(values(1.0), values(0.5)), beta=0.5).item() == pytest.approx(0.75, abs=1e-15)


def test_sorted_losses_against_hand_arithmetic() -> None:
    """Two pairs, β = 1, with ln 2 and ln 3 as u and v, and the log-probs

        p_w = (0, v)   p_l = (u, 0)   ref_w = (0, 0)   ref_l = (v, u)

    aot: p_w − p_l = (−u, v) and ref_w − ref_l = (−v, −u) are in order; d = (v − u, v + u) = (ln 3/2, ln 6), so σ = 3/5 and 6/7.
    aot_unpaired: r_w = (0, v) is in order; r_l = (u − v, −u) = (ln 2/3, ln 1/2) is not; d = (u, 2v − u) = (ln 2, ln 9/2),
    so σ = 2/3 and 9/11.
    """
    u, v = LN2, LN3
    pairs = PairScores(values(0, v), values(u, 0), values(0, 0), values(v, u), values(1, 1), values(1, 1))
    aot = preference.aot(pairs, beta=1.0, label_smoothing=0.0)
    unpaired = preference.aot_unpaired(pairs, beta=1.0, label_smoothing=0.0)
    assert aot.tolist() == pytest.approx([math.log(5 / 3), math.log(7 / 6)], abs=1e-15)
    assert unpaired.tolist() == pytest.approx([math.log(3 / 2), math.log(11 / 9)], abs=1e-15)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_losses_forget_which_pair_was_where(name: str) -> None:
    """Their mean does not change with the order of the pairs; `aot_unpaired` does not even know which answers were a pair."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(16, generator=generator, dtype=torch.float64) for _ in range(4)]
    ones, order = torch.ones(16), torch.randperm(16, generator=generator)
    before = losses(name, PairScores(*columns, ones, ones)).mean().item()
    chosen, rejected, reference_chosen, reference_rejected = columns
    shuffled = PairScores(*(column[order] for column in columns), ones, ones)
    parted = PairScores(chosen[order], rejected, reference_chosen[order], reference_rejected, ones, ones)
    assert losses(name, shuffled).mean().item() == pytest.approx(before, abs=1e-14)
    assert (losses(name, parted).mean().item() == pytest.approx(before, abs=1e-14)) == (name == "aot_unpaired")


# Where policy and reference agree

AT_ZERO = {  # β = ¼: 1/(2β) = 2
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "hinge": 1.0,
    "ipo": 4.0,
    "exo_pair": -LN2 - math.log(0.75) / 2 - math.log(0.25) / 2,
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 8.0,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": LN2 / 2 + 1 / 2,
}


@pytest.mark.parametrize(("name", "divergence"), [pair for pair in LOSSES_AND_DIVERGENCES if pair[0] in REFERENCE_LOSSES])
def test_every_loss_has_its_known_value_where_policy_and_reference_agree(name: str, divergence: Divergence) -> None:
    logprobs, tokens = values(-7.5, -0.5), values(3, 5)
    pairs = PairScores(logprobs, 2 * logprobs, logprobs, 2 * logprobs, tokens, tokens + 1, divergence)
    assert losses(name, pairs, beta=0.25).tolist() == pytest.approx([AT_ZERO[name]] * 2, abs=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_sigmoid_starts_at_ln_2_with_any_smoothing(smoothing: float) -> None:
    found = preference.sigmoid(scores(values(0.0, 2.5), values(0.0, 2.5)), beta=0.1, label_smoothing=smoothing)
    assert found.tolist() == pytest.approx([LN2] * 2, abs=1e-15)


@pytest.mark.parametrize(("name", "divergence"), LOSSES_AND_DIVERGENCES)
def test_every_loss_prefers_the_chosen_answer(name: str, divergence: Divergence) -> None:
    """From where policy and reference agree, the chosen answer is pulled up against the rejected one."""
    more = {"discopop_tau": 0.5} if name == "discopop" else {}
    assert first_pull(name, divergence, **more) > 0


def first_pull(name: str, divergence: Divergence = REVERSE_KL, **changes: Any) -> float:
    """How much descent raises p_w − p_l where policy and reference agree."""
    chosen, rejected = values(-4.0), values(-4.0)
    pairs = PairScores(chosen, rejected, chosen.detach(), rejected.detach(), values(4), values(4), divergence)
    up, down = torch.autograd.grad(losses(name, pairs, **changes).sum(), [chosen, rejected])
    return (down - up).item()


def test_discopop_first_pulls_the_wrong_way_unless_tau_is_larger_than_in_its_paper() -> None:
    """Its slope at βD = 0 is (1 − ln 2)/(4τ) − ¾, above 0 for τ < (1 − ln 2)/3 ≈ 0.102; the paper's τ is 0.05."""
    assert first_pull("discopop") == pytest.approx(-2 * 0.1 * ((1 - LN2) / 0.2 - 0.75), abs=1e-15)
    assert first_pull("discopop", discopop_tau=0.102) < 0 < first_pull("discopop", discopop_tau=0.103)


def random_pairs(seed: int, count: int = 5, divergence: Divergence = REVERSE_KL) -> PairScores:
    """Log-probs of answers of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    columns = [-6 * torch.rand(count, generator=generator, dtype=torch.float64) - 0.1 for _ in range(4)]
    tokens = [torch.randint(1, 10, (count,), generator=generator).double() for _ in range(2)]
    return PairScores(*columns, *tokens, divergence)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_compares_with_the_reference_or_does_not_know_it(name: str) -> None:
    pairs = random_pairs(0)
    other = pairs._replace(reference_chosen=pairs.reference_chosen + 1)
    assert torch.equal(losses(name, pairs), losses(name, other)) == (name not in REFERENCE_LOSSES)


@pytest.mark.parametrize("name", sorted(REFERENCE_LOSSES))
def test_only_losses_on_the_difference_are_blind_to_what_both_answers_gained(name: str) -> None:
    """As much added to r_w as to r_l leaves D alone. Elsewhere each answer is judged by itself, or per token."""
    pairs = random_pairs(1)
    both = pairs._replace(chosen=pairs.chosen + 2, rejected=pairs.rejected + 2)
    blind = {"sigmoid", "hinge", "exo_pair", "robust", "discopop", "aot", "aot_unpaired"}
    assert torch.allclose(losses(name, pairs), losses(name, both), rtol=1e-12, atol=0) == (name in blind)


def test_a_twice_as_long_answer_counts_the_same_where_means_are_compared() -> None:
    """Trap 21: doubling sums and counts changes sums' losses and leaves means' losses alone."""
    short, long = scores(values(-2.0), values(-3.0), 4, 2), scores(values(-4.0), values(-6.0), 8, 4)
    unchanged = {name for name in PAIR_LOSSES if torch.equal(losses(name, short), losses(name, long))}
    assert unchanged == {"ipo", "sigmoid_norm", "simpo", "orpo"}


# Divergences


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (Divergence(), LN2),
        (Divergence("forward_kl"), 0.5),  # 1 − e^(−ln 2)
        (Divergence("js_divergence"), math.log(4 / 3)),  # ln 2 + ln σ(ln 2) = ln 2 + ln(2/3)
        (Divergence("alpha_divergence", 0.5), 2 - math.sqrt(2)),  # (2^(−½) − 1)/(−½)
        (Divergence("alpha_divergence", 2.0), 1.0),  # (2 − 1)/1
        (Divergence("alpha_divergence", 0.0), 0.5),  # forward KL
        (Divergence("alpha_divergence", 1.0), LN2),  # reverse KL
    ],
)
def test_divergences_against_hand_arithmetic(divergence: Divergence, expected: float) -> None:
    """The scores of r = ln 2 and 0; then β = 2, D = s(ln 2) − s(0) in the loss."""
    assert divergence.scores(values(LN2, 0.0)).tolist() == pytest.approx([expected, 0.0], abs=1e-15)
    loss = preference.hinge(scores(values(LN2), values(0.0), divergence=divergence), beta=2.0)
    assert loss.item() == pytest.approx(max(0.0, 1 - 2 * expected), abs=1e-15)


@pytest.mark.parametrize("step", [0.0, 1e-3, 1e-6, 1e-9, 1e-15])
@pytest.mark.parametrize("sign", [1, -1])
def test_alpha_divergence_goes_to_the_log_ratio_as_alpha_goes_to_1(step: float, sign: int) -> None:
    """In fp32, to its precision: s = r + (a − 1)·r²/2 + …, where the quotient of differences has lost every digit."""
    ratios = torch.tensor([-3.0, -0.01, 0.2, 5.0])
    found = Divergence("alpha_divergence", 1 + sign * step).scores(ratios)
    assert torch.allclose(found, ratios + sign * step * ratios**2 / 2, rtol=max(1e-6, 10 * step**2), atol=0)


def test_forward_kl_is_alpha_divergence_at_0_and_the_paper_s_alpha_is_1_minus_ours() -> None:
    """The paper's α-divergence is (1 − u^(−α))/α of the ratio u = e^r; for α = 0.3 that is our a = 0.7."""
    ratios = torch.linspace(-4, 4, 9, dtype=torch.float64)
    assert torch.equal(Divergence("alpha_divergence", 0.0).scores(ratios), Divergence("forward_kl").scores(ratios))
    assert torch.allclose(Divergence("alpha_divergence", 0.7).scores(ratios), (1 - ratios.exp() ** -0.3) / 0.3)


def test_an_exponent_stops_at_its_bound_and_is_counted() -> None:
    """forward_kl raises e to −r: beyond r = −bound the score stays, without gradient."""
    beyond = values(-EXPONENT_BOUND - 1, -EXPONENT_BOUND, 5.0)
    pairs = scores(beyond, values(-2 * EXPONENT_BOUND, 3.0, -EXPONENT_BOUND + 1), divergence=Divergence("forward_kl"))
    assert bounded_exponents(pairs).tolist() == [2, 0, 0]
    found = pairs.divergence.scores(beyond)
    assert found[0].item() == found[1].item() == pytest.approx(1 - math.exp(EXPONENT_BOUND))
    (gradient,) = torch.autograd.grad(found.sum(), beyond)
    assert gradient[0].item() == 0.0
    # a > 1 has its exponent on the other side; the others have none
    assert bounded_exponents(pairs._replace(divergence=Divergence("alpha_divergence", 8.0))).tolist() == [0, 0, 1]
    for divergence in (Divergence(), Divergence("js_divergence"), Divergence("alpha_divergence", 1.0)):
        assert bounded_exponents(pairs._replace(divergence=divergence)).tolist() == [0, 0, 0]


# Up to the largest log-ratios that answers have


FAR = torch.linspace(-80, 80, 641)
"""Log-ratios in steps of ¼, which fp32 holds exactly."""


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5, 0.999, 1.001, 1.3, 2.0])
def test_scores_and_their_slopes_have_their_digits_at_any_log_ratio(alpha: float) -> None:
    """s = (e^x − 1)/(a − 1) and s′ = e^x with x = (a − 1)·r, and beyond the bound neither moves; by Python's float64.

    In fp32 x has a relative error of two roundings (of a − 1 and of the product), which e^x turns into |x| as much; the
    functions and the division take some more. Below fp32's smallest number there is nothing.
    """
    slope = alpha - 1
    ratios = FAR.clone().requires_grad_()
    found = Divergence("alpha_divergence", alpha).scores(ratios)
    (slopes,) = torch.autograd.grad(found.sum(), ratios)
    for r, value, gradient in zip(FAR.tolist(), found.tolist(), slopes.tolist(), strict=True):
        x = slope * r
        close = {"rel": (abs(x) * 2 + 8) * 2**-24, "abs": torch.finfo(torch.float32).tiny}
        assert value == pytest.approx(math.expm1(min(x, EXPONENT_BOUND)) / slope, **close), r
        assert gradient == pytest.approx(math.exp(x) if x <= EXPONENT_BOUND else 0.0, **close), r


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence"])
def test_named_divergences_have_their_slopes_at_any_log_ratio(kind: Any) -> None:
    """e^(−r), at most to the bound, and σ(−r)."""
    ratios = FAR.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(Divergence(kind).scores(ratios).sum(), ratios)
    for r, gradient in zip(FAR.tolist(), slopes.tolist(), strict=True):
        forward = math.exp(-r) if -r <= EXPONENT_BOUND else 0.0
        expected = forward if kind == "forward_kl" else 1 / (1 + math.exp(r))
        assert gradient == pytest.approx(expected, rel=8 * 2**-24), r


def test_a_pair_far_above_its_reference_still_pulls() -> None:
    """forward_kl at r = 20 and 40: the slopes of the hinge are −β·e^(−20) and β·e^(−40); 1 − (1 − e^(−r)) is 0 in fp32."""
    chosen, rejected = (torch.tensor([r], requires_grad=True) for r in (20.0, 40.0))
    loss = preference.hinge(scores(chosen, rejected, divergence=Divergence("forward_kl")), beta=0.5)
    up, down = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert up.item() == pytest.approx(-0.5 * math.exp(-20), rel=1e-6)
    assert down.item() == pytest.approx(0.5 * math.exp(-40), rel=1e-6)


@pytest.mark.parametrize(
    ("divergence", "score"),
    [
        (Divergence(), LN2),
        (Divergence("forward_kl"), 1 / 2),
        (Divergence("js_divergence"), math.log(4 / 3)),
        (Divergence("alpha_divergence", 2.0), 1.0),
    ],
)
def test_means_of_scores_are_of_the_derivative_that_is_0_at_a_ratio_of_1(divergence: Divergence, score: float) -> None:
    """f′ + c would give c/1 − c/2 more, since r = ln 2 of both answers is divided by 1 and by 2 tokens: D = s/2."""
    pairs = scores(values(LN2), values(LN2), 1, 2, divergence)
    assert preference.ipo(pairs, beta=0.5).item() == pytest.approx((score / 2 - 1) ** 2, abs=1e-15)
    expected = math.log(1 + math.exp(-score / 2))
    assert preference.sigmoid_norm(pairs, beta=1.0).item() == pytest.approx(expected, abs=1e-15)


# Gradients and extremes


@pytest.mark.parametrize(("name", "divergence"), LOSSES_AND_DIVERGENCES)
def test_gradients_are_those_of_finite_differences(name: str, divergence: Divergence) -> None:
    pairs = random_pairs(2, divergence=divergence)
    more = {"label_smoothing": 0.2} if "label_smoothing" in LOSS_OPTIONS[name] else {}

    def function(*columns: Tensor) -> Tensor:
        return losses(name, PairScores(*columns, *pairs[4:]), delta=0.3, **more)

    assert torch.autograd.gradcheck(function, [column.clone().requires_grad_() for column in pairs[:4]])


@pytest.mark.parametrize(("name", "divergence"), LOSSES_AND_DIVERGENCES)
def test_values_and_gradients_stay_finite_in_fp32_far_out(name: str, divergence: Divergence) -> None:
    """Every combination of log-probs 0, −50 and −10⁴, for answers of 1 and of 1000 tokens: ratios between −10⁴ and 10⁴."""
    table = torch.tensor([*itertools.product([0.0, -50.0, -1e4], repeat=4)])
    columns = [column.clone().requires_grad_() for column in table.T]
    for tokens in (1.0, 1000.0):
        counts = torch.full_like(columns[0], tokens)
        found = losses(name, PairScores(*columns, counts, counts, divergence))
        assert found.dtype == torch.float32
        assert found.shape == counts.shape
        assert found.isfinite().all()
        for gradient in torch.autograd.grad(found.sum(), columns[:2]):
            assert gradient.isfinite().all()


def test_sigmoid_far_out_is_the_margin_that_is_missing() -> None:
    found = preference.sigmoid(scores(torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0])), beta=1.0, label_smoothing=0.0)
    assert found.tolist() == [1e4, 0.0]


def test_odds_are_exact_next_to_probability_1_and_far_from_it() -> None:
    """p = 1 − 2⁻¹⁰ has odds of 1023, p = e⁻²⁰ nearly of itself; the log of the ratio is ln 1023 + 20 + ln(1 − e⁻²⁰)."""
    chosen, rejected = torch.tensor([math.log1p(-(2.0**-10))]), torch.tensor([-20.0])
    expected = math.log(1023) + 20 + math.log1p(-math.exp(-20))
    found = preference.orpo(scores(rejected, chosen))  # the loss of so wrong a pair is its log odds ratio
    assert found.item() == pytest.approx(expected, rel=1e-6)


# Options


def test_the_longer_answer_s_rest_counts_alpha() -> None:
    """First tokens −2, whole answer −5: with α = ¼ it is −2 − ¾; α = 1 changes nothing, α = 0 leaves the first tokens."""
    first, whole = values(-2.0), values(-5.0)
    assert [ld_logprob(first, whole, alpha).item() for alpha in (0.25, 1.0, 0.0)] == [-2.75, -5.0, -2.0]
    (gradient,) = torch.autograd.grad(ld_logprob(first, whole, 0.25), whole)
    assert gradient.item() == 0.25


def test_a_pair_s_weight_is_the_product_of_both_answers_likelihoods_and_carries_no_gradient() -> None:
    """exp(ln ½ + ln ⅓) = 1/6; an answer likelier than what is sampled counts more than 1: exp(ln 2 + 0) = 2."""
    weights = wpo_weights(values(-LN2, LN2), values(-LN3, 0.0))
    assert weights.tolist() == pytest.approx([1 / 6, 2.0], abs=1e-15)
    assert not weights.requires_grad


CHOSEN_TOKENS, REJECTED_TOKENS = (4, 3, 5), (2, 6, 5)


def step_loss(config: DPOConfig, reference_seed: int = 1) -> float:
    """What becomes of three fixed pairs, token by token, with every option of the config in the plainest way."""

    def tokens(seed: int) -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            [-2 * torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]
            for lengths in (CHOSEN_TOKENS, REJECTED_TOKENS)
        ]

    def sums(sides: list[list[Tensor]]) -> list[Tensor]:
        alpha = 1.0 if config.ld_alpha is None else config.ld_alpha
        shared = [min(lengths) for lengths in zip(CHOSEN_TOKENS, REJECTED_TOKENS, strict=True)]
        return [
            torch.stack([ld_logprob(answer[:m].sum(), answer.sum(), alpha) for answer, m in zip(side, shared, strict=True)])
            for side in sides
        ]

    policy, sampled = tokens(0), tokens(2)
    reference = sums(tokens(reference_seed)) if config.needs_reference else [torch.zeros(3, dtype=torch.float64)] * 2
    divergence = Divergence(config.f_divergence_type, config.filled("f_alpha_divergence_coef"))
    pairs = PairScores(
        *sums(policy), *reference, torch.tensor(CHOSEN_TOKENS).double(), torch.tensor(REJECTED_TOKENS).double(), divergence
    )
    weights = torch.ones(3, dtype=torch.float64)
    if config.use_weighting:
        sides = zip(policy, sampled, strict=True)
        means = [torch.stack([(p - s).mean() for p, s in zip(one, other, strict=True)]) for one, other in sides]
        weights = wpo_weights(*means)
    total = -config.sft_weight() * torch.cat(policy[0]).mean()
    for name, factor in config.pair_weights().items():
        arguments: dict[str, Any] = config.loss_arguments(name)
        if name == "bco_pair":
            rewards = config.beta * torch.cat([pairs.chosen_ratios, pairs.rejected_ratios])
            arguments["delta"] = rewards.mean() if config.bco_running_mean else 0.0
        total = total + factor * (weights * getattr(preference, name)(pairs, **arguments)).mean()
    return total.item()


CHANGES: dict[str, Any] = {
    "beta": 0.7,
    "label_smoothing": 0.3,
    "discopop_tau": 0.4,
    "simpo_gamma": 0.3,
    "orpo_lambda": 0.3,
    "cpo_alpha": 0.3,
    "bco_running_mean": False,
    "f_divergence_type": "js_divergence",
    "use_weighting": True,
    "ld_alpha": 0.3,
    "reference_checkpoint": "elsewhere",
    "reference_free": True,
    "sync_ref_model": True,
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_an_option_changes_the_loss_or_is_refused(name: str, option: str) -> None:
    """No option is ignored: the table of losses and options is walked as a whole."""
    change = {option: CHANGES[option]}
    if option not in LOSS_OPTIONS[name]:
        with pytest.raises(ValueError, match=f"{option} has no meaning for loss_type='{name}': .*; leave it out"):
            configured(name, **change)
        return
    changed = configured(name, **change)
    if option in ("reference_checkpoint", "sync_ref_model"):  # they change the reference's log-probs
        assert changed.needs_reference
        assert abs(step_loss(changed, reference_seed=3) - step_loss(changed)) > 1e-6
    else:
        assert abs(step_loss(changed) - step_loss(configured(name))) > 1e-6


@pytest.mark.parametrize("name", sorted(OPTIONS["f_divergence_type"].losses))
def test_every_divergence_changes_the_loss_and_so_does_its_coefficient(name: str) -> None:
    changes: list[dict[str, Any]] = [{}]
    changes += [{"f_divergence_type": kind} for kind in ("forward_kl", "js_divergence", "alpha_divergence")]
    changes += [{"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}]
    assert len({round(step_loss(configured(name, **change)), 9) for change in changes}) == len(changes)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_weight_scales_its_loss(name: str) -> None:
    """["…"] with [3] is three times the loss; beside `sft` both add up."""
    alone = step_loss(configured(name))
    assert step_loss(configured(name, loss_type=[name], loss_weights=[3.0])) == pytest.approx(3 * alone, rel=1e-12)
    once = step_loss(configured(name, loss_type=[name, "sft"], loss_weights=[1.0, 0.5])) - alone
    twice = step_loss(configured(name, loss_type=[name, "sft"], loss_weights=[1.0, 1.0])) - alone
    assert once > 0
    assert twice == pytest.approx(2 * once, rel=1e-9)


def test_only_losses_of_the_whole_step_change_with_the_company_of_a_pair() -> None:
    """The value of a pair alone against its value among others; the running mean of `bco_pair` is given from outside."""
    pairs = random_pairs(3)
    alone = PairScores(*(column[:1] for column in pairs[:6]), pairs.divergence)
    changed = {name for name in PAIR_LOSSES if not torch.equal(losses(name, alone), losses(name, pairs)[:1])}
    assert changed == WHOLE_STEP_LOSSES - {"bco_pair"}
