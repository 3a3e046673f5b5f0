"""What preference training optimises."""

from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from modern_llm.config.base import StrictModel

LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]
"""Preference losses; each has one pure function of the same name in `modern_llm/losses/preference.py`."""

LOSS_OPTIONS: dict[str, frozenset[str]] = {
    **dict.fromkeys(get_args(LossType), frozenset()),
    **dict.fromkeys(("sigmoid", "exo_pair", "robust"), frozenset({"label_smoothing"})),
    "discopop": frozenset({"discopop_tau"}),
}
"""Which options a loss honours besides `beta`; one that is set for a loss without it is refused when the config is built."""


class DPOConfig(StrictModel):
    """Direct preference optimisation (arXiv 2305.18290)."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference; scales the log-ratios."""
    loss_type: LossType = "sigmoid"
    """Which preference loss to use; [the table](dpo.md#the-loss) has the formula and the paper of each."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Probability that a preference label is wrong (conservative DPO; `robust`; `exo_pair`, where it must be above 0)."""
    discopop_tau: PositiveFloat | None = None
    """Temperature of `discopop`. None: 0.05, as in its paper."""
    max_length: PositiveInt = 512
    """Tokens of the prompt and one answer together. A longer prompt loses its beginning, a longer answer its end."""
    max_prompt_length: PositiveInt | None = None
    """Tokens of the prompt; its beginning is cut. None: bounded by `max_length` alone."""
    max_completion_length: PositiveInt | None = None
    """Tokens of an answer; its end is cut, and with it the end token. None: bounded by `max_length` alone."""
    reference_checkpoint: Path | str | None = None
    """Model whose log-probs are the reference. None: the starting checkpoint."""
    disable_dropout: bool = True
    """Switch dropout off in the policy too; the reference never drops out."""

    @field_validator("reference_checkpoint")
    @classmethod
    def _path_as_text(cls, value: Path | str | None) -> str | None:
        return None if value is None else str(value)  # as YAML and the record hold it

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        for option in ("label_smoothing", "discopop_tau"):
            if getattr(self, option) and option not in LOSS_OPTIONS[self.loss_type]:
                raise ValueError(f"{option} has no meaning for loss_type='{self.loss_type}': leave it out")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("loss_type='exo_pair' needs label_smoothing above 0, e.g. 0.001")
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2: one prompt token and one answer token")
        for name in ("max_prompt_length", "max_completion_length"):
            limit = getattr(self, name)
            if limit is not None and limit >= self.max_length:
                raise ValueError(f"{name}={limit} must be smaller than max_length={self.max_length}")
        return self

    def loss_arguments(self) -> dict[str, float]:
        """The arguments of the loss function."""
        values = {"label_smoothing": self.label_smoothing, "discopop_tau": self.discopop_tau or 0.05}
        return {"beta": self.beta, **{name: values[name] for name in LOSS_OPTIONS[self.loss_type]}}
