"""The strict base of every config, and the one error type that means "the user can fix this"."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from modern_llm.config.foreign_names import counterpart


class UserError(ValueError):
    """Something the user can put right: the message names the field or file, the value, and what to do.

    The command line prints it as one line and exits with code 2; any other exception is a bug and keeps its traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'batch_size'?"` for the nearest known name; where nothing is near, the list of all, or three options.

    Of dotted names the last parts must be alike: those before them are alike in every option of a section.
    """
    known = sorted(known)
    if near := _nearest(name, known, 1, cutoff=0.6):
        return f"; did you mean '{near[0]}'?"
    if not known[0].startswith("--"):
        return f"; known are: {', '.join(known)}"
    return f"; nearest are {', '.join(_nearest(name, known, 3, cutoff=0.0))}: see --help"


def _nearest(name: str, known: list[str], number: int, cutoff: float) -> list[str]:
    alike = difflib.get_close_matches(_last_part(name), {_last_part(other) for other in known}, number, cutoff)
    groups = [[other for other in known if _last_part(other) == last] for last in alike]
    return [difflib.get_close_matches(name, group, n=1, cutoff=0.0)[0] for group in groups]


def _last_part(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-")


class StrictModel(BaseModel):
    """Frozen, no unknown keys, no silent conversions of the wrong kind, field help from the attribute docstrings."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _name_the_nearest_field(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for key in values:
                if key not in known:
                    answer = counterpart(str(key), known, cls.__name__) or did_you_mean(str(key), known)
                    raise ValueError(f"unknown field '{key}' in {cls.__name__}{answer}")
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`seed: yes` is True in YAML, which pydantic would take as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"must not be true or false (got {value})")
        return value


def one_line(text: str, most: int = 2000) -> str:
    """A text of any origin as one line for a terminal: cut where it is endless, characters that would steer it written out."""
    line = " ".join(text[: 2 * most].split())
    line = line if len(line) <= most else line[:most] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def shown(value: Any, most: int = 200) -> str:
    """`repr` of a value, cut where it is long; a number that Python would not write is only called one."""
    try:
        return one_line(repr(value), most)
    except ValueError:  # an int of more than 4300 digits
        return "a number of thousands of digits"


def explain(error: ValidationError, source: str = "") -> str:
    """One line for each problem of a pydantic error: `source: field.sub: message (got value)`."""
    problems = [(_path(problem["loc"]), problem) for problem in error.errors()]
    real = [path for path, problem in problems if problem["type"] not in _WRONG_KIND]
    lines = []
    for path, problem in problems:
        if problem["type"] in _WRONG_KIND and any(other[: len(path)] == path[: len(other)] for other in real):
            continue  # a value may be of several kinds, and was meant as another one
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            message = "is required and was not given"
        elif problem["type"] != "value_error":
            message = f"{message} (got {shown(problem['input'])})"
        lines.append(one_line(": ".join(part for part in (source, ".".join(path), message) if part)))
    return "\n".join(lines)


_WRONG_KIND = {"string_type", "tuple_type", "dict_type", "float_type", "model_type"}


def _path(loc: tuple[int | str, ...]) -> list[str]:
    """A problem's path without the kinds that pydantic puts between the fields where a value may be of several."""
    kinds = {"str", "constrained-float", "SourceConfig", "[key]"}
    return [str(part) for part in loc if part not in kinds and not str(part).startswith(("dict[", "tuple[", "function-"))]
