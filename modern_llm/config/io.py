"""Configs in and out of YAML, and JSON of any origin: bounded in size and depth, with errors that name the file."""

import json
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from modern_llm.config.base import UserError, explain, one_line

Config = TypeVar("Config", bound=BaseModel)

MOST_CONFIG_BYTES = 2**20
MOST_JSON_BYTES = 2**24
MOST_DEPTH = 100
"""Levels of lists and mappings in each other; real files have fewer than ten."""
MOST_VALUES = 100_000
"""Values of a YAML file, those that an alias repeats counted each time."""
MOST_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-3` as a number (YAML 1.1 wants `1.0e-3`) and refuses a key given twice.

    What is only ever written to do harm is refused before anything is built of it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.count = 0
        self.open: list[tuple[str | None, int]] = []
        """Of each collection that is being read: its anchor, and how many values there were before it."""
        self.sizes: dict[str, int] = {}

    def get_event(self) -> yaml.Event:
        """The next piece of the file.

        Raises:
            yaml.YAMLError: nested too deeply, too much by aliases, a tag, or characters that no text has.
        """
        event: Any = super().get_event()
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in self.open):
                raise yaml.YAMLError(f"'*{event.anchor}' stands for what it is a part of{event.start_mark}")
            self.count += self.sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            self.count += 1
            if event.tag is not None:  # type: ignore[attr-defined]
                raise yaml.YAMLError(f"the tag {event.tag!r}: tags are not read{event.start_mark}")  # type: ignore[attr-defined]
            if isinstance(event, yaml.CollectionStartEvent):
                self.open.append((event.anchor, self.count - 1))
            elif re.search("[\0\ud800-\udfff]", event.value):  # type: ignore[attr-defined]
                raise yaml.YAMLError(f"a text holds a character that no text has{event.start_mark}")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.open.pop()
            self.sizes |= {} if anchor is None else {anchor: self.count - before}
        if len(self.open) > MOST_DEPTH:
            raise yaml.YAMLError(f"nested more than {MOST_DEPTH} levels deep{event.start_mark}")
        if self.count > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values, those that aliases repeat included{event.start_mark}")
        return event

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"a key must be a name, not a {type(key).__name__}{key_node.start_mark}")
            if key in seen:
                raise yaml.YAMLError(f"key '{key}' stands twice{key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number of a length that Python's own readers and writers of numbers take."""
        if len(node.value) > MOST_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value)} digits{node.start_mark}")
        whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes the strings which `_Loader` would read as numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, too large, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        text = _text(path, MOST_CONFIG_BYTES)
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give the path of a YAML config file") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that no calendar has is a ValueError
        raise UserError(f"{path}: not YAML: {one_line(str(error))}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping of fields, not {type(content).__name__}")
    return content


def load_config(kind: type[Config], path: Path | str) -> Config:
    """A validated config from a YAML file.

    Raises:
        UserError: one line for each problem, naming the file and the field.
    """
    try:
        return kind.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(explain(error, source=str(path))) from None


def parse_json(text: str, most_depth: int = MOST_DEPTH, unique: bool = False) -> Any:
    """The value of a JSON text. `NaN` and `Infinity` are numbers, as Python writes them.

    Args:
        text: of bounded size.
        most_depth: levels of lists and objects in each other.
        unique: refuse an object with one key twice, of which readers take one or the other.

    Raises:
        ValueError: not JSON, or nested too deeply; never a RecursionError.
    """
    too_deep = f"nested more than {most_depth} levels deep"
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(too_deep) from None
    if text.count("[") + text.count("{") > most_depth:  # else it cannot be
        level = [value]
        for _ in range(most_depth):
            level = [item for outer in level for item in _items(outer) if isinstance(item, (list, dict))]
        if level:
            raise ValueError(too_deep)
    return value


def _items(outer: Any) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)[:100]!r} stands twice")
    return content


def read_json(
    path: Path, what: str = "file", most_bytes: int = MOST_JSON_BYTES, most_depth: int = MOST_DEPTH, unique: bool = True
) -> dict[str, Any]:
    """The object in a JSON file that may have been written by anyone.

    Args:
        path: the file.
        what: what it is, for errors.
        most_bytes: a larger one is refused; no more is read.
        most_depth: levels of lists and objects in each other.
        unique: refuse an object with one key twice.

    Raises:
        UserError: cannot be read, too large, not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        content = parse_json(_text(path, most_bytes), most_depth, unique)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged {what}, not JSON: {one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged {what}, no object but {type(content).__name__}")
    return content


def _text(path: Path, most_bytes: int) -> str:
    """What a file holds.

    Raises:
        ValueError: too large, or not UTF-8.
    """
    with path.open("rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise ValueError(f"more than {most_bytes / 2**20:g} MiB")
    return raw.decode("utf-8")


def plain(config: BaseModel) -> dict[str, Any]:
    """The config as JSON types (paths as strings, tuples as lists)."""
    return config.model_dump(mode="json")


def dump_yaml(config: BaseModel) -> str:
    """The config as YAML that `load_config` reads back to an equal one; fields that were not set are left out."""
    content = config.model_dump(mode="json", exclude_unset=True)
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema(kind: type[BaseModel]) -> str:
    """JSON Schema of a config file, for editors: `modern-llm schema > pipeline.schema.json`."""
    return json.dumps(kind.model_json_schema(), indent=2)
