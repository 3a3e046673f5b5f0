"""A look at the first batch before a long run: seconds that save hours of training on the wrong tokens."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from modern_llm.config import TrainingConfig, UserError
from modern_llm.data.loader import micro_batches
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.layout import Segment
from modern_llm.metrics import RunLog
from modern_llm.models.policy import Policy
from modern_llm.objectives import Objective
from modern_llm.precision import autocast
from modern_llm.training.in_backward import freed_gradients

EXAMPLES = 4
"""Most examples of the trial batch; never more than a micro-batch, which must fit into memory."""
TRIAL_TOKENS = 512
"""With so many tokens it is large enough, and one example to check too: a large model takes its time."""
CHECKED_EXAMPLES = 2
"""Examples of the first batch, its longest, on which packed or padded rows are compared with the unwrapped model."""
SHOWN_CHARACTERS = 160
"""Characters of a prompt's end and of an answer's two ends that are printed."""


def preflight(
    policy: Policy,
    objective: Objective,
    examples: list[Example],
    tokenizer: PreTrainedTokenizerFast,
    precision: torch.dtype,
    config: TrainingConfig,
    log: RunLog,
) -> None:
    """Show what the model is taught and try one batch, without changing any weight or any random state.

    Args:
        policy: before its first step.
        objective: of the run.
        examples: `trial_examples`, with what the objective needs of a reference; none are not looked at.
        tokenizer: for showing them.
        precision: type of matrix products.
        config: resolved.
        log: told what was found.

    Raises:
        UserError: the batch cannot train the model, with the reason.
    """
    if not examples:
        return
    for segment in {id(s): s for example in examples[:1] for s in example.segments[:2]}.values():
        log.message(f"teaches {shown(segment, tokenizer)}")
    _check_begin_token(examples, tokenizer)
    batch = next(iter(micro_batches(examples, len(examples)))).to(policy.device)
    devices = [policy.device] if policy.device.type == "cuda" else []
    parameters = [p for p in policy.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices), freed_gradients(parameters) as norms:
        torch.manual_seed(config.seed)
        policy.train()
        with autocast(precision, policy.device):
            objective.begin_step(policy, [batch], training=False)
            outcome = objective(policy, batch)
        loss = torch.stack([t.weight / max(batch.counts[t.unit], 1) * t.total for t in outcome.terms.values()]).sum()
        if loss.requires_grad:
            loss.backward()
    objective.check_start(batch, outcome, precision)
    norm = float(torch.stack(norms).norm()) if norms else 0.0
    value = float(loss.detach())
    if not math.isfinite(value) or not math.isfinite(norm):
        raise UserError(f"the loss of the first examples is {value} with a gradient of {norm}: the start's weights are damaged")
    if norm == 0 and value == 0:  # a hinge that is past its margin; other examples may not be
        log.message("WARNING: loss and gradient of the first examples are 0: there is nothing left to learn from them")
    elif norm == 0 and batch.counts["tokens"]:
        raise UserError("the gradient of the first examples is 0: no parameter learns anything from this loss")
    log.message(f"first look: loss {value:.6f}, gradient {norm:.4g}, {batch.counts['tokens']} tokens count")


def trial_examples(data: PreparedData, config: TrainingConfig) -> list[Example]:
    """The examples of the trial batch; none of a stream, which a look would use up."""
    if not isinstance(data.train, Sequence):
        return []
    found: list[Example] = []
    for i in range(min(config.micro_batch_size or 1, EXAMPLES, len(data.train))):
        found.append(data.train[i])
        if sum(example.num_tokens for example in found) >= TRIAL_TOKENS:
            break
    return found


def longest_rows(data: PreparedData, config: TrainingConfig, vocabulary: int) -> list[Segment]:
    """The longest examples of the first batch, on which the policy's path is compared with the model's own log-probs.

    Of a stream, which a look would use up, random tokens of its length.

    Args:
        data: of the stage.
        config: resolved.
        vocabulary: rows of the embedding.
    """
    if not isinstance(data.train, Sequence):
        ids = np.random.default_rng(0).integers(0, vocabulary, data.longest).astype(np.int32)
        return [Segment(ids, np.ones(len(ids), dtype=bool))]
    assert config.batch_size is not None
    first = [data.train[int(i)] for i in data.train.epoch_order(config.seed, 0)[: config.batch_size]]
    longest = sorted(first, key=lambda example: max(map(len, example.segments)))[-CHECKED_EXAMPLES:]
    if longest[-1].num_tokens >= TRIAL_TOKENS:
        longest = longest[-1:]
    return [segment for example in longest for segment in example.segments]


def shown(segment: Segment, tokenizer: PreTrainedTokenizerFast) -> str:
    """A segment as text, with what counts between ⟦ and ⟧."""
    parts, counts = [], segment.scored
    ends = [*(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(segment)]
    start = 0
    for end in ends:
        text = str(tokenizer.decode(segment.ids[start:end].tolist(), skip_special_tokens=False))
        if len(text) > 2 * SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]} … {text[-SHOWN_CHARACTERS:]}"
        parts.append(f"⟦{text}⟧" if counts[start] else text)
        start = end
    return repr("".join(parts))


def _check_begin_token(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> None:
    begin = tokenizer.bos_token_id
    if begin is None or begin == tokenizer.eos_token_id:
        return
    for example in examples:
        for segment in example.segments:
            if segment.ids[:2].tolist() == [begin, begin]:  # one a turn is how Llama 2's template writes
                raise UserError(
                    f"row {example.row} begins twice (with {tokenizer.bos_token!r}): the text brings what the tokenizer adds; "
                    f"take it out"
                )
