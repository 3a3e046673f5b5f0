"""The balance loss of mixture-of-experts models: by hand, the same for every micro-batch, and it evens out the load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ANSWERS,
    QUESTIONS,
    WRONG,
    identical,
    logged,
    make_loop,
    random_examples,
    random_segment,
    recorded_gradients,
    relative_error,
    save_start,
    sharpened,
    tiny_model,
    write_jsonl,
)
from tolerances import SPLIT_GRADIENT, SPLIT_LOSS
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig, UserError
from modern_llm.data.loader import micro_batches
from modern_llm.data.prepared import Example
from modern_llm.models.policy import Policy
from modern_llm.models.recomputation import recompute_activations
from modern_llm.models.routing import RouterRecorder, Routing
from modern_llm.objectives import LanguageModelingObjective, Objective, PreferenceObjective
from modern_llm.objectives.balance import Balanced, expert_balance
from modern_llm.training.train_dpo import run_dpo

ROUTED = ("qwen3_moe", "gpt_oss")
PACK = Example((random_segment(11, 7), random_segment(12, 5)), row=4)
EXAMPLES = [*random_examples((9, 14, 5, 20)), PACK]


def routed_model(architecture: str, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedModel:
    return sharpened(tiny_model(tokenizer, architecture=architecture, n_experts=4, n_experts_per_token=2, **changes))


def test_value_and_gradient_by_hand() -> None:
    """N = 3, K = 1; tokens a, b, c of one example and d of another, with probabilities in eighths:

        a (4, 2, 2) → 0,  b (6, 1, 1) → 0,  c (2, 4, 2) → 1    f = (2/3, 1/3, 0),  P = (12, 7, 5)/24
        3 · (2/3 · 12/24 + 1/3 · 7/24) = 31/24
        d (1, 1, 6) → 2                                         3 · 6/8 = 9/4

    The most used expert has 2/3 of the first example's choices and all of the second's. By the logit of expert i the softmax's
    derivative of Σ f P is p_i (f_i − Σ_j f_j p_j): for c, Σ_j f_j p_j = 2/3 · 1/4 + 1/3 · 1/2 = 1/3.
    """
    probabilities = torch.tensor([[4, 2, 2], [6, 1, 1], [2, 4, 2], [1, 1, 6]], dtype=torch.float64) / 8
    logits = (probabilities.log() + torch.tensor([[0.0], [1.0], [-2.0], [5.0]])).requires_grad_()
    routing = Routing(logits, torch.tensor([[0], [0], [1], [2]]))
    loss, largest = expert_balance([routing], torch.tensor([3, 1]))
    assert loss.dtype == torch.float64
    assert loss.tolist() == pytest.approx([31 / 24, 9 / 4], abs=1e-12)
    assert largest.tolist() == pytest.approx([2 / 3, 1], abs=1e-12)
    loss[0].backward()
    assert logits.grad is not None
    # N/T = 1: ¼ (2/3 − 1/3), ½ (1/3 − 1/3), ¼ (0 − 1/3)
    assert logits.grad[2].tolist() == pytest.approx([1 / 12, 0, -1 / 12], abs=1e-12)
    assert logits.grad[3].tolist() == [0, 0, 0]


def test_an_even_load_gives_one_and_layers_are_averaged() -> None:
    """Even: every expert gets ½ of the choices of K = 2 of N = 4, and every probability is ¼. All to experts 0 and 1 with
    probabilities ½: 4 · (½ · ½ + ½ · ½) = 2."""
    even = Routing(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]))
    skewed = Routing(torch.tensor([[9.0, 9.0, -99.0, -99.0]]).repeat(2, 1), torch.tensor([[0, 1], [1, 0]]))
    for layers, loss, share in (([even], 1.0, 1 / 4), ([skewed], 2.0, 1 / 2), ([even, skewed], 1.5, 3 / 8)):
        got = expert_balance(layers, torch.tensor([2]))
        assert [float(value) for value in got] == pytest.approx([loss, share])


@pytest.mark.parametrize("architecture", ROUTED)
def test_it_is_of_what_the_routers_did(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Logits and choices of an unpacked forward pass, each example alone.

    For one example and one layer transformers' function is the same but for the factor K.
    """
    model = routed_model(architecture, tokenizer, n_layers=1)
    wanted = []
    with torch.no_grad():
        for example in EXAMPLES[:-1]:
            ids = torch.from_numpy(example.segments[0].ids)[None].long()
            logits = model(input_ids=ids, output_router_logits=True).router_logits
            wanted.append(float(load_balancing_loss_func(logits, 4, 2)) / 2)
    policy = Policy(model)
    batch = next(micro_batches(EXAMPLES[:-1], 4))
    recorder = RouterRecorder(model)
    with recorder.recording() as layers:
        policy(batch.row)
    loss, _ = expert_balance([layer for layer in layers if layer], torch.tensor(batch.example_tokens))
    assert loss.tolist() == pytest.approx(wanted, rel=1e-4)
    kept = list(layers)
    policy(batch.row)
    assert all(now is before for now, before in zip(layers, kept, strict=True)), "nothing is kept of other passes"


def gradients(model: PreTrainedModel, folder: Path, **settings: Any) -> dict[str, Tensor]:
    with recorded_gradients() as steps:
        make_loop(model, EXAMPLES, folder, batch_size=5, max_steps=1, max_grad_norm=None, balance_loss=0.5, **settings).run()
    return steps[0]


@pytest.mark.parametrize("architecture", ROUTED)
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(
    architecture: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = gradients(routed_model(architecture, tokenizer), tmp_path / "5", micro_batch_size=5)
    for folder, micro_batch in {"1": {"micro_batch_size": 1}, "tokens": {"micro_batch_tokens": 25}}.items():
        parts = gradients(routed_model(architecture, tokenizer), tmp_path / folder, **micro_batch)
        assert relative_error(parts, whole) <= SPLIT_GRADIENT
        for name in ("loss", "balance_loss", "largest_expert_share"):
            assert logged(tmp_path / folder, name) == pytest.approx(logged(tmp_path / "5", name), rel=SPLIT_LOSS)


def test_the_gradient_is_that_of_the_loss_plus_the_weighted_balance(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Σ of both, each divided by its own count, against autograd; the logged loss stays that of the data."""
    model = routed_model("qwen3_moe", tokenizer)
    got = gradients(model, tmp_path, micro_batch_size=1)
    policy = Policy(routed_model("qwen3_moe", tokenizer))
    batch = next(micro_batches(EXAMPLES, 5))
    recorder = RouterRecorder(policy.model)
    with recorder.recording() as layers:
        nll = LanguageModelingObjective()(policy, batch).terms["nll"].total / batch.counts["tokens"]
    balance, _ = expert_balance([layer for layer in layers if layer], torch.tensor(batch.example_tokens))
    (nll + 0.5 * balance.mean()).backward()
    wanted = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert relative_error(got, wanted) <= SPLIT_GRADIENT
    assert logged(tmp_path, "loss") == pytest.approx([nll.item()], rel=SPLIT_LOSS)
    assert logged(tmp_path, "balance_loss") == pytest.approx([balance.mean().item()], rel=SPLIT_LOSS)


def test_gradient_checkpointing_gives_the_same_gradient(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    wanted = gradients(routed_model("qwen3_moe", tokenizer), tmp_path / "kept", micro_batch_size=1)
    model = routed_model("qwen3_moe", tokenizer)
    recompute_activations(model)
    assert identical(gradients(model, tmp_path / "recomputed", micro_batch_size=1), wanted)


def test_training_with_it_evens_out_the_load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Routers that send nearly every token to the same two of four experts; only they learn."""
    shares = {}
    for weight in (0.0, 1.0):
        model = routed_model("gpt_oss", tokenizer)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("router" in name)
            if name.endswith("router.bias"):
                with torch.no_grad():
                    parameter.copy_(torch.tensor([6.0, 6.0, -6.0, -6.0]))
        folder = tmp_path / str(weight)
        loop = make_loop(
            model, random_examples([32] * 8), folder, batch_size=8, micro_batch_size=8, max_steps=20, learning_rate=0.15,
            lr_schedule="constant", balance_loss=weight or 1e-9,
        )  # fmt: skip
        loop.run()
        shares[weight] = logged(folder, "largest_expert_share")
    assert shares[1.0][0] == shares[0.0][0] > 0.49, "½ is the most that one expert of K = 2 can have"
    assert shares[1.0][-1] < 0.35
    assert shares[0.0][-1] > 0.45, "the loss of the data alone does not even it out"


def test_evaluations_log_it_and_leave_the_model_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loop = make_loop(routed_model("qwen3_moe", tokenizer), EXAMPLES, tmp_path, batch_size=5, max_steps=1, balance_loss=0.5)
    values = loop.evaluate(EXAMPLES)
    plain = make_loop(routed_model("qwen3_moe", tokenizer), EXAMPLES, tmp_path, batch_size=5, max_steps=1)
    assert values["loss"] == plain.evaluate(EXAMPLES)["loss"]
    assert 1 <= values["balance_loss"] <= 4
    assert 0.25 <= values["largest_expert_share"] <= 0.5


def test_preference_training_has_it_too(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One prompt with two answers is an example; `aot` looks at the whole step and takes two passes."""
    start = save_start(routed_model("qwen3_moe", tokenizer), tokenizer, tmp_path / "start")
    rows = [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in zip(QUESTIONS, ANSWERS, WRONG, strict=True)]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    for micro_batch in (1, 6):
        settings = TrainingConfig(
            output_dir=tmp_path / str(micro_batch), batch_size=6, micro_batch_size=micro_batch, max_steps=2, warmup_steps=0,
            log_every=1, learning_rate=1e-3, mixed_precision="fp32", balance_loss=1.0,
        )  # fmt: skip
        run_dpo(start, settings, DPOConfig(loss_type="aot"), pairs)
    for name in ("loss", "balance_loss", "largest_expert_share"):
        assert logged(tmp_path / "1", name) == pytest.approx(logged(tmp_path / "6", name), rel=1e-5)
    falls = logged(tmp_path / "6", "balance_loss")
    assert falls[1] < falls[0]


def test_a_model_without_routers_is_refused_by_name(tokenizer: PreTrainedTokenizerFast, start: Path, tmp_path: Path) -> None:
    message = r"balance_loss evens out the experts of gpt_oss, .*qwen3_moe, and this is a Qwen3ForCausalLM \(qwen3\)"
    with pytest.raises(UserError, match=message):
        Balanced(LanguageModelingObjective(), Policy(tiny_model(tokenizer)), 0.1)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    with pytest.raises(UserError, match=message):
        run_dpo(
            start,
            TrainingConfig(output_dir=tmp_path / "run", batch_size=1, balance_loss=0.1),
            DPOConfig(),
            PreferenceDatasetConfig(dataset_name=str(rows)),
        )
    assert not (tmp_path / "run").exists()


def test_it_passes_on_all_that_an_objective_does(tokenizer: PreTrainedTokenizerFast) -> None:
    inner = PreferenceObjective(DPOConfig(loss_type="aot"))
    outer = Balanced(inner, Policy(routed_model("qwen3_moe", tokenizer)), 0.1)
    methods = {name for name, value in vars(Objective).items() if callable(value) and not name.startswith("__")}
    assert methods <= vars(Balanced).keys()
    for name in Objective.__annotations__.keys() - {"units"}:
        assert name in vars(outer)
        assert getattr(outer, name) == getattr(inner, name)
