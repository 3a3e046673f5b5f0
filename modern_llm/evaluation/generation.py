"""Greedy answers of a checkpoint, loaded by plain `transformers`, and how far two models are apart on them."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from modern_llm.data.chat import ChatEncoder
from modern_llm.data.tokenizer import decode_text
from modern_llm.models.policy import context_length


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    prompt_ids: list[int]
    ids: list[int]
    """Ids of the answer, its end token included where it came."""
    text: str


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, encoder: ChatEncoder, encoded: Sequence[list[int]], max_new_tokens: int, batch_size: int
) -> list[Answer]:
    """The most likely token at each position, up to an end token, `max_new_tokens` or the end of the model's context.

    Args:
        model: in eval mode, with its own attention.
        encoder: says what stands for padding, and turns ids into text.
        encoded: ids of each prompt, up to where the answer begins.
        max_new_tokens: of an answer.
        batch_size: prompts at a time.
    """
    context = context_length(model) or math.inf
    room = [int(max(0, min(max_new_tokens, context - len(ids)))) for ids in encoded]
    answers = [Answer(ids, [], "") for ids in encoded]
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    # an answer must not depend on what it is batched with, so those with less room have batches of their own
    for most, alike in itertools.groupby(by_length, key=lambda i: room[i]):
        group = list(alike) if most else []
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            found = _generate(model, encoder, [encoded[i] for i in batch], most)
            for i, ids in zip(batch, found, strict=True):
                answers[i] = Answer(encoded[i], ids, decode_text(encoder.tokenizer, ids))
    return answers


def _generate(model: PreTrainedModel, encoder: ChatEncoder, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Ids of the answers to a batch of prompts."""
    own = model.generation_config
    assert own is not None
    end_ids = set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
    padding, longest = encoder.encoder.document_end, max(map(len, prompts))
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(end_ids), pad_token_id=padding
    )
    # padding stands on the left, so that every prompt ends where its answer begins
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # transformers 5.23 fills what these settings leave open from the model's own, such as a penalty for repetitions
    model.generation_config = settings
    try:
        out = model.generate(  # type: ignore[operator] - nn.Module's __getattr__ hides the method from the type checker
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
    finally:
        model.generation_config = own
    return [_up_to_end(generated, end_ids) for generated in out[:, longest:].tolist()]


def _up_to_end(ids: list[int], end_ids: set[int]) -> list[int]:
    """The ids up to and with the first end token; what follows it in a batch is padding."""
    for n, token in enumerate(ids):
        if token in end_ids:
            return ids[: n + 1]
    return ids


Ask = Callable[[Answer], Tensor]
"""An answer → (tokens of it, V) fp32 log-probs of every word at each position of it."""


def answer_logprobs(model: PreTrainedModel, answer: Answer) -> Tensor:
    """What a model says at each position of an answer, in nats."""
    ids = torch.tensor([answer.prompt_ids + answer.ids], device=model.device)
    count = len(answer.ids) + 1
    # only the positions that predict the answer: a prompt's logits would be most of the work. xLSTM, ProphetNet, TrOCR and
    # Whisper (transformers 5.23) take any argument and give all of them
    return model(input_ids=ids, logits_to_keep=count).logits[0, -count:-1].float().log_softmax(-1)


@torch.no_grad()
def kl_divergence(ours: Ask, theirs: Ask, answers: Sequence[Answer]) -> tuple[float, int]:
    """KL(ours ‖ theirs), exact over the vocabulary, at every position of answers that the first model wrote.

    Returns:
        Its sum in nats, and how many positions that were.
    """
    total, tokens = 0.0, 0
    for answer in answers:
        if answer.ids:
            p, q = ours(answer), theirs(answer)
            total += float((p.exp() * (p - q)).sum())
            tokens += len(answer.ids)
    return total, tokens
