"""One plain model folder from any checkpoint: adapters merged, weights in the type that is asked for."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from modern_llm import checkpoint as folders
from modern_llm.config import UserError
from modern_llm.config.commands import ExportType
from modern_llm.data.tokenizer import template_fingerprint
from modern_llm.initial.handoff import contract
from modern_llm.initial.opened import open_checkpoint

TYPES: dict[ExportType, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_checkpoint(checkpoint: Path | str, output_dir: Path, dtype: ExportType = "bf16") -> Path:
    """Write a checkpoint as one plain `transformers` folder: weights, tokenizer, chat template, generation config, manifest.

    Adapters are merged in fp32, over the whole chain where one was trained on another; then every weight is rounded to `dtype`.

    Args:
        checkpoint: one of our folders, any Hugging Face model or adapter folder, or a hub id.
        output_dir: the folder to write. One that holds the same export is returned as it is.
        dtype: type of the weights.

    Returns:
        `output_dir`.

    Raises:
        UserError: the checkpoint is missing or damaged, `output_dir` holds something else, a weight is too large for `dtype`.
    """
    if dtype not in TYPES:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(TYPES)}")
    output_dir = Path(output_dir)
    if output_dir.exists() and folders.read_manifest(output_dir) is None:
        raise UserError(f"output_dir={str(output_dir)!r} is there and is no export of ours: give another folder")
    opened = open_checkpoint(checkpoint, None, "checkpoint")
    model, tokenizer = opened.model, opened.tokenizer
    record = {
        "stage": "export",
        "dtype": dtype,
        "parent": {"checkpoint": str(checkpoint), "weights": opened.weights},
        "tokenizer": template_fingerprint(tokenizer),
    }
    if output_dir.exists():
        _check_same(output_dir, record)
        return output_dir
    _round_(model, TYPES[dtype])
    with folders.atomic_folder(output_dir) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        more = {
            "tokenizer_name": opened.tokenizer_name,
            "weights": folders.weights_hash(model),
            "contract": contract(model, tokenizer),
        }
        folders.write_manifest(scratch, {**record, **more})
    return output_dir


def _check_same(output_dir: Path, record: dict[str, object]) -> None:
    """Refuse a folder that holds another export, or a damaged one."""
    manifest = folders.read_manifest(output_dir) or {}
    there, now = ({name: _known(m.get(name)) for name in record} for m in (manifest, record))
    if there != now:
        name = next(name for name in record if there[name] != now[name])
        raise UserError(
            f"output_dir={str(output_dir)!r} holds something else ({name}: {there[name]!r} there, {now[name]!r} now): give "
            f"another folder"
        )
    folders.verify(output_dir)


def _known(value: object) -> object:
    """What identifies a part of the record: of the parent its weights, wherever it lies."""
    return value.get("weights") if isinstance(value, dict) else value


@torch.no_grad()
def _round_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        largest = float(parameter.abs().max()) if parameter.numel() else 0.0
        most = torch.finfo(dtype).max
        if largest > most:
            raise UserError(f"dtype: {name} holds {largest:.3g}, more than {dtype} can ({most:.3g}): use bf16")
    model.to(dtype)  # type: ignore[arg-type]
