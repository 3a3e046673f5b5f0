"""What training holds in memory, by part, from shapes alone; and what memory there is.

Activations are counted for a decoder layer as in Qwen3 (RMSNorm, QK-norm, SwiGLU), which keeps more than most: other families
come out a little high. Where steps may be measured, `report.plan` puts the measurement in their place.

Legend: T tokens of a micro-batch, R positions of it that predict, d hidden size, q and k width of all query and all key heads,
f width of the feed-forward layer (of all experts that a token is sent to), V words, L layers.
"""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modern_llm import distributed
from modern_llm.config import TrainingConfig
from modern_llm.losses.token_logprobs import SIZES
from modern_llm.models.grid_kernel import AT_ONCE, weights_are_kept
from modern_llm.models.grids import LONG
from modern_llm.products import onednn_is_faster
from modern_llm.training.muon import working_bytes
from modern_llm.training.optim import ParameterGroups

Bytes = dict[str, int]
"""Part → bytes, adding up to the whole."""

SMALLEST_8BIT = 4096
"""bitsandbytes 0.50 keeps the state of smaller tensors in fp32."""
QUANTIZED_BLOCK = 256
"""Values of an 8-bit state that share an fp32 scale."""


@dataclass(frozen=True)
class Load:
    """What goes through the model at once, and how often."""

    tokens: int
    """T of the largest micro-batch."""
    predicted: int
    """R of it."""
    longest: int
    """Tokens of the longest sequence."""
    several: bool
    """Whether a step has several micro-batches, so that gradients are there while the next one runs."""
    pairs: bool
    """Whether each token's log-prob is asked for (preference training), and not just their sum."""


@dataclass(frozen=True)
class Machine:
    """Memory in bytes: of the GPU, else of this computer or the container's share of it."""

    total: int
    available: int
    """Not in use by anything at the time."""


def machine_memory(device: torch.device) -> Machine:
    """What there is, and what is free now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Machine(total, free)
    table = Path("/proc/meminfo")
    if not table.is_file():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(total, total)
    lines = dict(line.split(":", 1) for line in table.read_text(encoding="utf-8").splitlines())
    total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
        available = min(available, int(text) - int(used.read_text()))
    return Machine(total, available)


def resident_bytes() -> int:
    """Memory of this process now; at its largest so far where the system does not tell."""
    table = Path("/proc/self/statm")
    if table.is_file():
        return int(table.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Memory of this process at its largest so far."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


@dataclass(frozen=True)
class Correction:
    """What a measured peak says of the estimate.

    Shapes that foresee too much do so of every micro-batch, by a share. What they miss appears with the first steps (buffers of
    kernels, blocks that the allocator keeps) and hardly grows with the micro-batch.
    """

    share: float = 1.0
    """Of the activations that the shapes foresee; at most 1."""
    other: int = 0
    """Bytes beyond all that the shapes foresee."""


NOT_MEASURED = Correction()


class Estimate:
    """Memory of one stage, from the shapes of its model; nothing is run."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainingConfig,
        precision: torch.dtype,
        process: int,
        reference: bool,
    ):
        """
        Args:
            model: the model that is trained, on any device; on `meta` it takes no memory.
            config: resolved.
            precision: type of matrix products.
            process: bytes of the process before there is a model.
            reference: whether a second model stays in memory.
        """
        self.config, self.precision = config, precision
        self.device = distributed.device().type
        self.shape = model.config.get_text_config()
        groups = ParameterGroups(model)
        sizes = {group: [p.numel() for p in found.values()] for group, found in groups.named.items()}
        trained = sum(map(sum, sizes.values()))
        weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
        self.trained = 4 * trained
        self.matrices = sum(sizes["matrices"]) + sum(sizes["experts"])
        head = model.get_output_embeddings()
        assert head is not None, "a causal language model has an output projection"
        self.vocabulary, self.hidden = head.weight.shape  # type: ignore[union-attr, misc]
        self.head_learns = bool(head.weight.requires_grad)  # type: ignore[union-attr]
        self.held: Bytes = {
            "process": process,
            "weights": weights,
            "gradients": 0 if config.optimizer_in_backward else 4 * trained,
            "optimizer": optimizer_bytes(str(config.optimizer), sizes),
            "average": 0 if config.ema_decay is None else 4 * trained,
            "reference": weights if reference else 0,
        }
        self.update = 0
        """What the optimizer works with once all gradients are there; left out where it works on one matrix at a time."""
        if config.optimizer == "muon" and self.device == "cuda" and not config.optimizer_in_backward:
            self.update = working_bytes(p.shape for p in groups.named["matrices"].values())

    def layer_bytes(self, load: Load) -> int:
        """What one layer keeps of a micro-batch from its forward to its backward pass."""
        c = self.shape
        heads = c.num_attention_heads
        width = getattr(c, "head_dim", None) or self.hidden // heads
        q, k = heads * width, (getattr(c, "num_key_value_heads", None) or heads) * width
        f = getattr(c, "moe_intermediate_size", None) or getattr(c, "intermediate_size", None) or 4 * self.hidden
        f *= getattr(c, "num_experts_per_tok", None) or 1
        # in bf16 the norms keep fp32, and each of q, k, v, gate and up keeps its own bf16 copy of what goes in
        per_token = (
            26 * self.hidden + 10 * q + 10 * k + 8 * f
            if self.precision.itemsize == 2
            else 24 * self.hidden + 16 * q + 16 * k + 16 * f
        )
        weights_kept = self.config.attention == "eager" or (self._by_products(load) and weights_are_kept(self.precision))
        return per_token * load.tokens + (self._attention_weights(load) if weights_kept else 0)

    def work_bytes(self, load: Load) -> int:
        """What one layer works with in its backward pass: a copy of what it kept, and what it makes again."""
        remade = self._by_products(load) and not weights_are_kept(self.precision)
        # weights, their gradient, and a product of either
        again = 3 * min(self._attention_weights(load), AT_ONCE * self.precision.itemsize) if remade else 0
        return self.layer_bytes(load) + again

    def _by_products(self, load: Load) -> bool:
        return self.device == "cpu" and self.config.attention == "auto" and load.longest <= LONG

    def _attention_weights(self, load: Load) -> int:
        return load.tokens * load.longest * self.shape.num_attention_heads * self.precision.itemsize

    def activation_bytes(self, load: Load) -> int:
        """What the body keeps of a micro-batch, what one layer works with, and the bf16 copies of weights."""
        layers, layer = self.shape.num_hidden_layers, self.layer_bytes(load)
        recomputed = 0
        if self.config.gradient_checkpointing:
            recomputed = round(layers * (self.config.checkpointed_share or 1.0))
        kept = (layers - recomputed) * layer + recomputed * 4 * self.hidden * load.tokens
        copies = 2 * self.matrices if self.precision.itemsize == 2 else 0
        return kept + self.work_bytes(load) + copies

    def head_bytes(self, load: Load) -> int:
        """What the output projection and the log-probs work with."""
        row, size = self.vocabulary * self.precision.itemsize, self.precision.itemsize
        sizes = SIZES[self.device]
        if load.pairs:
            all_kept = size == 2 and load.predicted * row <= sizes.kept_bytes
            chunk = load.predicted if all_kept else sizes.chunk_elements // self.vocabulary
        else:
            chunk = sizes.chunk_bytes // row
        chunk = min(load.predicted, max(1, chunk))
        scratch = 4 * min(chunk * self.vocabulary, sizes.scratch_elements)
        weight = self.vocabulary * self.hidden
        copy = weight * size if size == 2 else 0
        product = size if size == 2 or onednn_is_faster() else 0  # of a chunk, before it is added to the sum
        gradient = (4 + product) * weight if self.head_learns else 0
        return chunk * row + scratch + copy + gradient + 12 * load.predicted * self.hidden

    def during_pass(self, load: Load, correction: Correction = NOT_MEASURED) -> Bytes:
        """At the highest point of a step: in a forward and backward pass, at its end, or in the update after it."""
        held, head = {**self.held, "other": correction.other}, self.head_bytes(load)
        if self._peaks_in_update(load):
            return {**held, "activations": 0, "head": 0, "update": self.update}
        if self._peaks_with_gradients(load):
            return {**held, "activations": round(correction.share * self.work_bytes(load)), "head": 0}
        if not load.several:
            held["gradients"] = 0  # they come while activations go
        return {**held, "activations": round(correction.share * self.activation_bytes(load)), "head": head}

    @property
    def copy_bytes(self) -> int:
        """On the host: what a checkpoint to resume from is written from, beside the training."""
        return self.trained + self.held["optimizer"] + self.held["average"]

    def correction(self, load: Load, peak: int) -> Correction:
        """What a run says whose memory was `peak` at its largest."""
        parts = self.during_pass(load)
        beyond = peak - sum(parts.values())
        if beyond >= 0 or not parts["activations"]:
            return Correction(other=max(0, beyond))
        return Correction(share=max(0.0, 1 + beyond / parts["activations"]))

    def _peaks_in_update(self, load: Load) -> bool:
        """Whether what the optimizer works with is more than all that is needed before."""
        there = self.held["gradients"] if load.several else 0
        before = there + self.activation_bytes(load) + self.head_bytes(load)
        return self.update > self.work_bytes(load) and self.held["gradients"] + self.update > before

    def _peaks_with_gradients(self, load: Load) -> bool:
        """Whether the gradients that the only micro-batch of a step leaves behind are more than all it needed before."""
        return not load.several and self.activation_bytes(load) + self.head_bytes(load) < self.held["gradients"]


def optimizer_bytes(optimizer: str, sizes: dict[Any, list[int]]) -> int:
    """State of an optimizer: two fp32 moments (AdamW), one (Muon, RMSprop), or two of 8 bits with a scale for every 256.

    Args:
        optimizer: as in `TrainingConfig`.
        sizes: group → entries of each of its parameters.
    """
    total = 0
    for group, entries in sizes.items():
        for count in entries:
            if optimizer in ("adamw_8bit", "paged_adamw_8bit"):
                total += 2 * count + 8 * -(-count // QUANTIZED_BLOCK) if count >= SMALLEST_8BIT else 8 * count
            else:
                one = optimizer == "rmsprop" or (optimizer == "muon" and group == "matrices")
                total += (4 if one else 8) * count
    return total
