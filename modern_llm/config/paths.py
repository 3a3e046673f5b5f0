"""Paths as users write them: `~` and environment variables expanded, in every field that names a file or a folder."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from modern_llm.config.base import UserError

CACHE_VARIABLE = "MODERN_LLM_CACHE"


def cache_folder() -> Path:
    """Return the folder of what is kept between runs: `$MODERN_LLM_CACHE`, else `modern_llm` in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modern_llm"


def expanded(value: Path | str, field: str = "") -> str:
    """Expand a leading `~` or `~user`, and `$NAME` and `${NAME}` at any place; other names come back as they are.

    Args:
        value: path, hub id, or the name of something built in.
        field: name of the argument, for errors.

    Raises:
        UserError: a variable is not set and no file has that very name, or there is no such user.
    """
    text = str(value)
    where = f"{field}={text!r}: " if field else ""
    if "$" in text and not os.path.lexists(text):
        text = os.path.expandvars(text)
        if unset := re.search(r"\$(\w+|\{[^}]*\})", text):
            raise UserError(f"{where}the environment variable {unset[0]} is not set: set it, or write the path out")
    if text.startswith("~"):
        text = os.path.expanduser(text)
        if text.startswith("~"):
            raise UserError(f"{where}no home folder of {text.split('/')[0]} is known: write the path out")
    return text


FolderPath = Annotated[Path, AfterValidator(lambda path: Path(expanded(path)))]
"""Field that names a folder."""
Name = Annotated[str, BeforeValidator(lambda name: expanded(name) if isinstance(name, Path | str) else name)]
"""Field that names a file or folder, a hub id, or something built in."""
