"""The policy over hub families as plain folders: equal to the oracle, packed or padded; dropout; gradient checkpointing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from condition import truth_of
from families import GPT, GROUPED, OWN_HEAD, PADDED, VOCAB, WINDOW, families, random_model
from helpers import ARCHITECTURES, random_segment, relative_error, sample, sharpened, tiny_model
from layouts import apart, everything
from tolerances import SPLIT_GRADIENT
from transformers import (
    AutoConfig,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPTNeoConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StableLmConfig,
)

from modern_llm.config import UserError
from modern_llm.config.adapter import AdapterConfig
from modern_llm.initial.checkpoint import load_model
from modern_llm.layout import pack
from modern_llm.models.adapters import add_adapter
from modern_llm.models.policy import Policy, disable_dropout

LLAMA4 = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": WINDOW}
"""Its attention sees chunks, and its body is not reached as other families' is."""
WIDER = {**GROUPED, "hidden_size": 256, "intermediate_size": 512}
"""Wide enough for the short convolutions of fresh weights to show."""
GPT_NEO: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
"""Its local attention counts places in the row."""
SMALL_FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def folder_model(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    sharpened(random_model(config)).save_pretrained(folder)
    return load_model(folder)


@pytest.mark.parametrize("family", families())
def test_hub_families_equal_the_oracle_in_logprobs_and_gradients(family: str, tmp_path: Path) -> None:
    """With shared prompts and with each answer's own; documents, chats and pairs, shorter and longer than the windows."""
    model = folder_model(families()[family], tmp_path)
    truth = truth_of(model, [sample(segment) for segment in everything()])
    policy = Policy(model)
    assert policy.packs == (family not in PADDED)
    assert (policy.note is None) == policy.packs
    assert policy.plain_head == (family not in OWN_HEAD)
    for segments in (everything(), apart(everything())):
        policy.zero_grad()
        got = policy(pack(segments)).logprobs
        assert float((got.double() - truth.logprobs).abs().max().detach()) <= truth.logprob_tolerance
        got.sum().backward()
        fast = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        assert relative_error(fast, truth.gradients) <= truth.gradient_tolerance


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("mistral", "sliding_window", 30),
        ("phimoe", "sliding_window", 30),
        ("gemma2", "sliding_window", 30),
        ("gemma3", "sliding_window", 30),
        ("gpt_oss", "sliding_window", 30),
        ("gemma2", "attn_logit_softcapping", None),
    ],
)
def test_the_windows_and_caps_of_the_check_above_matter(family: str, option: str, value: Any) -> None:
    """Without them the log-probs are far from equal, so the equality is no accident of small weights."""
    configs = families()[family], families()[family]
    setattr(configs[1], option, value)
    with torch.no_grad():
        one, other = (
            torch.stack([value for segment in everything() for value in oracle.token_logprobs(model, sample(segment))])
            for model in (oracle.float64_copy(sharpened(random_model(config))) for config in configs)
        )
    assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize("family", sorted(OWN_HEAD))
def test_a_capped_or_scaled_head_is_seen_in_a_model_whose_logits_are_still_small(family: str) -> None:
    """Fresh weights give logits near 0, where a soft cap changes nothing yet; as they grow in training it does."""
    config = families()[family]
    if family == "gemma2":
        config.final_logit_softcapping = 30.0
    assert not Policy(random_model(config)).plain_head


MAMBA = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["fresh weights", "sharp weights"])  # Mamba's recurrence blows up rounding
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("MambaForCausalLM", MAMBA),
        ("BloomForCausalLM", BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
        ("Lfm2ForCausalLM", Lfm2Config(**WIDER, layer_types=["conv", "full_attention"])),
        ("Llama4ForCausalLM", Llama4TextConfig(**LLAMA4)),
        ("FalconForCausalLM", FalconConfig(**SMALL_FALCON, alibi=True)),
        ("StableLmForCausalLM", StableLmConfig(**GROUPED)),
        ("GPTNeoForCausalLM", GPTNeoConfig(**GPT_NEO)),
        ("GPTJForCausalLM", families()["gptj"]),
        ("CodeGenForCausalLM", CodeGenConfig(**GPT, rotary_dim=4, bos_token_id=0, eos_token_id=0)),
    ],
)
def test_what_packing_cannot_do_runs_padded_and_equals_the_oracle(
    name: str, config: PreTrainedConfig, scale: float, tmp_path: Path
) -> None:
    sharpened(random_model(config), scale).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    samples = [sample(segment) for segment in everything()]
    factors = torch.randn(sum(sum(scored[1:]) for _, scored in samples), generator=torch.Generator().manual_seed(0))
    truth = truth_of(model, samples, factors)
    policy = Policy(model)
    assert not policy.packs
    assert policy.note is not None
    assert policy.note.startswith(f"{name} cannot run on packed rows")
    got = policy(pack(everything())).logprobs
    assert float((got.double() - truth.logprobs).abs().max().detach()) <= truth.logprob_tolerance
    (got * factors).sum().backward()
    fast = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in policy.model.named_parameters()}
    assert relative_error(fast, truth.gradients) <= truth.gradient_tolerance
    with pytest.raises(UserError, match=f"{name} cannot be trained with attention='sdpa'"):
        Policy(load_model(tmp_path), "sdpa")


@pytest.mark.parametrize(
    ("config", "scale", "mistake"),
    [(MAMBA, 2.0, "position"), (families()["gemma2"], 4.0, "position"), (families()["gemma2"], 4.0, "head")],
    ids=["mamba-position", "gemma2-position", "gemma2-head"],
)
def test_a_mistake_is_far_beyond_the_tolerance_that_the_model_demands(
    config: PreTrainedConfig, scale: float, mistake: str
) -> None:
    """A position off by one, and a soft cap that is left out, in value and gradient."""
    model = sharpened(random_model(config), scale)
    truth = truth_of(model, [sample(segment) for segment in everything()])
    policy, row = Policy(model), pack(everything())
    if mistake == "head":
        policy.plain_head = True
    else:
        row = replace(row, predicting=(row.predicting - 1).clamp(min=0))
    got = policy(row).logprobs
    assert float((got.double() - truth.logprobs).abs().max().detach()) > 1000 * truth.logprob_tolerance
    got.sum().backward()
    fast = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert relative_error(fast, truth.gradients) > 100 * truth.gradient_tolerance


def test_the_fused_kernel_is_refused_where_it_cannot_do_what_the_model_asks(tokenizer: PreTrainedTokenizerFast) -> None:
    for model in (tiny_model(tokenizer, architecture="gpt_oss"), random_model(families()["gemma2"])):
        with pytest.raises(UserError, match=f"{type(model).__name__}.*attention='sdpa'.*use 'auto' or 'eager'"):
            Policy(model, "sdpa")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_recomputes_to_equal_gradients(
    architecture: Any, dropout: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    gradients, forwards = [], [0, 0]
    for checkpointing in (0, 1):
        model = sharpened(tiny_model(tokenizer, architecture=architecture, dropout=dropout))
        policy = Policy(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

        def count(*seen: Any, run: int = checkpointing) -> None:
            forwards[run] += 1

        model.model.layers[0].mlp.register_forward_pre_hook(count)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            policy(pack(everything())).logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert forwards == [1, 2]
    assert relative_error(gradients[1], gradients[0]) <= SPLIT_GRADIENT


@pytest.mark.parametrize("family", sorted(families().keys() - {"phimoe"}))  # which draws its experts at random in train mode
def test_disable_dropout_makes_train_mode_equal_eval_mode(family: str) -> None:
    model = random_model(families(0.5)[family])
    policy, row = Policy(model), pack(everything())
    with torch.no_grad():
        quiet = policy.eval()(row).logprobs
        assert not torch.equal(policy.train()(row).logprobs, quiet), "dropout of 0.5 must show in train mode"
        disable_dropout(model)
        assert all(torch.equal(policy.train()(row).logprobs, quiet) for _ in range(8)), "a layer dropped now and then shows too"


@pytest.mark.parametrize("adapters", [False, True])
def test_a_model_that_fails_by_itself_is_one_line_with_its_own_reason(adapters: bool) -> None:
    """Latent attention has as many keys as queries; this config says half."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    model = random_model(AutoConfig.for_model("deepseek_v3", **{**GROUPED, **latent, **experts}))
    if adapters:
        add_adapter(model, AdapterConfig(rank=4, target_modules=("o_proj",)), 0)
    said = "DeepseekV3ForCausalLM with adapters on o_proj fails" if adapters else "DeepseekV3ForCausalLM fails"
    with pytest.raises(UserError, match=rf"^{said} on 3 tokens \(RuntimeError: .*size of tensor.*\): correct its config.json$"):
        Policy(model)


def test_the_check_moves_no_random_state_and_leaves_the_mode(tokenizer: PreTrainedTokenizerFast) -> None:
    for training in (True, False):
        model = tiny_model(tokenizer, dropout=0.5).train(training)
        before = torch.get_rng_state()
        policy = Policy(model)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training == policy.model.training == training


def test_an_empty_set_of_targets_gives_empty_scores_that_a_gradient_can_pass(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(tiny_model(tokenizer))
    scores = policy(pack([random_segment(0, 4, scored=False)]))
    assert scores.logprobs.shape == scores.correct.shape == (0,)
    scores.logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_the_saved_config_does_not_name_the_packed_attention(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A folder that named it would load nowhere else."""
    Policy(tiny_model(tokenizer)).model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text(encoding="utf-8")
