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
from modern_llm.exit_codes import StorageError
from modern_llm.secrets import record_without_secrets

MANIFEST = "modern_llm.json"
STATE_TENSORS = "training/state.safetensors"
STATE_JSON = "training/state.json"
OWN_HASH = "manifest_sha256"
_TENSOR = "$tensor"
MOST_STATE_BYTES = 2**28
_SCRATCH = ".partial"


class DamagedError(UserError):
    """A checkpoint is not what was saved."""


@contextmanager
def storing(target: Path) -> Iterator[None]:
    """Inside, a failing write becomes an error that says what was to be written, and why it was not.

    Raises:
        StorageError: in place of the system's error, which safetensors and tokenizers wrap in errors of their own.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and not (type(error) is Exception and "(os error " in str(error)):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(f"{target}: could not be written: {reason}") from error


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends without an error, and vanishes otherwise.

    Raises:
        StorageError: something could not be written; what had the name before is as it was.
    """
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SCRATCH, dir=target.parent))
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
        remove_folder(target)
    try:
        scratch.rename(target)
    except OSError:
        if replace or not target.is_dir():
            raise
    _sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder such that nobody finds half of it under its name."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=_SCRATCH, dir=folder.parent))
    try:
        folder.rename(aside / folder.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_litter(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder; only for who is alone in writing there."""
    for path in folder.glob(f".*{_SCRATCH}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        StorageError: it could not be written; the old content is there.
    """
    scratch = path.with_name(f".{path.name}{_SCRATCH}")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text(text, encoding="utf-8")
            _sync(scratch)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


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
    """Write `modern_llm.json`: the content without secrets, versions, size and sha256 of each file, and a hash of all this."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    seal(folder, {"format": 2, **record_without_secrets(content), "versions": versions(), "files": files})


def periodic_checkpoints(folder: Path) -> list[Path]:
    """What is called `checkpoints/step-…` in a run's folder, newest first."""
    # six digits or more: names of one length go by their letters, and the longer one is the later step
    return sorted((folder / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)


def best_folder(checkpoints: Path, step: int) -> Path:
    """Where the weights of an evaluation are kept, in a run's folder of checkpoints."""
    return checkpoints / f"best-{step:06d}"


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with its own hash."""
    text = json.dumps({**manifest, OWN_HASH: _hash_of(manifest)}, indent=2)
    write_text(folder / MANIFEST, text + "\n")


def _hash_of(manifest: dict[str, Any]) -> str:
    without = {name: value for name, value in manifest.items() if name != OWN_HASH}
    return hashlib.sha256(json.dumps(without, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path | str) -> dict[str, Any] | None:
    """The manifest of one of our folders; None for any other model folder or a hub id.

    Raises:
        DamagedError: the manifest is not what was saved.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = read_json(path, "manifest")
    except UserError as error:
        raise DamagedError(str(error)) from None
    wrong = next(_misshapen(manifest), None)
    if wrong is not None:
        raise DamagedError(f"{path}: damaged manifest, what it says of {shown(wrong)}")
    if manifest[OWN_HASH] != _hash_of(manifest):
        raise DamagedError(f"{path}: damaged manifest: it differs from what was saved (sha256)")
    return manifest


_OBJECTS = ("versions", "config", "parent", "adapter", "inputs", "contract")
_TEXTS = ("stage", "run", "weights", "start_weights", "data", "tokenizer", "tokenizer_name", "precision", "key")


def _misshapen(manifest: dict[str, Any]) -> Iterator[str]:
    """What a manifest says in another form than ours do. It may have been written by anyone, hash included."""
    for kind, names in ((dict, _OBJECTS), (str, _TEXTS), (int, ("step",))):
        yield from (name for name in names if not isinstance(manifest.get(name), kind | None))
    run, key = manifest.get("run") or "run", manifest.get("key") or "0"
    if len(run) > 200 or not re.fullmatch(RUN_NAME, run):  # a part of the names of folders, as the key is
        yield "run"
    if not re.fullmatch("[0-9a-f]{1,64}", key):
        yield "key"
    if not isinstance(manifest.get(OWN_HASH), str):
        yield OWN_HASH
    files = manifest.get("files")
    for name, entry in files.items() if isinstance(files, dict) else (("files", None),):
        known = entry if isinstance(entry, dict) else {}
        if not isinstance(known.get("size"), int) or not isinstance(known.get("sha256"), str):
            yield name


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a folder's manifest names, which is in that folder and nowhere else.

    A snapshot of the hub's cache is a folder of links to the `blobs` beside it; these are where they belong.

    Raises:
        DamagedError: the name is absolute, has `..` or other parts that lead elsewhere, or is a link out of the folder.
    """
    parts = name.split("/")
    odd = not name.isprintable() or "\\" in name or ":" in name or len(name.encode()) > 1000
    if odd or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        raise DamagedError(f"{folder / MANIFEST}: names {shown(name)}, which is no file of that folder")
    path, root = folder / name, folder.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    real = Path(os.path.realpath(path))  # resolve() raises where links run in a circle
    if not any(real.is_relative_to(home) for home in homes):
        raise DamagedError(f"{path}: a link to a file outside of the checkpoint")
    return path


def verify(folder: Path | str) -> dict[str, Any] | None:
    """Compare every file of one of our folders with its manifest, and return that; other folders pass, with None.

    Notes (`*.md`) and hidden files beside those of the manifest are left alone.

    Raises:
        DamagedError: a file is missing, differs, or is one that was not saved there, by name.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for name, expected in manifest["files"].items():
        path = inside(Path(folder), name)
        if not path.is_file():
            raise DamagedError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != expected["size"] or sha256_of_file(path) != expected["sha256"]:
            raise DamagedError(f"{path}: differs from what was saved (size or sha256)")
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in {*manifest["files"], MANIFEST} and path.suffix != ".md" and name[0] != ".":
            raise DamagedError(f"{path}: was not saved with this checkpoint, and could change how it loads: take it out")
    return manifest


def verified(folder: Path) -> None:
    """Compare every file of one of our folders with its manifest.

    Raises:
        DamagedError: a file differs, or the folder is not there.
    """
    if verify(folder) is None:
        raise DamagedError(f"{folder}: missing")


def copied(state: Any) -> Any:
    """A nested state with copies of its tensors on the host, which training can go on without changing."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone() if state.device.type == "cpu" else state.detach().cpu()
    if isinstance(state, dict):
        return {key: copied(item) for key, item in state.items()}
    return [copied(item) for item in state] if isinstance(state, list) else state


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Save a nested dict of tensors, numbers, strings, lists and None as one safetensors and one JSON file."""
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()

    def describe(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            unique = f"{len(tensors)}:{name}"  # a slash in a key could make two names one
            whole = value.detach().cpu().contiguous()
            shares = whole.untyped_storage().nbytes() != whole.nbytes or whole.untyped_storage().data_ptr() in memory
            tensors[unique] = whole.clone() if shares else whole  # safetensors refuses tensors that share memory
            memory.add(tensors[unique].untyped_storage().data_ptr())
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
