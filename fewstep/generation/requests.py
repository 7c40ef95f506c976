"""What each sample is asked to be: the noise it starts from, its prompt, its class."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.common.errors import unknown
from fewstep.common.reading import parse_json, read_text
from fewstep.latents.prompts import Prompts

# Prompts in one call of the text encoders, and the bytes of conditions that are kept for later batches.
_AT_ONCE, _KEPT_BYTES = 32, 1 << 30


@dataclass(frozen=True)
class Request:
    """Sample ``index`` of ``seed``, of a prompt and a class where there are any."""

    seed: int
    index: int
    prompt: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class Requests:
    """``count`` samples from number ``first`` on: number i is sample i of the seed.

    Args:
        prompts, labels: those of numbers 0, 1, 2, ..., which go around.
        noise: (seed, index) of the sample whose noise each number starts from, where that is not its own; None where
            it is.
    """

    count: int
    seed: int = 0
    first: int = 0
    prompts: Sequence[str] = ()
    labels: Sequence[int] = ()
    noise: Sequence[tuple[int, int] | None] = ()

    def __getitem__(self, i: int) -> Request:
        number = self.first + i
        own = self.noise[number] if self.noise else None
        seed, index = own or (self.seed, number)
        prompt = self.prompts[number % len(self.prompts)] if self.prompts else None
        return Request(seed, index, prompt, self.labels[number % len(self.labels)] if self.labels else None)

    def digest(self) -> str:
        """A hash of every sample that is asked for."""
        digest = hashlib.sha256()
        for i in range(self.count):
            digest.update(repr(self[i]).encode())
        return digest.hexdigest()[:16]


class Lines(NamedTuple):
    """A file of prompts: a line each, None where a line says nothing of it."""

    prompts: list[str]
    labels: list[int | str]
    noise: list[tuple[int, int] | None]


def read_lines(file: str | Path) -> Lines:
    """The prompts of a file: a line each, or of a ``.jsonl`` the keys ``text`` or ``prompt``, ``label`` (a number or a
    class's name), ``seed`` and ``index`` (sample ``index`` of that seed, 0 if not said) of each line, all of them
    optional; empty lines count for nothing. ``samples.jsonl`` beside images of fewstep's is such a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: nothing in it, a line that cannot be read, or a prompt or label on some lines and not on others.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of prompts {file}")
    # Not by splitlines: a text may have a U+2028 or a form feed in it, and JSON keeps them as they are.
    lines = [line.strip() for line in read_text(file).split("\n")]
    if not any(lines):
        raise ValueError(f"{file} is empty: a prompt a line is needed, or a .jsonl with a text on each line")
    if file.suffix != ".jsonl":
        return Lines([line for line in lines if line], [], [])
    read = [_read(line, f"{file}, line {i + 1}") for i, line in enumerate(lines) if line]
    prompts, labels = ([row[key] for row in read if row[key] is not None] for key in ("prompt", "label"))
    for name, found in (("prompt", prompts), ("label", labels)):
        if 0 < len(found) < len(read):
            raise ValueError(f"{file} has a {name} on {len(found)} of {len(read)} lines: all of them or none")
    noise = [row["noise"] for row in read]
    return Lines(prompts, labels, noise if any(noise) else [])


def _read(line: str, where: str) -> dict[str, Any]:
    """What a line of a ``.jsonl`` says."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise ValueError(f'{where} is no object such as {{"text": "a cat"}}: {line[:60]}')
    prompt = row.get("prompt") if row.get("text") is None else row["text"]
    label, seed, index = row.get("label"), row.get("seed"), row.get("index")
    kinds = {"text": (prompt, str), "label": (label, int | str), "seed": (seed, int), "index": (index, int)}
    for key, (value, kind) in kinds.items():
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{where}: {key} is {value!r}")
    if all(value is None for value, _ in kinds.values()):
        raise ValueError(f"{where} has none of the keys text, prompt, label and seed: {line[:60]}")
    if index is not None and (seed is None or index < 0):
        raise ValueError(f"{where}: index {index} is that of a sample of a seed, from 0 on: the seed is needed too")
    return {"prompt": prompt, "label": label, "noise": None if seed is None else (seed, index or 0)}


def is_number(word: str) -> bool:
    """Whether a word stands for a whole number in plain digits, which ``str.isdigit`` does not say of a superscript."""
    return re.fullmatch(r"-?[0-9]+", word) is not None


def prompt_flags(prompts: Sequence[str]) -> list[str]:
    """The words of a command that give it these prompts. One that begins with a dash would be read as a flag after
    ``--prompt``, and not in ``--prompt=-hat``, which takes one alone."""
    if any(prompt.startswith("-") for prompt in prompts):
        return [f"--prompt={prompt}" for prompt in prompts]
    return ["--prompt", *prompts] if prompts else []


def class_words(flag: str, text: str | None) -> list[str]:
    """The classes of a flag, by number or name with commas between; none where it is not given.

    Raises:
        ValueError: nothing between two commas, or beside one.
    """
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(words):
        raise ValueError(f"{flag} {text}: classes with commas between are needed, such as 3,cat")
    return words


def class_numbers(words: Sequence[int | str], names: Mapping[str, int]) -> list[int]:
    """Classes by number or name as numbers.

    Raises:
        ValueError: a name that is not known.
    """
    numbers = []
    for word in words:
        if isinstance(word, int) or is_number(word):
            # A class may be called 7 too.
            numbers.append(names.get(str(word), int(word)))
        elif word in names:
            numbers.append(names[word])
        elif names:
            near = get_close_matches(word.lower(), names, n=10, cutoff=0.3)
            raise unknown("class", word, names if len(names) <= 50 or not near else near)
        else:
            raise ValueError(f"class {word!r}: the names of this model's classes are not known, only their numbers are")
    return numbers


def class_names(model: Any) -> dict[str, int]:
    """The numbers of a model's classes by name; a class may have several names, with commas between."""
    numbered = ((name.strip(), number) for number, names in enumerate(model.class_names) for name in names.split(","))
    return {name: number for name, number in numbered if name}


class Encoded:
    """The conditions of prompts on a device: each is encoded once, when it is first needed, and let go after its last
    use, so that memory does not grow with their number.

    Args:
        text: the encoders. uses: how often each prompt will be asked for.
        size: height and width of the image in pixels, for models that are told; their own by default.
    """

    def __init__(
        self, text: Prompts, uses: Mapping[str, int], device: torch.device, size: tuple[int, int] | None = None
    ) -> None:
        self.text, self.left, self.device, self.size = text, Counter(uses), device, size
        self.kept: dict[str, dict[str, Tensor]] = {}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The conditions of these, one row each."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept]
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            cond = self.text.encode(part, size=self.size, device=self.device)
            for i, prompt in enumerate(part):
                self.kept[prompt] = {name: value[i].clone() for name, value in cond.items()}
        rows = [self.kept[prompt] for prompt in prompts]
        told = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self.left.subtract(prompts)
        self.kept = {prompt: row for prompt, row in self.kept.items() if self.left[prompt] > 0}
        limit = _KEPT_BYTES // sum(value.nbytes for value in rows[0].values())
        for prompt in list(self.kept)[: max(0, len(self.kept) - limit)]:
            del self.kept[prompt]  # encoded again, should it come back
        return told
