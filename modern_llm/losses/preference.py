"""Preference losses: pure functions of summed log-ratios, one value per pair."""

import torch.nn.functional as F
from torch import Tensor


def sigmoid(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7; with label smoothing e its conservative form: −(1−e)·logσ(βD) − e·logσ(−βD).

    Args:
        chosen_ratio: (pairs,) fp32, log p_policy − log p_reference of the chosen answer, summed over its tokens, nats.
        rejected_ratio: (pairs,) fp32, the same of the rejected answer. D is their difference.
        beta: strength of the pull towards the reference.
        label_smoothing: probability that the label is wrong.

    Returns:
        (pairs,) fp32 losses; ln 2 where policy and reference agree.
    """
    scaled = beta * (chosen_ratio - rejected_ratio)
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)
