"""Writing checkpoints beside the training: what is to be saved is copied, and a thread writes the copy."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm import checkpoint as folders
from modern_llm import distributed
from modern_llm.config import TrainingConfig
from modern_llm.exit_codes import StorageError
from modern_llm.initial.handoff import end_token_ids
from modern_llm.metrics import RunLog
from modern_llm.models.adapter_folders import AdapterBase, adapter_weights, save_adapter
from modern_llm.models.adapters import adapter_layers


class Saver:
    """Saves a run's checkpoints, on the main rank; other ranks pass. At most one is being written at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        record: dict[str, Any],
        config: TrainingConfig,
        log: RunLog,
        adapter_base: AdapterBase | None = None,
        last_saved: Path | None = None,
    ) -> None:
        """
        Args:
            model: what is trained.
            tokenizer: travels with every checkpoint.
            record: what every manifest says.
            config: resolved.
            log: told of what could not be saved.
            adapter_base: what the model's adapters are added to. None: it has none.
            last_saved: the checkpoint that the run goes on from.
        """
        assert config.output_dir is not None
        self.model, self.tokenizer = model, tokenizer
        self.record, self.config, self.log, self.adapter_base = record, config, log, adapter_base
        self.folder = config.output_dir / "checkpoints"
        self.last_saved = last_saved
        self.pending: Future[None] | None = None
        self.must = False
        """Whether what is being written has to be."""
        assert model.generation_config is not None
        model.generation_config.eos_token_id = sorted(end_token_ids(tokenizer))
        model.generation_config.pad_token_id = tokenizer.eos_token_id
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.thread.shutdown(wait=True)
        if kind is None:
            self.finish()

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Copy weights and state, and have them written as `checkpoints/step-000500`.

        Raises:
            StorageError: the checkpoint before could not be written, and `on_save_error` is `stop`.
        """

        def begin() -> None:
            self.finish()
            target = self.folder / f"step-{step:06d}"
            weights, kept = self._weights(), folders.copied(state)
            self.pending, self.must = self.thread.submit(self._write, target, weights, step, kept), False

        distributed.on_main(begin)()

    def check(self) -> None:
        """Raise what went wrong in the thread, if it is done; called after every step.

        Raises:
            StorageError: it could not be written.
        """
        if self.pending is not None and self.pending.done():
            self.finish()

    def finish(self, must: bool = False) -> None:
        """Wait for what is being written.

        Args:
            must: whether a failure is an error whatever `on_save_error` says.

        Raises:
            StorageError: it could not be written.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except StorageError as error:
            if must or self.must or self.config.on_save_error == "stop":
                raise
            self.log.message(f"WARNING: {error}; {self.what_is_there()}; going on without it (on_save_error: warn)")

    def what_is_there(self) -> str:
        """The newest checkpoint that is whole, in words."""
        return "no checkpoint is there yet" if self.last_saved is None else f"{self.last_saved.name} is whole"

    def best(self, step: int) -> None:
        """Copy the weights of the best evaluation so far, and have them written as `checkpoints/best-000500`.

        They have to be, whatever `on_save_error` says: without them the run's result would be another one.

        Raises:
            StorageError: what was written before could not be, and had to.
        """

        def begin() -> None:
            self.finish()
            self.pending, self.must = (
                self.thread.submit(self._write, folders.best_folder(self.folder, step), self._weights(), step),
                True,
            )

        distributed.on_main(begin)()

    def final(self, target: Path, step: int) -> None:
        """Write the finished checkpoint and wait for it, on every rank.

        Args:
            target: its folder.
            step: whose weights it has.

        Raises:
            StorageError: it could not be written.
        """

        def write() -> None:
            self.finish()
            self._write(target, self._weights(), step)
            self._forget_best(None)

        distributed.on_main(write)()

    def _write(self, target: Path, weights: dict[str, Tensor], step: int | None, state: dict[str, Any] | None = None) -> None:
        manifest = {**self.record, "step": step, "run": self.config.run_name}
        with folders.atomic_folder(target) as scratch:
            if self.adapter_base is not None:
                more = save_adapter(self.model, weights, scratch, target, self.adapter_base)
            else:
                more = {"weights": folders.weights_hash(weights)}
                self.model.save_pretrained(scratch, state_dict=weights)  # it empties the dict
            self.tokenizer.save_pretrained(scratch)
            if state is not None:
                folders.save_state(scratch, state)
            folders.write_manifest(scratch, {**manifest, **more})
        if state is not None:
            self.last_saved = target
            self._forget_old(step or 0)
            self._forget_best(state["best"]["step"])

    def _weights(self) -> dict[str, Tensor]:
        """Copies on the host; tied weights stay one tensor."""
        memo: dict[tuple[Any, ...], Tensor] = {}
        copies = {}
        for name, tensor in (adapter_weights(self.model) if adapter_layers(self.model) else self.model.state_dict()).items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if place not in memo:
                memo[place] = folders.copied(tensor)
            copies[name] = memo[place]
        return copies

    def _forget_best(self, but: int | None) -> None:
        """Remove the kept weights of all evaluations but this one, to which the newest checkpoint goes back."""
        for folder in self.folder.glob("best-*"):
            if but is None or folder != folders.best_folder(self.folder, but):
                with folders.storing(folder):
                    folders.remove_folder(folder)

    def _forget_old(self, step: int) -> None:
        """Remove this run's periodic checkpoints but the newest `keep_checkpoints` up to this step, which is whole."""
        if self.config.keep_checkpoints is None:
            return
        mine = []
        for folder in folders.periodic_checkpoints(self.folder.parent):
            try:
                manifest = folders.read_manifest(folder) or {}
            except folders.DamagedError:
                continue
            if manifest.get("run") == self.config.run_name and manifest.get("step", step + 1) <= step:
                mine.append(folder)
        for folder in mine[self.config.keep_checkpoints :]:
            with folders.storing(folder):
                folders.remove_folder(folder)
