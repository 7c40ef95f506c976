"""The code of an export, which is part of it: it can write itself beside another one."""

import re
from pathlib import Path


def whole(file: str) -> str:
    """The code in a file, with what it imports from beside it in place of the import: of each part of a pipeline
    diffusers fetches one file."""

    def code(found: re.Match[str]) -> str:
        return whole(str(Path(file).with_name(f"{found[1]}.py")))

    return re.sub(r"^from \.(\w+) import (?:\([^)]*\)|[^(\n]*)\n", code, Path(file).read_text(), flags=re.MULTILINE)
