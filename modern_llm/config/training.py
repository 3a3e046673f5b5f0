"""How a stage is trained: batches, optimizer, schedule, precision, where things are written."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from modern_llm.config.adapter import AdapterConfig
from modern_llm.config.base import StrictModel
from modern_llm.config.memory import DatasetName
from modern_llm.config.parallel import ParallelConfig
from modern_llm.config.paths import FolderPath, Name

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run may be called: the name is part of the names of folders."""

Stage = Literal["pretrain", "sft", "dpo"]
"""The three stages."""

Tracker = Literal["tensorboard", "wandb"]
"""Where metrics can go besides `metrics.jsonl` and the console."""

ParameterGroup = Literal["embeddings", "head", "vectors", "matrices", "experts"]
"""What a learning rate of its own can be given to: embedding tables (with the output projection where it is tied to them); an
untied output projection; norms, biases and sinks; the layers' matrices; stacks of experts' matrices."""


NO_EFFECT = (
    "run_name",
    "output_dir",
    "report_to",
    "log_every",
    "eval_every",
    "eval_at_start",
    "answer_prompts",
    "report_answers",
    "save_every",
    "keep_checkpoints",
    "max_minutes",
    "on_save_error",
    "micro_batch_size",
    "micro_batch_tokens",
    "gradient_accumulation_steps",
    "parallel",
)
"""Fields that cannot change a result: where a run is written, how it reports, when it saves, evaluates or stops, how a step's
work is shared out. (Two of them decide `batch_size` where that is left out: `resolve` comes before a comparison.)"""


def no_effect(train: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that cannot change the result of a run with these settings: when it evaluates may decide where it ends."""
    decides = ("eval_every", "eval_at_start") if train.get("keep_best") or train.get("early_stopping") else ()
    return tuple(name for name in NO_EFFECT if name not in decides)


METRICS: dict[Stage, tuple[str, ...]] = {
    "pretrain": ("loss", "accuracy"),
    "sft": ("loss", "accuracy"),
    "dpo": ("loss", "rewards/accuracies", "rewards/margins"),
}
"""Those that an evaluation of each stage has."""
Metric = Literal["loss", "accuracy", "rewards/accuracies", "rewards/margins"]
"""Metrics of an evaluation by which one can be called the best."""
HIGHER_IS_BETTER = ("accuracy", "rewards/accuracies", "rewards/margins")
"""Those of them that a better model has more of."""

EPOCHS = r"^\s*(\d+(?:\.\d+)?|\.\d+)\s*epochs?\s*$"
"""A cadence in passes over the data."""


def _as_cadence(value: Any) -> Any:
    """`1 epoch` and `0.5 epochs` as they are, a number of steps as an int."""
    if isinstance(value, str) and not value.strip().isdigit():
        found = re.match(EPOCHS, value)
        if found is None or float(found[1]) <= 0:
            raise ValueError(f"must be a number of optimizer steps, or of epochs such as '0.5 epochs' (got {value!r})")
        return f"{float(found[1]):g} epoch{'' if float(found[1]) == 1 else 's'}"
    return value


Cadence = Annotated[PositiveInt | Annotated[str, Field(pattern=EPOCHS)], BeforeValidator(_as_cadence)]
"""Optimizer steps, or passes over the data as text."""


Z_LOSS_OF_PAIRS = "z_loss belongs to pretraining and SFT: leave it out"
"""Why preference training refuses it: it would have no effect there."""


class TrainingConfig(StrictModel):
    """Settings shared by the three stages. A field that is None gets the stage's default from `resolve`."""

    run_name: str | None = Field(default=None, pattern=RUN_NAME, max_length=200)
    """Name of the run; the final checkpoint is `<output_dir>/<run_name>_final`. None: the stage's name."""
    dataset_name: DatasetName | None = None
    """The data set, where no data set config is given."""
    tokenizer_name: Name | None = None
    """Tokenizer: a folder or a hub id. None: the starting checkpoint's own; in pretraining, one trained on the run's text."""
    output_dir: FolderPath | None = None
    """Folder of the run. None: `experiments/runs/<run_name>`."""

    batch_size: PositiveInt | None = None
    """Sequences (pretraining: blocks; DPO: pairs) of one optimizer step, over all ranks, whose number need not divide it. None:
    `micro_batch_size × gradient_accumulation_steps` where both are given, else the stage's."""
    micro_batch_size: PositiveInt | None = None
    """Most sequences (or pairs) of one forward pass on one rank. It never changes the result, only memory and speed."""
    micro_batch_tokens: PositiveInt | None = None
    """Instead of `micro_batch_size`: as many sequences (or pairs) to a forward pass as fit into so many tokens, best fit first;
    a longer one is alone. It never changes the result either, and keeps memory even where lengths differ."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forward passes of one optimizer step on one rank: `batch_size / (micro_batch_size × ranks)`, rounded up. Checked; derived
    when left out, and fewer where there are more ranks than it was written for."""
    max_steps: PositiveInt | None = None
    """Optimizer steps. None: `num_epochs` decides."""
    num_epochs: PositiveFloat | None = None
    """Passes over the data. None: 1, where `max_steps` is not given."""

    adapter: AdapterConfig | None = None
    """Train low-rank adapters and leave the weights as they are (LoRA, DoRA, QLoRA); not in pretraining. None: train all."""
    optimizer: Literal["adamw", "rmsprop", "muon", "adamw_8bit", "paged_adamw_8bit"] | None = None
    """`adamw`; `rmsprop` (the DPO paper's); `muon` for the layers' matrices with AdamW for the rest; `adamw_8bit` and
    `paged_adamw_8bit` (bitsandbytes; the paged one needs a GPU)."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate (of the AdamW part, with `muon`)."""
    muon_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the matrices that Muon trains. None: 0.02."""
    learning_rates: dict[ParameterGroup, PositiveFloat] = Field(default={}, examples=[{"embeddings": 3e-3}])
    """Peak learning rates in place of `learning_rate` for groups of parameters: `embeddings` (with a tied output projection),
    `head` (an untied one), `vectors` (norms, biases, filters), `matrices` (with `muon`: `muon_learning_rate`), `experts`."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay of matrices; norms, biases and embeddings have none. `rmsprop` adds it to the gradient instead."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global Euclidean norm. None: they stay as they are."""
    optimizer_in_backward: bool = False
    """Update each parameter as soon as its gradient is there, and free the gradient: saves the memory of all gradients. Needs
    `max_grad_norm: null`, one micro-batch a step and one process. A gradient that is not finite leaves its parameter alone."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Keep an exponential moving average of the weights, in fp32: after each step, average ← decay · average + (1 − decay) ·
    weights. Evaluations and the final checkpoint use it. None: no average."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of (log Σ exp logits)², added to the loss of pretraining and SFT to keep logits from drifting: 1e-4 in PaLM
    (arXiv 2204.02311). The logged loss leaves it out; `z_loss` beside it is what it adds."""
    balance_loss: NonNegativeFloat = 0.0
    """Weight of the loss that spreads the tokens of each example evenly over the experts of a layer (mixture-of-experts models:
    `qwen3_moe`, `gpt_oss`, and checkpoints of `mixtral`, `olmoe` and `qwen2_moe`). 0: none."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] | None = None
    """Shape of the learning rate after warmup. `wsd` (warmup, stable, decay): constant, and over the last `decay_ratio` of the
    steps down by 1 − √."""
    decay_ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    """Share of all steps in which `wsd` decays. None: 0.2."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps of linear warmup; the peak is reached at its last. None: a tenth of all steps, at most the stage's."""
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate of the last step as a share of the peak (not with `constant`)."""

    seed: NonNegativeInt = 0
    """Seed of initial weights, data order and dropout."""
    mixed_precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of matrix products. `auto`: bf16 where the hardware has it, else fp32; the log says which. Weights,
    log-probs, losses and gradient sums are fp32 always."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Kernel of the attention over packed rows. `sdpa`: fused, refused where a model has attention sinks or soft caps; `eager`:
    plain matrix products and a softmax in fp32. `auto`: on a CPU products with a backward pass of their own up to 1,024 tokens
    and the fused kernel above, on a GPU in bf16 the kernel for lengths, and plain products where only they can do; a model
    that cannot run on packed rows runs padded. With the other two such a model is refused."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the decoder layers go through `torch.compile`. `auto`: in pretraining and SFT, where the run is long enough to
    earn back the minute that it takes, and nothing speaks against it (experts, 4-bit weights, gradient checkpointing, no
    compiler); the log says what was decided and why. `on` is refused where it cannot be."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpointed_share: float | None = Field(default=None, gt=0.0, le=1.0)
    """Share of the decoder layers that `gradient_checkpointing` recomputes, evenly spread. None: all."""

    eval_every: Cadence | None = None
    """Optimizer steps between evaluations, where data is held out; or passes over the data: `0.5 epochs`. None: only at the
    end."""
    eval_at_start: bool = False
    """Evaluate before the first step too."""
    keep_best: Metric | None = None
    """Metric of the evaluations by which the final checkpoint is chosen: it has the weights of the best one (lowest `loss`,
    highest of the others), in place of the last step's. Needs `eval_every`."""
    early_stopping: PositiveInt | None = None
    """Stop after so many evaluations in a row without a gain in `keep_best`'s metric, or in the loss where that is left out.
    None: the run goes to its end."""
    answer_prompts: NonNegativeInt = 0
    """Held-out prompts that the model answers at every evaluation, always the same ones, into `answers.jsonl`."""
    report_answers: bool = False
    """Show these answers in the trackers of `report_to` too; without it they get numbers alone."""
    save_every: Cadence | None = None
    """Optimizer steps between checkpoints that a stopped run resumes from, or passes over the data, as `1 epoch`. None: 500
    steps."""
    log_every: Cadence = 10
    """Optimizer steps between log lines, or passes over the data; a line's values are averaged over the steps since the line
    before."""
    keep_checkpoints: PositiveInt | None = None
    """Keep only so many of the newest periodic checkpoints. None: all."""
    max_minutes: PositiveFloat | None = None
    """Stop after so many minutes from the stage's beginning: the step is finished, a checkpoint saved, and the exit code is 75.
    The same command goes on from there. None: no limit."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """A periodic checkpoint (or a line of `metrics.jsonl`) that cannot be written, as on a full disk: `stop` ends the run, with
    exit code 74; `warn` says so loudly and goes on. A final checkpoint that cannot be written is always an error."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers besides `metrics.jsonl` and the console, as a list or as `wandb,tensorboard`; need `pip install -e
    '.[trackers]'` in the repository's folder."""
    parallel: ParallelConfig = ParallelConfig()
    """How several processes train together."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers_as_text(cls, value: Any) -> Any:
        """`wandb`, `wandb,tensorboard` or `none`, as other trainers take it."""
        names = value.split(",") if isinstance(value, str) else value
        return tuple(name for name in names if name != "none") if isinstance(names, list | tuple) else names

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError(
                f"max_steps={self.max_steps} and num_epochs={self.num_epochs} both set the length: give one, and set the other "
                f"to null (num_epochs: null)"
            )
        if self.max_steps is not None and self.warmup_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} exceeds max_steps={self.max_steps}")
        if self.micro_batch_tokens is not None and (self.micro_batch_size or self.gradient_accumulation_steps):
            raise ValueError(
                "micro_batch_tokens decides the micro-batches: leave micro_batch_size and gradient_accumulation_steps out"
            )
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"adam_betas={self.adam_betas} must lie in [0, 1)")
        if self.batch_size and self.micro_batch_size and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is more than batch_size={self.batch_size}: lower it, or raise "
                f"batch_size"
            )
        self._check_schedule_and_optimizer()
        self._check_memory_options()
        self._check_evaluations()
        return self

    def _check_schedule_and_optimizer(self) -> None:
        if self.muon_learning_rate is not None and self.optimizer not in (None, "muon"):
            raise ValueError(f"muon_learning_rate has no meaning for optimizer='{self.optimizer}': leave it out")
        if self.optimizer == "muon" and "matrices" in self.learning_rates:
            raise ValueError("learning_rates: Muon trains the matrices: give muon_learning_rate in place of 'matrices'")
        if self.decay_ratio is not None and self.lr_schedule not in (None, "wsd"):
            raise ValueError(
                f"decay_ratio={self.decay_ratio} has no meaning for lr_schedule='{self.lr_schedule}': leave it out"
            )

    def _check_evaluations(self) -> None:
        for name in ("keep_best", "early_stopping"):
            if getattr(self, name) is not None and self.eval_every is None:
                raise ValueError(f"{name} chooses between the evaluations of a run: set eval_every")
        if self.report_answers and not (self.report_to and self.answer_prompts):
            raise ValueError("report_answers shows the answers of answer_prompts in the trackers of report_to: set both")

    def _check_memory_options(self) -> None:
        if self.checkpointed_share is not None and not self.gradient_checkpointing:
            raise ValueError(
                f"checkpointed_share={self.checkpointed_share} says how many layers gradient_checkpointing recomputes: set "
                f"gradient_checkpointing: true, or leave it out"
            )
        if not self.optimizer_in_backward:
            return
        if self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} needs all gradients at once, which optimizer_in_backward never has: set "
                f"max_grad_norm: null"
            )
        if self.micro_batch_tokens is not None:
            raise ValueError(
                "micro_batch_tokens may give several micro-batches a step, and optimizer_in_backward needs one: give "
                "micro_batch_size"
            )
        if (self.gradient_accumulation_steps or 1) > 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} keeps gradients from one micro-batch to the "
                f"next, and optimizer_in_backward frees them: set it to 1"
            )
