"""What a family's folder must do: load as it is, be refused or mended when it is damaged, and train as float64 says.

Checks write the faults that they find into `Facts.faults`, a sentence each. What is expected comes from transformers alone: its
loading report, and the unwrapped model in float64.
"""

import copy
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import torch
from every_family import tiny_config, tiny_model
from helpers import ANSWERS, QUESTIONS, chat, logged, recorded_loops, relative_error, sample, write_jsonl
from layouts import everything
from safetensors.torch import load_file, save_file
from tolerances import GRADIENT, LOSS, TOKEN_LOGPROB
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from modern_llm import AdapterConfig, InstructionDatasetConfig, TrainingConfig, run_sft
from modern_llm.config import UserError
from modern_llm.initial.checkpoint import load_model
from modern_llm.layout import Segment, pack
from modern_llm.models.adapters import add_adapter
from modern_llm.models.policy import Policy

Weights = dict[str, Tensor]
Settings = dict[str, Any]

ROUNDING = 4.0
"""How many times as far as the unwrapped fp32 model the fast path may be from float64: both add up the same terms, in other
orders, so they are off by about as much."""
LOGITS = 1e-5
"""Relative to the largest: the trained model against what is loaded from its folder. Merging adapters changes the order of
sums."""
LATER = ("later", "future", "causal", "ahead", "bidirectional")
"""Words of which a refusal of a model that sees later tokens has one."""
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
TOKENS = torch.randint(0, 256, (8, 40), generator=torch.Generator().manual_seed(2))
"""Enough for each expert to get some."""


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


# Training


def check_training(known: Facts, folder: Path, tokenizer: PreTrainedTokenizerFast, in_full: bool = True) -> None:
    """Train a folder with adapters, and in full too, or see it refused."""
    try:
        policy = Policy(load_model(known.folder))
        final = train(known.folder, folder / "full") if in_full or known.sees_later else None
    except UserError as error:
        known.runs = f"refused: {error}"
        if known.sees_later and not any(word in str(error) for word in LATER):
            known.faults.append(f"sees later tokens, and the refusal does not say so: {error}")
        elif not known.sees_later and known.reloads and known.repeats and known.pads:
            known.faults.append(f"training: refused without need: {error}")
        return
    except Exception as error:
        known.faults.append(f"training: traceback: {type(error).__name__}: {error}")
        return
    if known.sees_later:
        known.faults.append("sees later tokens, and is trained")
        return
    known.runs = "packed" if policy.packs else "padded"
    check_logprobs(known, policy)
    if final is not None:
        check_result(known, final, tokenizer, "in full")
    check_adapters(known, folder, tokenizer)


def train(start: Path, output: Path, **settings: Any) -> tuple[Path, Tensor]:
    """Two steps over all chats, with an evaluation behind each; (the result's folder, the trained model's logits)."""
    rows = [{"prompt": question, "completion": answer} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    config = TrainingConfig(
        output_dir=output, batch_size=len(rows), max_steps=2, learning_rate=1e-3, warmup_steps=0, log_every=1,
        mixed_precision="fp32", compile="off", eval_every=1, **settings,
    )  # fmt: skip
    (data := output.with_name(f"{output.name}-data")).mkdir()
    write_jsonl(data / "train.jsonl", rows)
    write_jsonl(data / "test.jsonl", [{"prompt": f"{row['prompt']} Why?", "completion": row["completion"]} for row in rows])
    with recorded_loops() as loops:
        final = run_sft(start, config, InstructionDatasetConfig(dataset_name=str(data), eval_split="test"))
    with loops[0].policy.as_loaded() as model:
        return final, logits(model)


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The unwrapped model in float64; in fp32 where its own code can do nothing else."""
    slow = plain_copy(oracle.float64_copy(model))
    try:
        is_finite = all(logits(slow, PROBE[:, :length]).isfinite().all() for length in (1, 3, 40))
    except (RuntimeError, TypeError):
        is_finite = False
    return slow if is_finite else plain_copy(model)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The unwrapped model without a cache, whose states some families write in place."""
    model = copy.deepcopy(model).eval()
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    return model


def own_logprobs(model: PreTrainedModel) -> Tensor:
    return torch.stack([value for segment in everything() for value in oracle.token_logprobs(model, sample(segment))])


def check_logprobs(known: Facts, policy: Policy) -> None:
    """Log-probs and their gradients on documents, chats and pairs, longer than windows and top-k, against float64."""
    if not known.repeats:
        return
    slow, plain = exact_copy(known.model), plain_copy(known.model)
    wanted, own = own_logprobs(slow), own_logprobs(plain)
    gradients, own_gradients = (oracle.gradients(m, values.sum()) for m, values in ((slow, wanted), (plain, own)))
    got = policy.eval()(pack(everything())).logprobs
    got.sum().backward()
    mine = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in policy.model.named_parameters()}
    allowed = max(TOKEN_LOGPROB, ROUNDING * float((own.double() - wanted).abs().max()))
    if not (off := float((got.double() - wanted).abs().max())) <= allowed:
        known.faults.append(f"log-probs of {known.runs} rows are off by {off:.2g} nats, {allowed:.2g} is rounding")
    allowed = max(GRADIENT, ROUNDING * relative_error(own_gradients, gradients))
    if not (off := relative_error(mine, gradients)) <= allowed:
        known.faults.append(f"gradients of {known.runs} rows are off by {off:.2g} (relative), {allowed:.2g} is rounding")
    known.tested.append("log-probs and gradients")


def mean_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    rows = [chat(tokenizer, question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    with torch.no_grad():
        return float(oracle.language_model_loss(model, rows))


def check_result(known: Facts, trained: tuple[Path, Tensor], tokenizer: PreTrainedTokenizerFast, how: str) -> None:
    """The first loss is that of float64, and the folder that the run left is the model that it trained, and better."""
    final, theirs = trained
    before, own = mean_loss(exact_copy(known.model), tokenizer), mean_loss(plain_copy(known.model), tokenizer)
    losses = logged(final.parent, "loss")
    allowed = max(LOSS, ROUNDING * abs(own - before))
    if known.repeats and not model_draws(known.model) and not abs(losses[0] - before) <= allowed:
        known.faults.append(f"trained {how}: the first loss is {losses[0]:.6f}, in float64 {before:.6f}")
    known.tested.append(f"two steps {how}")
    try:
        after = load_model(final)
    except Exception as error:
        known.faults.append(f"trained {how}: the folder does not load: {type(error).__name__}: {error}")
        return
    if not (off := float((logits(after) - theirs).abs().max() / theirs.abs().max().clamp_min(1))) <= LOGITS and known.repeats:
        known.faults.append(f"trained {how}: the folder's logits differ from the trained model's by {off:.2g} (relative)")
    if not (better := mean_loss(exact_copy(after), tokenizer)) < before:
        known.faults.append(f"trained {how}: the loss went from {before:.4f} to {better:.4f}")


def model_draws(model: PreTrainedModel) -> bool:
    """Whether two passes in train mode differ: some routers draw their experts."""
    with torch.no_grad(), torch.random.fork_rng():
        model.train()
        passes = [model(input_ids=PROBE, use_cache=False).logits for _ in range(4)]
        model.eval()
    return not all(torch.equal(one, passes[0]) for one in passes)


def check_adapters(known: Facts, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """With default settings each linear layer that learns gets an adapter, and each adapter learns; or one line says which
    setting is needed."""
    try:
        check_placement(known)
        final = train(known.folder, folder / "lora", adapter=AdapterConfig())
    except UserError as error:
        known.adapters = f"refused: {error}"
        if "target_modules" not in str(error):
            known.faults.append(f"adapters: refused without the setting to use: {error}")
        return
    except Exception as error:
        known.faults.append(f"adapters: traceback: {type(error).__name__}: {error}")
        return
    check_result(known, final, tokenizer, "with adapters")


def check_placement(known: Facts) -> None:
    """Compare the layers that get an adapter with the linear layers that learn in the unwrapped model."""
    linear, learning = linear_layers(known.model)
    model = load_model(known.folder)
    add_adapter(model, AdapterConfig(), 0)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_variant")}
    row = pack([Segment(ids, np.ones(len(ids), dtype=bool)) for ids in TOKENS.numpy()])
    scores = Policy(model).train()(row).logprobs
    (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    still = [n for n, p in model.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    for what, names in (
        ("linear layers without an adapter", learning - adapted),
        ("adapters on what is no linear layer", adapted - linear),
        ("adapters that never move", still),
    ):
        if names:
            known.faults.append(f"{what}: {', '.join(kinds(names))}")
    idle = kinds(linear - adapted - learning)
    known.adapters = f"{len(adapted)} layers" + (f"; not {', '.join(idle)}" if idle else "")


def linear_layers(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Names of the linear layers beside the head, and of those that do a plain product whose weight gets a gradient."""
    model, called = copy.deepcopy(model), set()
    head = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *seen, name=name: called.add(name))
    logprobs = model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)
    (logprobs * torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    plain = (nn.Linear.forward, Conv1D.forward)
    learning = {n for n, m in layers.items() if n in called and type(m).forward in plain and _has_gradient(m.weight)}
    return set(layers), learning


def _has_gradient(weight: Tensor) -> bool:
    return weight.grad is not None and bool(weight.grad.any())


def kinds(names: Iterable[str]) -> list[str]:
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".N", name).removesuffix(".lora_B.default.weight") for name in names})
