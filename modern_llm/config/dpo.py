"""What preference training optimises."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from modern_llm.config.base import StrictModel

LossType = Literal["sigmoid"]
"""Preference losses; each has one pure function of the same name in `modern_llm/losses/preference.py`."""

LOSS_OPTIONS: dict[str, frozenset[str]] = {"sigmoid": frozenset({"label_smoothing"})}
"""Which options a loss honours; an option set for a loss that is not listed with it is refused when the config is built."""


class DPOConfig(StrictModel):
    """Direct preference optimisation (arXiv 2305.18290)."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference; scales the log-ratios."""
    loss_type: LossType = "sigmoid"
    """Which preference loss to use."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Probability that a preference label is wrong (conservative DPO)."""
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
        if self.label_smoothing and "label_smoothing" not in LOSS_OPTIONS[self.loss_type]:
            raise ValueError(f"label_smoothing has no meaning for loss_type='{self.loss_type}'")
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2: one prompt token and one answer token")
        for name in ("max_prompt_length", "max_completion_length"):
            limit = getattr(self, name)
            if limit is not None and limit >= self.max_length:
                raise ValueError(f"{name}={limit} must be smaller than max_length={self.max_length}")
        return self
