"""Paths as users write them: `~` and environment variables expanded, in every field that names a file or a folder."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from modern_llm.config.base import UserError


def expanded(value: Path | str, field: str = "") -> str:
    """Expand `~`, `~user`, `$NAME` and `${NAME}` at any place of a path; other names come back as they are.

    Raises:
        UserError: a variable is not set, or there is no such user; a path of that very name that exists is taken as it is.
    """
    text = str(value)
    if not ("$" in text or text.startswith("~")) or os.path.lexists(text):
        return text
    found = os.path.expanduser(os.path.expandvars(text))
    unset = re.search(r"\$(\w+|\{[^}]*\})", found)
    where = f"{field}={text!r}: " if field else ""
    if unset is not None:
        raise UserError(f"{where}the environment variable {unset[0]} is not set: set it, or write the path out")
    if found.startswith("~"):
        raise UserError(f"{where}no home folder is known for {found.split('/')[0]}: write the path out")
    return found


FolderPath = Annotated[Path, AfterValidator(lambda path: Path(expanded(path)))]
"""Path field of a config."""
Name = Annotated[str, AfterValidator(expanded)]
"""Field that names a file or folder, a hub id, or something built in."""
