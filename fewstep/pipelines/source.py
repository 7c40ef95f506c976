"""The code of an export, which is part of it: it can write itself beside another one."""

import re
from pathlib import Path


def whole(file: str) -> str:
    """The code in a file, with what it imports from beside it (``.name``, ``..folder.name``) in place of the import: of
    each part of a pipeline diffusers fetches one file."""

    def code(found: re.Match[str]) -> str:
        above = Path(file).parents[len(found[1]) - 1]
        return whole(str(above.joinpath(*found[2].split(".")).with_suffix(".py")))

    line = r"^from (\.+)([\w.]+) import (?:\([^)]*\)|[^(\n]*)\n"
    return re.sub(line, code, Path(file).read_text(), flags=re.MULTILINE)
