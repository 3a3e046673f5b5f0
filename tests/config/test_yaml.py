"""YAML in and out: what was dumped reads back equal, and every bad file is one error that names it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ModelConfig,
    PipelineConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    UserError,
    dump_yaml,
    load_config,
)
from modern_llm.config.io import read_yaml

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "run.yaml"


# Round trip

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.sampled_from(
    ["null", "yes", "1e5", "1_0", "0x1", "2020-01-01", "- a", "a: b", "#", "~", "true", "1:30", "'", '"']
)
PATHS = st.sampled_from(["a", "a/b", "/tmp/ü", "a b", "1e5"]).map(Path)
RUN_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True) | st.sampled_from(
    ["1e5", "12", "no", "1.5", "0x1"]
)
RATES = st.floats(1e-12, 10.0)
COUNTS = st.integers(1, 10_000)


def configs(kind, required=None, **optional):
    return st.fixed_dictionaries(required or {}, optional=optional).map(lambda values: kind(**values))


MODELS = configs(
    ModelConfig,
    architecture=st.sampled_from(["qwen3", "llama"]),
    d_model=st.sampled_from([64, 128]),
    n_heads=st.sampled_from([2, 4]),
    n_layers=COUNTS,
    ffn_hidden_size=st.none() | COUNTS,
    vocab_size=st.none() | COUNTS,
    rope_theta=RATES,
    tie_embeddings=st.booleans(),
    dropout=st.floats(0, 0.9),
)
TRAINING = configs(
    TrainingConfig,
    run_name=RUN_NAMES,
    dataset_name=WORDS,
    tokenizer_name=WORDS,
    output_dir=PATHS,
    batch_size=COUNTS,
    optimizer=st.sampled_from(["adamw", "muon", "paged_adamw_8bit"]),
    learning_rate=RATES,
    adam_betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    adam_epsilon=RATES,
    num_epochs=RATES,
    lr_schedule=st.sampled_from(["constant", "linear"]),
    seed=st.integers(0, 2**63),
    gradient_checkpointing=st.booleans(),
    report_to=st.lists(st.sampled_from(["tensorboard", "wandb"]), unique=True).map(tuple),
)
DPO = configs(
    DPOConfig,
    beta=RATES,
    label_smoothing=st.floats(0, 0.49),
    max_length=st.integers(100, 900),
    max_prompt_length=st.none() | st.integers(1, 99),
    reference_checkpoint=st.none() | WORDS | PATHS,
    disable_dropout=st.booleans(),
)
DATA = {
    "split": WORDS,
    "dataset_config_name": st.none() | WORDS,
    "max_rows": st.none() | COUNTS,
    "eval_fraction": st.floats(0, 0.9),
}
DOCUMENTS = configs(
    LanguageModelingDatasetConfig, {"dataset_name": WORDS}, **DATA, document_separator=st.none() | WORDS, text_field=WORDS
)
SOURCES = WORDS | st.dictionaries(
    WORDS, RATES | st.builds(lambda w: {"weight": w, "split": "test"}, RATES), min_size=1, max_size=3
)
CHATS = configs(
    InstructionDatasetConfig,
    {"dataset_name": SOURCES},
    **DATA,
    max_length=COUNTS,
    adapter=st.none() | st.sampled_from(["alpaca", "oasst"]),
    truncation=st.sampled_from(["drop", "cut_end", "cut_prompt_start"]),
    packing=st.booleans(),
    on_bad_row=st.sampled_from(["fail", "skip"]),
)
LINT = st.fixed_dictionaries({"duplicate": st.sampled_from(["drop", "keep", "fail"])})
PAIRS = configs(PreferenceDatasetConfig, {"dataset_name": SOURCES}, **DATA, chosen_field=WORDS, lint=LINT)


def in_own_folder(train: TrainingConfig) -> TrainingConfig:
    """Two stages in one folder would be refused."""
    return train.model_copy(update={"output_dir": None})


PIPELINES = configs(
    PipelineConfig,
    {"pretrain": st.builds(lambda m, t, d: {"model": m, "train": t, "data": d}, MODELS, TRAINING, DOCUMENTS)},
    output_dir=PATHS,
    sft=st.none() | st.builds(lambda t, d: {"train": in_own_folder(t), "data": d}, TRAINING, CHATS),
    dpo=st.none() | st.builds(lambda t, o, d: {"train": in_own_folder(t), "dpo": o, "data": d}, TRAINING, DPO, PAIRS),
    evaluation=st.builds(lambda n: {"max_pairs": n}, COUNTS),
)


@PROPERTY
@given(config=st.one_of(MODELS, TRAINING, DPO, DOCUMENTS, CHATS, PAIRS, PIPELINES))
def test_what_is_dumped_reads_back_equal(file, config) -> None:
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(type(config), file) == config


@pytest.mark.parametrize("name", ["1e5", "5E3", "12", "1.5", "no", "null", "0x1"])
def test_a_name_that_looks_like_a_number_stays_a_name(file, name) -> None:
    config = TrainingConfig(run_name=name)
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(TrainingConfig, file) == config


def test_a_path_to_a_reference_reads_back_equal(file) -> None:
    config = DPOConfig(reference_checkpoint=Path("runs/sft_final"))
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(DPOConfig, file) == config


def test_what_was_not_set_is_left_out_of_the_dump() -> None:
    assert dump_yaml(TrainingConfig(max_steps=5)) == "max_steps: 5\n"


def test_a_setting_that_equals_its_default_stays_one(file) -> None:
    """A stage without a seed of its own takes the pipeline's, and this one has its own."""
    config = PipelineConfig.model_validate(
        {"seed": 5, "start_checkpoint": "a", "sft": {"train": {"seed": 0}, "data": {"dataset_name": "b.jsonl"}}}
    )
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(PipelineConfig, file).training("sft").seed == config.training("sft").seed == 0


# Reading


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", "1.0e-3", "0.001", ".001"])
def test_scientific_notation_is_a_number(file, text) -> None:
    file.write_text(f"learning_rate: {text}\n")
    assert read_yaml(file) == {"learning_rate": 0.001}
    assert load_config(TrainingConfig, file).learning_rate == 0.001


def test_an_empty_file_is_all_defaults(file) -> None:
    file.write_text("# nothing\n")
    assert load_config(TrainingConfig, file) == TrainingConfig()


def test_a_merge_key_works_as_in_any_yaml(file) -> None:
    file.write_text(
        "start_checkpoint: m\nsft:\n  data: &data\n    dataset_name: a.jsonl\n    split: train\n"
        "dpo:\n  data:\n    <<: *data\n    split: test\n"
    )
    config = load_config(PipelineConfig, file)
    assert config.dpo is not None
    assert (config.dpo.data.dataset_name, config.dpo.data.split) == ("a.jsonl", "test")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- seed\n", "must hold a mapping of fields, not list"),
        ("seed\n", "must hold a mapping of fields, not str"),
        ("seed: 1\nlog_every: 2\nseed: 3\n", "key 'seed' stands twice"),
        ("seed: [1\n", "not YAML"),
        ("seed:\n\t- 1\n", "not YAML"),
        ("? [1, 2]\n: 3\n", "not YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not YAML"),
        (b"seed: \xff\n", "not YAML"),
        ("learning_rat: 1\n", "unknown field 'learning_rat' in TrainingConfig; did you mean 'learning_rate'?"),
        ("7: 1\n", "unknown field '7'"),
        ("learning_rate: .inf\n", "learning_rate: "),
        ("max_steps: 10\nwarmup_steps: 11\n", "warmup_steps=11 exceeds max_steps=10"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(file, content, expected) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        load_config(TrainingConfig, file)
    message = str(refused.value)
    assert message.startswith(f"{file}: ")
    assert expected in message
    assert "\n" not in message


def test_a_key_given_twice_in_a_section_is_refused_with_its_line(file) -> None:
    file.write_text("pretrain:\n  data:\n    dataset_name: a\n    dataset_name: b\n")
    with pytest.raises(UserError, match=r"key 'dataset_name' stands twice.*line 4"):
        load_config(PipelineConfig, file)


def test_an_unknown_field_of_a_section_is_named_with_file_and_place(file) -> None:
    file.write_text("pretrain:\n  data: {dataset_name: a}\n  train: {batchsize: 3}\n")
    with pytest.raises(UserError) as refused:
        load_config(PipelineConfig, file)
    expected = "pretrain.train: unknown field 'batchsize' in TrainingConfig; did you mean 'batch_size'?"
    assert str(refused.value) == f"{file}: {expected}"


def test_every_problem_of_a_file_has_a_line_of_its_own(file) -> None:
    file.write_text("learning_rate: -1\nmax_steps: x\n")
    with pytest.raises(UserError) as refused:
        load_config(TrainingConfig, file)
    lines = str(refused.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{file}: ") for line in lines)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read") as refused:
            load_config(TrainingConfig, path)
        assert str(path) in str(refused.value)
