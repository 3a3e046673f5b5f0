"""Names that other trainers (transformers, TRL, peft) give to settings, and ours."""

import difflib
from collections.abc import Collection

_NAMES: dict[str, dict[str, str]] = {
    "TrainingConfig": {
        "save_every": "save_steps", "eval_every": "eval_steps", "log_every": "logging_steps", "seed": "data_seed",
        "micro_batch_size (batch_size is that of a whole step)": "per_device_train_batch_size", "adapter.kind": "use_dora",
        "micro_batch_size (evaluation uses it too)": "per_device_eval_batch_size", "batch_size": "train_batch_size",
        "gradient_checkpointing (true or false)": "gradient_checkpointing_kwargs", "optimizer": "optim", "learning_rate": "lr",
        "mixed_precision (auto, bf16 or fp32)": "bf16 fp16 tf32 torch_dtype", "lr_schedule": "lr_scheduler_type lr_scheduler",
        "warmup_steps (a number; left out: a tenth of all)": "warmup_ratio", "compile": "torch_compile",
        "adam_betas (both, in a list)": "adam_beta1 adam_beta2", "max_grad_norm": "grad_clip", "num_epochs": "num_train_epochs",
        "output_dir": "save_directory output_path", "report_to": "use_wandb", "keep_checkpoints": "save_total_limit",
        "keep_best (loss, accuracy, …)": "load_best_model_at_end metric_for_best_model", "eval_at_start": "eval_on_start",
        "early_stopping": "early_stopping_patience",
        "balance_loss": "router_aux_loss_coef", "attention": "attn_implementation", "adapter": "peft_config lora_config",
        "adapter.rank": "lora_r lora_rank r", "adapter.alpha": "lora_alpha", "adapter.dropout": "lora_dropout",
        "adapter.target_modules": "lora_target_modules", "adapter.quantize (quantize: nf4)": "load_in_4bit quantization_config",
    },
    "DatasetConfig": {
        "max_length": "max_seq_length max_seq_len", "text_field": "dataset_text_field", "packing": "sample_packing",
        "dataset_name": "data_path train_file", "eval_dataset": "validation_file", "eval_fraction": "test_size",
        "train_on (only answers count; which of them)": "assistant_only_loss completion_only_loss", "max_rows": "max_samples",
        "chat_template": "chat_template_path", "truncation": "truncation_mode",
    },
    "": {
        "nothing is uploaded: use `modern-llm export`, then `hf upload`": "repo_id hub_model_id push_to_hub hub_token",
        "give pretrain_checkpoint (sft), sft_checkpoint (dpo), start_checkpoint (run)": "model_name_or_path base_model",
        "the same command resumes: leave it out": "resume_from_checkpoint overwrite_output_dir resume",
        "it happens by itself: leave it out": "padding_free remove_unused_columns dataset_num_proc precompute_ref_log_probs",
        "set save_every, eval_every (steps, or '1 epoch')": "save_strategy eval_strategy evaluation_strategy logging_strategy",
        "torchrun starts processes; parallel says how they share work": "deepspeed fsdp fsdp_config device_map",
        "set adapter.quantize: nf4 (4 bits)": "load_in_8bit", "code of others is never run: leave it out": "trust_remote_code",
    },
}  # fmt: skip
"""By the config that has it: our name, with a few words where the meaning differs, and theirs; under "", what to do instead."""


def counterpart(name: str, known: Collection[str], kind: str = "") -> str | None:
    """`": it is save_every here"` for another trainer's name of a setting; None where it is no such name.

    Args:
        name: a key, or an option with a dash for each underscore.
        known: the keys, or options, that are there.
        kind: class of the config that has the keys.
    """
    key = name.rpartition(".")[2].lstrip("-").replace("-", "_")
    for section, names in _NAMES.items():
        if answer := next((ours for ours, theirs in names.items() if key in theirs.split()), None):
            ours, space, remark = answer.partition(" ")
            if kind == "AdapterConfig":
                ours = ours.removeprefix("adapter.")
            options = [option for option in known if f".{option[2:]}".endswith(f".{ours.replace('_', '-')}")]
            if options:
                ours = " or ".join(difflib.get_close_matches(name, options, n=1 if "." in name else 3, cutoff=0.0))
            place = "here" if options or ours in known or kind == section else f"of {section}"
            return f": it is {ours} {place}{space}{remark}" if section else f": {answer}"
    return None
