"""What will go through a model in one stage: its shapes without its weights, and the lengths of its data."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.config import PipelineConfig, TrainingConfig
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.initial.checkpoint import read_initial
from modern_llm.layout import pack
from modern_llm.models.adapters import add_adapter, keep_frozen_in
from modern_llm.models.build import build_model
from modern_llm.models.flops import TrainingCost
from modern_llm.report.memory import Load

SURVEYED = 4000
"""Examples that are looked at; of more, the first so many in the order of the first epoch."""
MOST_GROUPS = 20_000
"""Micro-batches that are drawn to find the largest of a run."""


def model_of_shapes(
    config: PipelineConfig, tokenizer: PreTrainedTokenizerFast, train: TrainingConfig, precision: torch.dtype
) -> PreTrainedModel:
    """The model of a pipeline as a stage trains it, on the device `meta`: shapes and types, no memory.

    Args:
        config: the pipeline; every stage has the model of its pretraining, or of its start.
        tokenizer: of the pipeline.
        train: the stage's, for its adapters.
        precision: type of matrix products.
    """
    with torch.device("meta"):
        if config.pretrain is not None:
            shape = config.pretrain.model
            if config.pretrain.train.tokenizer_name is None:
                shape = shape.model_copy(update={"vocab_size": None})  # small texts fill a smaller vocabulary
            model = build_model(shape, tokenizer, 0)
        else:
            assert config.start_checkpoint is not None
            settings = read_initial(config.start_checkpoint, "start_checkpoint").config
            text = settings.get_text_config()
            text.vocab_size = max(text.vocab_size, len(tokenizer))
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        model.tie_weights()
        if train.adapter is not None:
            add_adapter(model, train.adapter.model_copy(update={"quantize": None}), 0)
            if precision != torch.float32:
                keep_frozen_in(model, precision)
    return model


class Survey:
    """The examples of a stage: how many, how long, and what each needs."""

    def __init__(self, data: PreparedData, config: TrainingConfig, cost: TrainingCost) -> None:
        """
        Args:
            data: of the stage.
            config: resolved.
            cost: of its model.
        """
        assert config.batch_size is not None
        assert config.max_steps is not None
        self.data, self.config = data, config
        self.epoch_size = data.train.epoch_size
        sample = _sample(data, config.seed)
        rows = [pack(example.segments) for example in sample]
        self.tokens = np.array([row.num_tokens for row in rows])
        self.predicted_share = sum(row.num_scored for row in rows) / int(self.tokens.sum())
        self.longest = max(len(segment) for example in sample for segment in example.segments)
        if self.epoch_size is not None:
            self.longest = data.train.longest
        self.flops = sum(cost(row) for row in rows) / len(rows)
        """Of a mean example, forward and backward."""
        self.drawn = self._examples_drawn(config.batch_size, config.max_steps)
        self.evaluated = len(data.evaluation)

    @property
    def mean_tokens(self) -> float:
        return float(self.tokens.mean())

    def _examples_drawn(self, batch_size: int, max_steps: int) -> int:
        """Of the whole run; the last step of an epoch holds what is left of it."""
        if self.epoch_size is None:
            return batch_size * max_steps
        epochs, rest = divmod(max_steps, -(-self.epoch_size // batch_size))
        return epochs * self.epoch_size + rest * batch_size

    def largest(self, micro_batch_size: int | None, accumulation: int, pairs: bool) -> Load:
        """The largest micro-batch that a run is likely to meet: of as many random ones as it has, always the same."""
        if micro_batch_size is None:
            tokens = max(self.config.micro_batch_tokens or 0, int(self.tokens.max()))
            several = self.mean_tokens * (self.config.batch_size or 1) > tokens
        else:
            number = min(-(-self.drawn // micro_batch_size), MOST_GROUPS)
            drawn = np.random.default_rng(0).choice(self.tokens, (number, micro_batch_size))
            tokens, several = int(drawn.sum(1).max()), accumulation > 1
        return Load(tokens, round(tokens * self.predicted_share), self.longest, several, pairs)


def _sample(data: PreparedData, seed: int) -> Sequence[Example]:
    """Some examples, in the order of training."""
    if data.train.epoch_size is None:  # a stream: its first window
        assert not isinstance(data.train, Sequence)
        _, blocks = next(iter(data.train.windows(0, 0, 1)))
        return blocks[:SURVEYED]
    assert isinstance(data.train, Sequence)
    return [data.train[int(i)] for i in data.train.epoch_order(seed, 0)[:SURVEYED]]
