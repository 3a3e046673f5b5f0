"""How a command ends: the exit codes that scripts and schedulers can rely on, and the errors that carry them."""

from modern_llm.config import UserError

DONE = 0
WRONG_INPUT = 2
"""Something that the user can put right: a config, a file, a name."""
GATE_MISSED = 3
"""A stage finished, and a metric of it is outside the limits that the pipeline file sets."""
STORAGE_FAILED = 74
"""The disk did not take what was written (EX_IOERR of sysexits.h)."""
STOPPED = 75
"""Stopped on request and saved: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class StorageError(UserError):
    """What was to be written could not be: the disk is full, read-only, over a quota, or fails."""


class GateError(UserError):
    """A metric of a finished stage is outside its limits."""


class Stopped(SystemExit):
    """A run was asked to stop, and saved a checkpoint from which the same call goes on.

    A `SystemExit`, so that a script which chains stages ends here, with the exit code that says so and without a traceback.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(STOPPED)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def code_of(error: UserError) -> int:
    """The exit code for an error that the user is told of."""
    if isinstance(error, StorageError):
        return STORAGE_FAILED
    return GATE_MISSED if isinstance(error, GateError) else WRONG_INPUT
