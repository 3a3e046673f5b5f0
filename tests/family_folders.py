"""What a family's folder must do: load as it is, and be mended or refused when it is damaged.

Checks write the faults that they find into `Facts.faults`, a sentence each. What is expected comes from transformers alone: its
own loading report.
"""

import copy
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from every_family import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modern_llm.config import UserError
from modern_llm.initial.checkpoint import load_model

Weights = dict[str, Tensor]
Settings = dict[str, Any]

WEIGHTS, SETTINGS = "model.safetensors", "config.json"
PREFIXES = ("_orig_mod.", "module.", "base_model.model.")


@dataclass
class Facts:
    """A family as transformers alone sees it."""

    model: PreTrainedModel
    folder: Path
    sees_later: bool
    repeats: bool
    """Two equal calls give equal logits."""
    pads: bool
    """Padding behind a sequence changes nothing before it."""
    reloads: bool
    """transformers itself loads what it saved, with nothing missing and nothing left over."""
    faults: list[str] = field(default_factory=list)
    runs: str = ""
    adapters: str = ""
    damages: list[str] = field(default_factory=list)
    tested: list[str] = field(default_factory=list)


PROBE = torch.randint(5, 256, (1, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = PROBE) -> Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def report(folder: Path) -> set[str] | None:
    """Names that transformers' loading report complains of; None: it does not load the folder at all."""
    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception:  # whatever transformers stumbles over
        return None
    names = [*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])]
    return {*names, *info.get("error_msgs", ())}


@torch.no_grad()
def facts(family: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Facts:
    probed = tiny_model(family)  # RWKV divides weights in place when it is asked in eval mode
    before = logits(probed)
    spread = (logits(probed) - before).abs().max()
    changed = PROBE.clone()
    changed[0, -1] = (changed[0, -1] + 100) % 256
    move = (logits(probed, changed) - before)[:, :-1].abs().max()
    padding = torch.zeros(1, 8, dtype=torch.long)
    mask = torch.cat([torch.ones_like(PROBE), padding], 1)
    padded = probed(input_ids=torch.cat([PROBE, padding], 1), attention_mask=mask, use_cache=False).logits[:, : PROBE.shape[1]]
    pads = bool((padded - before).abs().max() <= 1e-4 * before.abs().max())
    model = tiny_model(family)
    save(model, tokenizer, folder)
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0  # training runs without it; the epsilon of RWKV's norms makes other logits with it
    return Facts(model, folder, bool(move > 10 * spread), bool(spread == 0), pads, report(folder) == set())


# Loading


def difference(model: PreTrainedModel, other: PreTrainedModel) -> str | None:
    """How a loaded model differs from the one that was saved; None: not at all."""
    ours, theirs = model.state_dict(), other.state_dict()
    if type(model) is not type(other):
        return f"it is a {type(model).__name__}, not a {type(other).__name__}"
    changed = [name for name in theirs.keys() | ours.keys() if not equal(ours.get(name), theirs.get(name))]
    return f"{len(changed)} tensors are not what was saved, such as {min(changed)}" if changed else None


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def outcome(folder: Path, saved: PreTrainedModel | None) -> tuple[str, str]:
    """What the product makes of a folder: ("right" or "wrong" or "refused" or "traceback", in words)."""
    try:
        model = load_model(folder)
    except UserError as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("traceback", f"more than a line: {error}")
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    wrong = difference(model, saved) if saved is not None else None
    return ("wrong", wrong) if wrong else ("right", "")


def check_intact(known: Facts) -> None:
    kind, words = outcome(known.folder, known.model)
    if known.sees_later:
        return  # it may be refused here or later: `check_training` sees to it
    if kind == "refused" and not known.reloads:
        known.tested.append("refused: transformers does not load it either")
    elif kind != "right":
        known.faults.append(f"the undamaged folder: {kind}: {words}")
    elif not torch.equal(logits(load_model(known.folder)), logits(copy.deepcopy(known.model))) and known.repeats:
        known.faults.append("the undamaged folder: other logits although all weights are right")


# Damages


@dataclass
class Damage:
    name: str
    weights: Weights
    settings: Settings
    mendable: bool = False
    """Everything is there under other names, so it is loaded; all else is refused."""
    names: frozenset[str] = frozenset()
    """Names of which a refusal may give one beyond those of transformers' report."""


def is_victim(name: str, tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and bool(re.search(r"\.\d+\.", name))


def damages(weights: Weights, settings: Settings, head: set[str], width: int) -> Iterator[Damage]:
    """Every damage that the file and settings of a whole model allow."""
    for prefix in PREFIXES:
        yield Damage(f"prefix {prefix}", {prefix + n: t for n, t in weights.items()}, settings, mendable=True)
    victim = max(name for name, tensor in weights.items() if is_victim(name, tensor))
    yield Damage("a tensor left out", {n: t for n, t in weights.items() if n != victim}, settings, names=frozenset({victim}))
    for step, name in ((1, "one layer more"), (-1, "one layer less")):
        fields: set[str] = set()
        changed = with_layers(settings, step, fields)
        if fields:
            yield Damage(f"{name} in the settings", weights, changed, names=frozenset(fields))
    if isinstance(rows := settings.get("vocab_size"), int):
        yield Damage("more rows in the settings", weights, settings | {"vocab_size": rows + 8}, names=frozenset({"vocab_size"}))
    body = {n: t for n, t in weights.items() if n not in head}
    if head:
        yield Damage("no head", body, settings, names=frozenset(head))
    score = {"score.weight": torch.randn(1, width, generator=torch.Generator().manual_seed(0))}
    yield Damage("a reward model", body | score, settings, names=frozenset({*head, *score}))


LAYERS = re.compile(r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|(en|de)coder_layers|num_layers_per_stack|num_blocks)$")
PER_LAYER = re.compile("layer|types|intermediate_size|pattern")
OTHER_SENSES = ("vision", "audio", "encoder", "decoder", "vq", "depth")
"""Sections of a config whose layers are not the language model's."""


def with_layers(settings: Settings, step: int, fields: set[str]) -> Settings:
    """The settings with so many layers more, and what they say of each layer likewise; collects the names of the counts."""
    counts = {name: value for name, value in settings.items() if LAYERS.match(name) and isinstance(value, int)}
    fields.update(counts)
    changed: Settings = {}
    for name, value in settings.items():
        if name in counts:
            value += step
        elif isinstance(value, list) and len(value) in counts.values() and PER_LAYER.search(name):
            fields.add(name)
            value = [*value, value[-1]] if step > 0 else value[:-1]
        elif isinstance(value, dict) and not name.startswith(OTHER_SENSES):
            value = with_layers(value, step, fields)
        changed[name] = value
    return changed


def check_damages(known: Facts, family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Damage the folder in every way, one at a time; a family whose head is tied is damaged once more without the tie."""
    if known.sees_later or not known.reloads:
        return
    for model in (known.model, tiny_model(family, tied=False)):
        head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        is_tied = head is table
        if model is not known.model and is_tied:
            return  # nothing unties this family
        whole = save(model, tokenizer, folder / f"{'tied' if is_tied else 'untied'}")
        weights, settings = load_file(whole / WEIGHTS), json.loads((whole / SETTINGS).read_text())
        heads = set() if is_tied else {n for n, t in weights.items() if t.shape == head.shape and torch.equal(t, head)}
        for damage in damages(weights, settings, heads, head.shape[1]):
            if model is known.model or damage.name == "no head":
                _check(damage, model, whole, folder / "damaged", known)
        if not is_tied:
            return


def _check(damage: Damage, model: PreTrainedModel, whole: Path, folder: Path, known: Facts) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    save_file({n: t.contiguous() for n, t in damage.weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SETTINGS).write_text(json.dumps(damage.settings))
    kind, words = outcome(folder, model)
    if kind == "right" and not damage.mendable and report(folder) == set():
        return  # it does this family no harm: Marian's decoder counts its rows by another name
    if damage.mendable:
        if kind != "right":
            known.faults.append(f"{damage.name}: {kind}: {words}")
    elif kind != "refused":
        known.faults.append(f"{damage.name}: {'loaded' if kind == 'right' else kind}{': ' if words else ''}{words}")
    elif not names_one(words, damage.names) and not names_one(words, report(folder)):
        known.faults.append(f"{damage.name}: refused without the name of a tensor: {words}")
    known.damages.append(damage.name)


PUBLISHED = (AutoModelForSeq2SeqLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Kinds of models around a language model, in whose form some families are published."""


def check_published(known: Facts, family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A whole encoder-decoder is refused; of a model with images or sound the text part is loaded right, or it is refused."""
    for auto in PUBLISHED:
        config = tiny_config(family)
        cls = auto._model_mapping.get(type(config), None)  # type: ignore[attr-defined]
        if cls is None or cls is type(known.model):
            continue
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                whole = auto.from_config(config, dtype=torch.float32).eval()
            except (ImportError, ValueError, AttributeError):  # a package that is missing, a default that cannot be built
                continue
        start = save(whole, tokenizer, folder / auto.__name__)
        kind, words = outcome(start, None)
        if kind == "right":
            right = auto is not AutoModelForSeq2SeqLM and torch.equal(logits(load_model(start)), logits(whole))
            kind = "right" if right else "other logits, and no word"
        if kind not in ("right", "refused"):
            known.faults.append(f"as {cls.__name__}: {kind}: {words}")
        known.tested.append(f"as {cls.__name__}")
        return


def names_one(words: str, names: Iterable[str] | None) -> bool:
    """Whether a message has one of the names; any message will do where transformers cannot load the settings at all (None)."""
    return names is None or any(name in words for name in names)
