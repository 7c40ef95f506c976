"""`fewstep cite`: entries that BibTeX reads, for all that a run used, and the pages of the methods that point to it."""

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from toys.places import ROOT

import fewstep
from fewstep import cli
from fewstep.flows.exact import CheckerboardField
from fewstep.objectives import OBJECTIVES
from fewstep.runs import cite as citing
from fewstep.runs.cite import bibliography, cite
from fewstep.runs.loading import make_teacher
from fewstep.runs.objective import make_objective
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

DOCS = ROOT / "docs"
PAGES = sorted(page for page in (DOCS / "methods").glob("*.md") if page.name != "index.md")
RECIPE: dict[str, Any] = {
    "name": "points",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
    "data": "eight-gaussians",
    "objective": "ITVM",
    "training": {"steps": 2, "batch": 64, "quiet": True},
    "evaluation": {"count": 0},
}
TEACHERS = """
from pathlib import Path

from torch import nn
from fewstep import ITVM, Linear, NetworkField, VariancePreserving

Path(__file__).with_suffix(".ran").touch()


class Net(nn.Module):
    def forward(self, x, t):
        return x


def diffusion():
    return NetworkField(Net(), VariancePreserving(), "noise").on(Linear())


class Closer(ITVM):
    pass


class Other(Closer):
    sources: tuple[str, ...] = ("2601.00001", "2601.00002")
"""


def write(folder: Path, **changes: Any) -> Path:
    """A recipe in a file, which names teachers in one beside it."""
    (folder / "my_teachers.py").write_text(TEACHERS)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return file


def numbers(text: str) -> list[str]:
    return re.findall(r"eprint = {(.*?)}", text)


def test_every_entry_is_whole() -> None:
    file = Path(citing.__file__).with_name("citations.bib").read_text()
    entries = bibliography()
    assert file.count("@") == len(entries)  # none was lost in reading, none is there twice
    assert len({entry.split(",", 1)[0] for entry in entries.values()}) == len(entries)
    for number, entry in entries.items():
        assert entry.count("@") == 1
        assert entry.count("{") == entry.count("}")
        fields = dict(re.findall(r"^  (\w+) = {(.*)},?$", entry, re.MULTILINE))
        assert list(fields) == ["title", "author", "year", "eprint", "archivePrefix", "url"]
        assert all(fields.values())
        assert re.fullmatch(r"\d{4}\.\d{5}", number)
        assert fields["year"] == f"20{number[:2]}"
        assert fields["url"].endswith(number)
        # One line a field, with a comma after each but the last.
        assert [line[-1] for line in entry.splitlines()] == [","] * 6 + ["}", "}"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_method_has_its_papers(name: str) -> None:
    sources = OBJECTIVES[name].sources
    assert sources
    assert set(sources) <= set(bibliography())
    said = cite(name)
    assert numbers(said) == list(sources)
    assert said.count(f"% {name}, the objective\n@misc") == len(sources)


def test_a_plain_run_cites_its_method_alone(tmp_path: Path) -> None:
    assert numbers(cite(write(tmp_path))) == ["2505.01169"]


def test_what_fine_tuning_uses_is_cited(tmp_path: Path) -> None:
    student = {"network": "auto", "lora": {"rank": 2}, "image": 1}
    assert numbers(cite(write(tmp_path, student=student))) == ["2505.01169", "2106.09685", "2211.09800"]


def test_guidance_and_coupling_and_times_are_cited(tmp_path: Path) -> None:
    teacher = {
        "source": "eight-gaussians",
        "guidance": {"scale": 1.5, "interval": [0.1, 0.9], "null": {"class_labels": 8}},
    }
    objective = {"name": "LSD", "times": "logit-normal(-0.4, 1)", "learned": True}
    said = cite(write(tmp_path, teacher=teacher, coupling="ot", objective=objective))
    assert numbers(said) == ["2505.18825", "2403.03206", "2312.02696", "2302.00482", "2207.12598", "2404.07724"]
    for words in ("logit-normal times", "the optimal-transport coupling", "classifier-free guidance", "on an interval"):
        assert re.search(f"^% .*{words}", said, re.MULTILINE)
    assert "2404.07724" not in cite(write(tmp_path, teacher=teacher | {"guidance": {"scale": 1.5, "null": {"c": 8}}}))


def test_reflow_pairs_are_cited(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs.json").write_text("{}")
    assert numbers(cite(write(tmp_path, data=str(tmp_path / "pairs")))) == ["2505.01169", "2209.03003"]


def test_a_teacher_of_ones_own_is_not_made_to_see_what_it_uses(tmp_path: Path) -> None:
    said = cite(write(tmp_path, teacher="my_teachers.py:diffusion"))
    assert numbers(said) == ["2505.01169"]
    assert "% what the teacher" in said
    assert "my_teachers.py:diffusion uses is not known: no code is run to cite it" in said


def test_a_teacher_on_a_path_of_diffusion_is_cited(tmp_path: Path) -> None:
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    said = cite(write(tmp_path, teacher=str(tmp_path / "ddpm")))
    assert numbers(said) == ["2505.01169", "2506.02221"]


@pytest.mark.takes_seconds
def test_a_teacher_that_was_trained_here_is_cited_too(tmp_path: Path) -> None:
    tree = {key: value for key, value in RECIPE.items() if key != "teacher"} | {"objective": "FlowMatching"}
    out = tmp_path / "teacher"
    run(load_recipe(tree), out)
    said = cite(write(tmp_path, teacher=str(out)))
    assert numbers(said) == ["2505.01169", *OBJECTIVES["FlowMatching"].sources]
    assert "% of the teacher: FlowMatching, the objective\n" in said


def test_a_teacher_that_is_gone_is_a_remark(tmp_path: Path) -> None:
    said = cite(write(tmp_path, teacher=str(tmp_path / "gone")))
    assert numbers(said) == ["2505.01169"]
    assert re.search(
        r"^% what the teacher .*gone uses is not known, as it cannot be loaded: no folder", said, re.MULTILINE
    )


def test_a_paper_is_printed_once_with_all_that_it_is_cited_for() -> None:
    said = cite("LSD", "PSD", "checkerboard-lmd")
    assert numbers(said) == ["2505.18825", "2406.07507"]
    assert "% LSD, the objective; PSD, the objective; LMD, the objective\n@misc" in said


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown run, recipe or method 'itvm': did you mean 'ITVM'"):
        cite("itvm")
    with pytest.raises(FileNotFoundError, match="no recipe 'nowhere/run'"):
        cite("nowhere/run")
    write(tmp_path)
    with pytest.raises(ValueError, match="diffusion is no objective"):
        cite(f"{tmp_path / 'my_teachers.py'}:diffusion")


def test_a_method_of_ones_own_is_read_as_text(tmp_path: Path) -> None:
    recipe = write(tmp_path, objective="my_teachers.py:Closer")
    assert numbers(cite(recipe)) == list(OBJECTIVES["ITVM"].sources)
    assert numbers(cite(f"{tmp_path / 'my_teachers.py'}:Other")) == ["2601.00001", "2601.00002"]
    assert not (tmp_path / "my_teachers.ran").exists()
    (tmp_path / "my_teachers.py").write_text("class :")
    assert "my_teachers.py:Closer uses is not known: " in cite(recipe)
    assert "os:system uses is not known: no code is run to cite it" in cite(write(tmp_path, objective="os:system"))


def test_the_command_prints_entries_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cite", "ITVM", "checkerboard-lmd"]) == 0
    said = capsys.readouterr()
    assert said.out == cite("ITVM", "checkerboard-lmd")
    assert "fewstep cite ITVM checkerboard-lmd > papers.bib" in said.err
    assert cli.main(["cite", "IVTM"]) == 2
    assert "did you mean 'ITVM'" in capsys.readouterr().err


# The pages of the methods: what they say to type is what there is.


def test_every_method_has_a_page() -> None:
    said = [
        name for page in PAGES for name in re.findall(r"^\*\*Cite\.\*\* `fewstep cite (\w+)`", page.read_text(), re.M)
    ]
    assert sorted(said) == sorted(OBJECTIVES)
    table = (DOCS / "methods" / "index.md").read_text()
    assert {name for name, _ in re.findall(r"^\| \[(\w+)\]\((.*?)\)", table, re.M)} == set(OBJECTIVES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_those_of_its_method(page: Path) -> None:
    text = page.read_text()
    name = re.findall(r"`fewstep cite (\w+)`", text)[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parsed = [cli.parsed(shlex.split(command)[1:]) for command in commands]
    trainings = [args for args in parsed if args.command in ("distill", "train")]
    assert trainings
    for args in trainings:
        recipe = load_recipe(args.recipe, args.overrides)
        assert recipe.objective.name == name
        teacher = make_teacher(recipe.teacher) if recipe.teacher and recipe.teacher.source == "checkerboard" else None
        if teacher or recipe.teacher is None:
            make_objective(recipe, teacher)


@pytest.mark.takes_seconds
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        names = {
            "fewstep": fewstep,
            "teacher": CheckerboardField(),
            "field": CheckerboardField(),
            "data": torch.zeros(4, 2),
        }
        exec(block, names)
        made = [value for value in names.values() if isinstance(value, nn.Module)]
        assert {type(value).__name__ for value in made} & set(OBJECTIVES)


@pytest.mark.parametrize(
    "page", [*PAGES, *(DOCS / page for page in ("methods/index.md", "guides/choosing.md", "guides/own-objective.md"))]
)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_table_of_methods_is_true() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(.*?\)(?:, \w+)? \|(.*)\|$", (DOCS / "methods" / "index.md").read_text(), re.M)
    for name, row in rows:
        teacher, derivative, copy, _, share, _, papers = (cell.strip() for cell in row.split("|"))
        method = OBJECTIVES[name]
        signature = inspect.signature(method).parameters
        wanted = signature.get("teacher")
        assert teacher == ("no" if wanted is None else "yes" if wanted.default is wanted.empty else "may"), name
        assert set(papers.split(", ")) <= set(method.sources), name
        if "diagonal" in signature:
            default = signature["diagonal"].default
            assert share == ".5 or .75" if default is None else float(share) == default, name
        assert (copy != "no") <= ("ema" in signature), name
        assert (derivative != "no") <= ("jvp" in signature), name
