"""How fast, and in how much memory, is data prepared? Text against `datasets.map`, and the second start of a set of pairs.

    make bench-data

Text: documents of words drawn by Zipf's law from 200,000 made-up ones, as one `.jsonl` file. Ours: from the file to packed
blocks (read, tokenize, write, lay out). Theirs: `datasets.map` with `tokenizer(texts)` over the loaded table, in two
processes; loading the table is not counted. Each side runs in a process of its own, one after the other, and gives its wall
time and the peak of its resident memory, that of its children added.

Pairs: 160,000 of them, prepared once, and then the same call again in a new process.

The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.texts import make_text, make_tokenizer

PROCESSES = 2


def make_pairs(path: Path, count: int) -> None:
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("aeioulnrst"), 2 + n % 8)) for n in range(20_000)]

    def text(low: int, high: int) -> str:
        return " ".join(words[i] for i in rng.integers(0, len(words), int(rng.integers(low, high))))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"prompt": text(10, 60), "chosen": text(20, 120), "rejected": text(20, 120)}
            file.write(json.dumps(row) + "\n")


def resident_megabytes() -> float:
    """Resident memory of this process and its children now, shared pages counted in each."""
    total, mine = 0, os.getpid()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # it has ended
            continue
        if int(fields["Pid"]) == mine or int(fields["PPid"]) == mine:
            total += int(fields.get("VmRSS", "0 kB").split()[0])
    return total / 1024


class Peak:
    """The largest resident memory while the block runs, looked at twenty times a second, and its wall time."""

    def __enter__(self) -> "Peak":
        self.before = self.megabytes = resident_megabytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        self.start = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.05):
            self.megabytes = max(self.megabytes, resident_megabytes())

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        self.done.set()
        self.thread.join()
        self.megabytes = max(self.megabytes, resident_megabytes())

    def result(self, **more: Any) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 2),
            "peak_mb": round(self.megabytes),
            "beyond_imports_mb": round(self.megabytes - self.before),
            **more,
        }


def ours_text(folder: Path) -> dict[str, Any]:
    from modern_llm.config import LanguageModelingDatasetConfig
    from modern_llm.data.lm_datasets import prepare_documents
    from modern_llm.data.tokenizer import TextEncoder, load_tokenizer

    encoder = TextEncoder(load_tokenizer(folder / "tokenizer"))
    with Peak() as peak:
        data = prepare_documents(LanguageModelingDatasetConfig(dataset_name=str(folder / "text.jsonl")), encoder, 1024, 0)
    return peak.result(tokens=data.report["tokens"], blocks=data.report["examples"])


def theirs_text(folder: Path) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    table = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=str(folder / "hf"))
    with Peak() as peak:
        table.map(lambda rows: tokenizer(rows["text"]), batched=True, num_proc=PROCESSES, remove_columns=["text"])  # type: ignore[union-attr]
    return peak.result()


def ours_pairs(folder: Path) -> dict[str, Any]:
    from modern_llm.config import DPOConfig, PreferenceDatasetConfig
    from modern_llm.data.chat import ChatEncoder
    from modern_llm.data.preference_datasets import prepare_preferences
    from modern_llm.data.tokenizer import load_tokenizer

    encoder = ChatEncoder(load_tokenizer(folder / "tokenizer"))
    with Peak() as peak:
        data = prepare_preferences(PreferenceDatasetConfig(dataset_name=str(folder / "pairs.jsonl")), DPOConfig(), encoder)
        data.fingerprint()
    return peak.result(pairs=data.report["examples"])


SIDES = {"ours_text": ours_text, "theirs_text": theirs_text, "pairs_first": ours_pairs, "pairs_second": ours_pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--folder", type=Path, help="where to work; removed at the end. Left out: a temporary folder")
    parser.add_argument("--side", choices=SIDES, help="run one side, in a folder that is made")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.folder)))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        make_text(folder / "text.jsonl", arguments.megabytes)
        make_pairs(folder / "pairs.jsonl", arguments.pairs)
        make_tokenizer(folder / "tokenizer", folder / "text.jsonl")
        environment = {**os.environ, "MODERN_LLM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        result: dict[str, Any] = {}
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            result[side] = json.loads(done.stdout.splitlines()[-1])
            print(side, result[side], flush=True)
        size = (folder / "text.jsonl").stat().st_size / 1e6
        result["text_mb"] = round(size)
        for side in ("ours_text", "theirs_text"):
            result[side]["mb_per_second"] = round(size / result[side]["seconds"], 2)
        result["rate_ratio"] = round(result["theirs_text"]["seconds"] / result["ours_text"]["seconds"], 2)
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
