"""Pickles and code of others in every place from which something is loaded: none of them ever runs.

A canary writes a file when it is unpickled, imported or called. Each is planted where a library might read it, and the real
thing is loaded, resumed or refused.
"""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import save_start, stopped_after_first_save, tiny_model, write_jsonl
from huggingface_hub import constants
from transformers import PreTrainedTokenizerFast

from modern_llm.checkpoint import MANIFEST, read_manifest, write_manifest
from modern_llm.config import DPOConfig, InstructionDatasetConfig, PreferenceDatasetConfig, TrainingConfig, UserError
from modern_llm.data.readers import BadRows
from modern_llm.data.sources import open_source, stream_rows
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.data.tokenizer import load_tokenizer
from modern_llm.initial.checkpoint import load_model
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_sft import run_sft


class Canary:
    """Says in a file that it was unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


class Nest:
    """A folder to plant canaries in, and the file that they would write."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "canary-sang"
        self.pickle = pickle.dumps({"weight": Canary(self.marker)})
        self.code = f"open({str(self.marker)!r}, 'w')\nclass Stranger: ...\n"

    def plant(self, *paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.pickle)

    def plant_torch(self, path: Path) -> None:
        torch.save({"weight": Canary(self.marker)}, path)

    def is_silent(self) -> bool:
        return not self.marker.exists()


@pytest.fixture
def nest(tmp_path: Path) -> Nest:
    return Nest(tmp_path)


@pytest.fixture
def model(start: Path, tmp_path: Path) -> Path:
    """A copy of a good model folder."""
    return Path(shutil.copytree(start, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def training(folder: Path, **settings: Any) -> TrainingConfig:
    return TrainingConfig(output_dir=folder, batch_size=2, max_steps=2, mixed_precision="fp32", **settings)


CHATS = InstructionDatasetConfig(dataset_name="builtin:village", max_rows=6)


def test_a_canary_sings_where_a_pickle_is_loaded(nest: Nest, tmp_path: Path) -> None:
    nest.plant_torch(tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert not nest.is_silent()
    nest.marker.unlink()
    pickle.loads(nest.pickle)
    assert not nest.is_silent()


def test_a_model_folder_full_of_pickles_and_code_trains_without_them(model: Path, nest: Nest, tmp_path: Path) -> None:
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.pkl", "model.pkl", "vocab.pkl")
    nest.plant(*(model / name for name in names), model / "training" / "optimizer.pt")
    nest.plant_torch(model / "pytorch_model.bin")
    for name in ("modeling_qwen3.py", "stranger.py", "__init__.py", "tokenization.py"):
        (model / name).write_text(nest.code)
    mapped = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "stranger.Stranger")
    edit(model / "config.json", auto_map=mapped)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "stranger.Stranger"]})
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(nest.code)
    final = run_sft(model, training(tmp_path / "out"), CHATS)
    assert nest.is_silent()
    assert not {path.suffix for path in final.rglob("*")} & {".bin", ".pt", ".pth", ".pkl", ".py"}


def _only_bin(folder: Path, nest: Nest) -> None:
    (folder / "model.safetensors").unlink()
    nest.plant_torch(folder / "pytorch_model.bin")


def _bin_shards(folder: Path, nest: Nest) -> None:
    (folder / "model.safetensors").unlink()
    nest.plant_torch(folder / "shard.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "shard.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards_elsewhere(folder: Path, nest: Nest) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _own_class(folder: Path, nest: Nest) -> None:
    (folder / "stranger.py").write_text(nest.code)
    edit(folder / "config.json", model_type="stranger", auto_map={"AutoConfig": "stranger.Stranger"})


def _adapter(folder: Path, nest: Nest, **settings: Any) -> None:
    base = folder.parent / "base"
    folder.rename(base)
    folder.mkdir()
    shutil.copy(base / "tokenizer.json", folder)
    default = {"peft_type": "LORA", "base_model_name_or_path": "../base", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**default, **settings}))


def _adapter_bin(folder: Path, nest: Nest) -> None:
    _adapter(folder, nest)
    nest.plant_torch(folder / "adapter_model.bin")


def _adapter_pickle(folder: Path, nest: Nest) -> None:
    _adapter(folder, nest)
    nest.plant(folder / "adapter_model.safetensors")


def _adapter_import(folder: Path, nest: Nest) -> None:
    _adapter(folder, nest, megatron_config={"a": 1}, megatron_core="stranger")
    nest.plant(folder / "adapter_model.safetensors")
    (Path.cwd() / "stranger.py").write_text(nest.code)


def _adapter_of_itself(folder: Path, nest: Nest) -> None:
    _adapter(folder, nest, base_model_name_or_path="../other")
    shutil.copytree(folder, folder.parent / "other")
    edit(folder.parent / "other" / "adapter_config.json", base_model_name_or_path="../model")


REFUSED: dict[str, tuple[Callable[[Path, Nest], None], str]] = {
    "weights as .bin": (_only_bin, "holds no model"),
    "an index of .bin files": (_bin_shards, "'shard.bin', which is no safetensors file"),
    "an index of files elsewhere": (_shards_elsewhere, "which is no safetensors file of that folder"),
    "a pickle under the name of safetensors": (lambda f, n: n.plant(f / "model.safetensors"), "SafetensorError"),
    "a class of its own": (_own_class, "code of its own, which is never run"),
    "attention from the hub": (lambda f, n: edit(f / "config.json", attn_implementation="evil/x"), "asks for code"),
    "attention from the hub, deeper": (
        lambda f, n: edit(f / "config.json", sub={"_attn_implementation": {"": "evil/code:f"}}), "asks for code from the hub"
    ),
    "adapters as .bin": (_adapter_bin, r"no adapter_model.safetensors is there"),
    "adapters that are a pickle": (_adapter_pickle, "SafetensorError"),
    "adapters that name a module": (_adapter_import, "megatron_config"),
    "adapters under themselves": (_adapter_of_itself, "is a model under itself"),
    "settings of 100,000 levels": (lambda f, n: (f / "config.json").write_text('{"a":' * 10**5), "nested more than 100 levels"),
    "settings without end": (lambda f, n: _sparse(f / "config.json"), "more than 256 MiB"),
    "settings that are a device": (lambda f, n: _linked(f / "generation_config.json"), "is no file"),
}  # fmt: skip


def _sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(5 * 2**30)


def _linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_is_code_or_has_no_end_is_refused(
    kind: str, model: Path, nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spoil, reason = REFUSED[kind]
    spoil(model, nest)
    with pytest.raises(UserError, match=reason) as refused:
        load_model(model, "sft_checkpoint")
    assert str(refused.value).startswith(f"sft_checkpoint='{model}'")
    assert "\n" not in str(refused.value)
    assert nest.is_silent()
    assert "stranger" not in sys.modules


SPOILT: dict[str, Callable[[Path, Nest], None]] = {
    "a pickle": lambda path, nest: nest.plant(path),
    "100,000 levels": lambda path, nest: path.write_text('{"a":' * 10**5 + "1" + "}" * 10**5) and None,
    "no end": lambda path, nest: _sparse(path),
    "a list": lambda path, nest: path.write_text("[1]") and None,
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", SPOILT)
def test_a_tokenizer_that_is_none_is_refused(name: str, kind: str, model: Path, nest: Nest) -> None:
    SPOILT[kind](model / name, nest)
    with pytest.raises(UserError) as refused:
        load_tokenizer(model)
    assert str(refused.value).startswith(f"tokenizer_name='{model}'")
    assert nest.is_silent()


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.ckpt", "model.pkl", "model.safetensors"])
def test_a_file_as_a_checkpoint_is_refused(name: str, nest: Nest, tmp_path: Path) -> None:
    nest.plant_torch(tmp_path / name)
    with pytest.raises(UserError, match="a checkpoint is a folder"):
        run_sft(tmp_path / name, training(tmp_path / "out"), CHATS)
    assert nest.is_silent()


def test_a_model_of_the_hub_in_pickles_or_code_is_refused(
    model: Path, nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--somebody--model"
    snapshot = repository / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.parent.mkdir(parents=True)
    shutil.move(model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    load_model("somebody/model")  # it is found, so that what follows is refused for what it is
    load_tokenizer("somebody/model")
    (snapshot / "stranger.py").write_text(nest.code)
    whole = (snapshot / "config.json").read_text()
    edit(snapshot / "config.json", model_type="stranger", auto_map={"AutoConfig": "stranger.Stranger"})
    with pytest.raises(UserError, match="code of its own"):
        load_model("somebody/model")
    edit(snapshot / "config.json", attn_implementation="evil/code")
    with pytest.raises(UserError, match="asks for code from the hub"):
        load_model("somebody/model")
    (snapshot / "config.json").write_text(whole)
    _bin_shards(snapshot, nest)
    with pytest.raises(UserError, match="no safetensors file"):
        load_model("somebody/model")
    (snapshot / "model.safetensors.index.json").unlink()
    nest.plant_torch(snapshot / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors, but pytorch_model\.bin"):
        load_model("somebody/model")
    assert nest.is_silent()


@pytest.mark.parametrize("name", ["training/state.safetensors", "training/state.json", "model.safetensors"])
def test_a_periodic_checkpoint_that_holds_a_pickle_is_not_resumed(name: str, start: Path, nest: Nest, tmp_path: Path) -> None:
    config = training(tmp_path / "out", save_every=1)
    with stopped_after_first_save():
        run_sft(start, config, CHATS)
    (found,) = (tmp_path / "out" / "checkpoints").iterdir()
    nest.plant(found / name, found / "training" / "optimizer.pt", found / "training" / "rng_state.pth")
    manifest = read_manifest(found)
    assert manifest is not None
    (found / MANIFEST).unlink()
    write_manifest(found, {key: value for key, value in manifest.items() if key not in ("files", "versions", "format")})
    with pytest.raises(UserError, match=str(found)):
        run_sft(start, config, CHATS)
    assert nest.is_silent()


@pytest.mark.parametrize("place", ["every file", "arrays of objects"])
def test_pickles_in_the_cache_are_built_anew(
    place: str, start: Path, nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "pairs.jsonl", rows)))

    def train(name: str) -> dict[str, Any]:
        final = run_dpo(start, training(tmp_path / name), DPOConfig(max_length=64), pairs)
        return (read_manifest(final) or {})["weights"]

    weights = train("first")
    entries = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.suffix for path in entries} == {".npy", ".bin", ".json", ".safetensors"}
    if place == "every file":
        nest.plant(*entries)
    for path in cache.glob("*/*.npy") if place == "arrays of objects" else ():
        np.save(path, np.array([Canary(nest.marker)], dtype=object), allow_pickle=True)  # numpy keeps them as a pickle
        index = path.with_name("index.json")
        edit(index, files={**json.loads(index.read_text())["files"], path.name: path.stat().st_size})
    assert train("second") == weights
    assert nest.is_silent()


def _parquet(path: Path, nest: Nest) -> None:
    """A column of the type that pyarrow once unpickled."""
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": nest.pickle}
    schema = pa.schema([pa.field("text", pa.binary(), metadata=kind)])
    pq.write_table(pa.Table.from_arrays([pa.array([b"a"])], schema=schema), path)


def _saved_by_datasets(path: Path, nest: Nest) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(path)
    (table,) = path.glob("*.arrow")
    nest.plant(table, path / "dataset.pkl", path / "indices.pt")


DATA: dict[str, tuple[str, Callable[[Path, Nest], None]]] = {
    "a .pkl file": ("rows.pkl", lambda path, nest: nest.plant(path)),
    "a folder of .pkl files": ("rows", lambda path, nest: nest.plant(path / "train.pkl", path / "test.pickle")),
    "a pickle called .jsonl": ("rows.jsonl", lambda path, nest: nest.plant(path)),
    "a pickle called .json": ("rows.json", lambda path, nest: nest.plant(path)),
    "a pickle called .parquet": ("rows.parquet", lambda path, nest: nest.plant(path)),
    "a pickle called .csv.gz": ("rows.csv.gz", lambda path, nest: nest.plant(path)),
    "a parquet file with a pickled type": ("rows.parquet", _parquet),
    "a folder of datasets": ("rows", _saved_by_datasets),
    "the pickle reader of datasets": ("pandas", lambda path, nest: nest.plant(path.with_name("train.pkl"))),
    "the builder of a script": ("rows/rows.py", lambda path, nest: path.parent.mkdir() or path.write_text(nest.code)),  # type: ignore[func-returns-value]
}  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
def test_data_that_is_a_pickle_is_refused_or_read_as_bytes(
    kind: str, nest: Nest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name, write = DATA[kind]
    write(tmp_path / name, nest)
    config = InstructionDatasetConfig(dataset_name=name)
    for rows in (
        lambda: open_source(name, config.sources()[name], "text").rows(BadRows(skip=False)),
        lambda: stream_rows(name, config.sources()[name], "text", BadRows(skip=False)),
    ):
        if kind == "a parquet file with a pickled type":
            assert [row.values for row in rows()] == [{"text": b"a"}]
        else:
            with pytest.raises(UserError):
                list(rows())
    assert nest.is_silent()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ cycler.__init__.__globals__.os.system('touch MARKER') }}", "is unsafe"),
        ("{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}{% endfor %}", "is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate"),
    ],
)
def test_a_chat_template_reaches_neither_files_nor_the_system(
    template: str, reason: str, tokenizer: PreTrainedTokenizerFast, nest: Nest, tmp_path: Path
) -> None:
    folder = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "model")
    nest.plant(folder / "tokenizer.pkl", folder / "tokenizer.model", folder / "vocab.pkl")
    (folder / "chat_template.jinja").write_text(template.replace("MARKER", str(nest.marker)))
    with pytest.raises(UserError, match=f"template.*{reason}"):
        run_sft(folder, training(tmp_path / "out"), CHATS)
    assert nest.is_silent()
