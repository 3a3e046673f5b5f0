"""Updates during the backward pass: each parameter steps as soon as its gradient is there, and the gradient is freed.

So there is never more than about one layer's gradients in memory, where there were the gradients of all parameters. What needs
all of them at once (clipping by the global norm, several micro-batches, several processes) does not go with it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modern_llm.training.muon import Muon


class BackwardUpdates:
    """Steps the optimizer of each parameter from a hook that autograd calls when the parameter's gradient is complete.

    A tied weight's gradient is complete once, after all its uses. Outside a step (a trial batch before training) the hooks do
    nothing.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], parts: Sequence[torch.optim.Optimizer]) -> None:
        """
        Args:
            parameters: by name.
            parts: one optimizer for each of them, in any order.
        """
        self.active = False
        self.norms: dict[str, Tensor] = {}
        """Of the gradients of this step, by parameter."""
        self.looks = all(parameter.device.type == "cpu" for parameter in parameters.values())
        """Whether the host looks at each norm before a step. Each look at a GPU waits for the backward pass to get there."""
        self.parts = {id(part.param_groups[0]["params"][0]): part for part in parts}
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        assert self.parts.keys() == self.names.keys(), "each parameter has an optimizer of its own"
        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(self._update)

    def begin(self) -> None:
        """A step's backward pass is about to run."""
        self.active, self.norms = True, {}

    def finish(self) -> Tensor:
        """The backward pass is done; returns the global norm of the gradients that there were."""
        self.active = False
        return torch.nn.utils.get_total_norm(list(self.norms.values()))

    @property
    def left(self) -> list[str]:
        """Parameters of this step whose gradient was not finite: neither they nor their optimizer state have changed."""
        if not self.norms:
            return []
        finite = torch.stack(list(self.norms.values())).isfinite().tolist()
        return [name for name, is_finite in zip(self.norms, finite, strict=True) if not is_finite]

    def _update(self, parameter: Tensor) -> None:
        if not self.active:
            return
        assert parameter.grad is not None, "autograd calls this when there is a gradient"
        norm = self.norms[self.names[id(parameter)]] = torch.linalg.vector_norm(parameter.grad)
        part = self.parts[id(parameter)]
        if not self.looks and isinstance(part, Muon | torch.optim.AdamW):
            part.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[union-attr] - as in `Optimizer.step`
            part.step()
        elif torch.isfinite(norm):
            part.step()
        parameter.grad = None


@contextmanager
def freed_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Inside, a backward pass frees each gradient as soon as it is complete, and leaves its norm in the list."""
    norms: list[Tensor] = []

    def free(parameter: Tensor) -> None:
        assert parameter.grad is not None, "autograd calls this when there is a gradient"
        norms.append(torch.linalg.vector_norm(parameter.grad))
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(free) for parameter in parameters]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
