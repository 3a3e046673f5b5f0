"""The key of a stage: content counts, names and places do not; every field of every config is on one side or the other."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import save_start, tiny_model, write_jsonl

from modern_llm.config import AdapterConfig, DPOConfig, PipelineConfig, TrainingConfig, resolve
from modern_llm.config.base import StrictModel
from modern_llm.config.resolve import STAGE_DEFAULTS
from modern_llm.config.training import Stage
from modern_llm.data.tokenizer import train_tokenizer
from modern_llm.initial.checkpoint import identity
from modern_llm.pipeline import sections_of
from modern_llm.training.inputs import code_version, key_of, stage_inputs

DOCS = Path(__file__).resolve().parents[2] / "docs" / "pipeline.md"
STAGES: tuple[Stage, ...] = ("pretrain", "sft", "dpo")
SECTIONS: dict[str, str] = {"train": "train", "model": "model", "data": "data", "dpo": "dpo"}
OTHER_VALUES: dict[str, Any] = {
    "split": "train[:50%]",
    "delimiter": ";",
    "eval_split": "test",
    "max_rows": 30,
    "eval_fraction": 0.25,
    "weight": 2.0,
    "streaming": True,
    "chat_template": "plain",
}
"""Where a made-up value would name something that is not there."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    rows = {
        "pretrain": {"text": "Anna bakes."},
        "sft": {"prompt": "Who bakes?", "completion": "Anna."},
        "dpo": {"prompt": "Who bakes?", "chosen": "Anna.", "rejected": "Nobody."},
    }
    content = {}
    for stage, row in rows.items():
        folder = tmp_path_factory.mktemp(stage)
        for name, count in (("train.csv", 4), ("test.csv", 2)):
            (folder / name).write_text("\n".join([",".join(row), *[",".join(row.values())] * count]))
        content[stage] = {"data": {"dataset_name": str(folder), "max_rows": 20}}
    return PipelineConfig.model_validate(content)


def keys(config: PipelineConfig, start: Path, stages: Sequence[Stage] = STAGES) -> dict[str, str]:
    """The key of each stage, the later ones from one and the same start."""
    found = {}
    for stage in stages:
        train = config.training(stage)
        tokenizer = train.tokenizer_name if stage == "pretrain" else None
        inputs = stage_inputs(stage, train, sections_of(config, stage), None if stage == "pretrain" else start, tokenizer)
        found[stage] = key_of(inputs)
    return found


def changed(config: PipelineConfig, stage: str, section: str, field: str) -> PipelineConfig:
    """The config with another value in one field; whether the combination makes sense is of no interest here."""
    part: StrictModel = getattr(getattr(config, stage), section)
    old = getattr(part, field)
    if field in OTHER_VALUES:
        new = OTHER_VALUES[field]
    elif isinstance(old, bool):
        new = not old
    elif isinstance(old, str):
        new = f"{old}-other"
    elif isinstance(old, StrictModel):
        return _with(config, stage, section, part.model_copy(update={field: _other(old)}))
    else:
        new = 3 if old != 3 else 4
    return _with(config, stage, section, part.model_copy(update={field: new}))


def _other(part: StrictModel) -> StrictModel:
    name = next(iter(type(part).model_fields))
    return part.model_copy(update={name: "other"})


def _with(config: PipelineConfig, stage: str, section: str, part: StrictModel) -> PipelineConfig:
    whole = getattr(config, stage).model_copy(update={section: part})
    return config.model_copy(update={stage: whole})


NAMES = ("dataset_name", "eval_dataset", "tokenizer_name", "reference_checkpoint")
"""What these name is compared by content: tests of their own."""


@pytest.mark.filterwarnings("ignore:.*serializ")  # values of made-up types
def test_each_field_reruns_its_stage_or_nothing_as_the_docs_say(config: PipelineConfig, start: Path) -> None:
    """The direct effect: what comes after a stage runs again if that stage's weights are others."""
    before = keys(config, start)
    rows = ["| fields | run the stage again, and what comes after it | run nothing again |", "|---|---|---|"]
    table: dict[str, tuple[list[str], list[str]]] = {}
    for stage in STAGES:
        for section in ("model", "train", "dpo", "data"):
            part = getattr(getattr(config, stage), section, None)
            if part is None:
                continue
            rerun, nothing = [], []
            for field in type(part).model_fields:
                if field in NAMES:
                    continue
                looked_at = STAGES if not rerun + nothing else (stage,)  # once is enough to see that sections are apart
                after = keys(changed(config, stage, section, field), start, looked_at)
                different = {name for name in looked_at if before[name] != after[name]}
                assert different <= {stage}, f"{stage}.{section}.{field} changes {different}"
                (rerun if different else nothing).append(f"`{field}`")
            table[f"{stage}.{section}"] = (rerun, nothing)
    same = table["pretrain.train"] == table["sft.train"] == table["dpo.train"]
    assert same, "a training field means the same in every stage"
    for name, (rerun, nothing) in table.items():
        if name not in ("sft.train", "dpo.train"):
            title = "`train` of each stage" if name == "pretrain.train" else f"`{name}`"
            rows.append(f"| {title} | {', '.join(rerun)} | {', '.join(nothing) or '–'} |")
    text = "\n".join(rows)
    assert text in DOCS.read_text(encoding="utf-8"), f"docs/pipeline.md should have this table:\n{text}"


def test_fields_of_the_whole_pipeline_rerun_no_stage_but_the_seed(config: PipelineConfig, start: Path) -> None:
    before = keys(config, start)
    for field, value in {
        "output_dir": Path("elsewhere"),
        "evaluation": config.evaluation.model_copy(update={"max_pairs": 3}),
        "gates": {"sft": {"right_answers": ">= 0.5"}},
        "max_minutes": 5.0,
        "ignore_code_changes": True,
    }.items():
        assert keys(config.model_copy(update={field: value}), start) == before, field
    after = keys(config.model_copy(update={"seed": 1}), start)
    assert all(after[stage] != before[stage] for stage in STAGES)


ADAPTER = AdapterConfig(rank=4)
SAME: list[tuple[Stage, dict[str, Any], dict[str, Any]]] = [
    *((stage, {}, {name: value}) for stage in STAGES for name, value in STAGE_DEFAULTS[stage].items()),
    ("sft", {"adapter": ADAPTER}, {"adapter": ADAPTER, "learning_rate": 2e-4}),
    ("dpo", {"adapter": ADAPTER}, {"adapter": ADAPTER, "learning_rate": 1e-5}),
    ("pretrain", {}, {"muon_learning_rate": 0.02}),
    ("sft", {"optimizer": "muon"}, {"optimizer": "muon", "muon_learning_rate": 0.02}),
    ("sft", {"lr_schedule": "wsd"}, {"lr_schedule": "wsd", "decay_ratio": 0.2}),
    ("sft", {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "checkpointed_share": 1.0}),
    ("sft", {}, {"num_epochs": 1.0}),
    ("sft", {"max_steps": 50}, {"max_steps": 50, "warmup_steps": 5}),
    ("dpo", {"max_steps": 9000}, {"max_steps": 9000, "warmup_steps": 150}),
    ("sft", {}, {"micro_batch_size": 8}),
    ("sft", {}, {"batch_size": 32, "gradient_accumulation_steps": 4}),
    ("sft", {"batch_size": 12}, {"micro_batch_size": 4, "gradient_accumulation_steps": 3}),
    ("sft", {"batch_size": 12}, {"batch_size": 12, "micro_batch_tokens": 4096}),
    ("sft", {"micro_batch_size": 2}, {"gradient_accumulation_steps": 2}),  # either alone leaves the stage's batch
]
"""Two ways to write the same settings."""
OTHER: list[tuple[Stage, dict[str, Any], dict[str, Any]]] = [
    ("sft", {"learning_rate": 2e-5}, {"learning_rate": 2e-5, "adapter": ADAPTER}),
    ("sft", {"adapter": ADAPTER, "learning_rate": 2e-5}, {"adapter": ADAPTER}),  # ten times that
    ("sft", {"adapter": ADAPTER}, {"adapter": AdapterConfig(rank=4, continue_training=False, dropout=0.1)}),
    (
        "sft",
        {"micro_batch_size": 4, "gradient_accumulation_steps": 2},
        {"micro_batch_size": 4, "gradient_accumulation_steps": 3},
    ),
    ("sft", {}, {"micro_batch_size": 4, "gradient_accumulation_steps": 2}),
    ("sft", {}, {"batch_size": 31}),
    ("sft", {}, {"num_epochs": 2.0}),
    ("sft", {}, {"max_steps": 1}),
    ("sft", {"max_steps": 50}, {"max_steps": 50, "warmup_steps": 4}),
    ("sft", {"max_steps": 50}, {"max_steps": 51}),
    ("pretrain", {}, {"muon_learning_rate": 0.01}),
    ("pretrain", {}, {"optimizer": "adamw"}),
    ("sft", {"lr_schedule": "wsd"}, {"lr_schedule": "wsd", "decay_ratio": 0.3}),
    ("sft", {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "checkpointed_share": 0.5}),
]
"""Settings that are resolved to something else."""


def key_of_training(stage: Stage, settings: dict[str, Any], config: PipelineConfig, start: Path) -> str:
    begins = None if stage == "pretrain" else start
    return key_of(stage_inputs(stage, TrainingConfig(**settings), sections_of(config, stage), begins))


@pytest.mark.parametrize(("stage", "one", "other"), SAME)
def test_the_same_resolved_settings_are_one_key(stage: Stage, one, other, config, start) -> None:
    for ranks in (1, 2, 3):  # and as many ranks as there are
        resolved = [resolve(TrainingConfig(**given), stage, ranks, 1000) for given in (one, other)]
        assert {r.batch_size for r in resolved} == {resolved[0].batch_size}
    assert key_of_training(stage, one, config, start) == key_of_training(stage, other, config, start)


@pytest.mark.parametrize(("stage", "one", "other"), OTHER)
def test_other_resolved_settings_are_another_key(stage: Stage, one, other, config, start) -> None:
    assert key_of_training(stage, one, config, start) != key_of_training(stage, other, config, start)


@pytest.mark.parametrize("stage", STAGES)
def test_settings_written_out_as_they_are_resolved_keep_the_key(stage: Stage, config, start) -> None:
    """Whatever was left out, all at once: what `resolve` fills in is what the key is made of."""
    for given in ({}, {"max_steps": 40}, {"adapter": ADAPTER} if stage != "pretrain" else {"lr_schedule": "wsd"}):
        resolved = resolve(TrainingConfig(**given), stage)
        written = {name: value for name, value in resolved.model_dump().items() if value is not None}
        assert key_of_training(stage, given, config, start) == key_of_training(stage, written, config, start)


def test_rows_count_and_the_name_of_their_file_does_not(config: PipelineConfig, start: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Who bakes?", "completion": "Anna."}] * 3

    def key(path: Path) -> str:
        data = config.sft.data.model_copy(update={"dataset_name": str(path)})  # type: ignore[union-attr]
        return key_of(stage_inputs("sft", config.training("sft"), {"data": data}, start))

    (tmp_path / "elsewhere").mkdir()
    one = key(write_jsonl(tmp_path / "one.jsonl", rows))
    assert key(write_jsonl(tmp_path / "elsewhere" / "two.jsonl", rows)) == one
    assert key(write_jsonl(tmp_path / "one.jsonl", [*rows, rows[0]])) != one


def test_a_start_counts_by_its_files_wherever_it_lies(config, start: Path, tokenizer, tmp_path: Path) -> None:
    shutil.copytree(start, tmp_path / "moved")
    assert identity(tmp_path / "moved") == identity(start)
    other = save_start(tiny_model(tokenizer, seed=9), tokenizer, tmp_path / "other")
    assert identity(other) != identity(start)
    assert keys(config, other)["sft"] != keys(config, start)["sft"]
    assert keys(config, other)["pretrain"] == keys(config, start)["pretrain"]


def test_a_reference_counts_by_its_content(config, start: Path, tokenizer, tmp_path: Path) -> None:
    def key(reference: Path) -> str:
        sections = {**sections_of(config, "dpo"), "dpo": DPOConfig(reference_checkpoint=reference)}
        return key_of(stage_inputs("dpo", config.training("dpo"), sections, start))

    reference = save_start(tiny_model(tokenizer, seed=5), tokenizer, tmp_path / "reference")
    shutil.copytree(reference, tmp_path / "copy")
    before = key(reference)
    assert key(tmp_path / "copy") == before
    save_start(tiny_model(tokenizer, seed=6), tokenizer, reference)
    assert key(reference) != before


def test_a_tokenizer_counts_by_its_content(config, tokenizer, tmp_path: Path) -> None:
    def key(name: str | None) -> str:
        return key_of(stage_inputs("pretrain", config.training("pretrain"), sections_of(config, "pretrain"), None, name))

    tokenizer.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    train_tokenizer(["other text"], 270).save_pretrained(tmp_path / "c")
    one, two, three, trained = key(str(tmp_path / "a")), key(str(tmp_path / "b")), key(str(tmp_path / "c")), key(None)
    assert one == two
    assert len({one, three, trained}) == 3


def test_inputs_are_json_and_any_code_leaves_the_version_out(config, start: Path) -> None:
    inputs = stage_inputs("sft", config.training("sft"), sections_of(config, "sft"), start)
    assert json.loads(json.dumps(inputs)) == inputs
    older = {**inputs, "code": {**inputs["code"], "modern_llm": "0" * 64}}
    assert key_of(older) != key_of(inputs)
    assert key_of(older, any_code=True) == key_of(inputs, any_code=True)


def test_a_stages_code_is_what_it_imports_without_its_comments(tmp_path: Path, monkeypatch) -> None:
    from modern_llm.training import inputs

    (tmp_path / "a.py").write_text('"""About."""\nfrom modern_llm.b import number\n\nresult = number + 1  # one more\n')
    (tmp_path / "b.py").write_text("number = 1\n")
    (tmp_path / "c.py").write_text("unused = 1\n")
    monkeypatch.setattr(inputs, "PACKAGE", tmp_path)

    def version() -> str:
        code_version.cache_clear()
        inputs._tree.cache_clear()
        return code_version("a")

    first = version()
    (tmp_path / "a.py").write_text('"""Other words."""\nfrom modern_llm.b import number\n\n\nresult = number + 1\n')
    (tmp_path / "c.py").write_text("unused = 2\n")
    assert version() == first
    (tmp_path / "b.py").write_text("number = 2\n")
    assert version() != first
    monkeypatch.undo()
    code_version.cache_clear()
    inputs._tree.cache_clear()


def test_stages_reach_the_code_that_trains_them_and_no_command() -> None:
    from modern_llm.training.inputs import MODULES, _reached

    for stage in STAGES:
        reached = _reached(MODULES[stage])
        assert {"training.loop", "training.optim", "models.policy", "losses.token_logprobs", "config.resolve"} <= reached
        assert not {"cli", "pipeline", "config.pipeline", "config.commands", "report.table", "export"} & reached
    assert "losses.preference" in _reached(MODULES["dpo"])
    assert "data.lm_datasets" not in _reached(MODULES["dpo"])
