"""The command line as a user types it: real arguments, real files, real exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_jsonl

from modern_llm import cli
from modern_llm.checkpoint import read_manifest
from modern_llm.config import PipelineConfig
from modern_llm.config.base import did_you_mean
from modern_llm.config.commands import DPOArguments, PlanArguments

TINY = "{batch_size: 2, max_steps: 2, log_every: 1}"


def run(monkeypatch: pytest.MonkeyPatch, *words: str, command: str | None = None) -> int:
    """Exit code of `modern-llm WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["modern-llm", *words])
    try:
        cli.main(command)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def dpo_file(tmp_path: Path, pairs: Path, more: str = "") -> Path:
    file = tmp_path / "dpo.yaml"
    file.write_text(
        f"train_config: {{output_dir: {tmp_path / 'out'}, batch_size: 2, max_steps: 2}}\n"
        f"dpo_config: {{beta: 0.3, max_length: 64}}\npreference_config: {{dataset_name: {pairs}}}\n{more}",
        encoding="utf-8",
    )
    return file


def test_dpo_by_its_module_takes_a_file_and_an_override(start: Path, pairs: Path, tmp_path: Path) -> None:
    words = ["--sft-checkpoint", str(start), "--config", str(dpo_file(tmp_path, pairs)), "--dpo-config.beta", "0.08"]
    done = subprocess.run(
        [sys.executable, "-m", "modern_llm.training.train_dpo", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars and warnings of libraries
    final = tmp_path / "out" / "dpo_final"
    assert done.stdout.splitlines()[-1] == str(final)
    manifest = read_manifest(final)
    assert manifest is not None
    assert manifest["config"]["dpo"]["beta"] == 0.08  # the option goes over the file
    assert manifest["config"]["dpo"]["max_length"] == 64  # what no option names stays
    first = done.stdout.split("step=1 ")[1] if "step=1 " in done.stdout else done.stdout.split("step=2 ")[1]
    assert first.startswith("loss=0.69")


def test_an_override_may_be_written_key_equals_value(
    start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = dpo_file(tmp_path, pairs)
    words = ["--config", str(file), f"sft_checkpoint={start}", "dpo_config.beta=0.5", "train_config.max_steps=1"]
    assert run(monkeypatch, "dpo", *words) == 0
    manifest = read_manifest(tmp_path / "out" / "dpo_final")
    assert manifest is not None
    assert (manifest["config"]["dpo"]["beta"], manifest["step"]) == (0.5, 1)


@pytest.mark.parametrize("stage", ["train_lm", "train_sft", "train_dpo"])
def test_every_stage_explains_its_options_without_loading_torch(stage: str) -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        f"from modern_llm.cli import main\ntry: main({'pretrain' if stage == 'train_lm' else stage[6:]!r})\n"
        "except SystemExit as stop: assert not stop.code\nassert 'torch' not in sys.modules"
    )
    code = code.replace("main(pretrain)", "main('pretrain')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--train-config.learning-rate" in done.stdout
    assert "Peak learning rate" in done.stdout


WRONG = [
    (["dpo", "--dpo-config.betta", "0.1"], "unknown option '--dpo-config.betta'; did you mean '--dpo-config.beta'?"),
    (
        ["dpo", "--per-device-train-batch-size", "8"],
        "unknown option '--per-device-train-batch-size': it is --train-config.micro-batch-size here (batch_size is that of a",
    ),
    (["dpo", "train_config.lora_r=8"], "unknown option '--train-config.lora-r': it is --train-config.adapter.rank here"),
    (
        ["run", "--save-steps", "8"],
        "it is --sft.train.save-every or --dpo.train.save-every or --pretrain.train.save-every here",
    ),
    (["sft", "--hub-model-id", "me/x"], "nothing is uploaded: use `modern-llm export`, then `hf upload`"),
    (["dpo", "--dpo-config.beta", "much", "--sft-checkpoint", "x"], "dpo_config.beta"),
    (
        ["dpo", "--sft-checkpoint", "x", "train_config.eval_every=5", "preference_config.dataset_name=x.jsonl"],
        "train_config.eval_every=5, and nothing is held out to evaluate on: set eval_fraction, eval_split or eval_dataset of",
    ),
    (["sft", "--pretrain-checkpoint", "x"], "train_config.dataset_name is required: set it, or give a data set config"),
    (["pretrain", "train_config.dataset_name=missing.jsonl"], "dataset_name='missing.jsonl': no such file"),
    (["dpo", "--sft-checkpoint", "runs/a/b", "train_config.dataset_name=x"], "sft_checkpoint='runs/a/b': no such folder"),
    (["verify", "nowhere"], "nowhere: no such folder"),
    (["diff", "nowhere", "there"], "nowhere: no such folder"),
    (["replay", "nowhere", "--checkpoint", "x"], "nowhere: no such folder"),
    (["export", "./nowhere", "--output-dir", "x"], "checkpoint='./nowhere': no such folder"),
    (["dpo", "--dpo-config.beta", "0.1"], "sft_checkpoint: is required"),
    (["rum"], "unknown command 'rum'; did you mean 'run'?"),
    (["run", "missing.yaml"], "missing.yaml: cannot be read"),
    (["run"], "run: give the file first, e.g. modern-llm run configs/quickstart.yaml"),
    (["run", "--dry-run"], "run: give the file first"),
    (["run", "x.yaml", "--dry-run=maybe"], "--dry-run: must be true or false (got 'maybe')"),
    (["run", "x.yaml", "--config", "y.yaml"], "--config: give it once"),
    (["run", "seed=1"], "nothing to do"),
    (["run", "seed"], "seed: cannot be read"),
    (["run", "--seed"], "--seed: give a value"),
    (["pretrain", "pretrain.yaml"], "unexpected word 'pretrain.yaml': a file is given as --config pretrain.yaml"),
    (["diff", "a"], "diff: give two checkpoints, e.g. modern-llm diff runs/a/sft_final runs/b/sft_final"),
    (["diff", "a", "b", "--rows", "2"], "unknown option '--rows': there are none"),
    (["verify", "a", "--config", "x.yaml"], "unknown option '--config': there are none"),
    (["schema", "pipeline"], "unexpected word 'pipeline'"),
    (
        ["run", "gates=foo"],
        """--gates: give a JSON object, such as --gates '{"sft": {"right_answers": ">= 0.8"}}', or null for none""",
    ),
    (["run", '--gates={"sft": 3'], "--gates: give a JSON object"),
    (
        ["pretrain", "--train-config.learning-rates", "foo"],
        "give a JSON object, such as --train-config.learning-rates '{\"embeddings\": 0.003}', or null for none",
    ),
    (["dpo", "--sft-checkpoint", "x", "train_config.z_loss=1e-4"], "z_loss belongs to pretraining and SFT: leave it out"),
    (["pretrain", "--model-config.d-model", "30", "--model-config.n-heads", "4"], "d_model=30 is not a multiple of n_heads=4"),
    (
        ["pretrain", "train_config.batch_size=4", "train_config.micro_batch_size=6"],
        "micro_batch_size=6 is more than batch_size=4",
    ),
    (
        ["pretrain", *(f"train_config.{n}" for n in ("batch_size=16", "micro_batch_size=2", "gradient_accumulation_steps=4"))],
        "batch_size=16 is not micro_batch_size × gradient_accumulation_steps × ranks = 2 × 4 × 1 = 8",
    ),
    (["sft", "--pretrain-checkpoint", "old.pt", "dataset_config.dataset_name=builtin:village"], "a checkpoint is a folder"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(words)[:40] for words, _ in WRONG])
def test_a_wrong_call_is_one_line_and_exit_code_2(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ")
    assert out == ""
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_no_wrong_call_waits_for_torch(tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("{start_checkpoint: m, sft: {data: {dataset_name: x}, train: {lerning_rate: 1}}}")
    (tmp_path / "early.yaml").write_text("{pretrain: {data: {dataset_name: x}, train: {eval_every: 1}}}")
    files = [["run", "typo.yaml"], ["run", "early.yaml"], ["plan", "early.yaml"], ["inspect", "typo.yaml"]]
    code = (
        "import runpy, sys\n"
        "from modern_llm import cli\n"
        f"calls = [('modern_llm', words) for words in {[words for words, _ in WRONG] + files!r}]\n"
        "calls += [(f'modern_llm.training.{stage}', ['--bad']) for stage in ('train_lm', 'train_sft', 'train_dpo')]\n"
        "for module, words in calls:\n"
        "    sys.argv = ['x', *words]\n"
        "    try: runpy.run_module(module, run_name='__main__')\n"
        "    except SystemExit as stop: assert stop.code == 2, words\n"
        "    else: raise AssertionError(words)\n"
        "    assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("error: ") == len(WRONG) + len(files) + 3


def test_an_option_like_none_is_answered_with_the_three_nearest(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "dpo", "--train-config.zzz", "1") == 2
    said = capsys.readouterr().err
    assert said.count("--") == 5  # the option itself, three others, and --help
    assert said.startswith("error: unknown option '--train-config.zzz'; nearest are --train-config.")


def test_trackers_may_be_given_as_text(tmp_path: Path) -> None:
    file = tmp_path / "dpo.yaml"
    for text, found in (("wandb", ("wandb",)), ("none", ()), ("wandb,tensorboard", ("wandb", "tensorboard"))):
        file.write_text(f"{{sft_checkpoint: m, train_config: {{report_to: '{text}'}}}}", encoding="utf-8")
        words = ["--sft-checkpoint", "m", f"train_config.report_to={text}"]
        for given in (["--config", str(file)], words):
            assert cli.parse(DPOArguments, "dpo", given).train_config.report_to == found


STAGE_FILES = {
    "pretrain": "{model_config: {d_model: 32, n_heads: 4}, train_config: {dataset_name: x}}",
    "sft": "{pretrain_checkpoint: m, train_config: {dataset_name: x}}",
    "dpo": "{sft_checkpoint: m, train_config: {dataset_name: x}}",
}


@pytest.mark.parametrize("stage", STAGE_FILES)
def test_a_file_for_another_command_is_answered_with_that_command(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stage.yaml").write_text(STAGE_FILES[stage], encoding="utf-8")
    Path("whole.yaml").write_text("{start_checkpoint: m, sft: {data: {dataset_name: x}}}", encoding="utf-8")
    for words in (["run", "stage.yaml"], ["inspect", "stage.yaml"]):
        assert run(monkeypatch, *words) == 2
        assert (
            capsys.readouterr().err
            == f"error: stage.yaml: a file for modern-llm {stage} --config stage.yaml, not for {words[0]}\n"
        )
    for words in ([stage, "--config", "whole.yaml"], ["compare-losses", "whole.yaml"]):
        assert run(monkeypatch, *words) == 2
        assert capsys.readouterr().err == f"error: whole.yaml: a file for modern-llm run whole.yaml, not for {words[0]}\n"


def test_a_file_without_its_checkpoint_is_not_taken_for_another(tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("{train_config: {dataset_name: missing.jsonl}}", encoding="utf-8")
    assert run(monkeypatch, "sft", "--config", str(file), "--pretrain-checkpoint", "nowhere") == 2
    assert "pretrain_checkpoint='nowhere'" in capsys.readouterr().err


def test_a_name_that_is_no_key_is_answered_with_the_keys_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "pretrain.yaml"
    file.write_text("{model: {d_model: 32}, train_config: {dataset_name: x}}", encoding="utf-8")
    assert run(monkeypatch, "pretrain", "--config", str(file)) == 2
    said = capsys.readouterr().err
    assert "unknown field 'model' in PretrainArguments; known are: dataset_config, model_config, tokenizer_name" in said


@pytest.mark.parametrize("nothing", ["null", "{}"])
def test_nothing_takes_the_place_of_a_files_mapping(nothing: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    data = "data: {dataset_name: x}, train: {learning_rates: {embeddings: 1.0}}"
    file.write_text(f"{{start_checkpoint: m, sft: {{{data}}}, gates: {{sft: {{perplexity: '< 9'}}}}}}", encoding="utf-8")
    for words in ([f"gates={nothing}"], ["--gates", nothing]):
        found = cli.parse(PipelineConfig, "run", ["--config", str(file), *words, f"--sft.train.learning-rates={nothing}"])
        assert found.gates == {}
        assert found.sft is not None
        assert found.sft.train.learning_rates == {}
    laid_over = cli.parse(PipelineConfig, "run", ["--config", str(file), "--sft.train.learning-rates", '{"vectors": 2}'])
    assert laid_over.sft is not None
    assert laid_over.sft.train.learning_rates == {"embeddings": 1.0, "vectors": 2.0}


def test_a_switch_may_stand_alone(tmp_path: Path) -> None:
    for words in (
        ["--fit", "--ranks", "2"],
        ["--ranks", "2", "--fit"],
        ["fit=true", "ranks=2"],
        ["--fit", "true", "--ranks=2"],
    ):
        found = cli.parse(PlanArguments, "plan FILE", words)
        assert (found.fit, found.no_measure, found.ranks) == (True, False, 2)


@pytest.mark.parametrize(
    "words", [["FILE", "--dry-run"], ["--dry-run", "FILE"], ["FILE", "--dry-run", "true"], ["FILE", "dry_run=true"]]
)
def test_a_dry_run_says_what_would_run_and_leaves_nothing_behind(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    data = "data: {dataset_name: 'builtin:village', max_rows: 4}"
    file.write_text(f"{{output_dir: {tmp_path / 'out'}, pretrain: {{{data}}}, sft: {{{data}}}}}", encoding="utf-8")
    assert run(monkeypatch, "run", *(word.replace("FILE", str(file)) for word in words)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("pretrain: train")
    assert second == "sft: train: pretrain runs first; a result that is there is reused if pretrain ends as before"
    assert not (tmp_path / "out").exists()


USAGES = {
    "run": "run FILE [--dry-run]",
    "diff": "diff CHECKPOINT CHECKPOINT",
    "verify": "verify CHECKPOINT",
    "schema": "schema",
}


@pytest.mark.parametrize("command", USAGES)
def test_help_shows_what_a_command_takes_and_no_more(command: str, monkeypatch, capsys) -> None:
    assert run(monkeypatch, command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"usage: modern-llm {USAGES[command]} [-h]" in shown
    assert ("--config FILE" in shown) == (command == "run")
    assert ("--dry-run" in shown) == (command == "run")


def test_an_unknown_key_of_a_file_is_named_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("sft: {data: {dataset_name: x}, train: {lerning_rate: 1}}\nstart_checkpoint: y\n", encoding="utf-8")
    assert run(monkeypatch, "run", str(file)) == 2
    message = capsys.readouterr().err
    assert str(file) in message
    assert "sft.train" in message
    assert "did you mean 'learning_rate'?" in message


def test_the_schema_describes_a_pipeline_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"pretrain", "sft", "dpo", "seed"} <= schema["properties"].keys()
    assert "description" in schema["$defs"]["TrainingConfig"]["properties"]["learning_rate"]


def test_a_suggestion_goes_by_the_last_part_of_a_name() -> None:
    known = ["--train-config.optimizer", "--train-config.keep-checkpoints", "--dpo-config.beta", "--train-config.save-every"]
    assert "did you mean" not in did_you_mean("--train-config.save-total-limit", known)
    assert did_you_mean("--train-config.save-evry", known) == "; did you mean '--train-config.save-every'?"
    assert did_you_mean("--train.bta", known) == "; did you mean '--dpo-config.beta'?"
    assert did_you_mean("batchsize", ["batch_size", "seed"]) == "; did you mean 'batch_size'?"
