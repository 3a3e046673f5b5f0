"""Checks of every family of transformers' causal language models, and the table of the docs that they make.

python tests/families_sweep.py              # every family; writes docs/families.md
python tests/families_sweep.py llama gemma4 # these alone; writes nothing
"""

import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import transformers
from every_family import FAMILIES, NOT_BUILT, tiny_model
from family_folders import check_damages, check_intact, check_published, facts
from family_training import check_training
from helpers import tiny_tokenizer
from weight_groups import misplaced

from modern_llm.data.store import CACHE_VARIABLE

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
SECONDS, BYTES = 300, 12 * 2**30
"""Limits of one family."""
HEADER = """# Model families

Every family of the causal language models of transformers {version}, as a random model 32 wide in which each kind of layer of
the family is there. Made by `make families`; do not edit.

Each is saved, loaded and compared. Its folder is damaged in every way that it allows (a prefix on all names, a tensor left
out, layers or rows more or less in the settings than in the file, no head, a reward model), and must then load right or be
refused with the name of a tensor. Log-probs and gradients are compared with those of the unwrapped model in float64. It is
trained for two steps, in full and with adapters at their default settings, and what the run left is loaded and compared with
what it trained.

`+decoder`: an encoder whose config says `is_decoder`. Rows: packed, or padded to one line for each sequence. Adapters: how many
layers get one; after "not", linear layers that text never reaches.
"""


class Line(NamedTuple):
    """What is known of a family in the end."""

    family: str
    model: str
    runs: str
    adapters: str
    tested: str
    faults: Sequence[str] = ()


def check(family: str) -> Line:
    """All checks of a family, in a process of its own."""
    if family in NOT_BUILT:
        return Line(family, "", f"not built: {NOT_BUILT[family]}", "", "")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
        folder = Path(name)
        os.environ[CACHE_VARIABLE] = str(folder / "cache")
        tokenizer = tiny_tokenizer()
        try:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                known = facts(family, folder / "start", tokenizer)
                check_intact(known)
                check_damages(known, family, tokenizer, folder)
                check_published(known, family, tokenizer, folder)
                check_training(known, folder, tokenizer)
                known.faults.extend(misplaced(tiny_model(family)))
        except Exception as error:
            return Line(family, "", "", "", "", [f"the check itself: {type(error).__name__}: {error}"])
    tested = ", ".join([*([f"{len(known.damages)} damages"] if known.damages else []), *known.tested])
    return Line(family, type(known.model).__name__, known.runs, known.adapters, tested, known.faults)


def _too_long(*seen: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def page(lines: Sequence[Line]) -> str:
    """The table as a page of the docs."""
    built = [line for line in lines if line.family not in NOT_BUILT]
    rows = [
        row(
            line.family,
            line.model,
            line.runs,
            line.adapters,
            "; ".join(["**wrong**", *line.faults]) if line.faults else line.tested,
        )
        for line in built
    ]
    return "\n".join(
        [
            HEADER.format(version=transformers.__version__),
            row("family", "model", "rows", "adapters", "tested"),
            "|---|---|---|---|---|",
            *rows,
            "\n## Not built\n",
            row("family", "reason"),
            "|---|---|",
            *(row(family, reason) for family, reason in NOT_BUILT.items()),
            "",
        ]
    )


def row(*cells: str) -> str:
    """A line of a table, without the folders of this run."""
    plain = (re.sub(r"\w+='/[^']*':? ?", "", cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(plain)} |"


def main(families: Sequence[str]) -> int:
    """Check families, several at a time; the exit code is 1 where something is wrong."""
    lines: list[Line] = []
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for line in pool.imap(check, families or FAMILIES):
            lines.append(line)
            state = "WRONG" if line.faults else "right" if line.model else "-----"
            print(f"{state} {line.family}: {line.runs}{'; adapters: ' if line.adapters else ''}{line.adapters}", flush=True)
            for fault in line.faults:
                print(f"      {fault}", flush=True)
    if not families:
        PAGE.write_text(page(lines), encoding="utf-8")
    wrong, right = sum(bool(line.faults) for line in lines), sum(bool(line.model and not line.faults) for line in lines)
    print(f"{right} right, {wrong} wrong, {len(lines) - right - wrong} not built")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
