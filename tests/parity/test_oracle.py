"""The real stages against the oracle: losses, gradients and weights over stage × micro-batch × resume, and bf16."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from condition import loss_rounding, truth_of
from helpers import (
    ANSWERS,
    KERNELS,
    QUESTIONS,
    SENTENCES,
    WRONG,
    chat,
    identical,
    largest_difference,
    logged,
    metric_lines,
    random_segment,
    recorded_gradients,
    relative_error,
    sample,
    save_start,
    sharpened,
    stopped_after_first_save,
    tiny_model,
    weights,
    write_jsonl,
)
from tolerances import GRADIENT, LOSS, TIMES_OWN_NORM, TOKEN_LOGPROB, WEIGHT
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ModelConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.data.loader import epoch_order
from modern_llm.layout import pack
from modern_llm.models.policy import Policy
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

SEED, STEPS, BATCH, BLOCK = 3, 3, 4, 32
RATE, DECAY, MAX_NORM, BETAS = 3e-3, 0.1, 0.5, (0.9, 0.95)
EPSILON = 1e-3
"""Adam divides a gradient by its own size, which turns the rounding of a gradient near 0 into a whole step. An epsilon well
above fp32 rounding of these gradients keeps the update a smooth function, so that weights can be compared."""
BETA = 0.3
SHAPE = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
Split = int | str
"""Examples of a micro-batch, or how many tokens it may hold."""
SPLITS: tuple[Split, ...] = (1, 2, BATCH, "60 tokens")
STAGES = {"pretrain": None, "sft": None, "dpo": 0.0, "conservative_dpo": 0.1}


def blocks(tokenizer: PreTrainedTokenizerFast) -> list[list[tuple[list[int], list[bool]]]]:
    """Documents in the seed's order, each with its end token; where a block is full, its last token opens the next one."""
    cut: list[list[tuple[list[int], list[bool]]]] = [[]]
    room = BLOCK
    for i in np.random.default_rng([SEED, 0]).permutation(len(SENTENCES)):
        ids = [*tokenizer.encode(SENTENCES[i]), tokenizer.eos_token_id]
        while ids:
            piece, ids = ids[:room], ids[room - 1 :] if len(ids) > room else []  # the token at the cut is taught behind it
            cut[-1].append((piece, [True] * len(piece)))
            room -= len(piece)
            if room == 0:
                cut.append([])
                room = BLOCK
    return [block for block in cut if block]


def batches_in_order(examples: list[Any]) -> list[list[Any]]:
    """What each of the steps holds; an epoch's last step holds what is left of it."""
    batches: list[list[Any]] = []
    for epoch in range(STEPS):
        order = epoch_order(len(examples), SEED, epoch)
        batches += [[examples[i] for i in order[at : at + BATCH]] for at in range(0, len(examples), BATCH)]
    return batches[:STEPS]


@dataclass
class Story:
    """One stage: how to run it, and what the oracle says of it."""

    folder: Path
    start: Callable[[Path, TrainingConfig], Path]
    losses: list[float]
    gradients: dict[str, Tensor]
    """Of step 1, clipped."""
    norm: float
    """Of step 1, before clipping."""
    weights: dict[str, Tensor]
    bf16_tolerance: Callable[[], float]
    """What a logged loss of a bf16 run may be off by."""
    runs: dict[tuple[Split, bool], tuple[Path, list[dict[str, Tensor]]]] = field(default_factory=dict)

    def run(self, micro: Split, resumed: bool) -> tuple[Path, list[dict[str, Tensor]]]:
        """(output folder, gradients of each step) of a run that is stopped at step 2 and resumed, or not."""
        if (micro, resumed) not in self.runs:
            folder = self.folder / f"micro-{micro}-{'resumed' if resumed else 'straight'}"
            config = self.config(micro)
            with recorded_gradients() as steps:
                if resumed:
                    with stopped_after_first_save():
                        self.start(folder, config)
                self.start(folder, config)
            self.runs[micro, resumed] = folder, steps
        return self.runs[micro, resumed]

    def config(self, micro: Split, precision: Any = "fp32") -> TrainingConfig:
        split: Any = {"micro_batch_size": micro} if isinstance(micro, int) else {"micro_batch_tokens": int(micro.split()[0])}
        return TrainingConfig(
            run_name="run", batch_size=BATCH, **split, max_steps=STEPS, warmup_steps=2, lr_schedule="linear",
            optimizer="adamw", learning_rate=RATE, weight_decay=DECAY, max_grad_norm=MAX_NORM, adam_betas=BETAS,
            adam_epsilon=EPSILON, seed=SEED, save_every=2, log_every=1, mixed_precision=precision,
        )  # fmt: skip


@pytest.fixture(scope="module", params=STAGES)
def story(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    stage, smoothing = request.param, STAGES[request.param]
    folder = tmp_path_factory.mktemp(stage)
    model = tiny_model(tokenizer, seed=SEED)
    begin = save_start(model, tokenizer, folder / "start")

    def loss(model: PreTrainedModel, batch: list[Any]) -> Tensor:
        return oracle.language_model_loss(model, [piece for example in batch for piece in example])

    if stage == "pretrain":
        data = write_jsonl(folder / "rows.jsonl", [{"text": text} for text in SENTENCES])
        examples: list[Any] = blocks(tokenizer)
        documents = LanguageModelingDatasetConfig(dataset_name=str(data), max_length=BLOCK)
        run = lambda out, config: run_training(SHAPE, in_folder(config, out), documents, str(begin))  # noqa: E731
    elif stage == "sft":
        rows = [{"prompt": q, "response": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        data = write_jsonl(folder / "rows.jsonl", rows)
        examples = [[chat(tokenizer, q, a)] for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        chats = InstructionDatasetConfig(dataset_name=str(data))
        run = lambda out, config: run_sft(begin, in_folder(config, out), chats)  # noqa: E731
    else:
        triples = list(zip(QUESTIONS, ANSWERS, WRONG, strict=True))
        data = write_jsonl(folder / "rows.jsonl", [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in triples])
        examples = [(chat(tokenizer, q, a), chat(tokenizer, q, w)) for q, a, w in triples]
        reference = oracle.float64_copy(model)
        pairs, dpo = PreferenceDatasetConfig(dataset_name=str(data)), DPOConfig(beta=BETA, label_smoothing=smoothing)
        run = lambda out, config: run_dpo(begin, in_folder(config, out), dpo, pairs)  # noqa: E731

        def loss(model: PreTrainedModel, batch: list[Any]) -> Tensor:
            return oracle.preference_loss(model, reference, batch, {"sigmoid": 1.0}, beta=BETA, label_smoothing=smoothing)

    assert BATCH < len(examples) < 2 * BATCH, "step 2 must hold fewer rows than step 1, and step 3 begin the second epoch"
    slow = oracle.float64_copy(model)
    decayed = {name for name, p in slow.named_parameters() if p.ndim == 2 and "embed_tokens" not in name}
    rates = [oracle.learning_rate(s, RATE, 2, STEPS, "linear", TrainingConfig().min_lr_ratio) for s in range(1, STEPS + 1)]
    optimizer = oracle.AdamW(slow, decayed, DECAY, BETAS, EPSILON)
    losses, gradients = oracle.train(slow, loss, batches_in_order(examples), optimizer, rates, MAX_NORM)
    norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    scale = oracle.clip_scale(gradients, MAX_NORM)
    assert scale < 0.9, "the gradient must really be clipped"
    final = {name: p.detach() for name, p in slow.named_parameters()}

    def bf16_tolerance() -> float:
        begun = oracle.float64_copy(model)
        spread = max(loss_rounding(loss, begun, batch, torch.bfloat16) for batch in batches_in_order(examples))
        return LOSS + TIMES_OWN_NORM * spread

    return Story(folder, run, losses, {name: g * scale for name, g in gradients.items()}, norm, final, bf16_tolerance)


def in_folder(config: TrainingConfig, folder: Path) -> TrainingConfig:
    return config.model_copy(update={"output_dir": folder})


@pytest.mark.parametrize("resumed", [False, True], ids=["straight", "resumed"])
@pytest.mark.parametrize("micro", SPLITS)
def test_losses_gradients_and_weights_equal_the_oracle(story: Story, micro: Split, resumed: bool) -> None:
    folder, gradients = story.run(micro, resumed)
    assert logged(folder, "loss") == pytest.approx(story.losses, abs=LOSS)
    assert logged(folder, "grad_norm")[0] == pytest.approx(story.norm, rel=GRADIENT)
    assert relative_error(gradients[0], story.gradients) <= GRADIENT
    assert largest_difference(weights(folder / "run_final"), story.weights) <= WEIGHT


@pytest.mark.parametrize("micro", SPLITS)
def test_a_resumed_run_is_bit_identical_to_a_straight_one(story: Story, micro: Split) -> None:
    straight, _ = story.run(micro, resumed=False)
    resumed, _ = story.run(micro, resumed=True)
    assert identical(weights(resumed / "run_final"), weights(straight / "run_final"))
    assert metric_lines(resumed) == metric_lines(straight)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_no_loss_and_no_weight(story: Story) -> None:
    folder = story.folder / "checkpointing"
    story.start(folder, story.config(2).model_copy(update={"gradient_checkpointing": True}))
    assert logged(folder, "loss") == pytest.approx(story.losses, abs=LOSS)
    assert largest_difference(weights(folder / "run_final"), story.weights) <= WEIGHT


def test_bf16_losses_are_as_far_from_the_oracle_as_the_plain_models(story: Story) -> None:
    folder = story.folder / "bf16"
    story.start(folder, story.config(2, "bf16"))
    assert logged(folder, "loss") == pytest.approx(story.losses, abs=story.bf16_tolerance())
    assert logged(folder, "loss") != pytest.approx(story.losses, abs=1e-7), "this did not run in bf16"


def test_preference_metrics_equal_hand_arithmetic_with_another_reference(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With a reference of other weights the first step's log-ratios are not 0: reward = beta · (policy − reference)."""
    models = [tiny_model(tokenizer, seed=seed) for seed in (1, 2)]
    policy, reference = (save_start(model, tokenizer, tmp_path / str(i)) for i, model in enumerate(models))
    triples = list(zip(QUESTIONS, ANSWERS, WRONG, strict=True))
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in triples])
    config = TrainingConfig(
        output_dir=tmp_path / "run",
        batch_size=len(triples),
        micro_batch_size=2,
        max_steps=1,
        log_every=1,
        mixed_precision="fp32",
    )
    run_dpo(
        policy, config, DPOConfig(beta=BETA, reference_checkpoint=reference), PreferenceDatasetConfig(dataset_name=str(data))
    )
    slow_policy, slow_reference = (oracle.float64_copy(model) for model in models)
    with torch.no_grad():
        sums = {
            (model, side): [float(sum(oracle.token_logprobs(m, chat(tokenizer, row[0], row[side])))) for row in triples]
            for model, m in (("policy", slow_policy), ("reference", slow_reference))
            for side in (1, 2)
        }
    rewards = {s: [BETA * (p - r) for p, r in zip(sums["policy", s], sums["reference", s], strict=True)] for s in (1, 2)}
    margins = [chosen - rejected for chosen, rejected in zip(rewards[1], rewards[2], strict=True)]
    line = metric_lines(tmp_path / "run")[0]
    wanted = {
        "logps/chosen": np.mean(sums["policy", 1]),
        "logps/rejected": np.mean(sums["policy", 2]),
        "rewards/chosen": np.mean(rewards[1]),
        "rewards/rejected": np.mean(rewards[2]),
        "rewards/margins": np.mean(margins),
        "rewards/accuracies": np.mean([margin > 0 for margin in margins]),
        "loss": np.mean([np.log1p(np.exp(-margin)) for margin in margins]),
    }
    assert {name: line[name] for name in wanted} == pytest.approx(wanted, abs=20 * TOKEN_LOGPROB)  # sums of up to 20 tokens


@pytest.mark.parametrize(("architecture", "kernel"), KERNELS)
def test_packed_logprobs_and_gradients_equal_the_oracle(
    architecture: Any, kernel: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Segments of one token, of prompt and answer, and longer than the sliding window."""
    window = {"sliding_window": 8} if architecture == "gpt_oss" else {}
    model = sharpened(tiny_model(tokenizer, architecture=architecture, **window))
    segments = [
        random_segment(0, 20),
        random_segment(1, 1),
        random_segment(2, 9, [False] * 4 + [True] * 5),
        random_segment(3, 33, [t % 3 > 0 for t in range(33)]),
        random_segment(4, 2),
    ]
    row = pack(segments)
    factors = torch.randn(row.num_scored, generator=torch.Generator().manual_seed(0))
    truth = truth_of(model, [sample(segment) for segment in segments], factors)
    policy = Policy(model, kernel)
    got = policy(row).logprobs
    assert float((got.double() - truth.logprobs).abs().max().detach()) <= truth.logprob_tolerance
    (got * factors).sum().backward()
    fast = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in policy.model.named_parameters()}
    assert relative_error(fast, truth.gradients) <= truth.gradient_tolerance


def test_the_sliding_window_decides_the_logprobs_of_this_check(tokenizer: PreTrainedTokenizerFast) -> None:
    """So the equality above would not hold with a wrong window."""
    segments = [random_segment(3, 33)]
    with torch.no_grad():
        windows = [
            Policy(sharpened(tiny_model(tokenizer, architecture="gpt_oss", sliding_window=w)))(pack(segments)).logprobs
            for w in (8, 9)
        ]
    assert torch.equal(windows[0][:7], windows[1][:7])
    assert float((windows[0] - windows[1]).abs().max()) > 100 * TOKEN_LOGPROB


def test_a_final_checkpoint_loads_in_transformers_with_the_oracles_logits(story: Story) -> None:
    """What others load is what was trained."""
    folder, _ = story.run(BATCH, resumed=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "run_final")
    ids = torch.arange(20)[None]
    slow = oracle.float64_copy(tiny_model_like(model))
    slow.load_state_dict(story.weights, strict=False)
    with torch.no_grad():
        assert float((model(ids).logits - slow(ids).logits).abs().max()) <= 100 * WEIGHT


def tiny_model_like(model: PreTrainedModel) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(model.config)
