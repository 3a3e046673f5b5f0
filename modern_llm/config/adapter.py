"""Training a small addition to weights that stay as they are."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from modern_llm.config.base import StrictModel


class AdapterConfig(StrictModel):
    """Low-rank adapters: every chosen weight W (out × in) becomes W + (alpha / rank) · B A, and only A and B are trained."""

    kind: Literal["lora", "dora"] = "lora"
    """`lora` (arXiv 2106.09685): the sum above. `dora` (arXiv 2402.09353): the rows of the sum are scaled to a length that is
    trained too."""
    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """Strength: the product B A counts alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the inputs of A that is dropped in training; the frozen weights see all of them."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which layers get an adapter. `all-linear`: every linear layer but the output projection; the log names those on which
    an adapter could not learn. Or the ends of names, such as `[q_proj, v_proj]`; a name for such layers alone is refused."""
    quantize: Literal["nf4"] | None = None
    """`nf4` (QLoRA, arXiv 2305.14314): the frozen linear layers are kept in 4 bits, their scales in 8. None: in full."""

    continue_training: bool = False
    """Go on with the adapters that the initial checkpoint is, in place of new ones on them: rank, alpha, kind and layers are
    theirs. In preference training their own beginning is the reference."""

    @model_validator(mode="after")
    def _nothing_that_the_folder_decides(self) -> Self:
        given = self.model_fields_set & {"kind", "rank", "alpha", "target_modules"}
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        if self.continue_training and (wrong := [name for name in sorted(given) if getattr(self, name) != defaults[name]]):
            raise ValueError(f"{', '.join(wrong)}: the adapters that continue_training goes on with decide this: leave it out")
        return self

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_as_tuple(cls, value: Any) -> Any:
        """The command line gives `q_proj,v_proj` where a file has a list."""
        names = value.split(",") if isinstance(value, str) and value != "all-linear" else value
        if isinstance(names, list | tuple) and not all(isinstance(name, str) and name for name in names or [""]):
            raise ValueError(f"must be all-linear, or the ends of layers' names such as [q_proj, v_proj] (got {value!r})")
        return tuple(sorted(set(names))) if isinstance(names, list | tuple) else names
