"""How much arithmetic a packed row needs for training: a forward and a backward pass, and nothing that could be left out.

Operations on matrices, two to a multiplication with its addition. With every weight learning, the backward pass needs twice the
forward pass:

    3 · (2 · N · T + A) + 3 · 2 · d · V · R

    N  entries of the body's matrices, without embeddings; of a mixture of experts the share that a token is sent to
    T  tokens of the row; a prompt that two answers share counts once
    A  4 · heads · size of a head · S, added up over the layers; S is the sum over the tokens of the positions that each one
       sees in that layer, itself included, at most a sliding window
    d  hidden size
    V  rows of the output projection
    R  positions that predict a scored token, which alone need the output projection

A frozen weight needs no gradient of its own, as the base weights under adapters: two of its three products are left, forward
and the gradient for the layers below (counted in the lowest layer too). Where nothing of the body learns, it needs no backward
pass.

Not counted: padding, what gradient checkpointing does twice, a first pass over a whole step (`aot`, `bco_pair`), the pass of a
reference, the optimizer, and everything elementwise. Attention that is no softmax over positions (state-space layers, linear
attention, chunks) has only its matrices counted.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from modern_llm.layout import PackedRow
from modern_llm.models.weight_kinds import weight_kind


@dataclass(frozen=True)
class TrainingCost:
    """What training on a row costs, for one model."""

    matrices: int
    """N: entries of the body's matrices that a token meets."""
    per_token: float
    """FLOPs of them for a token, forward and backward."""
    per_seen: Mapping[int | None, float]
    """Sliding window (None: none) → FLOPs of all attention layers with that window, for each position that a token sees."""
    per_predicted: float
    """FLOPs of the output projection for a position that predicts a scored token."""
    hidden: int
    """d."""
    vocabulary: int
    """V."""

    def __call__(self, row: PackedRow) -> float:
        """FLOPs of a forward and a backward pass over a row."""
        attention = sum(cost * positions_seen(row, window) for window, cost in self.per_seen.items())
        return self.per_token * row.num_tokens + attention + self.per_predicted * row.num_scored

    @property
    def formula(self) -> str:
        """How a row is counted, in one line."""
        return (
            f"{self.per_token / 1e6:,.2f} MFLOP a token ({self.matrices / 1e6:.2f}M weights), "
            f"{sum(self.per_seen.values()) / 1e3:,.2f} kFLOP a position that it sees, "
            f"{self.per_predicted / 1e6:,.2f} MFLOP a predicted one ({self.hidden} × {self.vocabulary})"
        )


def training_cost(model: PreTrainedModel) -> TrainingCost:
    """The cost of training a model as it stands: which of its weights learn decides what the backward pass needs."""
    config: PreTrainedConfig = model.config.get_text_config()
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module), "a causal language model has an output projection"
    own_head = {id(p) for p in head.parameters()} - {id(p) for p in model.get_input_embeddings().parameters()}  # untied
    tables = own_head | {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    share = _expert_share(config)
    matrices = learning = 0.0
    body_learns = False
    for name, parameter in model.named_parameters():
        body_learns = body_learns or (parameter.requires_grad and id(parameter) not in own_head)
        if id(parameter) in tables or weight_kind(model, name) == "vectors":
            continue
        entries = _entries(parameter) * (share if ".experts." in name else 1.0)
        matrices += entries
        learning += entries if parameter.requires_grad else 0.0
    passes = 2 if body_learns else 1
    projection = head.weight
    assert isinstance(projection, Tensor)
    rows, hidden = projection.shape
    head_passes = passes + (1 if projection.requires_grad else 0)
    attention = 3.0 if body_learns else 1.0
    return TrainingCost(
        matrices=round(matrices),
        per_token=2 * (passes * matrices + learning),
        per_seen={window: attention * count for window, count in _attention(config).items()},
        per_predicted=2.0 * head_passes * hidden * rows,
        hidden=hidden,
        vocabulary=rows,
    )


def positions_seen(row: PackedRow, window: int | None = None) -> int:
    """S: positions that the tokens of a row see, itself included, added up over the tokens.

    Args:
        row: token i of a segment with s shared ones stands at position s + i, and sees s + i + 1 of them.
        window: at most so many.
    """
    _, own, _, shared = row.spans.numpy().T
    return int((_sum_up_to(shared + own, window) - _sum_up_to(shared, window)).sum())


def _sum_up_to(count: np.ndarray, window: int | None) -> np.ndarray:
    """Σ min(i, window) over i = 1 … count."""
    if window is None:
        return count * (count + 1) // 2
    short = np.minimum(count, window)
    return short * (short + 1) // 2 + (count - short) * window


def _entries(parameter: nn.Parameter) -> int:
    """Entries of a matrix; a 4-bit one of bitsandbytes holds two to a byte, and its true shape aside."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def _expert_share(config: PreTrainedConfig) -> float:
    """Share of a layer's experts that a token is sent to; 1 where there are none."""
    config = getattr(config, "ffn_config", config)  # DBRX
    names = ("num_experts_per_tok", "moe_topk", "moe_top_k")
    chosen = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if chosen and getattr(config, name, None):
            return chosen / getattr(config, name)
    return 1.0


def _attention(config: PreTrainedConfig) -> dict[int | None, int]:
    """Sliding window (None: none) → FLOPs of the forward pass, of all layers with that window, for each position seen."""
    # transformers 5.23 refuses to read from a config what differs from layer to layer (Gemma 4)
    differ = getattr(config, "is_heterogeneous", False)
    layers = list(config.per_layer_config) if differ else [config] * (getattr(config, "num_hidden_layers", None) or 0)
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    found: Counter[int | None] = Counter()
    for layer, kind in zip(layers, kinds, strict=False):
        heads = getattr(layer, "num_attention_heads", None)
        if not heads or kind not in _SOFTMAX:
            continue
        width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        key = getattr(layer, "qk_head_dim", None) or width  # keys and values of several widths: DeepSeek-V3
        value = getattr(layer, "v_head_dim", None) or width
        window = getattr(layer, "sliding_window", None) if getattr(layer, "use_sliding_window", True) else None
        found[None if kind == "full_attention" else window] += 2 * heads * (key + value)
    return dict(found)


_SOFTMAX = ("full_attention", "sliding_attention", None)
