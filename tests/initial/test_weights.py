"""Weights that do not load are an error with their names; whatever is legitimately absent, or only named otherwise, loads."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import families, random_model
from helpers import identical, save_start, sharpened, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from modern_llm.config import UserError
from modern_llm.initial.checkpoint import load_model

Weights = dict[str, Tensor]
IDS = torch.arange(3, 23)[None]


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    """An untied Llama."""
    model = tiny_model(tokenizer, architecture="llama", tie_embeddings=False)
    return save_start(sharpened(model, 2.0), tokenizer, tmp_path / "start")


def edit(folder: Path, change: Callable[[Weights], Weights] = dict, **config: Any) -> None:
    """Change the weights of a folder, and fields of its config."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))


def renamed(rename: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda weights: {rename(name): tensor for name, tensor in weights.items()}


def without(*gone: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name not in gone}


# Names


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"policy.actor.{name}",
        lambda name: name.replace("model.layers", "model._fsdp_wrapped_module.layers"),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: name.replace("model.", "model._orig_mod.", 1),
    ],
)
def test_what_wrappers_put_into_names_is_taken_off_for_good(rename, folder, tmp_path) -> None:
    whole = load_file(folder / "model.safetensors")
    edit(folder, renamed(rename))
    model = load_model(folder)
    assert identical(dict(model.state_dict()), whole)
    model.save_pretrained(tmp_path / "saved")
    assert identical(load_file(tmp_path / "saved" / "model.safetensors"), whole)


def test_names_that_fit_only_in_part_are_refused_as_they_are(folder) -> None:
    edit(folder, lambda weights: renamed(lambda name: f"module.{name}")(without("model.norm.weight")(weights)))
    with pytest.raises(UserError, match=r"lack .*and its files hold module\.lm_head\.weight"):
        load_model(folder)


# Missing and left over


@pytest.mark.parametrize(
    ("change", "config", "names"),
    [
        (without("model.layers.1.mlp.down_proj.weight"), {}, r"lack model\.layers\.1\.mlp\.down_proj\.weight"),
        (without("model.norm.weight"), {}, r"lack model\.norm\.weight"),
        (without("lm_head.weight"), {}, r"lack lm_head\.weight"),
        (without("model.embed_tokens.weight"), {}, r"lack model\.embed_tokens\.weight"),
        (dict, {"num_hidden_layers": 3}, r"lack model\.layers\.2\..* and 6 more"),
        (dict, {"num_hidden_layers": 1}, r"hold model\.layers\.1\..* and 6 more"),
        (dict, {"attention_bias": True}, r"lack model\.layers\.0\.self_attn\.k_proj\.bias"),
        (lambda w: {**w, "v_head.summary.weight": torch.zeros(1, 32)}, {}, r"hold v_head\.summary\.weight"),
        (lambda w: {**w, "mtp.layers.0.norm.weight": torch.zeros(32)}, {}, r"hold mtp\.layers\.0\.norm\.weight"),
    ],
)
def test_a_tensor_that_is_missing_or_left_over_is_named(change, config, names, folder) -> None:
    edit(folder, change, **config)
    with pytest.raises(UserError, match=rf"^sft_checkpoint='.*': its files {names}") as refused:
        load_model(folder, "sft_checkpoint")
    assert "\n" not in str(refused.value)


def test_a_reward_model_is_refused_by_its_head(folder, tmp_path) -> None:
    model = load_model(folder)
    reward = LlamaForSequenceClassification(model.config)
    reward.model.load_state_dict(model.model.state_dict())
    reward.save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match=r"lack lm_head\.weight and its files hold score\.weight"):
        load_model(tmp_path / "reward")


def test_a_body_without_a_head_is_refused_untied_and_loads_tied(folder, tokenizer, tmp_path) -> None:
    load_model(folder).model.save_pretrained(tmp_path / "body")
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        load_model(tmp_path / "body")
    tied = sharpened(tiny_model(tokenizer, architecture="llama"), 2.0)
    tied.model.save_pretrained(tmp_path / "tied")  # names without `model.`, as transformers saves a body
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "tied")(IDS).logits, tied.eval()(IDS).logits)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"vocab_size": 400}, r"lm_head\.weight \(300 × 32, in config.json 400 × 32\), model\.embed_tokens\.weight"),
        ({"intermediate_size": 48}, r"model\.layers\.0\.mlp\.down_proj\.weight \(32 × \d+, in config.json 32 × 48\)"),
        ({"num_key_value_heads": 4}, r"model\.layers\.0\.self_attn\.k_proj\.weight"),
    ],
)
def test_shapes_that_differ_are_named_with_both(config, names, folder) -> None:
    edit(folder, **config)
    with pytest.raises(UserError, match=rf"weights of other shapes than config.json says: {names}"):
        load_model(folder)


# Legitimately absent, or there in vain


def test_a_tied_head_may_be_absent_or_there(tokenizer, tmp_path) -> None:
    start = save_start(tiny_model(tokenizer, architecture="llama"), tokenizer, tmp_path / "tied")
    whole = load_file(start / "model.safetensors")
    assert "lm_head.weight" not in whole
    expected = load_model(start).state_dict()
    edit(start, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    assert identical(dict(load_model(start).state_dict()), dict(expected))


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        (
            "gpt2",
            {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
        ),
        (
            "gptj",
            {"transformer.h.1.attn.bias": torch.ones(1, 1, 64, 64), "transformer.h.1.attn.masked_bias": torch.tensor(-1e9)},
        ),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}),
        ("phi", {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(64, 4)}),
    ],
)
def test_computed_buffers_of_older_files_are_passed_over(family, buffers, tmp_path) -> None:
    model = random_model(families()[family])
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda weights: {**weights, **buffers})
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_bias_that_the_model_has_not_is_no_buffer(folder) -> None:
    edit(folder, lambda weights: {**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with pytest.raises(UserError, match=r"hold model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(folder)


def test_files_in_shards_load_and_lose_nothing_unseen(folder, tmp_path) -> None:
    model = load_model(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert identical(dict(load_model(tmp_path / "shards").state_dict()), dict(model.state_dict()))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    gone = next(file for name, file in index["weight_map"].items() if "layers.0.self_attn.q_proj" in name)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"its files lack model\.layers\.0\.self_attn"):
        load_model(tmp_path / "shards")


def test_loading_moves_no_random_state_and_prints_no_table(folder, capfd) -> None:
    before = torch.get_rng_state()
    edit(folder, num_hidden_layers=4)
    with pytest.raises(UserError):
        load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


# Weights in 4 bits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("code", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_bitsandbytes_4_bits_are_unpacked_to_the_weights_that_they_stand_for(kind, code, double, tokenizer, tmp_path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    config = families()[kind]
    for name, value in {"hidden_size": 64, "n_embd": 64, "intermediate_size": 128, "head_dim": 16}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    random_model(config).save_pretrained(tmp_path / "plain")
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=code, bnb_4bit_use_double_quant=double)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=packing, device_map={"": "cpu"})
    packed.save_pretrained(tmp_path / "packed")
    model = load_model(tmp_path / "packed")
    plain = load_model(tmp_path / "plain")
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    changed = 0
    for name, layer in packed.named_modules():
        if type(layer).__name__ == "Linear4bit":
            state = layer.weight.quant_state
            state.dtype = torch.float32
            expected = dequantize_4bit(layer.weight.data, state)
            own = model.get_submodule(name).weight
            assert torch.equal(own, expected if own.shape == expected.shape and kind != "gpt2" else expected.T)
            changed += not torch.equal(own, plain.get_submodule(name).weight)
    assert changed
    model.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text()
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


def test_mxfp4_is_unpacked_by_its_table_and_scales(tmp_path) -> None:
    """OCP Microscaling formats 1.0, section 5.3.3: 4-bit floats (E2M1) times a power of two for each 32 of them."""
    config = families()["gpt_oss"]
    random_model(config).save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected: Weights = {}

    def packed(weights: Weights) -> Weights:
        found = dict(weights)
        for name, tensor in weights.items():
            if name.endswith(("gate_up_proj", "down_proj")):
                experts, inside, outside = tensor.shape  # stored the other way round: (experts, out, in / 32, 16 bytes)
                codes = torch.randint(16, (experts, outside, inside), generator=draw)
                scales = torch.randint(120, 127, (experts, outside, inside // 32), generator=draw)
                pairs = codes.view(experts, outside, inside // 32, 16, 2)
                del found[name]
                found[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
                found[f"{name}_scales"] = scales.to(torch.uint8)
                expected[name] = (values[codes] * 2.0 ** (scales - 127).repeat_interleave(32, 2)).transpose(1, 2)
        return found

    edit(tmp_path, packed, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    model = load_model(tmp_path)
    assert len(expected) == 4
    for name, tensor in expected.items():
        assert torch.equal(dict(model.named_parameters())[name], tensor)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text()
    assert identical(dict(load_model(tmp_path / "saved").state_dict()), dict(model.state_dict()))


def test_loading_and_saving_write_nothing_to_a_captured_log(start: Path, tmp_path: Path) -> None:
    """Neither bars of transformers nor its lists of layers that are not sharded."""
    code = (
        "import sys; from modern_llm.initial.checkpoint import load_model; load_model(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(start), str(tmp_path / "copy")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy" / "model.safetensors").is_file()
    assert done.stdout + done.stderr == ""
