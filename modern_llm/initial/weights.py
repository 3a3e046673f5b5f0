"""Weights of a model folder: all of them, under their names, or an error that names those that are not."""

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from modern_llm.config import UserError
from modern_llm.config.base import one_line
from modern_llm.config.io import read_json
from modern_llm.foreign import INDEX
from modern_llm.initial.architecture import BNB_4BIT, UNREADABLE, quantization_of, reason_of

if not sys.stderr.isatty():  # "Loading weights", "Writing model shards": every loader and saver imports this file
    disable_progress_bar()

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch's wrappers put into names, at any place."""
COMPUTED = ("inv_freq", "masked_bias", "cos_cached", "sin_cached", "position_ids", "causal_mask")
"""Last parts of names of buffers that older versions of transformers saved, and that are computed from the config."""
MAX_NAMES = 3
"""Names in an error."""


def load_weights(
    name: str, folder: Path, where: str, config: PreTrainedConfig, generation: GenerationConfig | None
) -> PreTrainedModel:
    """Load a causal language model in fp32 from a folder or a hub id; safetensors only, no remote code.

    Names may have a prefix that wrappers leave (`_orig_mod.`, `module.`, `base_model.model.` …): it is taken off where that
    makes all of them fit. Weights in bitsandbytes' 4 bits and in mxfp4 are unpacked.

    Args:
        name: folder or hub id.
        folder: that folder, or the snapshot of the hub's, with its weights.
        where: begins the message of an error.
        config: of the checkpoint.
        generation: of the checkpoint. None: it has none.

    Raises:
        UserError: a weight is missing, is left over, or has another shape than the config says, with the first names.
    """
    if not any((folder / file).is_file() for file in files_of_weights(folder)):
        others = _names(sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf")))
        raise UserError(
            f"{where}: holds no model that can be loaded: no model.safetensors{others and f', but {others}'}: pickles (.bin, "
            f".pt) can run code as they are loaded, and GGUF files are for inference: save the model by save_pretrained of "
            f"transformers (5), which writes safetensors, or start from another"
        )
    if quantization_of(config) == BNB_4BIT and not any(".quant_state." in key for key in _tensors(folder, where)):
        config = copy.deepcopy(config)  # a model that was unpacked, and whose config was not
        del config.quantization_config  # type: ignore[attr-defined]
    model, report = _read(AutoModelForCausalLM, folder, where, config, generation)
    tensors = _tensors(folder, where)
    problem, as_named = _problem(report, model, tensors), True
    for names in _renamings([*tensors]) if problem else ():
        renamed = {new: tensors[old].values for old, new in names.items()}
        other, report = _read(type(model), None, where, config, generation, state_dict=renamed)
        if not _problem(report, other, tensors):
            model, problem, as_named = other, None, False
            break
    model.name_or_path = model.config._name_or_path = name
    if problem:
        raise UserError(f"{where}: {problem}")
    if quantization_of(config) is not None:
        _make_plain_(model)
        as_named = False
    elif whole := _packed_by_others(tensors, model):
        raise UserError(
            f"{where}: {_names(whole)}: whole numbers, which no weights are: begin from the model that is not packed"
        )
    tables = [table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    if len(tables) == 2 and tables[0] is not tables[1]:  # or new rows would tie them, and the file's head be lost
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    if not as_named:  # transformers 5.23 saves under the names and in the form that were loaded; so, under those of its class
        model._weight_conversions = None  # type: ignore[assignment]
    return model


def _packed_by_others(tensors: Mapping[str, "_Tensor"], model: nn.Module) -> list[str]:
    """Names of whole numbers in the files that the model has as weights, and not as a table of its own (`tid2eid`)."""
    own = {name.rpartition(".")[2] for name, value in model.state_dict().items() if not value.is_floating_point()}
    whole = [key for key, tensor in tensors.items() if tensor.dtype[0] in "IU" and not _is_computed(key, tensors)]
    return [key for key in whole if key.rpartition(".")[2] not in own]


class _Tensor(NamedTuple):
    shape: list[int]
    dtype: str
    """As safetensors has it: F32, BF16, I8 …"""
    values: Any
    """A slice of safetensors, of which nothing is read yet."""


def files_of_weights(folder: Path) -> list[str]:
    """Names of the files that hold a model's weights, as far as the folder's settings say."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():  # transformers prefers the one file
        return ["model.safetensors"]
    return sorted(set(read_json(folder / INDEX, unique=False).get("weight_map", {}).values()))


def _tensors(folder: Path, where: str) -> dict[str, _Tensor]:
    """What a folder's files hold, by name."""
    found: dict[str, _Tensor] = {}
    try:
        for file in files_of_weights(folder):
            with safe_open(folder / file, "pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - it is no dict
                found |= {key: _Tensor(part.get_shape(), part.get_dtype(), part) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: this folder holds no model that can be loaded: {one_line(str(error), 300)}") from None
    return found


def _read(
    loader: Any,
    folder: Path | None,
    where: str,
    config: PreTrainedConfig,
    generation: GenerationConfig | None,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, and what transformers' loader says of the names.

    Args:
        loader: a class of transformers with `from_pretrained`.
        folder: local. None: the tensors are in the options, as `state_dict`.
        where: begins the message of an error.
        config: of the checkpoint.
        generation: of the checkpoint. None: it has none.
        options: of the loader.
    """
    device = {"device_map": {"": "cpu"}} if quantization_of(config) else {}
    generation = generation or GenerationConfig.from_model_config(config)  # given, lest an invalid one is read from the folder
    try:
        with torch.random.fork_rng(), _quiet_loader():  # transformers draws the weights that are missing
            return loader.from_pretrained(
                folder, config=config, generation_config=generation, dtype=torch.float32, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **device, **options,
            )  # fmt: skip
    except (OSError, SafetensorError, RuntimeError, *UNREADABLE) as error:
        if isinstance(error, OSError):
            reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
            raise UserError(f"{where}: this folder holds no model that can be loaded: {reason}") from None
        raise UserError(f"{where}: holds no model that can be loaded: {reason_of(error)}") from None


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Keep transformers' warnings off the terminal: its table of names becomes one line of ours."""
    # transformers 5.23 lists layers that are not sharded where its modeling_utils has a level of its own: so not that one
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _problem(report: dict[str, Any], model: PreTrainedModel, tensors: dict[str, _Tensor]) -> str | None:
    """What does not fit, with the first names; None if everything does."""
    if wrong := sorted(report["mismatched_keys"]):
        shapes = [f"{key} ({_shape(there)}, in config.json {_shape(expected)})" for key, there, expected in wrong]
        return (
            f"weights of other shapes than config.json says: {_names(shapes)}: put config.json (vocab_size, hidden_size …) and "
            f"the weights of one model into the folder"
        )
    missing = sorted(report["missing_keys"])
    over = [key for key in sorted(report["unexpected_keys"]) if not _is_computed(key, tensors)]
    if report["error_msgs"]:
        return one_line(f"holds no model that can be loaded: {report['error_msgs'][0]}", 300)
    if not missing and not over:
        return None
    kind = type(model).__name__
    parts = [f"its files lack {_names(missing)}"] if missing else []
    parts += [f"its files hold {_names(over)}, which {kind} has not"] if over else []
    return (
        f"{' and '.join(parts)}: weights that are not there would be random numbers, and those left over would be lost; "
        f"check config.json (num_hidden_layers, architectures, tie_word_embeddings) against the files"
    )


def _shape(size: Any) -> str:
    return " × ".join(map(str, size))


def _names(keys: list[str]) -> str:
    return ", ".join(keys[:MAX_NAMES]) + (f" and {len(keys) - MAX_NAMES} more" if len(keys) > MAX_NAMES else "")


def _is_computed(key: str, tensors: Mapping[str, _Tensor]) -> bool:
    """Whether a tensor that no class reads is a buffer which is computed: a mask, frequencies, positions."""
    last = key.rpartition(".")[2]
    # GPT-2 and its kin saved the causal mask, (1, 1, n, n), as `attn.bias`
    return last in COMPUTED or (last == "bias" and key in tensors and len(tensors[key].shape) == 4)


def _renamings(names: list[str]) -> Iterator[dict[str, str]]:
    """Ways to take off what wrappers put before names or into them: {name: name without it}.

    Args:
        names: all that the files hold; none may become another's.
    """
    shared = _shared_parts(sorted(names))
    for count in (0, *range(len(shared), 0, -1)):
        before = "".join(f"{part}." for part in shared[:count])
        inner = {key: ".".join(part for part in key[len(before) :].split(".") if part not in WRAPPERS) for key in names}
        if [*inner.values()] != names and len({*inner.values()}) == len(names):
            yield inner


def _shared_parts(names: list[str]) -> list[str]:
    """Leading parts that all names have in common, of sorted ones the first and the last."""
    first, last = (names[at].split(".")[:-1] if names else [] for at in (0, -1))
    return [part for at, part in enumerate(first) if first[: at + 1] == last[: at + 1]]


@torch.no_grad()
def _make_plain_(model: PreTrainedModel) -> None:
    """Put fp32 layers in place of bitsandbytes' 4-bit ones, with the weights that their codes stand for; forget the packing."""
    from bitsandbytes.nn.modules import Linear4bit

    from modern_llm.models.nf4 import unpacked

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Linear4bit)]:
        state = layer.weight.quant_state  # type: ignore[attr-defined]
        state.dtype = torch.float32
        weight = unpacked(layer.weight.data, state)
        turned = getattr(layer, "source_cls", None) is Conv1D  # which transformers 5.23 packs as (out, in)
        plain: nn.Module
        if turned:
            plain = Conv1D(layer.out_features, layer.in_features)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.T.contiguous() if turned else weight)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.float())
        model.set_submodule(name, plain)
    model.requires_grad_(True)
    for attribute in (
        "quantization_method",
        "hf_quantizer",
        "is_loaded_in_4bit",
        "is_quantized",
        "_is_quantized_training_enabled",
    ):
        if attribute in vars(model):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # type: ignore[attr-defined]
