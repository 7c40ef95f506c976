"""Runs the blocks of a page in order, in a folder of the page's own, as a reader types them one after another."""

import contextlib
import glob
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from page_blocks import ROOT, Block, program
from page_inputs import lay
from page_short import shortened_command, shortened_python, shortened_yaml

from fewstep.cli import main
from fewstep.runs.recipes import load_recipe

# Why a command line is not run, by its program, and by the command of fewstep's.
ELSEWHERE = {"pip": "installs", "uv": "installs", "make": "installs", "hf": "hub"}
ELSEWHERE |= dict.fromkeys(("git", "pre-commit", "pytest", "ruff", "pyright", "lint-imports"), "checkout")
OURS = {"ui": "served", "push": "hub"}
SLOW = {"torchrun", "accelerate"}
# What stands for the reader's own in a line that shows how a command is called, the first that fits.
PLACEHOLDERS = {
    "export RUN FOLDER": "export runs/one exported",
    "edit MODEL PICTURE --label CLASS": "edit fewstep:fashion-mnist-fast ./photos --method sdedit --label 7",
    "convert MODEL --out FOLDER": "convert ./my-ddpm --out converted",
    "--count N --out FOLDER": "--count 8 --out drawn",
    "RUN RUN": "runs/one runs/two",
    "RUN": "runs/one",
    "RECIPE": "checkerboard-itvm",
    "--teacher MODEL": "--teacher ./stable-diffusion",
    "MODEL": "runs/one",
    "DATA": "./captioned-images",
    "FOLDER": "folder",
    "N": "8",
}
_READ = re.compile(r"""(?<!out=)["']((?:\./|runs/)[^"']*)["']""")  # what a block of Python may read: "./my-ddpm"
# What makes a piece of a recipe a whole one.
_REST = {"teacher": "./my-ddpm", "data": "./photos", "objective": "ITVM", "training": "{steps: 2}"}
_SHELL = {"|", "||", "&&", ";", "<", ">", ">>", "<<", "&"}


class BlockError(Exception):
    """A block does not run; says which, and why."""


@dataclass
class Page:
    """The folder of a page, and the names that its blocks of Python have given so far."""

    here: Path
    inputs: Path
    measured: bool = False  # whether its runs are compared later on
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})


def units(block: Block) -> list[tuple[int, str, str]]:
    """What a block has to run: (line, text, why it is not run here: empty, slow, or the key of a reason)."""
    marked = block.skip or ("slow" if block.slow else "")
    if block.kind != "shell":
        return [(block.line, block.text, marked)]
    lines = _logical_lines(block)
    if any(_is_shells_own(text) for _, text in lines):
        return [(block.line, block.text, marked)]
    return [(line, text, marked or _reason(text)) for line, text in lines]


def counted(found: list[Block]) -> Counter[str]:
    """How many units are run, run by `-m slow` alone, or skipped, by reason."""
    return Counter(why or "run" for block in found for _, _, why in units(block))


def run_block(page: Page, block: Block, *, slow: bool) -> Counter[str]:
    """Run a block; returns what ``counted`` said of it. Raises BlockError with the place in the page."""
    done: Counter[str] = Counter()
    for line, text, why in units(block):
        done[why or "run"] += 1
        if why and not (why == "slow" and slow):
            continue
        place = f"{block.page.relative_to(ROOT)}:{line}"
        match block.kind:
            case "file":
                (page.here / block.file).parent.mkdir(parents=True, exist_ok=True)
                (page.here / block.file).write_text(shortened_yaml(text))
            case "python":
                _run_python(page, block, place)
            case "recipe":
                _run_recipe(page, text, place)
            case _:
                _run_line(page, block, text, place)
    return done


def _logical_lines(block: Block) -> list[tuple[int, str]]:
    """The commands of a block, lines that end in a backslash joined, with the number of the first; no comments."""
    found: list[tuple[int, str]] = []
    goes_on = False
    for number, line in enumerate(block.text.splitlines(), block.line):
        if goes_on:
            found[-1] = (found[-1][0], found[-1][1] + " " + line.strip().removesuffix("\\"))
        elif line.strip() and not line.lstrip().startswith("#"):
            found.append((number, line.strip().removesuffix("\\")))
        goes_on = line.endswith("\\")
    return found


def _is_shells_own(text: str) -> bool:
    """Whether a line is more than a program and its words, so that a shell must read it."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a quotation that goes on in the next line
        return True
    words = _redirected(words)[0]
    return bool(_SHELL & set(words)) or program(text) in {"cd", "export", "for", "if", "set", "source"}


def _reason(text: str) -> str:
    words = shlex.split(text, comments=True)
    name = program(text)
    if any(word.startswith("hf:") for word in words):
        return "hub"
    if name == "fewstep":
        return OURS.get(_fewstep(words)[0], "") if len(_fewstep(words)) else ""
    if name == "python" and any(word.startswith(("benchmarks/", "fuzz")) for word in words):
        return "hours"
    if name == "python" and "pytest" in words:
        return "checkout"
    return ELSEWHERE.get(name) or ("slow" if name in SLOW else "")


def _fewstep(words: list[str]) -> list[str]:
    """The words behind ``fewstep`` or ``-m fewstep``."""
    return words[words.index("fewstep") + 1 :]


def _run_python(page: Page, block: Block, place: str) -> None:
    said = io.StringIO()
    code = "\n" * (block.line - 1) + block.text
    try:
        tree = shortened_python(code, str(block.page))
        lay(" ".join(_READ.findall(block.text)), "", page.inputs, page.here)
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            exec(compile(tree, str(block.page), "exec"), page.names)
    except Exception as error:
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(block.page)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else block.line
        where = f"{block.page.relative_to(ROOT)}:{line}"
        source = block.page.read_text().splitlines()[(line or 1) - 1].strip()
        raise BlockError(f"{where}: `{source}` does not run: {type(error).__name__}: {error}") from error


def _run_recipe(page: Page, text: str, place: str) -> None:
    """Check a recipe: a whole one as `--dry-run` does, with its models and data; a piece of one, by its keys."""
    lay(text, "", page.inputs, page.here)
    keys = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    file = page.here / f"recipe-of-line-{place.rpartition(':')[2]}.yaml"
    file.write_text(shortened_yaml(text) + "\n")
    if "objective" in keys:
        _run_words(
            ["distill" if "teacher" in keys else "train", file.name, "--dry-run"], "the recipe", place, fails=False
        )
        return
    with file.open("a") as piece:
        piece.writelines(f"{key}: {value}\n" for key, value in _REST.items() if key not in keys)
    try:
        load_recipe(file)
    except (ValueError, OSError) as error:
        raise BlockError(f"{place}: no recipe: {error}") from error


def _run_line(page: Page, block: Block, text: str, place: str) -> None:
    if "\n" in text or _is_shells_own(text):
        lay(text, "", page.inputs, page.here)
        _run_process(["bash", "-e", "-c", text], page, text, place, block.fails)
        return
    for placeholder, stands_for in PLACEHOLDERS.items():
        text = re.sub(rf"(?<![\w:-]){placeholder}(?![\w=])", stands_for, text)
    words, target = _redirected(shlex.split(text, comments=True))
    if program(text) != "fewstep" and "fewstep" not in words:
        lay(text, "", page.inputs, page.here)
        _run_process(words, page, text, place, block.fails)
        return
    ours = _fewstep(words)
    lay(" ".join(ours), _written(ours), page.inputs, page.here)
    short = shortened_command(_expanded(ours), measured=page.measured)
    if block.fails:  # in a process that has not seen, or trusted, anything before
        _run_process([sys.executable, "-m", "fewstep", *short], page, text, place, True)
    elif words[0] == "fewstep":
        said = _run_words(short, text, place, block.fails)
        if target:
            (page.here / target).write_text(said)
    else:
        before = [re.sub(r"^\d+$", "2", word) for word in words[: words.index("fewstep") + 1]]
        _run_process([*before, *short], page, text, place, block.fails)


def _written(words: list[str]) -> str:
    """What a command of fewstep's makes: its --out, or where an export goes."""
    out = [after for word, after in pairwise(words) if word == "--out"]
    if words[0] == "export" and len(words) > 2 and not words[2].startswith("-"):
        out.append(words[2])
    return " ".join(out)


def _expanded(words: list[str]) -> list[str]:
    """The words with the names of files in the place of patterns, as a shell gives them."""
    return [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else []) or [word]]


def _redirected(words: list[str]) -> tuple[list[str], str]:
    """The words in front of ``> FILE``, and the file."""
    return (words[:-2], words[-1]) if ">" in words[-2:-1] else (words, "")


def _run_words(words: list[str], text: str, place: str, fails: bool) -> str:
    """Run a command of fewstep's in this process; returns what it prints."""
    said, noted = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(noted):
        warnings.simplefilter("ignore")
        try:
            code: Any = main(words)
        except SystemExit as stop:  # --help and --version
            code = stop.code or 0
    _judge(code, said.getvalue() + noted.getvalue(), text, place, fails)
    return said.getvalue()


def _run_process(words: list[str], page: Page, text: str, place: str, fails: bool) -> None:
    known = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    settings = list(takewhile(re.compile(r"[A-Z_]+=\S*$").match, words))
    try:
        done = subprocess.run(
            words[len(settings) :],
            cwd=page.here,
            env={**os.environ, **known, **dict(word.split("=", 1) for word in settings)},
            capture_output=True,
            text=True,
            timeout=600,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BlockError(f"{place}: `{text}` does not run: {error}") from error
    _judge(done.returncode, done.stdout + done.stderr, text, place, fails)


def _judge(code: int, said: str, text: str, place: str, fails: bool) -> None:
    if bool(code) != fails:
        ended = "ended well, and the page shows its error" if fails else f"ended with {code}"
        end = "\n".join(said.strip().splitlines()[-12:])
        raise BlockError(f"{place}: `{text}` {ended}:\n{end}")
