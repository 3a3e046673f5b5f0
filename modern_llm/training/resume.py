"""Which checkpoint in a run's folder a run goes on from: the same inputs, or none at all."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modern_llm import distributed
from modern_llm.checkpoint import (
    MANIFEST,
    MOST_STATE_BYTES,
    STATE_JSON,
    DamagedError,
    best_folder,
    periodic_checkpoints,
    read_manifest,
    sha256_of_file,
    verified,
)
from modern_llm.config import UserError
from modern_llm.config.base import one_line
from modern_llm.config.io import read_json
from modern_llm.config.training import no_effect
from modern_llm.lock import LOCK
from modern_llm.secrets import record_without_secrets

SHOWN_DIGITS = 12
"""Of a hash."""


def agreed_checkpoint(final: Path, record: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """`newest_checkpoint` as rank 0 finds it; called on every rank, while rank 0 holds the lock of the folder.

    Raises:
        UserError: as there; or this rank has other inputs than rank 0, or does not see what rank 0 sees.
    """

    def find() -> str:
        found, damaged = newest_checkpoint(final, record)
        name = None if found is None else str(found.relative_to(final.parent))
        manifest = None if found is None else sha256_of_file(found / MANIFEST)
        return json.dumps([record_without_secrets(record), name, manifest, damaged])

    theirs, name, manifest, damaged = json.loads(distributed.main_decides(find)())
    found = None if name is None else final.parent / name
    distributed.together(_check_agreement)(final.parent, record, theirs, found, manifest)
    return found, damaged


def _check_agreement(
    output_dir: Path, record: dict[str, Any], theirs: dict[str, Any], found: Path | None, manifest: str | None
) -> None:
    """Refuse a rank that would train from something else than rank 0.

    Args:
        output_dir: as this rank has it.
        record: of this rank.
        theirs: the record of rank 0.
        found: the checkpoint that rank 0 goes on from.
        manifest: the hash of its manifest.
    """
    mine = json.loads(json.dumps(record_without_secrets(record)))
    if (difference := next(differences(theirs, mine), None)) is not None:
        path, there, here = difference
        raise UserError(one_line(
            f"{path} is {short(here)!r} on this rank and {short(there)!r} on rank 0: give every rank the same config and files"
        ))  # fmt: skip
    if not (output_dir / LOCK).exists():
        raise UserError(
            f"output_dir={str(output_dir)!r}: this rank does not see what rank 0 writes there: put it on a file system that "
            f"every rank sees"
        )
    if found is not None and (not (found / MANIFEST).is_file() or sha256_of_file(found / MANIFEST) != manifest):
        raise UserError(
            f"{found}: rank 0 goes on from this checkpoint, and this rank does not see it: put output_dir={str(output_dir)!r} "
            f"on a file system that every rank sees"
        )


def newest_checkpoint(final: Path, record: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The finished checkpoint, or else the newest one to resume from, if made from the same inputs.

    Args:
        final: where the finished one would be, `<output_dir>/<run_name>_final`.
        record: of the run.

    Returns:
        The folder, every file of it compared with its manifest; None: there is none. And a sentence for each newer one that is
        damaged.

    Raises:
        UserError: made from other inputs.
    """
    record = record_without_secrets(record)  # as the manifest has it
    damaged: list[str] = []
    output_dir, run_name = final.parent, final.name.removesuffix("_final")
    for folder in [final, *periodic_checkpoints(output_dir)]:
        try:
            manifest = read_manifest(folder)
        except DamagedError as error:
            damaged.append(f"{error}")
            continue
        if manifest is None:
            if folder == final and folder.exists():
                raise UserError(
                    f"{final} is there and is no checkpoint of ours: use another output_dir or run_name, or remove it"
                )
            if folder.exists():
                damaged.append(f"{folder / MANIFEST}: missing")
            continue
        other = manifest.get("run")
        if folder != final and other != run_name and (output_dir / f"{other}_final").is_dir():
            continue  # left by another run, which is finished
        difference = first_difference({name: manifest.get(name) for name in record}, record)
        if difference is not None or other != run_name:
            why = one_line(difference or f"run_name: {other!r} there, {run_name!r} now")
            raise UserError(
                f"output_dir={str(output_dir)!r} holds {folder.name} of a run with other inputs ({why}): use another "
                f"output_dir or run_name, or remove that folder"
            )
        try:
            verified(folder)
            if folder != final:
                _verify_best(folder, record)
        except DamagedError as error:
            damaged.append(f"{error}")
            continue
        return folder, damaged
    return None, damaged


def _verify_best(folder: Path, record: dict[str, Any]) -> None:
    """Verify the weights of the best evaluation too, to which a checkpoint of a run that keeps them goes back."""
    if record["config"]["train"].get("keep_best") is None:
        return
    step = read_json(folder / STATE_JSON, most_bytes=MOST_STATE_BYTES)["best"]["step"]
    if step is not None:
        verified(best_folder(folder.parent, step))


_IRRELEVANT = (
    # what these name is compared by content
    "config.train.dataset_name",
    "config.train.tokenizer_name",
    "config.data.dataset_name",
    "config.data.eval_dataset",
    "config.dpo.reference_checkpoint",
    "tokenizer_name",
    "parent.checkpoint",
)


def first_difference(there: Any, now: Any) -> str | None:
    """`train.seed: 0 there, 1 now` for the first difference between two records; None if equal."""
    found = next(differences(there, now), None)
    return None if found is None else f"{found[0]}: {short(found[1])!r} there, {short(found[2])!r} now"


def short(value: Any) -> Any:
    """A hash by its first digits; anything else as it is."""
    is_hash = isinstance(value, str) and len(value) in (40, 64) and set(value) <= set("0123456789abcdef")
    return f"{value[:SHOWN_DIGITS]}…" if is_hash else value


def differences(there: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every difference between two records that can change a result: (path, value there, value now)."""
    if path in _IRRELEVANT:
        return
    if isinstance(there, dict) and isinstance(now, dict):
        # where a run is written, how it reports and when it saves cannot change its result, nor mostly when it evaluates
        skipped = {*no_effect(there)} & {*no_effect(now)} if path == "config.train" else ()
        for name in sorted((there.keys() | now.keys()).difference(skipped)):
            yield from differences(there.get(name), now.get(name), f"{path}.{name}" if path else name)
    elif isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        for number, pair in enumerate(zip(there, now, strict=True)):
            yield from differences(*pair, path=f"{path}.{number}")
    elif there != now:
        yield path.removeprefix("config."), there, now
