"""Preference training: a model that answers → a model that prefers the better answer."""

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    from modern_llm.cli import main

    main("dpo")

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modern_llm import distributed
from modern_llm.checkpoint import weights_hash
from modern_llm.config import DPOConfig, PreferenceDatasetConfig, StrictModel, TrainingConfig, UserError
from modern_llm.data.chat import ChatEncoder, chat_encoder
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.evaluation.drift import kl_on_prompts
from modern_llm.evaluation.generation import Answer, Ask, answer_logprobs
from modern_llm.initial.opened import Opened, open_checkpoint
from modern_llm.metrics import RunLog
from modern_llm.models.adapters import adapters_off, keep_frozen_in
from modern_llm.models.policy import Policy, frozen
from modern_llm.objectives import PreferenceObjective
from modern_llm.objectives.reference import asked_now, with_reference
from modern_llm.training.checks import check_early
from modern_llm.training.inputs import stage_inputs
from modern_llm.training.loop import Loop
from modern_llm.training.stage import open_reference, train_stage

__all__ = ["DPOConfig", "PreferenceDatasetConfig", "run_dpo"]


def run_dpo(
    sft_checkpoint: Path | str,
    train_config: TrainingConfig,
    dpo_config: DPOConfig | None = None,
    preference_config: PreferenceDatasetConfig | None = None,
    tokenizer_name: str | None = None,
) -> Path:
    """Train a model on preference pairs against a frozen reference.

    Args:
        sft_checkpoint: one of our folders, any Hugging Face model folder, or a hub id.
        train_config: how to train; what is None gets the stage's default.
        dpo_config: what to optimise. None: `DPOConfig()`.
        preference_config: the pairs. None: the data set named by `train_config.dataset_name`.
        tokenizer_name: None: the checkpoint's own; another one is refused unless it is identical.

    Returns:
        The final checkpoint: a folder that `transformers` loads.

    Raises:
        UserError: a config, file or name that the user can put right.
    """
    with distributed.process_group(train_config.parallel):
        preference_config = check_early("dpo", train_config, preference_config, PreferenceDatasetConfig)
        dpo_config = dpo_config or DPOConfig()
        if train_config.adapter is not None and dpo_config.sync_ref_model:
            raise UserError(
                "sync_ref_model moves the reference towards the policy; with adapters A and B would be mixed apart, which does "
                "not mix the products B A: leave sync_ref_model or adapter out"
            )
        tokenizer_name = tokenizer_name or train_config.tokenizer_name
        opened = open_checkpoint(
            sft_checkpoint, tokenizer_name, "sft_checkpoint", train_config.adapter, preference_config.chat_template
        )
        encoder = chat_encoder(opened.tokenizer)
        sections: dict[str, StrictModel] = {"dpo": dpo_config, "data": preference_config}
        named = open_reference(dpo_config, opened.tokenizer, opened.tokenizer_name)
        objective = PreferenceObjective(dpo_config)
        reference = Reference(objective, named, opened, tokenizer_name)
        data = prepare_preferences(preference_config, dpo_config, encoder)
        return train_stage(
            stage="dpo",
            config=train_config,
            sections=sections,
            inputs=stage_inputs("dpo", train_config, sections, sft_checkpoint),
            opened=opened,
            data=data,
            objective=objective,
            drop_out=not dpo_config.disable_dropout,
            reference=reference,
            conclude=partial(reference.drift, encoder) if data.evaluation else None,
            reference_weights=None if named is None else weights_hash(named),
        )


class Reference:
    """The model that the policy is compared with: asked for all pairs before training, and about the policy's answers after."""

    def __init__(
        self, objective: PreferenceObjective, named: PreTrainedModel | None, opened: Opened, tokenizer_name: str | None
    ) -> None:
        """
        Args:
            objective: of the run; gets a live copy of the start where the reference moves.
            named: the model of `reference_checkpoint`. None: the policy before its first step is the reference.
            opened: what the policy begins from.
            tokenizer_name: as given.
        """
        assert opened.initial is not None
        self.objective, self.named, self.tokenizer_name = objective, named, tokenizer_name
        self.start = opened.initial.name
        self.is_without_adapters = opened.adapter is not None and opened.continued is None
        """Whether the start is the policy with its adapters switched off."""
        self.other: Policy | None = None

    def look(self, policy: Policy, examples: list[Example], precision: torch.dtype) -> list[Example]:
        """A few pairs with the log-probs of their answers, where the loss compares with them and the reference stays."""
        with self._at_rest(policy) as asked:
            return examples if asked is None else asked_now(examples, asked, precision)

    def ask(self, policy: Policy, data: PreparedData, visited: np.ndarray, precision: torch.dtype, log: RunLog) -> PreparedData:
        """The pairs with the same, from disk where some run has asked before."""
        began = time.perf_counter()
        with self._at_rest(policy) as asked:
            if asked is None:
                return data
            data, computed = with_reference(data, asked, precision, visited, log.message)
        if computed:
            log.message(f"reference log-probs of {computed} pairs in {time.perf_counter() - began:.1f} s, kept for other runs")
        else:
            log.message("reference log-probs found on disk")
        return data

    @contextmanager
    def _at_rest(self, policy: Policy) -> Iterator[Policy | None]:
        """Inside, the model to ask once and for all; None: the loss needs none, or asks one that moves."""
        if self.named is not None and self.other is None:
            self.named.to(policy.device)  # type: ignore[arg-type]
            self.other = frozen(Policy(self.named, policy.attention))
        if self.objective.config.sync_ref_model and self.objective.live is None:
            self.objective.live = frozen(copy.deepcopy(policy))
        if not self.objective.config.needs_reference or self.objective.config.sync_ref_model:
            yield None
        else:
            with adapters_off(policy.model) if self.is_without_adapters else nullcontext():
                yield self.other or policy

    def drift(self, encoder: ChatEncoder, loop: Loop) -> dict[str, float]:
        """How far training has moved the policy from it on held-out prompts."""
        config, policy = loop.config, loop.policy
        at_once = config.micro_batch_size or max(1, (config.micro_batch_tokens or 0) // self.objective.config.max_length)
        with self._again(policy, loop.precision) as asked:
            return kl_on_prompts(policy, asked, loop.data.evaluation, encoder, loop.precision, at_once)

    @contextmanager
    def _again(self, policy: Policy, precision: torch.dtype) -> Iterator[Ask]:
        """Inside, what the reference says of any answer, the policy being trained by now.

        Where no second model was there during training, the start is loaded once more, or its adapters are switched off. A run
        that trains without a reference is compared with its start too.
        """
        if other := self.objective.live or self.other:
            with other.as_loaded() as model:
                yield partial(answer_logprobs, model)
        elif self.is_without_adapters:

            def without_adapters(answer: Answer) -> Tensor:
                with adapters_off(policy.model):
                    return answer_logprobs(policy.model, answer)

            yield without_adapters
        else:
            model = open_checkpoint(self.start, self.tokenizer_name, "sft_checkpoint").model
            model.requires_grad_(False)
            if precision != torch.float32:
                keep_frozen_in(model, precision)  # half the memory, and the same numbers
            yield partial(answer_logprobs, model.to(policy.device).eval())  # type: ignore[arg-type]
