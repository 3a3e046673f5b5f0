"""What a stage reads. One config class for each kind of data set."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from modern_llm.config.base import StrictModel
from modern_llm.config.memory import DatasetName

InstructionAdapterName = Literal[
    "messages", "sharegpt", "alpaca", "dolly", "question_answer", "prompt_completion", "oasst", "oasst_tree"
]
"""Layouts of demonstrations, see `modern_llm.data.instruction_adapters`."""

PreferenceAdapterName = Literal["prompt_pair", "hh", "shp", "stack_exchange", "sharegpt_pair", "tldr", "rated"]
"""Layouts of preferences, see `modern_llm.data.preference_adapters`."""

Role = Literal["system", "user", "assistant", "tool"]
"""Who says a message."""
Delimiter = Annotated[str, Field(pattern=r'^[^"\r\n]$')]

Verdict = Literal["drop", "keep", "fail"]
"""What becomes of a row that a check finds: left out and counted; used and counted; or the run stops and names it."""


class SourceConfig(StrictModel):
    """One source of a mixture. What is None is as in the data set config."""

    weight: PositiveFloat = 1.0
    """How many times an epoch goes through the source: 2 is twice, 0.5 is half of it, another half each epoch."""
    split: str | None = None
    """Which split to train on."""
    dataset_config_name: str | None = None
    """Name of the hub data set's configuration."""
    text_field: str | None = None
    """Documents only: column that holds one."""
    document_separator: str | None = None
    """Documents only: in `.txt` files, the line between two."""
    delimiter: Delimiter | None = None
    """Character between the cells of `.csv` and `.tsv` files."""
    max_rows: PositiveInt | None = None
    """Use only the first so many rows."""
    adapter: Literal[InstructionAdapterName, PreferenceAdapterName] | None = None
    """Chats and pairs only: layout of the rows."""
    columns: dict[str, str] | None = None
    """Chats and pairs only: names of columns in the data, by standard name."""
    roles: dict[str, Role] | None = None
    """Chats and pairs only: who speaks, by the name of the role in the data."""


READING = ("text_field", "document_separator", "adapter", "columns", "roles")
"""Settings of a source that say how its rows are read; the others say which of them."""


class DatasetConfig(StrictModel):
    """What every kind of data set shares: where rows come from and which of them are held out."""

    dataset_name: DatasetName | tuple[DatasetName, ...] | dict[DatasetName, PositiveFloat | SourceConfig]
    """A Hugging Face hub id; a local `.jsonl`, `.json`, `.csv`, `.tsv`, `.txt` (each also `.gz` or `.zst`) or `.parquet` file,
    a folder or a glob of them (`data/*.jsonl`); a folder saved by `datasets`; or `builtin:village`. Several: `[name, name]`;
    `{name: weight}`, where an epoch goes `weight` times through each; or `{name: {weight: 0.5, split: …}}`. In Python also a
    `Dataset` or `DatasetDict` of `datasets`, or a list of rows as dicts."""
    split: str = "train"
    """Which split to train on; slices such as `train[:5%]` work everywhere. A local file has the one split `train` (a `.json`
    file those that are keys of its one object); the files of a folder or glob have those that their names say, as on the hub
    (`train`, `validation`, `test`, or `train_sft` of `train_sft-00000-of-00003.parquet`)."""
    dataset_config_name: str | None = None
    """Name of the hub data set's configuration (its subset), where it has several."""
    delimiter: Delimiter | None = None
    """Character between the cells of `.csv` and `.tsv` files. None: `,`, `;` or tab, whichever the first line has."""
    max_rows: PositiveInt | None = None
    """Use only the first so many rows of the split."""
    eval_split: str | None = None
    """A split held out for evaluation. None: `eval_dataset` or `eval_fraction` decides."""
    eval_dataset: DatasetName | dict[DatasetName, SourceConfig] | None = None
    """Another data set, all of which is held out for evaluation: named as in `dataset_name`, or `{name: {split: test}}`. Rows
    to train on that have a prompt of it are left out and counted."""
    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the rows held out for evaluation, chosen by a hash of the prompt (of the text, for documents), so that
    the same prompt is never on both sides. 0: none."""
    eval_fold: NonNegativeInt = 0
    """Which share of that size is held out, counted from 0: with `eval_fraction: 0.2` the folds 0 to 4 hold out every row once
    (cross-validation)."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that cannot be read (not JSON, a missing column, a wrong type): stop and name it, or leave it out and count it."""

    @property
    def folds(self) -> int:
        """How many parts of `eval_fraction` there are to hold out."""
        return int(min(1 / self.eval_fraction + 1e-9, 2.0**64)) if self.eval_fraction else 1  # a hash has 64 bits

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        given = [field for field in ("eval_split", "eval_dataset", "eval_fraction") if getattr(self, field) not in (None, 0)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} all hold rows out: give one of them")
        if self.eval_fold >= self.folds:
            raise ValueError(
                f"eval_fold={self.eval_fold}: eval_fraction={self.eval_fraction:g} makes {self.folds} fold(s), counted from 0"
            )
        if not self.dataset_name:
            raise ValueError(f"dataset_name={self.dataset_name!r} names no data set")
        if isinstance(self.dataset_name, tuple) and len(set(self.dataset_name)) < len(self.dataset_name):
            raise ValueError("dataset_name names a data set twice: give it a weight, {name: 2}")
        if isinstance(self.eval_dataset, dict) and [source.weight for source in self.eval_dataset.values()] != [1]:
            raise ValueError("eval_dataset is one data set, and a weight has no effect there: {name: {split: …}}")
        for name, source in [*self.sources().items(), *(self.eval_sources() or {}).items()]:
            for field in SourceConfig.model_fields:
                if getattr(source, field) is not None and not hasattr(self, field) and field != "weight":
                    kind = "chats and pairs" if field in ("adapter", "columns", "roles") else "documents"
                    raise ValueError(f"dataset_name={name!r}: {field} is for {kind}: leave it out here")
        return self

    def sources(self) -> dict[str, SourceConfig]:
        """Every source by name, with nothing left to inherit."""
        named = self.dataset_name
        if not isinstance(named, dict):
            named = dict.fromkeys(named if isinstance(named, tuple) else (named,), 1.0)
        found = {}
        for name, value in named.items():
            source = value if isinstance(value, SourceConfig) else SourceConfig(weight=value)
            found[name] = self._inherit(source, *SourceConfig.model_fields)
        return found

    def eval_sources(self) -> dict[str, SourceConfig] | None:
        """Sources of `eval_split` or `eval_dataset` by name, all of whose rows are held out; None where neither is given."""
        if self.eval_split is not None:
            return {name: source.model_copy(update={"split": self.eval_split}) for name, source in self.sources().items()}
        if self.eval_dataset is None:
            return None
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {self.eval_dataset: SourceConfig()}
        return {name: self._inherit(source, *READING) for name, source in named.items()}

    def _inherit(self, source: SourceConfig, *fields: str) -> SourceConfig:
        left = {name: getattr(self, name) for name in fields if getattr(source, name) is None and hasattr(self, name)}
        return source.model_copy(update=left)


class LanguageModelingDatasetConfig(DatasetConfig):
    """Plain documents for pretraining, cut into blocks of `max_length` tokens in which documents never see each other."""

    text_field: str = "text"
    """Column that holds a document. A `.txt` file has one document for each run of lines up to `document_separator`."""
    document_separator: str | None = None
    """`.txt` files: the line between two documents, e.g. `<|endoftext|>`. None: a file is one document."""
    max_length: PositiveInt | None = None
    """Tokens of a block. None: the model's `max_seq_len`."""
    streaming: bool = False
    """Read and tokenize while training, for text larger than memory and disk: nothing is stored, and the order is shuffled
    within a window only. Needs `max_steps`."""
    shuffle_window: PositiveInt | None = None
    """Documents shuffled among each other, with `streaming`. None: 10,000."""

    @model_validator(mode="after")
    def _window_needs_streaming(self) -> Self:
        if self.shuffle_window is not None and not self.streaming:
            raise ValueError("shuffle_window is for streaming: stored documents are shuffled as a whole")
        return self

    @property
    def window(self) -> int:
        """Documents of a window of a stream."""
        return self.shuffle_window or 10_000


class ChatDatasetConfig(DatasetConfig):
    """Rows that become chats: how they are called, and how chats are written."""

    chat_template: str | None = None
    """In place of the tokenizer's own: `chatml`, `llama3`, `gemma`, `plain`, a file, or a Jinja template. It travels in the
    checkpoint. None: the tokenizer's; where it has none, one that fits it."""
    train_on_reasoning: bool = True
    """The thoughts of answers (`reasoning_content`, or `<think>…</think>` in the content) count like their words."""
    columns: dict[str, str] | None = None
    """Names of columns in the data, by the standard name that the layouts know: `columns: {messages: dialog}`. Each source of a
    mixture may have its own; every row must have the columns named here."""
    roles: dict[str, Role] | None = None
    """Who speaks (`system`, `user`, `assistant`, `tool`), by the name of the role in the data: `roles: {bot: assistant}`."""

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        layouts = get_args(get_args(type(self).model_fields["adapter"].annotation)[0])
        for name, source in [*self.sources().items(), *(self.eval_sources() or {}).items()]:
            if source.adapter not in (None, *layouts):
                known = ", ".join(layouts)
                raise ValueError(f"dataset_name={name!r}: adapter={source.adapter!r} is no layout of this stage ({known})")
        return self

    def for_source(self, source: SourceConfig) -> Self:
        """The config by which the rows of one source are read."""
        return self.model_copy(update={field: getattr(source, field) for field in ("adapter", "columns", "roles")})


class InstructionDatasetConfig(ChatDatasetConfig):
    """Chats or instruction/answer rows for supervised fine-tuning. Only the assistant's words and its end token count."""

    adapter: InstructionAdapterName | None = None
    """Layout of the rows. None: found by the columns of each."""
    prompt_field: str | None = None
    """Column of the user's words, together with `response_field`, for columns of other names."""
    response_field: str | None = None
    """Column of the assistant's words."""
    train_on: Literal["all", "last"] = "all"
    """Which answers of a chat count: all, or only the last. Answers that a row marks as not counting never do."""
    max_length: PositiveInt = 1024
    """Tokens of a sample, prompt and answer together."""
    truncation: Literal["drop", "cut_end", "cut_prompt_start"] = "cut_end"
    """A sample over `max_length` is dropped; loses its end (and with it the end token: no false one is put there); or loses its
    beginning, as long as its last answer stays whole, and else is dropped. Always counted."""
    packing: bool = False
    """Put several chats, best fit first, into each example of at most `max_length` tokens; they never see each other.
    `batch_size` then counts these packs."""

    @model_validator(mode="after")
    def _one_way_to_read(self) -> Self:
        if (self.prompt_field is None) != (self.response_field is None):
            raise ValueError("prompt_field and response_field name columns together: give both or none")
        for source in self.sources().values():
            if source.adapter is not None and self.prompt_field is not None:
                raise ValueError(
                    f"adapter={source.adapter!r} reads columns of its own: leave prompt_field and response_field out"
                )
        return self


class LintConfig(StrictModel):
    """What becomes of doubtful pairs. All are counted, whatever is chosen."""

    identical_answers: Verdict = "drop"
    """Both sides are the same text: nothing to prefer."""
    empty_answer: Verdict = "drop"
    """A side without words."""
    prompts_differ: Verdict = "drop"
    """The two sides carry different prompts; `keep` uses the chosen side's for both."""
    duplicate: Verdict = "keep"
    """The same prompt and sides as an earlier row of the source; `drop` keeps the first."""
    contradiction: Verdict = "keep"
    """An earlier row of the source prefers the other way round; `drop` leaves the later one out."""
    scores_disagree: Verdict = "keep"
    """The row's scores call the rejected side the better one."""
    over_limit: Verdict = "keep"
    """Longer than the limits of `DPOConfig`; `keep` leaves it to `truncation`."""


class PreferenceDatasetConfig(ChatDatasetConfig):
    """Pairs of answers to one prompt, one of them preferred.

    Where no prompt column exists and both sides are strings in the `Human:`/`Assistant:` form of HH-RLHF, the prompt is
    everything up to the last `Assistant:`.
    """

    adapter: PreferenceAdapterName | None = None
    """Layout of the rows. None: found by the columns of each."""
    prompt_field: str | None = None
    """Column of the prompt: a string or a list of messages. None: `prompt`, `question` or `instruction` (with an optional
    `input`), else the part that both sides share."""
    chosen_field: str = "chosen"
    """Column of the preferred answer: a string or a list of messages."""
    rejected_field: str = "rejected"
    """Column of the other answer."""
    min_score_ratio: NonNegativeFloat = 0.0
    """Leave out pairs whose better score is less than this many times the other one. Rows need a score for each side:
    `score_chosen` and `score_rejected` (also `chosen_score`, and with `rating`, `avg_rating` or `reward`), or those of Stanford
    SHP and of rated answers."""
    truncation: Literal["drop", "cut_end", "cut_prompt_start"] = "cut_prompt_start"
    """A pair over `max_length` is dropped; its answers lose their ends (and with them the end tokens); or its prompt loses its
    beginning, down to half of `max_length`, and only then answers their ends. Always counted."""
    lint: LintConfig = LintConfig()
    """Checks before training."""
