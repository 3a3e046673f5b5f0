"""Names that come from elsewhere lead nowhere: not out of a checkpoint, nor to files outside of output folder and cache."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from fuzz import watched_writes
from huggingface_hub import constants

from modern_llm.checkpoint import MANIFEST, inside, read_manifest, seal, verify, write_manifest
from modern_llm.config import InstructionDatasetConfig, TrainingConfig, UserError
from modern_llm.data.store import CACHE_VARIABLE
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
    seal(checkpoint, manifest)
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
    """A folder in which everything is: the cache, that of the hub, and where the run is started."""
    home = tmp_path / "home"
    home.mkdir()
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
    assert {path.name for path in closed.iterdir()} <= {"out", "cache"}
    assert read_manifest(final) is not None
