"""Configs in and out of YAML, with errors that name the file."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from modern_llm.config.base import UserError, explain

Config = TypeVar("Config", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-3` as a number (YAML 1.1 wants `1.0e-3`) and refuses a key given twice."""

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
        UserError: no such file, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give the path of a YAML config file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
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


def plain(config: BaseModel) -> dict[str, Any]:
    """The config as JSON types (paths as strings, tuples as lists)."""
    return config.model_dump(mode="json")


def dump_yaml(config: BaseModel) -> str:
    """The config as YAML that `load_config` reads back to an equal one; fields left at their default are left out."""
    content = config.model_dump(mode="json", exclude_defaults=True)
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def json_schema(kind: type[BaseModel]) -> str:
    """JSON Schema of a config file, for editors: `modern-llm schema > pipeline.schema.json`."""
    return json.dumps(kind.model_json_schema(), indent=2)
