"""The same measurements for the checkpoint of every stage, on data that no stage trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from modern_llm import distributed
from modern_llm.config import PipelineConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.held_out import sample
from modern_llm.data.instruction_datasets import held_out_rows
from modern_llm.data.lm_datasets import held_out_blocks
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import Example
from modern_llm.data.village import VILLAGE_NAME, judge
from modern_llm.evaluation.drift import prompt_ids
from modern_llm.evaluation.generation import Answer, answer_logprobs, greedy_answers, kl_divergence
from modern_llm.evaluation.heldout import length_baselines, perplexity, preference_wins
from modern_llm.initial.checkpoint import load_model, read_initial
from modern_llm.initial.opened import open_checkpoint
from modern_llm.models.policy import Policy, frozen


@dataclass(frozen=True)
class HeldOut:
    """Data that no stage trained on; a part that the pipeline's data does not offer is empty."""

    blocks: Sequence[Example] = ()
    questions: list[dict] = field(default_factory=list)
    """Rows whose answers can be judged (the built-in world)."""


def held_out(config: PipelineConfig, checkpoint: Path) -> HeldOut:
    """What the pipeline's data sets hold out, within the limits of `config.evaluation`, for the checkpoint's tokenizer."""
    encoder, limits = ChatEncoder(read_initial(checkpoint).tokenizer().tokenizer), config.evaluation
    blocks: Sequence[Example] = ()
    questions: list[dict] = []
    if config.pretrain is not None:
        max_length = config.pretrain.data.max_length or config.pretrain.model.max_seq_len
        blocks = sample(held_out_blocks(config.pretrain.data, encoder.encoder, max_length), limits.max_blocks)
    if config.sft is not None and {*config.sft.data.sources(), *(config.sft.data.eval_sources() or {})} == {VILLAGE_NAME}:
        questions = held_out_rows(config.sft.data, encoder)[: limits.max_questions]
    return HeldOut(blocks, questions)


@dataclass(frozen=True)
class Measured:
    """Measurements of one checkpoint."""

    metrics: dict[str, float]
    baselines: dict[str, float]
    """Accuracy of judges without a model on the same pairs."""
    wins: list[float]
    """1, ½ or 0 for each pair."""


def measure(checkpoint: Path, anchor: Path | str | None, data: HeldOut, config: PipelineConfig) -> Measured:
    """Measure one checkpoint; what its data does not allow is left out.

    Pairs are those that preference training evaluates on, as it encodes and cuts them with the checkpoint's tokenizer.

    Args:
        checkpoint: what to measure.
        anchor: the model that preference training starts from (the SFT checkpoint): its log-probs are the reference of the
            preference accuracy, and the divergence is from it. None: neither is measured.
        data: what no stage trained on.
        config: limits, and the settings of preference training.
    """
    encoder, limits = ChatEncoder(read_initial(checkpoint).tokenizer().tokenizer), config.evaluation
    model = _ready(load_model(checkpoint))
    metrics: dict[str, float] = {}
    wins: list[float] = []
    answers: list[Answer] = []
    pairs: Sequence[Example] = ()
    if config.dpo is not None and anchor is not None:
        pairs = sample(prepare_preferences(config.dpo.data, config.dpo.dpo, encoder).evaluation, limits.max_pairs)
    if data.questions:
        encoded = [encoder.prompt(row["messages"][:-1]) for row in data.questions]
    else:
        encoded = [prompt_ids(pair) for pair in sample(pairs, limits.max_questions)]
    if encoded:
        answers = greedy_answers(model, encoder, encoded, limits.max_new_tokens, limits.batch_size)
    if data.questions:
        verdicts = [judge(answer.text, row) for answer, row in zip(answers, data.questions, strict=True)]
        metrics["right_answers"] = sum(verdict.right for verdict in verdicts) / len(verdicts)
        metrics["preferred_form"] = sum(verdict.courteous for verdict in verdicts) / len(verdicts)
    anchor_model = None
    if anchor is not None:
        template = None if config.dpo is None or anchor == checkpoint else config.dpo.data.chat_template
        anchor_model = _ready(open_checkpoint(anchor, None, "start_checkpoint", chat_template=template).model)
    if anchor_model is not None and answers:
        nats, tokens = kl_divergence(partial(answer_logprobs, model), partial(answer_logprobs, anchor_model), answers)
        metrics["kl_to_sft"] = nats / max(tokens, 1)
    policy = frozen(Policy(model))  # from here on the models attend over packed rows
    if anchor_model is not None and pairs:
        wins, accuracy = preference_wins(policy, frozen(Policy(anchor_model)), pairs, limits.batch_size)
        metrics |= {**accuracy, "pairs": len(wins)}
    if data.blocks:
        metrics |= perplexity(policy, data.blocks, limits.batch_size)
    return Measured(metrics, length_baselines(pairs) if pairs else {}, wins)


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model on this process's device, in eval mode."""
    return model.eval().to(distributed.device())  # type: ignore[arg-type]
