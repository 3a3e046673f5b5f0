"""Checkpoint folders: written under a temporary name and renamed, with a manifest of every file; no pickle anywhere.

A folder holds what `transformers` writes (`model.safetensors`, `config.json`, tokenizer files), `modern_llm.json` (the
manifest) and, where a run can be resumed from it, `training/` (state as safetensors + JSON).
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modern_llm.config import UserError
from modern_llm.config.base import shown
from modern_llm.config.io import read_json
from modern_llm.config.training import RUN_NAME
from modern_llm.secrets import record_without_secrets

MANIFEST = "modern_llm.json"
STATE_TENSORS = "training/state.safetensors"
STATE_JSON = "training/state.json"
_TENSOR = "$tensor"
MOST_STATE_BYTES = 2**28


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends without an error, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp makes it private; a checkpoint is read by others
        yield scratch
        publish_folder(scratch, target, replace=True)  # the same step may be saved again after a resume
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish_folder(scratch: Path, target: Path, replace: bool) -> None:
    """Give a complete folder its name, all of it on disk first.

    Args:
        scratch: on the same file system.
        target: the name.
        replace: whether it takes the place of a folder of that name; else that one stays and `scratch` is left.
    """
    for path in scratch.rglob("*"):
        _sync(path)
    _sync(scratch)
    if replace and target.exists():
        shutil.rmtree(target)
    try:
        scratch.rename(target)
    except OSError:
        if replace or not target.is_dir():
            raise
    _sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    _sync(scratch)
    scratch.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(model: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 over the names and bytes of every parameter and buffer that is saved, tied ones once per name."""
    digest = hashlib.sha256()
    for name, tensor in sorted((model.state_dict() if isinstance(model, nn.Module) else model).items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    return {name: version(name) for name in ("modern-llm", "torch", "transformers", "tokenizers")}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `modern_llm.json`: the given content without secrets, versions, and size and sha256 of every other file."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"format": 1, **record_without_secrets(content), "versions": versions(), "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path | str) -> dict[str, Any] | None:
    """The manifest of one of our folders; None for any other model folder or a hub id.

    Raises:
        UserError: the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path, "manifest")
    wrong = [name for name, kind in _KINDS.items() if not isinstance(manifest.get(name), kind | None)]
    wrong += ["files"] if manifest.get("files") is None else []
    if not wrong:
        run = manifest.get("run") or "run"  # a part of the names of folders
        wrong += [] if len(run) <= 200 and re.fullmatch(RUN_NAME, run) else ["run"]
        entries = {name: entry if isinstance(entry, dict) else {} for name, entry in manifest["files"].items()}
        wrong += [n for n, e in entries.items() if not isinstance(e.get("size"), int) or not isinstance(e.get("sha256"), str)]
    if wrong:
        raise UserError(f"{path}: damaged manifest, what it says of {shown(wrong[0])}: use another checkpoint")
    return manifest


_KINDS: dict[str, type] = {
    **dict.fromkeys(("files", "versions", "config", "parent", "adapter"), dict),
    **dict.fromkeys(("stage", "run", "weights", "start_weights", "data", "tokenizer", "tokenizer_name", "precision"), str),
    "step": int,
}
"""Types of what a manifest says; any of it may be missing or null."""


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a folder's manifest names, which is in that folder and nowhere else.

    A snapshot of the hub's cache is a folder of links to the `blobs` beside it; these are where they belong.

    Raises:
        UserError: the name is absolute, has `..` or other parts that lead elsewhere, or is a link out of the folder.
    """
    parts = name.split("/")
    odd = not name.isprintable() or "\\" in name or ":" in name or len(name.encode()) > 1000
    if odd or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        raise UserError(f"{folder / MANIFEST}: names {shown(name)}, which is no file of that folder: use another checkpoint")
    path, root = folder / name, folder.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    real = Path(os.path.realpath(path))  # resolve() raises where links run in a circle
    if not any(real.is_relative_to(home) for home in homes):
        raise UserError(f"{path}: a link to a file outside of the checkpoint: use another one")
    return path


def verify(folder: Path | str) -> None:
    """Compare every file of one of our folders with its manifest; other folders pass.

    Raises:
        UserError: a file is missing or differs, by name.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    for name, expected in manifest["files"].items():
        path = inside(Path(folder), name)
        if not path.is_file():
            raise UserError(f"{path}: missing from the checkpoint: use another one")
        if path.stat().st_size != expected["size"] or sha256_of_file(path) != expected["sha256"]:
            raise UserError(f"{path}: differs from what was saved (size or sha256): use another checkpoint")


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Save a nested dict of tensors, numbers, strings, lists and None as one safetensors and one JSON file."""
    tensors: dict[str, Tensor] = {}

    def describe(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            unique = f"{len(tensors)}:{name}"  # a slash in a key could make two names one
            tensors[unique] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: unique}
        if isinstance(value, dict):
            assert all(isinstance(key, str) and key != _TENSOR for key in value), (
                f"{name}: a dict with other keys than names is no state"
            )
            return {key: describe(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [describe(item, f"{name}/{i}") for i, item in enumerate(value)]
        assert value is None or isinstance(value, (bool, int, float, str)), f"{name}: {type(value)} is no state"
        return value

    described = describe(state, "state")
    (folder / STATE_JSON).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / STATE_TENSORS)
    (folder / STATE_JSON).write_text(json.dumps(described), encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` saved, tensors on the CPU.

    Raises:
        UserError: one of the two files is damaged, or they do not belong together.
    """
    try:
        tensors = load_file(folder / STATE_TENSORS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / STATE_TENSORS}: cannot be read ({error}): use another checkpoint") from None

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[_TENSOR]] if _TENSOR in value else {key: restore(item) for key, item in value.items()}
        if isinstance(value, list):
            return [restore(item) for item in value]
        return value

    try:
        return restore(read_json(folder / STATE_JSON, most_bytes=MOST_STATE_BYTES))
    except (KeyError, TypeError):
        raise UserError(f"{folder / STATE_JSON}: names a tensor that is not there: use another checkpoint") from None
