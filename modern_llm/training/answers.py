"""What a model answers while it trains: the same held-out prompts at every evaluation, in `answers.jsonl`."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from modern_llm import distributed
from modern_llm.config import TrainingConfig
from modern_llm.data.chat import chat_encoder
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.evaluation.generation import greedy_answers
from modern_llm.layout import Segment
from modern_llm.metrics import RunLog
from modern_llm.models.policy import Policy
from modern_llm.precision import autocast

NEW_TOKENS = 128
"""Most tokens of an answer."""
DOCUMENT_TOKENS = 32
"""Tokens of a document that a model continues, where there is no prompt."""


class Answers:
    """Asks the model, and writes what it says. No weight and no random state changes."""

    def __init__(
        self,
        data: PreparedData,
        tokenizer: PreTrainedTokenizerFast,
        config: TrainingConfig,
        precision: torch.dtype,
        log: RunLog,
    ) -> None:
        """
        Args:
            data: its first `answer_prompts` held-out examples are asked.
            tokenizer: of the run.
            config: resolved.
            precision: type of matrix products.
            log: where the answers go.
        """
        self.tokenizer, self.precision, self.log, self.config = tokenizer, precision, log, config
        count = min(config.answer_prompts, len(data.evaluation))
        self.prompts = [prompt_ids(data.evaluation[i]) for i in range(count)]

    def write(self, policy: Policy, step: int) -> None:
        """Ask for an answer to each prompt, on rank 0."""
        if self.prompts:
            distributed.on_main(self._write)(policy, step)

    @torch.no_grad()
    def _write(self, policy: Policy, step: int) -> None:
        devices = [policy.device] if policy.device.type == "cuda" else []
        encoder = chat_encoder(self.tokenizer)
        with torch.random.fork_rng(devices), policy.as_loaded() as model, autocast(self.precision, policy.device):
            found = greedy_answers(model, encoder, self.prompts, NEW_TOKENS, self.config.micro_batch_size or 1)
            ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
        decode, rows = self.tokenizer.decode, []
        for answer in found:
            ended = bool(answer.ids) and answer.ids[-1] in (ends if isinstance(ends, list) else [ends])
            said = {"prompt": decode(answer.prompt_ids), "answer": answer.text, "tokens": len(answer.ids), "ended": ended}
            rows.append({"step": step, **said})
        self.log.answers(step, rows, self.config.report_answers)


def prompt_ids(example: Example) -> list[int]:
    """What stands before the first token that counts; the beginning of a document, of which all tokens count."""
    segment: Segment = example.segments[0]
    before = int(np.argmax(segment.scored))
    return segment.ids[: before if before > 1 else min(DOCUMENT_TOKENS, max(1, len(segment) // 2))].tolist()
