"""Processes of several ranks, forked from one that has everything imported: starting one anew takes seconds."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch.multiprocessing as mp

PRELOADED = ["several_ranks", "modern_llm.training.train_dpo", "transformers.models.qwen3.modeling_qwen3"]


def run_processes(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in so many processes and wait for them; an error in one is raised here."""
    multiprocessing.set_forkserver_preload(PRELOADED)  # has no effect once the server runs
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 gives the server no other path
        mp.start_processes(work, args=arguments, nprocs=count, start_method=method)
