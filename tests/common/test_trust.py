"""Code that a folder names runs only where the user says so, or wrote it; what a name gives is looked at first."""

import json
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fewstep
from fewstep.cli import main
from fewstep.common import trust
from fewstep.common.options import find_object
from fewstep.runs.loading import open_run
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training.fingerprint import _SEEN, flat
from fewstep.training.sealed import seal

SMALL: dict[str, Any] = {
    "name": "small",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
    "data": "eight-gaussians",
    "objective": "ITVM",
    "training": {"steps": 2, "batch": 32, "quiet": True},
    "evaluation": {"count": 0},
}
# A file of somebody's: that it ran is seen by what lies beside it.
CODE = """
from pathlib import Path

from torch import nn

import fewstep
from fewstep.networks import MLP
from fewstep.runs.teachers import EXACT

Path(__file__).with_name("RAN").touch()


class Own(fewstep.ITVM):
    pass


def teacher():
    return EXACT["eight-gaussians"]()


def network(width: int = 8):
    return MLP(2, times=2, width=width, depth=2)
"""


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without code."""
    out = tmp_path_factory.mktemp("honest") / "run"
    run(load_recipe(SMALL), out)
    return out


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is, with code and a memory of their own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trust, "_written", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "code.py").write_text(CODE)
    return tmp_path


@pytest.fixture
def received(honest: Path, home: Path) -> Callable[..., Path]:
    """A run folder that came from elsewhere, with these changes to its recipe."""

    def make(name: str = "received", **changes: Any) -> Path:
        folder = home / name
        shutil.copytree(honest, folder)
        tree = yaml.safe_load((folder / "recipe.yaml").read_text())
        tree |= changes
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        for file in folder.glob("checkpoints/*/state.json"):  # which says so too
            state = json.loads(file.read_text())["state"]
            seen = {key: value for key, value in state["fingerprint"].items() if key in _SEEN}
            said = flat({key: value for key, value in tree.items() if key not in ("name", "evaluation", "coupling")})
            file.write_text(seal({**state, "fingerprint": {**seen, **said}}))
        return folder

    return make


def ran(home: Path) -> bool:
    return bool(list(home.rglob("RAN")))


# What is said to run, by the part of the recipe that says it; {code} is a file of theirs.
NAMED: dict[str, dict[str, Any]] = {
    "teacher": {"teacher": {"source": "{code}:teacher"}},
    "weaker": {"teacher": {"source": "eight-gaussians", "guidance": {"scale": 2.0, "weak": "{code}:teacher"}}},
    "network": {"student": {"network": "{code}:network"}},
    "objective": {"objective": "{code}:Own"},
    "shell": {"teacher": {"source": "os:system", "options": {"command": "touch RAN"}}},
    "shell as network": {"student": {"network": "os:system", "options": {"command": "touch RAN"}}},
    "shell as objective": {"objective": {"name": "os:system", "command": "touch RAN"}},
}
COMMANDS = [
    ["evaluate", "{run}", "--count", "8", "--steps", "1", "--teacher-steps", "1"],
    ["sample", "{run}", "--count", "2"],
    ["sample", "{run}", "--count", "2", "--teacher"],
    ["plan", "{run}"],
    ["plan", "--teacher", "{run}", "--data", "eight-gaussians"],
    ["export", "{run}", "out"],
    ["export", "{run}", "out", "--format", "torch"],
    ["export", "{run}", "out", "--adapter"],
    ["reflow", "{run}", "--count", "2", "--out", "out"],
    ["convert", "{run}", "--out", "out"],
    ["encode", "--teacher", "{run}", "--data", "photos", "--out", "out"],
    ["train", "{run}"],
    ["train", "{run}", "--dry-run"],
    ["distill", "{run}", "--steps", "3"],
    ["distill", "checkerboard-itvm", "--teacher", "{run}", "--dry-run"],
    ["distill", "{run}/recipe.yaml", "--dry-run"],
    ["compare", "{run}", "--methods", "ITVM", "LMD"],
    ["ui", "{run}"],
    ["edit", "{run}", "{run}/recipe.yaml"],
]


def filled(value: Any, **names: Any) -> Any:
    if isinstance(value, dict):
        return {key: filled(inner, **names) for key, inner in value.items()}
    return value.format(**names) if isinstance(value, str) else value


@pytest.mark.takes_seconds
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("named", NAMED)
def test_no_command_runs_what_a_received_run_names(
    named: str, words: list[str], received: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "objective" in named and words[0] == "compare":
        pytest.skip("its methods take the place of the objective")
    folder = received(**filled(NAMED[named], code="theirs/code.py"))
    capsys.readouterr()
    assert main([word.format(run=folder.name) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: received names code, ")
    assert said.count("\n") == 1
    assert len(said) < 400
    assert "--trust" in said
    assert ("os:system" if "shell" in named else "code.py:") in said
    assert not ran(home)


@pytest.mark.parametrize("place", ["teacher", "start", "weaker"])
def test_nor_what_a_run_names_that_another_leads_to(
    place: str, received: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    received("inner", **filled(NAMED["network"], code="theirs/code.py"), objective="FlowMatching")
    other: dict[str, dict[str, Any]] = {
        "teacher": {"teacher": {"source": "inner"}},
        "start": {"student": {"start": "inner"}},
        "weaker": {"teacher": {"source": "eight-gaussians", "guidance": {"scale": 2.0, "weak": "inner"}}},
    }
    received("middle", **other[place])
    received("outer", teacher={"source": "middle"})
    (home / "mine.yaml").write_text(yaml.safe_dump({**SMALL, **other[place]}))
    for words in (["sample", "middle"], ["evaluate", "outer"], ["train", "mine.yaml", "--dry-run"], ["plan", "middle"]):
        capsys.readouterr()
        assert main(words) == 2, words
        assert "inner names code, " in capsys.readouterr().err, words
    assert not ran(home)


def test_commands_that_only_look_run_nothing_even_where_it_is_trusted(
    received: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = received(**filled(NAMED["network"], code="theirs/code.py"), objective="theirs/code.py:Own")
    (folder / "quality.json").write_text(
        json.dumps(
            {"facts": {"shape": [2], "count": 8, "seed": 0}, "rows": [{"model": "student", "steps": 1, "nfe": 1}]}
        )
    )
    assert main(["cite", "received"]) == 0
    assert "eprint = {2505.01169}" in capsys.readouterr().out  # of the class that it derives from, read as text
    assert main(["recipes", "received"]) == 0
    main(["push", "received", "me/x"])
    main(["compare", "received", "received"])
    assert not ran(home)
    assert main(["sample", "received", "--count", "2", "--trust"]) == 0
    assert ran(home)
    (home / "theirs" / "RAN").unlink()
    _forget_modules()
    assert main(["cite", "received"]) == 0
    assert not ran(home)


def _forget_modules() -> None:
    from fewstep.common.options import _module_of

    _module_of.cache_clear()


def test_trust_runs_it_and_is_remembered(received: Callable[..., Path], home: Path) -> None:
    folder = received(**filled(NAMED["network"], code="theirs/code.py"))
    with pytest.raises(ValueError, match="received names code"):
        fewstep.load("received")
    fewstep.load("received", trust=True)
    assert ran(home)
    fewstep.load("received")
    notes = list((home / "state" / "fewstep" / "runs").iterdir())
    assert len(notes) == 1
    assert stat.S_IMODE(notes[0].stat().st_mode) == 0o600
    trust._written.clear()  # as another process would
    open_run("received")
    # Another recipe, another place, a damaged note: it is asked for again.
    kept = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(kept + "\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml is not as you wrote it"):
        open_run("received")
    (folder / "recipe.yaml").write_text(kept)
    open_run("received")
    shutil.copytree(folder, home / "copy")
    with pytest.raises(ValueError, match="copy names code"):
        open_run("copy")
    notes[0].write_text("[]")
    with pytest.raises(ValueError, match="not known to be written by you"):
        open_run("received")


@pytest.mark.takes_seconds
def test_a_run_of_ones_own_needs_no_word(home: Path) -> None:
    tree = {**SMALL, **filled(NAMED["network"], code="theirs/code.py"), "objective": "theirs/code.py:Own"}
    (home / "mine.yaml").write_text(yaml.safe_dump(tree))
    assert main(["distill", "mine.yaml", "--out", "runs/mine"]) == 0
    trust._written.clear()
    for words in (
        ["sample", "runs/mine", "--count", "2"],
        ["train", "runs/mine", "--steps", "3"],
        ["export", "runs/mine"],
    ):
        assert main(words) == 0
        trust._written.clear()
    open_run("runs/mine")


def test_code_in_the_folder_is_never_remembered(
    received: Callable[..., Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever replaces the folder replaces it too, and what it imports."""
    folder = received(student={"network": "code.py:network"})
    (home / "theirs" / "code.py").rename(folder / "code.py")
    for _ in range(2):
        assert main(["sample", "received", "--count", "2"]) == 2
        assert "it lies in that folder" in capsys.readouterr().err
        assert main(["sample", "received", "--count", "2", "--trust"]) == 0
    assert not (home / "state").exists()


def test_code_that_appears_in_another_place_is_not_what_was_written(
    received: Callable[..., Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in a recipe is looked for where one is, then beside the recipe: neither place may stand for the old."""
    folder = received(**filled(NAMED["network"], code="theirs/code.py"))
    open_run("received", trust=True)
    elsewhere = home / "elsewhere"
    shutil.copytree(home / "theirs", elsewhere / "theirs")
    (elsewhere / "theirs" / "RAN").unlink()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ValueError, match="not at the place"):
        open_run(folder)
    shutil.copytree(home / "theirs", folder / "theirs")
    (home / "away").mkdir()
    monkeypatch.chdir(home / "away")
    with pytest.raises(ValueError, match="it lies in that folder"):
        open_run(folder)
    assert not (elsewhere / "theirs" / "RAN").exists()


def test_what_the_user_names_runs(received: Callable[..., Path], home: Path) -> None:
    received(**filled(NAMED["objective"], code="theirs/code.py"))
    # A flag takes the place of what the folder names.
    assert main(["distill", "received", "--objective", "LMD", "--dry-run"]) == 0
    assert not ran(home)
    assert main(["distill", "received", "--objective", "theirs/code.py:Own", "--dry-run"]) == 0
    assert ran(home)


def test_a_memory_that_cannot_be_written_is_one_note(
    home: Path, received: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "file"))
    received(**filled(NAMED["network"], code="theirs/code.py"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        open_run("received", trust=True)
        open_run("received")  # this process knows
    assert len([w for w in said if "could not be written down" in str(w.message)]) == 1


KINDS = """
import functools
from os import system
from subprocess import run

from torch import nn
from fewstep import VelocityField
from fewstep.runs import build


class Net(nn.Module):
    pass


def plain():
    return build.EXACT["spiral"]()


def said() -> VelocityField:
    return plain()


@functools.cache
def kept():
    return plain()


def text() -> str:
    return "x"


def number():
    return 7


instance = Net()
"""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("os:system", "a builtin_function_or_method"),
        ("subprocess:run", "a function that does not say by an annotation"),
        ("shutil:rmtree", "a function that does not say by an annotation"),
        ("builtins:exec", "a builtin_function_or_method"),
        ("subprocess:Popen", "a class Popen, and a VelocityField or FlowMap is wanted"),
        ("FILE:system", "a builtin_function_or_method"),
        ("FILE:run", "a function that does not say by an annotation"),
        ("FILE:text", "a function that returns a str"),
        ("FILE:Net", "a class Net"),
        ("FILE:instance", "a Net, and a class"),
        ("FILE:number", "gave a int, not a VelocityField"),
        ("os:nothing", "unknown name in os"),
        ("no.such:thing", "no module 'no' is installed"),
        (":thing", "no module '' is installed"),
    ],
)
def test_what_a_name_gives_is_looked_at_before_it_is_called(
    name: str, why: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where the user names it."""
    (home / "kinds.py").write_text(KINDS)
    tree = {**SMALL, "teacher": {"source": name.replace("FILE", "kinds.py"), "options": {}}}
    (home / "mine.yaml").write_text(yaml.safe_dump(tree))
    assert main(["distill", "mine.yaml", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_functions_of_ones_own_file_and_those_that_say_what_they_return_are_fine(home: Path) -> None:
    (home / "kinds.py").write_text(KINDS)
    for name in ("plain", "said", "kept"):
        assert callable(find_object(f"kinds.py:{name}", fewstep.VelocityField))
    with pytest.raises(ValueError, match="an objective is a class"):
        load_recipe({**SMALL, "objective": "kinds.py:plain"})
    with pytest.raises(ValueError, match="gave a int, not a network"):
        fewstep.runs.build.build(load_recipe({**SMALL, "student": "kinds.py:number"}))


def test_bytecode_beside_a_file_is_not_what_runs(home: Path) -> None:
    """What is read before --trust is said is what runs: Python would take a .pyc of the same time and size."""
    import importlib.util
    import marshal

    file = home / "code.py"
    file.write_text("WHICH = 'text'\n")
    kept = Path(importlib.util.cache_from_source(str(file)))
    kept.parent.mkdir()
    stamp, size = int(file.stat().st_mtime), file.stat().st_size
    other = marshal.dumps(compile("from torch.nn import Linear as WHICH", "code.py", "exec"))
    header = importlib.util.MAGIC_NUMBER + bytes(4) + stamp.to_bytes(4, "little") + size.to_bytes(4, "little")
    kept.write_bytes(header + other)
    with pytest.raises(ValueError, match="is a str"):
        find_object(f"{file}:WHICH", fewstep.VelocityField)


def test_each_file_of_a_folder_that_names_code_has_its_own_note(home: Path) -> None:
    folder, code = home / "run", {"network": "theirs/code.py:network"}
    folder.mkdir()
    for name in ("recipe.yaml", "student.json"):
        (folder / name).write_text(name)
        trust.remember(folder, folder / name, code)
    trust._written.clear()
    for name in ("recipe.yaml", "student.json"):
        trust.check_folder(folder, folder / name, code)
    (folder / "config.json").write_text("")
    with pytest.raises(ValueError, match="not known to be written by you"):
        trust.check_folder(folder, folder / "config.json", code)
