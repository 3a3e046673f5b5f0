"""Adapters on adapters as one adapter on the model under all of them, which peft and transformers load as any other.

With s = alpha / rank, W + s₁ B₁A₁ + s₂ B₂A₂ = W + s₂ (s₁/s₂ B₁, B₂) (A₁; A₂): for plain LoRA the sum is exact, and ranks add.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modern_llm.models.token_rows import IN_FILES

INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways in which peft (0.21) begins a LoRA that leave the model under it as it is; PiSSA, OLoRA, LoftQ and others do not."""
PREFIX = "base_model.model."
"""What peft puts before the names of layers in its files."""


@dataclass
class AdaptersBelow:
    """Adapters that were merged into the model which a run puts its own on; they are saved together with these."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer → A (rank, in) and B (out, rank), the scale in B."""
    obstacle: str | None = None
    """Why they have no such factors."""
    root_weights: str = ""
    """Hash of the model under all of them."""
    quantize: str | None = None
    """How that was rounded when the first of them was trained."""
    parameters: set[str] = field(default_factory=set)
    """Weights of layers that peft reaches as parameters alone."""
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """Table → token → row (hidden,) that trained with them."""

    def add(self, wrapped: Any, quantize: str | None) -> None:
        """Take the factors of the adapters in a peft model, before they are merged.

        Args:
            wrapped: `PeftModel` with one adapter.
            quantize: how the model under it was rounded.
        """
        if quantize is not None and (self.factors or self.obstacle):
            self.obstacle = f"one of them was trained on others that were rounded ({quantize})"
            return
        self.quantize = self.quantize or quantize
        (name,) = wrapped.peft_config
        self.obstacle = self.obstacle or _obstacle(wrapped, name)
        if self.obstacle:
            return
        for layer, module in wrapped.base_model.model.named_modules():
            if hasattr(module, "token_adapter") and module.token_adapter.tied_adapter is None:
                tokens, rows = module.token_adapter.token_indices[name], module.token_adapter.trainable_tokens_delta[name]
                self.rows.setdefault(layer, {}).update(zip(tokens, rows.detach().float().clone(), strict=True))
            if hasattr(module, "lora_A") and name in module.lora_A:
                if hasattr(module, "parameter_name"):
                    self.parameters.add(f"{layer}.{module.parameter_name}")
                a = module.lora_A[name].weight.detach().float().clone()
                b = module.lora_B[name].weight.detach().float() * module.scaling[name]
                if layer in self.factors:
                    first_a, first_b = self.factors[layer]
                    a, b = torch.cat([first_a, a]), torch.cat([first_b, b], dim=1)
                self.factors[layer] = (a, b)

    @property
    def rank(self) -> int:
        """Rows of the longest A."""
        return max((len(a) for a, _ in self.factors.values()), default=0)

    def with_own_rows(
        self, own: dict[str, Tensor], tokens: dict[str, tuple[int, ...]]
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """Return what a run saves, with the rows of those below, and the tokens of all rows; its own are last and win.

        Args:
            own: under their names in peft's files.
            tokens: of the run's own rows, by table.
        """
        own, tokens = dict(own), dict(tokens)
        for table, rows in self.rows.items():
            name, mine = f"{PREFIX}{table}{IN_FILES}", tokens.get(table, ())
            others = [token for token in rows if token not in mine]
            parts = [rows[token][None] for token in others] + ([own[name].cpu()] if mine else [])
            own[name], tokens[table] = torch.cat(parts), (*others, *mine)
        return own, tokens

    def with_own(self, own: dict[str, Tensor], scale: float) -> tuple[dict[str, Tensor], list[str], int]:
        """The sum with a run's own adapters, these last and as they are, so that a resumed run finds their very bits.

        Args:
            own: A and B of each layer, and rows of tokens, under their names in peft's files.
            scale: alpha / rank of these.

        Returns:
            A and B of the sum, its layers, and its rank.
        """
        rows = {name: tensor for name, tensor in own.items() if name.endswith(IN_FILES)}
        own = {name: tensor for name, tensor in own.items() if name not in rows}
        own_rank = max(len(tensor) for name, tensor in own.items() if name.endswith(".lora_A.weight"))
        names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in own} | self.factors.keys()
        found = {}
        for layer in sorted(names):
            a_name, b_name = (f"{PREFIX}{layer}.lora_{factor}.weight" for factor in "AB")
            a, b = self.factors.get(layer, (None, None))
            mine = own.get(a_name), own.get(b_name)
            some_a, some_b = (a, b) if a is not None and b is not None else mine
            assert some_a is not None
            assert some_b is not None
            found[a_name] = some_a.new_zeros(self.rank + own_rank, some_a.shape[1], dtype=torch.float32)
            found[b_name] = some_b.new_zeros(some_b.shape[0], self.rank + own_rank, dtype=torch.float32)
            if a is not None and b is not None:
                found[a_name][: len(a)], found[b_name][:, : b.shape[1]] = a, b / scale
            if mine[0] is not None and mine[1] is not None:
                found[a_name][-own_rank:], found[b_name][:, -own_rank:] = mine[0].cpu(), mine[1].cpu()
        return found | rows, sorted(names), self.rank + own_rank


def own_part(saved: Tensor, own: Tensor) -> Tensor:
    """A run's own A or B out of a saved sum: the last rows of A, the last columns of B."""
    return saved[-own.shape[0] :, -own.shape[1] :]


def _obstacle(wrapped: Any, name: str) -> str | None:
    """Why a peft model's adapter is no plain LoRA."""
    config = wrapped.peft_config[name]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return f"one of them is {getattr(config.peft_type, 'value', config.peft_type)}, no LoRA"
    if config.init_lora_weights not in INITS:
        return f"one of them changes the weights under it (init_lora_weights={config.init_lora_weights!r})"
    for module_name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "modules_to_save"):
            return f"one of them has weights of its own for {module_name} (modules_to_save)"
        if not hasattr(module, "lora_A"):
            continue
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None:
            return f"one of them is a {'DoRA' if config.use_dora else type(variant).__name__}, whose change is no product B A"
        is_layer = isinstance(module.get_base_layer(), nn.Linear | Conv1D)
        if not is_layer or module.lora_bias.get(name) or getattr(module, "parameter_name", "weight") != "weight":
            return f"one of them is on {module_name}, which is no linear layer, or has a bias"
    return None if config.bias == "none" else f"one of them trains biases (bias={config.bias!r})"
