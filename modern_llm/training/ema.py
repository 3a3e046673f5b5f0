"""An exponential moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """average ← decay · average + (1 − decay) · weights, in fp32, from the weights at the start on.

    It covers the given parameters alone; what does not train is its own average.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """
        Args:
            parameters: trainable, in fp32, by name, a tied one once.
            decay: between 0 and 1; the average looks back over about 1 / (1 − decay) steps.
        """
        assert all(p.dtype in (torch.float32, torch.float64) for p in parameters.values()), "weights that train are fp32"
        self.parameters = dict(parameters)
        self._move = get_ema_multi_avg_fn(decay)  # a few calls for all tensors together
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """An optimizer step is done."""
        self._move(list(self.averages.values()), list(self.parameters.values()), None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, to the last bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Values change places, one tensor at a time; the parameters stay where they are, for compiled code."""
        for name, parameter in self.parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(weights)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of it."""
        return self.averages

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state` was taken."""
        assert state.keys() == self.averages.keys(), "the average is of the same parameters"
        for name, average in self.averages.items():
            average.copy_(state[name])
