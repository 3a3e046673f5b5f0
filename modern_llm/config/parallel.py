"""How several processes train together."""

from pydantic import Field

from modern_llm.config.base import StrictModel


class ParallelConfig(StrictModel):
    """How several processes (`torchrun`) train together. It cannot change a result."""

    timeout_minutes: float = Field(default=30.0, gt=0.0, le=10_080.0)
    """A process that gives no sign of life for so many minutes ends the run on all the others with an error. Preparing data,
    saving and measuring may take longer: whoever is at work there says so every few seconds. At most a week."""
