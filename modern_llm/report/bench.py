"""What this machine can do, measured with care. `modern-llm bench`."""

import json
import os
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from modern_llm import distributed
from modern_llm.limits import CAREFUL_SIZES, Limit, copy_rate, device_name, matmul_rate, remember

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Bench:
    """What was measured, and on what."""

    device: str
    """Name of the GPU, else of the processor."""
    threads: int
    """Threads of a product on a CPU."""
    instructions: dict[str, bool]
    """Whether the processor has bf16 instructions."""
    matmul: dict[str, dict[str, float]]
    """Precision → width of a square product → FLOP/s."""
    limit: dict[str, float]
    """Precision → FLOP/s of the best of them."""
    copy_bytes_per_second: float
    """Bytes read and written by one large copy."""
    torch: str


def bench(seconds: float, as_json: bool, console: Console | None = None) -> Bench:
    """Measure and print a table, or one JSON object. The limits become those of the runs to come, also where they are lower.

    Args:
        seconds: how long each measurement is repeated; the best repeat counts.
        as_json: print the JSON object.
        console: where to print.
    """
    device = distributed.device()
    matmul = {
        name: {str(size): matmul_rate(device, dtype, size, seconds) for size in CAREFUL_SIZES[device.type]}
        for name, dtype in DTYPES.items()
    }
    found = Bench(
        device=device_name(device),
        threads=torch.get_num_threads(),
        # torch 2.11-2.13 have no public name for these
        instructions={
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
        },
        matmul=matmul,
        limit={name: max(rates.values()) for name, rates in matmul.items()},
        copy_bytes_per_second=copy_rate(device, seconds),
        torch=torch.__version__,
    )
    for name, dtype in DTYPES.items():
        remember(device, dtype, Limit(flops_per_second=found.limit[name], looks=1))
    console = console or Console()
    if as_json:
        console.print(json.dumps(asdict(found)), soft_wrap=True, highlight=False, markup=False)
    else:
        _show(found, console)
    return found


def _show(found: Bench, console: Console) -> None:
    has = [name for name, there in found.instructions.items() if there]
    console.print(
        f"{found.device}, {found.threads} threads of {os.cpu_count()} processors, "
        f"{' and '.join(has) if has else 'no bf16 instructions'}, torch {found.torch}"
    )
    table = Table("square product", *DTYPES, title="GFLOP/s", title_justify="left")
    for size in next(iter(found.matmul.values())):
        table.add_row(size, *(f"{found.matmul[name][size] / 1e9:,.0f}" for name in DTYPES))
    table.add_row("limit", *(f"{found.limit[name] / 1e9:,.0f}" for name in DTYPES), style="bold")
    console.print(table)
    console.print(f"copy {found.copy_bytes_per_second / 1e9:,.1f} GB/s, read and written")
