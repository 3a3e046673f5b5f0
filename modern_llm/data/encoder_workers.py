"""Encoding of much text in several processes, each with the word cache of its own.

The processes are started as `python -m modern_llm.data.encoder_workers` and talk over pipes. So a script needs no
`if __name__ == "__main__"`, nothing is forked behind the back of threads or a GPU, and nothing is a pickle. A message is the
number of its parts, their sizes, and the parts.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer

from modern_llm.data.word_cache import WordCache

MOST_WORKERS = 16
CHARACTERS_BEFORE_WORKERS = 20_000_000
"""Text encoded in this process first: for less, starting others takes longer than it saves."""


class Worker:
    """One process, asked by one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        command = [sys.executable, "-m", __name__]
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        _write(self._stdin, [tokenizer.to_str().encode()])

    @property
    def _stdin(self) -> BinaryIO:
        assert self.process.stdin is not None
        return self.process.stdin  # type: ignore[return-value]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, (tokens,) int32."""
        assert self.process.stdout is not None
        _write(self._stdin, [text.encode() for text in texts])
        parts = _read(self.process.stdout)  # type: ignore[arg-type]
        if parts is None:
            raise RuntimeError(f"a process that encodes text ended with code {self.process.wait()}: is memory short?")
        return [np.frombuffer(part, dtype=np.int32) for part in parts]

    def close(self) -> None:
        """End the process; it ends by itself when its input does."""
        self.process.communicate()


def encode_batches(tokenizer: Tokenizer, batches: Iterable[list[str]]) -> Iterator[list[np.ndarray]]:
    """The ids of every text of every batch, in order, by as many processes as this one may use processors.

    Args:
        tokenizer: recognises no control token.
        batches: read ahead by two for each process.
    """
    count = min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ExitStack() as stack:
        workers = [Worker(tokenizer) for _ in range(count)]
        for worker in workers:
            stack.callback(worker.close)
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in workers]
        running: deque[Future[list[np.ndarray]]] = deque()
        for number, batch in enumerate(batches):
            running.append(threads[number % count].submit(workers[number % count].encode, batch))
            if len(running) >= 2 * count:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _write(file: BinaryIO, parts: list[bytes]) -> None:
    sizes = np.array([len(parts), *map(len, parts)], dtype=np.int64)
    file.write(sizes.tobytes())
    file.write(b"".join(parts))
    file.flush()


def _read(file: BinaryIO) -> list[bytes] | None:
    """The parts of the next message; None at the end."""
    head = file.read(8)
    if len(head) < 8:
        return None
    count = int(np.frombuffer(head, dtype=np.int64)[0])
    ends = np.cumsum(np.frombuffer(file.read(8 * count), dtype=np.int64)).tolist()
    data = file.read(ends[-1]) if ends else b""
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def main() -> None:
    """Encode what comes in until it ends."""
    first = _read(sys.stdin.buffer)
    if first is None:
        return
    words = WordCache(Tokenizer.from_str(first[0].decode()))
    while (parts := _read(sys.stdin.buffer)) is not None:
        _write(sys.stdout.buffer, [ids.tobytes() for ids in words.encode([part.decode() for part in parts])])


if __name__ == "__main__":
    main()
