"""Greedy answers of a checkpoint, loaded by plain `transformers`, and how far two models are apart on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from modern_llm.data.chat import ChatEncoder
from modern_llm.data.messages import Message
from modern_llm.data.tokenizer import decode_text


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    prompt_ids: list[int]
    ids: list[int]
    """Ids of the answer, its end token included where it came."""
    text: str


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, encoder: ChatEncoder, prompts: Sequence[list[Message]], max_new_tokens: int, batch_size: int
) -> list[Answer]:
    """The most likely token at each position, up to an end token or `max_new_tokens`."""
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    assert model.generation_config is not None
    ends = model.generation_config.eos_token_id
    end_ids = set(ends if isinstance(ends, list) else [ends])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(end_ids), pad_token_id=encoder.encoder.document_end
    )
    answers: list[Answer | None] = [None] * len(encoded)
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        longest = max(len(encoded[i]) for i in batch)
        # padding stands on the left, so that every prompt ends where its answer begins
        ids = torch.tensor([[encoder.encoder.document_end] * (longest - len(encoded[i])) + encoded[i] for i in batch])
        mask = torch.tensor([[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in batch])
        out = model.generate(  # type: ignore[operator] - nn.Module's __getattr__ hides the method from the type checker
            ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
        for i, generated in zip(batch, out[:, longest:].tolist(), strict=True):
            answer = _up_to_end(generated, end_ids)
            answers[i] = Answer(encoded[i], answer, decode_text(encoder.tokenizer, answer))
    return [answer for answer in answers if answer is not None]


def _up_to_end(ids: list[int], end_ids: set[int]) -> list[int]:
    """The ids up to and with the first end token; what follows it in a batch is padding."""
    for n, token in enumerate(ids):
        if token in end_ids:
            return ids[: n + 1]
    return ids


@torch.no_grad()
def kl_divergence(model: PreTrainedModel, other: PreTrainedModel, answers: Sequence[Answer]) -> float:
    """KL(model ‖ other) in nats per token, exact over the vocabulary, averaged over the tokens of the model's own answers."""
    total, tokens = 0.0, 0
    for answer in answers:
        if not answer.ids:
            continue
        ids = torch.tensor([answer.prompt_ids + answer.ids], device=model.device)
        # only the positions that predict the answer: a prompt's logits would be most of the work
        kept = len(answer.ids) + 1
        ours, theirs = (m(input_ids=ids, logits_to_keep=kept).logits[0, :-1].float().log_softmax(-1) for m in (model, other))
        total += float((ours.exp() * (ours - theirs)).sum())
        tokens += len(answer.ids)
    return total / max(tokens, 1)
