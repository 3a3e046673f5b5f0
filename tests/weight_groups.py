"""The group of every weight by a table with reasons, apart from the rule of the package."""

import re

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modern_llm.training.optim import ParameterGroups

OTHER_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "matrices": {
        "a router multiplies each token by it": (r"Router\.weight",),
        "keys, queries and values below each other, all of one input": (r"MultiheadAttention\.in_proj_weight",),
        "features of an image are multiplied by it": (r"MultiModalProjector\.mm_input_projection_weight",),
        "its streams, laid end to end, are multiplied by it": (r"Hyper(Connection|Head)\.(hc_)?fn",),
        "one head's states times it are the logits of distances": (r"RelativeLogits\.proj",),
    },
    "experts": {
        "a matrix for each expert": (r"Experts\.(gate_up_proj|gate_proj|up_proj|down_proj|weight)",),
        "a matrix for each expert, below each other in one of two dimensions": (r"DbrxExpertGLU\.(w1|v1|w2)",),
        "a matrix for each group of heads, below each other": (r"GroupedLinear\.weight",),
        "a matrix for each head": (
            r"RecurrentGemmaRglru\.(input|recurrent)_gate_weight", r"ZambaMambaMixer\.(x|dt)_proj_weight",
            r"XLNetRelativeAttention\.[qkvor]",
        ),
        "a matrix at each offset, as for a patch of an image": (r"Conv[12]d\.weight of \w+$",),
    },
    "vectors": {
        "a filter for each channel": (r"Conv[12]d\.weight of \w+, channel by", r"DynamicShortConvolution\.static_weight"),
        "the logarithm of a state's rate of decay": (r"\.A_log",),
        "a share of the input that goes past a state": (r"ZambaMambaMixer\.D",),
        "a share of each channel taken from the token before": (r"Rwkv\w+\.time_mix_\w+",),
        "a scale for each channel of each head": (r"LayerNorm\.weight", r"L2Clip\.scale"),
        "it is added": (r"\.\w*bias", r"GluPointWiseConv\.b[12]"),
        "a table of positions, segments, masks or borders": (
            r"ParameterList\.\d", r"XLNet\w+\.(seg_embed|mask_emb)", r"\.(pos_embed|rel_pos_[hw])", r"\.\w+_feature_extensor",
        ),
        "a fixed query": (r"AttentionResidual\.query", r"\.probe"),
    },
}  # fmt: skip
"""Group → reason → weights of two and more dimensions of modules that are no linear layer: class and name of the parameter."""


def group_by_table(owner: nn.Module, name: str, weight: Tensor) -> str:
    """The first row of the table that a weight of two or more dimensions is in."""
    path, _, last = name.rpartition(".")
    if isinstance(owner, nn.Linear | Conv1D) and not hasattr(owner, "n_groups"):
        return "matrices"
    label = f"{type(owner).__name__}.{last} of {path.rpartition('.')[2]}{', channel by channel' * (weight.shape[1] == 1)}"
    rows = [(group, pattern) for group, reasons in OTHER_LAYERS.items() for row in reasons.values() for pattern in row]
    found = [group for group, pattern in rows if re.search(rf"{pattern}\b", label) and "bias" not in last]
    assert found or "bias" in last, f"{label} ({name}): decide what it is"
    return found[0] if found else "vectors"


def misplaced(model: PreTrainedModel) -> list[str]:
    """Weights that are in another group than the table's, each with both."""
    found = []
    for group, weights in ParameterGroups(model).named.items():
        for name, weight in weights.items():
            if group not in ("embeddings", "head"):
                owner = model.get_submodule(name.rpartition(".")[0])
                expected = "vectors" if weight.ndim < 2 else group_by_table(owner, name, weight)
                if group != expected:
                    found.append(f"{name} of {type(owner).__name__} is among the {group}: expected {expected}")
    return found
