"""Broken manifests: read, or refused in a line that names the file; no traceback, no hang, no file written elsewhere."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fuzz import CASES, damaged, mutated, try_cases

from modern_llm.checkpoint import MANIFEST, OWN_HASH, read_manifest, seal, verify
from modern_llm.config import InstructionDatasetConfig, TrainingConfig, UserError
from modern_llm.initial.checkpoint import identity
from modern_llm.lineage import explain_difference, verify_lineage
from modern_llm.models.adapter_folders import adapter_section, base_of
from modern_llm.reuse import decide
from modern_llm.training.resume import newest_checkpoint
from modern_llm.training.train_sft import run_sft

PIECES = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\xe2\x80\xae", b"{", b"[" * 2000, b'{"a":' * 2000, b'"', b'"\\ud800"',
    b'"\\u0000"', b"NaN", b"1e999", b"9" * 5000, b'"../../x"', b'"/etc/passwd"', b",", b":", b"null", b'"files": {}, ',
    b'"size": 1, ', b"\\",
)  # fmt: skip
"""What is put into the bytes."""


@pytest.fixture(scope="module")
def run(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run with adapters: `sft_final`, and `checkpoints/step-000001`."""
    folder = tmp_path_factory.mktemp("run")
    data = InstructionDatasetConfig(dataset_name="builtin:village", max_rows=8)
    config = TrainingConfig(
        output_dir=folder, adapter={"rank": 2}, batch_size=4, max_steps=2, save_every=1, mixed_precision="fp32"
    )  # type: ignore[arg-type] - as a file gives it
    assert run_sft(start, config, data) == folder / "sft_final"
    return folder


def hash_of(content: dict[str, Any]) -> str:
    """The hash that a manifest of this content has."""
    with tempfile.TemporaryDirectory() as folder:
        seal(Path(folder), content)
        return json.loads((Path(folder) / MANIFEST).read_text())[OWN_HASH]


def broken(manifest: dict[str, Any], case: int) -> bytes:
    """The manifest of a number."""
    chance = random.Random(case)
    whole = json.dumps(manifest, indent=2).encode()
    if case % 10 < 4:
        return damaged(whole, chance, PIECES)
    try:
        changed = json.dumps(mutated(manifest, chance), default=str)
        content = json.loads(changed)
        if case % 10 < 9 and isinstance(content, dict):  # hash included, as somebody would who means harm
            return json.dumps({**content, OWN_HASH: hash_of(content)}).encode("utf-8", "surrogatepass")
        return changed.encode("utf-8", "surrogatepass")
    except (RecursionError, TypeError):  # too deep for what writes it, or a key of a kind that JSON has not
        return b'{"files": ' + b"[" * 5000


@pytest.mark.parametrize("place", ["sft_final", "checkpoints/step-000001"])
def test_broken_manifests_are_read_or_refused_by_name(place: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / place
    manifest = read_manifest(folder)
    assert manifest is not None
    whole = (folder / MANIFEST).read_bytes()
    inputs = manifest["inputs"]
    record = {name: manifest[name] for name in ("stage", "config", "parent", "start_weights", "data", "tokenizer")}
    monkeypatch.chdir(folder)

    number = 0

    def write(case: int) -> str:
        nonlocal number
        number = case
        (folder / MANIFEST).write_bytes(broken(manifest, case))
        return str(run)

    def read() -> None:
        refusal: UserError | None = None
        always = (
            lambda: verify(folder),
            lambda: newest_checkpoint(run / ("sft_final" if place == "sft_final" else "absent_final"), record),
            lambda: base_of(folder, "sft_checkpoint"),
            lambda: adapter_section(folder),
            lambda: identity(folder),
        )
        in_turn = (
            lambda: verify_lineage(folder),
            lambda: explain_difference(folder, run / "sft_final"),
            lambda: decide("sft", TrainingConfig(output_dir=run), inputs, any_code=True),
        )
        for reader in (*always, in_turn[number % len(in_turn)]):
            try:
                reader()
            except UserError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    try:
        counts = try_cases(-(-CASES // 2), write, read, run)
    finally:
        (folder / MANIFEST).write_bytes(whole)
    print(f"\nfuzzed manifests of {place}: {counts}")
    assert (counts.tracebacks, counts.hangs, counts.strays) == ([], [], [])
    assert counts.accepted + counts.refused == counts.cases
    verify(folder)
