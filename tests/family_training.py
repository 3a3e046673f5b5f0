"""What a family's training must do: equal the unwrapped model in float64, and leave a folder that is the model it trained."""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from family_folders import PROBE, Facts, logits
from helpers import ANSWERS, QUESTIONS, chat, logged, recorded_loops, relative_error, sample, write_jsonl
from layouts import everything
from tolerances import GRADIENT, LOSS, TOKEN_LOGPROB
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from modern_llm import AdapterConfig, InstructionDatasetConfig, TrainingConfig, run_sft
from modern_llm.config import UserError
from modern_llm.initial.checkpoint import load_model
from modern_llm.layout import Segment, pack
from modern_llm.models.adapters import add_adapter
from modern_llm.models.policy import Policy

ROUNDING = 4.0
"""How many times as far as the unwrapped fp32 model the fast path may be from float64: both add up the same terms, in other
orders, so they are off by about as much."""
LOGITS = 1e-5
"""Relative to the largest: the trained model against what is loaded from its folder. Merging adapters changes the order of
sums."""
LATER = ("later", "future", "causal", "ahead", "bidirectional")
"""Words of which a refusal of a model that sees later tokens has one."""
TOKENS = torch.randint(0, 256, (8, 40), generator=torch.Generator().manual_seed(2))
"""Enough for each expert to get some."""


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


class Trained(NamedTuple):
    """What a run left."""

    folder: Path
    logits: Tensor
    """Of the model in memory."""
    policy: Policy


def train(start: Path, output: Path, **settings: Any) -> Trained:
    """Two steps over all chats, with an evaluation behind each."""
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
        return Trained(final, logits(model), loops[0].policy)


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
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # the row of a token that a config calls padding learns like any other
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


def check_result(known: Facts, trained: Trained, tokenizer: PreTrainedTokenizerFast, how: str) -> None:
    """The first loss is that of float64, and the folder that the run left is the model that it trained, and better."""
    final, theirs, _ = trained
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
        passes = [model(input_ids=PROBE, use_cache=False).logits for _ in range(16)]
        model.eval()
    return not all(torch.equal(one, passes[0]) for one in passes)


def check_adapters(known: Facts, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """With default settings each linear layer that learns gets an adapter, or a reason why not, and each adapter learns."""
    try:
        trained = train(known.folder, folder / "lora", adapter=AdapterConfig())
        left_out = add_adapter(load_model(known.folder), AdapterConfig(), 0)
    except UserError as error:
        known.adapters = f"refused: {error}"
        if "target_modules" not in str(error):
            known.faults.append(f"adapters: refused without the setting to use: {error}")
        return
    except Exception as error:
        known.faults.append(f"adapters: traceback: {type(error).__name__}: {error}")
        return
    check_placement(known, trained.policy, left_out)
    check_result(known, trained, tokenizer, "with adapters")


def check_placement(known: Facts, policy: Policy, left_out: Mapping[str, str]) -> None:
    """Compare the layers that got an adapter with the linear layers that learn in the unwrapped model.

    Args:
        known: of the family.
        policy: that was trained.
        left_out: layers without an adapter for another reason than that no gradient reaches them.
    """
    linear, learning = linear_layers(known.model)
    adapted = {name for name, module in policy.model.named_modules() if hasattr(module, "lora_variant")}
    row = pack([Segment(ids, np.ones(len(ids), dtype=bool)) for ids in TOKENS.numpy()])
    scores = policy.train()(row).logprobs
    (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    still = [n for n, p in policy.model.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    for what, names in (
        ("linear layers without an adapter", learning - adapted - left_out.keys()),
        ("adapters on what is no linear layer", adapted - linear),
        ("adapters that never move", still),
    ):
        if names:
            known.faults.append(f"{what}: {', '.join(kinds(names))}")
    reasons = dict.fromkeys(linear - adapted, "no gradient") | dict(left_out)
    without = [f"{', '.join(kinds(n for n in reasons if reasons[n] == reason))} ({reason})" for reason in {*reasons.values()}]
    known.adapters = "; not ".join([f"{len(adapted)} layers", *sorted(without)])


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
    return sorted(
        {re.sub(r"\.\d+(?=\.|$)", ".N", name).removesuffix(".lora_B.default.weight").removeprefix("model.") for name in names}
    )
