"""What a run may begin from: read once, refused by name in seconds, or right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import families, random_model
from helpers import (
    ANSWERS,
    QUESTIONS,
    WRONG,
    identical,
    logged,
    random_segment,
    save_start,
    sharpened,
    tiny_model,
    weights,
    write_jsonl,
)
from layouts import everything
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
)

from modern_llm import (
    AdapterConfig,
    DPOConfig,
    InstructionDatasetConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    run_dpo,
    run_sft,
)
from modern_llm.config import UserError
from modern_llm.export import export_checkpoint
from modern_llm.initial.checkpoint import load_model, read_initial
from modern_llm.models import policy as policy_module
from modern_llm.models.policy import Policy, context_length

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("initial_data")
    rows = list(zip(QUESTIONS, ANSWERS, WRONG, strict=True))
    chats = [{"prompt": question, "completion": answer} for question, answer, _ in rows]
    pairs = [{"prompt": question, "chosen": answer, "rejected": wrong} for question, answer, wrong in rows]
    return {
        "chats": str(write_jsonl(folder / "chats.jsonl", chats)),
        "pairs": str(write_jsonl(folder / "pairs.jsonl", pairs)),
    }


def sft(start: Path, data: dict[str, str], out: Path, tokenizer_name: str | None = None, **changes: Any) -> Path:
    settings = {"max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "log_every": 1, "mixed_precision": "fp32", **changes}
    train = TrainingConfig(output_dir=out, run_name="run", batch_size=6, **settings)
    return run_sft(start, train, InstructionDatasetConfig(dataset_name=data["chats"]), tokenizer_name)


def dpo(start: Path, data: dict[str, str], out: Path, tokenizer_name: str | None = None, **changes: Any) -> Path:
    settings = {"max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "log_every": 1, "mixed_precision": "fp32", **changes}
    train = TrainingConfig(output_dir=out, run_name="run", batch_size=6, **settings)
    return run_dpo(start, train, DPOConfig(), PreferenceDatasetConfig(dataset_name=data["pairs"]), tokenizer_name)


def folder_of(config: Any, folder: Path, tokenizer: Any = None, **settings: Any) -> Path:
    """A random model of a config, with fields of its `config.json` changed."""
    model = sharpened(random_model(config))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if settings:
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | settings))
    return folder


# Kinds


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
        ("bart", {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}),
        ("marian", {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}),
    ],
)
def test_an_encoder_with_a_decoder_is_refused_as_one(kind, shape, tmp_path) -> None:
    config = AutoConfig.for_model(kind, vocab_size=300, pad_token_id=0, eos_token_id=0, decoder_start_token_id=0, **shape)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an encoder with a decoder, and causal language models are trained here"):
        read_initial(tmp_path, "pretrain_checkpoint")


@pytest.mark.parametrize("kind", ["vit", "wav2vec2", "llava", "clip"])
def test_what_is_no_causal_language_model_is_refused_by_its_type(kind, tmp_path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"\({kind}\) is no causal language model of transformers"):
        read_initial(tmp_path)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "somebody's"}, "somebody's"),
    ],
)
def test_quantized_weights_are_refused_by_method_before_they_are_read(settings, method, tmp_path) -> None:
    config = LlamaConfig(vocab_size=300, **SHAPE)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "quantization_config": settings}))
    with pytest.raises(
        UserError, match=rf"weights are quantized \(.?{method}.?\), .*start from the model that it was made from"
    ):
        read_initial(tmp_path)


def test_gguf_files_are_refused_as_such(tmp_path) -> None:
    (tmp_path / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="GGUF files, which are for inference"):
        read_initial(tmp_path)
    with pytest.raises(UserError, match="a checkpoint is a folder"):
        read_initial(tmp_path / "model-q4_k_m.gguf")


# Later tokens


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=300, **SHAPE, is_causal=False),
        BertConfig(vocab_size=300, **{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
    ],
    ids=["llama", "bert"],
)
def test_a_model_that_sees_later_tokens_is_refused_fresh_and_sharp(config) -> None:
    for model in (random_model(config), sharpened(random_model(config))):
        with pytest.raises(UserError, match=r"sees later tokens .* start from a causal model"):
            Policy(model)


def test_a_decoder_bert_and_every_family_of_ours_is_causal() -> None:
    shape = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    assert Policy(random_model(BertConfig(vocab_size=300, is_decoder=True, **shape)))


# Sizes


@pytest.mark.parametrize("pad", [300, 10**6, -1, -100])
def test_a_pad_token_beyond_the_table_is_left_out_and_said(pad, tokenizer, data, tmp_path, capsys) -> None:
    start = folder_of(LlamaConfig(vocab_size=len(tokenizer), **SHAPE), tmp_path / "start", tokenizer, pad_token_id=pad)
    final = sft(start, data, tmp_path / "run", max_steps=1)
    assert json.loads((final / "config.json").read_text())["pad_token_id"] is None
    assert f"pad_token_id={pad} is no row of the {len(tokenizer)} of its table" in capsys.readouterr().out


def test_a_context_length_of_minus_one_is_no_limit(tmp_path) -> None:
    model = random_model(LlamaConfig(vocab_size=300, **SHAPE))
    model.config.max_position_embeddings = -1
    assert context_length(model) is None


def test_router_jitter_is_off_where_dropout_is(tokenizer, data, tmp_path) -> None:
    """Preference training would differ from its reference before the first update otherwise."""
    config = MixtralConfig(vocab_size=len(tokenizer), **SHAPE, num_local_experts=2, router_jitter_noise=0.3)
    start = folder_of(config, tmp_path / "start", tokenizer)
    dpo(start, data, tmp_path / "dpo")
    assert logged(tmp_path / "dpo", "loss")[0] == pytest.approx(0.693147, abs=1e-5)
    assert sft(start, data, tmp_path / "sft")


# Tokenizers


def test_a_folder_without_a_tokenizer_needs_its_name_and_keeps_it(tokenizer, data, tmp_path) -> None:
    start = folder_of(LlamaConfig(vocab_size=len(tokenizer), **SHAPE), tmp_path / "start")
    with pytest.raises(UserError, match="only a model is there, and no tokenizer: name one by tokenizer_name"):
        sft(start, data, tmp_path / "no")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    final = sft(start, data, tmp_path / "run", str(tmp_path / "tokenizer"))
    assert dpo(final, data, tmp_path / "dpo")  # it travels along


def test_a_peft_folder_has_the_tokenizer_of_its_base(tokenizer, data, tmp_path) -> None:
    start = save_start(sharpened(tiny_model(tokenizer)), tokenizer, tmp_path / "start")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(start), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "given")
    assert not (tmp_path / "given" / "tokenizer.json").exists()
    initial = read_initial(tmp_path / "given")
    assert len(initial.tokenizer().tokenizer) == len(tokenizer)
    assert (initial.root.folder, [adapter.folder for adapter in initial.chain]) == (start, [tmp_path / "given"])
    assert dpo(tmp_path / "given", data, tmp_path / "dpo", adapter=AdapterConfig(rank=2))


def test_an_adapter_over_a_table_that_it_made_larger_loads_with_its_rows(tokenizer, tmp_path) -> None:
    """peft writes both tables into the adapter where they were resized."""
    start = save_start(sharpened(tiny_model(tokenizer, tie_embeddings=False)), tokenizer, tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(start)
    model.resize_token_embeddings(len(tokenizer) + 3)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "given", save_embedding_layers=True)
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=IDS).logits
        ours = load_model(tmp_path / "given").eval()(input_ids=IDS).logits
    assert ours.shape == expected.shape
    assert float((ours - expected).abs().max()) <= 1e-5


# Generation configs


@pytest.mark.parametrize(
    ("given", "kept", "dropped"),
    [
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"do_sample": False}, ["temperature", "top_p"]),
        ({"temperature": 0.6, "top_k": 20}, {}, ["temperature", "top_k"]),
        ({"do_sample": True, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7}, []),
        ({"early_stopping": True}, {}, ["early_stopping"]),
        ({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}, {"num_beams": 4, "early_stopping": True}, []),
        ({"num_return_sequences": 3}, {}, ["num_return_sequences"]),
        ({"max_new_tokens": 0}, {}, ["max_new_tokens"]),
        ({"cache_implementation": "no such"}, {}, ["cache_implementation"]),
        ({"do_sample": True, "temperature": "hot"}, {"do_sample": True}, ["temperature"]),
        ({"do_sample": True, "min_p": 2, "top_k": -1}, {"do_sample": True}, ["min_p", "top_k"]),
        ({"pad_token_id": -1, "repetition_penalty": 1.3}, {"repetition_penalty": 1.3}, ["pad_token_id"]),
    ],
)
def test_a_generation_config_keeps_its_meaning_and_what_is_invalid_is_said(given, kept, dropped, tokenizer, tmp_path) -> None:
    start = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "start")
    (start / "generation_config.json").write_text(json.dumps(given))
    initial = read_initial(start)
    assert initial.generation is not None
    assert all(getattr(initial.generation, name) == value for name, value in kept.items())
    assert bool(initial.generation.do_sample) == bool(given.get("do_sample"))
    assert bool(initial.notes) == bool(dropped)
    assert all(name in initial.notes[0] for name in dropped)
    initial.generation.save_pretrained(tmp_path)
    folder = export_checkpoint(start, tmp_path / "export", "fp32")
    assert GenerationConfig.from_pretrained(folder).do_sample == initial.generation.do_sample


@pytest.mark.parametrize("text", ["", "[]", "{", '{"temperature": '])
def test_a_generation_config_that_is_no_json_object_is_said_and_replaced(text, tokenizer, data, tmp_path, capsys) -> None:
    start = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "start")
    (start / "generation_config.json").write_text(text)
    assert sft(start, data, tmp_path / "run", max_steps=1)
    assert "generation_config.json" in capsys.readouterr().out


# Rows that learn


def test_full_training_of_a_4_bit_checkpoint_gives_a_plain_one(tokenizer, data, tmp_path) -> None:
    from transformers import BitsAndBytesConfig

    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 128}
    plain = folder_of(LlamaConfig(vocab_size=len(tokenizer), **shape), tmp_path / "plain", tokenizer)
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=packing, device_map={"": "cpu"})
    start = save_start(packed, tokenizer, tmp_path / "packed")
    begin = load_model(start)
    for name, adapter in (("full", None), ("lora", AdapterConfig(rank=2)), ("qlora", AdapterConfig(rank=2, quantize="nf4"))):
        final = sft(start, data, tmp_path / name, adapter=adapter)
        assert dpo(final, data, tmp_path / f"{name}-dpo", adapter=AdapterConfig(rank=2) if name != "full" else None)
        exported = export_checkpoint(final, tmp_path / f"{name}-export", "fp32")
        with torch.no_grad():
            again = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()(IDS).logits
            assert torch.equal(again, load_model(final).eval()(IDS).logits)
            assert 1e-6 < float((again - begin.eval()(IDS).logits).abs().max()) < 2.0
    assert load_file(tmp_path / "full" / "run_final" / "model.safetensors").keys() == weights(plain).keys()
    assert identical(dict(load_model(start).state_dict()), dict(begin.state_dict()))


# Long rows


def test_what_goes_by_the_place_in_a_row_beyond_a_dozen_tokens_is_found_and_runs_padded() -> None:
    """A layer that scales what stands at place 40 and later: of a sequence in its own forward, of the row in a packed one."""
    model = sharpened(random_model(families()["llama"]))

    def scaled(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + (torch.arange(output.shape[1]) >= 40))[:, None]

    model.model.layers[0].mlp.register_forward_hook(scaled)
    policy = Policy(model)
    policy.check_rows([random_segment(0, 30)])
    assert policy.packs
    policy.check_rows([random_segment(1, 48), random_segment(2, 9)])
    assert not policy.packs
    assert policy.note is not None
    assert "cannot run on packed rows (its log-probs differ by" in policy.note


def test_rows_that_padding_changes_are_refused(tmp_path) -> None:
    """Doge attends to a fixed number of tokens, chosen among those that are there: padding is among them."""
    config = AutoConfig.for_model("doge", vocab_size=300, **SHAPE, keep_window_size=16)
    policy = Policy(sharpened(random_model(config)))
    assert not policy.packs
    with pytest.raises(
        UserError, match=r"DogeForCausalLM cannot be trained with attention='auto' \(padded: its log-probs differ"
    ):
        policy.check_rows([random_segment(0, 60), random_segment(1, 30)])


@pytest.mark.parametrize("family", ["mistral", "gptj", "gpt_oss", "phimoe"])
def test_rows_of_any_length_pass_where_the_path_is_right(family) -> None:
    policy = Policy(sharpened(random_model(families()[family])))
    before = policy.packs, policy.plain_head, policy.note
    policy.check_rows(everything())
    assert (policy.packs, policy.plain_head, policy.note) == before


def test_only_the_last_logits_of_very_long_rows_are_compared(monkeypatch) -> None:
    monkeypatch.setattr(policy_module, "MAX_CHECKED_LOGITS", 300 * 8)
    policy = Policy(sharpened(random_model(families()["llama"])))
    policy.check_rows([random_segment(0, 50), *everything()])
    assert policy.packs
