"""The reference of preference training: asked once for every pair that a run will visit, and kept on disk.

What is kept does not depend on the loss, β, the learning rate or the length of a run, so every run from the same start on the
same pairs finds it there, and asks only for pairs that no run has visited. The key is a hash of all that decides a number: the
reference's weights, the pairs' tokens, the precision, the attention path, the kind of device, and the code and libraries that
compute it; never a name or a date. Which other pairs a pair was asked with changes its numbers by rounding alone.

A table is kept in parts, each written whole and renamed, so a run that is killed half-way goes on where it was, and several
ranks or runs can fill one table at once. No random number is drawn.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modern_llm import distributed
from modern_llm.checkpoint import storing, weights_hash
from modern_llm.config import UserError
from modern_llm.data.loader import micro_batches
from modern_llm.data.prepared import Example, Mixture, PreparedData, Referenced
from modern_llm.data.store import cache_folder, remove_litter_of_the_dead, scratch_name
from modern_llm.layout import num_scored
from modern_llm.metrics import duration
from modern_llm.models.adapters import adapter_layers, state_without_adapters
from modern_llm.models.policy import Policy
from modern_llm.objectives.answers import answer_scores
from modern_llm.objectives.preference import START_TOLERANCE
from modern_llm.precision import autocast

NAMES = ("_name_or_path", "transformers_version")
"""Fields of a model's config that change no number."""
PART = {"cpu": 64, "cuda": 512}
"""Pairs that are asked together, in the order in which training visits them: what a killed run loses at most."""
ROW_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a packed row; pairs of like length go together, whatever order training has."""
CHECKED = 2
"""Pairs found on disk about which the reference is asked once more."""
TOLD_EVERY = 10.0
"""Seconds between two lines that say how far it is."""

Tell = Callable[[str], None]
"""Where a line for the user goes."""


def with_reference(
    data: PreparedData, reference: Policy, precision: torch.dtype, visited: np.ndarray | None = None, tell: Tell = print
) -> tuple[PreparedData, int]:
    """The pairs with the reference's log-probs, and how many pairs had to be computed for it.

    Args:
        data: pairs; every one that is held out is asked about.
        reference: the frozen start, or the policy itself before its first step; left in the mode in which it came.
        precision: type of its matrix products, the same as the policy's.
        visited: numbers of the training pairs to ask about, in that order; the others have NaN. None: all.
        tell: told how far it is, every ten seconds.
    """
    on = any(not layer.disable_adapters for layer in adapter_layers(reference.model))  # a run goes on with its start's
    weights = weights_hash(reference.model if on else state_without_adapters(reference.model))
    assert isinstance(data.train, Mixture)
    assert isinstance(data.evaluation, Mixture)
    numbers = np.arange(len(data.train)) if visited is None else visited
    train, computed = _table(data.train, numbers, reference, precision, weights, tell)
    evaluation, more = _table(data.evaluation, np.arange(len(data.evaluation)), reference, precision, weights, tell)
    known = (Referenced(data.train, train.numpy()), Referenced(data.evaluation, evaluation.numpy()))
    return PreparedData(*known, report=data.report), computed + more


def asked_now(examples: list[Example], reference: Policy, precision: torch.dtype) -> list[Example]:
    """A few pairs with the reference's log-probs; nothing is read or kept."""
    table = _compute(examples, reference, precision)
    return [replace(example, reference=row) for example, row in zip(examples, table.numpy(), strict=True)]


def _table(
    examples: Mixture, wanted: np.ndarray, reference: Policy, precision: torch.dtype, weights: str, tell: Tell
) -> tuple[Tensor, int]:
    if not len(wanted):
        return torch.full((len(examples), 2, 2), float("nan")), 0
    folder = cache_folder() / f"reference-{_key(examples, reference, precision, weights)}"
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_litter_of_the_dead(folder)
    # together: no rank may see what another one has written by then, or they would share out different lists
    table, kept = distributed.together(_read_all)(folder, len(examples))
    known, computed = kept, 0
    # the second time what another rank wrote is missing, if the ranks do not share a file system
    for step in (distributed.world_size(), 1):
        missing, size = wanted[~known[wanted]], PART[reference.device.type]
        parts = [missing[start : start + size] for start in range(0, len(missing), size)]
        mine = parts[distributed.rank() % step :: step]
        computed += distributed.together(_fill)(folder, mine, examples, reference, precision, tell)
        table, known = _read_all(folder, len(examples)) if len(missing) else (table, known)
    assert bool(known[wanted].all()), f"{folder}: a part vanished while it was read"
    _check(table, wanted[kept[wanted]][:CHECKED], examples, reference, precision, folder)
    return table, computed


def _check(
    table: Tensor, pairs: np.ndarray, examples: Mixture, reference: Policy, precision: torch.dtype, folder: Path
) -> None:
    """Ask about a few pairs that were on disk again.

    Raises:
        UserError: the answer differs by more than rounding.
    """
    asked = [examples[int(i)] for i in pairs]
    if not asked:
        return
    lengths = torch.tensor([[num_scored(segment) for segment in example.segments] for example in asked]).clamp_min(1)
    differences = (_compute(asked, reference, precision) - table[pairs]).abs().amax(2) / lengths
    worst, allowed = float(differences.max()), START_TOLERANCE[precision]
    if worst > allowed:
        row = asked[int(differences.amax(1).argmax())].row
        raise UserError(
            f"row {row}: policy and reference differ by {worst:.3g} nats a token before the first step (at most {allowed:g} by "
            f"rounding in {precision}): remove the cache folder of the reference, {folder}"
        )


def _fill(
    folder: Path, parts: list[np.ndarray], examples: Mixture, reference: Policy, precision: torch.dtype, tell: Tell
) -> int:
    """Compute these parts; returns how many pairs they hold."""
    total, done, began = sum(map(len, parts)), 0, time.monotonic()
    told = began
    for part in parts:
        pairs = np.sort(part)  # of pairs that are as long, the first of the data set comes first
        table = _compute([examples[int(i)] for i in pairs], reference, precision)
        tensors = {"pairs": torch.from_numpy(pairs), "logprobs": table}
        scratch = folder / scratch_name(_name(pairs))
        with storing(folder):
            try:
                save_file(tensors, scratch, metadata={"sha256": _sha256(tensors)})
                scratch.replace(folder / _name(pairs))
            finally:
                scratch.unlink(missing_ok=True)
        done, now = done + len(pairs), time.monotonic()
        if now - told >= TOLD_EVERY and done < total:
            rate, told = done / (now - began), now
            tell(f"reference: {done} of {total} pairs, {rate:.1f} a second, {duration((total - done) / rate)} left")
    return total


@torch.no_grad()
def _compute(pairs: list[Example], reference: Policy, precision: torch.dtype) -> Tensor:
    """(pairs, 2, 2) fp32 on the host."""
    table = torch.full((len(pairs), 2, 2), float("nan"))
    modes = {module: module.training for module in reference.modules()}
    reference.eval()
    # so that the pairs of a row are alike; `row` says where each belongs
    part = sorted((replace(pair, row=i) for i, pair in enumerate(pairs)), key=lambda pair: -pair.num_tokens)
    for batch in micro_batches(part, None, ROW_TOKENS[reference.device.type]):
        with autocast(precision, reference.device):
            scores = answer_scores(reference, batch.row.to(reference.device))
        table[batch.row_ids] = torch.stack([scores.whole, scores.first], dim=2).float().cpu()
    for module, training in modes.items():
        module.training = training
    return table


def _name(pairs: np.ndarray) -> str:
    return f"{hashlib.sha256(pairs.tobytes()).hexdigest()[:32]}.safetensors"


def _read_all(folder: Path, size: int) -> tuple[Tensor, np.ndarray]:
    """(size, 2, 2) what all parts say, and (size,) which pairs they speak of; a part that is damaged is not there."""
    table, known = torch.full((size, 2, 2), float("nan")), np.zeros(size, dtype=bool)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("pairs", "logprobs")}
                wanted = (file.metadata() or {})["sha256"]
        except (FileNotFoundError, SafetensorError, KeyError):
            continue
        pairs, logprobs = tensors.values()
        fits = logprobs.shape == (len(pairs), 2, 2) and logprobs.dtype == torch.float32 and pairs.dtype == torch.int64
        if fits and _sha256(tensors) == wanted:
            table[pairs], known[pairs] = logprobs, True
    return table, known


def _sha256(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()


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
