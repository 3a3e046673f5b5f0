"""`modern-llm plan`: its counts are those of the run, its memory is that of real tensors, and it leaves nothing behind."""

import io
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_loop, random_examples, tiny_model, write_jsonl
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modern_llm import distributed
from modern_llm.config import PipelineConfig, TrainingConfig, UserError, resolve
from modern_llm.config.commands import DPOArguments, PretrainArguments, SFTArguments, as_pipeline, kind_of_file
from modern_llm.config.training import Stage
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.loader import micro_batches, steps
from modern_llm.initial.checkpoint import load_model
from modern_llm.losses.token_logprobs import SIZES
from modern_llm.models.flops import training_cost
from modern_llm.models.policy import Policy, vocabulary_rows
from modern_llm.objectives import LanguageModelingObjective
from modern_llm.precision import autocast
from modern_llm.report import plan as planning
from modern_llm.report.memory import Correction, Estimate, Load, Machine
from modern_llm.report.plan import plan
from modern_llm.report.plan_text import memory_size, show
from modern_llm.report.rehearsal import arguments_for_rehearsal
from modern_llm.training.optim import ParameterGroups

ROWS = 12


def pipeline(tmp_path: Path, start: Path, stage: Stage = "sft", **train: Any) -> PipelineConfig:
    """One later stage from the tiny start."""
    text = "Anna bakes the bread of the village, and she sells it at the market too. "
    chats = [{"prompt": "Who?", "completion": text * (1 + n % 3)} for n in range(ROWS)]
    pairs = [{"prompt": "Who bakes?", "chosen": text * (1 + n % 3), "rejected": "No."} for n in range(ROWS)]
    data = write_jsonl(tmp_path / f"{stage}.jsonl", chats if stage == "sft" else pairs)
    settings = {"batch_size": 4, "micro_batch_size": 2, "num_epochs": 2, **train}
    section = {"data": {"dataset_name": str(data)}, "train": settings}
    return PipelineConfig.model_validate({"output_dir": tmp_path / "out", "start_checkpoint": str(start), stage: section})


def test_tokens_steps_and_flops_are_those_that_the_loop_would_take(tmp_path: Path, start: Path, tokenizer) -> None:
    config = pipeline(tmp_path, start, batch_size=5, micro_batch_size=5)
    (found,) = plan(config, measure=False).stages
    assert config.sft is not None
    data = prepare_instructions(config.sft.data, ChatEncoder(tokenizer))
    cost = training_cost(load_model(start))
    assert found.steps == 2 * 3  # 12 chats by 5: the third step of an epoch holds two
    rows = [
        micro_batch.row
        for _, step in zip(range(found.steps), steps(data.train, 5, 5, 0), strict=False)
        for micro_batch in step.micro_batches
    ]
    assert found.tokens == sum(row.num_tokens for row in rows)
    assert found.flops == pytest.approx(sum(cost(row) for row in rows))
    assert found.examples == ROWS
    assert max(row.num_tokens for row in rows) <= 1.5 * found.largest_micro_batch_tokens


def test_parts_add_up_and_weights_gradients_and_state_are_those_of_the_parameters(tmp_path: Path, start: Path) -> None:
    numel = sum(p.numel() for p in load_model(start).parameters())
    (found,) = plan(pipeline(tmp_path, start, ema_decay=0.9), measure=False).stages
    assert found.parameters == found.trained_parameters == numel
    assert sum(found.memory.values()) == found.peak_bytes
    assert found.memory["gradients"] == found.memory["average"] == 4 * numel
    assert found.memory["optimizer"] == 8 * numel  # AdamW
    assert found.memory["weights"] >= 4 * numel  # and the few numbers of the positions
    assert found.seconds == {}
    assert found.not_measured


def test_periodic_checkpoints_that_are_removed_take_no_disk_but_are_all_written(tmp_path: Path, start: Path) -> None:
    (all_stay,) = plan(pipeline(tmp_path, start, max_steps=10, num_epochs=None, save_every=1), measure=False).stages
    numel = all_stay.parameters
    assert all_stay.disk["periodic"] == pytest.approx(9 * 12 * numel, rel=0.01)  # the last is the final one
    for kept, there in ((2, 3), (8, 9), (20, 9)):  # the oldest goes when a newer one is whole
        config = pipeline(tmp_path, start, max_steps=10, num_epochs=None, save_every=1, keep_checkpoints=kept)
        (found,) = plan(config, measure=False).stages
        assert found.disk["periodic"] == all_stay.disk["periodic"] // 9 * there
        assert found.memory.get("checkpoint") == all_stay.memory.get("checkpoint")


def test_a_disk_that_is_too_small_is_said_with_what_helps(tmp_path: Path, start: Path) -> None:
    whole = replace(plan(pipeline(tmp_path, start), measure=False), disk_free_bytes=0)
    file = io.StringIO()
    show(whole, as_json=False, console=Console(file=file, width=200))
    assert "the disk is too small: set keep_checkpoints (for example 2), or raise save_every" in file.getvalue()


def test_adapters_train_and_save_only_themselves(tmp_path: Path, start: Path) -> None:
    (whole,) = plan(pipeline(tmp_path, start), measure=False).stages
    (found,) = plan(pipeline(tmp_path, start, adapter={"rank": 2}), measure=False).stages
    added = found.trained_parameters
    assert found.parameters == whole.parameters + added
    assert found.memory["optimizer"] == 8 * added
    assert found.disk["final"] == 4 * added
    assert found.flops < whole.flops


def test_preference_training_plans_for_a_second_model_only_where_one_stays(tmp_path: Path, start: Path) -> None:
    config = pipeline(tmp_path, start, "dpo")
    (cached,) = plan(config, measure=False).stages
    assert "reference" not in cached.memory
    assert config.dpo is not None
    moving = config.dpo.model_copy(update={"dpo": config.dpo.dpo.model_copy(update={"sync_ref_model": True})})
    (live,) = plan(config.model_copy(update={"dpo": moving}), measure=False).stages
    assert live.memory["reference"] == live.memory["weights"]


def test_what_does_not_fit_is_said_with_settings_that_take_less_and_is_never_tried(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "machine_memory", lambda device: Machine(2**20, 2**20))
    monkeypatch.setattr(planning, "rehearse", lambda *_: pytest.fail("it ran"))
    whole = plan(pipeline(tmp_path, start))
    (found,) = whole.stages
    assert not found.fits
    assert found.not_measured == "it does not fit, as far as its shapes tell"
    assert {"micro_batch_size: 1", "gradient_checkpointing: true", "optimizer: adamw_8bit"} <= found.ways_out.keys()
    assert all(size < found.peak_bytes for size in found.ways_out.values())
    file = io.StringIO()
    show(whole, as_json=False, console=Console(file=file, width=200))
    assert "does not fit" in file.getvalue()
    assert "optimizer: adamw_8bit" in file.getvalue()


def test_fit_takes_the_largest_micro_batch_that_divides_the_batch_and_fits(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pipeline(tmp_path, start, batch_size=12, micro_batch_size=1, mixed_precision="fp32")
    sizes = {}
    for size in (1, 2, 3, 4, 6, 12):
        (found,) = plan(pipeline(tmp_path, start, batch_size=12, micro_batch_size=size, mixed_precision="fp32"), False).stages
        sizes[size] = sum(found.memory.values()) - found.memory["process"]
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)  # of this process: it differs from one call to the next
    monkeypatch.setattr(planning, "ROOM", 1.0)
    for size, needed in sizes.items():
        if size == 12:  # all in one: gradients come while activations go, so it may take less than 6
            continue
        monkeypatch.setattr(planning, "machine_memory", lambda device, needed=needed: Machine(needed, needed))
        (found,) = plan(config, measure=False, fit=True).stages
        chosen = found.micro_batch_size
        assert chosen is not None
        assert sizes[chosen] <= needed
        assert all(sizes[other] > needed for other in sizes if other > chosen)
        assert found.batch_size == 12
    monkeypatch.setattr(planning, "machine_memory", lambda device: Machine(2**40, 2**40))
    assert plan(config, measure=False, fit=True).stages[0].micro_batch_size == 12
    assert plan(config, measure=False, fit=True, ranks=3).stages[0].micro_batch_size == 4  # of a rank's share
    assert plan(config, measure=False, fit=True, ranks=5).stages[0].micro_batch_size == 3  # which two ranks do not fill
    whole = pipeline(tmp_path, start, batch_size=12, micro_batch_size=12, mixed_precision="fp32")
    assert plan(whole, measure=False, ranks=5).stages[0].micro_batch_size == 3
    tokens = pipeline(tmp_path, start, micro_batch_size=None, micro_batch_tokens=64)
    with pytest.raises(UserError, match="micro_batch_tokens=64 decides the micro-batches"):
        plan(tokens, measure=False, fit=True)


def test_measured_steps_give_time_and_memory_and_leave_nothing_behind(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pipeline(tmp_path, start, "dpo", mixed_precision="fp32")
    for name in ("scratch", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(planning, "TRIED_SECONDS", 0.0)
    before = sorted(tmp_path.rglob("*"))
    whole = plan(config)
    (found,) = whole.stages
    assert found.not_measured is None
    assert found.seconds.keys() == {"opening", "steps", "evaluations", "checkpoints", "reference"}
    assert found.seconds["steps"] > 0
    assert whole.seconds == sum(found.seconds.values())
    assert found.mfu is not None
    assert 0 < found.mfu < 2
    assert "reference" not in found.memory  # its answers are kept, not its weights
    assert found.memory["process"] > 100 * 2**20  # Python with torch
    assert sum(found.memory.values()) == found.peak_bytes
    assert sorted(tmp_path.rglob("*")) == before
    file = io.StringIO()
    show(whole, as_json=True, console=Console(file=file, width=20))
    assert json.loads(file.getvalue())["stages"][0]["steps"] == found.steps
    assert found.measured_steps == planning.LEAST_STEPS // 2
    assert found.measured_rows == found.measured_steps * 4
    assert found.spread is not None


def test_with_too_little_time_the_plan_is_from_shapes_only_and_says_so(tmp_path: Path, start: Path) -> None:
    whole = plan(pipeline(tmp_path, start, mixed_precision="fp32"), seconds=0.001)
    (found,) = whole.stages
    assert (found.seconds, found.measured_steps, found.fits) == ({}, 0, True)
    file = io.StringIO()
    show(whole, as_json=False, console=Console(file=file, width=200))
    assert "from shapes only: the first step was not done in 0.001 s (--seconds)" in file.getvalue()


def test_no_alarm_is_left_that_would_kill_a_rehearsal_while_it_shuts_down(tmp_path: Path, start: Path) -> None:
    config = pipeline(tmp_path, start, mixed_precision="fp32", max_steps=2, num_epochs=None)
    assert config.sft is not None
    train = resolve(config.training("sft"), "sft", rows_per_epoch=ROWS)
    whole = SFTArguments(pretrain_checkpoint=str(start), train_config=train, dataset_config=config.sft.data)
    arguments = arguments_for_rehearsal(whole, train, config.sft.data, ROWS, tmp_path / "rehearsal", 2, 4)
    code = "import signal; from modern_llm.report.rehearsal import main; main(); print(*signal.getitimer(signal.ITIMER_REAL))"
    done = subprocess.run(
        [sys.executable, "-c", code, "sft", "60"], input=json.dumps(arguments), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0.0 0.0"


def test_small_sizes_are_said_in_mebibytes() -> None:
    assert [memory_size(size) for size in (0, 300_000, 40 * 2**20, 2**30 - 1, 3 * 2**29)] == [
        "0.0 MiB", "0.3 MiB", "40.0 MiB", "1,024.0 MiB", "1.50 GiB",
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "rmsprop", "adamw_8bit"])
def test_the_optimizers_state_is_as_large_as_foreseen(optimizer: str, tmp_path: Path, tokenizer) -> None:
    model = tiny_model(tokenizer, d_model=64)
    loop = make_loop(model, random_examples([9, 9]), tmp_path, optimizer=optimizer, batch_size=2, max_steps=1)
    loop.run()
    tensors = [v for values in loop.optimizer.state().values() for n, v in values.items() if isinstance(v, Tensor) and v.ndim]
    maps = [v for values in loop.optimizer.state().values() for n, v in values.items() if n.startswith("qmap")]
    real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    real -= sum(table.numel() * table.element_size() for table in maps)  # the two tables of 8-bit values, shared by all
    estimate = Estimate(model, loop.config, torch.float32, 0, False)
    assert estimate.held["optimizer"] == pytest.approx(real, rel=0.02)


def kept(model, lengths: list[int], precision: torch.dtype) -> int:
    """Bytes of what the body keeps for its backward pass, weights left out."""
    policy = Policy(model)
    policy.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, Tensor]] = {}
    vocab = vocabulary_rows(model)

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and vocab not in tensor.shape:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address comes twice
        return tensor

    (batch,) = micro_batches(random_examples(lengths), len(lengths))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(precision, policy.device):
        LanguageModelingObjective()(policy, batch)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 8, "ffn_hidden_size": 640}], ids=["grouped", "wide"])
def test_activations_are_those_that_the_layers_keep(
    precision: torch.dtype, shape: dict[str, int], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(tokenizer, **{"d_model": 128, "n_heads": 8, "n_layers": 3, "max_seq_len": 256, **shape})
    lengths = [200, 200, 200]
    config = resolve(TrainingConfig(batch_size=3), "pretrain", 1, 3)
    estimate = Estimate(model, config, precision, 0, False)
    load = Load(tokens=600, predicted=597, longest=200, several=False, pairs=False)
    # what one layer works with in its backward pass is in the estimate, and no saved tensor
    assert estimate.activation_bytes(load) - estimate.work_bytes(load) == pytest.approx(
        kept(model, lengths, precision), rel=0.1
    )


def test_a_measured_peak_gives_back_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer)
    config = resolve(TrainingConfig(batch_size=4), "sft", 1, 8)
    estimate = Estimate(model, config, torch.float32, 5 * 10**8, False)
    for several in (True, False):
        for tokens in (4, 4000):  # few tokens: the peak is where gradients are complete
            load = Load(tokens, tokens // 2, 4, several, False)
            foreseen = estimate.during_pass(load)
            for peak in (sum(foreseen.values()) - foreseen["activations"] // 2, sum(foreseen.values()) + 10**8):
                corrected = estimate.during_pass(load, estimate.correction(load, peak))
                assert sum(corrected.values()) == pytest.approx(peak, rel=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_on_a_gpu_the_update_of_muon_counts_where_it_is_the_highest_point(
    several: bool, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    model = tiny_model(tokenizer, d_model=128)
    estimate = Estimate(model, resolve(TrainingConfig(optimizer="muon"), "sft", 1, 8), torch.bfloat16, 0, False)
    shapes = [p.shape for p in ParameterGroups(model).named["matrices"].values()]
    assert estimate.update == 16 * max(shapes.count(shape) * shape.numel() for shape in shapes)
    few, many = (Load(tokens, tokens // 2, 4, several, False) for tokens in (4, 40_000))
    estimate.update = 10**8
    assert estimate.during_pass(few) == {**estimate.held, "other": 0, "activations": 0, "head": 0, "update": 10**8}
    assert "update" not in estimate.during_pass(many)
    peak = sum(estimate.during_pass(few).values())
    assert sum(estimate.during_pass(few, estimate.correction(few, peak + 5)).values()) == peak + 5
    assert estimate.correction(few, peak - 5) == Correction()
    changed = resolve(TrainingConfig(optimizer="adamw"), "sft", 1, 8)
    assert Estimate(model, changed, torch.bfloat16, 0, False).update == 0


def test_the_head_is_counted_by_the_sizes_of_its_device(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tokenizer)
    config = resolve(TrainingConfig(batch_size=4), "sft", 1, 8)
    load = Load(10**7, 5 * 10**6, 100, False, True)
    found = {}
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr(distributed, "device", lambda kind=kind: torch.device(kind))
        found[kind] = Estimate(model, config, torch.bfloat16, 0, False).head_bytes(load)
    cpu, cuda = SIZES["cpu"], SIZES["cuda"]
    vocabulary = vocabulary_rows(model)
    logits = [2 * sizes.chunk_elements + 4 * sizes.scratch_elements for sizes in (cpu, cuda)]
    assert load.predicted * vocabulary * 2 <= cuda.kept_bytes
    logits[1] = 2 * load.predicted * vocabulary + 4 * cuda.scratch_elements
    assert found["cuda"] - found["cpu"] == pytest.approx(logits[1] - logits[0], rel=0.01)


def test_a_stage_file_is_planned_as_a_pipeline_of_that_stage(start: Path) -> None:
    train = {"dataset_name": "builtin:village", "batch_size": 4}
    files: dict[type, dict[str, Any]] = {
        PretrainArguments: {"model_config": {"d_model": 32, "n_heads": 4}, "train_config": train, "tokenizer_name": str(start)},
        SFTArguments: {"pretrain_checkpoint": str(start), "train_config": train},
        DPOArguments: {"sft_checkpoint": str(start), "train_config": train, "dpo_config": {"beta": 0.5}},
        PipelineConfig: {"start_checkpoint": str(start), "sft": {"data": {"dataset_name": "builtin:village"}}},
    }
    for kind, content in files.items():
        assert kind_of_file(content) is kind
    pretrain, sft, dpo, whole = (as_pipeline(kind.model_validate(content)) for kind, content in files.items())
    assert pretrain.pretrain is not None
    assert pretrain.pretrain.model.d_model == 32
    assert pretrain.pretrain.train.tokenizer_name == str(start)
    assert sft.sft is not None
    assert (sft.start_checkpoint, sft.sft.data.dataset_name) == (str(start), "builtin:village")
    assert dpo.dpo is not None
    assert dpo.dpo.dpo.beta == 0.5
    assert whole.sft is not None
    with pytest.raises(UserError, match="dataset_name is required"):
        as_pipeline(SFTArguments(pretrain_checkpoint="x"))


def test_a_model_too_large_for_any_machine_is_planned_from_its_shapes(tmp_path: Path, start: Path) -> None:
    shape = {"d_model": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "ffn_hidden_size": 28672, "tie_embeddings": False}
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "One word after the other. " * 9} for _ in range(8)])
    section = {
        "model": {**shape, "architecture": "llama", "max_seq_len": 64},
        "data": {"dataset_name": str(data)},
        "train": {"tokenizer_name": str(start), "batch_size": 2, "optimizer": "adamw"},
    }
    (found,) = plan(PipelineConfig.model_validate({"pretrain": section, "output_dir": tmp_path / "out"})).stages
    words = found.parameters - 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) - 8192
    assert words == 2 * 8192 * (words // (2 * 8192))  # what is left are two tables of the vocabulary
    assert not found.fits
