"""A process with everything imported and no thread: it forks a child for each attempt, and can kill it at any instant.

Requests and answers are lines of JSON on the standard streams. An attempt is the real command line in a child, so it costs what
a run costs and not what importing torch costs.
"""

import gc
import importlib
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from injected import Board, Fault

from modern_llm import cli
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.limits import matmul_limit
from modern_llm.training.inputs import MODULES, code_version

# what a run imports when it gets there
for module in ("bitsandbytes.optim.adamw", "peft", "transformers.models.qwen3.modeling_qwen3"):
    importlib.import_module(module)


def start_child(request: dict[str, Any], board: Board, output: int) -> int:
    """Fork; the child runs a command in a folder and never returns."""
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    assert threads == 1, "a fork beside threads may hang"
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        folder = Path(request["folder"])
        os.chdir(folder)
        os.environ[CACHE_VARIABLE] = request["cache"]
        Fault(board, [folder / "run", Path(request["cache"])], request["fault"]).install()
        sys.argv = ["modern-llm", *request["words"]]
        code = 0
        cli.main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attend(process: int, output: int, kill_after: float, limit: float) -> tuple[int, str, bool]:
    """Wait for a child, and kill it when its time has come.

    Returns:
        Its exit code as a shell says it (128 + signal), what it wrote, and whether it took longer than `limit`.
    """
    began, written, hung = time.monotonic(), bytearray(), False
    deadline = began + min(kill_after, limit)
    waiting = select.poll()
    waiting.register(output, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            hung = kill_after > limit
            os.kill(process, signal.SIGKILL)  # not waited for yet, so the number is still its own
            deadline = left = math.inf
        if waiting.poll(None if left == math.inf else left * 1000):
            chunk = os.read(output, 2**16)
            if not chunk:  # all ends of the pipe are closed: it is dead
                break
            written += chunk
    _, status = os.waitpid(process, 0)
    code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return code, written.decode(errors="replace"), hung


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write between the answers
    matmul_limit(torch.device("cpu"), torch.float32)  # this and the next are done once a process
    for stage in MODULES.values():
        code_version(stage)
    board = Board()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        board.clear()
        reader, writer = os.pipe()
        began = time.monotonic()
        process = start_child(request, board, writer)
        os.close(writer)
        code, output, hung = attend(process, reader, request["kill_after"] or math.inf, request["limit"])
        os.close(reader)
        answer = {
            "code": code, "output": output, "hung": hung, "seconds": time.monotonic() - began,
            "phase": board.describe(), "hit": bool(board.hit), "events": board.events,
        }  # fmt: skip
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
