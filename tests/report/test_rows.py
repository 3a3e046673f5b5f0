"""`modern-llm inspect`: every token of a row is shown, in the colour of what becomes of it, and the counts are true."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import write_jsonl
from rich.console import Console

from modern_llm.config import PipelineConfig, UserError
from modern_llm.report.rows import LEGEND, inspect


def pipeline(tmp_path: Path, start: Path, sft: dict[str, Any], dpo: dict[str, Any]) -> PipelineConfig:
    chats = [
        {"prompt": "Who bakes?", "completion": "Anna bakes all the bread of the village."},
        {"prompt": "Who?", "completion": "A."},
    ]
    pairs = [{"prompt": "Who bakes the bread of the village?", "chosen": "Anna.", "rejected": "Nobody at all, ever."}]
    return PipelineConfig.model_validate(
        {
            "output_dir": tmp_path / "run",
            "start_checkpoint": str(start),
            "sft": {"data": {"dataset_name": str(write_jsonl(tmp_path / "chats.jsonl", chats)), **sft}},
            "dpo": {
                "data": {"dataset_name": str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), **dpo.pop("data", {})},
                "dpo": dpo,
            },
        }
    )


def shown(config: PipelineConfig, stage: str) -> dict[str, str]:
    """What is printed in each colour, all rows after each other."""
    console = Console(file=io.StringIO(), force_terminal=True, width=10_000, legacy_windows=False)
    texts: list[Any] = []
    console.print = lambda *items, **_: texts.extend(items)  # type: ignore[method-assign]
    inspect(config, stage, 5, as_json=False, console=console)  # type: ignore[arg-type]
    rows = [text for text in texts if type(text).__name__ == "Text" and not text.plain.startswith(" trained ")]
    return {
        kind: "".join(row.plain[span.start : span.end] for row in rows for span in row.spans if span.style == style)
        for kind, style in LEGEND.items()
    }


def test_what_counts_what_is_context_and_what_is_cut_have_their_colours(tmp_path, start) -> None:
    whole = shown(pipeline(tmp_path, start, {}, {}), "sft")
    assert whole["trained"] == "Anna bakes all the bread of the village.<|im_end|>A.<|im_end|>"
    assert whole["cut"] == ""
    cut = shown(pipeline(tmp_path, start, {"max_length": 40}, {}), "sft")
    assert cut["trained"] + cut["cut"] != whole["trained"]  # the second row stands between them
    assert cut["cut"].endswith("village.<|im_end|>")
    assert cut["trained"].endswith("A.<|im_end|>")
    assert sorted(cut["trained"] + cut["cut"]) == sorted(whole["trained"])
    assert cut["context"] == whole["context"]


def test_a_dropped_row_is_shown_as_cut_with_its_reason(tmp_path, start, capsys) -> None:
    config = pipeline(tmp_path, start, {"max_length": 40, "truncation": "drop"}, {})
    inspect(config, "sft", 1, as_json=False)
    assert "dropped, over max length" in capsys.readouterr().out.replace("\n", "")
    assert "Who bakes?" in shown(config, "sft")["cut"]


def test_both_sides_of_a_pair_are_shown_with_the_prompts_lost_beginning(tmp_path, start) -> None:
    whole = shown(pipeline(tmp_path, start, {}, {}), "dpo")
    assert whole["trained"] == "Anna.<|im_end|>Nobody at all, ever.<|im_end|>"
    cut = shown(pipeline(tmp_path, start, {}, {"max_prompt_length": 10}), "dpo")
    assert cut["trained"] == whole["trained"]
    assert cut["cut"].startswith("<|im_start|>user\nWho bakes")
    assert cut["cut"].count("<|im_start|>user") == 2


def test_the_counts_are_one_json_object(tmp_path, start, capsys) -> None:
    inspect(pipeline(tmp_path, start, {}, {}), None, 0, as_json=True)
    counts = json.loads(capsys.readouterr().out)
    assert {stage: report["examples"] for stage, report in counts.items()} == {"sft": 2, "dpo": 1}
    assert counts["dpo"]["shorter_answer_chosen"] == 1


def test_rows_are_shown_as_their_source_is_read(tmp_path, start) -> None:
    sft = write_jsonl(tmp_path / "own.jsonl", [{"ask": "Who?", "say": "Anna."}])
    dpo = write_jsonl(tmp_path / "own_pairs.jsonl", [{"ask": "Who?", "good": "Ben.", "bad": "x"}])
    columns = ({"prompt": "ask", "completion": "say"}, {"prompt": "ask", "chosen": "good", "rejected": "bad"})
    names = [{"dataset_name": {str(path): {"columns": own}}} for path, own in zip((sft, dpo), columns, strict=True)]
    config = pipeline(tmp_path, start, names[0], {"data": names[1]})
    assert shown(config, "sft")["trained"] == "Anna.<|im_end|>"
    assert shown(config, "dpo")["trained"] == "Ben.<|im_end|>x<|im_end|>"


def test_the_place_of_a_row_is_in_the_table_of_counts(tmp_path, start, capsys) -> None:
    path = write_jsonl(tmp_path / "[b].jsonl", [{"prompt": "<|im_end|>", "completion": "a"}])
    inspect(pipeline(tmp_path, start, {"dataset_name": str(path)}, {}), "sft", 0, as_json=False)
    printed = "".join(capsys.readouterr().out.replace("│", "").split())
    assert "foundcontroltokensintext1" in printed
    assert "[b].jsonl,line1" in printed


def test_a_stage_that_the_file_has_not_is_named(tmp_path, start) -> None:
    with pytest.raises(UserError, match="stage='pretrain': the file has sft, dpo"):
        inspect(pipeline(tmp_path, start, {}, {}), "pretrain", 1, as_json=False)


def test_files_that_are_left_out_are_in_the_table_by_name(tmp_path, start, capsys) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("train.jsonl", "my_poems.jsonl"):
        write_jsonl(tmp_path / "rows" / name, [{"prompt": "Who bakes?", "completion": "Anna."}])
    config = pipeline(tmp_path, start, {"dataset_name": str(tmp_path / "rows")}, {})
    inspect(config, "sft", 0, as_json=False, console=Console(width=200))
    assert "left_out[my_poems.jsonl]" in capsys.readouterr().out
