"""Starts that are not trained as what they are."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modern_llm.config import UserError
from modern_llm.initial.checkpoint import load_model, read_initial
from modern_llm.models.adapter_sum import AdaptersBelow
from modern_llm.models.build import grow_vocabulary


def llama(folder: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied)).save_pretrained(folder)
    return folder


def test_a_head_of_its_own_survives_new_rows_although_the_config_calls_it_tied(tmp_path: Path):
    folder = llama(tmp_path / "start", tied=True)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"] = torch.randn(64, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = load_model(folder)
    assert torch.equal(model.lm_head.weight, head)
    grow_vocabulary(model, 70)
    assert torch.equal(model.lm_head.weight[:64], head)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_whose_beginning_changed_the_model_make_no_sum(tmp_path: Path, init: str):
    start = llama(tmp_path / "start", tied=False)
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    get_peft_model(AutoModelForCausalLM.from_pretrained(start), settings).save_pretrained(tmp_path / "given")
    below = AdaptersBelow()
    merged = read_initial(tmp_path / "given").load(below)
    if below.obstacle is None:  # then base + B A must be the merged weights
        base = AutoModelForCausalLM.from_pretrained(start)
        for layer, (a, b) in below.factors.items():
            assert torch.allclose(base.get_submodule(layer).weight + b @ a, merged.get_submodule(layer).weight, atol=1e-5)


def test_plain_weights_under_a_config_that_says_4_bits(tmp_path: Path):
    folder = llama(tmp_path / "start", tied=False)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = load_model(folder)
    except UserError:
        return
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


def test_damaged_generation_config_of_an_adapter_folder_is_left_out(tmp_path: Path):
    start = llama(tmp_path / "start", tied=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(start), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "given"
    )
    (tmp_path / "given/generation_config.json").write_text("nope")
    load_model(tmp_path / "given")


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.0}])
def test_what_generate_refuses_is_left_out(tmp_path: Path, settings: dict):
    folder = llama(tmp_path / "start", tied=False)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    load_model(folder).generate(torch.tensor([[1, 2]]), max_new_tokens=2)


def test_a_folder_that_holds_a_model_and_adapters_is_refused(tmp_path: Path):
    start = llama(tmp_path / "start", tied=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(start), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "given"
    )
    llama(tmp_path / "given", tied=False)
    with pytest.raises(UserError, match="adapter"):
        read_initial(tmp_path / "given")
