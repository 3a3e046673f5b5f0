"""What a stage reads. One config class for each kind of data set."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from modern_llm.config.base import StrictModel


class DatasetConfig(StrictModel):
    """What every kind of data set shares: where rows come from and which of them are held out."""

    dataset_name: str
    """A Hugging Face hub id, a local `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file (the text kinds also `.gz`), a
    folder saved by `datasets`, or `builtin:village`."""
    split: str = "train"
    """Which split to train on; slices such as `train[:5%]` work. A local file has the one split `train`."""
    dataset_config_name: str | None = None
    """Name of the hub data set's configuration (its subset), where it has several."""
    max_rows: PositiveInt | None = None
    """Use only the first so many rows of the split."""
    eval_split: str | None = None
    """A split held out for evaluation. None: `eval_fraction` decides."""
    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the rows held out for evaluation, chosen by a hash of the prompt (of the text, for documents), so that
    the same prompt is never on both sides. 0: none."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.eval_split is not None and self.eval_fraction:
            raise ValueError("eval_split and eval_fraction both hold rows out: give one of them")
        return self


class MoreDocuments(StrictModel):
    """One more source of documents."""

    dataset_name: str
    """As in the main data set."""
    split: str = "train"
    """Which split to train on."""
    dataset_config_name: str | None = None
    """Name of the hub data set's configuration, where it has several."""
    text_field: str = "text"
    """Column that holds a document."""
    document_separator: str | None = None
    """`.txt` files: the line between two documents."""
    max_rows: PositiveInt | None = None
    """Use only the first so many rows."""


class LanguageModelingDatasetConfig(DatasetConfig):
    """Plain documents for pretraining, cut into blocks of `max_length` tokens in which documents never see each other."""

    text_field: str = "text"
    """Column that holds a document. A `.txt` file has one document for each run of lines up to `document_separator`."""
    document_separator: str | None = None
    """`.txt` files: the line between two documents, e.g. `<|endoftext|>`. None: a file is one document."""
    max_length: PositiveInt | None = None
    """Tokens of a block. None: the model's `max_seq_len`."""
    also: tuple[MoreDocuments, ...] = ()
    """Further sources; the documents of all are shuffled together, each once per epoch. `eval_split` is of the main one."""


class InstructionDatasetConfig(DatasetConfig):
    """Chats or instruction/answer rows for supervised fine-tuning. Only the assistant's words and its end token count.

    Recognised columns: `messages`; `prompt` with `completion` or `response`; `instruction` (with an optional `input`) with
    `output` or `response`; `question` with `answer`.
    """

    prompt_field: str | None = None
    """Column of the user's words. None: found by the column names above."""
    response_field: str | None = None
    """Column of the assistant's words. None: found by the column names above."""
    max_length: PositiveInt = 1024
    """Tokens of a sample, prompt and answer together; the answer's end is cut (and counted), never its beginning."""


class PreferenceDatasetConfig(DatasetConfig):
    """Pairs of answers to one prompt, one of them preferred.

    Where no prompt column exists and both sides are strings in the `Human:`/`Assistant:` form of HH-RLHF, the prompt is
    everything up to the last `Assistant:`; a pair whose two sides have different prompts is dropped and counted.
    """

    prompt_field: str | None = None
    """Column of the prompt: a string or a list of messages. None: `prompt`, `question` or `instruction` (with an optional
    `input`), else the part that both sides share."""
    chosen_field: str = "chosen"
    """Column of the preferred answer: a string or a list of messages."""
    rejected_field: str = "rejected"
    """Column of the other answer."""
