"""Python's garbage collector, held off the hot loop."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_held_off() -> Iterator[None]:
    """Inside, nothing is collected but by `gc.collect()`, which skips what was there before; afterwards all is as it was.

    A collection walks every Python object of the process at a moment of its own choosing: some tens of milliseconds with torch
    and transformers loaded, on one process while the others wait for it. What a step leaves behind goes by reference count;
    cycles are collected where the loop stops anyway, at log lines, evaluations and checkpoints.
    """
    was_on, frozen_before = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    if not frozen_before:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()
        if was_on:
            gc.enable()
