"""A model's linear layers with the products of `modern_llm.products`."""

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modern_llm import products


class Linear(nn.Linear):
    """`nn.Linear`, whose fp32 products on a CPU go to the faster library."""

    def forward(self, input: Tensor) -> Tensor:
        return products.linear(input, self.weight, self.bias)


class TransposedLinear(Conv1D):
    """The same for GPT-2's layer, whose weight is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(x, self.weight.T, self.bias)


def use_faster_products(model: PreTrainedModel) -> None:
    """Turn a model's linear layers into these, where that changes anything; their parameters and hooks stay as they are."""
    if not products.onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is Conv1D:
            module.__class__ = TransposedLinear
