"""An export is a plain folder with the model that was trained: adapters merged over the whole chain, rounded once."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_start, sharpened, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modern_llm import cli
from modern_llm.checkpoint import read_manifest, verify
from modern_llm.config import UserError
from modern_llm.export import export_checkpoint
from modern_llm.initial.checkpoint import load_model

IDS = torch.arange(3, 33)[None]


@pytest.fixture(scope="module")
def chain(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A LoRA on a DoRA on a model, as a user of peft has them, and the logits with both adapters on."""
    root = tmp_path_factory.mktemp("export")
    start = save_start(sharpened(tiny_model(tokenizer)), tokenizer, root / "start")
    for name, below, dora in (("first", start, True), ("second", root / "first", False)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            settings = LoraConfig(r=4, use_dora=dora, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(load_model(below), settings)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        text = (root / name / "adapter_config.json").read_text()
        relative = {**json.loads(text), "base_model_name_or_path": f"../{below.name}"}
        (root / name / "adapter_config.json").write_text(json.dumps(relative))
    with torch.no_grad():
        return root / "second", model.eval()(input_ids=IDS).logits


def plain_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_chain_of_adapters_becomes_one_plain_folder_with_their_logits(chain, tokenizer, tmp_path) -> None:
    checkpoint, wanted = chain
    folder = export_checkpoint(checkpoint, tmp_path / "model", "fp32")
    assert float((plain_logits(folder) - wanted).abs().max()) <= 1e-5
    assert not (folder / "adapter_config.json").exists()
    again = AutoTokenizer.from_pretrained(folder)
    assert (again.chat_template, len(again)) == (tokenizer.chat_template, len(tokenizer))
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest["stage"], manifest["dtype"]) == ("export", "fp32")
    verify(folder)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_merged_first_and_rounded_once(name: Any, dtype: torch.dtype, chain, tmp_path) -> None:
    folder = export_checkpoint(chain[0], tmp_path / "model", name)
    merged = load_model(chain[0]).state_dict()
    saved = load_file(folder / "model.safetensors")
    assert all(value.dtype == dtype and torch.equal(value, merged[key].to(dtype)) for key, value in saved.items())
    assert str(AutoModelForCausalLM.from_pretrained(folder).dtype) == str(dtype)


def test_the_same_export_again_changes_nothing_and_another_is_refused(chain, tmp_path) -> None:
    folder = export_checkpoint(chain[0], tmp_path / "model", "fp32")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert export_checkpoint(chain[0], tmp_path / "model", "fp32") == folder
    for checkpoint, dtype, reason in (
        (chain[0], "bf16", "dtype: 'fp32' there, 'bf16' now"),
        (chain[0].with_name("first"), "fp32", "parent: "),
    ):
        with pytest.raises(UserError, match=reason):
            export_checkpoint(checkpoint, tmp_path / "model", dtype)  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: differs"):
        export_checkpoint(chain[0], tmp_path / "model", "fp32")


def test_folders_of_the_users_and_weights_too_large_are_refused(chain, tokenizer, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no export of ours"):
        export_checkpoint(chain[0], tmp_path / "mine")
    large = tiny_model(tokenizer)
    with torch.no_grad():
        large.get_input_embeddings().weight[0, 0] = 1e6  # type: ignore[union-attr, index]
    start = save_start(large, tokenizer, tmp_path / "large")
    with pytest.raises(UserError, match=r"embed_tokens.weight holds 1e\+06, more than torch.float16 can .*: use bf16"):
        export_checkpoint(start, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_and_prints_the_folder(chain, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(chain[0].parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modern-llm", "export", "runs/first", "--output-dir", "model", "--dtype", "fp32"])
    cli.main()
    assert capsys.readouterr().out.splitlines()[-1] == "model"
    assert AutoModelForCausalLM.from_pretrained("model").dtype == torch.float32
    monkeypatch.setattr(sys, "argv", ["modern-llm", "export", "--output-dir", "model"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "export: give the checkpoint first" in capsys.readouterr().err
