"""What the routers of a mixture-of-experts model say in a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config import UserError

ROUTED = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Families whose routers are `…TopKRouter` modules that return (logits, weights, indices) of every token and choose by the
softmax of the logits, in transformers 5.23."""


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
