"""The reference of preference training: asked once for every pair, before the first step, and kept on disk.

What is kept does not depend on the loss, β or the learning rate, so every run from the same start on the same pairs finds it
there. The key is a hash of all that decides a number: the reference's weights, the pairs' tokens, the precision, the attention
path, the kind of device, and the code and libraries that compute it; never a name or a date.

A table is kept in parts, each written whole and renamed, so a run that is killed half-way goes on where it was, and several
ranks or runs can fill one table at once. No random number is drawn.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from modern_llm import distributed
from modern_llm.checkpoint import storing, weights_hash
from modern_llm.data.loader import micro_batches
from modern_llm.data.prepared import Example, Mixture, PreparedData, Referenced
from modern_llm.data.store import cache_folder, remove_litter_of_the_dead, scratch_name
from modern_llm.models.adapters import adapter_layers, state_without_adapters
from modern_llm.models.policy import Policy
from modern_llm.objectives.answers import answer_scores
from modern_llm.precision import autocast

NAMES = ("_name_or_path", "transformers_version")
"""Fields of a model's config that change no number."""
PART = 512
"""Pairs to a part: what a killed run loses at most."""
ROW_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a packed row; pairs of like length go together, whatever order training has."""


def with_reference(data: PreparedData, reference: Policy, precision: torch.dtype) -> tuple[PreparedData, int]:
    """Every pair with the reference's log-probs, and how many pairs had to be computed for it.

    Args:
        data: pairs.
        reference: the frozen start, or the policy itself before its first step; left in the mode in which it came.
        precision: type of its matrix products, the same as the policy's.
    """
    on = any(not layer.disable_adapters for layer in adapter_layers(reference.model))  # a run goes on with its start's
    weights = weights_hash(reference.model if on else state_without_adapters(reference.model))
    assert isinstance(data.train, Mixture)
    assert isinstance(data.evaluation, Mixture)
    train, computed = _table(data.train, reference, precision, weights)
    evaluation, more = _table(data.evaluation, reference, precision, weights)
    known = (Referenced(data.train, train.numpy()), Referenced(data.evaluation, evaluation.numpy()))
    return PreparedData(*known, report=data.report), computed + more


def _table(examples: Mixture, reference: Policy, precision: torch.dtype, weights: str) -> tuple[Tensor, int]:
    if not len(examples):
        return torch.zeros(0, 2, 2), 0
    folder = cache_folder() / f"reference-{_key(examples, reference, precision, weights)}"
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_litter_of_the_dead(folder)
    starts = range(0, len(examples), PART)
    mine = [start for number, start in enumerate(starts) if number % distributed.world_size() == distributed.rank()]
    computed = distributed.together(_fill)(folder, mine, examples, reference, precision)
    # what another rank wrote is missing here if the ranks do not share a file system
    computed += distributed.together(_fill)(folder, list(starts), examples, reference, precision)
    parts = [_read(folder / _name(start), min(PART, len(examples) - start)) for start in starts]
    found = [part for part in parts if part is not None]
    assert len(found) == len(parts), f"{folder}: a part vanished while it was read"
    return torch.cat(found), computed


def _fill(folder: Path, starts: list[int], examples: Mixture, reference: Policy, precision: torch.dtype) -> int:
    """Compute the parts that are not there; returns how many pairs that were."""
    wanted = {start: min(PART, len(examples) - start) for start in starts}
    missing = [start for start, size in wanted.items() if _read(folder / _name(start), size) is None]
    with tqdm(total=sum(wanted[s] for s in missing), desc="reference", unit=" pairs", disable=None, leave=False) as bar:
        for start in missing:
            part = [replace(examples[start + i], row=i) for i in range(wanted[start])]
            table = _compute(part, reference, precision)
            scratch = folder / scratch_name(_name(start))
            with storing(folder):
                try:
                    save_file({"logprobs": table}, scratch, metadata={"sha256": _sha256(table)})
                    scratch.replace(folder / _name(start))
                finally:
                    scratch.unlink(missing_ok=True)
            bar.update(wanted[start])
    return sum(wanted[start] for start in missing)


@torch.no_grad()
def _compute(part: list[Example], reference: Policy, precision: torch.dtype) -> Tensor:
    """(pairs, 2, 2) fp32 on the host."""
    table = torch.full((len(part), 2, 2), float("nan"))
    modes = {module: module.training for module in reference.modules()}
    reference.eval()
    part.sort(key=lambda example: -example.num_tokens)  # so that the pairs of a row are alike; `row` says where each belongs
    for batch in micro_batches(part, None, ROW_TOKENS[reference.device.type]):
        with autocast(precision, reference.device):
            scores = answer_scores(reference, batch.row.to(reference.device))
        table[batch.row_ids] = torch.stack([scores.whole, scores.first], dim=2).float().cpu()
    for module, training in modes.items():
        module.training = training
    return table


def _name(start: int) -> str:
    return f"{start:09d}.safetensors"


def _read(path: Path, size: int) -> Tensor | None:
    """A part, or None where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            table, wanted = file.get_tensor("logprobs"), (file.metadata() or {})["sha256"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return table if table.shape == (size, 2, 2) and table.dtype == torch.float32 and _sha256(table) == wanted else None


def _sha256(table: Tensor) -> str:
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()


def _key(examples: Mixture, reference: Policy, precision: torch.dtype, weights: str) -> str:
    device = reference.device
    decides = {
        "weights": weights,
        "architecture": {k: v for k, v in reference.model.config.to_dict().items() if k not in NAMES},
        "pairs": examples.fingerprint(),
        "precision": str(precision),
        "attention": reference.attention,
        "path": (reference.packs, reference.plain_head, reference.compiled),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "code": _code_version(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _code_version() -> str:
    """sha256 of the code that computes log-probs of a packed row."""
    root = Path(__file__).parents[1]
    files = [
        root / "layout.py",
        Path(__file__),
        Path(__file__).with_name("answers.py"),
        *sorted((root / "models").glob("*.py")),
        *sorted((root / "losses").glob("*.py")),
    ]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
