"""The same measurements for the checkpoint of every stage, on data that no stage trained on."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from modern_llm import distributed
from modern_llm.config import DPOConfig, PipelineConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import held_out_rows
from modern_llm.data.lm_datasets import held_out_blocks
from modern_llm.data.messages import Message, Pair
from modern_llm.data.preference_datasets import held_out_pairs
from modern_llm.data.prepared import Example
from modern_llm.data.village import VILLAGE_NAME, judge
from modern_llm.evaluation.generation import Answer, answer_logprobs, greedy_answers, kl_divergence
from modern_llm.evaluation.heldout import length_baselines, perplexity, preference_wins
from modern_llm.initial.checkpoint import load_model, read_initial
from modern_llm.models.policy import Policy, frozen


@dataclass(frozen=True)
class HeldOut:
    """Data that no stage trained on; a part that the pipeline's data does not offer is empty."""

    blocks: list[Example] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    questions: list[dict] = field(default_factory=list)
    """Rows whose answers can be judged (the built-in world)."""
    baselines: dict[str, float] = field(default_factory=dict)


def held_out(config: PipelineConfig, checkpoint: Path) -> HeldOut:
    """What the pipeline's data sets hold out, within the limits of `config.evaluation`, for the checkpoint's tokenizer."""
    encoder, limits = ChatEncoder(read_initial(checkpoint).tokenizer().tokenizer), config.evaluation
    blocks: list[Example] = []
    pairs: list[Pair] = []
    questions: list[dict] = []
    if config.pretrain is not None:
        max_length = config.pretrain.data.max_length or config.pretrain.model.max_seq_len
        every = held_out_blocks(config.pretrain.data, encoder.encoder, max_length)
        blocks = [every[i] for i in range(min(len(every), limits.max_blocks))]
    if config.sft is not None and {*config.sft.data.sources(), *(config.sft.data.eval_sources() or {})} == {VILLAGE_NAME}:
        questions = held_out_rows(config.sft.data, encoder)[: limits.max_questions]
    if config.dpo is not None:
        pairs = held_out_pairs(config.dpo.data, encoder)[: limits.max_pairs]
    return HeldOut(blocks, pairs, questions, length_baselines(pairs, encoder) if pairs else {})


def measure(checkpoint: Path, anchor: Path | str | None, data: HeldOut, config: PipelineConfig) -> dict[str, float]:
    """Metrics of one checkpoint; a metric that its data does not allow is left out.

    Args:
        checkpoint: what to measure.
        anchor: the model that preference training starts from (the SFT checkpoint): its log-probs are the reference of the
            preference accuracy, and the divergence is from it. None: neither is measured.
        data: what no stage trained on.
        config: limits, and the settings of preference training.
    """
    encoder, limits = ChatEncoder(read_initial(checkpoint).tokenizer().tokenizer), config.evaluation
    model = _ready(checkpoint)
    metrics: dict[str, float] = {}
    answers: list[Answer] = []
    prompts = _prompts(data, limits.max_questions)
    if prompts and (data.questions or anchor is not None):
        encoded = [encoder.prompt(prompt) for prompt in prompts]
        answers = greedy_answers(model, encoder, encoded, limits.max_new_tokens, limits.batch_size)
    if data.questions:
        verdicts = [judge(answer.text, row) for answer, row in zip(answers, data.questions, strict=True)]
        metrics["right_answers"] = sum(verdict.right for verdict in verdicts) / len(verdicts)
        metrics["preferred_form"] = sum(verdict.courteous for verdict in verdicts) / len(verdicts)
    anchor_model = None if anchor is None else _ready(anchor)
    if anchor_model is not None and answers:
        nats, tokens = kl_divergence(partial(answer_logprobs, model), partial(answer_logprobs, anchor_model), answers)
        metrics["kl_to_sft"] = nats / max(tokens, 1)
    policy = frozen(Policy(model))  # from here on the models attend over packed rows
    if anchor_model is not None and data.pairs:
        dpo = config.dpo.dpo if config.dpo is not None else DPOConfig()
        wins = preference_wins(policy, frozen(Policy(anchor_model)), data.pairs, dpo, encoder, limits.batch_size)
        metrics["preference_accuracy"] = sum(wins) / len(wins)
        metrics["pairs"] = len(wins)
    if data.blocks:
        metrics["perplexity"] = perplexity(policy, data.blocks, limits.batch_size)
    return metrics


def _ready(checkpoint: Path | str) -> PreTrainedModel:
    """The model on this process's device, in eval mode."""
    model = load_model(checkpoint).eval()
    model.to(distributed.device())  # type: ignore[arg-type]
    return model


def _prompts(data: HeldOut, most: int) -> list[list[Message]]:
    """What to generate answers to: questions that can be judged, else the prompts of held-out pairs."""
    if data.questions:
        return [row["messages"][:-1] for row in data.questions]
    return [pair.prompt for pair in data.pairs[:most]]
