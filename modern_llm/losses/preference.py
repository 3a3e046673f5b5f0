"""Preference losses: pure functions of what policy and reference say of each pair, one value per pair.

Legend, all per pair: `r_w`, `r_l` log p_policy − log p_reference of the chosen and of the rejected answer, summed over its
tokens, nats; `D` = r_w − r_l; `n_w`, `n_l` tokens of the answers; `β` beta; `ε` label_smoothing; `σ` the logistic function. The
keyword arguments of a function are the fields of `DPOConfig` that it honours.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairScores(NamedTuple):
    """What is known of the pairs of a batch; every field is (pairs,), fp32 or wider."""

    chosen_ratios: Tensor
    """r_w."""
    rejected_ratios: Tensor
    """r_l."""
    chosen_tokens: Tensor
    """n_w."""
    rejected_tokens: Tensor
    """n_l."""

    @property
    def difference(self) -> Tensor:
        """D."""
        return self.chosen_ratios - self.rejected_ratios

    @property
    def mean_difference(self) -> Tensor:
        """r_w / n_w − r_l / n_l."""
        return self.chosen_ratios / self.chosen_tokens - self.rejected_ratios / self.rejected_tokens


def sigmoid(pairs: PairScores, *, beta: float, label_smoothing: float) -> Tensor:
    """−(1 − ε)·log σ(βD) − ε·log σ(−βD). DPO, arXiv 2305.18290 eq. 7; ε > 0 is its conservative form. ln 2 at the start."""
    scaled = beta * pairs.difference
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def sigmoid_norm(pairs: PairScores, *, beta: float) -> Tensor:
    """−log σ(β(r_w/n_w − r_l/n_l)): DPO on means over tokens instead of sums."""
    return -F.logsigmoid(beta * pairs.mean_difference)


def hinge(pairs: PairScores, *, beta: float) -> Tensor:
    """max(0, 1 − βD). SLiC in the form of RSO, arXiv 2309.06657."""
    return torch.relu(1 - beta * pairs.difference)


def ipo(pairs: PairScores, *, beta: float) -> Tensor:
    """(r_w/n_w − r_l/n_l − 1/(2β))². IPO, arXiv 2310.12036, whose equation has sums; means are its authors' later advice."""
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


def sppo_hard(pairs: PairScores, *, beta: float) -> Tensor:
    """(r_w − 1/(2β))² + (r_l + 1/(2β))². SPPO with hard labels, arXiv 2405.00675."""
    return (pairs.chosen_ratios - 1 / (2 * beta)).square() + (pairs.rejected_ratios + 1 / (2 * beta)).square()


def apo_zero(pairs: PairScores, *, beta: float) -> Tensor:
    """1 − σ(βr_w) + σ(βr_l): chosen answers up, rejected ones down. APO, arXiv 2408.06266."""
    return torch.sigmoid(-beta * pairs.chosen_ratios) + torch.sigmoid(beta * pairs.rejected_ratios)


def apo_down(pairs: PairScores, *, beta: float) -> Tensor:
    """σ(βr_w) + 1 − σ(βD): both answers down, the rejected one more. APO, arXiv 2408.06266."""
    return torch.sigmoid(beta * pairs.chosen_ratios) + torch.sigmoid(-beta * pairs.difference)


def discopop(pairs: PairScores, *, beta: float, discopop_tau: float) -> Tensor:
    """(1 − m)·(−log σ(βD)) + m·exp(−βD) with m = σ(βD/τ). DiscoPOP, arXiv 2406.08414."""
    scaled = beta * pairs.difference
    share = torch.sigmoid(scaled / discopop_tau)
    return (1 - share) * -F.logsigmoid(scaled) + share * torch.exp(-scaled)
