"""Parameter groups, optimizers and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config import TrainingConfig, UserError


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1; a pure function of the step.

    Linear from 1/warmup_steps at the first step to 1 at step `warmup_steps`, then the schedule, which reaches `min_lr_ratio` at
    step `max_steps`.
    """
    assert config.max_steps is not None, "the config must be resolved"
    assert config.warmup_steps is not None, "the config must be resolved"
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.lr_schedule == "constant" or config.max_steps == config.warmup_steps:
        return 1.0
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    shape = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class ParameterGroups:
    """Every trainable parameter in exactly one group, by name; a tied weight appears once, under its first name.

    Matrices decay, and Muon trains them; embeddings and the output projection neither decay nor go to Muon; vectors (norms,
    biases, sinks) never decay. Experts' 3-D weights decay, but go to AdamW.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        tables += [module for module in model.modules() if isinstance(module, nn.Embedding)]
        table_ids = {id(p) for table in tables if table is not None for p in table.parameters()}
        self.tables: dict[str, nn.Parameter] = {}
        self.vectors: dict[str, nn.Parameter] = {}
        self.matrices: dict[str, nn.Parameter] = {}
        self.stacks: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in table_ids:
                self.tables[name] = parameter
            elif parameter.ndim < 2 or "bias" in name.rsplit(".", 1)[-1]:
                self.vectors[name] = parameter
            elif parameter.ndim == 2:
                self.matrices[name] = parameter
            else:
                self.stacks[name] = parameter

    @property
    def all(self) -> dict[str, nn.Parameter]:
        return {**self.tables, **self.vectors, **self.matrices, **self.stacks}


class Optimizer:
    """One or two torch optimizers that step together, with state that saves by parameter name."""

    def __init__(self, model: PreTrainedModel, config: TrainingConfig, device: torch.device) -> None:
        self.groups = ParameterGroups(model)
        self.notes: list[str] = []
        decayed = {**self.groups.matrices, **self.groups.stacks}
        plain = {**self.groups.tables, **self.groups.vectors}
        self.parts: list[torch.optim.Optimizer] = []
        if config.optimizer == "muon":
            matrices = list(self.groups.matrices.values())
            decayed = self.groups.stacks
            if self.groups.stacks:
                self.notes.append(f"muon trains matrices only: {len(self.groups.stacks)} stacks of experts go to AdamW")
            if matrices:
                self.parts.append(
                    torch.optim.Muon(matrices, lr=config.muon_learning_rate or 0.0, weight_decay=config.weight_decay or 0.0)
                )
        groups = [
            {"params": list(decayed.values()), "weight_decay": config.weight_decay or 0.0},
            {"params": list(plain.values()), "weight_decay": 0.0},
        ]
        self.parts.append(_build(config, [group for group in groups if group["params"]], device))
        for part in self.parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]

    def set_learning_rate(self, factor: float) -> None:
        """Set every group to this share of its peak."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """{parameter name: {quantity: tensor or number}}; bitsandbytes' 8-bit states and maps are plain tensors here too."""
        names = self._names()
        return {names[id(p)]: dict(values) for part in self.parts for p, values in part.state.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave.

        `torch.optim.Optimizer.load_state_dict` is not used: it casts floating states to the parameter's type and pairs them
        by order; here the name decides and nothing is cast.
        """
        names = self._names()
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                saved = state.get(names[id(parameter)])
                if saved is not None:
                    part.state[parameter] = {key: _on(value, parameter.device) for key, value in saved.items()}

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.groups.all.items()}


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _build(config: TrainingConfig, groups: Iterable[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    learning_rate = config.learning_rate
    assert learning_rate is not None, "the config must be resolved"
    adam = {"lr": learning_rate, "betas": config.adam_betas, "eps": config.adam_epsilon}
    if config.optimizer in ("adamw", "muon"):
        return torch.optim.AdamW(groups, fused=True, **adam)  # type: ignore[arg-type]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=learning_rate)  # type: ignore[arg-type]
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    if config.optimizer == "adamw_8bit":
        return AdamW8bit(groups, **adam)
    if device.type == "cpu":
        # bitsandbytes 0.50 would quietly run the unpaged optimizer here
        raise UserError("optimizer='paged_adamw_8bit' needs a GPU: use adamw_8bit on a CPU")
    return PagedAdamW8bit(groups, **adam)
