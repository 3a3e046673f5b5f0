"""The whole pipeline, tiny, through its real stages and its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from modern_llm import PipelineConfig, UserError, load_config, run_pipeline
from modern_llm.checkpoint import read_manifest
from modern_llm.exit_codes import GateError

TRAIN = "{batch_size: 8, max_steps: 2, log_every: 1}"


def files_in(folder: Path) -> dict[str, str]:
    """One folder with a train and a test file for each stage."""
    rows = {
        "text": [{"text": f"Anna bakes {n} loaves of bread, and the river rises at dawn."} for n in range(40)],
        "chats": [{"prompt": f"Who bakes number {n}?", "completion": f"Anna bakes {n}."} for n in range(40)],
        "pairs": [{"prompt": f"Who bakes number {n}?", "chosen": "Anna bakes.", "rejected": f"Nobody {n}."} for n in range(40)],
    }
    for kind, content in rows.items():
        (folder / kind).mkdir()
        write_jsonl(folder / kind / "train.jsonl", content[:30])
        write_jsonl(folder / kind / "test.jsonl", content[30:])
    return {kind: str(folder / kind) for kind in rows}


VILLAGE = dict.fromkeys(("text", "chats", "pairs"), "builtin:village")


def pipeline_file(folder: Path, data: dict[str, str], architecture: str = "qwen3") -> Path:
    file = folder / "pipeline.yaml"
    file.write_text(
        f"""
output_dir: {folder / "runs"}
pretrain:
  model: {{architecture: {architecture}, d_model: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, max_seq_len: 64, vocab_size: 400}}
  data: {{dataset_name: "{data["text"]}", eval_split: test, max_rows: 100}}
  train: {TRAIN}
sft:
  data: {{dataset_name: "{data["chats"]}", eval_split: test, max_rows: 50, max_length: 64}}
  train: {TRAIN}
dpo:
  data: {{dataset_name: "{data["pairs"]}", eval_split: test, max_rows: 50}}
  dpo: {{max_length: 64}}
  train: {TRAIN}
evaluation: {{max_blocks: 4, max_questions: 4, max_pairs: 8, max_new_tokens: 4}}
""",
        encoding="utf-8",
    )
    return file


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "gpt_oss"])
def test_every_architecture_goes_through_the_three_stages(architecture: str, tmp_path: Path) -> None:
    data = VILLAGE if architecture == "qwen3" else files_in(tmp_path)
    result = run_pipeline(load_config(PipelineConfig, pipeline_file(tmp_path, data, architecture)))
    assert list(result.checkpoints) == ["pretrain", "sft", "dpo"]
    written = json.loads((result.report.parent / "results.json").read_text(encoding="utf-8"))
    assert written["stages"] == result.metrics
    assert result.metrics["sft"]["preference_accuracy"] == 0.5  # against itself, by definition
    assert result.metrics["sft"]["kl_to_sft"] == 0.0
    of_the_village = {"right_answers", "preferred_form"} if data is VILLAGE else set()
    assert set(result.metrics["dpo"]) == {"perplexity", "preference_accuracy", "kl_to_sft", "pairs"} | of_the_village
    for stage, folder in result.checkpoints.items():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
        manifest = read_manifest(folder)
        assert manifest is not None
        assert manifest["stage"] == stage
    parents = [read_manifest(folder) for folder in result.checkpoints.values()]
    for child, parent in zip(parents[1:], parents[:-1], strict=True):
        assert child is not None
        assert parent is not None
        assert child["parent"]["weights"] == parent["weights"]  # the chain is closed


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path: Path) -> None:
    weights, data = [], files_in(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        config = load_config(PipelineConfig, pipeline_file(tmp_path / name, data))
        config = config.model_copy(update={"seed": seed, "sft": None, "dpo": None})
        manifest = read_manifest(run_pipeline(config).checkpoints["pretrain"])
        assert manifest is not None
        weights.append(manifest["weights"])
    assert weights[0] == weights[1] != weights[2]


def test_a_missed_gate_keeps_the_rows_of_stages_that_are_done(tmp_path: Path) -> None:
    config = load_config(PipelineConfig, pipeline_file(tmp_path, files_in(tmp_path)))
    before = run_pipeline(config).report.read_text(encoding="utf-8")
    gated = config.model_copy(update={"gates": {"pretrain": {"perplexity": "< 1"}, "dpo": {"perplexity": "< 1"}}})
    with pytest.raises(GateError) as missed:
        run_pipeline(gated)
    assert [line.split(":")[0] for line in str(missed.value).splitlines()] == [
        "gates.pretrain.perplexity",
        "gates.dpo.perplexity",
    ]
    after = (tmp_path / "runs" / "results.md").read_text(encoding="utf-8")
    rows = [[line for line in text.splitlines() if line.startswith("| ")] for text in (before, after)]
    assert rows[0] == rows[1]
    assert len(rows[1]) >= 4


def test_a_pipeline_refuses_what_a_later_stage_could_not_do_before_the_first_stage(tmp_path: Path) -> None:
    config = load_config(PipelineConfig, pipeline_file(tmp_path, files_in(tmp_path)))
    assert config.dpo is not None
    blind = config.dpo.data.model_copy(update={"eval_split": None})
    train = config.dpo.train.model_copy(update={"eval_every": 1})
    dpo = config.dpo.model_copy(update={"data": blind, "train": train})
    with pytest.raises(UserError, match=r"dpo\.train\.eval_every=1, and nothing is held out"):
        run_pipeline(config.model_copy(update={"dpo": dpo}))
    assert not (tmp_path / "runs").exists()


def test_a_gate_that_is_missed_ends_every_rank_of_torchrun(tmp_path: Path) -> None:
    """Only the main rank measures; the others would wait for it in the next stage."""
    file = pipeline_file(tmp_path, files_in(tmp_path))
    with file.open("a", encoding="utf-8") as config:
        config.write('gates: {pretrain: {perplexity: "> 1"}, sft: {preference_accuracy: ">= 0.9"}}\n')
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, "-m", "modern_llm", "run", str(file)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert done.stderr.count("gates.sft.preference_accuracy: 0.5, and >= 0.9 is wanted") == 2, done.stderr[-3000:]
    assert (tmp_path / "runs" / "sft" / "sft_final" / "modern_llm.json").is_file()
    assert "| sft |" in (tmp_path / "runs" / "results.md").read_text(encoding="utf-8")
    assert not (tmp_path / "runs" / "dpo").exists()
