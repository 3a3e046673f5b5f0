"""Kinds of weights: matrices that multiply an input, stacks of such matrices, and all others.

The number of dimensions does not tell: Cohere's query norm, Mamba's `A_log` and RWKV's time mix have two or three of them, and
DBRX keeps the matrices of its experts below each other in one of two.
"""

import re

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modern_llm.config.training import ParameterGroup

FACTOR = re.compile(r"(^|_)(weight|proj|fn)$|^[wv][12]$|^[qkvor]$")
"""Last part of the name of a matrix that a module other than a linear layer holds, in transformers 5.23: a router's `weight`,
`gate_up_proj`, `in_proj_weight`, DeepSeek-V4's `fn`, DBRX's `w1`, XLNet's `q`. Any other name is that of a vector: in doubt
a weight is spared decay and Muon."""
NO_FACTOR = re.compile("Norm|Clip|Conv")
"""Part of the class of a module whose `weight` scales or filters single channels."""


def weight_kind(model: PreTrainedModel, name: str) -> ParameterGroup:
    """Return 'matrices', 'experts' (a stack of matrices in one parameter) or 'vectors' for a weight that is in no table.

    Args:
        model: its owner.
        name: of the parameter in the model.
    """
    path, _, last = name.rpartition(".")
    owner, weight = model.get_submodule(path), model.get_parameter(name)
    if weight.ndim < 2 or "bias" in last:
        return "vectors"
    if isinstance(owner, nn.Linear | Conv1D):  # DeepSeek-V4 has groups of inputs, each with a matrix of its own
        return "experts" if getattr(owner, "n_groups", 1) > 1 else "matrices"
    if isinstance(
        owner, _ConvNd
    ):  # a depthwise one is a filter for each channel; another multiplies by a matrix at each offset
        return "vectors" if weight.shape[1] == 1 else "experts"
    if NO_FACTOR.search(type(owner).__name__) or not FACTOR.search(last):
        return "vectors"
    return "matrices" if weight.ndim == 2 and ".experts." not in name else "experts"
