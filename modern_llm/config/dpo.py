"""What preference training optimises: the losses, which option each of them honours, and what is refused."""

from typing import Any, Literal, NamedTuple, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from modern_llm.config.base import StrictModel, did_you_mean
from modern_llm.config.paths import Name

LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "simpo",
    "orpo",
    "cpo",
    "sft",
]
"""Preference losses; each but `sft` has one pure function of the same name in `modern_llm/losses/preference.py`."""

DivergenceType = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
"""How the distance from the reference is measured."""

OTHER_NAMES = {"aot_pair": "aot_unpaired"}
"""Names that older TRL releases gave to a loss, and its name here and in TRL today."""

LOSSES = frozenset(get_args(LossType))
REFERENCE_LOSSES = LOSSES - {"simpo", "orpo", "cpo", "sft"}
"""Losses that compare with a reference."""
WHOLE_STEP_LOSSES = frozenset({"aot", "aot_unpaired", "bco_pair"})
"""Losses whose value for one pair depends on the other pairs of the optimizer step."""


class Option(NamedTuple):
    """A setting that only some losses honour."""

    losses: frozenset[str]
    """The losses that honour it."""
    reason: str
    """Why the others do not."""
    changes_pairs: bool = False
    """It changes what every loss of a mixture is given, so each must honour it, except `sft`, which compares no answers.
    Else it is a parameter, and one loss that honours it is enough."""


_NO_REFERENCE = "the loss has no reference"

OPTIONS: dict[str, Option] = {
    "beta": Option(LOSSES - {"orpo", "sft"}, "the strength of orpo is orpo_lambda"),
    "label_smoothing": Option(
        frozenset({"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"}), "the formula has no share of wrong labels"
    ),
    "discopop_tau": Option(frozenset({"discopop"}), "it is the temperature of discopop"),
    "simpo_gamma": Option(frozenset({"simpo"}), "it is the margin of simpo"),
    "orpo_lambda": Option(frozenset({"orpo"}), "it is the weight of the odds ratio in orpo"),
    "cpo_alpha": Option(frozenset({"cpo"}), "it is the weight of the sft term in cpo"),
    "bco_running_mean": Option(frozenset({"bco_pair"}), "it shifts the rewards of bco_pair"),
    "f_divergence_type": Option(
        frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}),
        "f-DPO is defined for losses of the difference of both answers' scores alone",
        changes_pairs=True,
    ),
    "use_weighting": Option(
        LOSSES - WHOLE_STEP_LOSSES - {"sft"},
        "a loss that looks at all pairs of a step together has no weight for one",
        changes_pairs=True,
    ),
    "ld_alpha": Option(
        LOSSES - {"sigmoid_norm", "ipo", "simpo", "orpo", "sft"},
        "the loss takes means over tokens already",
        changes_pairs=True,
    ),
    "reference_checkpoint": Option(REFERENCE_LOSSES, _NO_REFERENCE),
    "reference_free": Option(REFERENCE_LOSSES, _NO_REFERENCE),
    "sync_ref_model": Option(REFERENCE_LOSSES, _NO_REFERENCE),
}
"""Which losses honour an option; one that is set where it has no effect is refused when the config is built."""

LOSS_OPTIONS: dict[str, frozenset[str]] = {
    loss: frozenset(name for name, option in OPTIONS.items() if loss in option.losses) for loss in get_args(LossType)
}
"""The same table by loss: every loss, and the options that it honours."""

ARGUMENTS = ("beta", "label_smoothing", "discopop_tau", "simpo_gamma")
"""Options that are arguments of the pure functions, under the same names."""

VALUE_OF_NONE: dict[str, float] = {
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "orpo_lambda": 0.1,
    "cpo_alpha": 1.0,
    "f_alpha_divergence_coef": 0.5,
    "ref_model_sync_steps": 512,
    "ref_model_mixup_alpha": 0.6,
}
"""What None stands for where the option has an effect: the value of the paper, or TRL's."""

NEEDS: dict[str, tuple[str, Any]] = {
    "f_alpha_divergence_coef": ("f_divergence_type", "alpha_divergence"),
    "ref_model_sync_steps": ("sync_ref_model", True),
    "ref_model_mixup_alpha": ("sync_ref_model", True),
}
"""Options that only have an effect beside a certain value of another one."""

EXCLUDES: dict[tuple[str, str], str] = {
    ("reference_free", "reference_checkpoint"): "one has no reference, the other names it",
    ("reference_free", "sync_ref_model"): "one has no reference, the other moves it",
    ("reference_free", "f_divergence_type"): "without a reference there is no distance to measure",
    ("reference_checkpoint", "sync_ref_model"): "one fixes the reference, the other moves a copy of the start",
}
"""Options that contradict each other, and why."""


class DPOConfig(StrictModel):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference; scales the log-ratios (without a reference: the log-probs)."""
    loss_type: LossType | list[LossType] = "sigmoid"
    """A preference loss, or a list of losses that are added up; [the table](dpo.md#the-loss) has the formula and the paper
    of each."""
    loss_weights: list[NonNegativeFloat] | None = None
    """A weight for each loss of a list. None: 1 for each."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Probability that a preference label is wrong (conservative DPO; `robust`; `aot`, `aot_unpaired`; `exo_pair`, where it
    must be above 0)."""
    discopop_tau: PositiveFloat | None = None
    """Temperature of `discopop`. None: 0.05, as in its paper."""
    simpo_gamma: NonNegativeFloat | None = None
    """Margin that `simpo` asks for, in units of its reward. None: 0.5."""
    orpo_lambda: PositiveFloat | None = None
    """Weight of the odds ratio in `orpo`, beside the likelihood of the chosen answer. None: 0.1."""
    cpo_alpha: NonNegativeFloat | None = None
    """Weight of the likelihood of the chosen answer in `cpo`. None: 1."""
    bco_running_mean: bool = True
    """Shift the rewards of `bco_pair` by their running mean, as in its paper. False: no shift."""
    f_divergence_type: DivergenceType = "reverse_kl"
    """How the distance from the reference is measured (f-DPO, arXiv 2309.16240). All but `reverse_kl` need a loss on the
    difference of both answers."""
    f_alpha_divergence_coef: float | None = None
    """The `a` of `alpha_divergence`: 1 is the limit `reverse_kl`, 0 is `forward_kl`; 1 − a is the paper's α. None: 0.5."""
    use_weighting: bool = False
    """Weight each pair by how likely both answers are under the policy (WPO, arXiv 2406.11827)."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the tokens by which the longer answer exceeds the shorter one (LD-DPO, arXiv 2409.06411). None: 1, all tokens
    count the same."""
    max_length: PositiveInt = 512
    """Tokens of the prompt and one answer together. A longer prompt loses its beginning, a longer answer its end."""
    max_prompt_length: PositiveInt | None = None
    """Tokens of the prompt; its beginning is cut. None: bounded by `max_length` alone."""
    max_completion_length: PositiveInt | None = None
    """Tokens of an answer; its end is cut, and with it the end token. None: bounded by `max_length` alone."""
    reference_checkpoint: Name | None = None
    """Model whose log-probs are the reference. None: the starting checkpoint."""
    reference_free: bool = False
    """Count every log-prob of the reference as 0."""
    sync_ref_model: bool = False
    """Move the reference towards the policy from time to time (TR-DPO, arXiv 2404.09656)."""
    ref_model_sync_steps: PositiveInt | None = None
    """Optimizer steps between two moves of the reference, with `sync_ref_model`. None: 512."""
    ref_model_mixup_alpha: float | None = Field(default=None, gt=0, le=1)
    """Share of the policy in the moved reference: α·policy + (1 − α)·reference, with `sync_ref_model`. None: 0.6."""
    disable_dropout: bool = True
    """Switch dropout off in the policy too; the reference never drops out."""

    @model_validator(mode="before")
    @classmethod
    def _one_loss_is_a_name(cls, values: Any) -> Any:
        """`[ipo]` without weights is `ipo`: the command line gives a list where a file has a name, and both are one config."""
        if isinstance(values, dict) and values.get("loss_weights") is None:
            loss_type = values.get("loss_type")
            if isinstance(loss_type, list | tuple) and len(loss_type) == 1:
                return {**values, "loss_type": loss_type[0]}
        return values

    @field_validator("loss_type", mode="before")
    @classmethod
    def _known_losses(cls, value: Any) -> Any:
        # checked here, so that a misspelt name is one error and not one for each kind that the field may be of
        if not isinstance(value, str | list | tuple):
            raise ValueError(f"must be the name of a loss, or a list of names (got {value!r})")
        names = [OTHER_NAMES.get(str(name), str(name)) for name in ([value] if isinstance(value, str) else value)]
        for name in names:
            if name not in LOSSES:
                raise ValueError(f"unknown loss '{name}'{did_you_mean(name, LOSSES)}")
        return names[0] if isinstance(value, str) else names

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        if isinstance(self.loss_type, str):
            if self.loss_weights is not None:
                raise ValueError("loss_weights belongs to a list of losses: make loss_type a list, or leave it out")
        elif not self.loss_type:
            raise ValueError("loss_type is an empty list: name at least one loss, e.g. ['sigmoid']")
        elif len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(f"loss_type={self.loss_type} names a loss twice: name it once, with the sum of its weights")
        elif self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for the {len(self.loss_type)} losses of loss_type: "
                f"give one for each"
            )
        if not any(self.pair_weights().values()):
            raise ValueError(
                f"loss_type={self._names()} compares no answers: add a preference loss with a weight above 0, or use run_sft"
            )
        return self

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        names = [*self.losses()]
        for option, (losses, reason, changes_pairs) in OPTIONS.items():
            if not self._is_set(option):
                continue
            without = [name for name in names if name not in losses]
            if changes_pairs:
                without = [name for name in without if name != "sft"]
            elif len(without) < len(names):
                continue
            if without:
                raise ValueError(f"{option} has no meaning for loss_type={self._names(without)}: {reason}; leave it out")
        for option, (other, needed) in NEEDS.items():
            if self._is_set(option) and getattr(self, other) != needed:
                raise ValueError(f"{option} has no meaning without {other}={needed!r}: set that too, or leave it out")
        for (one, other), reason in EXCLUDES.items():
            if self._is_set(one) and self._is_set(other):
                raise ValueError(f"{one} and {other} exclude each other: {reason}; leave one of them out")
        if "exo_pair" in names and not self.label_smoothing:
            raise ValueError("loss_type='exo_pair' needs label_smoothing above 0, e.g. 0.001")
        if self.whole_step and not self.disable_dropout:
            raise ValueError(
                f"disable_dropout=False has no meaning for loss_type={self._names()}: the policy runs twice over a step, and "
                "both runs must agree; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2: one prompt token and one answer token")
        for name in ("max_prompt_length", "max_completion_length"):
            limit = getattr(self, name)
            if limit is not None and limit >= self.max_length:
                raise ValueError(f"{name}={limit} must be smaller than max_length={self.max_length}")
        return self

    def _is_set(self, option: str) -> bool:
        return getattr(self, option) != type(self).model_fields[option].default

    def _names(self, names: list[str] | None = None) -> str:
        """Losses as a user writes them: `'ipo'` or `['ipo', 'sft']`; None: those of the config."""
        names = [*self.losses()] if names is None else names
        return repr(names[0] if len(names) == 1 else names)

    def losses(self) -> dict[str, float]:
        """Every loss with the weight that the user gave it, in the user's order."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        return dict(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    def pair_weights(self) -> dict[str, float]:
        """Every loss that compares the answers of a pair, with the factor of its mean over pairs in the whole loss."""
        factors = {"orpo": self.filled("orpo_lambda")}
        return {name: weight * factors.get(name, 1.0) for name, weight in self.losses().items() if name != "sft"}

    def sft_weight(self) -> float:
        """Factor of the chosen answers' negative log-likelihood per token: `sft` itself, and its share in `orpo` and `cpo`."""
        factors = {"sft": 1.0, "orpo": 1.0, "cpo": self.filled("cpo_alpha")}
        return sum(weight * factors.get(name, 0.0) for name, weight in self.losses().items())

    def loss_arguments(self, name: str) -> dict[str, float]:
        """The arguments of a loss function; `bco_pair` takes `delta` too, which no config knows."""
        return {argument: self.filled(argument) for argument in ARGUMENTS if argument in LOSS_OPTIONS[name]}

    def filled(self, option: str) -> float:
        """The number that an option stands for, also where it is None."""
        value = getattr(self, option)
        return VALUE_OF_NONE[option] if value is None else value

    @property
    def needs_reference(self) -> bool:
        """Whether any loss compares with the log-probs of a reference."""
        return not self.reference_free and not REFERENCE_LOSSES.isdisjoint(self.losses())

    @property
    def whole_step(self) -> bool:
        """Whether any loss must see all pairs of an optimizer step before it can say anything of one."""
        names = WHOLE_STEP_LOSSES if self.bco_running_mean else WHOLE_STEP_LOSSES - {"bco_pair"}
        return not names.isdisjoint(self.losses())
