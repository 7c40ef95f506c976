"""What `make package` does: builds sdist and wheel into dist/ and tries them where fewstep's sources are not.

The environment is a fresh one: the wheel and the other packages of this one, but not fewstep's own sources. In an empty
folder the commands of a first hour are typed; the tests of the sdist are collected against the installed wheel.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CARRIED = [f"fewstep/pretrained/{name}/model_index.json" for name in ("fashion-mnist", "fashion-mnist-fast")]
IN_WHEEL = ["fewstep/py.typed", *CARRIED]
IN_SDIST = ["pyproject.toml", "Makefile", "constraints.txt", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"]
# Nothing that was built or measured here belongs to a package.
NOT_IN_EITHER = re.compile(r"(^|/)(_build|__pycache__|\.venv|\.git)/|^runs/|\.pyc$")


def build(out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, stdout=subprocess.DEVNULL)
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def missing(sdist: Path, wheel: Path) -> list[str]:
    """What the two lack, and what they have too much."""
    with zipfile.ZipFile(wheel) as file:
        inside = set(file.namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fewstep").rglob("*") if path.is_file()}
    sources = {path for path in sources if "__pycache__" not in path}
    beside = [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "examples").glob("*.py")]
    wanted = {*IN_WHEEL, *sources, *(f"fewstep/{path.relative_to(ROOT)}" for path in beside)}
    ours = re.compile(r"fewstep(-[\w.]+\.dist-info)?/")
    wrong = [f"the wheel lacks {name}" for name in sorted(wanted - inside)]
    wrong += [f"the wheel has {name}" for name in sorted(inside) if not ours.match(name)]
    with tarfile.open(sdist) as file:
        packed = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    wrong += [f"the sdist lacks {name}" for name in sorted({*IN_SDIST, *sources} - packed)]
    return wrong + [f"{name} is packed" for name in sorted(inside | packed) if NOT_IN_EITHER.search(name)]


def environment(home: Path, wheel: Path) -> Path:
    """A venv with the wheel, and links to every other package of this one; its python."""
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for folder in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        for entry in Path(folder).iterdir():
            if "fewstep" not in entry.name and entry.suffix != ".pth" and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    return python


def main() -> None:
    sdist, wheel = build(ROOT / "dist")
    if wrong := missing(sdist, wheel):
        raise SystemExit("\n".join(wrong))
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        python = environment(home / "env", wheel)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        clean |= {"HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(home / "state"), "XDG_CACHE_HOME": str(home / "cache")}

        def run(*command: str | Path, cwd: Path = home, fails: bool = False) -> str:
            print("$", Path(command[0]).name, *command[1:], flush=True)
            done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
            if bool(done.returncode) != fails:
                raise SystemExit(f"{done.stdout}\n{done.stderr}")
            return done.stderr if fails else done.stdout

        fewstep = home / "env" / "bin" / "fewstep"
        place_of, version = run(python, "-c", "import fewstep as f; print(f.__file__, f.__version__)").split()
        assert Path(place_of).is_relative_to(home), f"fewstep is that of {place_of}, not of the wheel"
        assert f"-{version}-" in wheel.name, f"the wheel {wheel.name} has version {version}"
        assert version in run(fewstep, "--version")
        names = run(fewstep, "recipes")
        for recipe in (ROOT / "recipes").glob("*.yaml"):
            assert recipe.stem in names, f"fewstep recipes does not list {recipe.stem}"
        run(fewstep, "distill", "checkerboard-itvm", "--steps", "20", "--evaluation.count", "500", "--out", "points")
        run(fewstep, "distill", "fashion-mnist-demo", "--steps", "2", "--data.count", "64", "--evaluation.count", "8",
            "--evaluation.extractor", "none", "--evaluation.metrics", "[rmse]", "--out", "pictures")  # fmt: skip
        # The example network comes along; the weights that it is made with do not.
        said = run(fewstep, "distill", "mnist-vit-datafree", "--dry-run", fails=True)
        assert "no weights at mnist-x1-flow-vit.pth" in said, said
        run(fewstep, "sample", "pictures", "--steps", "2", "--count", "4", "--out", "grid.png")
        run(fewstep, "export", "pictures", "pipeline")
        for file in ("points/recipe.yaml", "pictures/report.html", "grid.png", "pipeline/model_index.json"):
            assert (home / file).stat().st_size > 0, f"{file} was not written"
        json.loads((home / "pipeline" / "model_index.json").read_text())
        with tarfile.open(sdist) as file:
            file.extractall(home / "sdist", filter="data")
        [unpacked] = (home / "sdist").iterdir()
        shutil.rmtree(unpacked / "fewstep")  # so that the tests see the wheel
        collected = run(python, "-m", "pytest", "--collect-only", "-qq", cwd=unpacked)
    tests = sum(int(line.rsplit(": ", 1)[1]) for line in collected.splitlines() if re.search(r": \d+$", line))
    assert tests > 4000, f"only {tests} tests of the sdist were collected:\n{collected}"
    print(f"{sdist.name} and {wheel.name} are in dist/; the wheel runs, and the sdist has {tests} tests")


if __name__ == "__main__":
    main()
