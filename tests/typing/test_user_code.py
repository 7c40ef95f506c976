"""The public API as a type checker sees it from outside: fewstep is a package among others, not the sources at hand."""

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fewstep

USER_CODE = Path(__file__).with_name("user_code.py")
WRONG = {
    "a name that is not there": "import fewstep\n\nfewstep.nope\n",
    "a path for noise": "import fewstep\n\n\ndef f(model: fewstep.FlowMap) -> None:\n    fewstep.sample(model, 'x')\n",
    "a map without its second time": "import fewstep\n\n\ndef f(m: fewstep.FlowMap) -> None:\n    m(m.gamma, 1.0)\n",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose environment has every package of this one, and fewstep as it is installed."""
    home = tmp_path_factory.mktemp("outside")
    packages = home / "env" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    for folder in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        for entry in Path(folder).iterdir():
            if "fewstep" not in entry.name and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    (packages / "fewstep").symlink_to(Path(fewstep.__file__).parent)
    config = {"include": ["*.py"], "venvPath": ".", "venv": "env", "typeCheckingMode": "strict"}
    (home / "pyrightconfig.json").write_text(json.dumps(config))
    return home


def complaints(home: Path) -> dict[str, list[str]]:
    """What pyright finds wrong, by file."""
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson"], cwd=home, capture_output=True, text=True)
    found: dict[str, list[str]] = {file.name: [] for file in home.glob("*.py")}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        found[Path(one["file"]).name].append(f"line {one['range']['start']['line'] + 1}: {one['message']}")
    return found


@pytest.mark.takes_seconds
def test_user_code_passes_in_strict_mode_and_wrong_code_does_not(outside: Path) -> None:
    shutil.copy(USER_CODE, outside)
    for number, text in enumerate(WRONG.values()):
        (outside / f"wrong_{number}.py").write_text(text)
    found = complaints(outside)
    assert found.pop(USER_CODE.name) == []
    assert len(found) == len(WRONG)
    assert [name for name, wrong in found.items() if not wrong] == []


def test_every_public_name_is_in_the_user_code() -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(USER_CODE.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fewstep"
    }
    assert set(fewstep.__all__) - used == set()


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(fewstep.__file__).parent / "py.typed").is_file()
