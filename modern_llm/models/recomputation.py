"""Gradient checkpointing: activations of some or all decoder layers made again in the backward pass."""

import math

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from modern_llm.config import UserError


def recompute_activations(model: PreTrainedModel, share: float | None = None) -> tuple[int, int]:
    """Switch on gradient checkpointing, and return how many decoder layers it recomputes, and of how many.

    Args:
        model: any causal language model of transformers.
        share: of the decoder layers, rounded up, evenly spread from the first to the last. None: all.

    Raises:
        UserError: the model cannot do it.
    """
    name = type(model).__name__
    if not model.supports_gradient_checkpointing:
        raise UserError(f"gradient_checkpointing: {name} does not support it: set it to false")
    # transformers 5.23 has a new name for it and warns of the old one, which alone older versions know
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if share is None or share == 1:
        return len(layers), len(layers)
    if not layers:
        raise UserError(f"checkpointed_share={share:g}: {name} recomputes all of its layers or none: leave it out")
    count = math.ceil(share * len(layers) - 1e-9)  # 0.3 of 10 layers are 3
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = (i + 1) * count // len(layers) > i * count // len(layers)
    return count, len(layers)
