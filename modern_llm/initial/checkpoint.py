"""One value for what a run begins from, read and checked once; every stage, `plan`, `inspect` and `export` begin with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.checkpoint import DamagedError, read_manifest, sha256_of_file, verify, weights_hash
from modern_llm.config import UserError
from modern_llm.config.paths import expanded
from modern_llm.data.known_templates import with_chat_template
from modern_llm.data.tokenizer import read_tokenizer, tokenizer_fingerprint
from modern_llm.foreign import INDEX, find_settings
from modern_llm.hub import commit_of, hub
from modern_llm.initial.architecture import read_architecture
from modern_llm.initial.generation import read_generation
from modern_llm.initial.weights import files_of_weights, load_weights
from modern_llm.models.adapter_folders import (
    GENERATION,
    SETTINGS,
    WEIGHTS,
    adapter_hash,
    adapter_section,
    base_of,
    check_base,
    is_adapter,
    merge,
)
from modern_llm.models.adapter_sum import AdaptersBelow

ENDINGS = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files of a model folder that decide what is loaded."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
"""A folder with one of these has a tokenizer of its own."""


class NamedTokenizer(NamedTuple):
    """The tokenizer of a checkpoint."""

    tokenizer: PreTrainedTokenizerFast
    """With a chat template."""
    name: str
    """To record."""
    known: int
    """Tokens that it had before those of a chat template were added."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, name: str, template: str | None) -> Self:
        """Give it the chat template that is asked for, or one where there is none."""
        known = len(tokenizer)
        return cls(with_chat_template(tokenizer, template), name, known)


@dataclass(frozen=True)
class InitialCheckpoint:
    """A model, or adapters on one, in a folder or on the hub. Cheap to make: weights are read by `load` alone."""

    name: str
    """Folder or hub id, `~` and variables expanded."""
    field: str
    """Name of the argument, for errors."""
    folder: Path
    """Local folder; of a hub id the snapshot in the cache, which holds settings and no weights."""
    manifest: dict[str, Any] | None
    """`modern_llm.json` of one of our folders."""
    base: "InitialCheckpoint | None"
    """The model, or the adapters, that these adapters are added to. None: a model."""
    config: PreTrainedConfig
    """Architecture of the model at the end of the chain."""
    generation: GenerationConfig | None
    """Valid; None: the folder has none."""
    notes: tuple[str, ...] = ()
    """What was left out or put right, a sentence each, for the log."""

    @property
    def where(self) -> str:
        """`pretrain_checkpoint='runs/x'`, for errors."""
        return f"{self.field}={self.name!r}"

    @property
    def root(self) -> "InitialCheckpoint":
        """The model at the end of a chain of adapters; itself for a model."""
        return self if self.base is None else self.base.root

    @property
    def chain(self) -> "list[InitialCheckpoint]":
        """Adapters on adapters, this one first; [] for a model."""
        return [] if self.base is None else [self, *self.base.chain]

    def verify(self) -> None:
        """Compare every file of one of our folders with its manifest.

        Raises:
            DamagedError: a file differs, is missing, or was not saved there.
        """
        try:
            verify(self.name)
        except DamagedError as error:
            raise DamagedError(f"{self.where} is damaged: {error}: use another checkpoint") from None

    def load(self, below: AdaptersBelow | None = None) -> PreTrainedModel:
        """Load the model in fp32, in eval mode, adapters merged.

        Args:
            below: told of the adapters that are merged.

        Raises:
            UserError: a weight is missing, left over or of another shape, or adapters do not fit the model under them.
        """
        if self.base is None:
            folder = self._fetched(files_of_weights(self.folder))
            model = load_weights(self.name, folder, self.where, self.config, self.generation)
            if below is not None:
                below.root_weights = weights_hash(model)
        else:
            base = self.base.load(below)
            if adapter_section(self.folder):
                check_base(self.folder, self.base.hash_of(base), self.base.name, self.field)
            model = merge(base, self.adapter_folder(), self.field, below)
        if self.generation is not None:
            model.generation_config = self.generation
        return model

    def adapter_folder(self) -> Path:
        """Folder with the adapters' weights, which are fetched from the hub here."""
        return self._fetched([SETTINGS, WEIGHTS, GENERATION])

    def _fetched(self, files: list[str]) -> Path:
        """The folder, with these files; from the hub those of the commit whose settings were read."""
        if Path(self.name).is_dir():
            return self.folder
        with hub(self.name, self.where):
            return Path(snapshot_download(self.name, revision=self.folder.name, allow_patterns=files))

    def hash_of(self, model: PreTrainedModel) -> str:
        """Hash of the weights as loaded, by which a run knows what it began from.

        That of our adapters is made of theirs and of the model's under them: merged weights differ in their last bits from
        machine to machine.

        Args:
            model: of `load`, unchanged.
        """
        section = adapter_section(self.folder) if self.base is not None else None
        return adapter_hash(self.folder, section["base_weights"], section["quantize"]) if section else weights_hash(model)

    @property
    def has_tokenizer(self) -> bool:
        """True if the folder, or the model under its adapters, has a tokenizer."""
        return self._tokenizer_owner() is not None

    def _tokenizer_owner(self) -> "InitialCheckpoint | None":
        for owner in (*self.chain, self.root):
            if any((owner.folder / name).is_file() for name in TOKENIZER_FILES):
                return owner
        return None

    def tokenizer(self, asked: str | None = None, template: str | None = None) -> "NamedTokenizer":
        """Load the tokenizer: the folder's own, or that of the model under its adapters.

        Args:
            asked: folder or hub id that the user named. Where the checkpoint has a tokenizer too, both must be identical.
            template: chat template that the user asked for, see `with_chat_template`.

        Raises:
            UserError: the named tokenizer is another one, or there is none at all, or no such template.
        """
        if asked is not None:
            asked = expanded(asked, "tokenizer_name")
        owner = self._tokenizer_owner()
        if owner is None:
            if asked is None:
                raise UserError(
                    f"{self.where}: only a model is there, and no tokenizer: name one by tokenizer_name, or save its tokenizer "
                    f"in the same folder"
                )
            return NamedTokenizer.of(read_tokenizer(asked), asked, template)
        own = read_tokenizer(owner.name, self.field)
        recorded = (owner.manifest or {}).get("tokenizer_name") or owner.name
        known = tokenizer_fingerprint(own)
        found = NamedTokenizer.of(own, recorded, template)
        if asked is None or asked in (recorded, owner.name):
            return found
        other = read_tokenizer(asked)
        if tokenizer_fingerprint(other) != known:
            raise UserError(
                f"tokenizer_name={asked!r} ({len(other)} tokens) is not the tokenizer of {self.where} "
                f"({len(own)} tokens, {recorded!r}): leave tokenizer_name out"
            )
        return found


def read_initial(checkpoint: Path | str, field: str = "checkpoint") -> InitialCheckpoint:
    """Read what a folder or hub id is, and refuse what cannot be trained; no weight is loaded, no code of it is run.

    Args:
        checkpoint: one of our folders, any Hugging Face model or adapter folder, or a hub id.
        field: name of the argument, for errors.

    Raises:
        UserError: not there, not reachable, no causal language model, quantized in a way that is not unpacked, pickles, code of
            its own, or adapters of a model that is not there.
    """
    name, folder = expanded(checkpoint, field), find_settings(checkpoint, field)
    manifest = read_manifest(folder)
    if is_adapter(folder):
        if any((folder / file).is_file() for file in ("model.safetensors", INDEX)):
            raise UserError(f"{field}={name!r}: holds a model and adapters: move one of them into a folder of its own")
        base = read_initial(base_of(folder, field), field)
        generation, notes = read_generation(folder)
        return InitialCheckpoint(
            name, field, folder, manifest, base, base.config, generation or base.generation, (*base.notes, *notes)
        )
    config, about_config = read_architecture(folder, f"{field}={name!r}")
    generation, notes = read_generation(folder)
    return InitialCheckpoint(name, field, folder, manifest, None, config, generation, (*about_config, *notes))


def load_model(checkpoint: Path | str, field: str = "checkpoint") -> PreTrainedModel:
    """Load a model in fp32, adapters merged: `read_initial` and `load` in one call."""
    return read_initial(checkpoint, field).load()


def identity(checkpoint: Path | str, field: str = "checkpoint") -> dict[str, Any]:
    """What a checkpoint is, wherever it lies: ours by its manifest, another folder by its files, the hub's by its commit.

    Raises:
        UserError: there is none of that name.
    """
    name = expanded(checkpoint, field)
    folder = Path(name)
    if not folder.is_dir():
        try:
            return {"hub": name, "commit": commit_of(name, f"{field}={name!r}")}
        except HFValidationError:
            raise UserError(f"{field}={name!r}: no such folder") from None
    manifest = read_manifest(folder)
    if manifest is not None:
        return {"weights": manifest.get("weights"), "template": (manifest.get("contract") or {}).get("template")}
    files = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS and path.is_file())
    found: dict[str, Any] = {"files": {path.name: sha256_of_file(path) for path in files}}
    return {**found, "base": identity(base_of(folder, field), field)} if is_adapter(folder) else found
