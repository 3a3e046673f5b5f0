"""Adapters through whole runs: what trains and what is saved, the reference, resuming, chains of stages, folders that move."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ANSWERS,
    QUESTIONS,
    WRONG,
    chat,
    identical,
    largest_difference,
    logged,
    metric_lines,
    save_start,
    sharpened,
    stopped_after_first_save,
    tiny_model,
    write_jsonl,
)
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from tolerances import LN_2, LOSS, WEIGHT
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modern_llm import (
    AdapterConfig,
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ModelConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    run_dpo,
    run_sft,
    run_training,
)
from modern_llm.checkpoint import read_manifest, verify
from modern_llm.cli import parse
from modern_llm.config import UserError, resolve
from modern_llm.config.commands import SFTArguments
from modern_llm.initial.checkpoint import load_model, read_initial
from modern_llm.models.policy import Policy

LORA = AdapterConfig(rank=4, alpha=8)
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapter_data")
    rows = list(zip(QUESTIONS, ANSWERS, WRONG, strict=True))
    chats = [{"prompt": question, "completion": answer} for question, answer, _ in rows]
    pairs = [{"prompt": question, "chosen": answer, "rejected": wrong} for question, answer, wrong in rows]
    return {
        "chats": str(write_jsonl(folder / "chats.jsonl", chats)),
        "pairs": str(write_jsonl(folder / "pairs.jsonl", pairs)),
        "text": str(write_jsonl(folder / "text.jsonl", [{"text": " ".join(ANSWERS)}] * 4)),
    }


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(
        sharpened(tiny_model(tokenizer, seed=1), 2.0), tokenizer, tmp_path_factory.mktemp("adapter_base") / "base"
    )


def settings(output_dir: Path, **changes: Any) -> TrainingConfig:
    given: dict[str, Any] = {
        "output_dir": output_dir, "adapter": LORA, "batch_size": 6, "micro_batch_size": 3, "max_steps": STEPS,
        "learning_rate": 1e-2, "warmup_steps": 0, "log_every": 1, "mixed_precision": "fp32", **changes,
    }  # fmt: skip
    return TrainingConfig(**given)


def sft(start: Path, data: dict[str, str], output_dir: Path, **changes: Any) -> Path:
    return run_sft(start, settings(output_dir, **changes), InstructionDatasetConfig(dataset_name=data["chats"]))


def dpo(start: Path, data: dict[str, str], output_dir: Path, options: DPOConfig | None = None, **changes: Any) -> Path:
    pairs = PreferenceDatasetConfig(dataset_name=data["pairs"])
    return run_dpo(start, settings(output_dir, **changes), options or DPOConfig(), pairs)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder).eval()(input_ids=torch.arange(3, 33)[None]).logits


def test_sft_with_lora_equals_a_plain_loop_of_peft_and_torch(base, data, tokenizer, tmp_path) -> None:
    """Losses and weights of three steps: peft's model, its own logits, one chat at a time, torch's AdamW, by hand."""
    final = sft(base, data, tmp_path / "run", weight_decay=0.1, max_grad_norm=0.5, lr_schedule="constant", seed=5)
    torch.manual_seed(5)
    model = get_peft_model(load_model(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    # adapters are drawn layer by layer in the model's order, so the same seed gives the same
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1
    )
    losses = []
    for _ in range(STEPS):  # every step is the whole data set
        total, count = torch.zeros(()), 0
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            ids, scored = (torch.tensor(part) for part in chat(tokenizer, question, answer))
            logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            total, count = total - logprobs[scored[1:]].sum(), count + int(scored.sum())
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(total.detach()) / count)
    assert logged(tmp_path / "run", "loss") == pytest.approx(losses, abs=LOSS)
    wanted = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert largest_difference(load_file(final / "adapter_model.safetensors"), wanted) <= WEIGHT


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_adapters_are_saved_and_the_base_is_left_as_it_is(kind: Any, base, data, tmp_path) -> None:
    before = files(base)
    final = sft(base, data, tmp_path / "run", adapter=AdapterConfig(rank=4, kind=kind), save_every=1)
    assert files(base) == before
    saved = files(final)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "modern_llm.json"} <= saved.keys()
    assert not {"model.safetensors", "config.json"} & saved.keys()
    tensors = load_file(final / "adapter_model.safetensors")
    assert all(".lora_" in name for name in tensors)
    assert all(float(value.abs().sum()) > 0 for value in tensors.values())
    state = load_file(tmp_path / "run" / "checkpoints" / "step-000001" / "training" / "state.safetensors")
    assert all(".lora_" in name for name in state if "optimizer" in name)
    assert not (tmp_path / "run" / "checkpoints" / "step-000001" / "model.safetensors").exists()
    verify(final)
    assert AutoTokenizer.from_pretrained(final).chat_template
    theirs = PeftModel.from_pretrained(load_model(base), str(final))
    with torch.no_grad():
        wanted = theirs.eval()(input_ids=torch.arange(3, 33)[None]).logits
    assert float((logits(final) - wanted).abs().max()) <= 1e-5
    assert float((logits(final) - logits(base)).abs().max()) > 1e-2
    assert load_model(final).generation_config.eos_token_id == json.loads(saved["generation_config.json"])["eos_token_id"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "quantize"), [("lora", None), ("dora", "nf4")])
def test_a_stopped_run_resumes_bit_identically_under_adapter_dropout(kind: Any, quantize: Any, base, data, tmp_path) -> None:
    adapter = AdapterConfig(rank=4, dropout=0.3, quantize=quantize, kind=kind)
    straight = sft(base, data, tmp_path / "straight", adapter=adapter, save_every=1)
    with stopped_after_first_save():
        sft(base, data, tmp_path / "run", adapter=adapter, save_every=1)
    again = sft(base, data, tmp_path / "run", adapter=adapter, save_every=1)
    assert identical(load_file(again / "adapter_model.safetensors"), load_file(straight / "adapter_model.safetensors"))
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "straight")
    before = files(tmp_path / "run")
    assert sft(base, data, tmp_path / "run", adapter=adapter, save_every=1) == again
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_preference_training_starts_at_ln_2_with_the_bases_own_reference(
    kind: Any, precision: Any, base, data, tmp_path, cache
) -> None:
    """The reference's log-probs are those of a run without adapters, found on disk: the same key, so the same model."""
    dpo(base, data, tmp_path / "full", adapter=None, max_steps=1, learning_rate=1e-9)
    known = set(cache.iterdir())
    adapter = AdapterConfig(rank=4, kind=kind)
    dpo(base, data, tmp_path / "run", adapter=adapter, mixed_precision=precision)
    if precision == "fp32":
        assert set(cache.iterdir()) == known
    losses = logged(tmp_path / "run", "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=LN_2 if precision == "fp32" else 1e-3)
    assert losses[-1] < losses[0] - 0.01


def test_the_first_reference_of_a_run_with_adapters_is_the_base_exactly(base, data, tmp_path, monkeypatch) -> None:
    """With an empty cache, so the policy itself answers, its adapters off; here they are no longer at their start."""
    from modern_llm.data.store import CACHE_VARIABLE
    from modern_llm.models.adapter_folders import adapter_weights
    from modern_llm.training import stage

    tables = {}
    original = stage.add_adapter

    def moved(model: Any, *given: Any) -> dict[str, str]:
        left_out = original(model, *given)
        with torch.no_grad():
            for weight in adapter_weights(model).values():
                weight.add_(0.1)
        return left_out

    for name, adapter in (("full", None), ("adapters", LORA)):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        monkeypatch.setattr(stage, "add_adapter", moved)
        monkeypatch.setattr(stage, "preflight", lambda *_: None)  # which would notice that the start is not the start
        dpo(base, data, tmp_path / f"{name}-run", adapter=adapter, max_steps=1)
        [table] = (tmp_path / name).glob("reference-*/*.safetensors")
        tables[name] = load_file(table)["logprobs"]
    assert torch.equal(tables["full"], tables["adapters"])


def test_qlora_learns_and_what_is_loaded_is_the_model_that_was_trained(base, data, tmp_path) -> None:
    adapter = AdapterConfig(rank=4, quantize="nf4")
    final = sft(base, data, tmp_path / "run", adapter=adapter, max_steps=8, optimizer="adamw_8bit")
    losses = logged(tmp_path / "run", "loss")
    assert losses[-1] < losses[0] - 0.5
    assert read_manifest(final)["adapter"]["quantize"] == "nf4"  # type: ignore[index]
    # one more run from it, without learning, begins with the loss that training came to
    sft(final, data, tmp_path / "next", adapter=None, max_steps=1, learning_rate=1e-12)
    assert logged(tmp_path / "next", "loss")[0] < losses[-1] + 1e-3
    on_full_weights = PeftModel.from_pretrained(load_model(base), str(final)).merge_and_unload()
    with torch.no_grad():
        other = on_full_weights.eval()(input_ids=torch.arange(3, 33)[None]).logits  # type: ignore[operator]
    assert float((logits(final) - other).abs().max()) > 1e-3  # not the model that was trained


@pytest.fixture(scope="module")
def chain(data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretraining, SFT with LoRA on it, DPO with LoRA on that."""
    root = tmp_path_factory.mktemp("chain") / "runs"
    shape = ModelConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=64, vocab_size=300)
    text = LanguageModelingDatasetConfig(dataset_name=data["text"])
    start = run_training(shape, settings(root / "pretrain", adapter=None, batch_size=2, micro_batch_size=2), text)
    tuned = sft(start, data, root / "sft")
    dpo(tuned, data, root / "dpo", adapter=AdapterConfig(rank=2))
    return root


def test_a_chain_of_adapters_loads_from_wherever_it_is_moved_to(chain: Path, tmp_path: Path) -> None:
    wanted = logits(chain / "dpo" / "dpo_final")
    assert not (chain / "dpo" / "dpo_final" / "model.safetensors").exists()
    shutil.copytree(chain, tmp_path / "moved")
    chain.rename(chain.with_name("away"))
    try:
        assert torch.equal(logits(tmp_path / "moved" / "dpo" / "dpo_final"), wanted)
        # an adapter that was moved alone still knows where its start was
        shutil.move(tmp_path / "moved" / "dpo" / "dpo_final", tmp_path / "alone")
        with pytest.raises(UserError, match="the model under its adapters is not there"):
            load_model(tmp_path / "alone")
    finally:
        chain.with_name("away").rename(chain)
    assert torch.equal(logits(tmp_path / "alone"), wanted)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_base_that_changed_is_refused_with_both_hashes(stage: str, chain: Path, tokenizer, tmp_path: Path) -> None:
    """The preference adapters hold those of SFT, so both are on the pretrained model."""
    shutil.copytree(chain, tmp_path / "runs")
    path = tmp_path / "runs" / "pretrain" / "pretrain_final" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"hash of its weights is \w{64}, and was \w{64}: put that model back") as refused:
        load_model(tmp_path / "runs" / stage / f"{stage}_final", "sft_checkpoint")
    assert str(refused.value).startswith("sft_checkpoint=")
    assert "pretrain_final" in str(refused.value)


def test_a_run_on_adapters_is_found_again_and_refused_for_others(chain: Path, data, tmp_path: Path) -> None:
    shutil.copytree(chain, tmp_path / "runs")
    before = files(tmp_path / "runs")
    tuned, out, adapter = tmp_path / "runs" / "sft" / "sft_final", tmp_path / "runs" / "dpo", AdapterConfig(rank=2)
    assert dpo(tuned, data, out, adapter=adapter) == out / "dpo_final"
    assert files(tmp_path / "runs") == before
    with pytest.raises(UserError, match=r"train.adapter.rank: 2 there, 4 now"):
        dpo(tuned, data, out, adapter=AdapterConfig(rank=4))
    with pytest.raises(UserError, match=r"parent\.weights"):
        dpo(tmp_path / "runs" / "pretrain" / "pretrain_final", data, out, adapter=adapter)


def test_the_hash_of_a_start_with_adapters_does_not_depend_on_how_a_machine_rounds_sums(chain: Path) -> None:
    tuned, manifest = chain / "sft" / "sft_final", read_manifest(chain / "dpo" / "dpo_final")
    elsewhere = load_model(tuned)
    with torch.no_grad():
        for parameter in elsewhere.parameters():
            parameter.mul_(1 + 1e-7)
    assert manifest is not None
    assert read_initial(tuned).hash_of(elsewhere) == manifest["start_weights"]
    root = read_manifest(chain / "pretrain" / "pretrain_final")
    assert root is not None
    assert manifest["adapter"]["base_weights"] == root["weights"]
    assert read_manifest(tuned)["weights"] == manifest["start_weights"]  # type: ignore[index]


def test_full_training_from_adapters_leaves_a_plain_folder(chain: Path, data, tmp_path: Path) -> None:
    final = dpo(chain / "sft" / "sft_final", data, tmp_path / "run", adapter=None, learning_rate=1e-4)
    assert (final / "model.safetensors").is_file()
    assert not (final / "adapter_config.json").exists()
    assert Policy(load_model(final)).packs
    assert logged(tmp_path / "run", "loss")[0] == pytest.approx(math.log(2), abs=LN_2)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (
            lambda c: run_training(ModelConfig(), settings(c.out), LanguageModelingDatasetConfig(dataset_name=c.data["text"])),
            "in pretraining they are random",
        ),
        (lambda c: dpo(c.base, c.data, c.out, DPOConfig(sync_ref_model=True)), "leave sync_ref_model or adapter out"),
        (
            lambda c: dpo(c.base, c.data, c.out, adapter=AdapterConfig(dropout=0.1)),
            r"adapter.dropout=0.1 has no effect where disable_dropout",
        ),
        (lambda c: sft(c.base, c.data, c.out, learning_rates={"embeddings": 1e-3}), "learning_rates"),
    ],
)
def test_what_adapters_cannot_do_is_refused(run: Any, reason: str, base, data, tmp_path) -> None:
    class Case:
        out = tmp_path / "run"

    Case.base, Case.data = base, data  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=reason):
        run(Case)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(tokenizer, data, tmp_path) -> None:
    """Frozen, the new rows would stay alike: the model could not tell the end of a turn from its beginning."""
    small = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "small")
    bigger = AutoTokenizer.from_pretrained(small)
    bigger.add_tokens(["<|a|>", "<|b|>"])
    bigger.save_pretrained(small)
    with pytest.raises(UserError, match=r"no trained embeddings for 2 tokens .* train once without it"):
        sft(small, data, tmp_path / "run")
    assert sft(small, data, tmp_path / "full", adapter=None, learning_rate=1e-5)


@pytest.mark.parametrize(("stage", "rate"), [("sft", 2e-4), ("dpo", 1e-5)])
def test_the_default_rate_with_adapters_is_ten_times_the_stages(stage: Any, rate: float) -> None:
    assert resolve(TrainingConfig(adapter=LORA), stage).learning_rate == pytest.approx(rate)
    assert resolve(TrainingConfig(adapter=LORA, learning_rate=3e-5), stage).learning_rate == 3e-5


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"target_modules": []}, "must be all-linear, or the ends of layers' names"),
        ({"target_modules": "q_proj,"}, "must be all-linear"),
        ({"rank": 0}, "greater than 0"),
        ({"dropout": 1.0}, "less than 1"),
        ({"quantize": "nf5"}, "nf4"),
        ({"ranks": 8}, "did you mean 'rank'"),
    ],
)
def test_settings_of_adapters_are_checked(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        AdapterConfig.model_validate(given)


def test_the_command_line_names_layers_as_a_file_does(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("pretrain_checkpoint: x\ntrain_config: {adapter: {target_modules: [q_proj, v_proj]}}\n")
    words = ["--train-config.adapter.target-modules", "q_proj,v_proj", "--pretrain-checkpoint", "x"]
    from_file = parse(SFTArguments, "sft", ["--config", str(tmp_path / "sft.yaml")])
    assert parse(SFTArguments, "sft", words) == from_file
    assert from_file.train_config.adapter == AdapterConfig(target_modules=("q_proj", "v_proj"))
