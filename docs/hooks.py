"""What `mkdocs build` makes of the pages, which are plain Markdown in the repository; and what in them is made from the code.

    python docs/hooks.py        # writes that anew: after a change to a config class, the village or a docstring of the API page

A link to a file of `configs/` on a line of its own becomes the file, and the list of modules on the API page their docstrings.
"""

import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from modern_llm.config import PipelineConfig
from modern_llm.config.commands import (
    BenchArguments,
    CompareArguments,
    DPOArguments,
    ExportArguments,
    InspectArguments,
    PlanArguments,
    PretrainArguments,
    ReplayArguments,
    SFTArguments,
    TokenizerArguments,
)
from modern_llm.config.resolve import MOST_WARMUP_STEPS, STAGE_DEFAULTS
from modern_llm.data import village

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    PipelineConfig, PretrainArguments, SFTArguments, DPOArguments, TokenizerArguments, InspectArguments, CompareArguments,
    PlanArguments, BenchArguments, ExportArguments, ReplayArguments,
)  # fmt: skip
"""What a YAML file can hold; every other config class is reached from these."""

_FENCE_WORDS = re.compile(r"^(```\w+) (?:no-run|fails|output|instruction|preference|documents|[A-Z]\w+)$", re.MULTILINE)
_CONFIG_FILE = re.compile(r"^\[`(\S+)`\]\(\.\./configs/\S+\)$", re.MULTILINE)
_API_ENTRY = re.compile(r"^- \[`(modern_llm\S+)`\](\(\.\./modern_llm/\S+\)).*$", re.MULTILINE)
_CONFIG_LINK = re.compile(r"\[(`\S+`)\]\(\.\./configs/\S+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page before it is rendered."""
    markdown = with_tables(markdown)
    markdown = _CONFIG_FILE.sub(lambda match: f"```yaml\n{(ROOT / 'configs' / match[1]).read_text()}```", markdown)
    markdown = _CONFIG_LINK.sub(r"\1", markdown)  # for readers of the repository; the site has the files on a page
    markdown = _API_ENTRY.sub(lambda match: _autodoc(match[1]), markdown)
    return _FENCE_WORDS.sub(r"\1", markdown)  # the second word of a fence is for tests/test_docs.py


def with_tables(markdown: str) -> str:
    """The page with all that is made from the code as it is now: its tables, and the first lines of docstrings."""
    for name, content in {
        "stage defaults": stage_defaults,
        "config classes": lambda: "\n".join(map(class_table, config_classes())),
        "village rows": village_rows_table,
        "village demonstrators": village_demonstrators,
        "village pairs": village_pairs,
    }.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin in markdown:
            before, _, rest = markdown.partition(begin)
            markdown = f"{before}{begin}\n\n{content().strip()}\n\n{end}{rest.partition(end)[2]}"
    return _API_ENTRY.sub(lambda match: f"- [`{match[1]}`]{match[2]}: {_first_line(match[1])}", markdown)


def _first_line(name: str) -> str:
    return (inspect.getdoc(pkgutil.resolve_name(name)) or "").split("\n", 1)[0]


def _autodoc(name: str) -> str:
    """The entry of a module, function or class for mkdocstrings. What a config's fields mean is on a page of its own."""
    if name.endswith("Config"):
        return f"\n::: {name}\n    options: {{members: false}}\n"
    return f'\n::: {name}\n    options: {{filters: ["!^_", "!Config$"]}}\n' if name.endswith("_datasets") else f"\n::: {name}\n"


def config_classes() -> list[type[BaseModel]]:
    """Every config class, outer ones first."""
    found: dict[type[BaseModel], None] = dict.fromkeys(FILES)
    waiting: list[type[BaseModel]] = list(FILES)
    while waiting:
        for field in waiting.pop(0).model_fields.values():
            for inner in _classes_in(field.annotation):
                if inner not in found:
                    found[inner] = None
                    waiting.append(inner)
    return list(found)


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)


def class_table(kind: type[BaseModel]) -> str:
    """A heading, the class's docstring and a table of its fields."""
    lines = [
        f"## {kind.__name__}",
        "",
        inspect.getdoc(kind) or "",
        "",
        "| field | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in kind.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{field.alias or name}` | {type_text(field)} | {default_text(field)} | {meaning} |")
    return "\n".join([*lines, ""])


def type_text(field: FieldInfo) -> str:
    """A field's type and bounds, for people."""
    text = _annotation_text(field.annotation)
    bounds = " and ".join(_bounds(field.metadata))
    return f"{text} {bounds}" if bounds else text


def _annotation_text(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([_annotation_text(parts[0]), *_bounds(parts[1:])])
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_annotation_text(part) for part in parts)
    if origin is tuple:
        inner = [_annotation_text(part) for part in parts if part is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in parts else f"list of {len(inner)} × {inner[0]}"
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return annotation.__name__.lower()


def _bounds(metadata: Any) -> list[str]:
    texts = []
    for bound in metadata:
        for kind, sign, name in ((Gt, ">", "gt"), (Ge, "≥", "ge"), (Lt, "<", "lt"), (Le, "≤", "le")):
            if isinstance(bound, kind):
                texts.append(f"{sign} {getattr(bound, name):g}")
    return texts


def default_text(field: FieldInfo) -> str:
    """A field's default; of a section, only that it has one."""
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "its own defaults"
    if isinstance(field.default, tuple):
        return f"`{list(field.default)}`"
    return f"`{field.default}`"


def stage_defaults() -> str:
    """What `resolve` puts in place of None, by stage."""
    names = [*STAGE_DEFAULTS["pretrain"]]
    lines = ["| field | " + " | ".join(STAGE_DEFAULTS) + " |", "|---" * (len(STAGE_DEFAULTS) + 1) + "|"]
    for name in names:
        lines.append(f"| `{name}` | " + " | ".join(f"`{stage[name]}`" for stage in STAGE_DEFAULTS.values()) + " |")
    most = " | ".join(f"a tenth of the steps, at most {MOST_WARMUP_STEPS[stage]}" for stage in STAGE_DEFAULTS)
    return "\n".join([*lines, f"| `warmup_steps` | {most} |", ""])


def village_rows_table() -> str:
    """How many rows each stage has in the built-in world."""
    kinds: dict[str, village.Kind] = {
        "pretraining: documents": "text",
        "SFT: questions and answers": "instructions",
        "DPO: pairs of answers": "preferences",
    }
    lines = ["| stage | `train` | `test` |", "|---|---|---|"]
    for title, kind in kinds.items():
        train, test = (len(village.village_rows(kind, split)) for split in ("train", "test"))
        lines.append(f"| {title} | {train:,} | {test:,} |")
    return "\n".join([*lines, ""])


def village_demonstrators() -> str:
    """How the demonstrators of the built-in world answer."""
    polite, blunt = village.COURTEOUS_SHARE_POLITE, village.COURTEOUS_SHARE_BLUNT
    return (
        "| question | courteous answers | curt answers | mistaken, either way |\n|---|---|---|---|\n"
        f"| polite (“Could you please tell me …”) | {polite:.0%} | {1 - polite:.0%} | {village.MISTAKEN_SHARE:.0%} |\n"
        f"| blunt (“What is …”) | {blunt:.0%} | {1 - blunt:.0%} | {village.MISTAKEN_SHARE:.0%} |\n"
    )


def village_pairs() -> str:
    """What the pairs of the built-in world prefer."""
    truth, form = village.TRUTH_PAIR_SHARE, village.FORM_PAIR_SHARE
    return (
        "| kind | share | chosen | rejected |\n|---|---|---|---|\n"
        f"| `truth` | {truth:.0%} | true | wrong, in the same form |\n"
        f"| `form` | {form:.0%} | true and courteous | true and curt |\n"
        f"| `both` | {1 - truth - form:.0%} | true and courteous | wrong and curt |\n"
    )


if __name__ == "__main__":
    for page in (ROOT / "docs").glob("*.md"):
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
