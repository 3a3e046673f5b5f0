"""What do checkpoints cost a run? `run_training` with a checkpoint every few steps against none.

    make bench-saving

A random Qwen3 of 30M parameters with GPT-2's vocabulary, 8 × 512 tokens a step, AdamW: a checkpoint of weights and optimizer is
about 360 MB. A run that saves copies them and goes on; a thread writes the copy. Both runs take the same steps, one after the
other, `--repeats` times; what counts are medians. The last line is one JSON object:

    copy_seconds        one save holds the training up for so long
    seconds_per_save    what a save costs in all: the difference of both runs, divided by the number of saves
    stall_at_50         share of the time that is lost at `save_every=50`: seconds_per_save / (50 × seconds of a step)
    checkpoint_bytes    size of one
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import circumstances, load_now

from modern_llm import LanguageModelingDatasetConfig, ModelConfig, TrainingConfig, run_training
from modern_llm.training.loop import Loop
from modern_llm.training.saving import Saver

MODEL = ModelConfig(d_model=384, n_layers=6, n_heads=6, max_seq_len=512, vocab_size=50304)
TINY = ModelConfig(d_model=32, n_layers=1, n_heads=2, max_seq_len=64, vocab_size=600)


class Watch:
    """Seconds of the steps after the first, and of the calls that save."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self.saves: list[float] = []


def train(model: ModelConfig, folder: Path, steps: int, batch: int, save_every: int | None, tokenizer: str) -> Watch:
    """One run, from random weights."""
    watch, step, save = Watch(), Loop._optimizer_step, Saver.checkpoint

    def timed_step(self: Loop, *given: object) -> None:
        if self.step == 1:
            watch.began = time.perf_counter()
        step(self, *given)  # type: ignore[arg-type]

    def timed_save(self: Saver, *given: object) -> None:
        began = time.perf_counter()
        save(self, *given)  # type: ignore[arg-type]
        watch.saves.append(time.perf_counter() - began)

    def timed_final(self: Saver, target: Path, step: int) -> None:
        self.finish()  # what is still being written belongs to the time of the run
        watch.ended = time.perf_counter()
        final(self, target, step)

    final = Saver.final
    Loop._optimizer_step, Saver.checkpoint, Saver.final = timed_step, timed_save, timed_final  # type: ignore[method-assign]
    try:
        config = TrainingConfig(
            output_dir=folder, max_steps=steps, batch_size=batch, micro_batch_size=batch, optimizer="adamw", compile="off",
            save_every=save_every or 10**9, keep_checkpoints=1, log_every=steps,
        )  # fmt: skip
        data = LanguageModelingDatasetConfig(dataset_name="builtin:village", max_length=model.max_seq_len)
        run_training(model, config, data, tokenizer)
    finally:
        Loop._optimizer_step, Saver.checkpoint, Saver.final = step, save, final  # type: ignore[method-assign]
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=13, help="optimizer steps, the first of which is not counted")
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try the benchmark itself")
    given = parser.parse_args()
    load, model = load_now(), TINY if given.tiny else MODEL
    folder = Path(tempfile.mkdtemp())
    try:
        from modern_llm.data.lm_datasets import training_texts
        from modern_llm.data.tokenizer import save_tokenizer, train_tokenizer

        words = LanguageModelingDatasetConfig(dataset_name="builtin:village", max_rows=500)
        tokenizer = str(save_tokenizer(train_tokenizer(training_texts(words), 500), folder / "tokenizer"))
        with_saves, without = [], []
        for n in range(given.repeats):
            without.append(train(model, folder / f"without-{n}", given.steps, 8, None, tokenizer))
            with_saves.append(train(model, folder / f"with-{n}", given.steps, 8, given.save_every, tokenizer))
        plain = statistics.median(watch.ended - watch.began for watch in without)
        saved = statistics.median(watch.ended - watch.began for watch in with_saves)
        per_save = (saved - plain) / len(with_saves[0].saves)
        step = plain / (given.steps - 1)
        checkpoint = next((folder / "with-0" / "checkpoints").iterdir())
        result = {
            "bench": "saving",
            "step_seconds": round(step, 3),
            "copy_seconds": round(statistics.median(s for watch in with_saves for s in watch.saves), 3),
            "seconds_per_save": round(per_save, 3),
            "stall_at_50": round(per_save / (50 * step), 4),
            "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
            "saves": len(with_saves[0].saves),
            **circumstances(False, load),
        }
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
