"""The pipeline as a build system: what is the same is reused, what changed runs again, and nothing that was made is lost."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import made_once, stopped_after_first_save, write_jsonl

from modern_llm import PipelineConfig, cli, load_config, run_pipeline
from modern_llm.checkpoint import read_manifest
from modern_llm.config import UserError
from modern_llm.config.io import dump_yaml
from modern_llm.exit_codes import GATE_MISSED, GateError, Stopped
from modern_llm.pipeline import plan_pipeline
from modern_llm.training import inputs

CHATS = [{"prompt": f"Who bakes number {n}?", "completion": f"Anna bakes {n}."} for n in range(6)]
PAIRS = [{"prompt": f"Who bakes number {n}?", "chosen": "Anna bakes.", "rejected": f"Nobody {n}."} for n in range(12)]


def config_in(folder: Path, **changes: Any) -> PipelineConfig:
    """A tiny pipeline whose data and results lie in one folder; changes as `sft={"train": {"seed": 1}}`."""
    train = {"batch_size": 2, "max_steps": 2, "log_every": 1, "save_every": 1, "mixed_precision": "fp32"}
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "vocab_size": 300}
    content: dict[str, Any] = {
        "output_dir": folder / "runs",
        "pretrain": {"model": shape, "data": {"dataset_name": str(folder / "text.jsonl")}, "train": {**train}},
        "sft": {"data": {"dataset_name": str(folder / "chats.jsonl")}, "train": {**train}},
        "dpo": {
            "data": {"dataset_name": str(folder / "pairs.jsonl"), "eval_fraction": 0.4},
            "dpo": {"max_length": 64, "beta": 0.1},
            "train": {**train},
        },
        "evaluation": {"max_pairs": 4, "max_questions": 2, "max_new_tokens": 2},
    }
    for name, value in changes.items():
        if isinstance(value, dict) and name in ("pretrain", "sft", "dpo"):
            for section, fields in value.items():
                content[name][section] = {**content[name].get(section, {}), **fields}
        else:
            content[name] = value
    return PipelineConfig.model_validate(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A pipeline that has run; copy before changing."""

    def make(folder: Path) -> None:
        write_jsonl(folder / "text.jsonl", [{"text": chat["completion"] * 8} for chat in CHATS])
        write_jsonl(folder / "chats.jsonl", CHATS)
        write_jsonl(folder / "pairs.jsonl", PAIRS)
        run_pipeline(config_in(folder))

    return made_once(tmp_path_factory, "finished_pipeline", make)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def weights(folder: Path) -> dict[str, str]:
    """Hash of every stage's final weights."""
    found = {}
    for stage in ("pretrain", "sft", "dpo"):
        manifest = read_manifest(folder / "runs" / stage / f"{stage}_final")
        assert manifest is not None
        found[stage] = manifest["weights"]
    return found


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def actions(config: PipelineConfig) -> dict[str, str]:
    return {decision.stage: decision.action for decision in plan_pipeline(config)}


def test_a_finished_pipeline_is_reused_whole_and_measured_once(folder: Path) -> None:
    before = inodes(folder)
    result = run_pipeline(config_in(folder))
    after = inodes(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"runs/results.json", "runs/results.md"}
    assert result.metrics["dpo"]["pairs"] > 0


def test_a_dry_run_says_why_and_changes_nothing(folder: Path, capsys) -> None:
    before = inodes(folder)
    plan = plan_pipeline(config_in(folder, dpo={"dpo": {"beta": 0.3}}))
    assert [str(decision).split(": ")[1] for decision in plan] == ["reuse", "reuse", "train"]
    assert plan[-1].why == "changed: dpo.beta: 0.1 there, 0.3 now"
    plan = plan_pipeline(config_in(folder, sft={"train": {"seed": 5}}))
    assert [decision.action for decision in plan] == ["reuse", "train", "train"]
    assert plan[1].why == "changed: train.seed: 0 there, 5 now"
    assert plan[2].why == "sft runs first; a result that is there is reused if sft ends as before"
    assert inodes(folder) == before


def test_moving_beta_runs_preference_training_alone_and_moving_it_back_runs_nothing(folder: Path) -> None:
    before = weights(folder)
    old = inodes(folder / "runs" / "dpo" / "dpo_final")
    run_pipeline(config_in(folder, dpo={"dpo": {"beta": 0.3}, "train": {"learning_rate": 0.01}}))
    after = weights(folder)
    assert (after["pretrain"], after["sft"]) == (before["pretrain"], before["sft"])
    assert after["dpo"] != before["dpo"]
    assert len(list((folder / "runs" / "dpo" / "superseded").iterdir())) == 1
    run_pipeline(config_in(folder))
    assert weights(folder) == before
    assert inodes(folder / "runs" / "dpo" / "dpo_final") == old
    assert actions(config_in(folder, dpo={"dpo": {"beta": 0.3}, "train": {"learning_rate": 0.01}}))["dpo"] == "reuse"


def test_a_renamed_run_repeats_nothing(folder: Path) -> None:
    before = weights(folder)
    result = run_pipeline(config_in(folder, sft={"train": {"run_name": "tuned"}}))
    assert result.checkpoints["sft"].name == "tuned_final"
    manifest = read_manifest(result.checkpoints["sft"])
    assert manifest is not None
    assert (manifest["run"], manifest["weights"]) == ("tuned", before["sft"])
    assert (folder / "runs" / "sft" / "sft_final").is_dir()
    assert weights(folder) == before


def test_a_folder_that_was_moved_repeats_nothing(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "elsewhere")
    assert set(actions(config_in(tmp_path / "elsewhere")).values()) == {"reuse"}


def test_changed_rows_run_from_their_stage_on(folder: Path) -> None:
    write_jsonl(folder / "chats.jsonl", [*CHATS, {"prompt": "New?", "completion": "Yes."}])
    assert actions(config_in(folder)) == {"pretrain": "reuse", "sft": "train", "dpo": "train"}


def test_a_stage_that_ends_as_before_is_followed_by_none(folder: Path) -> None:
    """`learning_rate: 2e-5` written out is the default; a save every other step cannot change a weight."""
    same = config_in(folder, sft={"train": {"learning_rate": 2e-5, "save_every": 2, "log_every": 2, "eval_every": 1}})
    assert set(actions(same).values()) == {"reuse"}
    shutil.rmtree(folder / "runs" / "sft" / "sft_final")
    shutil.rmtree(folder / "runs" / "sft" / "checkpoints")
    old = inodes(folder / "runs" / "dpo" / "dpo_final")
    run_pipeline(config_in(folder))
    assert inodes(folder / "runs" / "dpo" / "dpo_final") == old


def test_what_was_half_done_goes_on_when_its_config_comes_back(folder: Path, capsys) -> None:
    other = config_in(folder, dpo={"dpo": {"beta": 0.3}})
    with stopped_after_first_save():
        run_pipeline(other)
    assert actions(other)["dpo"] == "resume"
    run_pipeline(config_in(folder))
    assert actions(other)["dpo"] == "resume"
    capsys.readouterr()
    run_pipeline(other)
    assert "dpo: resuming from" in capsys.readouterr().out


def test_what_was_half_done_goes_on_under_another_name(folder: Path, capsys) -> None:
    changed = {"dpo": {"beta": 0.3}}
    with stopped_after_first_save():
        run_pipeline(config_in(folder, dpo=changed))
    renamed = config_in(folder, dpo={**changed, "train": {"run_name": "careful"}})
    assert actions(renamed)["dpo"] == "resume"
    capsys.readouterr()
    assert run_pipeline(renamed).checkpoints["dpo"].name == "careful_final"
    assert "careful: resuming from" in capsys.readouterr().out


def test_other_code_runs_again_unless_that_is_to_be_ignored(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "code_version", lambda module: "0" * 64)
    plan = plan_pipeline(config_in(folder))
    assert plan[0].action == "train"
    assert "code.modern_llm" in plan[0].why
    assert set(actions(config_in(folder, ignore_code_changes=True)).values()) == {"reuse"}


def test_a_damaged_result_is_made_again_from_its_newest_whole_checkpoint(folder: Path, capsys) -> None:
    before = weights(folder)
    path = folder / "runs" / "sft" / "sft_final" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    plan = plan_pipeline(config_in(folder))
    assert plan[1].action == "resume"
    assert "model.safetensors: differs from what was saved" in plan[1].why
    capsys.readouterr()
    run_pipeline(config_in(folder))
    assert "resuming from" in capsys.readouterr().out
    assert weights(folder) == before


def test_a_run_that_is_refused_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "chats.jsonl").write_text("{broken\n")
    start = folder / "runs" / "pretrain" / "pretrain_final"
    content = {
        "output_dir": tmp_path / "new",
        "start_checkpoint": start,
        "sft": {"data": {"dataset_name": str(folder / "chats.jsonl")}},
    }
    with pytest.raises(UserError, match="line 1: not JSON"):
        run_pipeline(PipelineConfig.model_validate(content))
    assert not (tmp_path / "new").exists()


def test_a_users_own_files_stay_where_they_are(folder: Path) -> None:
    mine = folder / "runs" / "dpo" / "notes_final" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    run_pipeline(config_in(folder, dpo={"dpo": {"beta": 0.4}}))
    assert mine.read_text() == "mine"


def test_two_stages_in_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the folder of two stages"):
        config_in(tmp_path, sft={"train": {"output_dir": tmp_path / "x"}}, dpo={"train": {"output_dir": tmp_path / "x"}})


# Gates


def test_a_missed_gate_stops_before_the_next_stage_with_the_report_written(folder: Path) -> None:
    shutil.rmtree(folder / "runs" / "dpo")
    with pytest.raises(GateError, match=r"gates.sft.preference_accuracy: 0.5, and > 0.6 is wanted"):
        run_pipeline(config_in(folder, gates={"sft": {"preference_accuracy": "> 0.6"}}))
    assert not (folder / "runs" / "dpo").exists()
    written = json.loads((folder / "runs" / "results.json").read_text())
    assert set(written["stages"]) == {"pretrain", "sft"}
    assert list(run_pipeline(config_in(folder, gates={"sft": {"preference_accuracy": ">= 0.5"}})).checkpoints) == [
        *("pretrain", "sft", "dpo")
    ]


def test_a_metric_that_nothing_measures_misses_its_gate(folder: Path) -> None:
    with pytest.raises(GateError, match=r"gates.sft.right_answers: nothing of this pipeline's data measures it"):
        run_pipeline(config_in(folder, gates={"sft": {"right_answers": ">= 0"}}))


@pytest.mark.parametrize("limit", ["0.8", ">= many", "=> 0.8", "", ">= 1.2.3", "== 1"])
def test_a_limit_that_cannot_be_read_is_refused_with_an_example(tmp_path: Path, limit: str) -> None:
    with pytest.raises(ValueError, match="is no limit: write one of"):
        config_in(tmp_path, gates={"sft": {"right_answers": limit}})


def test_a_start_and_a_metric_that_do_not_exist_are_named_as_the_file_names_them(folder: Path) -> None:
    (folder / "run.yaml").write_text("start_checkpoint: x/y\nsft:\n  data: {dataset_name: 'builtin:village'}\n")
    with pytest.raises(UserError, match=r"^start_checkpoint='x/y': no such path, not in the local cache"):
        plan_pipeline(load_config(PipelineConfig, folder / "run.yaml"))
    (folder / "run.yaml").write_text(
        "start_checkpoint: x/y\nsft:\n  data: {dataset_name: 'builtin:village'}\ngates: {sft: {right: '> 0'}}\n"
    )
    with pytest.raises(UserError, match=r"gates\.sft\.right: Input should be 'perplexity'"):
        load_config(PipelineConfig, folder / "run.yaml")


def test_a_gate_of_a_stage_that_is_not_there_is_refused(tmp_path: Path) -> None:
    content = config_in(tmp_path).model_dump(exclude={"dpo"}, exclude_unset=True)
    with pytest.raises(ValueError, match="there is no dpo stage"):
        PipelineConfig.model_validate({**content, "gates": {"dpo": {"right_answers": "> 0"}}})


def test_the_command_exits_with_the_codes_of_the_docs(folder: Path, monkeypatch, capsys) -> None:
    (folder / "run.yaml").write_text(dump_yaml(config_in(folder, gates={"sft": {"preference_accuracy": "> 0.6"}})))
    monkeypatch.setattr(sys, "argv", ["modern-llm", "run", str(folder / "run.yaml"), "--dry-run"])
    cli.main()
    assert capsys.readouterr().out.count(": reuse: same inputs: ") == 3
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    with pytest.raises(SystemExit) as gated:
        cli.main()
    assert gated.value.code == GATE_MISSED
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: gates.sft.preference_accuracy: 0.5")


def test_the_pipelines_time_is_over_before_a_stage(folder: Path, monkeypatch) -> None:
    with pytest.raises(Stopped) as stopped:
        run_pipeline(config_in(folder, max_minutes=1e-9))
    assert stopped.value.code == 75
    assert "before pretrain" in stopped.value.reason


def test_a_config_error_of_a_later_stage_comes_before_anything_is_moved(folder: Path) -> None:
    before = inodes(folder)
    with pytest.raises(UserError, match="no such file"):
        plan_pipeline(config_in(folder, dpo={"data": {"dataset_name": str(folder / "absent.jsonl")}}))
    assert inodes(folder) == before
