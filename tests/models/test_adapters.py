"""Adapters in a model: the gradients of the formulas, nothing else trains, off is off to the last bit, merged is the same."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import families, random_model
from helpers import identical, random_segment, save_start, sharpened, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import GRADIENT, TOKEN_LOGPROB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from modern_llm.checkpoint import weights_hash, write_manifest
from modern_llm.config import UserError
from modern_llm.config.adapter import AdapterConfig
from modern_llm.initial.checkpoint import load_model
from modern_llm.layout import pack
from modern_llm.models.adapter_folders import AdapterBase, adapter_weights, load_adapter_weights, save_adapter
from modern_llm.models.adapters import adapter_layers, adapters_off, add_adapter, keep_frozen_in, state_without_adapters
from modern_llm.models.policy import Policy
from modern_llm.precision import autocast

KINDS = ("lora", "dora")
SMALL = {"rank": 4, "alpha": 6.0}
FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox", "phi3", "gemma2", "gpt_oss", "opt")
CPU = torch.device("cpu")


def adapted(model: PreTrainedModel, trained: bool = True, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """The model with adapters, whose B and magnitudes are as training might have left them."""
    add_adapter(model, AdapterConfig(**{**SMALL, **settings}), seed)
    if trained:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in adapter_weights(model).items():
                noise = torch.randn(weight.shape, generator=generator)
                if "lora_B" in name:
                    weight.copy_(0.05 * noise)
                elif "magnitude" in name:
                    weight.mul_(1 + 0.1 * noise)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def ids_of(model: PreTrainedModel) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=ids_of(model), use_cache=False).logits.float()


def row() -> Any:
    return pack([random_segment(i, n) for i, n in enumerate((7, 20, 13))])


# Formulas


class OneLayer(PreTrainedModel):
    """A model that is one layer, for gradients by hand."""

    def __init__(self, layer: nn.Module) -> None:
        from transformers import PreTrainedConfig

        super().__init__(PreTrainedConfig())
        self.layer = layer

    def get_output_embeddings(self) -> None:
        return None


def one_layer(conv1d: bool = False, bias: bool = True) -> OneLayer:
    torch.manual_seed(0)
    layer = Conv1D(5, 7) if conv1d else nn.Linear(7, 5, bias=bias)
    return OneLayer(layer.double()).double()


def dense(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """W (out, in), A and B of a layer, all to be differentiated."""
    w = layer.get_base_layer().weight.detach()
    w = (w.T if layer.fan_in_fan_out else w).clone().requires_grad_()
    return w, layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("conv1d", [False, True])
def test_loras_gradients_are_those_of_the_dense_weight_times_the_other_factor(conv1d: bool) -> None:
    """y = (W + c B A) x. With G = ∂loss/∂(the sum): ∂A = c Bᵀ G, ∂B = c G Aᵀ. By hand, in float64."""
    model = adapted(one_layer(conv1d), kind="lora")
    layer: Any = model.layer
    x = torch.randn(11, 7, dtype=torch.float64)
    target = torch.randn(11, 5, dtype=torch.float64)
    (layer(x) - target).pow(2).sum().backward()
    w, a, b = dense(layer)
    c = 6.0 / 4
    summed = (w + c * b @ a).detach().requires_grad_()
    (x @ summed.T + layer.get_base_layer().bias.detach() - target).pow(2).sum().backward()
    g = summed.grad
    assert g is not None
    torch.testing.assert_close(a.grad, c * b.detach().T @ g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.grad, c * g @ a.detach().T, rtol=1e-12, atol=1e-12)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "layer.lora_A.default.weight",
        "layer.lora_B.default.weight",
    ]


@pytest.mark.parametrize(("conv1d", "bias"), [(False, True), (False, False), (True, True)])
def test_doras_output_and_gradients_are_those_of_the_papers_formula(conv1d: bool, bias: bool) -> None:
    """arXiv 2402.09353 eq. 5 with its norm as a constant (section 4.3), written out on the dense weight."""
    model = adapted(one_layer(conv1d, bias), kind="dora")
    layer: Any = model.layer
    x = torch.randn(11, 7, dtype=torch.float64)
    y = layer(x)
    y.pow(3).sum().backward()
    w, a, b = dense(layer)
    m = layer.lora_magnitude_vector["default"].weight
    a2, b2, m2 = (p.detach().clone().requires_grad_() for p in (a, b, m))
    summed = w.detach() + 1.5 * b2 @ a2
    scaled = (m2 / summed.norm(dim=1).detach())[:, None] * summed
    wanted = x @ scaled.T + (layer.get_base_layer().bias.detach() if bias else 0)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    wanted.pow(3).sum().backward()
    for got, want in ((a, a2), (b, b2), (m, m2)):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_ours_and_one_of_pefts_give_the_same_logits_and_gradients(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(sharpened(tiny_model(tokenizer)), kind=kind)
    theirs = get_peft_model(
        sharpened(tiny_model(tokenizer)), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=kind == "dora")
    )
    names = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in trainable(model).items():
            names[f"base_model.model.{name}"].copy_(weight)
    assert len(names) == len(trainable(model))
    segments = [random_segment(i, n) for i, n in enumerate((7, 20, 13))]
    policy = Policy(model)
    got = policy(pack(segments)).logprobs
    got.sum().backward()
    wanted = []
    for segment in segments:
        ids = torch.from_numpy(segment.ids).long()
        wanted.append(theirs(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1))
    torch.cat(wanted).sum().backward()
    assert float((got - torch.cat(wanted)).detach().abs().max()) <= TOKEN_LOGPROB
    for name, p in trainable(model).items():
        other = names[f"base_model.model.{name}"].grad
        assert p.grad is not None
        assert other is not None
        assert float((p.grad - other).norm()) <= GRADIENT * float(other.norm()) + 1e-7, name


# What trains, and where it starts


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_fp32_alone_train_and_change_nothing_before_their_first_update(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = sharpened(tiny_model(tokenizer))
    before = logits(model)
    random_state = torch.get_rng_state()
    adapted(model, trained=False, kind=kind)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(logits(model), before)
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    assert len(adapter_layers(model)) == 2 * 7
    assert type(model).__name__ == "Qwen3ForCausalLM"


def test_initial_adapters_are_a_function_of_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (adapter_weights(adapted(tiny_model(tokenizer), trained=False, seed=seed)) for seed in (0, 0, 1))
    assert identical(first, again)
    assert not identical(first, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_off_is_the_base_to_the_last_bit_and_on_again_what_it_was(
    kind: str, precision: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    def ask(policy: Policy) -> Tensor:
        with torch.no_grad(), autocast(precision, CPU):
            return policy(row()).logprobs

    base = ask(Policy(sharpened(tiny_model(tokenizer))))
    fresh = adapted(sharpened(tiny_model(tokenizer)), trained=False, kind=kind)
    policy = Policy(adapted(sharpened(tiny_model(tokenizer)), kind=kind))
    for model in (fresh, policy.model):
        if precision != torch.float32:
            keep_frozen_in(model, precision)
    on = ask(policy)
    with adapters_off(policy.model):
        assert torch.equal(ask(policy), base)
    assert not torch.equal(on, base)
    assert torch.equal(ask(policy), on)
    assert set(trainable(policy.model)) == set(trainable(fresh))


def test_a_base_has_one_hash_with_and_without_adapters(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = weights_hash(tiny_model(tokenizer))
    for seed in (0, 1):
        model = adapted(tiny_model(tokenizer), seed=seed)
        with adapters_off(model):
            assert weights_hash(state_without_adapters(model)) == bare
    with pytest.raises(AssertionError):
        state_without_adapters(model)


@pytest.mark.parametrize(("family", "kind"), [*((family, "lora") for family in FAMILIES), ("llama", "dora"), ("gpt2", "dora")])
def test_frozen_weights_in_bf16_change_no_loss_and_no_gradient(family: str, kind: str) -> None:
    """Autocast casts them at every use, so keeping them in bf16 gives the same bits."""
    results = []
    for keep in (False, True):
        model = adapted(sharpened(random_model(families()[family])), kind=kind)
        policy = Policy(model)
        if keep:
            keep_frozen_in(model, torch.bfloat16)
            kept = [p for p in model.parameters() if p.dtype == torch.bfloat16]
            assert len(kept) >= len(adapter_layers(model))
        with autocast(torch.bfloat16, CPU):
            logprobs = policy(row()).logprobs
        logprobs.sum().backward()
        results.append((logprobs.detach(), {n: p.grad for n, p in trainable(model).items() if p.grad is not None}))
    (loss, gradients), (same_loss, same_gradients) = results
    assert gradients
    assert torch.equal(loss, same_loss)
    assert identical(gradients, same_gradients)


# Families


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_packed_and_merges_into_a_plain_folder_with_the_same_logits(family: str, tmp_path: Path) -> None:
    base = sharpened(random_model(families()[family]))
    base.save_pretrained(tmp_path / "base")
    for kind in KINDS:
        model = adapted(load_model(tmp_path / "base"), kind=kind)
        on = logits(model)
        assert Policy(model).packs
        folder = tmp_path / kind
        folder.mkdir()
        save_adapter(model, adapter_weights(model), folder, folder, AdapterBase(str(tmp_path / "base"), "", None))
        merged = load_model(folder)
        assert not adapter_layers(merged)
        merged.save_pretrained(tmp_path / f"{kind}-merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-merged", dtype=torch.float32)
        scale = float(on.abs().max())
        assert float((logits(plain) - on).abs().max()) <= 1e-5 * max(scale, 1)
        theirs = PeftModel.from_pretrained(load_model(tmp_path / "base"), folder)
        assert float((logits(theirs) - on).abs().max()) <= 1e-5 * max(scale, 1)  # type: ignore[arg-type]


# Four bits


def nf4_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "NF4Linear"]


@pytest.mark.parametrize("kind", KINDS)
def test_nf4_is_kept_in_4_bits_passes_the_policys_check_and_is_the_model_that_is_loaded(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    start = save_start(sharpened(tiny_model(tokenizer)), tokenizer, tmp_path / "start")
    full = logits(load_model(start))
    model = adapted(load_model(start), kind=kind, quantize="nf4")
    layers = nf4_layers(model)
    assert len(layers) == 2 * 7
    for layer in layers:
        state = layer.weight.quant_state
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == math.ceil(layer.in_features * layer.out_features / 2)
        assert (state.quant_type, state.nested, state.absmax.dtype) == ("nf4", True, torch.uint8)
    assert model.lm_head.weight.dtype == torch.float32  # type: ignore[union-attr]
    on = logits(model)
    with adapters_off(model):
        assert float((logits(model) - full).abs().max()) > 1e-3
    (tmp_path / "adapter").mkdir()
    section = save_adapter(
        model,
        adapter_weights(model),
        tmp_path / "adapter",
        tmp_path / "adapter",
        AdapterBase(str(start), "", "nf4"),
    )
    del section["adapter"]["base_weights"]
    write_manifest(tmp_path / "adapter", section)
    assert float((logits(load_model(tmp_path / "adapter")) - on).abs().max()) <= 1e-5 * float(on.abs().max())
    assert Policy(model).packs


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_product_of_4_bits_and_its_gradient_are_those_of_what_they_say(precision: torch.dtype) -> None:
    """In eval mode too, after which bitsandbytes' own layer lets no gradient pass on some CPUs."""
    from modern_llm.models.nf4 import NF4Linear, unpacked

    torch.manual_seed(0)
    layer = NF4Linear(nn.Linear(96, 40))
    plain = nn.Linear(96, 40)
    with torch.no_grad():
        plain.weight.copy_(unpacked(layer.weight.data, layer.weight.quant_state))
        plain.bias.copy_(layer.bias)
    results = []
    for module in (layer, plain):
        module.eval()
        module(torch.ones(1, 96))
        module.train()
        x = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with autocast(precision, CPU):
            y = module(x)
        y.float().square().sum().backward()
        results.append((y.dtype, y.detach(), x.grad))
    assert results[0][0] == results[1][0] == precision
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (10, 7), (5, 48), (3, 160), (128, 192)])
@pytest.mark.parametrize("double", [False, True])
def test_what_4_bits_stand_for_is_the_nearest_code_times_the_largest_of_64_weights(shape, double) -> None:
    """In any shape, also where a block of 64 goes over the end of a row, as the packed format has it on every device."""
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    from modern_llm.models.nf4 import unpacked

    weight = 0.08 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = weight.reshape(-1)
    blocks = torch.cat([flat, flat.new_zeros(-len(flat) % 64)]).view(-1, 64)
    largest = blocks.abs().max(1, keepdim=True).values
    code = get_4bit_type("nf4", device="cpu")
    nearest = code[((blocks / largest)[..., None] - code).abs().argmin(-1)]
    expected = (nearest * largest).reshape(-1)[: len(flat)].view(shape)
    got = unpacked(*quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=double))
    # scales in 8 bits are a little off; a block that is read from the wrong place differs by as much as the weights
    assert float((got - expected).abs().max()) <= (0.02 * float(largest.max()) if double else 1e-7)


def test_a_model_without_linear_layers_is_not_quantized() -> None:
    with pytest.raises(UserError, match=r"adapter\.quantize='nf4'.*GPT2LMHeadModel"):
        adapted(random_model(families()["gpt2"]), quantize="nf4")


# Which layers


@pytest.mark.parametrize(
    ("names", "layers"),
    [(("q_proj",), 2), (("q_proj", "v_proj"), 4), (("mlp.up_proj",), 2), (("model.layers.1.self_attn.o_proj",), 1)],
)
def test_target_modules_are_the_ends_of_names(names: tuple[str, ...], layers: int, tokenizer: PreTrainedTokenizerFast) -> None:
    model = adapted(tiny_model(tokenizer), target_modules=names)
    found = {name for name, m in model.named_modules() if hasattr(m, "lora_variant")}
    assert len(found) == layers
    assert all(name.endswith(names) for name in found)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("lm_head",), r"'lm_head' is a table of the vocabulary"),
        (("q_proj", "embed_tokens"), r"'embed_tokens' is a table"),
        (("q_prj",), r"is called 'q_prj'; did you mean 'q_proj'"),
        (("self_attn",), r"no linear layer .* is called 'self_attn'"),
    ],
)
def test_target_modules_that_would_have_no_effect_are_refused(
    names: tuple[str, ...], reason: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=f"adapter.target_modules: .*{reason}|adapter.target_modules: {reason}"):
        adapted(tiny_model(tokenizer), target_modules=names)


# Folders


@pytest.fixture
def base(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return save_start(sharpened(tiny_model(tokenizer)), tokenizer, tmp_path / "base")


def foreign(base: Path, folder: Path, **settings: Any) -> Path:
    """What a user of peft has."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(load_model(base), LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(folder)
    return folder


def test_a_folder_of_pefts_is_merged_with_the_model_that_it_names(base: Path, tmp_path: Path) -> None:
    folder = foreign(base, tmp_path / "foreign", use_rslora=True)
    wanted = logits(PeftModel.from_pretrained(load_model(base), folder))  # type: ignore[arg-type]
    random_state = torch.get_rng_state()
    model = load_model(folder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert float((logits(model) - wanted).abs().max()) <= 1e-5
    assert not float((logits(load_model(base)) - wanted).abs().max()) <= 1e-3
    assert not hasattr(model, "peft_config")
    model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def _edit(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_pickled, "no adapter_model.safetensors is there; adapters in other files"),
        (lambda folder: _edit(folder, base_model_name_or_path="../absent"), r"model under its adapters is not there.*absent"),
        (lambda folder: _edit(folder, base_model_name_or_path=None), "does not say which model"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "damaged adapter_config.json"),
        (lambda folder: _edit(folder, target_modules=["q_proj"]), "do not fit the model under them"),
        (lambda folder: _edit(folder, target_modules=["q_proj", "down_proj", "up_proj"]), "do not fit the model under them"),
        (lambda folder: _edit(folder, r=2), "do not fit the model under them"),
        (lambda folder: _edit(folder, base_model_name_or_path="."), "is not there"),
    ],
)
def test_a_folder_that_cannot_be_merged_is_refused_with_the_reason(
    change: Any, reason: str, base: Path, tmp_path: Path
) -> None:
    folder = foreign(base, tmp_path / "foreign")
    change(folder)
    with pytest.raises(UserError, match=reason) as refused:
        load_model(folder, "sft_checkpoint")
    assert str(refused.value).startswith(f"sft_checkpoint='{folder}'")


def test_an_adapter_on_a_tied_head_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tied = save_start(tiny_model(tokenizer, tie_embeddings=True), tokenizer, tmp_path / "tied")
    folder = foreign(tied, tmp_path / "foreign", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="the head shares its weights"):
        load_model(folder)


def test_adapter_weights_come_back_to_the_last_bit(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = adapted(tiny_model(tokenizer), kind="dora")
    save_adapter(model, adapter_weights(model), tmp_path, tmp_path, AdapterBase("somebody/model", "", None))
    other = adapted(tiny_model(tokenizer), trained=False, seed=9, kind="dora")
    load_adapter_weights(other, tmp_path)
    assert identical(adapter_weights(other), adapter_weights(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/model"
