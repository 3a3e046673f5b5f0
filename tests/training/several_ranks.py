"""What several gloo processes run for `test_ranks.py`; a module of its own, so that the processes import little."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import recorded_loops, stopped_after_first_save, write_jsonl
from processes import run_processes
from two_ranks import ANSWERS, fine_tune, rows_file

from modern_llm import distributed
from modern_llm.config import ParallelConfig, UserError
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.models import compilation

TIMEOUT_SECONDS = 2.0
SHORT = ParallelConfig(timeout_minutes=TIMEOUT_SECONDS / 60)
UNEVEN = {"batch_size": 3, "micro_batch_size": 2}
"""Five rows in steps of three: the shares of two ranks are 2 and 1, then 1 and 1."""


def run_on(world_size: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, folder, *arguments)` in so many processes; an error in one is raised here."""
    run_processes(world_size, _in_group, world_size, folder, work, *arguments)


def _in_group(rank: int, world_size: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder / f'rendezvous-{world_size}'}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world_size)
    work(rank, folder, *arguments)


def disagree(rank: int, folder: Path, start: Path) -> None:
    """Runs in which rank 1 sees or has something else than rank 0; what each rank says is kept in `<case>-<rank>.txt`."""
    data, other = folder / "rows.jsonl", folder / "other.jsonl"
    first = rank == 0

    def keep(case: str, run: Callable[[], Any]) -> None:
        try:
            said = f"no error: {run()}"
        except UserError as error:
            said = f"{type(error).__name__}: {error}"
        (folder / f"{case}-{rank}.txt").write_text(said, encoding="utf-8")

    with stopped_after_first_save():
        fine_tune(start, data, folder / "begun")
    if first:
        shutil.copytree(folder / "begun", folder / "for-four")
        shutil.copytree(folder / "begun", folder / "for-one")
    else:
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / ".lock").touch()
    keep("output_dir", lambda: fine_tune(start, data, folder / f"own-{rank}"))
    keep("checkpoint", lambda: fine_tune(start, data, folder / ("begun" if first else "elsewhere")))
    keep("start", lambda: fine_tune(start if first else folder / "absent", data, folder / "case"))
    keep("dataset", lambda: fine_tune(start, data if first else folder / "absent.jsonl", folder / "case"))
    keep("rows", lambda: fine_tune(start, data if first else other, folder / "case"))
    keep("settings", lambda: fine_tune(start, data, folder / "case", learning_rate=1e-3 if first else 2e-3))
    keep("everybody", lambda: fine_tune(folder / "absent", data, folder / "case"))
    cache = os.environ[CACHE_VARIABLE]
    if not first:
        os.environ[CACHE_VARIABLE] = str(data / "cache")
    keep("cache", lambda: fine_tune(start, data, folder / "case"))
    os.environ[CACHE_VARIABLE] = cache
    compilation.PAYS_AFTER_SECONDS["cpu"] = 1e9 if first else 0.0
    with recorded_loops() as loops:
        keep("compile", lambda: fine_tune(start, data, folder / "uneven", **UNEVEN) and loops[0].policy.compiled)
    keep("resumed", lambda: fine_tune(start, data, folder / "begun"))
    _wait(rank, keep)


def _wait(rank: int, keep: Callable[[str, Callable[[], Any]], None]) -> None:
    """Rank 0 works for three times the timeout, then rank 1; at last rank 1 is silent."""

    def work() -> str:
        time.sleep(3 * TIMEOUT_SECONDS)
        return "the result"

    def long_work() -> str:
        with distributed.process_group(SHORT):
            return distributed.main_decides(work)()

    def silence() -> str:
        with distributed.process_group(SHORT):
            if rank == 1:
                time.sleep(2 * TIMEOUT_SECONDS)
            return distributed.main_decides(lambda: "too late")()

    keep("long", long_work)
    keep("silent", silence)


def resume(rank: int, folder: Path, start: Path) -> None:
    fine_tune(start, folder / "rows.jsonl", folder / "for-four", micro_batch_size=None)


def disagree_on_two(folder: Path, start: Path) -> None:
    rows_file(folder)
    write_jsonl(folder / "other.jsonl", [{"prompt": f"Question {i}!", "response": a} for i, a in enumerate(ANSWERS)])
    run_on(2, folder, disagree, start)
