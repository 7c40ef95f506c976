"""What the pages say runs: each block of Python as it is written, after the names that its text gives, and each command
line through the real parser, its keys against the real recipes."""

import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_toys import pipeline_folder
from first_hour import write_ddpm
from torch import nn

import fewstep
from fewstep import commands
from fewstep.cli import _parsed, _split
from fewstep.generation.reflow import make_pairs
from fewstep.networks import MLP, SecondTime
from fewstep.objectives import OBJECTIVES
from fewstep.runs.recipes import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBERS = {15: "fifteen", 16: "sixteen", 17: "seventeen", 18: "eighteen", 19: "nineteen", 22: "twenty-two"}
# Pages whose blocks need what is not here, or have tests of their own: a network, a page that is served, a model of
# gigabytes, a file of ONNX, pipelines of text.
ELSEWHERE = {
    "coming-from.md",
    "hub.md",
    "playground.md",
    "planning.md",
    "runtimes.md",
    "exporting.md",
    "text-to-image.md",
    "style-lora.md",
    "symptoms.md",
    "tune-a-distilled-model.md",
}
COMMAND = re.compile(r"(?:^|(?<=  )|-m )(fewstep [a-z].*?)(?=   |  fewstep|$)")
COMMANDS = {
    "train", "distill", "plan", "sample", "ui", "evaluate", "compare", "reflow", "encode", "export", "convert", "push",
    "cite", "recipes",
}  # fmt: skip


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _command_lines(page: Path) -> list[str]:
    """What is to be typed on a page: in blocks, and in lines that are set in by four spaces."""
    lines = [line for block in _blocks(page, "bash") for line in re.sub(r"\\\n *", "", block).splitlines()]
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"^    (.*)$", text, re.MULTILINE)
    return [part for line in lines for part in COMMAND.findall(line) if part.split()[1] in COMMANDS]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_parses(page: Path) -> None:
    for line in _command_lines(page):
        words = takewhile(lambda word: word != ">", shlex.split(line, comments=True)[1:])  # the shell's
        words = ["1" if word == "N" else word for word in words]
        rest, overrides = _split(words)
        args = _parsed(rest)
        if args.name not in (*commands.DEFAULTS, "plan"):
            continue
        usual = "photos-teacher" if "teacher" not in overrides else "finetune" if args.name == "train" else "distill"
        recipe = args.recipe or usual
        if recipe.isupper() or recipe.endswith("my-recipe.yaml"):
            recipe = "checkerboard-itvm"  # stands for any
        with suppress(FileNotFoundError):  # a file of the reader's own
            load_recipe(recipe, {"name": "x", **overrides})


def test_there_are_lines_to_check() -> None:
    lines = {str(page.relative_to(ROOT)): _command_lines(page) for page in PAGES}
    assert len(lines["README.md"]) >= 12
    assert len(lines["docs/index.md"]) == len(COMMANDS) + 1
    assert sum(map(len, lines.values())) > 90


def test_what_is_counted_is_so() -> None:
    fields = [name for name, method in OBJECTIVES.items() if getattr(method, "trains_field", False)]
    index = (ROOT / "docs" / "index.md").read_text()
    assert f"`MeanFlow()` and [{NUMBERS[len(OBJECTIVES) - len(fields) - 3]} more]" in index
    assert all(f"`{name}()`" in index for name in fields)
    for page in ("README.md", "docs/index.md"):
        assert NUMBERS[len(OBJECTIVES)][1:] in (ROOT / page).read_text()


class _ViT(nn.Module):
    """What the page on networks of one's own takes for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def embed_time(self, t: Any) -> Any:
        return t[:, None].expand(-1, 128)

    def decode(self, x: Any, time: Any, class_labels: Any) -> Any:
        return self.layer(x) + time.mean(1).view(-1, 1, 1, 1)

    def forward(self, x: Any, t: Any, class_labels: Any) -> Any:
        return self.decode(x, self.embed_time(t), class_labels)


def _names(page: Path) -> dict[str, Any]:
    """What the text around the blocks of a page gives names to."""
    names: dict[str, Any] = {"fewstep": fewstep, "torch": torch}
    match page.name:
        case "README.md" | "converting.md" | "lora.md":
            return names | {"data": torch.randn(16, 3, 16, 16)}
        case "diff2flow.md":
            from diffusers import DDPMScheduler

            return names | {"my_unet": _ViT(), "my_net": _ViT(), "scheduler": DDPMScheduler()}
        case "your-own-model.md":
            images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
            names |= {name: getattr(fewstep, name) for name in ("FlowMap", "Linear", "NetworkField")}
            names |= {"ViT": _ViT, "SecondTime": SecondTime, "noise": images, "labels": labels}
            return names | {"data": torch.utils.data.TensorDataset(images, labels)}
        case "loading.md" | "students.md":
            return names | {"images": torch.zeros(1, 3, 32, 32)}
    student = fewstep.NetworkField(MLP(2))
    rows = torch.randn(64, 2)
    return names | {"teacher": fewstep.CheckerboardField(), "student": student, "data": rows, "images": rows}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that pages name."""
    place = tmp_path_factory.mktemp("docs")
    write_ddpm(place / "my-ddpm")
    pipeline_folder(place / "stable-diffusion", "sd")
    return place


WITH_PYTHON = [page for page in PAGES if _blocks(page, "python") and page.name not in ELSEWHERE]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_every_block_of_python_runs(page: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    fit: Callable[..., Any] = fewstep.fit
    names = _names(page)

    def short(*given: Any, **options: Any) -> Any:
        return fit(*given, **{**options, "steps": 2, "batch": 8, "chunk": 8, "quiet": True, "device": "cpu"})

    def few(teacher: Any, folder: str, count: int, **options: Any) -> Any:
        return make_pairs(teacher, folder, 64, **{**options, "steps": 2})

    monkeypatch.setattr(fewstep, "fit", short)
    monkeypatch.setattr("fewstep.generation.reflow.make_pairs", few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in _blocks(page, "python"):
            exec(compile(block, page.name, "exec"), names)
