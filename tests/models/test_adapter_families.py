"""Where adapters go, family by family: on every linear layer that can learn, the rest named; the folder means the same to peft.

The families are those whose linear layers are not all alike: weights that a kernel reads, routers that choose, fused experts
whose old names are those of layers, layers that no gradient reaches.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import GROUPED, VOCAB, WINDOW, families, random_model
from helpers import identical, random_segment, sharpened
from peft import PeftModel
from tolerances import GRADIENT, TOKEN_LOGPROB
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modern_llm.config import UserError
from modern_llm.config.adapter import AdapterConfig
from modern_llm.initial.checkpoint import load_model
from modern_llm.layout import pack
from modern_llm.models.adapter_folders import AdapterBase, adapter_weights, save_adapter
from modern_llm.models.adapters import adapter_layers, adapters_off, add_adapter, describe_left_out, keep_frozen_in
from modern_llm.models.idle_adapters import take_out_idle_adapters
from modern_llm.models.linear_layers import linear_layers, used_otherwise
from modern_llm.models.peft_names import ways_into_peft
from modern_llm.models.policy import Policy
from modern_llm.precision import autocast

LONGEST = 20
"""Tokens of the longest sample of these tests."""
MAMBA = {"state_size": 4, "intermediate_size": 64, "time_step_rank": 4}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "mamba": (MAMBA, {"dt_proj": "reads its weight", "out_proj": "reads its weight", "x_proj": "reads its weight"}),
    "falcon_mamba": (MAMBA, {"dt_proj": "reads its weight", "out_proj": "reads its weight", "x_proj": "reads its weight"}),
    "mamba2": (
        {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 8}, {"out_proj": "reads its weight"},
    ),
    "falcon_h1": (
        {
            "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        {"out_proj": "reads its weight"},
    ),
    "nemotron_h": (
        {
            "layers_block_type": ["mamba", "moe", "attention", "mlp"], "num_hidden_layers": 4, "mamba_num_heads": 4,
            "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8, "head_dim": 8, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
        },
        {"out_proj": "reads its weight"},
    ),
    "jamba": (
        {
            "attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 4, "expert_layer_period": 2,
            "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
        },
        {"dt_proj": "reads its weight"},
    ),
    "phimoe": ({"num_local_experts": 4}, {"router": "does not compute W x"}),
    "llama4_text": (
        {
            "intermediate_size_mlp": 64, "num_local_experts": 2, "interleave_moe_layer_step": 2, "head_dim": 8,
            "attention_chunk_size": WINDOW,
        },
        {"router": "does not compute W x"},
    ),
    "glm4_moe": ({**EXPERTS, "head_dim": 8}, {}),
    "deepseek_v3": ({**EXPERTS, **MLA}, {}),
    "dots1": (EXPERTS, {}),
    "longcat_flash": (
        {
            **MLA, "num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "n_routed_experts": 4,
            "zero_expert_num": 2, "moe_topk": 2,
        },
        {"classifier": "reads its weight"},
    ),
    "gemma3n_text": (
        {
            "head_dim": 8, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 64, "laurel_rank": 8, "sliding_window": WINDOW,
        },
        # a random model has zeros for the scale of what the last three do
        {
            "correction_coefs": "reads its weight", "per_layer_input_gate": "no gradient",
            "per_layer_model_projection": "no gradient", "per_layer_projection": "no gradient",
        },
    ),
    "bloom": ({}, {}),
    "falcon": ({}, {}),
}  # fmt: skip
"""{model type: (its shape, {last part of a layer's name: why it has no adapter})}."""


def family_model(family: str, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**GROUPED, **FAMILIES[family][0], **changes})
    return sharpened(random_model(config))


def adapted(model: PreTrainedModel, **settings: Any) -> tuple[Policy, dict[str, str]]:
    """A policy as a stage makes one, and the layers that it leaves without an adapter."""
    config = AdapterConfig(**{"rank": 4, "alpha": 6.0, **settings})
    left_out = add_adapter(model, config, 0)
    policy = Policy(model)
    return policy, left_out | take_out_idle_adapters(policy, config, LONGEST)


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "lora_variant")}


def move(model: PreTrainedModel) -> PreTrainedModel:
    """B as training might have left it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in adapter_weights(model).items():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return model


def saved(policy: Policy, base: Path, folder: Path) -> Path:
    folder.mkdir()
    save_adapter(policy.model, adapter_weights(policy.model), folder, folder, AdapterBase(str(base), "", None))
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_that_can_learn_and_the_others_are_named(family: str) -> None:
    model, expected = family_model(family), FAMILIES[family][1]
    layers = linear_layers(model)
    policy, left_out = adapted(model)
    assert adapted_names(model) == layers.keys() - left_out.keys()
    assert {name.rpartition(".")[2] for name in left_out} == expected.keys()
    assert all(expected[name.rpartition(".")[2]] in reason for name, reason in left_out.items())
    for line, reason in zip(describe_left_out(left_out), dict.fromkeys(left_out.values()), strict=True):
        assert line.startswith("no adapter on ")
        assert line.endswith(reason)
    policy.train()
    policy(pack([random_segment(i, n) for i, n in enumerate((7, LONGEST, 13))])).logprobs.sum().backward()
    for layer in adapter_layers(model):
        assert bool(layer.lora_B["default"].weight.grad.any())


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_transformers_and_the_merged_folder_say_what_the_trained_model_says(family: str, tmp_path: Path) -> None:
    """The folder names its layers so that peft finds them: logits, and gradients where peft goes on training it."""
    family_model(family).save_pretrained(tmp_path / "base")
    off = logits(load_model(tmp_path / "base"))
    policy, _ = adapted(load_model(tmp_path / "base"))
    move(policy.model)
    with policy.as_loaded() as model:
        on = logits(model)
        with adapters_off(model):
            assert float((logits(model) - off).abs().max()) <= 1e-5 * max(1.0, float(off.abs().max()))
    folder = saved(policy, tmp_path / "base", tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load_model(tmp_path / "base"), folder, is_trainable=True)
    plain = load_model(tmp_path / "base")
    plain.load_adapter(str(folder))  # as transformers does it
    for other in (load_model(folder), theirs, plain):
        assert float((logits(other) - on).abs().max()) <= 1e-5 * max(1.0, float(on.abs().max()))  # type: ignore[arg-type]
    assert float((on - off).abs().max()) > 1e-3

    policy.eval()
    segments = [random_segment(i, n) for i, n in enumerate((7, LONGEST, 13))]
    got = policy(pack(segments)).logprobs
    got.sum().backward()
    wanted = []
    for segment in segments:
        ids = torch.from_numpy(segment.ids).long()
        scores = theirs(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        wanted.append(scores.gather(1, ids[1:, None]).squeeze(1))
    torch.cat(wanted).sum().backward()
    assert float((got - torch.cat(wanted)).detach().abs().max()) <= TOKEN_LOGPROB * max(1.0, float(on.abs().max()))
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    own = {f"base_model.model.{name}": p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys()
    scale = max(float(grad.norm()) for grad in gradients.values())  # type: ignore[union-attr]
    for name, grad in gradients.items():
        assert float((own[name] - grad).norm()) <= GRADIENT * (float(grad.norm()) + 1e-2 * scale), name  # type: ignore


@pytest.mark.parametrize("family", ["mamba", "phimoe", "longcat_flash", "llama4_text"])
def test_weights_that_are_used_otherwise_stay_in_fp32_and_frozen_ones_in_bf16_change_no_bit(family: str) -> None:
    results = []
    for keep in (False, True):
        policy, _ = adapted(family_model(family))
        policy.eval()
        if keep:
            keep_frozen_in(policy.model, torch.bfloat16)
            otherwise = used_otherwise(policy.model)
            assert all(policy.model.get_submodule(name).weight.dtype == torch.float32 for name in otherwise)
        with autocast(torch.bfloat16, torch.device("cpu")):
            logprobs = policy(pack([random_segment(i, n) for i, n in enumerate((7, LONGEST))])).logprobs
        logprobs.sum().backward()
        results.append((logprobs.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert identical(*(gradients for _, gradients in results))


# Names that a user gives


@pytest.mark.parametrize(
    ("family", "names", "reason"),
    [
        ("mamba", ("in_proj", "x_proj"), r"'x_proj' cannot have an adapter, since MambaMixer reads its weight directly"),
        ("mamba2", ("out_proj",), "'out_proj' cannot have an adapter"),
        ("phimoe", ("router",), "'router' cannot have an adapter, since PhimoeTopKRouter does not compute W x"),
        ("gemma3n_text", ("q_proj", "per_layer_input_gate"), r"'per_layer_input_gate' stands for layers .* never learn"),
    ],
)
def test_a_layer_that_is_asked_for_by_name_and_cannot_learn_is_refused(
    family: str, names: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UserError, match=rf"adapter\.target_modules: {reason}"):
        adapted(family_model(family), target_modules=names)


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "dots1"])
def test_a_name_that_fused_experts_once_had_stands_for_the_layers_that_have_it(family: str, tmp_path: Path) -> None:
    family_model(family).save_pretrained(tmp_path / "base")
    policy, left_out = adapted(load_model(tmp_path / "base"), target_modules=("gate_proj",), dropout=0.5)
    model = policy.model
    assert adapted_names(model) == {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.gate_proj"}
    assert not left_out
    assert {layer.lora_dropout["default"].p for layer in adapter_layers(model)} == {0.5}
    move(model)
    folder = saved(policy, tmp_path / "base", tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(load_model(tmp_path / "base"), folder)
    with policy.as_loaded():
        assert float((logits(theirs) - logits(model)).abs().max()) <= 1e-4  # type: ignore[arg-type]


def test_dora_is_left_out_where_peft_would_not_load_it(tmp_path: Path) -> None:
    family_model("glm4_moe").save_pretrained(tmp_path / "base")
    policy, left_out = adapted(load_model(tmp_path / "base"), kind="dora")
    assert {name.rpartition(".")[2] for name in left_out} == {"gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in adapted_names(policy.model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    folder = saved(policy, tmp_path / "base", tmp_path / "adapter")
    PeftModel.from_pretrained(load_model(tmp_path / "base"), folder)
    with pytest.raises(UserError, match="'gate_proj' cannot have an adapter, since peft would not load an adapter there"):
        adapted(load_model(tmp_path / "base"), kind="dora", target_modules=("q_proj", "gate_proj"))


def test_what_peft_makes_of_a_name_is_asked_of_peft() -> None:
    layers = {"model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"}
    random_state = torch.get_rng_state()
    assert {*ways_into_peft(family_model("glm4_moe"), layers, False).values()} == {"module", "parameter"}
    assert {*ways_into_peft(random_model(families()["llama"]), layers, True).values()} == {"module"}
    assert ways_into_peft(family_model("mamba"), {"layers.0.out_proj", "layers.0.in_proj"}, False) == {
        "layers.0.out_proj": None,
        "layers.0.in_proj": "module",
    }
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_name_that_transformers_renames_in_adapter_files_is_no_way_into_peft() -> None:
    """The names of Laguna's shared experts match a pattern that is meant for older ones, and get a second dot."""
    model = random_model(AutoConfig.for_model("laguna", **GROUPED, **{
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "sliding_window": WINDOW,
        "shared_expert_intermediate_size": 16, "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [4, 2], "mlp_layer_types": ["dense", "sparse"],
    }))  # fmt: skip
    _, left_out = adapted(model)
    assert left_out
    assert all(".shared_experts." in name for name in left_out)


# Layers that no gradient reaches, and such as only seem so


class Mixture(nn.Module):
    """Experts as modules of their own, the last of which no token ever chooses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat, y = x.reshape(-1, x.shape[-1]), torch.zeros_like(x).reshape(-1, x.shape[-1])
        for i, expert in enumerate(self.experts):
            rows = (torch.arange(len(flat)) % 3 == i).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, expert(flat[rows]))
        return y.view_as(x)


class Parts(nn.Module):
    """A decoder layer's feed-forward network with one part of each kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.plain, self.uncalled, self.detached, self.multiplied, self.before_zeros, self.zeros, self.long = (
            nn.Linear(width, width) for _ in range(7)
        )
        self.mixture = Mixture(width)
        nn.init.zeros_(self.zeros.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.plain(x) + self.detached(x).detach() + 0 * self.multiplied(x) + self.mixture(x)
        return y + self.zeros(self.before_zeros(x)) + (self.long(x) if x.shape[1] > 16 else 0)


@pytest.fixture
def parts() -> PreTrainedModel:
    torch.manual_seed(0)
    model = sharpened(random_model(families()["llama"]))
    for layer in model.model.layers:
        layer.mlp = Parts(32)
    return model


def learning(names: set[str]) -> set[str]:
    return {name.partition(".mlp.")[2] for name in names if ".mlp." in name}


def test_layers_that_cannot_learn_have_no_adapter_and_those_that_may_yet_have_one(parts: PreTrainedModel) -> None:
    """Kept: an expert that was not chosen, what a frozen layer of zeros hides at first, what takes part in long samples."""
    _, left_out = adapted(parts)
    experts = {f"mixture.experts.{i}.0" for i in range(4)}
    assert learning(adapted_names(parts)) == {"plain", "before_zeros", "zeros", "long", *experts}
    assert learning(set(left_out)) == {"uncalled", "detached", "multiplied"}
    assert {*left_out.values()} == {"no gradient reaches it"}
    assert parts.peft_config["default"].target_modules == adapted_names(parts)  # type: ignore[index]


def test_what_takes_part_in_longer_samples_than_there_are_cannot_learn(parts: PreTrainedModel) -> None:
    config = AdapterConfig(rank=4)
    add_adapter(parts, config, 0)
    assert "long" in learning(set(take_out_idle_adapters(Policy(parts), config, longest=16)))


@pytest.mark.parametrize("name", ["uncalled", "detached", "multiplied"])
def test_a_name_none_of_whose_layers_can_learn_is_refused(name: str, parts: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=rf"'{name}' stands for layers whose adapters would never learn: no gradient reaches"):
        adapted(parts, target_modules=("plain", name))


def test_a_name_some_of_whose_layers_can_learn_is_not(parts: PreTrainedModel) -> None:
    class Attached(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.detached(x)

    parts.model.layers[1].mlp = Attached(32)
    _, left_out = adapted(parts, target_modules=("detached",))
    assert adapted_names(parts) == {"model.layers.1.mlp.detached"}
    assert [*left_out] == ["model.layers.0.mlp.detached"]


def test_layers_that_are_dropped_at_random_keep_their_adapters() -> None:
    config = families()["opt"]
    config.layerdrop = 0.5
    model = random_model(config)
    assert not adapted(model)[1]
    assert len(adapter_layers(model)) == 12


@pytest.mark.parametrize("family", ["phimoe", "deepseek_v3"])
def test_a_model_of_shapes_alone_gets_the_same_adapters(family: str) -> None:
    """As a plan is made, without memory for weights."""
    names = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**GROUPED, **FAMILIES[family][0]}))
        add_adapter(model, AdapterConfig(rank=4), 0)
        names.append(adapted_names(model))
    assert names[0] == names[1]


def test_a_shared_weight_has_no_adapter() -> None:
    """The sum could not be merged: it would change the other layer too."""
    model = random_model(families()["llama"])
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    _, left_out = adapted(model)
    assert left_out == dict.fromkeys(
        ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"), "its weight is shared with another layer"
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["phimoe", "gemma3n_text", "parts"])
def test_the_search_moves_no_random_state_and_changes_nothing(family: str, kind: Any, parts: PreTrainedModel) -> None:
    """PhiMoE draws its experts at random in train mode."""
    model = parts if family == "parts" else family_model(family)
    config = AdapterConfig(rank=4, kind=kind)
    add_adapter(model, config, 0)
    policy = Policy(move(model)).eval()

    def state() -> dict[str, Tensor]:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name.replace(".base_layer", ""): tensor.detach().clone() for name, tensor in named.items()}

    before, random_state = state(), torch.get_rng_state()
    take_out_idle_adapters(policy, config, LONGEST)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state().items())
    assert not policy.training
    assert all(p.grad is None for p in policy.parameters())


# 4 bits, and the package for them


def test_nf4_leaves_weights_that_are_read_directly_as_they_are(tmp_path: Path) -> None:
    family_model("jamba").save_pretrained(tmp_path / "base")
    policy, _ = adapted(load_model(tmp_path / "base"), quantize="nf4")
    kinds = {type(policy.model.get_submodule(name)).__name__ for name in used_otherwise(load_model(tmp_path / "base"))}
    assert "NF4Linear" not in kinds
    assert sum(type(module).__name__ == "NF4Linear" for module in policy.modules()) == 10


def test_bitsandbytes_is_imported_for_4_bits_only() -> None:
    """Its import prints a warning on some CPUs, and peft imports it wherever it is installed."""
    code = """
import sys
from transformers import AutoModelForCausalLM, LlamaConfig
from modern_llm.config.adapter import AdapterConfig
from modern_llm.models.adapters import add_adapter
shape = dict(vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
for settings in ({}, {"kind": "dora"}, {"quantize": "nf4"}):
    add_adapter(AutoModelForCausalLM.from_config(LlamaConfig(**shape)), AdapterConfig(**settings), 0)
    print("bitsandbytes" in sys.modules)
from peft.import_utils import is_bnb_available
print(is_bnb_available())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False", "True", "True"]
