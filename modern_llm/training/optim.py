"""Parameter groups, optimizers and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config import TrainingConfig, UserError
from modern_llm.config.resolve import decay_steps
from modern_llm.config.training import ParameterGroup
from modern_llm.models.weight_kinds import weight_kind
from modern_llm.training.in_backward import BackwardUpdates
from modern_llm.training.muon import Muon


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at optimizer step `step`, counted from 1; a pure function of the step.

    Linear from 1/warmup_steps at the first step to 1 at step `warmup_steps`, then the schedule, which reaches `min_lr_ratio` at
    step `max_steps` (`constant` stays at 1). `wsd` falls by 1 − √(share of the decay that is done), which ends at a lower loss
    than a linear fall (arXiv 2405.18392, section 3 and appendix).
    """
    assert config.max_steps is not None, "the config must be resolved"
    assert config.warmup_steps is not None, "the config must be resolved"
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.lr_schedule == "constant" or config.max_steps == config.warmup_steps:
        return 1.0
    if config.lr_schedule == "wsd":
        assert config.decay_ratio is not None, "the config must be resolved"
        decaying = decay_steps(config.max_steps, config.decay_ratio)
        shape = 1 - math.sqrt(max(0, step - (config.max_steps - decaying)) / decaying)
    else:
        progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
        shape = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class ParameterGroups:
    """Every trainable parameter in exactly one group, by name; a tied weight appears once, under its first name.

    Matrices and experts decay, and Muon trains matrices; embeddings, an untied output projection and vectors do not decay and
    never go to Muon. Stacks of experts go to AdamW. What a tied output projection has of its own (a bias) is a vector.
    What is a matrix is decided in `models.weight_kinds`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        tables = [model.get_input_embeddings(), *(m for m in model.modules() if isinstance(m, nn.Embedding))]
        table_ids = {id(p) for table in tables if table is not None for p in table.parameters()}
        head = model.get_output_embeddings()
        head_ids = set() if head is None else {id(p) for p in head.parameters()}
        self.tied = bool(head_ids & table_ids)
        """Whether the output projection is an embedding table."""
        self.named: dict[ParameterGroup, dict[str, nn.Parameter]] = {name: {} for name in get_args(ParameterGroup)}
        """Group → parameter's name → parameter; a group may be empty."""
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in table_ids:
                group: ParameterGroup = "embeddings"
            elif id(parameter) in head_ids and not self.tied:
                group = "head"
            else:
                group = weight_kind(model, name)
            self.named[group][name] = parameter

    @property
    def all(self) -> dict[str, nn.Parameter]:
        return {name: parameter for group in self.named.values() for name, parameter in group.items()}

    def check(self, config: TrainingConfig) -> None:
        """Refuse a learning rate for a group that is empty.

        Raises:
            UserError: with the group's name.
        """
        for group in config.learning_rates:
            if self.named[group]:
                continue
            if group == "head" and self.tied:
                raise UserError("learning_rates: the 'head' of this model is tied to its embeddings: set 'embeddings'")
            has = ", ".join(name for name, parameters in self.named.items() if parameters)
            raise UserError(f"learning_rates: this model trains no '{group}' (it has {has}): leave it out")


class Optimizer:
    """Torch optimizers that step together, with state that saves by parameter name.

    There are one or two of them; with `optimizer_in_backward` each parameter has its own.
    """

    def __init__(self, model: PreTrainedModel, config: TrainingConfig, device: torch.device) -> None:
        self.groups = ParameterGroups(model)
        self.groups.check(config)
        self.max_grad_norm, self.device = config.max_grad_norm, device
        self.notes: list[str] = []
        if config.optimizer == "muon" and (experts := self.groups.named["experts"]):
            self.notes.append(f"muon trains matrices only: {len(experts)} stacks of experts go to AdamW")
        self.own_rates: dict[ParameterGroup, float] = {}
        """Group → peak learning rate, of the groups whose rate is not `learning_rate`."""
        muon, others = [], []
        for name, parameters in self.groups.named.items():
            if parameters:
                by_muon = config.optimizer == "muon" and name == "matrices"
                group = _torch_group(name, parameters, config, by_muon)
                (muon if by_muon else others).append(group)
                if group["lr"] != config.learning_rate:
                    self.own_rates[name] = group["lr"]
        if config.optimizer_in_backward:
            muon, others = _apart(muon), _apart(others)
        self.parts: list[torch.optim.Optimizer] = [Muon([group]) for group in muon]
        together = [[group] for group in others] if config.optimizer_in_backward else [others]
        self.parts += [_build(config, groups, device) for groups in together if groups]
        for part in self.parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]
        self.updates = BackwardUpdates(self.groups.all, self.parts) if config.optimizer_in_backward else None
        """What steps during the backward pass; None: `step` does."""

    def begin_step(self, factor: float) -> None:
        """Forget old gradients, and set every group to this share of its peak learning rate."""
        self.zero_grad()
        self.set_learning_rate(factor)
        if self.updates is not None:
            self.updates.begin()

    def set_learning_rate(self, factor: float) -> None:
        """Set every group to this share of its peak."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def clip_gradients(self) -> Tensor:
        """Scale gradients down to `max_grad_norm`, if there is one; returns their global norm before that."""
        parameters = list(self.groups.all.values())
        if self.updates is not None:
            norm = self.updates.finish()
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            # a factor of 1 would cost a pass over all gradients; a GPU would have to be asked first
            is_small = self.max_grad_norm is None or (norm.device.type == "cpu" and bool(norm <= self.max_grad_norm))
            if self.max_grad_norm is not None and not is_small:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return norm.to(self.device)  # of no gradients at all it is on the host

    def left_alone(self) -> list[str] | None:
        """Parameters that this step's backward pass did not update, their gradient not being finite; None where `step` does."""
        return None if self.updates is None else self.updates.left

    @property
    def skips_on_device(self) -> bool:
        """Whether `step` can leave everything as it is by a number that only the device knows."""
        return self.updates is None and all(isinstance(part, Muon | torch.optim.AdamW) for part in self.parts)

    def step(self, is_finite: Tensor | None = None) -> None:
        """Update the weights, unless the backward pass has done so.

        Args:
            is_finite: scalar bool on the device; where it is False nothing changes. None: it is known to be True.
        """
        if self.updates is not None:
            return
        for part in self.parts:
            if is_finite is not None:  # torch's fused kernels read this attribute (2.11 to 2.13), as Muon here does
                part.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Free the state; no step may follow."""
        for part in self.parts:
            part.state.clear()

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


def _torch_group(
    name: ParameterGroup, parameters: dict[str, nn.Parameter], config: TrainingConfig, by_muon: bool
) -> dict[str, Any]:
    rate = config.muon_learning_rate if by_muon else config.learning_rates.get(name, config.learning_rate)
    assert rate is not None, "the config must be resolved"
    decay = (config.weight_decay or 0.0) if name in ("matrices", "experts") else 0.0
    return {"params": list(parameters.values()), "lr": rate, "weight_decay": decay}


def _apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A group for each parameter."""
    return [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]


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
