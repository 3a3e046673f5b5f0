"""Preference losses: pure functions of what policy and reference say of each pair, one value per pair.

Legend, all per pair: `p_w`, `p_l` log-prob of the chosen and of the rejected answer under the policy, summed over its tokens,
nats; `r_w`, `r_l` the same minus the log-prob under the reference; `s_w`, `s_l` their transform by the f-divergence, which is
`r` itself unless set otherwise; `D` = s_w − s_l; `n_w`, `n_l` tokens of the answers; `β` beta; `ε` label_smoothing; `σ` the
logistic function. The keyword arguments of a function are the fields of `DPOConfig` that it honours.

The likelihood terms of `orpo` and `cpo`, and `sft`, are means over tokens and not over pairs: they are not here.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modern_llm.config.dpo import DivergenceType

EXPONENT_BOUND = 30.0
"""Largest exponent that an f-divergence raises e to. e³⁰ ≈ 10¹³ is past any use as a score, and its square (`ipo`) is still far
from the largest fp32 number. Beyond it a score is constant and has no gradient; `bounded_exponents` counts how often."""


class Divergence(NamedTuple):
    """How the distance from the reference is measured. f-DPO, arXiv 2309.16240.

    The derivative f′ at the ratio u = e^r of the probabilities takes the place of r in a loss. A divergence fixes f′ up to a
    constant, which cancels in D; in s_w/n_w − s_l/n_l (`ipo`, `sigmoid_norm`) it does not where the answers differ in length.
    The f′ used is the one with f′(1) = 0, as in TRL 1.16: s = 0 where policy and reference agree.
    """

    kind: DivergenceType = "reverse_kl"
    alpha: float = 0.5
    """The `a` of `alpha_divergence`; the paper's α is 1 − a. 1 is the limit `reverse_kl`, 0 is `forward_kl`."""

    @property
    def slope(self) -> float:
        """What r is multiplied by in the exponent; 0 where e is not raised to anything."""
        if self.kind == "forward_kl":
            return -1.0
        return self.alpha - 1 if self.kind == "alpha_divergence" else 0.0

    def scores(self, ratios: Tensor) -> Tensor:
        """s of r, which is f′(e^r).

        reverse_kl: r, f′ = ln u. js_divergence: ln 2 + log σ(r), f′ = ln(2u/(u + 1)). forward_kl: 1 − e^(−r), f′ = 1 − 1/u,
        which is alpha_divergence with a = 0. alpha_divergence: (e^((a − 1)r) − 1)/(a − 1), f′ = (u^(a − 1) − 1)/(a − 1), or r
        where a = 1.
        """
        if self.kind == "js_divergence":
            return math.log(2) + F.logsigmoid(ratios)
        if self.slope == 0:
            return ratios
        exponent = (self.slope * ratios).clamp(max=EXPONENT_BOUND)
        # expm1 keeps its digits as a → 1, where e^… − 1 loses them all. Its derivative is expm1 + 1 to torch (2.13), which is 0
        # in fp32 below −17; there the difference has all its digits, and its derivative is e^… itself
        return torch.where(exponent < -1, exponent.exp() - 1, exponent.expm1()) / self.slope


class PairScores(NamedTuple):
    """What is known of the pairs of a batch; every tensor is (pairs,), fp32 or wider."""

    chosen: Tensor
    """p_w."""
    rejected: Tensor
    """p_l."""
    reference_chosen: Tensor
    """Log-prob of the chosen answer under the reference; zeros where there is none."""
    reference_rejected: Tensor
    """Log-prob of the rejected answer under the reference; zeros where there is none."""
    chosen_tokens: Tensor
    """n_w."""
    rejected_tokens: Tensor
    """n_l."""
    divergence: Divergence = Divergence()
    """The transform from r to s."""

    @property
    def chosen_ratios(self) -> Tensor:
        """r_w."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratios(self) -> Tensor:
        """r_l."""
        return self.rejected - self.reference_rejected

    @property
    def difference(self) -> Tensor:
        """D."""
        return self.divergence.scores(self.chosen_ratios) - self.divergence.scores(self.rejected_ratios)

    @property
    def mean_difference(self) -> Tensor:
        """s_w / n_w − s_l / n_l."""
        chosen, rejected = self.divergence.scores(self.chosen_ratios), self.divergence.scores(self.rejected_ratios)
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens


def bounded_exponents(pairs: PairScores) -> Tensor:
    """How many of the two scores of each pair are cut off at `EXPONENT_BOUND`: (pairs,) int64, 0 to 2."""
    ratios = torch.stack([pairs.chosen_ratios, pairs.rejected_ratios])
    return (pairs.divergence.slope * ratios > EXPONENT_BOUND).sum(dim=0)


def ld_logprob(first: Tensor, whole: Tensor, ld_alpha: float) -> Tensor:
    """first + α·(whole − first): the tokens by which an answer is longer than the other one of its pair count α.

    `first` is the log-prob of the first min(n_w, n_l) tokens, `whole` of all. LD-DPO, arXiv 2409.06411; applied to policy and
    reference alike.
    """
    return first + ld_alpha * (whole - first)


def wpo_weights(chosen_means: Tensor, rejected_means: Tensor) -> Tensor:
    """exp(mean_w + mean_l), the factor of a pair's loss, without gradient. WPO, arXiv 2406.11827.

    A mean is over the tokens of an answer of log p(token) − log Σ_v p(v)², so an answer counts 1 where its tokens are as
    likely as what the policy would sample itself. Not cut off at 1: the authors' code does that, their equation does not.
    """
    return (chosen_means + rejected_means).detach().exp()


def sigmoid(pairs: PairScores, *, beta: float, label_smoothing: float) -> Tensor:
    """−(1 − ε)·log σ(βD) − ε·log σ(−βD). DPO, arXiv 2305.18290 eq. 7; ε > 0 is its conservative form. ln 2 at the start."""
    return _cross_entropy(beta * pairs.difference, label_smoothing)


def sigmoid_norm(pairs: PairScores, *, beta: float) -> Tensor:
    """−log σ(β(s_w/n_w − s_l/n_l)): DPO on means over tokens instead of sums."""
    return -F.logsigmoid(beta * pairs.mean_difference)


def hinge(pairs: PairScores, *, beta: float) -> Tensor:
    """max(0, 1 − βD). SLiC in the form of RSO, arXiv 2309.06657."""
    return torch.relu(1 - beta * pairs.difference)


def ipo(pairs: PairScores, *, beta: float) -> Tensor:
    """(s_w/n_w − s_l/n_l − 1/(2β))². IPO, arXiv 2310.12036, whose equation has sums; means are its authors' later advice."""
    return (pairs.mean_difference - 1 / (2 * beta)).square()


def exo_pair(pairs: PairScores, *, beta: float, label_smoothing: float) -> Tensor:
    """σ(βD)·(log σ(βD) − log(1 − ε)) + σ(−βD)·(log σ(−βD) − log ε), ε > 0. EXO, arXiv 2402.00856."""
    scaled = beta * pairs.difference
    chosen, rejected = F.logsigmoid(scaled), F.logsigmoid(-scaled)
    return chosen.exp() * (chosen - math.log1p(-label_smoothing)) + rejected.exp() * (rejected - math.log(label_smoothing))


def nca_pair(pairs: PairScores, *, beta: float) -> Tensor:
    """−log σ(βr_w) − ½·log σ(−βr_w) − ½·log σ(−βr_l). NCA, arXiv 2402.05369."""
    chosen, rejected = beta * pairs.chosen_ratios, beta * pairs.rejected_ratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(pairs: PairScores, *, beta: float, label_smoothing: float) -> Tensor:
    """(−(1 − ε)·log σ(βD) + ε·log σ(−βD)) / (1 − 2ε): unbiased where a share ε of labels is wrong. rDPO, arXiv 2403.00409."""
    scaled = beta * pairs.difference
    return (-(1 - label_smoothing) * F.logsigmoid(scaled) + label_smoothing * F.logsigmoid(-scaled)) / (1 - 2 * label_smoothing)


def bco_pair(pairs: PairScores, *, beta: float, delta: Tensor | float) -> Tensor:
    """−log σ(βr_w − δ) − log σ(−(βr_l − δ)), δ the running mean of the rewards βr of both answers. BCO, arXiv 2404.04656."""
    return -F.logsigmoid(beta * pairs.chosen_ratios - delta) - F.logsigmoid(delta - beta * pairs.rejected_ratios)


def sppo_hard(pairs: PairScores, *, beta: float) -> Tensor:
    """(r_w − 1/(2β))² + (r_l + 1/(2β))². SPPO with hard labels, arXiv 2405.00675."""
    return (pairs.chosen_ratios - 1 / (2 * beta)).square() + (pairs.rejected_ratios + 1 / (2 * beta)).square()


def aot(pairs: PairScores, *, beta: float, label_smoothing: float) -> Tensor:
    """−(1 − ε)·log σ(βd) − ε·log σ(−βd) with d = sort(p_w − p_l) − sort(the same of the reference). AOT, arXiv 2406.05882.

    The sort is over all the pairs given, so these must be those of a whole optimizer step. The values are in order of rank:
    only their mean belongs to the pairs.
    """
    policy = _sorted(pairs.chosen - pairs.rejected)
    reference = _sorted(pairs.reference_chosen - pairs.reference_rejected)
    return _cross_entropy(beta * (policy - reference), label_smoothing)


def aot_unpaired(pairs: PairScores, *, beta: float, label_smoothing: float) -> Tensor:
    """As `aot`, with d = sort(r_w) − sort(r_l): the distribution of all chosen answers against that of all rejected ones."""
    return _cross_entropy(beta * (_sorted(pairs.chosen_ratios) - _sorted(pairs.rejected_ratios)), label_smoothing)


def apo_zero(pairs: PairScores, *, beta: float) -> Tensor:
    """1 − σ(βr_w) + σ(βr_l): chosen answers up, rejected ones down. APO, arXiv 2408.06266."""
    return torch.sigmoid(-beta * pairs.chosen_ratios) + torch.sigmoid(beta * pairs.rejected_ratios)


def apo_down(pairs: PairScores, *, beta: float) -> Tensor:
    """σ(βr_w) + 1 − σ(β(r_w − r_l)): both answers down, the rejected one more. APO, arXiv 2408.06266."""
    chosen, rejected = beta * pairs.chosen_ratios, beta * pairs.rejected_ratios
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(pairs: PairScores, *, beta: float, discopop_tau: float) -> Tensor:
    """(1 − m)·(−log σ(βD)) + m·exp(−βD) with m = σ(βD/τ). DiscoPOP, arXiv 2406.08414."""
    scaled = beta * pairs.difference
    # the product m·exp(−βD) from its logarithm: far below 0 the second factor alone overflows
    exponential = torch.exp(F.logsigmoid(scaled / discopop_tau) - scaled)
    return torch.sigmoid(-scaled / discopop_tau) * -F.logsigmoid(scaled) + exponential


def simpo(pairs: PairScores, *, beta: float, simpo_gamma: float) -> Tensor:
    """−log σ(β(p_w/n_w − p_l/n_l) − γ). SimPO, arXiv 2405.14734."""
    means = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return -F.logsigmoid(beta * means - simpo_gamma)


def orpo(pairs: PairScores) -> Tensor:
    """−log σ(log odds_w − log odds_l), odds = p/(1 − p) of the geometric mean p of an answer's token probabilities.

    The odds ratio of ORPO, arXiv 2403.07691 eq. 7; its weight λ and the likelihood term come on top.
    """
    chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def cpo(pairs: PairScores, *, beta: float) -> Tensor:
    """−log σ(β(p_w − p_l)). The preference term of CPO, arXiv 2401.08417; the likelihood term comes on top."""
    return -F.logsigmoid(beta * (pairs.chosen - pairs.rejected))


def _cross_entropy(scaled: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε)·log σ(x) − ε·log σ(−x)."""
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def _sorted(values: Tensor) -> Tensor:
    # equal values keep their order, so that the gradient of a run can be had again
    return torch.sort(values, stable=True).values


def _log_odds(means: Tensor) -> Tensor:
    """log(p / (1 − p)) of p = e^means, finite also where p rounds to 1."""
    means = means.clamp(max=-torch.finfo(means.dtype).eps)
    # far below 0, 1 − p rounds to 1; what is lost then is nothing beside `means` itself
    return means - torch.log(-torch.expm1(means))
