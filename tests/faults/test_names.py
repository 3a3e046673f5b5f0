"""Names that come from elsewhere lead nowhere: not out of a checkpoint, nor to files outside of output folder and cache."""

import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from fuzz import watched_writes
from huggingface_hub import constants

from modern_llm.checkpoint import MANIFEST, OWN_HASH, inside, read_manifest, seal, verify, write_manifest
from modern_llm.config import InstructionDatasetConfig, TrainingConfig, UserError
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.lineage import verify_lineage
from modern_llm.reuse import decide, settle
from modern_llm.training.train_sft import run_sft

ELSEWHERE = (
    "/etc/passwd", "../secret", "a/../../secret", "..", ".", "", "a//b", "a/./b", "/", "C:\\secret", "..\\secret", "a\0b",
    "a\nb", "\\\\host\\share", "\ud800", "\u202ea", "x" * 300, "a/" * 600 + "b", "file:///etc/passwd",
)  # fmt: skip
"""Names of files that are not in a folder."""

HOSTILE = (
    "../../secret", "/nowhere/at/all", "a/../../secret", "~nobody/x", "..", "builtin:../x", "builtin:/x", "a\\..\\b", "-rf",
    "builtin:village/../x", "https://user:pass@127.0.0.1:9/x", "hf://datasets/a/b", "file:///etc/passwd", "x" * 5000,
    "é/\u202e", "a b", "json", "somebody/../../x", "models--a--b", "*/../../*.jsonl", "$(touch x)", "`touch x`", "; touch x",
    "a/b@../../x",
)  # fmt: skip
"""Names of data, tokenizers and models that are not there."""


# In a manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("{}")
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1234")
    write_manifest(folder, {"stage": "sft"})
    return folder


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda name: ascii(name)[:20])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(name: str, checkpoint: Path) -> None:
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {"size": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    seal(checkpoint, {key: value for key, value in manifest.items() if key != OWN_HASH})  # as who means harm would
    with pytest.raises(UserError, match="is no file of that folder") as refused:
        verify(checkpoint)
    assert str(refused.value).startswith(f"{checkpoint / MANIFEST}: ")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "../absent"])
def test_a_link_out_of_a_checkpoint_is_refused_by_name(target: str, checkpoint: Path) -> None:
    (checkpoint / "link").symlink_to(target)
    with pytest.raises(UserError, match="a link to a file outside") as refused:
        inside(checkpoint, "link")
    assert str(refused.value).startswith(f"{checkpoint / 'link'}: ")


def test_a_link_to_a_folder_outside_is_refused(checkpoint: Path) -> None:
    (checkpoint / "training").symlink_to(checkpoint.parent)
    with pytest.raises(UserError, match="a link to a file outside"):
        inside(checkpoint, "training/secret")


def test_a_link_within_a_checkpoint_and_the_blobs_of_the_hubs_cache_are_its_own(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "link").symlink_to("model.safetensors")
    assert inside(checkpoint, "link").read_bytes() == b"1234"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blob = tmp_path / "models--a--b" / "blobs" / "4567"
    for folder in (snapshot, blob.parent):
        folder.mkdir(parents=True)
    blob.write_text("x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/4567")
    assert inside(snapshot, "model.safetensors").read_text() == "x"


# In settings


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", ".", "..", "-x", "a\0", "a\n", "é", "x" * 300, "a\\b"])
def test_a_run_name_that_is_no_plain_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="run_name"):
        TrainingConfig(run_name=name)


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which everything is: the caches, what is temporary, and where the run is started."""
    home = tmp_path / "home"
    (home / "temporary").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(home / "temporary"))
    monkeypatch.chdir(home)
    monkeypatch.setenv(CACHE_VARIABLE, str(home / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    return home


def config(name: str) -> TrainingConfig:
    return TrainingConfig(output_dir=Path("out"), max_steps=1, batch_size=1, tokenizer_name=name, mixed_precision="fp32")


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_a_hostile_name_is_refused_and_makes_no_file(name: str, start: Path, closed: Path, tmp_path: Path) -> None:
    village = InstructionDatasetConfig(dataset_name="builtin:village", max_rows=4)
    adapter = closed / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": name}))
    with watched_writes(closed) as strays:
        for what in (
            lambda: run_sft(start, config("x/y"), InstructionDatasetConfig(dataset_name=name)),
            lambda: run_sft(start, config(name), village),
            lambda: run_sft(name, config("x/y"), village),
            lambda: run_sft(adapter, config("x/y"), village),
        ):
            with pytest.raises((UserError, OSError)) as refused:
                what()
            too_long = isinstance(refused.value, OSError) and len(name) > 255  # the command line makes a line of it
            assert too_long or isinstance(refused.value, UserError)
            assert not list(closed.glob("out/*"))
    assert strays == []
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


def test_a_whole_run_writes_to_its_folder_and_the_cache_only(start: Path, closed: Path) -> None:
    village = InstructionDatasetConfig(dataset_name="builtin:village", max_rows=4)
    with watched_writes(closed) as strays:
        final = run_sft(start, config(str(start)).model_copy(update={"report_to": ("tensorboard",), "save_every": 1}), village)
    assert final == Path("out/sft_final")
    assert strays == []
    assert {path.name for path in closed.iterdir()} <= {"out", "cache", "temporary"}
    assert list((closed / "temporary").iterdir()) == []
    assert read_manifest(final) is not None


# What a manifest says that is made into a path, or followed


@pytest.fixture
def finished(start: Path, closed: Path) -> Path:
    village = InstructionDatasetConfig(dataset_name="builtin:village", max_rows=4)
    return run_sft(start, config(str(start)), village)


def changed(checkpoint: Path, **changes: Any) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    seal(checkpoint, {key: value for key, value in {**manifest, **changes}.items() if key != OWN_HASH})


@pytest.mark.parametrize("changes", [{"key": "../../../x"}, {"key": "/tmp/x"}, {"run": "../../x"}, {"run": "x" * 300}])
def test_a_run_is_never_moved_to_where_a_manifest_says(changes: dict[str, Any], finished: Path, closed: Path) -> None:
    changed(finished, **changes)
    with watched_writes(closed / "out") as strays:
        decision = decide("sft", TrainingConfig(output_dir=finished.parent), {"stage": "sft"}, any_code=False)
        assert settle(decision, TrainingConfig(output_dir=finished.parent)) is None
    assert decision.action == "train"
    assert strays == []
    assert finished.is_dir()


def test_a_checkpoint_among_its_own_ancestors_is_named(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(finished, parent={"checkpoint": str(finished), "weights": "0"})
    with pytest.raises(UserError, match="stands among its own ancestors"):
        verify_lineage(finished)
