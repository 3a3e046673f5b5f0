"""Mixtures of experts: their products under autocast, and what their routers say in a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from modern_llm.config import UserError

ROUTED = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Families whose routers are `…TopKRouter` modules that return (logits, weights, indices) of every token and choose by the
softmax of the logits, in transformers 5.23."""

EXPERTS = "grouped_mm_in_autocast"
"""Name of `experts_in_autocast` among transformers' implementations of experts."""


def run_experts_in_autocast(model: PreTrainedModel) -> None:
    """Let a model that runs its experts by grouped products do so in the type of autocast."""
    if model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation(EXPERTS)


def experts_in_autocast(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' grouped products, in the type of autocast where it is on; arguments are those of its own function (5.23).

    Autocast does not know these products, which take the weights' type: fp32. Measured on one core of a CPU with 4 layers of 8
    experts, 256 channels and 4,096 tokens, forward and backward: 2.8 s in bf16 against 4.0 s (qwen3_moe), 3.7 against 4.9
    (gpt_oss). On CUDA torch has a kernel for bf16 alone; in fp32 each layer waits for the device.
    """
    kind = hidden_states.device.type
    matrices = [parameter for parameter in experts.parameters() if parameter.ndim == 3]
    fits = all(size % 8 == 0 for matrix in matrices for size in matrix.shape[1:])  # rows in bf16 start at multiples of 16 bytes
    read = _ReadAs(experts, torch.get_autocast_dtype(kind)) if fits and torch.is_autocast_enabled(kind) else experts
    return grouped_mm_experts_forward(read, hidden_states, top_k_index, top_k_weights)  # type: ignore[arg-type]


class _ReadAs:
    """A module whose tensors are read in another type; all else is its own."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_in_autocast)


class Routing(NamedTuple):
    """One layer's."""

    logits: Tensor
    """(tokens, experts), with gradient."""
    chosen: Tensor
    """(tokens, chosen experts) int64."""


class RouterRecorder:
    """Keeps what a model's routers give, through forward hooks.

    transformers' own recorder (`output_router_logits`) gives the logits alone, and only to who calls the model; the choice
    would have to be made again. Here the policy is called as ever.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            UserError: the model has no routers, or of a kind that is not known here.
        """
        check_routed(model)
        routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self._found: list[Routing | None] = [None] * len(routers)
        self._active = False
        for place, router in enumerate(routers):
            router.register_forward_hook(self._hook(place))

    @contextmanager
    def recording(self) -> Iterator[list[Routing | None]]:
        """A list that the next forward pass fills, one entry a layer. Recomputation in a backward pass leaves it alone."""
        self._found[:] = [None] * len(self._found)
        self._active = True
        try:
            yield self._found
        finally:
            self._active = False

    def _hook(self, place: int) -> Any:
        def keep(router: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            if self._active:
                self._found[place] = Routing(output[0], output[2])

        return keep


def check_routed(model: PreTrainedModel) -> None:
    """
    Raises:
        UserError: the model has no routers, or of a kind that is not known here.
    """
    if model.config.model_type not in ROUTED:
        raise UserError(
            f"balance_loss evens out the experts of {', '.join(ROUTED)}, and this is a {type(model).__name__} "
            f"({model.config.model_type}): leave it out"
        )
