"""`torch.compile` for the decoder layers of a policy, where that pays.

Each layer is compiled alone. The layers of a model are one program, so it is built once, however many there are (28 s against
minutes for a whole body of six layers), and every kind of row shares it: sizes are symbols, and the attention is one opaque
operator.
"""

import os
import stat
from pathlib import Path
from typing import Literal

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from modern_llm.config import UserError
from modern_llm.models.policy import Policy

PAYS_AFTER_SECONDS = {"cpu": 900.0, "cuda": 300.0}
"""Foreseen seconds of training from which `auto` compiles. On a CPU it takes half a minute to a minute and saves about a tenth
(measured: 6 layers of 384 channels, 2.6 s against 3.1 s for 4,096 tokens), so it would never pay below about ten minutes."""


def compile_layers(policy: Policy, wanted: Literal["auto", "on", "off"], foreseen_seconds: float) -> str:
    """Compile a policy's decoder layers if wanted, and return what was done and why, for the log.

    Args:
        policy: on its device, checked.
        wanted: `auto` compiles where nothing speaks against it and the run is long enough.
        foreseen_seconds: how long training will take, roughly.

    Raises:
        UserError: `on`, but it cannot be.
    """
    if wanted == "off":
        return "compile: off"
    obstacle = _obstacle(policy)
    if obstacle is None and wanted == "auto":
        enough = PAYS_AFTER_SECONDS[policy.device.type]
        if foreseen_seconds < enough:
            return f"compile: off (auto: about {foreseen_seconds:.0f} s of training, and it pays from {enough:.0f} s on)"
    obstacle = obstacle or _others_write_programs()
    if obstacle is not None:
        if wanted == "on":
            raise UserError(f"compile='on' cannot be: {obstacle}: set it to auto or off")
        return f"compile: off (auto: {obstacle})"
    # a tensor whose size depends on a layout's values stays in the graph
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    # sizes that are equal by chance in the first row are not one size (torch 2.13)
    torch.fx.experimental._config.use_duck_shape = False  # type: ignore[attr-defined]
    for layer in _layers(policy):
        layer.compile(dynamic=True)
    policy.compiled = True
    why = f" (auto: about {foreseen_seconds / 60:.0f} minutes of training)" if wanted == "auto" else ""
    return f"compile: on{why}; the first steps build the layers' program"


def _layers(policy: Policy) -> list[GradientCheckpointingLayer]:
    return [module for module in policy.model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _obstacle(policy: Policy) -> str | None:
    """Why a policy's layers cannot be compiled, or None."""
    name, config = type(policy.model).__name__, policy.model.config
    layers = _layers(policy)
    if not policy.packs or policy.attention != "auto":
        return "only the packed attention of attention='auto' is one operator for the compiler"
    if not layers:
        return f"{name} has no decoder layers of the usual kind"
    if any(getattr(config, field, None) for field in ("num_experts", "num_local_experts", "n_routed_experts")):
        return f"the experts of {name} get another number of tokens in every step, which would compile without end"
    if any(layer.gradient_checkpointing for layer in layers):
        return "gradient_checkpointing would be inside the compiled layers"
    if any(hasattr(parameter, "quant_state") for parameter in policy.parameters()):
        return "its weights are 4-bit"
    return _no_compiler(policy.device)


def _others_write_programs() -> str | None:
    """Why what torch keeps of compiled programs cannot be trusted, or None; its folders are closed to others from now on.

    torch 2.13 loads pickles and machine code from a folder for temporary files whose name everybody knows.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    if not hasattr(os, "getuid"):  # Windows has a folder for each user
        return None
    for folder in map(Path, (default_cache_dir(), cache_dir())):  # precompiled headers are always in the first
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
            return (
                f"others can write to {folder}, and torch runs the programs it finds there: remove it, or set TMPDIR (and "
                f"TORCHINDUCTOR_CACHE_DIR) to a folder of your own"
            )
        folder.chmod(0o700)
    return None


def _no_compiler(device: torch.device) -> str | None:
    """Why programs cannot be built for a device, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler was found (install g++, or name one by the environment variable CXX)"
    return None
