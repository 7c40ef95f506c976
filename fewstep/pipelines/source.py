"""The code of an export, which is part of it: it can write itself beside another one."""

import re
from pathlib import Path


def whole(file: str) -> str:
    """The code in a file, with what it imports from beside it (``.name``, ``..folder.name``) in place of the import,
    each file once: of each part of a pipeline diffusers fetches one file."""
    held: set[Path] = set()

    def code(file: Path) -> str:
        held.add(file)

        def beside(found: re.Match[str]) -> str:
            above = file.parents[len(found[1]) - 1]
            other = above.joinpath(*found[2].split(".")).with_suffix(".py")
            return "" if other in held else code(other)

        line = r"^from (\.+)([\w.]+) import (?:\([^)]*\)|[^(\n]*)\n"
        return re.sub(line, beside, file.read_text(), flags=re.MULTILINE)

    return code(Path(file))
