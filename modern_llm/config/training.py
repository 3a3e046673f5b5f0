"""How a stage is trained: batches, optimizer, schedule, precision, where things are written."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from modern_llm.config.base import StrictModel

Stage = Literal["pretrain", "sft", "dpo"]
"""The three stages."""

Tracker = Literal["tensorboard", "wandb"]
"""Where metrics can go besides `metrics.jsonl` and the console."""


class TrainingConfig(StrictModel):
    """Settings shared by the three stages. A field that is None gets the stage's default from `resolve`."""

    run_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; the final checkpoint is `<output_dir>/<run_name>_final`. None: the stage's name."""
    dataset_name: str | None = None
    """The data set, where no data set config is given."""
    tokenizer_name: str | None = None
    """Tokenizer: a folder or a hub id. None: the starting checkpoint's own; in pretraining, one trained on the run's text."""
    output_dir: Path | None = None
    """Folder of the run. None: `experiments/runs/<run_name>`."""

    batch_size: PositiveInt | None = None
    """Sequences (pretraining: blocks; DPO: pairs) of one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Sequences (or pairs) of one forward pass on one rank. It never changes the result, only memory and speed."""
    micro_batch_tokens: PositiveInt | None = None
    """Instead of `micro_batch_size`: as many sequences (or pairs) to a forward pass as fit into so many tokens, best fit first;
    a longer one is alone. It never changes the result either, and keeps memory even where lengths differ."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forward passes of one optimizer step: `batch_size / (micro_batch_size × ranks)`. Checked; derived when left out."""
    max_steps: PositiveInt | None = None
    """Optimizer steps. None: `num_epochs` decides."""
    num_epochs: PositiveFloat | None = None
    """Passes over the data. None: 1, where `max_steps` is not given."""

    optimizer: Literal["adamw", "rmsprop", "muon", "adamw_8bit", "paged_adamw_8bit"] | None = None
    """`adamw`; `rmsprop` (the DPO paper's); `muon` for the layers' matrices with AdamW for the rest; `adamw_8bit` and
    `paged_adamw_8bit` (bitsandbytes; the paged one needs a GPU)."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate (of the AdamW part, with `muon`)."""
    muon_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the matrices that Muon trains. None: 0.02."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay of matrices; norms, biases and embeddings have none. `rmsprop` adds it to the gradient instead."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global Euclidean norm."""
    lr_schedule: Literal["constant", "linear", "cosine"] | None = None
    """Shape of the learning rate after warmup."""
    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps of linear warmup; the peak is reached at its last. None: a tenth of all steps, at most the stage's."""
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Learning rate of the last step as a share of the peak (`linear` and `cosine`)."""

    z_loss: NonNegativeFloat = 0.0
    """Coefficient of (log Σ exp logits)², added to the loss of pretraining and SFT to keep logits from drifting: 1e-4 in PaLM
    (arXiv 2204.02311). The logged loss leaves it out; `z_loss` beside it is what it adds."""

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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    eval_every: PositiveInt | None = None
    """Optimizer steps between evaluations, where data is held out. None: only at the end."""
    save_every: PositiveInt | None = None
    """Optimizer steps between checkpoints that a stopped run resumes from. None: 500."""
    log_every: PositiveInt = 10
    """Optimizer steps between log lines; a line's values are averaged over the steps since the line before."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers besides `metrics.jsonl` and the console; need `pip install modern-llm[trackers]`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError(f"max_steps={self.max_steps} and num_epochs={self.num_epochs} both set the length: give one")
        if self.max_steps is not None and self.warmup_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} exceeds max_steps={self.max_steps}")
        if self.micro_batch_tokens is not None and (self.micro_batch_size or self.gradient_accumulation_steps):
            raise ValueError(
                "micro_batch_tokens decides the micro-batches: leave micro_batch_size and gradient_accumulation_steps out"
            )
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"adam_betas={self.adam_betas} must lie in [0, 1)")
        if self.muon_learning_rate is not None and self.optimizer not in (None, "muon"):
            raise ValueError(f"muon_learning_rate has no meaning for optimizer='{self.optimizer}': leave it out")
        if self.batch_size and self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}")
        return self
