"""What many tests build: a tiny tokenizer, tiny models, rows with known tokens, runs that stop, what a run left behind."""

import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.config import DPOConfig, ModelConfig, TrainingConfig, resolve
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.messages import Pair
from modern_llm.data.preference_datasets import encode_whole, sharing_prompt, within_limits
from modern_llm.data.prepared import Example, PreparedData, mixture_of
from modern_llm.data.tokenizer import train_tokenizer
from modern_llm.layout import PackedRow, Segment, pack
from modern_llm.losses import token_logprobs
from modern_llm.metrics import RunLog
from modern_llm.models.build import build_model
from modern_llm.models.policy import Policy
from modern_llm.objectives import LanguageModelingObjective, Objective
from modern_llm.training import stage
from modern_llm.training.loop import Loop
from modern_llm.training.optim import Optimizer

SENTENCES = (
    "The cat sat on the mat near the door.",
    "A dog ran over the hill and back again.",
    "She sells bread, he bakes cakes, they eat both.",
    "Rain fell on the roof all night long, and the river rose.",
    "Why does the moon follow the car when we drive home?",
    "Two and two make four; four and four make eight.",
    "The baker's daughter counted seven swans on the lake at dawn.",
    "No.",
)
QUESTIONS = ("Who sat?", "Where did the dog run?", "What does he bake?", "Did it rain?", "Why?", "How many swans?")
ANSWERS = ("The cat.", "Over the hill and back.", "Cakes", "Yes, all night long, on the roof.", "No one knows", "Seven.")
WRONG = ("A dog sat on the mat.", "Home", "Bread, and he eats both.", "No.", "The moon follows the car home.", "Eight swans")
ARCHITECTURES = ("qwen3", "llama", "qwen3_moe", "gpt_oss")
KERNELS = [(a, k) for a in ARCHITECTURES for k in ("auto", "sdpa", "eager") if (a, k) != ("gpt_oss", "sdpa")]
"""Architecture and attention kernel; the fused one has no sinks."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(SENTENCES, vocab_size=300)


def chat(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> tuple[list[int], list[bool]]:
    """ChatML by hand, for the oracle: template and words are encoded apart, and the answer counts with its end token."""
    prompt = [
        *tokenizer.encode("<|im_start|>user\n"),
        *tokenizer.encode(question),
        *tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n"),
    ]
    reply = [*tokenizer.encode(answer), *tokenizer.encode("<|im_end|>")]
    return prompt + reply, [False] * len(prompt) + [True] * len(reply)


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> PreTrainedModel:
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256, **changes}
    return build_model(ModelConfig(**shape), tokenizer, seed)


def sharpened(model: PreTrainedModel, factor: float = 4.0) -> PreTrainedModel:
    """Random weights make nearly uniform attention, in which a wrong mask hides; larger ones do not. Sinks get values too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim >= 2:
                parameter.mul_(factor)
            elif "bias" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A plain Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode_pair(pair: Pair, dpo: DPOConfig, encoder: ChatEncoder) -> tuple[Segment, Segment]:
    """The two segments of a pair, within the limits."""
    cut = within_limits(encode_whole(pair, encoder), dpo, "cut_prompt_start")
    assert not isinstance(cut, str), cut
    (prompt, *answers), _ = cut
    first, second = (
        Segment(np.array(prompt + answer, dtype=np.int32), np.arange(len(prompt + answer)) >= len(prompt)) for answer in answers
    )
    return sharing_prompt(first, second)


def random_segment(seed: int, length: int, scored: Sequence[bool] | bool = True, vocab: int = 256) -> Segment:
    ids = np.random.default_rng(seed).integers(0, vocab, length).astype(np.int32)
    return Segment(ids, np.broadcast_to(np.array(scored), (length,)).copy())


def random_examples(lengths: Sequence[int]) -> list[Example]:
    """One segment each, of these lengths, every token of which counts."""
    return [Example((random_segment(i, length),), row=i) for i, length in enumerate(lengths)]


def sample(segment: Segment) -> tuple[list[int], list[bool]]:
    """A segment as the oracle takes it."""
    return segment.ids.tolist(), segment.scored.tolist()


def whole_row(examples: Sequence[Example]) -> PackedRow:
    return pack([segment for example in examples for segment in example.segments])


def make_loop(
    model: PreTrainedModel,
    examples: Sequence[Example],
    folder: Path,
    *,
    objective: Objective | None = None,
    evaluation: Sequence[Example] = (),
    world_size: int = 1,
    save: Any = lambda step, state: None,
    **settings: Any,
) -> Loop:
    """The real loop over given examples: fp32, AdamW, a log line for each step."""
    settings = {"optimizer": "adamw", "warmup_steps": 0, "log_every": 1, "mixed_precision": "fp32", **settings}
    config = resolve(TrainingConfig(output_dir=folder, run_name="run", **settings), "sft", world_size, len(examples))
    assert config.max_steps is not None
    report = {"examples": len(examples), "eval_examples": len(evaluation)}
    data = PreparedData(mixture_of(list(examples)), mixture_of(list(evaluation)), report)
    log = RunLog(folder, "run", config.max_steps, 0, ())
    return Loop(Policy(model), objective or LanguageModelingObjective(), data, config, torch.float32, log, save)


def set_head_sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Some of the head's sizes for a CPU, until the end of the test."""
    monkeypatch.setitem(token_logprobs.SIZES, "cpu", token_logprobs.SIZES["cpu"]._replace(**sizes))


@contextmanager
def stopped_after_first_save(more_steps: int = 0) -> Iterator[None]:
    """A run inside ends like a killed one: when its first periodic checkpoint is written, or so many logged steps later."""

    class StoppingLoop(Loop):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            save, advance = self.save, self.log.advance
            steps_left = math.inf

            def save_and_stop(step: int, state: dict[str, Any]) -> None:
                nonlocal steps_left
                save(step, state)
                steps_left = min(steps_left, more_steps)
                if not steps_left:
                    raise KeyboardInterrupt

            def advance_and_stop() -> None:
                nonlocal steps_left
                if not steps_left:
                    raise KeyboardInterrupt
                steps_left -= 1
                advance()

            self.save, self.log.advance = save_and_stop, advance_and_stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "Loop", StoppingLoop)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def recorded_loops() -> Iterator[list[Loop]]:
    """The loops that runs inside make."""
    loops: list[Loop] = []

    class RecordedLoop(Loop):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            loops.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "Loop", RecordedLoop)
        yield loops


@contextmanager
def recorded_gradients() -> Iterator[list[dict[str, Tensor]]]:
    """{name: gradient} of every optimizer step taken inside, as the optimizer got it: summed and clipped."""
    steps: list[dict[str, Tensor]] = []
    original = Optimizer.step

    def step(self: Optimizer) -> None:
        named = self.groups.all.items()
        steps.append({name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named})
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", step)
        yield steps


def relative_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """‖got − wanted‖ / ‖wanted‖ over all tensors together."""
    assert got.keys() == wanted.keys()
    difference = sum(float((got[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (difference / sum(float(wanted[name].double().square().sum()) for name in wanted)) ** 0.5


def largest_difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(float((got[name].double() - wanted[name].double()).abs().max()) for name in wanted)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Path:
    """A folder that `make` filled for all processes of this test run; for what takes a process many seconds."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        make(folder)
        return folder
    import fcntl

    folder = factory.getbasetemp().parent / name  # beside the folders of the processes
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder.with_suffix(".made")
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint folder holds, tied weights once."""
    return load_file(folder / "model.safetensors")


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def identical(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Equal to the last bit."""
    return got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def metric_lines(output_dir: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in ("time", "tokens_per_second", "mfu")} for line in lines]


def logged(output_dir: Path, name: str) -> list[float]:
    """One metric of every line that has it."""
    return [line[name] for line in metric_lines(output_dir) if name in line]


# also in the processes that tests start: each run in them would walk all that was imported again (see `conftest.py`)
gc.collect()
gc.freeze()
