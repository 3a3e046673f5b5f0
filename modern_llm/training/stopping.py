"""When a run is asked to stop: by a signal, or because its time is over."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Inside, the first SIGTERM or SIGINT leaves a note, which the loop reads after each step; a second ends the process."""

    def __init__(self, max_minutes: float | None, began: float) -> None:
        """
        Args:
            max_minutes: minutes after which the run is to stop. None: never.
            began: when they began, by `time.monotonic`.
        """
        self.deadline = None if max_minutes is None else began + 60 * max_minutes
        self.max_minutes = max_minutes
        self.signal: str | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        # the interrupted code may be inside a print of its own, which another would break
        os.write(2, f"\n{self.signal}: finishing this step, then saving; once more stops at once\n".encode())

    @property
    def reason(self) -> str | None:
        """Why to stop; None: go on."""
        if self.signal is not None:
            return self.signal
        is_over = self.deadline is not None and time.monotonic() >= self.deadline
        return f"max_minutes={self.max_minutes:g}" if is_over else None
