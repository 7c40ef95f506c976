"""Pages of Markdown in blocks, and the comments above them that say where their figures are from: see figures.py."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# What is no figure: code, formulas, where links lead, pictures, numbers of papers, commits.
_ASIDE = re.compile(
    r"`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)|https?://\S+|<!--.*?-->|\b\d{4}\.\d{5}\b|\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7,40}\b",
    re.DOTALL,
)
_FENCE = re.compile(r"`{3,}|~{3,}")
_START, _END = "<!-- figures:", "-->"


@dataclass
class Block:
    """Lines of a page that belong together, and what the comment above them says."""

    line: int
    lines: list[str]
    kind: str  # "text", "table", "code" or "heading"
    mark: str | None = None

    @property
    def text(self) -> str:
        return _ASIDE.sub(" ", "\n".join(self.lines))


@dataclass
class Mark:
    """A comment, read: the files, the figures that follow from theirs, the numbers that were not measured."""

    files: list[str] = field(default_factory=list)
    follows: dict[str, str] = field(default_factory=dict)
    unmeasured: str | None = None


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page in turn."""
    mark: str | None = None
    block: Block | None = None
    fence = comment = ""
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        bare = line.strip()
        if comment or (not fence and bare.startswith(_START)):
            if block:
                yield block
            block, comment = None, f"{comment} {bare}".strip()
            if bare.endswith(_END):
                said, comment = comment[len(_START) : -len(_END)].strip(), ""
                mark = f"{mark}; {said}" if mark else said
            continue
        if not fence and not block and bare.startswith("<!--") and bare.endswith(_END):
            continue  # a comment of another kind
        opening = _FENCE.match(bare)
        if fence or opening:
            if not fence and opening:
                if block:
                    yield block
                fence, block = opening[0], Block(number, [], "code", mark)
                mark = None
            elif bare == fence:
                if block:
                    yield block
                fence, block = "", None
            elif block:
                block.lines.append(line)
            continue
        kind = _kind(line, block)
        if block and kind != block.kind:
            yield block
            block = None
        if kind == "none":
            continue
        if block is None:
            block, mark = Block(number, [], kind, mark), None
        block.lines.append(line)


def _kind(line: str, block: Block | None) -> str:
    if not line.strip():
        return "none"
    if line.startswith("#"):
        return "heading"
    if line.lstrip().startswith("|"):
        return "table"
    return "code" if line.startswith("    ") and (block is None or block.kind == "code") else "text"


def parse(mark: str) -> Mark:
    """Reads a comment.

    Raises:
        ValueError: a part of it is none of the three that there are.
    """
    found = Mark()
    for part in (part.strip() for part in mark.split(";")):
        if part.startswith("not measured:"):
            found.unmeasured = part.removeprefix("not measured:").strip()
        elif "=" in part:
            name, _, sum_ = part.partition("=")
            found.follows[name.strip()] = sum_.strip()
        elif part and all(name.strip().endswith(".json") for name in part.split(",")):
            found.files += [name.strip() for name in part.split(",")]
        else:
            raise ValueError(
                f"{part!r} is no results file (NAME.json), no sum (1.4 = 3.62 / 2.62), no 'not measured: why'"
            )
    if found.unmeasured == "" or not (found.files or found.unmeasured):
        raise ValueError("it names no results file and says not why: 'not measured: ' and the reason")
    return found
