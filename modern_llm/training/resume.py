"""Which checkpoint in a run's folder a run goes on from: the same inputs, or none at all."""

from pathlib import Path
from typing import Any

from modern_llm.checkpoint import read_manifest
from modern_llm.config import UserError
from modern_llm.config.base import one_line
from modern_llm.secrets import record_without_secrets


def newest_checkpoint(output_dir: Path, run_name: str, final: Path, record: dict[str, Any]) -> Path | None:
    """The finished checkpoint, or else the newest one to resume from, if made from the same inputs.

    Raises:
        UserError: made from other inputs.
    """
    record = record_without_secrets(record)  # as the manifest has it
    candidates = [final, *sorted((output_dir / "checkpoints").glob("step-*"), reverse=True)]
    for folder in candidates:
        manifest = read_manifest(folder)
        if manifest is None:
            if folder == final and folder.exists():
                raise UserError(
                    f"{final} is there and is no checkpoint of ours: use another output_dir or run_name, or remove it"
                )
            continue
        other = manifest.get("run")
        if folder != final and other != run_name and (output_dir / f"{other}_final").is_dir():
            continue  # left by another run, which is finished
        difference = first_difference({name: manifest.get(name) for name in record}, record)
        if difference is None and manifest.get("run") == run_name:
            return folder
        why = one_line(difference or f"run_name: {manifest.get('run')!r} there, {run_name!r} now")
        raise UserError(
            f"output_dir={str(output_dir)!r} holds {folder.name} of a run with other inputs ({why}): use another output_dir or "
            f"run_name, or remove that folder"
        )
    return None


# where a run is written, how it reports and when it saves or evaluates cannot change its result
_IRRELEVANT = (
    *(f"config.train.{name}" for name in ("output_dir", "report_to", "log_every", "eval_every", "save_every")),
    "config.train.tokenizer_name",
    "tokenizer_name",  # its content is compared
    "parent.checkpoint",
)


def first_difference(there: Any, now: Any, path: str = "") -> str | None:
    """`train.seed: 0 there, 1 now` for the first difference between two records; None if equal."""
    if path in _IRRELEVANT:
        return None
    if isinstance(there, dict) and isinstance(now, dict):
        for name in sorted(there.keys() | now.keys()):
            inner = first_difference(there.get(name), now.get(name), f"{path}.{name}" if path else name)
            if inner is not None:
                return inner
        return None
    return None if there == now else f"{path.removeprefix('config.')}: {there!r} there, {now!r} now"
